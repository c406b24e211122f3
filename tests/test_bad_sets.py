"Sets that are small, odd, linked, cut or not what they seem: a result, or one line; and nothing left out unsaid."
import io
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st
from scipy.io import savemat
from test_benchmarks import names_of, write_cuhk03

from reid_nb.evaluate import calibrate, evaluate
from reid_nb.parts.benchmarks import (
    Benchmark, check_parts, cuhk03_split, find_folder, hold_out, PARTS, PROTOCOLS, read_benchmark, read_part,
    read_set, read_split, Sample)
from reid_nb.parts import benchmarks
from reid_nb.parts.core import BadInput, lock
from reid_nb.parts.metrics import (
    chance, check_answers, operating_points, open_set, rank, score_counts, select_part, split_people, tied_queries)
from reid_nb.parts.drift import find_drift, identification_rate, plot_scores
from reid_nb.parts.scoring import describe_result, read_features, summarize, write_json

few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.random.default_rng(seed).integers(0, 255, (32, 16, 3)).astype(np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, rgb)[1])
    return path

def market_set(root, query, gallery, cams=(1, 2)):
    "A Market-style folder: the pids of `query` in the first camera, those of `gallery` in the second"
    for part, pids, cam in zip(PARTS[1:], (query, gallery), cams):
        for pid in pids: picture(root/part/f'{pid:04d}_c{cam}s1_000001_00.jpg', pid*10 + cam)
    return root

def bench_of(query, gallery):
    "A benchmark of lists of (pid, camid)"
    query, gallery = ([Sample(Path(f'{k}.jpg'), *x) for k, x in enumerate(part)] for part in (query, gallery))
    return Benchmark([], query, gallery, 'x', [], (), PROTOCOLS['market_folder'])

def noise(bench, seed=0, d=6):
    r = np.random.default_rng(seed)
    return [r.normal(size=(len(part), d)) for part in (bench.query, bench.gallery)]

# --- Few people

@st.composite
def small_sets(draw):
    "Any numbers of people, pictures and cameras in query and gallery, distractors too"
    people, cams = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    def part(low, most):
        return draw(st.lists(st.tuples(st.integers(low, people), st.integers(1, cams)), min_size=0, max_size=most))
    return bench_of(part(1, 14), part(0, 30)), draw(st.integers(0, 99))

@settings(few, max_examples=250)
@given(small_sets())
def test_any_small_set_gives_a_result_or_one_line(case):
    bench, seed = case
    try: check_answers(bench)
    except BadInput as e:
        assert 'no query has an answer: ' in str(e) and '\n' not in str(e)
        if bench.query and bench.gallery:
            with pytest.raises(BadInput, match='no query has an answer'): summarize(bench, *noise(bench), seed)
        return
    result = summarize(bench, *noise(bench, seed), seed)
    text = json.dumps(result, allow_nan=False)
    said = ' '.join(result['notes'])
    assert 0 < result['figures']['mAP']['value'] <= 1 and len(result['cmc']) == 50
    assert result['open_set'] or 'no open set' in said
    assert result['thresholds'] or 'no thresholds' in said
    assert result['pairs'] and result['roc'] or 'no AUC' in said and 'no ROC' in said
    assert all(-1 < p['low'] <= p['threshold'] <= p['high'] <= 1 for p in result['thresholds'].values()), text
    if result['thresholds']:   # there was something to choose from, and something to check on
        a, b = (score_counts(*select_part(bench, *noise(bench, seed), half)) for half in split_people(bench, seed))
        assert a.impostor.sum() and b.impostor.sum() and b.genuine.sum()
    assert 'mAP' in describe_result(result | dict(source='x', checkpoint_digest='0'*64))

