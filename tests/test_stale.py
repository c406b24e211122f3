"What was made from something else is made anew or refused, in every step that skips what is done; and links, reports."
import json
import multiprocessing
import os
import pickle
import shutil
import sqlite3
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from test_dataset import boxes_for, film, listed, one_line, small_city, still, tree

from reid_nb import crop_store as cs
from reid_nb import dataset as dataset_
from reid_nb.parts import align as al
from reid_nb.parts import detect, download, packing
from reid_nb.parts import extract as extract_
from reid_nb.parts.core import BadInput, decode
from reid_nb.parts.detections import read_dets
from reid_nb.parts.parallel import run_jobs

HERE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def fill(root, shade, n=6):
    "Some grey crops, under names that do not say how grey."
    for k in range(n):
        path = root/'it'/'rome'/'vid00000001'/f'{k:06d}_0000001_00.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((64, 32, 3), shade, np.uint8))
    return root

def as_before(monkeypatch):
    "Packs as the version before did: the source is known by its names alone."
    new = cs.folder_source
    def old(crops):
        source = new(crops)
        return cs.Source(source.earlier, source.total, source.items)
    monkeypatch.setattr(cs, 'folder_source', old)

# --- stores

def test_pictures_that_have_changed_are_not_in_the_store(run, tmp_path):
    crops, store = fill(tmp_path/'crops', 50), tmp_path/'crops.lmdb'
    assert run('reid_pack', crops, store).returncode == 0
    fill(crops, 200)
    for more in (), ('--verify',): one_line(run('reid_pack', crops, store, *more), 'was begun with other pictures')
    store.unlink()
    assert run('reid_pack', crops, store, '--verify').returncode == 0 and decode(cs.CropStore(store)[0]).mean() == 200

@HERE
@given(k=st.integers(0, 5), how=st.sampled_from(['bytes', 'time', 'size', 'gone', 'more', 'boxes']))
def test_any_change_of_a_source_is_seen(tmp_path, k, how):
    crops, store = tmp_path/'crops', tmp_path/'s.lmdb'
    shutil.rmtree(crops, ignore_errors=True)
    store.unlink(missing_ok=True)
    files = sorted(fill(crops, 50).rglob('*.jpg'))
    cs.pack(crops, store)
    cs.pack(crops, store)
    path = files[k]
    if how == 'bytes': path.write_bytes(path.read_bytes()[:-2] + b'ab')
    if how == 'time': os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    if how == 'size':
        when = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes() + b'x')
        os.utime(path, ns=(when, when))
    if how == 'gone': path.unlink()
    if how == 'more': shutil.copy(path, path.with_name('z.jpg'))
    if how == 'boxes': (path.parent/'counts.json').write_text('{}')
    with pytest.raises(BadInput, match='was begun with other pictures'): cs.pack(crops, store)

def test_a_store_of_the_version_before_is_taken_where_its_pictures_are_the_same(tmp_path, monkeypatch):
    crops, whole, half, add = fill(tmp_path/'crops', 50), tmp_path/'whole.lmdb', tmp_path/'half.lmdb', cs.add_batch
    with monkeypatch.context() as m:
        as_before(m)
        cs.pack(crops, whole)
        def die(txn, table, items, state):
            if state.batches: raise KeyboardInterrupt
            add(txn, table, items, state)
        m.setattr(cs, 'add_batch', die)
        with pytest.raises(KeyboardInterrupt): cs.pack(crops, half, batch=2)
    when = whole.stat().st_mtime_ns
    assert cs.pack(crops, whole).finished and whole.stat().st_mtime_ns == when
    assert cs.pack(crops, half).digest == cs.pack(crops, whole).digest     # and a half one goes on
    one = next(crops.rglob('*.jpg'))
    data, was = one.read_bytes(), one.stat().st_mtime_ns
    one.write_bytes(data + b'x')
    os.utime(one, ns=(was, was))       # as old as before, and of another size
    with pytest.raises(BadInput, match='other pictures'): cs.pack(crops, whole)
    one.write_bytes(data)              # of the same size, and younger than the store
    with pytest.raises(BadInput, match='other pictures'): cs.pack(crops, whole)

