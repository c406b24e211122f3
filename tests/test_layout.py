"The tree is what the notebooks say: modules exported, notebooks cleaned, README made, code linted, lessons whole."
import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

BIN = Path(sys.executable).parent
LESSONS, PARTS = (sorted((ROOT/d).glob('[0-9]*.ipynb')) for d in ('nbs', 'nbs/parts'))
NOTEBOOKS = PARTS + LESSONS   # in the order in which they may lean on each other

def files(root):
    found = [f for d in ('nbs', 'nbs/parts', 'reid_nb', 'reid_nb/parts') for f in (root/d).iterdir()
             if f.suffix in ('.ipynb', '.py')]
    return {str(f.relative_to(root)): f.read_bytes() for f in found}

def test_modules_and_notebooks_agree(tmp_path):
    skip = shutil.ignore_patterns('_run', '__pycache__', '_proc')
    for d in ('nbs', 'reid_nb'): shutil.copytree(ROOT/d, tmp_path/d, ignore=skip, symlinks=True)
    for f in ('settings.ini', '_quarto.yml', 'README.md'): shutil.copy(ROOT/f, tmp_path)
    for tool in ('nbdev_clean', 'nbdev_export'): subprocess.run([BIN/tool], cwd=tmp_path, check=True)
    before, after = files(ROOT), files(tmp_path)
    assert [k for k in before | after if before.get(k) != after.get(k)] == []

def test_readme_is_made_from_index():
    made = subprocess.run([sys.executable, ROOT/'tests'/'readme.py'], capture_output=True, text=True, check=True).stdout
    assert made == (ROOT/'README.md').read_text(encoding='utf-8')

def test_ruff():
    ruff = [BIN/'ruff', 'check', '-q', 'nbs', 'tests', 'setup.py']
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_lesson_is_in_shape(nb):
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    assert re.fullmatch(r'# .+\n> .+', ''.join(cells[0]['source']))
    assert len(nb.read_bytes()) < 500_000
    assert all(len(line) < 200 for c in cells if c['cell_type'] == 'code' for line in ''.join(c['source']).splitlines())
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert nb in PARTS or '## Summary' in text and '## Exercises' in text

def module_of(nb):
    found = re.search(r'#\| ?default_exp ([\w.]+)', nb.read_text(encoding='utf-8'))
    return found and found[1]

def code_of(nb):
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return ''.join(s + '\n' for s in sources if '%pip' not in s and '%%' not in s)

def test_no_arrow_runs_up():
    "A lesson leans on parts and on earlier lessons, a part on earlier parts; in tests beside the code too."
    order = {module_of(nb): k for k, nb in enumerate(NOTEBOOKS)}
    up = []
    for k, nb in enumerate(NOTEBOOKS):
        for wanted in set(re.findall(r'from reid_nb\.((?:parts\.)?\w+) import', code_of(nb))):
            if order[wanted] > k: up.append((nb.name, wanted))
    assert up == []

def modules():
    return [ROOT/'reid_nb'/(module_of(nb).replace('.', '/') + '.py') for nb in NOTEBOOKS if module_of(nb)]

def test_every_module_has_its_notebook():
    there = [f for d in ('reid_nb', 'reid_nb/parts') for f in (ROOT/d).glob('[a-z]*.py')]
    assert sorted(modules()) == sorted(there)

def test_a_name_means_one_thing():
    "No two modules define the same function, class or constant."
    where = {}
    for f in modules():
        for node in ast.parse(f.read_text(encoding='utf-8')).body:
            stored = [n.id for t in getattr(node, 'targets', []) for n in ast.walk(t) if isinstance(n, ast.Name)]
            defines = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            names = [node.name] if defines else stored if isinstance(node, ast.Assign) else []
            for n in {*names} - {'log', '__all__'}: where.setdefault(n, set()).add(f.stem)
    assert {n: sorted(m) for n, m in where.items() if len(m) > 1} == {}

@pytest.mark.parametrize('module, heavy', [
    ('core', 'torch lmdb av matplotlib sqlite3 gradio ultralytics torchreid'),
    ('models', 'lmdb av matplotlib sqlite3 gradio ultralytics'), ('gallery', 'torch av matplotlib gradio ultralytics'),
    ('metrics', 'torch lmdb av matplotlib sqlite3')])
def test_a_part_loads_what_it_needs(module, heavy):
    say = f'import sys, reid_nb.parts.{module}; print(*[m for m in {heavy.split()} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', say], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

def test_what_is_imported_is_declared():
    "Every package that a module imports is a requirement, or one of an extra, or is there because a notebook runs."
    def plain(name): return re.sub(r'[-_.]+', '-', name).lower()
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    words = ' '.join(v for k, v in ini['DEFAULT'].items() if k.endswith('requirements') and k != 'dev_requirements')
    declared = {plain(re.match(r'[\w.-]+', w)[0]) for w in words.split()}
    trees = [ast.parse(f.read_text(encoding='utf-8')) for f in (ROOT/'reid_nb').rglob('*.py')]
    names = {a.name for t in trees for n in ast.walk(t) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for t in trees for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and not n.level}
    there = {*sys.stdlib_module_names, 'reid_nb', 'IPython', 'jupyter_server', 'google'}   # the last on Colab alone
    tops = {name.split('.')[0] for name in names} - there
    owners = packages_distributions()
    assert [t for t in sorted(tops) if not {plain(d) for d in owners.get(t, [t])} & declared] == []

def test_the_tests_of_a_file_stay_together(request, worker_id):
    "Two workers would make everything twice, some of it in one folder; pytest 9.2 loses the groups of xdist 3.8."
    if worker_id == 'master': pytest.skip('one process')
    assert request.node.nodeid.endswith('@test_layout')