@settings(few, max_examples=150)
@given(small_sets(), st.integers(1, 5), st.integers(0, 3))
def test_every_split_of_people_gives_finite_numbers_or_one_line(case, people, crops):
    bench, seed = case
    qf, gf = noise(bench, seed)
    for f in (lambda: operating_points(bench, qf, gf, seed, 20), lambda: open_set(bench, qf, gf, seed, 2),
              lambda: identification_rate(bench, qf, gf, people, crops, seed=seed, repeats=2),
              lambda: identification_rate(bench, qf, gf, seed=seed, repeats=2), lambda: chance(bench)):
        try: json.dumps(f(), allow_nan=False)
        except BadInput as e: assert '\n' not in str(e) and 'None' not in str(e)

@settings(few, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3)), max_size=30), st.integers(-2, 9), st.integers(0, 9))
def test_who_is_held_out_can_be_searched_for(train, people, seed):
    bench = replace(bench_of([], []), train=[Sample(Path(f'{k}.jpg'), *x) for k, x in enumerate(train)], notes=['odd'])
    try: rest, held = hold_out(bench, people, seed)
    except BadInput as e:
        assert 'at least 2, of at least 4' in str(e) and '(odd)' in str(e)
        return
    assert len({s.pid for s in held.gallery}) >= 2 and not {s.pid for s in rest} & {s.pid for s in held.gallery}
    assert rank(held, *noise(held)).valid.all()

@pytest.mark.parametrize('q,g', [(4, 40), (5, 40), (6, 40), (6, 2), (8, 3)])
def test_four_to_search_for_and_forty_in_the_gallery(q, g):
    bench = bench_of([(p, 1) for p in range(1, q + 1)], [(p, 2) for p in range(1, g + 1)])
    results = [summarize(bench, *noise(bench), seed) for seed in range(30)]
    assert len({r['figures']['mAP']['value'] for r in results}) == 1
    halves = [n for r in results for n in r['notes'] if n.startswith('no ')]
    assert halves and all('half' in n and ('has no' in n) for n in halves)
    for r in results: json.dumps(r, allow_nan=False)

def test_a_draw_with_no_impostors_lowers_no_threshold():
    "Half a gallery of one person: who searches for her has no impostors, and a draw of her alone is no threshold of -1"
    for seed in range(40):
        bench = bench_of([(p, 1) for p in range(1, 7)], [(1, 2)]*5 + [(2, 2)]*5)
        found = summarize(bench, *noise(bench, seed), seed)['thresholds']
        assert all(p['low'] > -1 for p in found.values())

def test_one_person_has_ranks_and_no_curve(tmp_path, run):
    root = market_set(tmp_path/'set', [1], [1])
    old = tmp_path/'r.png'
    old.write_bytes(b'of an older result')
    picture(tmp_path/'set'/'bounding_box_test'/'0001_c3s1_000001_00.jpg', 5)
    names = [p.name for part in PARTS[1:] for p in (root/part).iterdir()]
    np.savez(tmp_path/'f.npz', **{n: np.random.default_rng(k).normal(size=8) for k, n in enumerate(names)})
    done = run('reid_evaluate', '--data', root, '--features', tmp_path/'f.npz', '--out', tmp_path/'r.json')
    assert done.returncode == 0 and 'no ROC curve' in done.stdout and 'AUC' not in done.stdout.split('mAP')[-1]
    result = json.loads((tmp_path/'r.json').read_text())
    assert result['figures']['mAP']['value'] == 1 and result['roc'] is result['pairs'] is result['open_set'] is None
    assert not old.exists() and len(plot_scores(result).axes) == 2
    assert find_drift(dict(scores=dict(edges=[0, 1], impostor=[5])), np.array([.5]), np.array([0])) == ''

def test_no_nan_is_ever_written(tmp_path):
    with pytest.raises(ValueError): write_json(tmp_path/'r.json', dict(x=[float('nan')]))
    assert not list(tmp_path.iterdir())

# --- Nothing to find, nothing to read

@pytest.mark.parametrize('query,gallery,cams,words', [
    ([1, 2, 3], [1, 2, 3], (4, 4), 'all 6 pictures are of camera 4'),
    ([1, 2, 3], [11, 12], (1, 2), r'none of the 3 identities in query \(1, 2, 3\) is among the 2 .* \(11, 12\)'),
    ([1, 2, 3, 4], [0], (1, 2), 'distractors only')])
