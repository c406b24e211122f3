"Benchmarks: readers, protocols, exact ranking against torchreid and against a slow plain reference."
import os
import shutil

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.io import savemat

from reid_nb.parts.benchmarks import (
    Benchmark, cuhk03_split, labels, Protocol, PROTOCOLS, read_benchmark, register, Sample, SPLIT_PIDS)
from reid_nb.parts.metrics import (
    blocks, chance, color_histogram, distances, rank, rank_rows, roc_points, score_counts)
from reid_nb.parts.core import BadInput

def benchmark(qp, qc, gp, gc):
    query, gallery = ([Sample('', int(p), int(c)) for p, c in zip(*pc)] for pc in ((qp, qc), (gp, gc)))
    return Benchmark([], query, gallery, '', [], (), PROTOCOLS['market_folder'])

def plain(bench, dist):
    "AP, rank of the first hit and INP of each query, by walking down a sorted list"
    out = []
    for q, row in zip(bench.query, dist):
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        ranked = [g for g in (bench.gallery[j] for j in order) if (g.pid, g.camid) != (q.pid, q.camid)]
        right = [g.pid == q.pid for g in ranked]
        hits, seen, precisions, last = sum(right), 0, [], None
        for k, hit in enumerate(right, 1):
            if not hit: continue
            seen += 1
            precisions.append(seen/k)
            last = k
        out.append((sum(precisions)/hits, right.index(True) + 1, hits/last) if hits else (np.nan,)*3)
    return np.array(out).T

@st.composite
def searches(draw):
    "A small world with junk, distractors (pid 0), people of one camera, and queries with no match"
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, g, people, cams = (draw(st.integers(1, n)) for n in (6, 60, 8, 4))
    bench = benchmark(r.integers(1, people + 1, q), r.integers(1, cams + 1, q),
                      r.integers(0, people + 1, g), r.integers(1, cams + 1, g))
    if draw(st.booleans()): dist = r.random((q, g))
    else: dist = r.integers(0, draw(st.sampled_from([1, 2, 5])), (q, g))/8  # ties
    return bench, dist

@settings(max_examples=200, deadline=None)
@given(searches())
def test_equal_to_a_plain_reference(search):
    bench, dist = search
    ap, first, inp = plain(bench, dist)
    if np.isnan(ap).all():
        with pytest.raises(BadInput, match='no query has an answer'): rank_rows(bench, dist)
        return
    got = rank_rows(bench, dist)
    for a, b in ((got.ap, ap), (got.first, first), (got.inp, inp)): np.testing.assert_allclose(a, b, atol=1e-12)

@settings(max_examples=200, deadline=None)
@given(searches())
def test_equal_to_torchreid(search):
    from torchreid.reid.metrics.rank import evaluate_rank
    bench, dist = search
    try: got = rank_rows(bench, dist)
    except BadInput: return
    # torchreid breaks ties as its unstable sort pleases: give it the order that we state
    order = np.argsort(np.argsort(dist, axis=1, kind='stable'), axis=1)
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    # pad the end of the list with strangers, as torchreid stacks curves of one length
    pad = 60
    far = np.tile(order.shape[1] + np.arange(pad), (len(order), 1))
    cmc, mAP = evaluate_rank(np.hstack([order, far]).astype(float), qp, np.append(gp, [-7]*pad),
                             qc, np.append(gc, [9]*pad), max_rank=50, use_cython=False)
    np.testing.assert_allclose(got.cmc, cmc, atol=1e-6)
    assert abs(got.figures()['mAP'] - mAP) < 1e-6

@pytest.mark.parametrize('name', 'cuhk03_np_labeled cuhk03_np_detected market_folder market1501 cuhk03_p1'.split())
def test_perfect_features_score_one_and_random_ones_chance(toy, name):
    bench = read_benchmark(name, toy if 'np' in name else toy/'market')
    oracle = [np.eye(1 + max(s.pid for s in bench.gallery))[labels(p)[0]] for p in (bench.query, bench.gallery)]
    assert set(rank(bench, *oracle).figures().values()) == {1.}
    r = np.random.default_rng(0)
    def guess(): return [r.normal(size=(len(p), 32)) for p in (bench.query, bench.gallery)]
    blind = [rank(bench, *guess()).figures()['mAP'] for _ in range(10)]
    assert abs(np.mean(blind) - chance(bench)['mAP']) < 4*np.std(blind)/10**.5 + 1e-3

def test_chance_of_market1501():
    "About 0.0015 to 0.002: 750 people, 17 right answers a query, 15,913 pictures"
    gp = np.concatenate([np.repeat(np.arange(1, 751), 17), np.zeros(15913 - 750*17)])
    bench = benchmark(np.arange(1, 751), np.full(750, 9), gp, np.ones(len(gp)))
    assert chance(bench)['mAP'] == pytest.approx(.0017, abs=2e-4)