def write_lmdb(path, shade, n=4):
    jpeg = cv2.imencode('.jpg', np.full((64, 32, 3), shade, np.uint8))[1].tobytes()
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for k in range(n): txn.put(f'00001_{k:06d}_0000001_00'.encode(), jpeg)

def test_sources_that_are_databases(run, tmp_path):
    write_lmdb(tmp_path/'old', 50)
    pack = 'reid_pack', tmp_path/'old', tmp_path/'new.lmdb', '--from-lmdb'
    assert run(*pack).returncode == 0 and run(*pack).returncode == 0
    write_lmdb(tmp_path/'old', 200)
    one_line(run(*pack), 'was begun with other pictures')
    shards = tmp_path/'shards'
    shards.mkdir()
    cs.pack(fill(tmp_path/'a', 50), shards/'a.lmdb')
    merge = 'reid_pack', shards, tmp_path/'all.lmdb', '--merge'
    assert run(*merge).returncode == 0 and run(*merge).returncode == 0
    (shards/'a.lmdb').unlink()
    cs.pack(fill(tmp_path/'a', 200), shards/'a.lmdb')
    one_line(run(*merge), 'was begun with other pictures')
    one_line(run('reid_pack', shards, shards/'b.lmdb', '--merge'), 'would be one of them')
    assert not (shards/'b.lmdb').exists()

def test_a_store_straight_from_videos(tmp_path):
    videos, dets = small_city(tmp_path)
    video = next(videos.rglob('*.mp4'))
    def source(): return cs.video_source(videos, dets)
    cs.pack(source(), tmp_path/'s.lmdb')
    cs.pack(source(), tmp_path/'s.lmdb')
    os.utime(video)
    with pytest.raises(BadInput, match='other pictures'): cs.pack(source(), tmp_path/'s.lmdb')

def test_an_export_is_of_this_store(tmp_path):
    for shade in 50, 200:
        store = cs.pack(fill(tmp_path/str(shade), shade), tmp_path/f'{shade}.lmdb')
        assert cs.export_crops(store, tmp_path/'out') == 6
        assert all(path.read_bytes() == store[0] for path in (tmp_path/'out').rglob('*.jpg'))

# --- detections, crops, verdicts, downloads

def swap(video, n=40):
    "Another video under the same name and of the same size."
    size, other = video.stat().st_size, film(video.with_name('other.mp4'), n, colour=lambda i: (90, 120, 60))
    raw = other.read_bytes()
    other.unlink()
    assert len(raw) <= size
    video.write_bytes(raw + b'\0'*(size - len(raw)))