def test_why_no_query_has_an_answer(tmp_path, monkeypatch, query, gallery, cams, words):
    "Said before anything is embedded, by evaluation and by calibration"
    for room in 'evaluate', 'parts.scoring':
        monkeypatch.setattr(f'reid_nb.{room}.features_of', lambda *a, **k: pytest.fail('embedded for nothing'))
    root = market_set(tmp_path, query, gallery, cams)
    for f in evaluate, calibrate:
        with pytest.raises(BadInput, match=f'no query has an answer: .*{words}'): f(data=root)

def test_answers_in_the_same_camera_alone():
    bench = bench_of([(1, 1), (2, 2), (7, 1)], [(1, 1), (2, 2), (3, 3)])
    with pytest.raises(BadInput, match='2 of the 3 identities in query are in the gallery, but only in pictures that'):
        check_answers(bench)

def odd_set(root):
    "Half of each part is .tif or in a subfolder; everything that is left out is of people 100 and more"
    for part in PARTS:
        for pid in range(1, 7):
            for cam in 1, 2: picture(root/part/f'{pid:04d}_c{cam}s1_000001_00.webp', pid*10 + cam)
        (root/part/'0100_c1s1_000001_00.tif').write_bytes(b'x')
        picture(root/part/'0101'/'0101_c1s1_000001_00.jpg')
        (root/part/'0102_c1s1_000001_00.jpg').symlink_to('nowhere.jpg')
    picture(root/'query'/f'{10**12}_c1s1_000001_00.jpg')
    return root

LEFT_OUT = '2 files left out', 'the first is 0100_c1s1_000001_00.tif', '1 files in subfolders', '0101/0101_c1s1'

def test_what_is_left_out_is_said_by_whoever_reads(tmp_path, caplog, run):
    from reid_nb.parts.supervised import training_set
    root = odd_set(tmp_path/'set')
    readers = (lambda: read_benchmark('market_folder', root), lambda: training_set(root),
               lambda: evaluate(data=root, features=tmp_path/'none.npz'), lambda: calibrate(tmp_path/'none', root))
    for read in readers:
        caplog.clear()
        try: read()
        except (BadInput, OSError) as e: assert '\n' not in str(e)
        lines = caplog.messages
        assert all(sum(words in line for line in lines) == 3 for words in LEFT_OUT), lines
        assert any('query: 1 pictures with no labels' in line for line in lines) and len(lines) == len({*lines})
    bench = read_benchmark('market_folder', root)
    assert len(bench.train) == len(bench.query) == 12
    done = run('reid_evaluate', '--data', root, '--features', tmp_path/'none.npz')
    assert done.returncode == 2 and all(words in done.stderr for words in LEFT_OUT)

def test_nothing_to_do_says_what_was_left_out(tmp_path):
    from reid_nb.parts.supervised import training_set
    for part in PARTS: (tmp_path/part).mkdir()
    for part in PARTS: (tmp_path/part/'0001_c1s1_000001_00.tif').write_bytes(b'x')
    with pytest.raises(BadInput, match='not one picture.*query: 1 files left out.*tif'):
        read_benchmark('market_folder', tmp_path)
    for pid in range(5): picture(tmp_path/'query'/f'person{pid}.jpg')
    for f, words in ((evaluate, 'nothing to evaluate'), (calibrate, 'nothing to calibrate')):
        with pytest.raises(BadInput, match=f'{words}.*5 pictures with no labels.*tif'): f(data=tmp_path)
    with pytest.raises(BadInput, match='to train on.*bounding_box_train: 1 files left out'):
        training_set(tmp_path)
    with pytest.raises(BadInput, match='in bounding_box_test: nothing to do'):
        check_parts(bench_of([(1, 1)], []), 'x', 'do', 'query', 'gallery')

# --- Links

