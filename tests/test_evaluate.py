"Evaluation: intervals, thresholds, open-set search, options, drift, the result file, its command, bad input."
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from reid_nb.parts.core import read_rgb
from reid_nb.parts.benchmarks import Benchmark, labels, Protocol, PROTOCOLS, read_benchmark, Sample
from reid_nb.parts.metrics import color_histogram, distances, rank, score_counts
from reid_nb.parts.core import BadInput
from reid_nb.parts.metrics import (
    auc_eer, average_queries, bootstrap, check_rerank, compare_scores, draw_people, expand_queries, open_set,
    operating_points, pair_figures, rank_with, rates, rerank_distances, split_people, threshold_at)
from reid_nb.parts.drift import (
    camera_matrix, embedding_map, find_drift, identification_rate, plot_rates, plot_roc, plot_scores, rank_lists,
    some_of_each)
from reid_nb.parts.scoring import features_of, read_features, summarize, write_features
from reid_nb.evaluate import evaluate

FIGURES = {'mAP', 'rank1', 'rank5', 'rank10', 'mINP'}

@pytest.fixture(scope='module')
def colors(toy, tmp_path_factory):
    "Colour histograms of the toy's Market-style set: (benchmark, query features, gallery features, npz)"
    bench, path = read_benchmark('market_folder', toy/'market'), tmp_path_factory.mktemp('features')/'colors.npz'
    qf, gf = color_histogram(bench.query), color_histogram(bench.gallery)
    write_features(path, bench, qf, gf)
    return bench, qf, gf, path

def test_the_result_file(toy, colors, tmp_path, run):
    bench, qf, gf, path = colors
    done = run('reid_evaluate', '--data', toy/'market', '--protocol', 'market_folder', '--features', path,
               '--out', tmp_path/'results'/'colors.json', '--seed', 3)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path/'results'/'colors.json').read_text())
    assert result['protocol'] == 'market_folder' and result['data_digest'] == bench.digest and result['seed'] == 3
    assert len(result['checkpoint_digest']) == 64 and set(result['figures']) == FIGURES
    for f in result['figures'].values(): assert 0 <= f['low'] <= f['value'] <= f['high'] <= 1
    assert f"{result['figures']['mAP']['value']:.4f}" in done.stdout and 'market_folder' in done.stdout
    assert (tmp_path/'results'/'colors.png').stat().st_size > 5000
    again = evaluate(data=toy/'market', features=path, seed=3)
    assert json.loads(json.dumps(again)) == result
    other = evaluate(data=toy/'market', features=path, seed=4)
    assert other['figures']['mAP']['low'] != result['figures']['mAP']['low']

def test_the_bootstrap_draws_people():
    "Ten queries a person that succeed or fail together are worth one"
    r = np.random.default_rng(0)
    person = r.random(60) < .5
    many = bootstrap(dict(x=np.repeat(person, 10)), np.repeat(np.arange(60), 10))['x']
    one = bootstrap(dict(x=person), np.arange(60))['x']
    assert many['value'] == one['value'] and many['high'] - many['low'] == pytest.approx(one['high'] - one['low'])

def test_bootstrap_covers_the_truth():
    "About 95 of 100 intervals hold the true mean"
    r = np.random.default_rng(0)
    worlds = [bootstrap(dict(x=r.random(80)), np.arange(80), seed=k, times=300)['x'] for k in range(200)]
    assert .88 < np.mean([w['low'] <= .5 <= w['high'] for w in worlds]) < .99

def test_auc_and_eer_equal_scikit_learn(colors):
    from sklearn.metrics import roc_auc_score, roc_curve
    bench, qf, gf, _ = colors
    found = pair_figures(score_counts(bench, qf, gf, bins=1 << 13))
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    same = qp[:, None] == gp
    counted = ~(same & (qc[:, None] == gc))
    y, s = same[counted], (qf @ gf.T)[counted]
    fmr, tmr, _ = roc_curve(y, s)
    k = np.argmin(np.abs(fmr - (1 - tmr)))
    assert found['auc']['value'] == pytest.approx(roc_auc_score(y, s), abs=1e-3)
    assert found['eer']['value'] == pytest.approx((fmr[k] + 1 - tmr[k])/2, abs=2e-3)
    assert (found['genuine'], found['impostor']) == (y.sum(), (~y).sum())