def test_detections_of_another_video_or_other_options_are_made_anew(run, tmp_path):
    videos, _ = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2'])
    for path in videos.rglob('*.mp4'): film(path, colour=lambda i: (60, 90, 120))      # motion finds the square
    video, dest = videos/'xx'/'yy'/'xx+yy+videoNumbr1.mp4', tmp_path/'found'
    def made(*more):
        done = run('reid_detect', videos, '--dest', dest, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(': ')[1].strip(), done.stderr
    assert made() == ('2', '') and made() == ('0', '')
    swap(video, 30)
    n, said = made()
    assert n == '1' and 'made anew' in said and video.stem in said and made() == ('0', '')
    before = len(read_dets(dest/f'{video.stem}.pkl').frame)
    assert made('--every', '2')[0] == '2' and 0 < len(read_dets(dest/f'{video.stem}.pkl').frame) < before
    boxes_for(dest/f'{video.stem}.pkl')        # somebody else's
    raw = (dest/f'{video.stem}.pkl').read_bytes()
    n, said = made()
    assert n == '1' and 'unknown origin' in said and (dest/f'{video.stem}.pkl').read_bytes() == raw
    (dest/'xx+yy+videoNumbr2.json').write_text('{"made_from": {}, "dets": null}')   # killed while it was writing
    assert made()[0] == '1'

def test_weights_that_were_replaced_are_other_weights(tmp_path):
    weights, (video, note) = tmp_path/'w.onnx', (tmp_path/'v.mp4', tmp_path/'n.json')
    for path in weights, video, note: path.write_bytes(b'1')
    was = detect.detect_stamp(video, str(weights), 1)
    assert detect.same_origin(was, detect.detect_stamp(video, str(weights), 1), note)
    assert not detect.same_origin(was, detect.detect_stamp(video, f'{weights}::man', 1), note)
    unknown = was | dict(weights_file=None)    # yolo11n.pt, before it was downloaded
    weights.write_bytes(b'22')
    assert not detect.same_origin(was, detect.detect_stamp(video, str(weights), 1), note)
    assert detect.same_origin(unknown, detect.detect_stamp(video, str(weights), 1), note)

def test_crops_of_another_video_or_incomplete_ones_are_cut_anew(run, tmp_path):
    videos, dets = small_city(tmp_path)
    video, dest = next(videos.rglob('*.mp4')), tmp_path/'crops'
    folder = dest/'xx'/'yy'/'videoNumbr1'
    def extract():
        done = run('reid_extract', videos, dets, '--dest', dest)
        assert done.returncode == 0, done.stderr
        return done.stderr
    assert extract() == extract() == ''
    first = tree(dest)
    swap(video)
    assert 'made anew' in extract() and all(tree(dest)[k] != v for k, v in first.items()) and extract() == ''
    second, crop = tree(dest), next(folder.glob('*.jpg'))
    crop.unlink()
    assert 'made anew' in extract() and tree(dest) == second
    raw = video.read_bytes()
    video.write_bytes(b'no video')      # nothing was made anew, and only that is said
    one_line(run('reid_extract', videos, dets, '--dest', dest), '1 of 1', 'broken')
    assert tree(dest) == second
    video.write_bytes(raw)
    assert 'made anew' in extract()
    second = tree(dest)
    (folder/'counts.json').write_text('{"vid')
    assert 'damaged' in extract() and tree(dest) == second

def test_crops_of_the_version_before_are_taken_where_the_video_is_older(tmp_path):
    videos, dets = small_city(tmp_path)
    video, dest = next(videos.rglob('*.mp4')), tmp_path/'crops'
    dataset_.extract(videos, dets, dest, workers=1)
    note = dest/'xx'/'yy'/'videoNumbr1'/'counts.json'
    counts = json.loads(note.read_text())
    del counts['made_from']['modified']
    note.write_text(json.dumps(counts))
    crop = next(note.parent.glob('*.jpg'))
    when = crop.stat().st_mtime_ns
    dataset_.extract(videos, dets, dest, workers=1)
    assert crop.stat().st_mtime_ns == when
    os.utime(video)
    dataset_.extract(videos, dets, dest, workers=1)
    assert crop.stat().st_mtime_ns > when

def test_verdicts_on_another_video_and_mended_boxes_that_are_gone(toy, tmp_path, caplog):
    stem = 'alba+porto+toyPortCam1'
    video, pkl = tmp_path/'videos'/f'{stem}.mp4', tmp_path/'dets'/f'{stem}.pkl'
    for folder in 'videos', 'dets': (tmp_path/folder).mkdir()
    shutil.copy(toy/'videos'/'alba'/'porto'/video.name, video)
    shutil.copy(toy/'dets'/pkl.name, pkl)
    def judged(**kw):
        note = tmp_path/'aligned'/f'{stem}.json'
        before = note.stat().st_mtime_ns if note.exists() else 0
        al.align(tmp_path/'videos', tmp_path/'dets', tmp_path/'aligned', frames=5, **kw)
        return note.stat().st_mtime_ns > before
    assert judged() and not judged()
    os.utime(video)
    assert judged() and 'made anew' in caplog.text and not judged()
    (tmp_path/'aligned'/pkl.name).unlink()
    assert judged() and (tmp_path/'aligned'/pkl.name).exists() and judged(least=.1)
    with pytest.raises(BadInput, match='written over'): al.align(tmp_path/'videos', tmp_path/'dets', tmp_path/'dets')
    (tmp_path/'aligned'/f'{stem}.json').write_text('{}')
    with pytest.raises(BadInput, match='toyPortCam1.json: damaged'): judged()

@pytest.fixture
def shop(tmp_path):
    "Two videos on a site of this machine: (function that downloads them, folder for them, folder of the site)."
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args): return None
    stems = [f'xx+yy+videoNumbr{k}' for k in (1, 2)]
    for k, stem in enumerate(stems): film(tmp_path/'site'/f'{stem}.mp4', 20 + k)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=tmp_path/'site'))
    Thread(target=server.serve_forever, daemon=True).start()
    vnames = listed(tmp_path/'l.txt', stems)
    url = f'http://127.0.0.1:{server.server_address[1]}/{{stem}}.mp4'
    yield partial(download.download, vnames, tmp_path/'v', url, pause=0, retries=0), tmp_path/'v', tmp_path/'site'
    server.shutdown()
    server.server_close()