def test_links_are_followed(toy, tmp_path):
    real = toy.resolve()/'market'
    want = read_benchmark('market_folder', real)
    (tmp_path/'root').symlink_to(real)
    (tmp_path/'above').mkdir()
    (tmp_path/'above'/'set').symlink_to(real)
    (tmp_path/'above'/'again').symlink_to(tmp_path/'above'/'set')   # one set under two names
    (tmp_path/'above'/'loop').symlink_to(tmp_path/'above')
    (tmp_path/'parts').mkdir()
    (tmp_path/'files').mkdir()
    for part in PARTS:
        (tmp_path/'parts'/part).symlink_to(real/part)
        (tmp_path/'files'/part).mkdir()
        for p in (real/part).iterdir(): (tmp_path/'files'/part/p.name).symlink_to(p)
    for name in 'root', 'above', 'parts', 'files':
        bench = read_benchmark('market_folder', tmp_path/name)
        assert (bench.digest, bench.sizes, bench.notes) == (want.digest, want.sizes, want.notes), name
    (tmp_path/'parts'/'gt_bbox').symlink_to(real/'query')
    assert len(read_benchmark('market_folder', tmp_path/'parts').more) == len(want.query)
    (tmp_path/'named').mkdir()
    (tmp_path/'named'/'labeled').symlink_to(real)
    assert find_folder(tmp_path/'named', 'labeled').name == 'labeled'

def test_a_loop_in_a_part_ends(tmp_path):
    picture(tmp_path/'query'/'0001_c1s1_000001_00.jpg')
    (tmp_path/'query'/'round').symlink_to(tmp_path/'query')
    assert len(read_part(tmp_path/'query')[0]) == 1

# --- CUHK03

@pytest.fixture(scope='module')
def cuhk(tmp_path_factory):
    "A small CUHK03 with its split file, in one folder"
    root, names = tmp_path_factory.mktemp('cuhk'), names_of('labeled')
    write_cuhk03(root)
    filelist, n = np.array([[name] for *_, name in names], object), len(names)
    at = np.arange(1, n + 1)[:, None]
    savemat(root/'cuhk03_new_protocol_config_labeled.mat',
            dict(filelist=filelist, labels=np.array([[10*a + b] for a, b, *_ in names]), train_idx=at[:60],
                 query_idx=at[60:90], gallery_idx=at[90:]))
    assert read_benchmark('cuhk03_np_labeled', root).sizes == (60, 30, n - 90)
    return root

SPLIT = 'cuhk03_new_protocol_config_labeled.mat'
PAGE = b'<!DOCTYPE html><html><body>Sign in to download</body></html>'

@settings(few, max_examples=25)
@given(cut=st.floats(0, 1), hole=st.floats(0, 1), size=st.integers(0, 300),
       how=st.sampled_from(['cut', 'zeros', 'noise']))
def test_a_split_file_that_is_cut_or_spoilt(cuhk, tmp_path_factory, cut, hole, size, how):
    good, path = (cuhk/SPLIT).read_bytes(), tmp_path_factory.mktemp('s')/SPLIT
    at = int(hole*(len(good) - 1))
    fill = bytes(size) if how == 'zeros' else np.random.default_rng(size).bytes(size)
    path.write_bytes(good[:int(cut*(len(good) - 1))] if how == 'cut' else good[:at] + fill + good[at + size:])
    try: names, pids, rows = read_split(path)
    except BadInput as e:
        assert str(e).startswith(str(path)) and '\n' not in str(e)
        return
    assert how != 'cut' and len(names) == len(pids) and all(0 <= r.min() and r.max() < len(names) for r in rows)

def test_a_reader_that_dies_is_one_line(cuhk, monkeypatch):
    monkeypatch.setattr(benchmarks, 'LOAD_MAT', 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)')
    with pytest.raises(BadInput, match='labeled.mat: not a split file of MATLAB 5: damaged$'): read_split(cuhk/SPLIT)