def test_auc_and_eer_of_extremes():
    assert auc_eer(*rates([0, 0, 5], [5, 0, 0])) == (1, 0)
    assert auc_eer(*rates([1, 1, 1], [1, 1, 1])) == (pytest.approx(.5), pytest.approx(.5))
    assert auc_eer(*rates([5, 0, 0], [0, 0, 5])) == (0, 1)

def test_a_threshold_keeps_its_promise(colors):
    "On the people it was chosen on the false match rate is never above the target, and one bin lower it is"
    bench, qf, gf, _ = colors
    counts = score_counts(bench, qf, gf)
    fmr, _ = rates(counts.genuine.sum(0), counts.impostor.sum(0))
    for target in (1e-1, 1e-2, 1e-3):
        k = np.searchsorted(counts.edges, threshold_at(counts.impostor.sum(0), counts.edges, target))
        assert fmr[k] <= target < fmr[k-1]

def known_law(people=200, crops=3, noise=1., seed=0):
    "A benchmark of two cameras, and features: a vector of each person plus noise"
    r = np.random.default_rng(seed)
    who = r.normal(size=(people + 1, 24))
    def part(cam, n):
        return [Sample(SimpleNamespace(name=''), p, cam) for p in range(1, people + 1) for _ in range(n)]
    bench = Benchmark([], part(1, 2), part(2, crops), '', [], (), PROTOCOLS['market_folder'])
    return bench, *(np.array([who[s.pid] + noise*r.normal(size=24) for s in x]) for x in (bench.query, bench.gallery))

def test_a_threshold_holds_on_other_people():
    "Features of a known law: the false match rate on the other half is near the target"
    bench, qf, gf = known_law()
    points = operating_points(bench, qf, gf)
    assert list(points) == ['0.01', '0.001']  # 60,000 pairs are too few for 0.0001
    for target, p in points.items():
        assert p['low'] <= p['threshold'] <= p['high'] and float(target)/2 < p['fmr'] < float(target)*2
    found = open_set(bench, qf, gf)
    assert found['strangers'] == found['enrolled'] == 200 and found['fnir'][0] > found['fnir'][-1]

def test_halves_share_nobody(colors):
    bench = colors[0]
    (q1, g1), (q2, g2) = split_people(bench, seed=5)
    assert (q1 ^ q2).all() and (g1 ^ g2).all()
    people = [{s.pid for s, x in zip(bench.gallery, g) if x} - {0} for g in (g1, g2)]
    assert not people[0] & people[1]

def test_random_features_and_an_oracle(toy):
    bench = read_benchmark('cuhk03_np_detected', toy)
    oracle = [np.eye(1 + max(s.pid for s in bench.gallery))[labels(p)[0]] for p in (bench.query, bench.gallery)]
    best = summarize(bench, *oracle)
    assert all(f == dict(value=1, low=1, high=1) for f in best['figures'].values())
    assert best['pairs']['eer']['value'] == 0 and max(best['open_set']['fnir']) == 0
    assert all(p['tmr'] == 1 and p['fmr'] == 0 for p in best['thresholds'].values())
    r = np.random.default_rng(0)
    worst = summarize(bench, *(r.normal(size=(len(f), 16)) for f in oracle))
    assert abs(worst['pairs']['auc']['value'] - .5) < .05

def test_names_with_and_without_folder(toy, colors, tmp_path):
    bench, qf, gf, path = colors
    flat = {s.path.name: f for s, f in zip(bench.query + bench.gallery, np.concatenate([qf, gf]))}
    np.savez(tmp_path/'flat.npz', **flat)
    for a, b in zip(read_features(tmp_path/'flat.npz', bench), read_features(path, bench)): assert (a == b).all()
    both = read_benchmark('cuhk03_np_labeled', toy)
    names = {s.path.name for s in both.query} & {s.path.name for s in both.gallery}
    if names:
        np.savez(tmp_path/'both.npz', **{s.path.name: np.ones(3) for s in both.query + both.gallery})
        with pytest.raises(BadInput, match='in two folders'): read_features(tmp_path/'both.npz', both)