def test_done_means_the_video_that_the_census_speaks_of(shop, caplog):
    fetch, dest, site = shop
    video = dest/'xx'/'yy'/'xx+yy+videoNumbr1.mp4'
    def row():
        with sqlite3.connect(dest/'census.sqlite') as db: return db.execute(
            'SELECT state, frames, bytes FROM videos WHERE name = ?', [video.stem]).fetchone()
    fetch()
    assert row() == ('done', 20, video.stat().st_size)
    video.write_bytes(video.read_bytes()[:900])            # damaged: fetched again
    fetch()
    assert row()[:2] == ('done', 20) and video.read_bytes() == (site/video.name).read_bytes()
    assert 'looked at again' in caplog.text
    film(video, 30)                                        # another one: looked at again, and kept
    fetch()
    assert row() == ('done', 30, video.stat().st_size)
    caplog.clear()
    part = dest/'.part'/video.name                         # what is half fetched never takes its place
    part.parent.mkdir()
    part.write_bytes(b'half')
    video.write_bytes(video.read_bytes() + b'\0'*10)
    fetch()
    assert row()[:2] == ('done', 30) and video.read_bytes()[-10:] == b'\0'*10

# --- one video's failure

def explode(video, how):
    "A job that ends in any way."
    if how == 'fine': return how
    if how == 'odd': raise Odd(1, 2)
    if how == 'disk': raise OSError(28, 'No space left on device', str(video))
    kinds = dict(value=ValueError, memory=MemoryError, os=PermissionError, bad=BadInput, recursion=RecursionError,
                 unicode=lambda m: UnicodeDecodeError('utf-8', b'x', 0, 1, m), assertion=AssertionError)
    raise kinds[how]('two\nlines')

class Odd(Exception):
    "It cannot be unpickled, and would end a pool of processes."
    def __init__(self, a, b): super().__init__('odd')

KINDS = ['fine', 'odd', 'value', 'memory', 'os', 'bad', 'recursion', 'unicode', 'assertion']

@pytest.mark.parametrize('workers', [1, 2])
def test_whatever_a_video_raises_is_its_own_failure(workers):
    results, failed = run_jobs(explode, [(Path(f'{how}.mp4'), how) for how in KINDS], workers)
    assert results == ['fine'] and len(failed) == len(KINDS) - 1
    assert sorted(line.partition(': ')[0] for line in failed) == sorted(f'{how}.mp4' for how in KINDS[1:])
    assert not any('\n' in line for line in failed)
    with pytest.raises(OSError, match='No space left'): run_jobs(explode, [(Path('a.mp4'), 'disk')], workers)

