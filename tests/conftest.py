"Fixtures shared by the tests: the toy city, the real data where it is, the console scripts, a disk that fills up."
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Trainings are compared bit by bit, and several programs share two cores: one thread each.
os.environ.setdefault('OMP_NUM_THREADS', '1')

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get('REID_DATA', ROOT.parent/'shared'/'data'))

def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes more than about 20 seconds on two cores')

def pytest_collection_modifyitems(items):
    "The two longest files first, each in a worker of its own."
    first = ['test_quickstart.py', 'test_notebooks.py']
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))

@pytest.fixture(scope='session')
def data():
    "Folder of real videos, detections and crops; it is not part of the project."
    if not (DATA/'real_city').is_dir():
        pytest.skip(f'no real data at {DATA}: put it there or name its folder in REID_DATA')
    return DATA

@pytest.fixture(scope='session')
def toy():
    "The lesson's toy city, the same that the notebooks use."
    from reid_nb.toy_city import build_toy
    return build_toy(ROOT/'nbs'/'_run'/'toy')

@pytest.fixture(scope='session')
def run():
    "Runs a console script of this interpreter: `run('reid_pack', *args, **kw)` -> its CompletedProcess, text captured."
    def _run(name, *args, timeout=600, **kw):
        exe = Path(sys.executable).parent/name
        return subprocess.run([exe, *map(str, args)], capture_output=True, text=True, timeout=timeout, **kw)
    return _run

@pytest.fixture(scope='session')
def cuda():
    "A CUDA device; few machines have one."
    import torch
    if not torch.cuda.is_available(): pytest.skip('no CUDA device: what it does is not tried')
    return torch.device('cuda')

@pytest.fixture
def tiny_disk(tmp_path):
    "A folder on a 2 MB tmpfs, to see what a full disk does."
    mnt = tmp_path/'tiny_disk'
    mnt.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', mnt], capture_output=True, text=True)
    if made.returncode: pytest.skip(f'cannot mount a small tmpfs here: {made.stderr.strip()}')
    yield mnt
    subprocess.run(['umount', '-l', mnt], check=True)