def spoilt(path, new, how):
    "The features of `path` with something wrong, in `new`"
    f = dict(np.load(path))
    first = next(iter(f))
    if how == 'missing': f.pop(first)
    if how == 'nan': f[first] = f[first]*np.nan
    if how == 'ragged': f[first] = f[first][:-1]
    if how == 'table': f = {k: v[None] for k, v in f.items()}
    if how == 'words': f = {k: v.astype(str) for k, v in f.items()}
    if how == 'objects': f = {k: v.astype(object) for k, v in f.items()}
    if how == 'text': return new.write_text('no zip')
    np.savez(new, **f)
    if how == 'cut': new.write_bytes(new.read_bytes()[:5000])

@pytest.mark.parametrize('how,words', [
    ('missing', 'no features for 1 pictures'), ('nan', 'not finite'), ('ragged', 'one length'), ('table', 'one length'),
    ('words', 'vectors of numbers'), ('objects', 'not an npz'), ('text', 'not an npz'), ('cut', 'not an npz')])
def test_bad_features(toy, colors, tmp_path, run, how, words):
    spoilt(colors[3], tmp_path/'f.npz', how)
    refused(run, tmp_path, words, '--data', toy/'market', '--features', tmp_path/'f.npz')

@pytest.mark.parametrize('args,words', [
    (['--data', 'nowhere', '--features', 'F'], 'no such folder'),
    (['--data', 'empty', '--features', 'F'], 'no bounding_box'),
    (['--data', 'T', '--protocol', 'market', '--features', 'F'], 'choose one of market1501'),
    (['--data', 'T', '--features', 'none.npz'], 'no such file of features'),
    (['none.safetensors', '--data', 'T'], 'none.safetensors'), (['F', '--data', 'T'], 'colors.npz'),
    (['C', '--data', 'T', '--features', 'F'], 'name either a checkpoint')])
def test_bad_input(toy, colors, tmp_path, run, args, words):
    (tmp_path/'empty').mkdir()
    names = dict(T=toy/'market', F=colors[3], nowhere=tmp_path/'nowhere', empty=tmp_path/'empty')
    refused(run, tmp_path, words, *(names.get(a, a) for a in args))

def refused(run, folder, words, *args):
    "One clear line after the notes on the set, exit code 2, and nothing written"
    done = run('reid_evaluate', *args, '--out', folder/'out.json', cwd=folder)
    *notes, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and words in last and last.startswith('reid_evaluate: '), done.stderr
    assert all('pictures (pid -1) left out' in line for line in notes), notes
    assert done.stdout == ''
    assert not list(folder.glob('out*'))

def test_a_full_disk(toy, colors, tiny_disk, run):
    try: (tiny_disk/'full').write_bytes(bytes(3_000_000))
    except OSError: assert list(tiny_disk.iterdir()) == [tiny_disk/'full']
    done = run('reid_evaluate', '--data', toy/'market', '--features', colors[3], '--out', tiny_disk/'out.json')
    *notes, last = done.stderr.splitlines()
    assert done.returncode == 2 and 'No space left' in last and len(notes) == 1, done.stderr   # the set's junk
    assert [p for p in tiny_disk.iterdir() if p.suffix != '.lock'] == [tiny_disk/'full'] and done.stdout == ''

def test_a_checkpoint(toy, tmp_path, run):
    "A network for an instant: evaluation writes no thresholds, calibration does, and its features score the same"
    from reid_nb.finetune import finetune
    ckpt = finetune(toy/'market', out=tmp_path/'ft', epochs=1, size=(64, 32), labels=.5)
    path, here = tmp_path/'ft'/'reid.thresholds.json', evaluate(ckpt, toy/'market')
    assert not path.exists()
    done = run('reid_calibrate', ckpt, '--data', toy/'market')
    assert done.returncode == 0 and 'FMR 0.01' in done.stdout, done.stderr
    evaluate(ckpt, toy, 'cuhk03_np_labeled')
    kept = json.loads(path.read_text())
    assert kept.pop('scores') == {k: here['scores'][k] for k in ('edges', 'impostor')}
    assert kept.pop('data') == 'market' and kept.pop('measured')
    same = 'protocol', 'data_digest', 'checkpoint_digest', 'seed', 'identities', 'thresholds'
    assert kept == {k: here[k] for k in same}
    the_mirror(toy, ckpt, path)
    old_and_moved_thresholds(toy, ckpt, path, kept, here)
    done = run('reid_evaluate', ckpt, '--data', toy/'market', '--embed_only', tmp_path/'f.npz')
    assert done.returncode == 0, done.stderr
    there = evaluate(data=toy/'market', features=tmp_path/'f.npz')
    for name in FIGURES:
        assert there['figures'][name]['value'] == pytest.approx(here['figures'][name]['value'], abs=1e-6)

