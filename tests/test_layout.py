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
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))

def files(root):
    found = [f for d in ('nbs', 'reid_nb') for f in (root/d).iterdir() if f.suffix in ('.ipynb', '.py')]
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
    assert '## Summary' in text and '## Exercises' in text

def test_rooms_look_only_down():
    order = {re.search(r'#\| ?default_exp (\w+)', f.read_text(encoding='utf-8'))[1]: k for k, f in enumerate(NOTEBOOKS)}
    for module, k in order.items():
        text = (ROOT/'reid_nb'/f'{module}.py').read_text(encoding='utf-8')
        assert all(order[m] < k for m in re.findall(r'^\s*from (?:reid_nb)?\.(\w+) import', text, re.M) if m in order)

def test_what_is_imported_is_declared():
    "Every package that a module imports is a requirement, or one of an extra."
    def plain(name): return re.sub(r'[-_.]+', '-', name).lower()
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    words = ' '.join(v for k, v in ini['DEFAULT'].items() if k.endswith('requirements') and k != 'dev_requirements')
    declared = {plain(re.match(r'[\w.-]+', w)[0]) for w in words.split()}
    trees = [ast.parse(f.read_text(encoding='utf-8')) for f in (ROOT/'reid_nb').glob('*.py')]
    names = {a.name for t in trees for n in ast.walk(t) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for t in trees for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and not n.level}
    tops = {name.split('.')[0] for name in names} - {*sys.stdlib_module_names, 'reid_nb', 'IPython'}
    owners = packages_distributions()
    assert [t for t in sorted(tops) if not {plain(d) for d in owners.get(t, [t])} & declared] == []
