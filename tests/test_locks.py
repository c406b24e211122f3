"The same command twice at once on the same target: one works, and the other says so; a killed one leaves no lock."
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_dataset import boxes_for, film, listed, noise, one_line, site, small_city, still, tree  # noqa: F401

from reid_nb import crop_store as cs
from reid_nb import dataset as dataset_
from reid_nb.parts import extract as extract_
from reid_nb.parts.core import BadInput, lock
from reid_nb.parts.detections import Dets, write_dets

@pytest.fixture(scope='module')
def city(tmp_path_factory):
    "A video whose crops take some seconds to write."
    root = tmp_path_factory.mktemp('city')
    videos, _ = small_city(root, ['videoNumbr1'], 300)
    film(next(videos.rglob('*.mp4')), 300, colour=still)
    frame, obj = np.repeat(np.arange(300), 20), np.tile(np.arange(20), 300)
    box = np.stack([0*obj, 0*obj, 0*obj + 100., 0*obj + 90.], 1).astype(np.float32)
    write_dets(root/'dets'/'xx+yy+videoNumbr1.pkl',
               Dets('LUPerson-NL', frame, obj, obj, box, np.ones(len(frame), np.float32), 96, 12.))
    return root

def cut(city):
    "The folder of the city's crops."
    if not (city/'crops').exists(): dataset_.extract(city/'videos', city/'dets', city/'crops', workers=1)
    return city/'crops'

def start(name, *args, **kw):
    exe = Path(sys.executable).parent/name
    return subprocess.Popen([exe, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def wait_for(there, job):
    "Wait until the job is in the middle of its work."
    for _ in range(3000):
        if there(): return
        assert job.poll() is None, job.communicate()
        time.sleep(.02)

def finish(job):
    out, err = job.communicate(timeout=600)
    job.stdout, job.stderr = out, err
    return job

def held(path):
    "Whether somebody holds the lock; its file is there a moment before."
    locks = Path('/proc/locks')
    return path.exists() and (not locks.exists() or f':{path.stat().st_ino} ' in locks.read_text())

def commands(city, dest):
    "Each command that writes, and what it has written when it is in the middle of its work."
    videos, dets, crops = city/'videos', city/'dets', city/'crops'
    locked = dest/'.lock'
    return dict(
        extract=(('reid_extract', videos, dets, '--dest', dest, '--workers', '1'),
                 lambda: len(list(dest.glob('.part/*/*.jpg'))) > 50),
        detect=(('reid_detect', videos, '--dest', dest), lambda: held(locked)),
        align=(('reid_align', videos, dets, '--dest', dest), lambda: held(locked)),
        pack=(('reid_pack', crops, dest.with_suffix('.lmdb')), dest.with_suffix('.lmdb').exists))

@pytest.mark.parametrize('what', ['extract', 'detect', 'align', 'pack'])
def test_twice_at_once_and_killed(city, tmp_path, run, what):
    dest = tmp_path/'dest'
    if what == 'pack': cut(city)
    command, busy = commands(city, dest)[what]
    first = start(*command)
    wait_for(busy, first)
    first.send_signal(signal.SIGSTOP)              # it stays in the middle of its work
    try: one_line(run(*command), 'another process is writing it')
    finally: first.kill()                          # whatever comes of it, nobody else would
    first.wait()
    again = start(*command)                        # kill -9 leaves no lock
    third = run(*command) if what == 'extract' else None
    assert finish(again).returncode == 0 or third and third.returncode == 0, again.stderr
    assert run(*command).returncode == 0
    if what == 'extract':
        counts, = extract_.crop_counts(dest)
        assert counts['crops'] == len(list(dest.rglob('*.jpg'))) == 6000
    if what == 'pack': assert cs.verify_store(dest.with_suffix('.lmdb')) == 6000

def test_two_downloads_at_once(site, tmp_path, run):  # noqa: F811
    stems = [f'xx+yy+video{i:06d}' for i in range(3)]
    for i, s in enumerate(stems):
        site.files[f'{s}.mp4'] = film(tmp_path/f'{i}.mp4', 20, (256, 256), noise).read_bytes()
    site.pause = 3/max(len(v)/4096 for v in site.files.values())
    vnames, dest = listed(tmp_path/'l.txt', stems), tmp_path/'v'
    command = 'reid_download', vnames, '--dest', dest, '--url', site.url, '--pause', '0', '--workers', '2'
    first = start(*command)
    wait_for(lambda: list(dest.glob('.part/*')), first)
    one_line(run(*command), 'another process is writing it')
    shown = run('reid_download', vnames, '--dest', dest, '--census')     # to look is allowed
    assert shown.returncode == 0 and 'waiting' in shown.stdout, shown.stderr
    assert finish(first).returncode == 0, first.stderr
    assert {p.name: p.read_bytes() for p in dest.rglob('*.mp4')} == site.files
    with sqlite3.connect(dest/'census.sqlite') as db:
        assert {s for s, in db.execute('SELECT state FROM videos')} == {'done'}

def test_two_exports_at_once(tmp_path, city):
    store = cs.pack(cut(city), tmp_path/'s.lmdb')
    (tmp_path/'out').mkdir()
    with lock(tmp_path/'out'), pytest.raises(BadInput, match='another process'): cs.export_crops(store, tmp_path/'out')
    assert cs.export_crops(store, tmp_path/'out') == 6000 and not (tmp_path/'out'/'.lock').exists()

def test_crops_that_vanish_while_they_are_cut_are_missed(tmp_path, monkeypatch):
    videos, dets = small_city(tmp_path)
    real, seen = dataset_.write_jpeg, []
    def lose(path, *args):
        real(path, *args)
        seen.append(path)
        if len(seen) == 9: seen[0].unlink()
    monkeypatch.setattr(dataset_, 'write_jpeg', lose)
    with pytest.raises(BadInput, match='19 files of 20 crops'):
        dataset_.extract(videos, dets, tmp_path/'crops', workers=1)
    assert tree(tmp_path/'crops') == {}
    assert dataset_.extract(videos, dets, tmp_path/'crops', workers=1)[0]['crops'] == 20

def test_a_folder_without_the_right_to_write(run, tmp_path, tiny_disk):
    videos, dets = small_city(tmp_path)
    subprocess.run(['mount', '-o', 'remount,ro', tiny_disk], check=True)
    vnames = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1'])
    for name, *args in (('reid_extract', videos, dets), ('reid_detect', videos), ('reid_align', videos, dets),
                        ('reid_download', vnames)):
        one_line(run(name, *args, '--dest', tiny_disk), 'ead-only')
    assert os.listdir(tiny_disk) == []