def the_mirror(toy, ckpt, path):
    "The option flip averages with mirror images, is named, and leaves the thresholds as they were"
    from reid_nb.parts.weights import embed, load_model
    before, bench = path.read_bytes(), read_benchmark('market_folder', toy/'market')
    few, (model, meta) = replace(bench, query=bench.query[:3], gallery=bench.gallery[:2]), load_model(ckpt)
    rgb = [read_rgb(s.path) for s in few.query]
    both = embed(model, meta, rgb), embed(model, meta, [np.ascontiguousarray(x[:, ::-1]) for x in rgb])
    def raw(x): return np.float64(x)/np.linalg.norm(x, axis=1, keepdims=True)
    flipped = features_of(few, ckpt, flip=True)[0]
    assert (flipped*raw(sum(both))).sum(1).min() > .999 and not np.allclose(flipped, both[0], atol=1e-4)
    result = evaluate(ckpt, toy/'market', flip=True, against=ckpt)
    assert result['options'] == {'flip': True} and path.read_bytes() == before
    assert all(f == dict(value=0, low=0, high=0) for f in result['comparison']['figures'].values())

def old_and_moved_thresholds(toy, ckpt, path, kept, here):
    "A thresholds file without old scores serves as ever; one with quite other scores warns, but not at home"
    from reid_nb.parts.tracks import load_matcher
    moved = dict(edges=[-1.5, -1.2, -1.1, -1], impostor=[5, 5, 5])
    for scores, words in ({}, None), (dict(scores=moved), 'stability index'):
        path.write_text(json.dumps(kept | scores))
        assert load_matcher(ckpt).thresholds == here['thresholds']
        assert words is None or words in evaluate(ckpt, toy, 'cuhk03_np_labeled')['drift']
        if words is None: assert 'drift' not in evaluate(ckpt, toy, 'cuhk03_np_labeled')
        assert evaluate(ckpt, toy/'market') == here and json.loads(path.read_text()) == kept | scores

@pytest.mark.parametrize('text, words', [('', 'damaged'), ('{"thresholds": {}', 'damaged'), ('[1, 2]', 'damaged'),
    ('{"checkpoint_digest": "0", "thresholds": {}}', 'of another'),
    ('{"checkpoint_digest": "0", "thresholds": {"0.01": {"high": NaN}}}', 'damaged')])
def test_thresholds_that_cannot_be_trusted_are_refused(toy, tmp_path, run, text, words):
    "Neither evaluation nor recognition goes on without them, and neither mends them."
    from reid_nb.parts.tracks import load_matcher
    from reid_nb.parts.weights import SMALL
    ckpt, path = tmp_path/'a.safetensors', tmp_path/'a.thresholds.json'
    ckpt.write_bytes(SMALL.read_bytes())
    path.write_text(text)
    for f in (lambda: evaluate(ckpt, toy/'market'), lambda: load_matcher(ckpt)):
        with pytest.raises(BadInput, match=f'{words}.*reid_calibrate'): f()
    assert path.read_text() == text

def random_benchmark(seed, people=6, cameras=3, q=15, g=40, d=8):
    "Queries and gallery of random people in random cameras, pid 0 in the gallery too, and their features"
    r = np.random.default_rng(seed)
    def part(n, low): return [Sample(Path('x'), int(p), int(c)) for p, c in zip(r.integers(low, people, n),
                                                                                r.integers(1, cameras + 1, n))]
    bench = Benchmark([], part(q, 1), part(g, 0), '', [], (), PROTOCOLS['market_folder'])
    return bench, r.normal(size=(q, d)), r.normal(size=(g, d))

def unit(x): return x/np.linalg.norm(x)

many = settings(max_examples=25, deadline=None, derandomize=True)

@many
@given(seed=st.integers(0, 10**6), people=st.integers(2, 6), cameras=st.integers(1, 3))
def test_several_queries_by_hand(seed, people, cameras):
    bench, qf, _ = random_benchmark(seed, people, cameras)
    for one, got in zip(bench.query, average_queries(bench, qf)):
        group = [unit(f) for s, f in zip(bench.query, qf) if (s.pid, s.camid) == (one.pid, one.camid)]
        assert np.allclose(got, unit(sum(group)), atol=1e-5)

