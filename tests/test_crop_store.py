"The store: packing that survives being killed, full disks, damage, broken pictures, and readers in other processes."
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import cv2
import numpy as np
import pytest

from reid_nb.crop_store import CropDataset, CropStore, decode, list_crops, pack, parse_key, stats, verify
from reid_nb.dataset import BadInput

@pytest.fixture(scope='module')
def crops(tmp_path_factory):
    "2,400 small crops of four videos in two cities, and a note that is no picture"
    root = tmp_path_factory.mktemp('crops')
    r = np.random.default_rng(0)
    for k in range(2400):
        video = root/('alba/porto', 'borea/nord')[k % 2]/f'toyVideo{k % 4:03d}'
        video.mkdir(parents=True, exist_ok=True)
        im = cv2.resize(r.integers(0, 255, (6, 3, 3), np.uint8), (32, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(video/f'{k//40:06d}_{k:07d}_00.jpg'), im)
    (root/'counts.json').write_text('{}')
    return root

@pytest.fixture(scope='module')
def store(crops, tmp_path_factory):
    return pack(crops, tmp_path_factory.mktemp('store')/'crops.lmdb')

def quiet(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return CropStore(path)

def test_everything_is_inside(crops, store):
    files = sorted(crops.rglob('*.jpg'))
    assert len(store) == 2400 and store.finished and os.listdir(os.path.dirname(store.path)) == ['crops.lmdb']
    assert [k.decode() for k in store.keys] == [str(f.relative_to(crops))[:-4] for f in files]
    assert all(store[i] == f.read_bytes() for i, f in enumerate(files))
    assert set(store.cities) == {'alba/porto', 'borea/nord'} and len(set(store.videos)) == 4
    assert store.pids.tolist() == [int(f.name[:6]) for f in files]
    assert store.frames.tolist() == [int(f.name[7:14]) for f in files]
    assert set(store.column('height')) == {64} and set(store.column('width')) == {32}
    pixels = np.array([decode(store[i])/255 for i in range(0, 2400)])
    np.testing.assert_allclose(store.mean, pixels.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(store.std, pixels.std((0, 1, 2)), atol=1e-5)

@pytest.mark.long
def test_killed_twelve_times_and_still_the_same(crops, store, tmp_path):
    path, seen = tmp_path/'killed.lmdb', 0
    code = f'from reid_nb.crop_store import pack; pack({str(crops)!r}, {str(path)!r}, chunk=60); print("done")'
    r = random.Random(0)
    for _ in range(12):
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        # wait for its first sign of writing, so that the kill falls into the packing
        while child.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before: time.sleep(.001)
        time.sleep(r.random()*.05)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        try: half = quiet(path)
        except BadInput as e:
            assert 'no pictures packed' in str(e)
            continue
        assert len(half) >= seen
        seen = len(half)
        assert all(half[i] == store[i] for i in range(seen))
        assert half.finished == ((len(half) == 2400) and 'finished' in half.facts)
    whole = pack(crops, path)
    assert whole.finished and whole.digest == store.digest and (whole.keys == store.keys).all()
    np.testing.assert_array_equal(whole.mean, store.mean)
    assert verify(whole) == 2400

def test_an_unfinished_store_says_so(crops, store, tmp_path, monkeypatch):
    import reid_nb.crop_store as room
    write, path = room.write, tmp_path/'a.lmdb'
    def die(env, **tables):
        if 'finished' in str(tables.get('facts')): raise KeyboardInterrupt
        write(env, **tables)
    monkeypatch.setattr(room, 'write', die)
    with pytest.raises(KeyboardInterrupt): pack(crops, path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match='unfinished: 2,400 crops so far'): half = CropStore(path)
    assert not half.finished and half.digest == store.digest
    with pytest.raises(BadInput, match='unfinished'): verify(half)
    assert pack(crops, path).finished

def test_a_full_disk(crops, store, tiny_disk, tmp_path, run):
    path = tiny_disk/'crops.lmdb'
    big = tmp_path/'big'
    for k in range(4): shutil.copytree(crops, big/f'copy{k}')
    done = run('reid_pack', big, path)
    assert done.returncode == 2 and done.stdout == ''
    line = done.stderr.strip().splitlines()[-1]
    assert 'reid_pack: ' in line and 'make room' in line and 'Traceback' not in done.stderr
    half = quiet(path)
    assert 0 < len(half) < 9600 and not half.finished
    assert all(decode(half[i]) is not None for i in range(len(half)))
    roomy = tmp_path/'roomy.lmdb'   # more room: the same store goes on elsewhere
    shutil.copy(path, roomy)
    whole = pack(big, roomy)
    assert whole.finished and len(whole) == 9600 and verify(whole)
    assert [whole[i] for i in range(len(half))] == [half[i] for i in range(len(half))]

def test_broken_pictures_are_named_counted_and_skipped(crops, tmp_path, run):
    odd = tmp_path/'odd'
    odd.mkdir()
    good = next(crops.rglob('*.jpg')).read_bytes()
    for name, data in {'a.jpg': good, 'b.jpg': good[:len(good)//2], 'c.jpg': b'', 'd.jpg': b'no picture', 'a.png': good,
                       'x'*250 + '.jpg': good}.items(): (odd/name).write_bytes(data)
    cv2.imwrite(str(odd/'e.png'), np.full((40, 20, 3), 7, np.uint8))
    deep = odd/('y'*250)/('z'*250)
    deep.mkdir(parents=True)
    (deep/('w'*100 + '.jpg')).write_bytes(good)
    done = run('reid_pack', odd, tmp_path/'odd.lmdb', '--verify', '--stats')
    assert done.returncode == 0, done.stderr
    store = CropStore(tmp_path/'odd.lmdb')
    assert [k.decode() for k in store.keys] == ['a', 'e', 'x'*250]
    assert Counter(s.split(': ')[1] for s in store.skipped) == {
        'another one has this name': 1, 'broken': 3, 'name too long': 1}
    for name in ('b.jpg', 'c.jpg', 'd.jpg'): assert f'skipped {name}: broken' in done.stdout
    assert (decode(store[1]) == 7).all() and store[1][:2] == b'\xff\xd8' and '5 pictures skipped' in done.stdout

def test_only_broken_pictures(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'b.jpg').write_bytes(b'x')
    store = pack(tmp_path/'a', tmp_path/'s.lmdb')
    assert len(store) == 0 and store.finished and list(store) == [] and stats(store)['skipped'] == 1

@pytest.mark.parametrize('key,want', [
    ('uk/reading/PETSs2l1v01/000003_0000012_01', ('uk/reading', 'PETSs2l1v01', 3, 12)),
    ('far/away/uk/reading/PETSs2l1v01/000003_0000012_01', ('uk/reading', 'PETSs2l1v01', 3, 12)),
    ('0143_c1s1_000002_00', ('', '', 143, 2)), ('query/0143_c1_2', ('', '', 143, -1)),
    ('-1_c1s1_000002_00', ('', '', -1, -1)),
    ('99999999999999_0000012_01', ('', '', -1, -1)), ('é/ü', ('', '', -1, -1))])
def test_names(key, want): assert parse_key(key) == want

def test_odd_file_names(crops, tmp_path):
    good = next(crops.rglob('*.jpg')).read_bytes()
    names = [b'\xff\xfe.jpg', 'è 名.jpg'.encode(), b'a\nb.JPG']
    for name in names: open(os.path.join(os.fsencode(tmp_path), name), 'wb').write(good)
    store = pack(tmp_path, tmp_path/'s.lmdb')
    assert sorted(store.keys.tolist()) == sorted(n[:-4] for n in names) and verify(store) == 3
    assert len(list_crops(tmp_path)) == 3

def test_damage_is_noticed(store, tmp_path, run):
    raw = bytearray(open(store.path, 'rb').read())
    (tmp_path/'cut.lmdb').write_bytes(raw[:len(raw)//2])
    with pytest.raises(BadInput, match='end of the file is missing'): CropStore(tmp_path/'cut.lmdb')
    at = raw.find(store[5][-150:])
    raw[at+10:at+40] = bytes(30)
    (tmp_path/'bad.lmdb').write_bytes(raw)
    done = run('reid_pack', tmp_path/'gone', tmp_path/'bad.lmdb', '--verify')
    assert done.returncode == 2 and 'copy the file again' in done.stderr and 'Traceback' not in done.stderr

def sizes(folder): return {p: p.stat().st_size for p in folder.rglob('*') if p.is_file()}

@pytest.mark.parametrize('crops_,store_,words', [
    ('nowhere', 'a.lmdb', 'no such folder of crops'), ('empty', 'a.lmdb', 'not one picture'),
    ('crops', 'text.lmdb', 'not an LMDB file'), ('crops', 'folder', 'a folder, not a store'),
    ('crops', 'foreign.lmdb', 'no pictures packed'), ('crops', 'other.lmdb', 'was begun with other pictures')])
def test_bad_input(crops, tmp_path, run, crops_, store_, words):
    import lmdb
    for d in ('empty', 'folder'): (tmp_path/d).mkdir()
    (tmp_path/'text.lmdb').write_text('not a database '*1000)
    with lmdb.open(str(tmp_path/'foreign.lmdb'), subdir=False) as env:
        with env.begin(write=True) as txn: txn.put(b'a', b'b')
    os.makedirs(tmp_path/'one')
    shutil.copy(next(crops.rglob('*.jpg')), tmp_path/'one')
    pack(tmp_path/'one', tmp_path/'other.lmdb')
    before = sizes(tmp_path)
    done = run('reid_pack', crops if crops_ == 'crops' else tmp_path/crops_, tmp_path/store_)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert before.items() <= sizes(tmp_path).items() and not (tmp_path/'a.lmdb').exists()

def test_no_such_store(tmp_path):
    with pytest.raises(BadInput, match='no such store'): CropStore(tmp_path/'none.lmdb')

def test_packing_again_changes_nothing(crops, store):
    before = os.stat(store.path).st_mtime_ns
    assert pack(crops, store.path).digest == store.digest and os.stat(store.path).st_mtime_ns == before

def test_a_store_made_anew_is_seen(crops, tmp_path):
    path = tmp_path/'s.lmdb'
    (tmp_path/'one').mkdir()
    files = sorted(crops.rglob('*.jpg'))
    shutil.copy(files[0], tmp_path/'one'/'a.jpg')
    old = pack(tmp_path/'one', path)
    assert old[0] == files[0].read_bytes()
    path.unlink()
    shutil.copy(files[1], tmp_path/'one'/'a.jpg')
    assert pack(tmp_path/'one', path)[0] == files[1].read_bytes()

def small(rgb): return cv2.resize(rgb, (16, 32))

@pytest.mark.long
@pytest.mark.parametrize('workers,how', [(0, None), (2, 'fork'), (4, 'fork'), (2, 'spawn')])
def test_workers(store, workers, how):
    from torch.utils.data import DataLoader
    data = CropDataset(store.path, small, cities=['borea/nord'])
    want = np.array([data[i] for i in range(len(data))])   # the parent has the store open before it forks
    for _ in range(2):
        got = np.concatenate([b.numpy() for b in DataLoader(data, batch_size=100, num_workers=workers,
                                                            multiprocessing_context=how)])
        assert (got == want).all() and len(got) == 1200

def read(store, i, results): results.put(store[i])

@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_a_store_travels(store, how):
    ctx = multiprocessing.get_context(how)
    results = ctx.Queue()
    child = ctx.Process(target=read, args=(store, 17, results))
    child.start()
    assert results.get(timeout=60) == store[17]
    child.join()
    assert len(pickle.dumps(store)) < 500 and store[18]

def test_dataset(store):
    assert len(CropDataset(store)) == 2400 and CropDataset(store)[5].shape == (64, 32, 3)
    with pytest.raises(BadInput, match='no city paris'): CropDataset(store, cities=['paris'])
    with pytest.raises(IndexError): store[2400]

@pytest.mark.long
def test_real_city_packs_too(data, tmp_path, run):
    from reid_nb.dataset import extract
    counts = extract(data/'real_city'/'videos', data/'real_city'/'dets', tmp_path/'crops')
    done = run('reid_pack', tmp_path/'crops', tmp_path/'city.lmdb', '--verify')
    assert done.returncode == 0, done.stderr
    store = CropStore(tmp_path/'city.lmdb')
    assert len(store) == sum(c['crops'] for c in counts) and len(store.skipped) == 0
    assert Counter(store.videos) == {c['video'].split('+')[2]: c['crops'] for c in counts}
    assert set(store.cities) == {'uk/reading', 'us/oregon'}

def test_cuhk03_p1_packs_too(data, tmp_path, run):
    done = run('reid_pack', data/'cuhk03_p1'/'bounding_box_train', tmp_path/'p1.lmdb', '--stats')
    assert done.returncode == 0, done.stderr
    store = CropStore(tmp_path/'p1.lmdb')
    assert len(store) == 7239 and len(set(store.pids)) == 743 and len(store.skipped) == 0
    assert json.loads(done.stdout[done.stdout.index('{'):])['crops'] == 7239
