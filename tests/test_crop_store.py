"The store: packing that survives being killed, full disks, damage, broken pictures, and readers in other processes."
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from scripts import run_in_terminal

from reid_nb import crop_store as cs
from reid_nb.parts import store as parts_store
from reid_nb.crop_store import CropDataset, CropStore, pack, video_source
from reid_nb.parts.augment import decode_batch, group
from reid_nb.parts.core import BadInput, decode
from reid_nb.parts.packing import (
    count_store, export_crops, list_crops, lmdb_source, OLD_ROW, sample_sheet, shard_source, Source, verify_store)
from reid_nb.parts.store import (
    chain_digest, close_readers, forget_files, Item, measure_item, open_lmdb, open_reader, parse_key, read_in_order)

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

def test_a_terminal_shows_how_far_it_is(crops, tmp_path, run):
    args = 'reid_pack', crops, tmp_path/'a.lmdb', '--verify', '--export', tmp_path/'out'
    seen = run_in_terminal(*args)
    for what in ('pack', 'verify', 'export'): assert re.search(rf'{what}: 100%.*2400/2400', seen), what
    assert run(*args).stderr == ''       # into a file: no bar

def test_everything_is_inside(crops, store):
    files = sorted(crops.rglob('*.jpg'))
    assert len(store) == 2400 and store.finished and os.listdir(os.path.dirname(store.path)) == ['crops.lmdb']
    assert [k.decode() for k in store.keys] == [str(f.relative_to(crops))[:-4] for f in files]
    assert all(store[i] == f.read_bytes() for i, f in enumerate(files))
    assert set(store.cities) == {'alba/porto', 'borea/nord'} and len(set(store.videos)) == 4
    assert store.pids.tolist() == [int(f.name[:6]) for f in files]
    assert store.frames.tolist() == [int(f.name[7:14]) for f in files]
    assert set(store.rows['height']) == {64} and set(store.rows['width']) == {32}
    pixels = np.array([decode(store[i])/255 for i in range(0, 2400)])
    np.testing.assert_allclose(store.mean, pixels.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(store.std, pixels.std((0, 1, 2)), atol=1e-5)

@pytest.mark.long
def test_a_hundred_kills_and_still_the_same(crops, store, tmp_path):
    path, seen, halfway, r = tmp_path/'killed.lmdb', 0, 0, random.Random(0)
    ctx = multiprocessing.get_context('fork')
    for _ in range(100):
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = ctx.Process(target=pack, args=(crops, path, 20))
        child.start()
        # wait for its first sign of writing, so that the kill falls into the packing
        while child.is_alive() and (path.stat().st_mtime_ns if path.exists() else 0) == before: time.sleep(.0005)
        time.sleep(r.random()*.01)
        child.kill()
        child.join()
        try: half = quiet(path)
        except BadInput as e:
            assert 'no pictures packed' in str(e) and not seen
            continue
        assert len(half) >= seen and all(half[i] == store[i] for i in range(seen, len(half)))
        seen, halfway = len(half), halfway + (not half.finished)
        if half.finished: path.unlink(); seen = 0   # all of it was packed: begin anew
    assert halfway > 30
    whole = pack(crops, path)
    assert whole.finished and whole.digest == store.digest and (whole.keys == store.keys).all()
    np.testing.assert_array_equal(whole.rows, store.rows)
    assert verify_store(whole) == 2400

@pytest.mark.parametrize('deaths', range(1, 6))
def test_killed_again_and_again_in_the_middle_of_a_transaction(crops, store, tmp_path, monkeypatch, deaths):
    "Pictures are written, what is known of them is not yet: neither of them is there."
    path, dumps, count = tmp_path/'killed.lmdb', json.dumps, Counter()
    def die(note):
        if 'done' in note: count['notes'] += 1
        if count['notes'] == 3: raise KeyboardInterrupt
        return dumps(note)
    monkeypatch.setattr(json, 'dumps', die)
    for k in range(deaths):
        count.clear()
        with pytest.raises(KeyboardInterrupt): pack(crops, path, 20)
        assert len(quiet(path)) == 40*(k + 1)
    monkeypatch.undo()
    whole = pack(crops, path, 20)
    assert verify_store(whole) == len(store) and whole.digest == store.digest

@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 70), n=st.integers(1, 60), broken=st.sets(st.integers(0, 59)))
def test_batches_of_any_size(crops, tmp_path, batch, n, broken):
    jpeg = next(crops.rglob('*.jpg')).read_bytes()
    items = [Item(b'%03d' % i, b'' if i in broken else jpeg + bytes(i)) for i in range(n)]
    path = tmp_path/f'{batch}_{n}_{len(broken)}.lmdb'
    path.unlink(missing_ok=True)
    store = pack(Source('x', n, lambda start: iter(items[start:])), path, batch=batch)
    kept = [i for i in range(n) if i not in broken]
    assert [store[i] for i in range(len(store))] == [items[i].data for i in kept]
    assert store.keys.tolist() == [items[i].key for i in kept] and len(store.skipped) == n - len(kept)
    digest = b''
    for i in kept: digest = chain_digest(digest, items[i].key, items[i].data)
    assert store.digest == digest.hex()