@many
@given(seed=st.integers(0, 10**6), k=st.integers(1, 60))
def test_expansion_by_hand(seed, k):
    "The k best that the rule does not ignore; fewer where there are no more"
    bench, qf, gf = random_benchmark(seed)
    for q, f, got in zip(bench.query, qf, expand_queries(bench, qf, gf, k)):
        allowed = [unit(x) for s, x in zip(bench.gallery, gf) if (s.pid, s.camid) != (q.pid, q.camid)]
        best = sorted(allowed, key=lambda x: -x @ unit(f))[:k]
        assert np.allclose(got, unit(unit(f) + sum(best)), atol=1e-4)

@many
@given(seed=st.integers(0, 10**6), k=st.integers(1, 9), rounds=st.integers(1, 4))
def test_impressions_gather_round_by_round(seed, k, rounds):
    bench, qf, gf = random_benchmark(seed)
    step = qf
    for _ in range(rounds): step = expand_queries(bench, step, gf, k)
    assert (step == expand_queries(bench, qf, gf, k, rounds)).all()

def test_expansion_looks_at_no_labels_but_the_rules():
    "With a rule that ignores nothing, other labels change nothing"
    bench, qf, gf = random_benchmark(0)
    bench = replace(bench, protocol=Protocol('open', None, lambda q, pids, camids: pids < -1))
    other = replace(bench, gallery=[s._replace(pid=s.pid + 7) for s in bench.gallery])
    assert (expand_queries(bench, qf, gf, 5) == expand_queries(other, qf, gf, 5)).all()
    assert (rerank_distances(bench, qf, gf) == rerank_distances(other, qf, gf)).all()

def slow_rerank(qf, gf, k1=20, k2=6, weight=.3):
    "k-reciprocal re-ranking as the paper has it, with sets"
    x = np.array([*map(unit, qf), *map(unit, gf)])
    d = ((x[:, None] - x)**2).sum(-1)
    d = d/d.max(1, keepdims=True)
    order = np.argsort(d, 1)
    def near(i, k): return {*order[i, :k+1].tolist()}
    def mutual(i, k): return {j for j in near(i, k) if i in near(j, k)}
    V = np.zeros_like(d)
    for i in range(len(x)):
        core = mutual(i, k1)
        wide = core.union(*(m for j in core if len((m := mutual(j, round(k1/2))) & core) > 2/3*len(m)))
        for j in wide: V[i, j] = np.exp(-d[i, j])
        V[i] /= V[i].sum()
    V = np.array([V[order[i, :k2]].mean(0) for i in range(len(x))])
    jaccard = 1 - np.array([[np.minimum(a, b).sum()/np.maximum(a, b).sum() for b in V] for a in V])
    return ((1 - weight)*jaccard + weight*d)[:len(qf), len(qf):]

