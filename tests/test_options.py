"Every command, with words that make no sense: a result, or one line and exit code 2; nothing is left half-written."
import inspect
import io
import os
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import run_script

CONFIG = ConfigParser()
CONFIG.read(ROOT/'settings.ini')
SCRIPTS = dict(x.split('=') for x in CONFIG['DEFAULT']['console_scripts'].split())
LONG = {'reid_quickstart', 'reid_demo'}     # begin real work with any folder
WILD = ['', '-1', '0', 'nan', '-inf', '1e308', '9'*30, 'x'*300, '../..', '/', 'a\x01b', 'ünï', '--', '%s', 'None', '{}']

def call(name, words, folder):
    "Run a command as its script does, in this process; returns its exit code and what it printed"
    module, function = SCRIPTS[name].split(':')
    script = folder/name
    script.write_text(f'import sys\nfrom {module} import {function}\nsys.exit({function}())\n')
    out, err, before = io.TextIOWrapper(io.BytesIO()), io.StringIO(), sys.argv
    sys.argv = [str(script), *words]
    try:
        with redirect_stdout(out), redirect_stderr(err): runpy.run_path(str(script), run_name='__main__')
    except SystemExit as e: return e.code or 0, err.getvalue()
    finally: sys.argv = before
    return 0, err.getvalue()

def words_of(name, things):
    "Strategy: the command line of a command, with wild words"
    module, function = SCRIPTS[name].split(':')
    wild = st.sampled_from([*WILD, *things])
    parts = []
    for p in inspect.signature(getattr(import_module(module), function)).parameters.values():
        if p.default is p.empty: parts.append(wild.map(lambda w: [w]))
        elif p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            option = [f'--{p.name}'] if isinstance(p.default, bool) else None
            some = st.just(option) if option else wild.map(lambda w, n=p.name: [f'--{n}={w}'])
            parts.append(st.one_of(st.just([]), st.just([]), some))
    return st.tuples(*parts).map(lambda ps: sum(ps, []))

@pytest.mark.long
@pytest.mark.parametrize('name', sorted({*SCRIPTS} - LONG))
def test_words_that_make_no_sense(name, tmp_path, monkeypatch):
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    (tmp_path/'empty').mkdir()
    (tmp_path/'text.txt').write_text('no data\n')
    (tmp_path/'zeros.bin').write_bytes(bytes(5000))
    things = [str(tmp_path/n) for n in ('empty', 'text.txt', 'zeros.bin', 'none')]
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(words_of(name, things))
    def check(words):
        code, err = call(name, words, tmp_path)
        assert code in (0, 2), (words, code, err)
        assert 'Traceback' not in err and 'a fault of' not in err, (words, err)
        if code and 'usage:' not in err:
            lines = [x for x in err.replace('\r', '\n').splitlines() if x.startswith(f'{name}: ')]
            assert len(lines) == 1 and re.search(r'\w', lines[0].removeprefix(name)), (words, err)
        half = [p.name for p in (tmp_path/'here').rglob('*') if p.name.endswith(('.tmp', '.part'))]
        assert not half, (words, half)
    check()

@pytest.mark.parametrize('words', [['reid_evaluate', '--help'], ['reid_pack', 'none', 'a.lmdb'], ['reid_gallery'],
                                   ['reid_identify', '--fmr', 'x', 'a.mp4'], ['reid_import', '--list'], ['reid_erase']])
def test_a_forked_script_is_the_script(words, tmp_path):
    "The tests' own way to run a command, held against the plain one: exit code and every word."
    exe, *args = words
    plain = subprocess.run([Path(sys.executable).parent/exe, *args], cwd=tmp_path, capture_output=True, text=True,
                           env=dict(os.environ))     # without what readline has put beside them
    forked = run_script(exe, *args, cwd=tmp_path)
    assert (forked.returncode, forked.stdout, forked.stderr) == (plain.returncode, plain.stdout, plain.stderr)