def test_rows_may_be_ranked_in_any_block_size(toy):
    bench = read_benchmark('market_folder', toy/'market')
    r = np.random.default_rng(0)
    qf, gf = r.normal(size=(len(bench.query), 8)), r.normal(size=(len(bench.gallery), 8))
    np.testing.assert_allclose(rank(bench, qf, gf).ap, rank_rows(bench, distances(qf, gf)).ap, atol=1e-9)

def test_roc_equals_scikit_learn_on_single_scores(toy):
    from sklearn.metrics import roc_auc_score
    bench = read_benchmark('cuhk03_np_detected', toy)
    r = np.random.default_rng(1)
    qf, gf = r.normal(size=(len(bench.query), 8)), r.normal(size=(len(bench.gallery), 8))
    counts = score_counts(bench, qf, gf, bins=1 << 14)
    fmr, tmr, _ = roc_points(counts.genuine.sum(0), counts.impostor.sum(0), counts.edges)
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    same, ignored = qp[:, None] == gp, (qp[:, None] == gp) & (qc[:, None] == gc)
    exact = roc_auc_score(same[~ignored], (1 - distances(qf, gf))[~ignored])
    assert np.sum((fmr[1:] - fmr[:-1])*(tmr[1:] + tmr[:-1])/2) == pytest.approx(exact, abs=1e-4)

def test_what_is_missing_or_odd_is_said(toy, tmp_path):
    root = tmp_path/'set'
    shutil.copytree(toy/'market', root)
    before = read_benchmark('market1501', root)
    (root/'query'/'Thumbs.db').write_bytes(b'x')
    (root/'query'/'holiday.jpg').write_bytes(b'x')
    (root/'bounding_box_test'/'0001_c1s1_000000_00.jpg').touch()
    shutil.rmtree(root/'bounding_box_train')
    after = read_benchmark('market1501', root)
    said = '\n'.join(after.notes)
    for words in ('Thumbs.db', 'holiday.jpg', '1 empty files', 'bounding_box_train: no such folder',
                  'bounding_box_train: expected 12,936 pictures, found 0', 'query: expected 3,368'):
        assert words in said
    assert after.digest != before.digest and after.train == []

@pytest.mark.parametrize('name,root,words', [
    ('market_folder', 'nowhere', 'no such folder'), ('market_folder', 'videos', 'no bounding_box_train'),
    ('cuhk03_np_labeled', 'market', "no folder 'labeled'"), ('market_folder', 'cuhk03_np', 'several sets'),
    ('market-1501', 'market', 'choose one of market1501')])
def test_wrong_paths_and_names(toy, name, root, words):
    with pytest.raises(BadInput, match=words): read_benchmark(name, toy/root)

def test_an_empty_folder_is_refused(tmp_path):
    for part in ('query', 'bounding_box_test'): (tmp_path/part).mkdir()
    with pytest.raises(BadInput, match='not one picture'): read_benchmark('market_folder', tmp_path)

def test_a_protocol_of_ones_own(toy, monkeypatch):
    monkeypatch.setattr('reid_nb.parts.benchmarks.PROTOCOLS', dict(PROTOCOLS))
    register(Protocol('any_camera', PROTOCOLS['market_folder'].reader, rule=lambda q, pids, camids: pids == -1))
    easy, hard = (read_benchmark(n, toy/'market') for n in ('any_camera', 'market_folder'))
    a, b = (rank(x, color_histogram(x.query), color_histogram(x.gallery)) for x in (easy, hard))
    assert a.protocol == 'any_camera' and a.figures()['rank1'] > b.figures()['rank1']
    with pytest.raises(BadInput, match='taken'): register(Protocol('market1501', None))

@pytest.mark.parametrize('spoil,words', [(lambda f: f[1:], 'shape'), (lambda f: f*np.nan, 'not finite'),
                                         (lambda f: f[:, 1:], 'of 7 numbers for the query, of 8')])
def test_features_that_do_not_fit(toy, spoil, words):
    bench = read_benchmark('market_folder', toy/'market')
    with pytest.raises(BadInput, match=words):
        rank(bench, spoil(np.ones((len(bench.query), 8))), np.ones((len(bench.gallery), 8)))

def test_cuhk03_p1_is_as_published(data):
    bench = read_benchmark('cuhk03_p1', data)
    assert bench.notes == [] and bench.sizes == PROTOCOLS['cuhk03_p1'].size
    assert len({s.pid for s in bench.train}) == 743 and len({s.pid for s in bench.query}) == 100
    floor = rank(bench, color_histogram(bench.query), color_histogram(bench.gallery)).figures()
    assert chance(bench)['mAP'] < floor['mAP'] < .2

PEOPLE = (5, 4, 3, 2, 2)   # of the five camera pairs

