"""Every notebook runs, and prints what is saved in it; lessons on the package alone, in a newer Python if there is one.

Words are compared exactly, numbers within 1 % (or what the cell says after `#| within:`), pictures by their number;
a cell with `#| varies:` prints what depends on the machine, and is only run."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from filelock import FileLock
from run_notebooks import copy_notebooks, differences, differs, names, option, run_notebook

def newer_python():
    "A Python 3.13 or 3.12 of this machine, from Debian or pyenv; None where there is none."
    for version in ('3.13', '3.12'):
        places = [shutil.which(f'python{version}'), *Path.home().glob(f'.pyenv/versions/{version}.*/bin/python')]
        for exe in filter(None, places):
            said = subprocess.run([exe, '-V'], capture_output=True, text=True)
            if said.stdout.startswith(f'Python {version}'): return exe

@pytest.fixture(scope='session')
def alone(tmp_path_factory, worker_id):
    "The name of a kernel that has the package from its wheel, and nothing of the repository."
    if not (exe := newer_python()): return 'python3'
    here = tmp_path_factory.getbasetemp()
    home = (here if worker_id == 'master' else here.parent)/'alone'
    with FileLock(f'{home}.lock'):   # one worker makes it, the other waits
        if not (home/'whole').exists():
            subprocess.run([exe, '-m', 'venv', home], check=True)
            pip = [home/'bin'/'python', '-m', 'pip', 'install', '-q', '--no-compile', '--disable-pip-version-check']
            subprocess.run([*pip, ROOT, 'ipykernel'], check=True)
            kernel = [home/'bin'/'python', '-m', 'ipykernel', 'install', '--prefix', home, '--name', 'alone']
            subprocess.run(kernel, check=True, capture_output=True)
            (home/'whole').touch()
    os.environ['JUPYTER_PATH'] = str(home/'share'/'jupyter')
    return 'alone'

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "The notebooks and nothing else; only what they write is kept where other tests find it, too."
    folder = tmp_path_factory.mktemp('nbs')
    copy_notebooks(folder)
    (ROOT/'nbs'/'_run').mkdir(exist_ok=True)
    (folder/'_run').symlink_to(ROOT/'nbs'/'_run')
    return folder

@pytest.mark.long
@pytest.mark.parametrize('nb', names())
def test_notebook(nb, folder, request):
    kernel = 'python3' if nb.startswith('parts/') else request.getfixturevalue('alone')
    fresh, *_ = run_notebook(folder, nb, kernel)
    assert differences(nbformat.read(ROOT/'nbs'/f'{nb}.ipynb', 4), fresh) == []

def test_nbdev_runs_notebooks_too():
    subprocess.run([Path(sys.executable).parent/'nbdev_test', '--path', 'nbs/00_start.ipynb'], cwd=ROOT, check=True)

@pytest.mark.parametrize('old, new, within, far', [
    ('mAP 0.412', 'mAP 0.415', .01, False), ('mAP 0.412', 'mAP 0.430', .01, True), ('mAP 0.412', 'mAP 0.46', .1, False),
    ('1,000 crops', '1,004 crops', .01, False), ('12000 crops', '12500 crops', .01, True),
    ('a match', 'no match', .01, True), ('12 crops', '12 crops, 3 videos', .01, True), ('<picture>', '', .01, True)])
def test_outputs_are_compared(old, new, within, far):
    assert differs(old, new, within) == far

def test_a_planted_output_is_found():
    "A page that shows what its code does not print."
    sources = "print('match')", "#| varies: time\n1"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    for cell, text in zip(nb.cells, ('match\n', '2')): cell.outputs = [nbformat.v4.new_output('stream', text=text)]
    planted = nbformat.from_dict(nb)
    for cell in planted.cells: cell.outputs[0].text = 'no match\n'
    assert differences(nb, nb) == [] and differences(planted, nb) == [(0, 'no match\n', 'match\n')]
    assert option(nb.cells[1], 'varies') == 'time'