@settings(many, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_reranking_by_hand(seed):
    bench, qf, gf = random_benchmark(seed)
    assert np.allclose(rerank_distances(bench, qf, gf), slow_rerank(qf, gf), atol=1e-4)

def test_reranking_is_torchreids(colors):
    from torchreid.reid.metrics.rank import evaluate_rank
    from torchreid.reid.utils.rerank import re_ranking
    bench, qf, gf, _ = colors
    def euclid(a, b): return np.sqrt(2*distances(a, b).clip(0))
    theirs = re_ranking(euclid(qf, gf), euclid(qf, qf), euclid(gf, gf))
    assert (rerank_distances(bench, qf, gf) == theirs).all()
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    cmc, mAP = evaluate_rank(theirs, qp, gp, qc, gc, use_cython=False)
    ours = rank_with(bench, qf, gf, dict(rerank=True)).figures()
    assert ours['mAP'] == pytest.approx(mAP, abs=1e-6) and ours['rank1'] == pytest.approx(cmc[0], abs=1e-6)
    assert ours['mAP'] > rank(bench, qf, gf).figures()['mAP']

def test_reranking_says_no(colors):
    "Too many pictures, features that are all one, and queries with galleries of their own"
    bench, qf, gf, _ = colors
    with pytest.raises(BadInput, match='are the limit'): check_rerank(replace(bench, gallery=bench.gallery*60))
    with pytest.raises(BadInput, match='the same'): rerank_distances(bench, 0*qf + 1, 0*gf + 1)
    apart = Protocol('apart', None, lambda q, pids, camids: pids//10 != q.pid//10)
    with pytest.raises(BadInput, match='one gallery for all'): check_rerank(replace(bench, protocol=apart))

def test_comparison(colors):
    "Nothing but zeros with itself; for others a mean of differences, on the same draws"
    bench, qf, gf, _ = colors
    a, b = rank(bench, qf, gf), rank(bench, qf[:, :216], gf[:, :216])
    assert all(f == dict(value=0, low=0, high=0) for f in compare_scores(a, a).values())
    got, people = compare_scores(a, b, seed=2, times=50), np.unique(a.pids[a.valid])
    def mean(scores, w):
        ap, pids = scores.ap[scores.valid], scores.pids[scores.valid]
        return np.mean(np.concatenate([np.repeat(ap[pids == p], n) for p, n in zip(people, w)]))
    drawn = [mean(a, w) - mean(b, w) for w in draw_people(len(people), 50, 2)]
    assert np.allclose([got['mAP']['low'], got['mAP']['high']], np.percentile(drawn, [2.5, 97.5]))
    assert got['mAP']['value'] == pytest.approx(a.figures()['mAP'] - b.figures()['mAP'])
    for other in replace(b, pids=b.pids[::-1]), replace(b, protocol='x'), replace(b, ap=b.ap*np.nan):
        with pytest.raises(BadInput, match='the same queries'): compare_scores(a, other)

def test_options_are_named(toy, colors, tmp_path, run):
    bench, qf, gf, path = colors
    write_features(tmp_path/'half.npz', bench, qf[:, :216], gf[:, :216])
    args = '--data', toy/'market', '--features', path, '--against', tmp_path/'half.npz', '--out', tmp_path/'out.json'
    done = run('reid_evaluate', *args, '--rerank', '--expand', 2, '--multi_query')
    assert done.returncode == 0, done.stderr
    result, plain = json.loads((tmp_path/'out.json').read_text()), evaluate(data=toy/'market', features=path)
    assert result['options'] == dict(rerank=True, expand=2, multi_query=True)
    assert 'options: rerank, expand 2, multi_query' in done.stdout and 'more than half.npz' in done.stdout
    assert 'note: multi_query: no person has several' in done.stdout and 'note: expand, rerank: for CMC' in done.stdout
    scores = [rank_with(bench, f, g, result['options']) for f, g in ((qf, gf), (qf[:, :216], gf[:, :216]))]
    assert result['figures']['mAP']['value'] == pytest.approx(scores[0].figures()['mAP'])
    assert result['comparison']['source'] == 'half.npz' and len(result['comparison']['checkpoint_digest']) == 64
    assert result['comparison']['figures'] == compare_scores(*scores)
    for a, b in zip(result['thresholds'].values(), plain['thresholds'].values(), strict=True):
        assert a['threshold'] == pytest.approx(b['threshold'], abs=1e-3)
    assert not {'options', 'comparison', 'drift'} & plain.keys() and plain['notes'] == bench.notes

@pytest.mark.parametrize('options,words', [
    (dict(flip=True), 'flip goes with a checkpoint'), (dict(expand=-1), 'expand -1'),
    (dict(rounds=2), 'rounds 2'), (dict(expand=2, rounds=0), 'rounds 0'),
    (dict(against='none.npz'), 'none.npz: no such file'), (dict(embed_only='o.npz', expand=1), 'only writes features')])
def test_options_that_cannot_be(toy, colors, options, words):
    with pytest.raises(BadInput, match=words): evaluate(data=toy/'market', features=colors[3], **options)

def test_a_bad_option_is_one_line(toy, colors, tmp_path, run):
    args = '--data', toy/'market', '--features', colors[3]
    refused(run, tmp_path, 'flip goes with a checkpoint', *args, '--flip')

def test_no_result_without_a_protocol(colors):
    bench, qf, gf, _ = colors
    for protocol in None, Protocol('', None):
        with pytest.raises(BadInput, match='name of its protocol'): summarize(replace(bench, protocol=protocol), qf, gf)

@many
@given(pids=st.lists(st.integers(0, 5), min_size=1, max_size=30), crops=st.integers(1, 6))
def test_some_pictures_of_each(pids, crops):
    pids = np.array(pids)
    for k in crops, None:
        kept = pids[some_of_each(pids, k, np.random.default_rng(0))]
        assert all((kept == p).sum() == min(k or 99, (pids == p).sum()) for p in pids)

def test_more_people_and_more_pictures():
    "Harder with each person, easier with each picture; with half of all people it is open-set search at one rate"
    law = known_law(people=80, crops=6, noise=1.2)
    people = [identification_rate(*law, people=n, repeats=10)['value'] for n in (5, 15, 40)]
    crops = [identification_rate(*law, crops=n, repeats=10)['value'] for n in (1, 2, None)]
    assert people[0] > people[1] > people[2] == crops[2] > crops[1] > crops[0]
    assert people[2] == pytest.approx(1 - open_set(*law, repeats=10)['fnir'][20])
    with pytest.raises(BadInput, match='41 people cannot'): identification_rate(*law, people=41)

def test_drift_by_hand():
    "Ten bins of equal share; all new scores in the first two of them"
    known = dict(scores=dict(edges=np.linspace(0, 1, 11).tolist(), impostor=[10]*10))
    index = 2*.4*np.log(5) + 8*(1e-4 - .1)*np.log(1e-4/.1)
    assert f'index {index:.2f},' in find_drift(known, [.05, .15]) and find_drift(known, [.05, .15], [7, 7])
    assert find_drift(known, np.linspace(.05, .95, 10)) == find_drift({}, [.5]) == find_drift(known, []) == ''

def test_drift_is_not_seen_in_more_of_the_same():
    "Other people of the same law raise no alarm, a shift by a standard deviation does"
    r, fine = np.random.default_rng(0), np.linspace(-1, 1, 513)
    old = np.histogram(r.normal(.3, .1, 100_000), fine)[0]
    known = dict(scores=dict(edges=fine.tolist(), impostor=old.tolist()))
    assert not any(find_drift(known, r.normal(.3, .1, 500)) for _ in range(50))
    assert all(find_drift(known, r.normal(m, .1, 500)) for m in (.2, .4)) and find_drift(known, r.normal(.3, .03, 500))

def test_camera_by_camera(colors):
    bench, qf, gf, _ = colors
    table, d = camera_matrix(bench, qf, gf), distances(qf, gf)
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    for i, a in enumerate(table['query']):
        for j, b in enumerate(table['gallery']):
            at = np.flatnonzero(gc == b)
            best = [gp[at[d[k, at].argmin()]] == qp[k] for k in np.flatnonzero(qc == a) if qp[k] in gp[at]]
            assert np.isnan(table['rank1'][i, j]) if a == b else table['rank1'][i, j] == pytest.approx(np.mean(best))
    assert (np.isnan(table['mAP']) == np.eye(len(table['query']), dtype=bool)).all()

def test_figures_are_drawn(colors):
    import matplotlib
    matplotlib.use('agg')
    bench, qf, gf, _ = colors
    result = summarize(bench, qf, gf)
    assert len(plot_roc({'a': result, 'b': result}).axes) == 2 and len(plot_roc(result).axes) == 2
    assert len(plot_scores(result).axes) == 2 and len(rank_lists(bench, qf, gf, [0, 3], k=4).axes) == 10
    rate = dict(value=.5, low=.4, high=.6)
    assert len(plot_rates({'people': {3: rate, 6: rate}, 'pictures': {1: rate, None: rate}}).axes) == 2
    assert len(embedding_map(bench, qf, gf, people=3).axes[0].collections) == 3

@pytest.mark.long
def test_a_peer_on_cuhk03_p1(data, tmp_path, run):
    "OSNet x0.25 trained on MSMT17, never seen CUHK03: Rank-1 33.0, mAP 32.2, by features made outside"
    onnxruntime = pytest.importorskip('onnxruntime', reason='the peer is an ONNX file: pip install onnxruntime')
    import cv2
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    peer = onnxruntime.InferenceSession(str(data/'peers'/'osnet_x0_25_msmt17.onnx'), options)
    bench, name = read_benchmark('cuhk03_p1', data), peer.get_inputs()[0].name
    def embed(samples):
        x = np.stack([cv2.resize(read_rgb(s.path), (128, 256)) for s in samples]).astype(np.float32)/255
        x = (x - np.float32([.485, .456, .406]))/np.float32([.229, .224, .225])
        return peer.run(None, {name: x.transpose(0, 3, 1, 2)})[0]
    def features(samples): return np.concatenate([embed(samples[i:i+32]) for i in range(0, len(samples), 32)])
    write_features(tmp_path/'peer.npz', bench, features(bench.query), features(bench.gallery))
    done = run('reid_evaluate', '--data', data, '--protocol', 'cuhk03_p1', '--features', tmp_path/'peer.npz',
               '--out', tmp_path/'peer.json')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path/'peer.json').read_text())
    assert result['figures']['rank1']['value'] == pytest.approx(.330, abs=.006)
    assert result['figures']['mAP']['value'] == pytest.approx(.322, abs=.006)
    assert result['protocol'] == 'cuhk03_p1' and result['notes'] == [] and result['queries'] == 200