def picture(boxes, pair, person, n):
    "uint8[h,w,3] RGB, another one for each"
    r = np.random.default_rng([boxes == 'labeled', pair, person, n])
    return r.integers(0, 255, (20 + n, 10 + person, 3), np.uint8)

def missing(pair, person, n): return (pair, person, n) in {(1, 2, 3), (2, 1, 9), (4, 1, 0)}

def write_cuhk03(folder):
    "A small cuhk-03.mat in the form of the real one: MATLAB 7.3, cells of references, arrays transposed"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder/'cuhk-03.mat', 'w') as f:
        def cell(name, value):
            "A dataset of its own, and the reference to it"
            return f.create_dataset(f'#refs#/{name}', data=value).ref
        for boxes in 'detected', 'labeled':
            pairs = np.empty((1, 5), h5py.ref_dtype)
            for pair, people in enumerate(PEOPLE, 1):
                cells = np.empty((10, people), h5py.ref_dtype)
                for person in range(1, people + 1):
                    for n in range(10):
                        empty = np.zeros(2, np.uint64)   # as MATLAB writes []
                        rgb = empty if missing(pair, person, n) else picture(boxes, pair, person, n).T
                        cells[n, person - 1] = cell(f'{boxes}{pair}_{person}_{n}', rgb)
                pairs[0, pair - 1] = cell(f'{boxes}{pair}', cells)
            f.create_dataset(boxes, data=pairs)
        tests = np.empty((1, 20), h5py.ref_dtype)
        for k in range(20): tests[0, k] = cell(f'test{k}', np.array([[1, k % 5 + 1], [2, k % 4 + 1], [4, 1]], float).T)
        f.create_dataset('testsets', data=tests)
    return folder

def names_of(boxes):
    return [(pair, person, n, f'{pair}_{person:03d}_{1 + n//5}_{n + 1:02d}.png')
            for pair, people in enumerate(PEOPLE, 1) for person in range(1, people + 1) for n in range(10)
            if not missing(pair, person, n)]