def test_a_video_that_breaks_the_decoder_does_not_end_the_job(run, tmp_path, monkeypatch):
    videos, dets = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2', 'videoNumbr3'])
    names = [p.name for p in sorted(videos.rglob('*.mp4'))]
    real = dataset_.cut_people
    def odd(video, d, **kw):
        if video.name != names[1]: raise ValueError('a frame of no size')
        yield from real(video, d, **kw)
    monkeypatch.setattr(dataset_, 'cut_people', odd)
    with pytest.raises(BadInput) as e: dataset_.extract(videos, dets, tmp_path/'crops', workers=1)
    assert '2 of 3' in str(e.value) and names[0] in str(e.value) and names[2] in str(e.value)
    assert [c['video'] for c in extract_.crop_counts(tmp_path/'crops')] == [names[1][:-4]]

def test_a_dangling_link_is_one_failure(run, tmp_path):
    videos, dets = small_city(tmp_path)
    film(next(videos.rglob('*.mp4')), colour=lambda i: (60, 90, 120))
    (videos/'xx+yy+videoNumbr0.mp4').symlink_to(tmp_path/'nowhere')
    shutil.copy(dets/'xx+yy+videoNumbr1.pkl', dets/'xx+yy+videoNumbr0.pkl')
    for name, more in (('reid_extract', (dets,)), ('reid_detect', ()), ('reid_align', (dets, '--frames', '5'))):
        one_line(run(name, videos, *more, '--dest', tmp_path/name), '1 of 2', 'xx+yy+videoNumbr0.mp4')
        assert any('videoNumbr1' in k for k in tree(tmp_path/name))

# --- links and reports

def test_links_are_followed(run, tmp_path):
    disk = fill(tmp_path/'disk', 90)
    crops = fill(tmp_path/'crops', 50)
    (crops/'it'/'milan').symlink_to(disk/'it'/'rome')
    (crops/'it'/'rome'/'up').symlink_to(crops)           # a loop
    (crops/'nowhere.jpg').symlink_to(tmp_path/'nowhere')
    done = run('reid_pack', crops, tmp_path/'s.lmdb')
    assert done.returncode == 0 and 'skipped nowhere: missing' in done.stdout, done.stderr
    assert len(cs.CropStore(tmp_path/'s.lmdb')) == 12 and 'not followed' in done.stderr
    videos, dets = small_city(tmp_path/'a', ['videoNumbr1'])
    more, more_dets = small_city(tmp_path/'b', ['videoNumbr2'])
    (videos/'more').symlink_to(more)
    (dets/'more').symlink_to(more_dets)
    assert len(detect.find_videos(videos)) == len(detect.find_pairs(videos, dets)) == 2
    assert len(dataset_.extract(videos, dets, tmp_path/'cut', workers=1)) == 2

def test_crops_and_videos_on_another_disk(shop, tiny_disk, tmp_path):
    "A city is a link to another file system, where nothing can be moved to by a rename."
    videos, dets = small_city(tmp_path)
    dest = tmp_path/'crops'
    (dest/'xx').mkdir(parents=True)
    (tiny_disk/'yy').mkdir()
    (dest/'xx'/'yy').symlink_to(tiny_disk/'yy')
    assert dataset_.extract(videos, dets, dest, workers=1)[0]['crops'] == 20
    assert len(list((tiny_disk/'yy').rglob('*.jpg'))) == 20 and not list(tiny_disk.rglob('.part'))
    dataset_.extract(videos, dets, dest, workers=1, quality=50)
    fetch, dest, site = shop
    (dest/'xx').mkdir(parents=True)
    (dest/'xx'/'yy').symlink_to(tiny_disk/'yy')
    assert fetch()[0][:2] == ('done', 2) and not list(tiny_disk.rglob('.part'))

