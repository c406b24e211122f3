"The main job from the command line: the real walk, the second walk that only reads, and what it refuses."
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

@pytest.fixture(scope='module')
def walk(run, tmp_path_factory):
    dest = tmp_path_factory.mktemp('walk')/'quickstart'
    done = run('reid_quickstart', '--dest', dest, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return dest, done.stdout

@pytest.mark.long
def test_the_walk_reports_every_door(walk):
    dest, said = walk
    for name in ('toy', 'download', 'extract', 'pack', 'moco', 'moco_0', 'scratch_0', 'enrol_Ada', 'ask_3', 'figures'):
        assert (dest/'steps'/f'{name}.json').exists()
    assert 'fine-tuned from MoCo' in said and 'colour histogram' in said and 'next: reid_demo' in said
    page = (dest/'report.html').read_text(encoding='utf-8')
    assert page.count('data:image/png;base64') >= 8 and not re.search(r'<script|src="http|href="http', page)

@pytest.mark.long
def test_what_it_learns_beats_guessing(walk):
    dest, _ = walk
    for kind in ('moco', 'scratch'):
        got = json.loads((dest/'results'/f'{kind}_0_market.json').read_text())
        assert got['protocol'] == 'market_folder' and got['figures']['mAP']['low'] > .1   # guessing: about .03

@pytest.mark.long
def test_a_second_walk_only_reads(walk, run):
    dest, _ = walk
    before = {f: f.stat().st_mtime_ns for f in dest.rglob('*') if f.suffix in ('.mp4', '.jpg', '.lmdb', '.safetensors')}
    done = run('reid_quickstart', '--dest', dest)
    steps = [line for line in done.stdout.splitlines() if line.startswith('[') and '/' in line[:5]]
    assert done.returncode == 0 and steps and all(line.endswith(': stands') for line in steps)
    assert before == {f: f.stat().st_mtime_ns for f in before}

@pytest.mark.long
def test_a_killed_walk_goes_on(tmp_path, run):
    dest = tmp_path/'walk'
    exe = [Path(sys.executable).parent/'reid_quickstart', '--small', '--dest', dest]
    with subprocess.Popen(exe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        for _ in range(600):
            if (dest/'steps'/'extract.json').exists(): break
            time.sleep(.1)
        p.send_signal(signal.SIGKILL)
    done = run('reid_quickstart', '--small', '--dest', dest)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'people are cut out: stands' in done.stdout and (dest/'report.html').exists()

def refused(done, words):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr[-2000:]

def test_a_taken_folder_is_left_alone(tmp_path, run):
    (tmp_path/'mine.txt').write_text('keep')
    refused(run('reid_quickstart', '--dest', tmp_path), 'not empty')
    assert [f.name for f in tmp_path.iterdir()] == ['mine.txt']

def test_another_seed_needs_another_folder(tmp_path, run):
    (tmp_path/'walk.json').write_text('{"seed": 1}')
    refused(run('reid_quickstart', '--dest', tmp_path), 'other settings')

def test_a_full_disk_is_said_in_one_line(tiny_disk, run):
    done = run('reid_quickstart', '--small', '--dest', tiny_disk/'walk')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and 'No space left' in done.stderr.splitlines()[-1]
    assert not (tiny_disk/'walk'/'steps'/'toy.json').exists()
    shutil.rmtree(tiny_disk/'walk')
