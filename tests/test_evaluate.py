"The evaluation room: intervals, thresholds, open-set search, the result file, its command, and bad input."
import json

import numpy as np
import pytest

from reid_nb.benchmarks import color_histogram, labels, read_benchmark, read_rgb, score_counts
from reid_nb.dataset import BadInput
from reid_nb.evaluate import (
    auc_eer, bootstrap, evaluate, open_set, operating_points, pair_figures, plot_roc, plot_scores, rank_lists, rates,
    read_features, split_people, summarize, threshold_at, write_features)

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

def test_a_threshold_holds_on_other_people():
    "Features of a known law: the false match rate on the other half is near the target"
    from types import SimpleNamespace
    from reid_nb.benchmarks import PROTOCOLS, Benchmark, Sample
    r = np.random.default_rng(0)
    who = r.normal(size=(201, 24))
    def part(cam, n): return [Sample(SimpleNamespace(name=''), p, cam) for p in range(1, 201) for _ in range(n)]
    bench = Benchmark([], part(1, 2), part(2, 3), '', [], (), PROTOCOLS['market_folder'])
    qf, gf = (np.array([who[s.pid] + r.normal(size=24) for s in x]) for x in (bench.query, bench.gallery))
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
    (['--data', 'T', '--features', 'none.npz'], 'no such file of features'), (['--data', 'T'], 'reid_quickstart'),
    (['none.safetensors', '--data', 'T'], 'none.safetensors'), (['F', '--data', 'T'], 'colors.npz'),
    (['C', '--data', 'T', '--features', 'F'], 'name either a checkpoint')])
def test_bad_input(toy, colors, tmp_path, run, args, words):
    (tmp_path/'empty').mkdir()
    names = dict(T=toy/'market', F=colors[3], nowhere=tmp_path/'nowhere', empty=tmp_path/'empty')
    refused(run, tmp_path, words, *(names.get(a, a) for a in args))

def refused(run, folder, words, *args):
    "One clear line, exit code 2, and nothing written"
    done = run('reid_evaluate', *args, '--out', folder/'out.json', cwd=folder)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith('reid_evaluate: ')
    assert done.stdout == ''
    assert not list(folder.glob('*out*'))

def test_a_full_disk(toy, colors, tiny_disk, run):
    try: (tiny_disk/'full').write_bytes(bytes(3_000_000))
    except OSError: assert list(tiny_disk.iterdir()) == [tiny_disk/'full']
    done = run('reid_evaluate', '--data', toy/'market', '--features', colors[3], '--out', tiny_disk/'out.json')
    assert done.returncode == 2 and 'No space left' in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tiny_disk.iterdir()) == [tiny_disk/'full'] and done.stdout == ''

def test_a_checkpoint(toy, tmp_path, run):
    "A network for an instant: its thresholds stay those of its first evaluation, and its features score the same"
    from reid_nb.finetune import finetune
    ckpt = finetune(toy/'market', out=tmp_path/'ft', epochs=1, size=(64, 32), labels=.5)
    here = evaluate(ckpt, toy/'market')
    evaluate(ckpt, toy, 'cuhk03_np_labeled')
    kept = json.loads((tmp_path/'ft'/'reid.thresholds.json').read_text())
    assert kept == {k: here[k] for k in ('protocol', 'data_digest', 'checkpoint_digest', 'seed', 'thresholds')}
    done = run('reid_evaluate', ckpt, '--data', toy/'market', '--embed_only', tmp_path/'f.npz')
    assert done.returncode == 0, done.stderr
    there = evaluate(data=toy/'market', features=tmp_path/'f.npz')
    for name in FIGURES:
        assert there['figures'][name]['value'] == pytest.approx(here['figures'][name]['value'], abs=1e-6)

def test_figures_are_drawn(colors):
    import matplotlib
    matplotlib.use('agg')
    bench, qf, gf, _ = colors
    result = summarize(bench, qf, gf)
    assert len(plot_roc({'a': result, 'b': result}).axes) == 2 and len(plot_roc(result).axes) == 2
    assert len(plot_scores(result).axes) == 2 and len(rank_lists(bench, qf, gf, [0, 3], k=4).axes) == 10

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