def test_reports_are_no_people(run, tmp_path):
    videos, dets = small_city(tmp_path)
    crops = tmp_path/'crops'
    done = run('reid_extract', videos, dets, '--dest', crops, '--report')
    assert done.returncode == 0 and (crops/'report.png').exists() and (crops/'sheet.jpg').exists(), done.stderr
    done = run('reid_pack', crops, tmp_path/'s.lmdb')
    assert done.returncode == 0 and 'report.png' in done.stderr and 'sheet.jpg' in done.stderr
    keys = cs.CropStore(tmp_path/'s.lmdb').keys.tolist()
    assert len(keys) == 20 and all(key.startswith(b'xx/yy/') for key in keys)
    assert run('reid_pack', tmp_path, tmp_path/'all.lmdb').returncode == 0       # from the folder above
    assert len(cs.CropStore(tmp_path/'all.lmdb')) == 20
    for made in ('--sample', crops/'look.png'), ('--export', crops/'out'):
        one_line(run('reid_pack', crops, tmp_path/'s.lmdb', *made), 'would be packed next time')
    shutil.copy(crops/'report.png', videos/'census.png')
    one_line(run('reid_pack', videos, tmp_path/'v.lmdb'), 'not one picture')

def test_what_is_left_out_is_said(run, tmp_path):
    crops = fill(tmp_path/'crops', 50)
    (crops/'a.tif').write_bytes(b'x')
    shutil.copy(next(crops.rglob('*.jpg')), crops/'b.gif')
    done = run('reid_pack', crops, tmp_path/'s.lmdb')
    assert done.returncode == 0 and '2 files left out' in done.stderr and 'a.tif' in done.stderr
    (tmp_path/'tif').mkdir()
    (tmp_path/'tif'/'a.tif').write_bytes(b'x')
    one_line(run('reid_pack', tmp_path/'tif', tmp_path/'t.lmdb'), 'not one picture', 'a.tif')
    twins = tmp_path/'twins'
    twins.mkdir()
    for ending in 'png', 'jpg': cv2.imwrite(str(twins/f'a.{ending}'), np.full((64, 32, 3), 7, np.uint8))
    assert 'skipped a: another one has this name' in run('reid_pack', twins, tmp_path/'w.lmdb').stdout
    videos, dets = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2'])
    (dets/'xx+yy+videoNumbr2.pkl').unlink()
    film(videos/'xx'/'yy'/'12:30:05.mp4')
    shutil.copy(next(videos.rglob('*.mp4')), videos/'xx+yy+videoNumbr3.wmv')
    shutil.copy(videos/'xx'/'yy'/'xx+yy+videoNumbr1.mp4', videos/'xx+yy+videoNumbr1.mkv')
    done = run('reid_extract', videos, dets, '--dest', tmp_path/'cut')
    assert done.returncode == 0
    for word in '12:30:05.mp4', 'wmv', 'has the same name', 'no detections of 1 of 2': assert word in done.stderr, word