@pytest.mark.parametrize('boxes', ['detected', 'labeled'])
def test_cuhk03_classic(tmp_path, boxes):
    root = write_cuhk03(tmp_path/'cuhk03_release').parent
    bench = read_benchmark(f'cuhk03_classic_{boxes}', root)
    assert len(list((tmp_path/'cuhk03_release'/'cuhk03_pictures'/boxes).iterdir())) == 157
    for s in bench.query[::17] + bench.gallery[::7]:
        pair, person, cam, n = map(int, s.path.stem.split('_'))
        assert s.pid % SPLIT_PIDS == 1000*pair + person and s.camid == cam
        assert (cv2.imread(str(s.path))[..., ::-1] == picture(boxes, pair, person, n - 1)).all()
    assert {s.camid for s in bench.query} == {1} and {s.camid for s in bench.gallery} == {2}
    splits = [s.pid//SPLIT_PIDS for s in bench.gallery]
    assert splits == sorted(splits) and set(splits) == set(range(1, 21)) and len(bench.gallery) == 60
    assert 'expected 14,09' in bench.notes[0] and bench.train == []
    again = read_benchmark(f'cuhk03_classic_{boxes}', root)
    assert again.gallery == bench.gallery and again.digest == bench.digest
    # exactly one right answer among three: a blind model finds it in a third of the cases
    assert chance(bench)['rank1'] == pytest.approx(1/3)
    assert chance(bench)['mAP'] == pytest.approx((1 + 1/2 + 1/3)/3)
    pids = labels(bench.query)[0], labels(bench.gallery)[0]
    oracle = [np.eye(5000)[p % SPLIT_PIDS] for p in pids]
    assert set(rank(bench, *oracle).figures().values()) == {1.}

def test_all_splits_equal_single_ones(tmp_path):
    "All splits at once, and the mean over splits worked out one by one"
    root = write_cuhk03(tmp_path)
    bench, r = read_benchmark('cuhk03_classic_labeled', root), np.random.default_rng(0)
    feature = {p.name: r.normal(size=4) for p in (tmp_path/'cuhk03_pictures'/'labeled').iterdir()}
    def of(samples): return np.array([feature[s.path.name] for s in samples])
    scores, aps = rank(bench, of(bench.query), of(bench.gallery)), []
    for k in range(1, 21):
        query, gallery = ([s for s in part if s.pid//SPLIT_PIDS == k] for part in (bench.query, bench.gallery))
        dist = distances(of(query), of(gallery))
        for s, row in zip(query, dist):
            better = sum(row < row[[g.pid for g in gallery].index(s.pid)])
            aps.append(1/(1 + better))
    np.testing.assert_allclose(scores.ap, aps, atol=1e-6)

def test_one_classic_split_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr('reid_nb.parts.benchmarks.PROTOCOLS', dict(PROTOCOLS))
    root = write_cuhk03(tmp_path)
    register(cuhk03_split('detected', 7))
    bench = read_benchmark('cuhk03_classic_detected_split07', root)
    tested = {s.pid % SPLIT_PIDS for s in bench.query}
    assert tested == {1003, 2004, 4001} and not tested & {s.pid for s in bench.train}
    assert len({s.pid for s in bench.train}) == sum(PEOPLE) - 3

def test_cuhk03_np_from_the_mat_and_its_split_file(tmp_path):
    root, names = write_cuhk03(tmp_path/'a'/'cuhk03_release').parent, names_of('labeled')
    ids = {key: i for i, key in enumerate(sorted({n[:2] for n in names}), 1)}
    pids = [ids[pair, person] for pair, person, *_ in names]
    filelist = np.array([[name] for *_, name in names], object)
    train = [i for i, pid in enumerate(pids, 1) if pid <= 8]
    rest = [i for i, pid in enumerate(pids, 1) if pid > 8]
    savemat(tmp_path/'a'/'cuhk03_new_protocol_config_labeled.mat',
            dict(filelist=filelist, labels=np.array(pids)[:, None], train_idx=np.array(train)[:, None],
                 query_idx=np.array(rest[::3])[:, None], gallery_idx=np.array(sorted({*rest} - {*rest[::3]}))[:, None]))
    bench = read_benchmark('cuhk03_np_labeled', tmp_path/'a')
    assert bench.sizes == (len(train), len(rest[::3]), len(rest) - len(rest[::3]))
    assert all(names[train[k] - 1][3] == s.path.name and s.pid == pids[train[k] - 1] for k, s in enumerate(bench.train))
    assert {s.camid for s in bench.query} == {1, 2} and bench.protocol.rule is PROTOCOLS['market1501'].rule
    assert 'bounding_box_train: expected 7,368 pictures' in ' '.join(bench.notes) and root

def test_a_killed_unpacking_is_begun_anew(tmp_path, monkeypatch):
    from reid_nb.parts import benchmarks as room
    root, write, count = write_cuhk03(tmp_path), room.write_image, []
    def dying(path, rgb):
        count.append(path)
        if len(count) == 200: raise KeyboardInterrupt
        write(path, rgb)
    monkeypatch.setattr(room, 'write_image', dying)
    with pytest.raises(KeyboardInterrupt): read_benchmark('cuhk03_classic_labeled', root)
    assert not (tmp_path/'cuhk03_pictures').exists()
    monkeypatch.undo()
    assert len(read_benchmark('cuhk03_classic_labeled', root).gallery) == 60
    assert sorted(os.listdir(tmp_path)) == ['cuhk-03.mat', 'cuhk03_pictures']

@pytest.mark.parametrize('content,words', [(b'', 'not a MATLAB 7.3 file'),
                                           (b'MATLAB 5.0 MAT-file', 'not a MATLAB 7.3 file'),
                                           (None, 'not the cuhk-03.mat that was published')])
def test_another_mat(tmp_path, content, words):
    if content is None:
        with h5py.File(tmp_path/'cuhk-03.mat', 'w') as f: f['detected'] = np.zeros(3)
    else: (tmp_path/'cuhk-03.mat').write_bytes(content)
    with pytest.raises(BadInput, match=words): read_benchmark('cuhk03_classic_detected', tmp_path)

def test_a_zip_is_to_be_unpacked(tmp_path):
    (tmp_path/'Market-1501-v15.09.15.zip').write_bytes(b'PK')
    with pytest.raises(BadInput, match='v15.09.15.zip: unpack it first'): read_benchmark('market1501', tmp_path)

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.sampled_from(['f4', 'f8', 'i4']))
def test_blocks_are_distances(q, g, d, size, kind):
    r = np.random.default_rng(q*1000 + g*100 + d)
    qf, gf = (np.round(r.normal(size=(n, d))*3).astype(kind) for n in (q, g))
    np.testing.assert_allclose(np.concatenate(list(blocks(qf, gf, size))), distances(qf, gf), atol=1e-5)

def test_ranking_takes_little_memory():
    import tracemalloc
    r = np.random.default_rng(0)
    def crowd(n): return r.integers(1, 300, n), r.integers(1, 7, n)
    bench = benchmark(*crowd(300), *crowd(12000))
    qf, gf = (r.standard_normal((n, 1024), np.float32) for n in (300, 12000))   # the gallery takes 49 MB
    tracemalloc.start()
    rank(bench, qf, gf)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6

def test_the_gpu_gives_the_same(cuda):
    r = np.random.default_rng(0)
    qf, gf = r.standard_normal((70, 256), np.float32), r.standard_normal((900, 256), np.float32)
    np.testing.assert_allclose(np.concatenate(list(blocks(qf, gf, 5000))), distances(qf, gf), atol=1e-5)