def test_colours_on_cuhk03_p1(data, tmp_path, run):
    bench = read_benchmark('cuhk03_p1', data)
    write_features(tmp_path/'c.npz', bench, color_histogram(bench.query), color_histogram(bench.gallery))
    done = run('reid_evaluate', '--data', data/'cuhk03_p1', '--protocol', 'cuhk03_p1', '--features', tmp_path/'c.npz')
    assert done.returncode == 0 and '200 queries of 100 people, 938 gallery' in done.stdout, done.stderr

def test_classic_cuhk03_counts_people_once(tmp_path):
    "A person of several splits is one person for intervals and for the halves of the thresholds"
    from reid_nb.parts.benchmarks import Benchmark, join_splits, PROTOCOLS, Sample
    from reid_nb.parts.metrics import score_counts
    samples = [Sample(tmp_path/f'{pid}_{cam}_{n}.png', pid, cam)
               for pid in range(1, 9) for cam in (1, 2) for n in (0, 1)]
    r = np.random.default_rng(0)
    query, gallery = join_splits(samples, [r.permutation(np.arange(1, 9))[:5].tolist() for _ in range(20)])
    bench = Benchmark([], query, gallery, 'x', [], (), PROTOCOLS['cuhk03_classic_labeled'])
    qf, gf = r.normal(size=(len(query), 8)), r.normal(size=(len(gallery), 8))
    assert set(score_counts(bench, qf, gf).pids) == set(range(1, 9))
    for (q, g), (q2, g2) in [split_people(bench, 0)]:
        one = {s.pid % 10000 for s, x in zip(query, q) if x} | {s.pid % 10000 for s, x in zip(gallery, g) if x}
        two = {s.pid % 10000 for s, x in zip(query, q2) if x} | {s.pid % 10000 for s, x in zip(gallery, g2) if x}
        assert not one & two and len(one | two) == 8
    result = summarize(bench, qf, gf)
    assert result['identities'] == 8 and result['protocol'] == 'cuhk03_classic_labeled'