def test_a_colon_in_a_path_is_no_address(run, tmp_path):
    videos, dets = small_city(tmp_path/'12:30')
    film(next(videos.rglob('*.mp4')), colour=still)
    for name, more in (('reid_detect', ()), ('reid_extract', ('12:30/dets',))):
        done = run(name, '12:30/videos', *more, '--dest', '12:30/'+name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

# --- doors

GOOD_COOKIES = b'# Netscape HTTP Cookie File\nexample.org\tFALSE\t/\tFALSE\t0\tsession\tabc\n'

@pytest.mark.parametrize('raw', [
    b'', b'\n\n', b'# Netscape HTTP Cookie File\n', b'[{"domain": ".example.org", "name": "a"}]', b'{"cookies": []}',
    b'<!DOCTYPE html><html>log in</html>', bytes(range(256)), GOOD_COOKIES.replace(b'\t', b' '), None,
    GOOD_COOKIES.decode().encode('utf-16'), GOOD_COOKIES.partition(b'\n')[2], GOOD_COOKIES + b'example.org\tTRUE\n'])
def test_a_cookies_file_of_another_form_is_refused_before_the_start(run, tmp_path, raw):
    path = tmp_path/'cookies'
    if raw is None: path.mkdir()
    else: path.write_bytes(raw)
    vnames = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1'])
    with pytest.raises(BadInput, match='cookies'): download.download(vnames, tmp_path/'v', cookies=path)
    assert not (tmp_path/'v').exists()
    if raw == b'': one_line(run('reid_download', vnames, '--dest', tmp_path/'v', '--cookies', path), 'cookies')

def test_good_cookies(tmp_path):
    for raw in GOOD_COOKIES, b'\xef\xbb\xbf' + GOOD_COOKIES.replace(b'\n', b'\r\n'), \
            GOOD_COOKIES.replace(b'example.org', b'#HttpOnly_example.org'):
        (tmp_path/'c.txt').write_bytes(raw)
        assert 'session' in download.read_cookies(tmp_path/'c.txt')

@pytest.mark.parametrize('form', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'latin-1', 'utf-8-sig'])
def test_lists_of_any_form(run, tmp_path, form):
    (tmp_path/'l.txt').write_bytes('xx+yy+videoNumbr1\r\nxx+z\u00fcrich+videoNumbr2\r\n'.encode(form))
    if form in ('latin-1', 'utf-8-sig'):
        names, bad = download.read_vnames(tmp_path/'l.txt')
        assert [n.id for n in names] == ['videoNumbr1'] and [n for n, _ in bad] == [2]
    else: one_line(run('reid_download', tmp_path/'l.txt', '--dest', tmp_path/'v', '--census'), 'l.txt')

def test_one_address_for_all_is_refused(run, tmp_path):
    vnames = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1', 'xx+yy+videoNumbr2'])
    for url in 'http://127.0.0.1:1/x.mp4', 'http://127.0.0.1:1/{city}.mp4', '{id.x}', '{', '{0}':
        one_line(run('reid_download', vnames, '--dest', tmp_path/'v', '--url', url), 'not an address')

def test_a_census_that_is_none(run, tmp_path):
    vnames, dest = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1']), tmp_path/'v'
    dest.mkdir()
    census = dest/'census.sqlite'
    def foreign(text):
        census.unlink(missing_ok=True)
        with sqlite3.connect(census) as db: db.execute(text)
        return census.read_bytes()
    good = foreign('CREATE TABLE songs(name)')
    for raw in good, foreign('CREATE TABLE videos(name, state)'), b'no database'*400, good[:len(good)//2], good[:4000]:
        census.write_bytes(raw)
        for more in (), ('--census',):
            one_line(run('reid_download', vnames, '--dest', dest, *more), 'census.sqlite')
        assert census.read_bytes() == raw
    videos, dets = small_city(tmp_path)
    shutil.copy(census, videos)
    one_line(run('reid_align', videos, dets, '--dest', tmp_path/'al', '--frames', '5'), 'census.sqlite')

JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(
                        st.sampled_from([*extract_.COUNTS, 'dets_height', *al.Fit._fields, 'state', 'dets', 'a']),
                        x, max_size=12), max_leaves=15)

@HERE
@given(said=JSON, cut=st.integers(0, 40), keep=st.sets(st.sampled_from(list(extract_.COUNTS))))
def test_notes_beside_results_may_hold_anything(tmp_path, said, cut, keep):
    "counts.json, verdicts, notes of detections: a result, or one line."
    good = dict(video='xx+yy+videoNumbr1', made_from={}, boxes=1, crops=1, dropped={}, beyond=0, tracks={'1': 1},
                places={'a': [1, 2, 3, 4]}, dets_height=None)
    if isinstance(said, dict): said = said | {k: good[k] for k in keep}
    text = json.dumps(said)
    path, verdict = tmp_path/'crops'/'xx'/'yy'/'id'/'counts.json', tmp_path/'al'/'a.json'
    for p in path, verdict:
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(text[:cut] if cut else text)
    for read in (lambda: extract_.report_crops(tmp_path/'crops'), lambda: packing.read_places(path.parent),
                 lambda: al.describe_verdicts(al.read_verdicts(tmp_path/'al'))):
        try: read()
        except BadInput as e: assert '.json' in str(e)
    pkl = tmp_path/'al'/'a.pkl'
    pkl.write_bytes(b'x')
    assert detect.judge_dets(pkl, dict(bytes=1, modified=2)) in ('same', 'changed', 'foreign')