def test_a_split_file_cut_at_every_place(cuhk, tmp_path):
    good = (cuhk/SPLIT).read_bytes()
    for n in [*range(0, 200, 40), *range(200, len(good), max(1, len(good)//15))]:
        (tmp_path/SPLIT).write_bytes(good[:n])
        with pytest.raises(BadInput, match=SPLIT): read_split(tmp_path/SPLIT)

@pytest.mark.parametrize('change', [
    dict(train_idx=[[0.]]), dict(query_idx=[[999.]]), dict(gallery_idx=[[1.5]]), dict(labels=[[1.]]),
    dict(labels=['a']), dict(query_idx=np.zeros((0, 0))), dict(train_idx=np.nan), dict(filelist=np.zeros((3, 3))),
    dict(labels=1j), dict(filelist=None), 'h5', PAGE, b'', bytes(5000)])
def test_a_split_file_of_another_kind(cuhk, tmp_path, change):
    "Other keys, other shapes, places out of range, a page, a file of HDF5: one line that names the file"
    from scipy.io import loadmat
    os.link(cuhk/'cuhk-03.mat', tmp_path/'cuhk-03.mat')
    path = tmp_path/SPLIT
    if isinstance(change, bytes): path.write_bytes(change)
    elif change == 'h5': h5py.File(path, 'w').close()
    else:
        split = {k: v for k, v in loadmat(cuhk/SPLIT).items() if k[0] != '_'} | change
        savemat(path, {k: v for k, v in split.items() if v is not None})
    with pytest.raises(BadInput, match=f'{SPLIT}: '): read_benchmark('cuhk03_np_labeled', tmp_path)

@pytest.mark.parametrize('there,missing', [('cuhk-03.mat', SPLIT), (SPLIT, 'cuhk-03.mat')])
def test_one_of_two_files(cuhk, toy, tmp_path, there, missing):
    "The line names what is missing; folders of CUHK03-NP serve where there are some"
    shutil.copy(cuhk/there, tmp_path)
    with pytest.raises(BadInput, match=f'{there}: goes with {missing}, which is not in'):
        read_benchmark('cuhk03_np_labeled', tmp_path)
    (tmp_path/'labeled').symlink_to(toy.resolve()/'cuhk03_np'/'labeled')
    assert read_benchmark('cuhk03_np_labeled', tmp_path).digest == read_benchmark('cuhk03_np_labeled', toy).digest

@settings(few, max_examples=40)
@given(cut=st.floats(0, 1), size=st.integers(1, 4000), how=st.sampled_from(['cut', 'zeros', 'noise']))
def test_a_release_that_is_cut_or_spoilt(cuhk, tmp_path_factory, cut, size, how):
    good, root = (cuhk/'cuhk-03.mat').read_bytes(), tmp_path_factory.mktemp('m')
    at = int(cut*(len(good) - 1))
    fill = bytes(size) if how == 'zeros' else np.random.default_rng(size).bytes(size)
    (root/'cuhk-03.mat').write_bytes(good[:at] if how == 'cut' else good[:at] + fill + good[at + size:])
    try: bench = read_benchmark('cuhk03_classic_labeled', root)
    except BadInput as e:
        assert 'cuhk-03.mat' in str(e) and '\n' not in str(e)
        assert [p.name for p in root.iterdir()] in (['cuhk-03.mat'], ['cuhk-03.mat', 'cuhk03_pictures'],
                                                    ['cuhk03_pictures', 'cuhk-03.mat'])
        return
    assert how != 'cut' and bench.query and bench.gallery

def broken(f, how):
    "Spoil an open cuhk-03.mat"
    cell = f[f['labeled'][0][0]][0, 0]
    name = f[cell].name
    if how in ('grey', 'float', 'empty tests', 'wide tests'): del f[name if how in ('grey', 'float') else 'testsets']
    if how == 'grey': f.create_dataset(name, data=np.zeros((9, 9), np.uint8))
    if how == 'float': f.create_dataset(name, data=np.zeros((3, 9, 9)))
    if how == 'empty tests': f.create_dataset('testsets', data=np.zeros((1, 0)))
    if how == 'wide tests':
        ref = f.create_dataset('#refs#/wide', data=np.ones((3, 5))).ref
        f.create_dataset('testsets', data=np.array([[ref]*20], h5py.ref_dtype), dtype=h5py.ref_dtype)
    if how == 'no detected': del f['detected']

@pytest.mark.parametrize('how', ['grey', 'float', 'empty tests', 'wide tests', 'no detected', PAGE, b'', bytes(9999)])
def test_a_release_of_another_kind(tmp_path, how):
    if isinstance(how, bytes): (tmp_path/'cuhk-03.mat').write_bytes(how)
    else:
        with h5py.File(write_cuhk03(tmp_path)/'cuhk-03.mat', 'r+') as f: broken(f, how)
    for name in 'cuhk03_classic_labeled', 'cuhk03_classic_detected':
        with pytest.raises(BadInput, match='cuhk-03.mat: not '): read_benchmark(name, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['cuhk-03.mat']

def spoil_pictures(root, how):
    made = root/'cuhk03_pictures'
    if how == 'other file': os.utime(root/'cuhk-03.mat', (1, 1))
    if how == 'gone': next((made/'labeled').glob('*.png')).unlink()
    if how == 'lists cut': (made/'tests.json').write_text((made/'tests.json').read_text()[:-9])
    if how == 'no lists': (made/'tests.json').unlink()
    if how == 'no source': (made/'source.json').unlink()
    if how == 'source is text': (made/'source.json').write_text('['*100000)
    if how == 'a file': shutil.rmtree(made)
    if how == 'a file': made.write_text('x')

@pytest.mark.parametrize('how', ['other file', 'gone', 'lists cut', 'no lists', 'no source', 'source is text',
                                 'a file'])
def test_pictures_that_were_made_before_are_those_of_the_file(tmp_path, how):
    root = write_cuhk03(tmp_path)
    want = read_benchmark('cuhk03_classic_labeled', root).digest
    spoil_pictures(root, how)
    with pytest.raises(BadInput, match='cuhk03_pictures: not what cuhk-03.mat beside it holds now: delete'):
        read_benchmark('cuhk03_classic_labeled', root)
    shutil.rmtree(root/'cuhk03_pictures') if how != 'a file' else (root/'cuhk03_pictures').unlink()
    assert read_benchmark('cuhk03_classic_labeled', root).digest == want

def test_one_at_a_time_unpacks(tmp_path):
    root = write_cuhk03(tmp_path)
    (root/'cuhk03_pictures.part').mkdir()
    with lock(root/'cuhk03_pictures.part'), pytest.raises(BadInput, match='another process is writing it'):
        read_benchmark('cuhk03_classic_labeled', root)
    assert not (root/'cuhk03_pictures').exists() and read_benchmark('cuhk03_classic_labeled', root).query

def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match='split 20: cuhk-03.mat has 20 lists'):
        read_set(cuhk03_split('labeled', 20), write_cuhk03(tmp_path))

# --- Features

@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    "Twelve people in two cameras: the folder, the benchmark, and features by name"
    root = market_set(tmp_path_factory.mktemp('scene'), range(1, 13), range(1, 13))
    bench, r = read_benchmark('market_folder', root), np.random.default_rng(0)
    return root, bench, {s.path.parent.name + '/' + s.path.name: r.normal(size=8) for s in bench.query + bench.gallery}

def changed(found, how):
    "Features with a fault: {name: array}"
    first = next(iter(found))
    every = dict(zeros=lambda x: 0*x, large=lambda x: x*1e200, squares=lambda x: np.float32(x*1e25),
                 small=lambda x: np.float32(x*1e-30), endless=lambda x: x*np.inf, none=lambda x: x[:0],
                 complex=lambda x: x*1j, truth=lambda x: x > 0, halves=lambda x: np.float16(x*1e9),
                 dates=lambda x: x.astype('datetime64[s]'), pairs=lambda x: np.zeros(3, 'f4,f4'), scalar=lambda x: x[0])
    if how in every: return {k: every[how](x) for k, x in found.items()}
    return found | {first: dict(one_zero=0*found[first], one_nan=found[first]*np.nan, one_large=found[first]*1e60,
                                one_long=np.ones(9))[how]}

@pytest.mark.parametrize('how,words', [
    ('zeros', 'features of 12 pictures are all zeros'), ('one_zero', 'features of 1 pictures are all zeros'),
    ('small', 'too small for float32'), ('large', 'too large for float32'), ('squares', 'too large for float32'),
    ('one_large', 'features of 1 pictures are not finite, or too large'), ('halves', 'not finite'),
    ('endless', 'not finite'), ('one_nan', 'not finite'), ('none', 'no numbers at all'), ('one_long', 'one length'),
    ('complex', 'vectors of numbers'), ('truth', 'vectors of numbers'), ('dates', 'vectors of numbers'),
    ('pairs', 'vectors of numbers'), ('scalar', 'one length')])
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_features_that_point_nowhere(scene, tmp_path, how, words):
    root, _, found = scene
    np.savez(tmp_path/'f.npz', **changed(found, how))
    for options in {}, dict(rerank=True), dict(multi_query=True), dict(expand=2):
        with pytest.raises(BadInput, match=words):
            evaluate(data=root, features=tmp_path/'f.npz', out=tmp_path/'r.json', **options)
    assert not (tmp_path/'r.json').exists()

@pytest.mark.parametrize('how', ['the same', 'one direction', 'nearly the same', 'one number', 'gallery', 'few values'])
def test_features_that_are_equal_are_said_to_be(scene, tmp_path, how):
    "Whoever comes first in the gallery scores well: a note says so, and what is left against the order"
    root, _, found = scene
    r = np.random.default_rng(1)
    make = {'the same': lambda k, x: np.ones(8), 'one direction': lambda k, x: np.ones(8)*r.uniform(1, 9),
            'nearly the same': lambda k, x: np.ones(8) + 1e-9*x, 'one number': lambda k, x: abs(x[:1]),
            'gallery': lambda k, x: x if 'query' in k else np.ones(8), 'few values': lambda k, x: np.sign(x[:2])}[how]
    np.savez(tmp_path/'f.npz', **{k: make(k, x) for k, x in found.items()})
    result = evaluate(data=root, features=tmp_path/'f.npz')
    note = [n for n in result['notes'] if n.startswith('equal features: ')]
    assert len(note) == 1 and 'of 12 queries' in note[0] and note[0].endswith('mean nothing'), result['notes']

def test_sound_features_are_not_said_to_be_equal(scene, tmp_path):
    root, bench, found = scene
    np.savez(tmp_path/'f.npz', **found)
    assert not [n for n in evaluate(data=root, features=tmp_path/'f.npz')['notes'] if 'equal' in n]
    one_hot = [np.eye(13)[[s.pid for s in part]] for part in (bench.query, bench.gallery)]
    assert tied_queries(bench, *one_hot, rank(bench, *one_hot)) == (0, 1)

def collapsed(path):
    "The small model with all its filters empty: every picture gets the same embedding"
    from safetensors import safe_open
    from safetensors.torch import save_file
    from reid_nb.parts.weights import SMALL
    with safe_open(SMALL, 'pt') as f: weights, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    save_file({k: 0*x if x.ndim > 1 else x for k, x in weights.items()}, path, about)
    return path

def test_a_collapsed_network(scene, tmp_path):
    "Its result says that it means nothing, or it has none; no threshold is chosen with it"
    ckpt = collapsed(tmp_path/'c.safetensors')
    try: said = ' '.join(evaluate(ckpt, scene[0])['notes'])
    except BadInput as e: said = str(e)
    assert 'mean nothing' in said or 'all zeros' in said
    with pytest.raises(BadInput, match='mean nothing|all zeros'): calibrate(ckpt, scene[0])
    assert not (tmp_path/'c.thresholds.json').exists()

@few
@given(data=st.data(), how=st.sampled_from(['cut', 'noise', 'zeros', 'bytes']))
@pytest.mark.filterwarnings('ignore')
def test_any_npz_gives_features_or_one_line(scene, tmp_path_factory, data, how):
    _, bench, found = scene
    buffer, path = io.BytesIO(), tmp_path_factory.mktemp('n')/'f.npz'
    np.savez(buffer, **found)
    good = buffer.getvalue()
    at, size = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 64))
    fill = np.random.default_rng(size).bytes(size) if how == 'noise' else bytes(size)
    if how == 'bytes': path.write_bytes(data.draw(st.binary(max_size=200)))
    else: path.write_bytes(good[:at] if how == 'cut' else good[:at] + fill + good[at + size:])
    try: qf, gf = read_features(path, bench)
    except BadInput as e:
        assert str(path) in str(e) and '\n' not in ' '.join(str(e).split())
        return
    assert how != 'cut' and qf.dtype == gf.dtype == np.float32 and len(qf) == len(gf) == 12

def test_a_name_with_its_folder_goes_before_the_name_alone(scene, tmp_path):
    _, bench, found = scene
    first = bench.query[0].path
    assert sum(s.path.name == first.name for s in bench.query + bench.gallery) == 1
    np.savez(tmp_path/'f.npz', **found, **{first.name: np.zeros(8)})
    assert np.array_equal(read_features(tmp_path/'f.npz', bench)[0][0], np.float32(found[f'query/{first.name}']))

def test_archives_of_other_things(scene, tmp_path):
    _, bench, found = scene
    with zipfile.ZipFile(tmp_path/'texts.npz', 'w') as z:
        for name in found: z.writestr(f'{name}.npy', 'text')
    np.save(tmp_path/'one.npy', np.ones(3))
    np.savez(tmp_path/'objects.npz', **dict.fromkeys(found, np.array([{}], object)))
    (tmp_path/'folder.npz').mkdir()
    for name, words in (('texts.npz', 'numbers'), ('one.npy', 'numbers'), ('objects.npz', 'numbers: Object arrays'),
                        ('folder.npz', 'no such file'), ('none.npz', 'no such file')):
        with pytest.raises(BadInput, match=f'{name}: .*{words}'): read_features(tmp_path/name, bench)

def test_files_that_cannot_be_written(scene, tmp_path, monkeypatch):
    "A folder where the file should be, a picture whose name is not UTF-8: said before anything is embedded"
    for room in 'evaluate', 'parts.scoring':
        monkeypatch.setattr(f'reid_nb.{room}.features_of', lambda *a, **k: pytest.fail('embedded for nothing'))
    root = market_set(tmp_path/'set', [1, 2], [1, 2])
    for how in dict(out=tmp_path), dict(embed_only=tmp_path):
        with pytest.raises(BadInput, match='a folder is there'): evaluate(data=root, **how)
    os.link(next((root/'query').iterdir()), os.path.join(os.fsencode(root), b'query', b'0009_c1s1_\xff.jpg'))
    with pytest.raises(BadInput, match='name that is not UTF-8.*0009_c1s1_'):
        evaluate(data=root, embed_only=tmp_path/'e.npz')

# --- Two at once

def test_one_writer_a_file(scene, tmp_path, run):
    root, _, found = scene
    np.savez(tmp_path/'f.npz', **found)
    ckpt = collapsed(tmp_path/'b.safetensors')
    ways = {'r.json': lambda: evaluate(data=root, features=tmp_path/'f.npz', out=tmp_path/'r.json'),
            'e.npz': lambda: evaluate(data=root, embed_only=tmp_path/'e.npz'),
            'b.thresholds.json': lambda: calibrate(ckpt, root)}
    for name, f in ways.items():
        with lock(tmp_path/name), pytest.raises(BadInput, match=f'{name}: another process is writing it'): f()
        assert not (tmp_path/name).exists()
    with lock(tmp_path/'r.json'):
        done = run('reid_evaluate', '--data', root, '--features', tmp_path/'f.npz', '--out', tmp_path/'r.json')
    assert done.returncode == 2 and 'another process is writing it' in done.stderr.splitlines()[-1]
    done = run('reid_evaluate', '--data', root, '--features', tmp_path/'f.npz', '--out', tmp_path/'r.json')
    assert done.returncode == 0 and (tmp_path/'r.json').exists() and (tmp_path/'r.png').exists()