def test_multi_query_takes_gt_bbox(toy, tmp_path):
    root = tmp_path/'market'
    shutil.copytree(toy/'market', root)
    asked = {p.name[:7] for p in (root/'query').iterdir()}
    (root/'gt_bbox').mkdir()
    for p in (root/'bounding_box_test').iterdir():
        if p.name[:7] in asked or p.name.startswith('-1'): shutil.copy(p, root/'gt_bbox')
    bench = read_benchmark('market_folder', root)
    assert bench.more and {s.path.name[:7] for s in bench.more} <= asked
    assert bench.digest == read_benchmark('market_folder', toy/'market').digest
    qf, gf, mf = (color_histogram(part) for part in (bench.query, bench.gallery, bench.more))
    write_features(tmp_path/'f.npz', replace(bench, query=[*bench.query, *bench.more]), np.concatenate([qf, mf]), gf)
    result = evaluate(data=root, features=tmp_path/'f.npz', multi_query=True)
    mean = [np.mean([f for t, f in zip([*bench.query, *bench.more], [*qf, *mf]) if t[1:] == s[1:]], 0)
            for s in bench.query]
    want = rank(bench, np.array(mean), gf).figures()
    for k, v in want.items(): assert result['figures'][k]['value'] == pytest.approx(v, abs=1e-6)
    assert any(f'{len(bench.more):,} more pictures' in note for note in result['notes'])
    plain = evaluate(data=root, features=tmp_path/'f.npz')['figures']
    assert plain['mAP']['value'] != pytest.approx(want['mAP'])