PLAIN = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=3)
                     | st.binary(max_size=3)
                     | st.sampled_from([np.float32([1, 2, 30, 40]), np.zeros((2, 2)), np.int64(3)]),
                     lambda x: st.lists(x, max_size=4) | st.tuples(x, x) | st.dictionaries(
                         st.sampled_from(['bbox', 'conf', 'pid', 'height', 'fps', 'keys', 'pids', 0, 1, -1, 2**40]), x,
                         max_size=4), max_leaves=12)

@settings(HERE, max_examples=300)
@given(said=PLAIN | st.dictionaries(st.integers(-1, 3), st.lists(st.tuples(st.integers(-1, 2), PLAIN))))
def test_pickles_may_hold_anything(tmp_path, said):
    path = tmp_path/'a.pkl'
    path.write_bytes(pickle.dumps(said))
    for read in read_dets, packing.read_keys:
        try: read(path)
        except BadInput as e: assert 'a.pkl' in str(e)

def child_of(f):
    "The exit code of a forked process that calls a function: 0, 2 for one line, a signal below 0."
    def run():
        try: f()
        except BadInput as e: os._exit(2 if '\n' not in str(e) else 3)
    child = multiprocessing.get_context('fork').Process(target=run)
    child.start()
    child.join()
    return child.exitcode

@settings(HERE, max_examples=40)
@given(at=st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.binary(min_size=1, max_size=40)), min_size=1,
                   max_size=6), cut=st.floats(.5, 3))
def test_a_damaged_database_ends_in_one_line(tmp_path, at, cut):
    "Bytes of a store, and of somebody else's LMDB, are overwritten, many of them in pages of the tree, or cut off."
    crops, good, other = tmp_path/'crops', tmp_path/'good.lmdb', tmp_path/'old'/'data.mdb'
    if not other.exists():
        cs.pack(fill(crops, 50, 60), good, batch=7)
        write_lmdb(other.parent, 50, 60)
    def damaged(path):
        raw = bytearray(path.read_bytes())
        tree = [p*4096 for p in range(2, len(raw)//4096) if raw[p*4096+10] & 3]
        for where, in_tree, piece in at:
            k = tree[int(where*(len(tree) - 1))] + len(piece)*3 if in_tree else int(where*(len(raw) - len(piece)))
            raw[k:k + len(piece)] = piece
        (tmp_path/'bad').write_bytes(raw[:int(cut*len(raw))])
        (tmp_path/'new').unlink(missing_ok=True)
        return tmp_path/'bad'
    assert child_of(lambda: cs.pack(crops, damaged(good))) in (0, 2)
    assert child_of(lambda: cs.pack(cs.shard_source(damaged(good)), tmp_path/'new')) in (0, 2)
    assert child_of(lambda: cs.pack(cs.lmdb_source(damaged(other)), tmp_path/'new')) in (0, 2)

NAMES = st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1, max_size=12)

@HERE
@given(names=st.sets(NAMES.filter(lambda n: n not in ('.', '..') and len(n.encode()) < 200), max_size=6),
       ending=st.sampled_from(['', '.jpg', '.MP4', '.tif', '.pkl']))
def test_folders_with_any_names(tmp_path, names, ending):
    root = tmp_path/'any'
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name in names: (root/f'{name}{ending}').write_bytes(b'x')
    for read in (packing.list_crops, detect.find_videos, cs.folder_source, lambda r: detect.find_pairs(r, r),
                 packing.find_lmdb):
        try: read(root)
        except BadInput as e: assert str(root) in str(e)
