"The main job from the command line: the small walk, the second walk that only reads, and what it refuses."
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reid_nb.parts.core import lock

@pytest.fixture(scope='module')
def walk(run, tmp_path_factory):
    "A walk that is killed when its crops are cut, and goes on: its folder, what was seen until then, and how it ended."
    dest, seen = tmp_path_factory.mktemp('walk')/'quickstart', {}
    def wait_for(step):
        while not (dest/'steps'/f'{step}.json').exists():
            assert p.poll() is None
            time.sleep(.05)
    exe = [Path(sys.executable).parent/'reid_quickstart', '--small', '--dest', dest]
    with subprocess.Popen(exe, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as p:
        seen['line'] = p.stdout.readline().strip()
        wait_for('toy')
        seen['page'] = (dest/'report.html').read_text(encoding='utf-8')
        wait_for('extract')
        p.send_signal(signal.SIGKILL)
    done = run('reid_quickstart', '--small', '--dest', dest)
    assert done.returncode == 0, done.stderr[-2000:]
    return dest, seen, done

@pytest.mark.long
def test_the_walk_reports_every_door(walk):
    dest, _, done = walk
    for name in ('look', 'toy', 'download', 'extract', 'pack', 'moco', 'rate0', 'moco_0', 'scratch_0', 'rate0_0',
                 'adds_rate0_market', 'calibrate', 'enrol_Ada', 'ask_3', 'roc'):
        assert (dest/'steps'/f'{name}.json').exists()
    for words in ('fine-tuned from MoCo', 'colour histogram', 'MoCo adds to nothing', 'MoCo adds to rate 0',
                  'next: reid_demo'):
        assert words in done.stdout
    page = (dest/'report.html').read_text(encoding='utf-8')
    assert page.count('data:image/png;base64') == 9 and not re.search(r'<script|src="http|href="http|refresh', page)

@pytest.mark.long
def test_the_control_sees_what_moco_sees_and_learns_nothing(walk):
    from reid_nb.parts.weights import load_checkpoint
    dest, *_ = walk
    (moco, a), (still, b) = [load_checkpoint(dest/k/'moco.safetensors') for k in ('moco', 'rate0')]
    differ = [k for k, v in a['settings'].items() if b['settings'][k] != v]
    assert set(differ) <= {'lr', 'epochs'} and b['settings']['lr'] == 0 and a['digest'] == b['digest']
    assert moco.keys() == still.keys()

@pytest.mark.long
def test_the_bar_tells_the_minutes_from_the_start_to_the_end(walk):
    *_, done = walk
    told = [float(m) for m in re.findall(r'the walk .*?([\d.]+) minutes left', done.stderr)]
    assert len(told) > 10 and told[0] > .3 and told[-1] == 0
    assert '100 %' in done.stderr.replace('\r', '\n').splitlines()[-1]

@pytest.mark.long
def test_a_second_walk_only_reads(walk, run):
    dest, *_ = walk
    before = {f: f.stat().st_mtime_ns for f in dest.rglob('*') if f.suffix in ('.mp4', '.jpg', '.lmdb', '.safetensors')}
    done = run('reid_quickstart', '--small', '--dest', dest)
    steps = [line for line in done.stdout.splitlines() if line.startswith('[') and '/' in line[:5]]
    assert done.returncode == 0 and steps and all(line.endswith(': stands') for line in steps)
    assert before == {f: f.stat().st_mtime_ns for f in before}

@pytest.mark.long
def test_a_killed_walk_goes_on(walk):
    "And while it walks there is a page that grows, with a picture before anything long begins."
    dest, seen, done = walk
    page = dest/'report.html'
    assert seen['line'] == f'look on while it grows: {page.absolute().as_uri()}'
    assert seen['page'].count('data:image/png') == 1 and 'refresh' in seen['page'] and 'minutes left' in seen['page']
    assert 'people are cut out: stands' in done.stdout and 'refresh' not in page.read_text(encoding='utf-8')

def refused(done, words):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr[-2000:]

def test_a_taken_folder_is_left_alone(tmp_path, run):
    (tmp_path/'mine.txt').write_text('keep')
    refused(run('reid_quickstart', '--dest', tmp_path), 'not empty')
    assert [f.name for f in tmp_path.iterdir()] == ['mine.txt']

def test_another_seed_needs_another_folder(tmp_path, run):
    (tmp_path/'walk.json').write_text(json.dumps(dict(seed=1)))
    refused(run('reid_quickstart', '--dest', tmp_path), 'other settings')

def test_two_walks_in_one_folder(tmp_path, run):
    with lock(tmp_path):
        got = run('reid_quickstart', '--dest', tmp_path, '--small')
    assert got.returncode == 2 and got.stderr.startswith('reid_quickstart: ') and 'another process' in got.stderr, got
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize('text', ['', '{"seed"', '[]'])
def test_a_damaged_record_is_named(tmp_path, run, text):
    (tmp_path/'walk.json').write_text(text)
    got = run('reid_quickstart', '--dest', tmp_path, '--small')
    assert got.returncode == 2 and 'walk' in got.stderr and len(got.stderr.strip().splitlines()) == 1, got

def test_small_and_thorough_exclude_each_other(tmp_path, run):
    refused(run('reid_quickstart', '--small', '--thorough', '--dest', tmp_path/'walk'), 'small or thorough')

def test_a_full_disk_is_said_in_one_line(tiny_disk, run):
    done = run('reid_quickstart', '--small', '--dest', tiny_disk/'walk')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and 'No space left' in done.stderr.splitlines()[-1]
    assert not (tiny_disk/'walk'/'steps'/'toy.json').exists()
    shutil.rmtree(tiny_disk/'walk')