def test_an_unfinished_store_says_so(crops, store, tmp_path, monkeypatch):
    path, add = tmp_path/'a.lmdb', cs.add_batch
    def die(txn, table, items, state):
        if state.batches == 2: raise KeyboardInterrupt
        add(txn, table, items, state)
    monkeypatch.setattr(cs, 'add_batch', die)
    with pytest.raises(KeyboardInterrupt): pack(crops, path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match='unfinished: 2,000 crops so far'): half = CropStore(path)
    assert not half.finished and len(half) == 2000
    with pytest.warns(UserWarning), pytest.raises(BadInput, match='unfinished'): verify_store(half)
    assert pack(crops, path).finished and half[7] == store[7]

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
    assert whole.finished and len(whole) == 9600 and verify_store(whole)
    assert [whole[i] for i in range(len(half))] == [half[i] for i in range(len(half))]

def test_broken_pictures_are_named_counted_and_skipped(crops, tmp_path, run):
    odd = tmp_path/'odd'
    odd.mkdir()
    good = next(crops.rglob('*.jpg')).read_bytes()
    for name, data in {'a.jpg': good, 'b.jpg': good[:len(good)//2], 'c.jpg': b'', 'd.jpg': b'no picture', 'a.png': good,
                       'x'*250 + '.jpg': good}.items(): (odd/name).write_bytes(data)
    cv2.imwrite(str(odd/'e.png'), np.full((40, 20, 3), 7, np.uint8))
    done = run('reid_pack', odd, tmp_path/'odd.lmdb', '--verify', '--stats')
    assert done.returncode == 0, done.stderr
    store = CropStore(tmp_path/'odd.lmdb')
    assert [k.decode() for k in store.keys] == ['a', 'e', 'x'*250]
    assert count_store(store)['skipped'] == {'another one has this name': 1, 'broken': 3}
    for name in 'bcd': assert f'skipped {name}: broken' in done.stdout
    assert (decode(store[1]) == 7).all() and store[1][:2] == b'\xff\xd8' and '4 pictures skipped' in done.stdout

def test_only_broken_pictures(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'b.jpg').write_bytes(b'x')
    store = pack(tmp_path/'a', tmp_path/'s.lmdb')
    assert len(store) == 0 and store.finished and list(store) == [] and count_store(store)['skipped'] == {'broken': 1}

@pytest.mark.parametrize('key,want', [
    ('uk/reading/PETSs2l1v01/000003_0000012_01', ('uk/reading', 'PETSs2l1v01', 3, 12)),
    ('far/away/uk/reading/PETSs2l1v01/000003_0000012_01', ('uk/reading', 'PETSs2l1v01', 3, 12)),
    ('0143_c1s1_000002_00', ('', '', 143, 2)), ('query/0143_c1_2', ('', '', 143, -1)),
    ('-1_c1s1_000002_00', ('', '', -1, -1)),
    ('99999999999999_0000012_01', ('', '', -1, -1)), ('00012_000003_0000012_01', ('', '00012', 3, 12)),
    ('35_02_0120_00000456', ('35/02', '0120', -1, -1)), ('é/ü', ('', '', -1, -1))])
def test_names(key, want): assert parse_key(key) == want

def test_odd_file_names(crops, tmp_path):
    good = next(crops.rglob('*.jpg')).read_bytes()
    names = [b'\xff\xfe.jpg', 'è 名.jpg'.encode(), b'a\nb.JPG']
    for name in names: open(os.path.join(os.fsencode(tmp_path), name), 'wb').write(good)
    store = pack(tmp_path, tmp_path/'s.lmdb')
    assert sorted(store.keys.tolist()) == sorted(n[:-4] for n in names) and verify_store(store) == 3
    assert len(list_crops(tmp_path)) == 3

def test_damage_is_noticed(store, tmp_path, run):
    raw = open(store.path, 'rb').read()
    (tmp_path/'cut.lmdb').write_bytes(raw[:len(raw)//2])
    with pytest.raises(BadInput, match='end of the file is missing'): CropStore(tmp_path/'cut.lmdb')
    (tmp_path/'bad.lmdb').write_bytes(raw.replace(store[5], store[5][:-140] + bytes(140)))
    done = run('reid_pack', tmp_path/'gone', tmp_path/'bad.lmdb', '--verify')
    assert done.returncode == 2 and 'first alba' in done.stderr and 'copy the file again' in done.stderr
    assert 'Traceback' not in done.stderr

def sizes(folder): return {p: p.stat().st_size for p in folder.rglob('*') if p.is_file()}

@pytest.mark.parametrize('crops_,store_,words', [
    ('nowhere', 'a.lmdb', 'no such folder of crops'), ('empty', 'a.lmdb', 'not one picture'),
    ('crops', 'text.lmdb', 'not an LMDB file'), ('crops', 'folder', 'a folder, not a store'),
    ('crops', 'foreign.lmdb', 'no pictures packed'), ('crops', 'other.lmdb', 'was begun with other pictures')])
def test_bad_input(crops, tmp_path, run, crops_, store_, words):
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

@pytest.mark.parametrize('look', [
    CropStore, verify_store, lmdb_source, lambda path: pack(path.parent, path),
    lambda path: open_lmdb(path, readonly=True), lambda path: open_lmdb(path, map_size=1 << 20)])
def test_a_picture_in_the_place_of_a_store(crops, tmp_path, look):
    "It is refused, and nothing is left beside it; a lock file of somebody else stays."
    path = tmp_path/'a.jpg'
    shutil.copy(next(crops.rglob('*.jpg')), path)
    for there in ['a.jpg'], ['a.jpg', 'a.jpg-lock']:
        with pytest.raises(BadInput, match='a.jpg'): look(path)
        assert sorted(os.listdir(tmp_path)) == there
        (tmp_path/'a.jpg-lock').touch()

def test_no_such_store(tmp_path):
    with pytest.raises(BadInput, match='no such store'): CropStore(tmp_path/'none.lmdb')

def test_packing_again_changes_nothing(crops, store):
    before = os.stat(store.path).st_mtime_ns
    assert pack(crops, store.path).digest == store.digest and os.stat(store.path).st_mtime_ns == before

def test_boxes_are_those_of_the_latest_extraction(crops, tmp_path):
    "Packed, extracted again with other detections, packed again, all in one process."
    shutil.copytree(crops, tmp_path/'crops')
    note = next(iter((tmp_path/'crops').glob('*/*/*/*.jpg'))).parent/'counts.json'
    for k in (1, 2):
        note.write_text(json.dumps(dict(places={p.stem: [k, k, k+9, k+9] for p in note.parent.glob('*.jpg')})))
        boxes = pack(tmp_path/'crops', tmp_path/f'{k}.lmdb').boxes
        assert [k, k, k+9, k+9] in boxes.tolist()

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
@pytest.mark.parametrize('workers,how', [(0, None), (2, 'fork'), (4, 'fork'), (2, 'spawn'), (4, 'spawn')])
def test_a_training_loop_with_workers(store, workers, how):
    import torch
    from torch.utils.data import DataLoader
    data = CropDataset(store.path, small, cities=['borea/nord'])
    want = np.array([data[i] for i in range(len(data))])   # the parent has the store open before it forks
    model = torch.nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), .1)
    for _ in range(2):
        got = []
        for x in DataLoader(data, batch_size=100, num_workers=workers, multiprocessing_context=how):
            loss = (model(x.float().mean((1, 2))/255) - 1).square().mean()
            sgd.zero_grad(); loss.backward(); sgd.step()
            got.append(x.numpy())
        assert (np.concatenate(got) == want).all() and len(want) == 1200

def break_some(store, path, n):
    "A copy of a store in which n crops are no pictures any more"
    raw = open(store.path, 'rb').read()
    for i in range(n): raw = raw.replace(store[i], bytes(80) + store[i][80:])   # also in pages that are free again
    path.write_bytes(raw)
    return path

@pytest.mark.parametrize('workers,how', [(0, None), (2, 'fork'), (2, 'spawn')])
def test_broken_crops_do_not_end_an_epoch(store, tmp_path, workers, how):
    from torch.utils.data import DataLoader
    path = break_some(store, tmp_path/'bad.lmdb', 3)
    data = CropDataset(path, small, skip_broken=True)
    got = np.concatenate([b.numpy() for b in DataLoader(data, 100, num_workers=workers, multiprocessing_context=how)])
    assert len(got) == 2400 and (got[:3] == got[3]).all() and data.broken == store.keys[:3].tolist()
    with pytest.raises(BadInput, match='is broken'): CropDataset(path, small)[2]
    with pytest.raises(IndexError): data[2400]

def test_nothing_but_broken_crops(store, tmp_path):
    data = CropDataset(break_some(store, tmp_path/'bad.lmdb', 2400), skip_broken=True)
    with pytest.raises(BadInput, match='not one crop'): data[7]

@pytest.mark.long
def test_memory_stays_flat_over_an_epoch(store):
    def anonymous():
        return int(next(line for line in open('/proc/self/smaps_rollup') if line.startswith('Anonymous')).split()[1])
    data = CropDataset(store, small)
    def epoch(): return sum(int(data[int(i)][0, 0, 0]) for i in np.random.permutation(len(data)))
    for _ in range(3): epoch()
    before = anonymous()
    for _ in range(10): epoch()
    assert anonymous() - before < 3000, 'kB more after ten epochs'

def read(store, i, results): results.put(store[i])

@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_a_store_travels(store, how):
    ctx = multiprocessing.get_context(how)
    results = ctx.Queue()
    child = ctx.Process(target=read, args=(store, 17, results))
    child.start()
    assert results.get(timeout=600) == store[17]
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
    assert (store.boxes[:, 3] - store.boxes[:, 1] == store.rows['height']).all()
    straight = run('reid_pack', data/'real_city'/'videos', tmp_path/'straight.lmdb', '--dets', data/'real_city'/'dets')
    assert straight.returncode == 0, straight.stderr
    direct = CropStore(tmp_path/'straight.lmdb')
    files = {key: store[i] for i, key in enumerate(store.keys.tolist())}
    assert {key: direct[i] for i, key in enumerate(direct.keys.tolist())} == files
    assert len(direct) + len(direct.skipped) == sum(c['boxes'] for c in counts)
    assert (direct.boxes == store.boxes[[store.keys.tolist().index(k) for k in direct.keys.tolist()]]).all()

def test_cuhk03_p1_packs_too(data, tmp_path, run):
    done = run('reid_pack', data/'cuhk03_p1'/'bounding_box_train', tmp_path/'p1.lmdb', '--stats')
    assert done.returncode == 0, done.stderr
    store = CropStore(tmp_path/'p1.lmdb')
    assert len(store) == 7239 and len(set(store.pids)) == 743 and len(store.skipped) == 0
    assert json.loads(done.stdout[done.stdout.index('{'):])['crops'] == 7239

def write_luperson(root, jpegs, form, single):
    "An LMDB as LUPerson and LUPerson-NL write it, and its keys.pkl in an order of its own; returns keys and pids"
    root.mkdir()
    order = random.Random(0).sample(range(len(jpegs)), len(jpegs))
    if form == 'LUPerson': keys = [f'{k % 3:02d}_{k % 2:02d}_{k // 50:04d}_{k:08d}' for k in order]
    else: keys = [f'{k // 50 + 1:05d}_{k // 7:06d}_{k:07d}_{k % 4:02d}' for k in order]
    with lmdb.open(str(root/('lmdb.mdb' if single else 'lmdb')), subdir=not single, map_size=1 << 26) as env:
        with env.begin(write=True) as txn:
            for key, jpeg in zip(keys, jpegs): txn.put(key.encode(), jpeg)
    pids = [100 + k // 7 for k in order]
    said = dict(LUPerson=keys, pids=dict(keys=keys, pids=pids), vids=dict(keys=keys, vids=np.array(pids)))[form]
    (root/'keys.pkl').write_bytes(pickle.dumps(said, protocol=2))
    return keys, pids

@pytest.mark.parametrize('single', [False, True])
@pytest.mark.parametrize('form', ['LUPerson', 'pids', 'vids'])
def test_every_historical_form(store, tmp_path, run, form, single):
    jpegs = [store[i] for i in range(300)]
    keys, pids = write_luperson(tmp_path/'old', jpegs, form, single)
    done = run('reid_pack', tmp_path/'old', tmp_path/'new.lmdb', '--from-lmdb', '--verify')
    assert done.returncode == 0, done.stderr
    new = CropStore(tmp_path/'new.lmdb')
    assert [k.decode() for k in new.keys] == keys and [new[i] for i in range(300)] == jpegs and new.finished
    assert new.pids.tolist() == ([-1]*300 if form == 'LUPerson' else pids)
    assert len(set(new.videos)) == 6 and set(new.cities) == (
        {f'{i:02d}/{j:02d}' for i in range(3) for j in range(2)} if form == 'LUPerson' else {''})

def test_lmdb_without_a_list_with_gaps_and_damage(store, tmp_path, run):
    keys, _ = write_luperson(tmp_path/'old', [store[i] for i in range(50)] + [b'no picture'], 'LUPerson', False)
    (tmp_path/'old'/'keys.pkl').write_bytes(pickle.dumps([*keys, '09_09_0000_00000000']))
    done = run('reid_pack', tmp_path/'old'/'lmdb', tmp_path/'new.lmdb', '--from_lmdb')
    assert done.returncode == 0 and '09_09_0000_00000000: missing' in done.stdout and ': broken' in done.stdout
    assert len(CropStore(tmp_path/'new.lmdb')) == 50
    (tmp_path/'old'/'keys.pkl').unlink()
    listless = pack(lmdb_source(tmp_path/'old'), tmp_path/'b.lmdb')
    assert listless.keys.tolist() == sorted(k.encode() for k in keys[:50])

class Evil:
    def __reduce__(self): return os.system, ('touch evil_was_here',)

@pytest.mark.parametrize('said,words', [
    (Evil(), 'os.system|posix.system'), ({'keys': ['a'], 'pids': [1, 2]}, '1 keys and 2 pids'),
    ({'names': []}, 'not a keys.pkl'), (7, 'not a keys.pkl'), ([7], 'not a keys.pkl')])
def test_bad_keys(store, tmp_path, run, said, words):
    write_luperson(tmp_path/'old', [store[0]], 'pids', False)
    (tmp_path/'old'/'keys.pkl').write_bytes(pickle.dumps(said))
    done = run('reid_pack', tmp_path/'old', tmp_path/'new.lmdb', '--from-lmdb', cwd=tmp_path)
    assert done.returncode == 2 and re.search(words, done.stderr) and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path/'new.lmdb').exists() and not (tmp_path/'evil_was_here').exists()

def test_shards(crops, store, tmp_path, run):
    shards = tmp_path/'shards'
    shards.mkdir()
    for video in sorted(p for p in crops.glob('*/*/*')): pack(video, shards/f'{video.name}.lmdb')
    many = CropStore(shards)
    assert len(many) == 2400 and sorted(many[i] for i in range(2400)) == sorted(store[i] for i in range(2400))
    assert pickle.loads(pickle.dumps(many))[1300] == many[1300] and verify_store(many) == 2400
    np.testing.assert_allclose(many.mean, store.mean, atol=1e-6)
    done = run('reid_pack', shards, tmp_path/'one.lmdb', '--merge', '--verify')
    assert done.returncode == 0, done.stderr
    one = CropStore(tmp_path/'one.lmdb')
    assert all(one[i] == many[i] for i in range(2400)) and (one.rows['mean'] == many.rows['mean']).all()
    shutil.copy(next(shards.iterdir()), shards/'twin.lmdb')
    twice = pack(shard_source(shards), tmp_path/'twice.lmdb')
    assert len(twice) == 2400 and len(twice.skipped) == 600 and twice.skipped[0].endswith('another one has this name')

def test_in_order_from_any_picture_of_any_shard(crops, tmp_path, monkeypatch):
    (tmp_path/'shards').mkdir()
    files = sorted(crops.rglob('*.jpg'))[:30]
    for k, some in enumerate((files[:4], files[4:25], files[25:])):
        for f in some:
            (tmp_path/f'{k}'/f.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(f, tmp_path/f'{k}'/f.parent.name)
        pack(tmp_path/f'{k}', tmp_path/'shards'/f'{k}.lmdb')
    store, fetched = CropStore(tmp_path/'shards'), []
    monkeypatch.setattr(parts_store, 'AHEAD', 10)
    monkeypatch.setattr(parts_store, 'fetch_pages', lambda path, sizes, i: fetched.append((path, len(sizes), i)))
    for start in range(31): assert [*read_in_order(store, start)] == [store[i] for i in range(start, 30)]
    fetched.clear()
    [*read_in_order(store, 15)]
    assert fetched == [(store.paths[1], 21, 11), (store.paths[1], 21, 20), (store.paths[2], 5, 0)]

def test_in_order_the_disk_is_asked_for_many_pages_at_once(crops, tmp_path):
    store = pack(crops, tmp_path/'a.lmdb')
    if not forget_files([store.path]): pytest.skip('this system forgets no file')
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    assert sum(map(len, read_in_order(store))) == store.rows['size'].sum()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt - begin < len(store)/10

def test_a_track_is_one_in_all_shards(crops, tmp_path):
    files = sorted(crops.glob('alba/porto/toyVideo000/*.jpg'))
    for k in range(2):
        half = tmp_path/str(k)/'alba'/'porto'/'toyVideo000'
        half.mkdir(parents=True)
        for f in files[k::2]: shutil.copy(f, half)
        pack(tmp_path/str(k), tmp_path/f'{k}.lmdb')
    both = CropStore([tmp_path/'0.lmdb', tmp_path/'1.lmdb'])
    whole = pack(crops/'alba'/'porto'/'toyVideo000', tmp_path/'w.lmdb')
    assert sorted(np.bincount(both.tracks)) == sorted(np.bincount(whole.tracks)) and set(both.videos) == {'toyVideo000'}

def test_from_lmdb_and_merge_tell_each_other_apart(store, tmp_path, run):
    done = run('reid_pack', store.path, tmp_path/'a.lmdb', '--from-lmdb')
    assert done.returncode == 2 and 'use --merge' in done.stderr
    done = run('reid_pack', store.path, tmp_path/'a.lmdb', '--from-lmdb', '--merge')
    assert done.returncode == 2 and 'give one' in done.stderr
    done = run('reid_pack', tmp_path, tmp_path/'a.lmdb', '--merge')
    assert done.returncode == 2 and 'no store in this folder' in done.stderr
    write_luperson(tmp_path/'old', [store[0]], 'pids', True)
    done = run('reid_pack', tmp_path/'old'/'lmdb.mdb', tmp_path/'a.lmdb', '--merge')
    assert done.returncode == 2 and 'no pictures packed' in done.stderr and not (tmp_path/'a.lmdb').exists()

def test_out_and_in_again(crops, store, tmp_path, run):
    sheet = tmp_path/'sheet.png'
    done = run('reid_pack', 'gone', store.path, '--export', tmp_path/'out', '--sample', sheet, '--stats')
    assert done.returncode == 0, done.stderr
    assert {p.relative_to(crops) for p in crops.rglob('*.jpg')} == {p.relative_to(tmp_path/'out')
                                                                    for p in (tmp_path/'out').rglob('*.*')}
    assert pack(tmp_path/'out', tmp_path/'again.lmdb').digest == store.digest
    assert cv2.imread(str(sheet)).shape == (4*96, 16*48, 3)
    one = next((tmp_path/'out').rglob('*.jpg'))
    one.write_bytes(b'cut off')
    assert export_crops(store, tmp_path/'out') == 2400
    assert pack(tmp_path/'out', tmp_path/'third.lmdb').digest == store.digest

@pytest.mark.parametrize('key', [b'../evil', b'/tmp/reid_nb_evil', b'a/../../evil'])
def test_no_key_leads_out_of_the_folder(store, tmp_path, key):
    odd = pack(Source('x', 1, lambda start: iter([Item(key, store[0])][start:])), tmp_path/'odd.lmdb')
    with pytest.raises(BadInput, match='leads out'): export_crops(odd, tmp_path/'in'/'out')
    assert not list(tmp_path.rglob('*evil*')) and not os.path.exists('/tmp/reid_nb_evil.jpg')

def test_a_read_only_folder(crops, store, tiny_disk, run):
    small_one = pack(next(crops.glob('*/*/*')), tiny_disk/'crops.lmdb')
    subprocess.run(['mount', '-o', 'remount,ro', tiny_disk], check=True)
    done = run('reid_pack', 'gone', tiny_disk/'crops.lmdb', '--verify')
    assert done.returncode == 0 and '600 crops decoded' in done.stdout, done.stderr
    assert quiet(tiny_disk/'crops.lmdb').digest == small_one.digest
    for name in 'crops.lmdb', 'new.lmdb':
        done = run('reid_pack', crops, tiny_disk/name)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert 'ead-only' in done.stderr
    assert os.listdir(tiny_disk) == ['crops.lmdb']

def test_reading_while_another_packs(crops, store, tmp_path):
    path = tmp_path/'a.lmdb'
    child = multiprocessing.get_context('fork').Process(target=pack, args=(crops, path, 5))
    child.start()
    seen = set()
    while child.is_alive():
        if not os.path.exists(f'{path}-lock'): continue
        try: half = quiet(path)
        except BadInput: continue
        seen.add(len(half))
        assert all(half[i] == store[i] for i in range(0, len(half), 7))
    child.join()
    assert child.exitcode == 0 and len(seen) > 2 and CropStore(path).digest == store.digest

def test_groups():
    labels = np.array(['a']*900 + ['b']*90 + ['c']*10)
    assert {k: len(v) for k, v in group(labels).items()} == dict(a=900, b=90, c=10)

def test_a_sample_sheet_of_a_few(crops, tmp_path):
    (tmp_path/'few').mkdir()
    for f in sorted(crops.rglob('*.jpg'))[:3]: shutil.copy(f, tmp_path/'few')
    assert sample_sheet(pack(tmp_path/'few', tmp_path/'few.lmdb'), columns=2).shape == (192, 96, 3)

def test_batches_on_the_gpu(store, cuda):
    jpegs = [store[i] for i in range(64)] + [b'broken']
    on_gpu, on_cpu = decode_batch(jpegs, 'cuda'), decode_batch(jpegs)
    assert on_gpu[-1] is None and all(g.is_cuda for g in on_gpu[:-1])
    assert all((g.cpu().int() - c.int()).abs().float().mean() < 2 for g, c in zip(on_gpu[:-1], on_cpu))

def test_a_killed_stream_goes_on(toy, tmp_path):
    def source(): return video_source(toy/'videos', toy/'dets')
    whole, items = pack(source(), tmp_path/'whole.lmdb', batch=64), source().items
    class Die(Exception): "Somewhere in the second video"
    def dying(start):
        for k, item in enumerate(items(start)):
            if start + k == 1234: raise Die
            yield item
    broken = source()
    broken.items = dying
    with pytest.raises(Die): pack(broken, tmp_path/'half.lmdb', batch=64)
    assert 1000 < len(quiet(tmp_path/'half.lmdb')) < 1234
    again = pack(source(), tmp_path/'half.lmdb', batch=64)
    assert again.digest == whole.digest and again.skipped == whole.skipped and verify_store(again)

def half_and_whole(crops, path):
    "A store that was killed after some batches, as a copy; and the path of the same store, gone on with"
    child = multiprocessing.get_context('fork').Process(target=pack, args=(crops, path, 20))
    child.start()
    while not (path.exists() and path.stat().st_size > 500_000): time.sleep(.0005)
    child.kill()
    child.join()
    shutil.copy(path, path.with_name('half.lmdb'))
    pack(crops, path, 20)
    return path.with_name('half.lmdb'), path

def test_copies_by_lmdb_are_equal(crops, store, tmp_path):
    "Of a whole store, of one that was killed, and of one that was killed and gone on with"
    half, resumed = half_and_whole(crops, tmp_path/'killed.lmdb')
    for k, path in enumerate((store.path, half, resumed)):
        want, n = quiet(path), f'{k}.lmdb'
        for compact in False, True:
            copy = tmp_path/f'copy_{compact}_{n}'
            open_reader(path).copy(str(copy), compact=compact)
            got = quiet(copy)
            assert got.digest == want.digest and (got.keys == want.keys).all() and (got.rows == want.rows).all()
            assert list(got) == list(want) and got.finished == want.finished == (path != half)
        assert copy.stat().st_size <= os.path.getsize(path)
        if path != half: assert verify_store(copy) == 2400
    shutil.copy(copy, tmp_path/'go_on.lmdb')
    open_reader(half).copy(str(tmp_path/'half_copy.lmdb'), compact=True)
    assert pack(crops, tmp_path/'half_copy.lmdb').digest == store.digest   # a copy of a half goes on too

def test_copies_by_the_program_are_equal(crops, tmp_path):
    if not shutil.which('mdb_copy'): pytest.skip('mdb_copy is not here (lmdb-utils): its copies are not tried')
    for path in half_and_whole(crops, tmp_path/'killed.lmdb'):
        copy = path.with_name(f'copy_of_{path.name}')
        subprocess.run(['mdb_copy', '-n', '-c', path, copy], check=True)
        assert list(quiet(copy)) == list(quiet(path)) and quiet(copy).digest == quiet(path).digest

def test_a_stranger_reads_it(crops, store, tmp_path):
    "With an LMDB library and nothing of ours: path -> JPEG, and one named database."
    code = f"""
import lmdb, sys
with lmdb.open({store.path!r}, subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
    for key, value in txn.cursor(): sys.stdout.buffer.write(key + b' ' + str(len(value)).encode() + b'\\n')
    open({str(tmp_path/'one.jpg')!r}, 'wb').write(txn.get({store.keys[5].item()!r}))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    meta, *lines = done.stdout.splitlines()
    files = sorted(crops.rglob('*.jpg'))
    assert meta.startswith('.meta ') and (tmp_path/'one.jpg').read_bytes() == store[5]
    assert lines == [f'{str(f.relative_to(crops))[:-4]} {f.stat().st_size}' for f in files]

def write_form_2(path, items, shelf=7, finished=True):
    "A store as it was written before: a thousand pictures in a value, pread past LMDB"
    tables, digest = {name: {} for name in ('images', 'rows', 'keys', 'notes', 'facts')}, b''
    tables['facts'][b'begun'] = json.dumps(dict(schema=2, items=len(items), source='x')).encode()
    for k in range(0, len(items), shelf):
        rows, number, some = [], b'%08d' % (k//shelf), items[k:k+shelf]
        for item in map(measure_item, some):
            *_, pid, frame = parse_key(item.key.decode())
            rows.append((len(item.data), 0, pid, frame, item.box, *item.measures))
            digest = chain_digest(digest, item.key, item.data)
        tables['images'][number] = b''.join(item.data for item in some).ljust(4096, b'\0') + bytes(16)
        tables['rows'][number] = np.array(rows, OLD_ROW).tobytes()
        tables['keys'][number] = zlib.compress(b'\0'.join(item.key for item in some))
        note = dict(done=k + len(some), count=k + len(some), digest=digest.hex(), skipped=[], at=16,
                    folders=['alba/porto/toyVideo000'] if k == 0 else [])
        tables['notes'][number] = json.dumps(note).encode()
    if finished: tables['facts'][b'finished'] = b'{}'
    with lmdb.open(str(path), subdir=False, max_dbs=5, map_size=1 << 26) as env, env.begin(write=True) as txn:
        for name, values in tables.items():
            db = env.open_db(name.encode(), txn=txn)
            for k, v in values.items(): txn.put(k, v, db=db)
    return digest.hex()

def test_a_store_of_form_2(crops, store, tmp_path, run):
    old, new = tmp_path/'old.lmdb', tmp_path/'new.lmdb'
    items = [Item(store.keys[i].item(), store[i], box=(1, 2, 3, 4)) for i in range(40)]
    digest = write_form_2(old, items)
    for args in ('gone', old, '--stats'), (crops, old), (old, new, '--merge'):
        done = run('reid_pack', *args)
        assert done.returncode == 2 and 'form 2' in done.stderr and '--from-lmdb' in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not new.exists()
    done = run('reid_pack', old, new, '--from-lmdb', '--verify')
    assert done.returncode == 0, done.stderr
    got = CropStore(new)
    assert got.digest == digest and list(got) == [store[i] for i in range(40)] and (got.keys == store.keys[:40]).all()
    assert (got.boxes == [1, 2, 3, 4]).all() and (got.pids == store.pids[:40]).all()
    assert (got.rows['mean'] == store.rows['mean'][:40]).all() and set(got.videos) == {'toyVideo000'}
    write_form_2(tmp_path/'half.lmdb', items, finished=False)
    done = run('reid_pack', tmp_path/'half.lmdb', tmp_path/'b.lmdb', '--from-lmdb')
    assert done.returncode == 2 and 'not finished' in done.stderr and not (tmp_path/'b.lmdb').exists()

def test_a_changed_byte_is_named(store, tmp_path, run):
    "Even where the picture can still be decoded."
    raw, data = open(store.path, 'rb').read(), bytearray(store[1234])
    for k in range(len(data) - 3, 0, -1):
        data[k] ^= 1
        if decode(bytes(data)) is not None: break
        data[k] ^= 1
    (tmp_path/'bad.lmdb').write_bytes(raw.replace(store[1234], data))
    with pytest.raises(BadInput, match=f'1 crops changed or broken, first {store.keys[1234].decode()}'):
        verify_store(tmp_path/'bad.lmdb')

def test_a_damaged_tree_is_refused_before_it_is_read(store, tmp_path, run):
    "Random bytes in pages of the tree end a program that trusts them."
    raw, r = open(store.path, 'rb').read(), random.Random(0)
    numbers = range(2, len(raw)//4096)
    tree = [p for p in numbers if raw[p*4096+10] & 3 and raw[p*4096:p*4096+8] == p.to_bytes(8, 'little')]
    for k in range(5):
        bad = bytearray(raw)
        for p in tree:
            at = p*4096 + 16
            bad[at:at+40] = r.randbytes(40)
        (tmp_path/'bad.lmdb').write_bytes(bad)
        done = run('reid_pack', 'gone', tmp_path/'bad.lmdb', '--verify')
        assert done.returncode == 2 and 'damaged' in done.stderr and len(done.stderr.strip().splitlines()) == 1

@pytest.mark.parametrize('key,value', [
    (b'begun', None), (b'begun', b'{'), (b'begun', b'[]'), (b'begun', b'{"items": 9, "schema": 99}'),
    (b'00000001', None), (b'00000001', b''), (b'00000001', b'7\n'), (b'00000001', b'{"rows": -1}\n'),
    (b'00000000', b'{"rows": 99999999999, "done": 1, "digest": "", "folders": [], "skipped": []}\n'),
    (b'00000001', b'{"rows": 1, "done": 1, "digest": "", "folders": [], "skipped": []}\n' + b'\xff'*44 + b'a')])
def test_hostile_notes(store, tmp_path, run, key, value):
    path = tmp_path/'bad.lmdb'
    shutil.copy(store.path, path)
    with lmdb.open(str(path), subdir=False, max_dbs=1) as env, env.begin(write=True) as txn:
        db = env.open_db(b'.meta', txn=txn)
        if value is None: txn.delete(key, db=db)
        else: txn.put(key, value, db=db)
    with pytest.raises(BadInput, match='damaged|written in form 99') as e: CropStore(path)
    assert '\n' not in str(e.value)

def test_a_picture_that_is_gone_and_one_that_nobody_noted(store, tmp_path):
    path = tmp_path/'bad.lmdb'
    shutil.copy(store.path, path)
    with lmdb.open(str(path), subdir=False, map_size=1 << 26) as env, env.begin(write=True) as txn:
        txn.delete(store.keys[7].item())
        txn.put(b'stranger', b'a guest')
    with pytest.raises(BadInput, match='is not in it any more'): CropStore(path)[7]
    with pytest.raises(BadInput, match='is not in it any more'): verify_store(path)
    assert len(CropStore(path)) == 2400

def test_a_key_too_long(crops, tmp_path, run):
    deep = tmp_path/'crops'/('a'*200)/('b'*200)/('c'*200)
    deep.mkdir(parents=True)
    shutil.copy(next(crops.rglob('*.jpg')), deep)
    done = run('reid_pack', tmp_path/'crops', tmp_path/'s.lmdb')
    assert done.returncode == 2 and 'LMDB takes 511' in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path/'s.lmdb').exists()

def test_forks_beside_threads_that_read(store):
    "A forked child reads, and opens the store again; nothing waits for the parent's threads."
    from threading import Event, Thread
    ctx, stop, want = multiprocessing.get_context('fork'), Event(), store[3]
    def read_on():
        while not stop.is_set(): store[5]
    def child(results): results.put((store[3], CropStore(store.path)[3]))
    threads, results = [Thread(target=read_on) for _ in range(2)], ctx.SimpleQueue()
    for t in threads: t.start()
    try:
        for _ in range(5):
            process = ctx.Process(target=child, args=(results,))
            process.start()
            process.join(60)
            if process.exitcode is None: process.kill()
            assert process.exitcode == 0 and results.get() == (want, want) and store[3] == want
    finally:
        stop.set()
        for t in threads: t.join()

def test_threads_share_a_store(store):
    from concurrent.futures import ThreadPoolExecutor
    want = list(store)
    order = np.random.default_rng(0).permutation(2400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5): assert all(pool.map(lambda i: store[i] == want[i], order))

def test_what_a_reader_sees_stays_while_another_packs(store, tmp_path):
    "No page that somebody may be reading is used again."
    ctx, path = multiprocessing.get_context('fork'), tmp_path/'a.lmdb'
    there, go, order = ctx.Event(), ctx.Event(), random.Random(0).sample(range(2400), 2400)
    items = [Item(store.keys[i].item(), store[i]) for i in order]
    def waiting(start):
        for k, item in enumerate(items):
            if k == 400: there.set(); go.wait(600)
            yield item
    child = ctx.Process(target=pack, args=(Source('x', 2400, waiting), path, 20))
    child.start()
    assert there.wait(600)
    half = quiet(path)
    go.set()
    child.join()
    assert child.exitcode == 0 and len(half) == 400 and list(half) == [item.data for item in items[:400]]
    assert list(CropStore(path)) == [item.data for item in items] and verify_store(path) == 2400

def test_packing_on_beside_a_reader_in_the_same_process(crops, store, tmp_path):
    half, path = half_and_whole(crops, tmp_path/'a.lmdb')
    some = quiet(half)
    before = list(some)
    whole = pack(crops, half)
    assert list(some) == before and list(whole) == list(store) and verify_store(half) == 2400

@pytest.mark.parametrize('args,words', [
    (('crops', 'a.lmdb', '--sample', 'sheet.xyz'), 'contact sheet ends in'),
    (('two', 'a.lmdb', '--from-lmdb'), 'name one of'), (('crops', 'a.lmdb', '--from-lmdb'), 'no LMDB in it'),
    (('crops', 'a.lmdb', '--dets', 'nowhere'), 'no such folder of detections'),
    (('crops', 'a.lmdb', '--dets', 'crops'), 'no video in it'),
    (('cut.lmdb', 'a.lmdb', '--from-lmdb'), 'end of the file')])
def test_bad_options(crops, store, tmp_path, run, args, words):
    write_luperson(tmp_path/'two', [store[0]], 'pids', True)
    write_luperson(tmp_path/'two'/'more', [store[0]], 'pids', False)
    shutil.move(tmp_path/'two'/'more'/'lmdb', tmp_path/'two'/'lmdb')
    (tmp_path/'cut.lmdb').write_bytes(open(store.path, 'rb').read()[:1_000_000])
    os.symlink(crops, tmp_path/'crops')
    done = run('reid_pack', *args, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path/'a.lmdb').exists()

def test_two_packers_at_once(crops, store, tmp_path):
    path = tmp_path/'a.lmdb'
    child = multiprocessing.get_context('fork').Process(target=pack, args=(crops, path, 5))
    child.start()
    while not path.exists(): time.sleep(.001)
    with pytest.raises(BadInput, match='another process is writing it'): pack(crops, path)
    child.join()
    assert child.exitcode == 0 and CropStore(path).digest == store.digest and os.listdir(tmp_path) == ['a.lmdb']

@pytest.mark.parametrize('copied', [False, True])
def test_a_file_in_the_place_of_another(crops, store, tmp_path, copied):
    "A store is replaced while an object of the old one lives, and LMDB's lock file stays: both read what is there now."
    path = tmp_path/'c.lmdb'
    shutil.copy(store.path, path)
    Path(f'{path}-lock').touch()     # as a killed packer leaves it
    old = CropStore(path)
    path.unlink()
    if copied: shutil.copy(store.path, path)
    new = CropStore(path) if copied else pack(crops, path)
    assert new.digest == old.digest and new[7] == old[7]

def test_by_key(store):
    assert store.get(bytes(store.keys[7])) == store[7] and store.get(b'nobody') is None
    close_readers(store.path)     # as packing does
    assert store.get(bytes(store.keys[7])) == store[7]
