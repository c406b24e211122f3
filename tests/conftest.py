"Fixtures shared by the tests: the toy city, the real data where it is, the console scripts, a disk that fills up."
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from scripts import run_script

# Trainings are compared bit by bit, and several programs share two cores: one thread each.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Hundreds of processes are started: each would compile the package anew where nobody may keep what is compiled.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False
# With a network and without, the people of the drawn clips are found by the same detector.
os.environ.setdefault('REID_DETECTOR', 'motion')

ROOT = Path(__file__).resolve().parent.parent
# What you have imported is not what the tests are about.
os.environ['REID_HOME'] = str(ROOT/'nbs'/'_run'/'library')

DATA = Path(os.environ.get('REID_DATA', ROOT.parent/'shared'/'data'))

def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes more than about 20 seconds on two cores')

ONE_NETWORK = '06_biometrics', '08_demo', 'test_browser', 'test_jupyter'   # train it in one folder
FIRST = ('02_toy_city', '06_biometrics', '04_finetune', 'test_dataset', '05_evaluate', '03_moco', 'test_quickstart',
         '15_tracks', '16_gallery')

@pytest.hookimpl(tryfirst=True)   # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "A file to a worker, a notebook to a worker; what takes longest begins, and what all the others need."
    def name(item):
        "The notebook that is run, else the file of tests"
        nb = getattr(item, 'callspec', None) and item.callspec.params.get('nb')
        return Path(nb).name if nb and item.path.stem == 'test_notebooks' else item.path.stem
    for item in items:
        item.add_marker(pytest.mark.xdist_group('network' if name(item) in ONE_NETWORK else name(item)))
    items.sort(key=lambda item: FIRST.index(name(item)) if name(item) in FIRST else len(FIRST))

@pytest.fixture(scope='session')
def data():
    "Folder of real videos, detections and crops; it is not part of the project."
    if not (DATA/'real_city').is_dir():
        pytest.skip(f'no real data at {DATA}: put it there or name its folder in REID_DATA')
    return DATA

@pytest.fixture(scope='session')
def toy():
    "The lesson's toy city, the same that the notebooks use."
    from reid_nb.parts.toy_city import build_toy
    return build_toy(ROOT/'nbs'/'_run'/'toy')

@pytest.fixture(scope='session')
def market(tmp_path_factory):
    "A Market-style folder: 8 identities, each a colour, 6 images each."
    import cv2
    import numpy as np
    from reid_nb.parts.core import rng_of
    root = tmp_path_factory.mktemp('market')
    for part,pids in dict(bounding_box_train=range(1,9), query=range(11,15), bounding_box_test=range(11,15)).items():
        (root/part).mkdir()
        for pid in pids:
            for i in range(6):
                img = rng_of(part, pid, i).integers(0, 99, (64,32,3), np.uint8)
                img += rng_of(pid).integers(0, 150, 3, np.uint8)
                cam = 1 if part=='query' else 2+i%2
                cv2.imwrite(str(root/part/f'{pid:04d}_c{cam}s1_{i:06d}_00.jpg'), img)
    return root

@pytest.fixture(scope='session')
def run():
    """Runs a console script of this interpreter: `run('reid_pack', *args)` -> its CompletedProcess, text captured.

    The time limit only guards against hanging: it is ten times what the slowest known machine needs, or more."""
    def _run(name, *args, timeout=3000, **kw):
        if not kw.keys() - {'cwd'}: return run_script(name, *args, timeout=timeout, **kw)
        exe = Path(sys.executable).parent/name
        return subprocess.run([exe, *map(str, args)], capture_output=True, text=True, timeout=timeout, **kw)
    return _run

# Roboflow's reid, and fast-reid; with --no-deps, the rest of what they import is what we import, too.
PEERS = 'reid==0.1.0rc1', 'fastreid==1.4.0', 'supervision', 'pydeprecate', 'timm', 'yacs', 'termcolor', 'tabulate'

@pytest.fixture(scope='session')
def peers(tmp_path_factory, worker_id):
    "A folder with packages to compare with; `monkeypatch.syspath_prepend(peers)` makes them importable."
    here = tmp_path_factory.getbasetemp()
    home = (here if worker_id == 'master' else here.parent)/'peers'
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '--retries', '1', '--no-deps']
    with FileLock(f'{home}.lock'):   # one worker makes it, the others wait
        if not (home/'whole').exists():
            done = subprocess.run([*pip, '--target', home, *PEERS], capture_output=True, text=True)
            if done.returncode: pytest.skip(f'pip cannot get {PEERS[0]} and {PEERS[1]} here: nothing to compare with')
            (home/'whole').touch()
    return home

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
