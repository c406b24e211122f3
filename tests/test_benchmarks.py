"The benchmarks room: readers, protocols, exact ranking against torchreid and against a slow plain reference."
import shutil

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from reid_nb.benchmarks import (
    PROTOCOLS, Benchmark, Protocol, Sample, chance, color_histogram, distances, labels, rank, rank_rows,
    read_benchmark, register, roc_points, score_counts)
from reid_nb.dataset import BadInput

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

def test_perfect_features_score_one_and_random_ones_chance(toy):
    bench = read_benchmark('cuhk03_np_labeled', toy)
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
    ('market-1501', 'market', 'choose one of market1501, cuhk03_np_detected')])
def test_wrong_paths_and_names(toy, name, root, words):
    with pytest.raises(BadInput, match=words): read_benchmark(name, toy/root)

def test_an_empty_folder_is_refused(tmp_path):
    for part in ('query', 'bounding_box_test'): (tmp_path/part).mkdir()
    with pytest.raises(BadInput, match='not one picture'): read_benchmark('market_folder', tmp_path)

def test_a_protocol_of_ones_own(toy, monkeypatch):
    monkeypatch.setattr('reid_nb.benchmarks.PROTOCOLS', dict(PROTOCOLS))
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
