"Own pictures without labels of cameras: folders of people, and tracks; figures beside those of Roboflow's reid."
import json
from dataclasses import replace
from functools import partial
from importlib import import_module

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_options import call

from reid_nb.dataset import extract
from reid_nb.evaluate import calibrate, evaluate
from reid_nb.parts.benchmarks import (
    cut_boxes, find_sequences, gap_frames, labels, PROTOCOLS, read_benchmark, read_identities, read_lines, read_rate,
    read_set, read_tracks, Sample)
from reid_nb.parts.core import BadInput, rng_of
from reid_nb.parts.metrics import chance, color_histogram, compare_scores, rank
from reid_nb.parts.scoring import (
    compare_models, describe_models, full_names, own_figures, read_features, write_features)

def random_features(samples, dim=8):
    "A vector for each picture, by its path: the same for a picture that is query and candidate"
    return np.array([rng_of('feature', s.path).normal(size=dim) for s in samples])

def figures(bench, features=random_features):
    return own_figures(bench, rank(bench, features(bench.query), features(bench.gallery)).figures())

def every(stride): return replace(PROTOCOLS['reassociation'], name='own', reader=partial(read_tracks, stride=stride))

# -- the same figures as Roboflow's ---------------------------------------------------------------------------------

@pytest.fixture
def reid(peers, monkeypatch):
    "Roboflow's reid"
    monkeypatch.syspath_prepend(peers)
    return import_module('reid')

NAMES = dict(map='mAP', minp='mINP', mrr='MRR')

def theirs(protocol, data, gallery, feature):
    "Figures by Roboflow's reid, as its `ReIDModel.evaluate` computes them; `feature`: path -> vector"
    from reid.eval.metrics import _compute_reid_metrics, distance_matrix
    q, g, mask, _ = protocol.build_query_gallery(data, gallery)
    near = distance_matrix(*(np.array([feature(p) for p in part.image_paths]) for part in (q, g)))
    found = _compute_reid_metrics(near, q.pids, g.pids, q.camids, g.camids, gallery_junk_pids=g.gallery_junk_pids,
                                  candidate_mask=mask, exclude_same_pid_camid=protocol.exclude_same_pid_camid)
    return {NAMES.get(k, k): v/100 for k, v in protocol.metric_values(found).items()}, len(q), len(g)

def by_path(bench):
    samples = [*bench.query, *bench.gallery]
    return {str(s.path): f for s, f in zip(samples, random_features(samples))}

def test_market_with_junk_and_cameras(reid, tmp_path):
    r = rng_of('market')
    for part, n, low in ('query', 60, 1), ('bounding_box_test', 400, -1):
        (tmp_path/part).mkdir()
        for k, (pid, cam) in enumerate(r.integers((low, 1), (20, 5), (n, 2)).tolist()):
            (tmp_path/part/f'{"-1" if pid < 0 else f"{pid:04d}"}_c{cam}s1_{k:06d}_00.jpg').write_bytes(b'x')
    bench = read_benchmark('market_folder', tmp_path)
    def feature(path): return rng_of('feature', path).normal(size=8)
    want, nq, _ = theirs(reid.RetrievalProtocol(), *reid.load_market1501(tmp_path), feature)
    assert any('junk' in note for note in bench.notes) and nq == len(bench.query)
    assert figures(bench) == pytest.approx(want, abs=1e-6) and set(want) == set(figures(bench))

def test_identity_folders_of_the_same_split(reid, tmp_path):
    r = rng_of('folders')
    for k in range(30):
        for n in range(r.integers(1, 6)):
            (tmp_path/f'person {k}').mkdir(exist_ok=True)
            (tmp_path/f'person {k}'/f'{n}.jpg').write_bytes(b'x')
    bench = read_benchmark('identity_folders', tmp_path)
    features = by_path(bench)
    parts = [reid.ReIDSplit([str(s.path) for s in part], labels(part)[0], np.full(len(part), cam))
             for cam, part in enumerate((bench.query, bench.gallery))]
    want, *_ = theirs(reid.RetrievalProtocol(), *parts, features.get)
    assert figures(bench) == pytest.approx(want, abs=1e-6) and 0 < want['mAP'] < 1

def draw_frames(folder, n, size=(48, 64)):
    (folder/'img1').mkdir(parents=True)
    for k in range(1, n + 1):
        cv2.imwrite(str(folder/'img1'/f'{k:06d}.jpg'), rng_of(folder.name, k).integers(0, 255, (*size, 3), np.uint8))

@pytest.fixture
def mot(tmp_path):
    "Two sequences of MOTChallenge, with all that the ground truth has beside boxes that count"
    root = tmp_path/'MOT'
    for name in 'T-01', 'T-02':
        draw_frames(root/name, 130)
        r, lines = rng_of(name), []
        for track in range(1, 9):
            for f in range(*r.integers((1, 70), (60, 131)).tolist()):
                x, y = (r.random(2)*(40, 20) - 5).round(1)
                lines.append(f'{f},{track},{x},{y},{12.5},{24},{int(r.random() > .05)},{1 + 2*(r.random() < .05)},.8')
        lines += ['60,90,-50,0,20,20,1,1,1', '500,91,0,0,9,9,1,1,1']   # outside the picture; no such frame
        (root/name/'gt').mkdir()
        (root/name/'gt'/'gt.txt').write_text('\n'.join(lines) + '\n')
        (root/name/'seqinfo.ini').write_text('[Sequence]\nname=x\nframeRate=20\nseqLength=130\n')
    return root

def ours_as_theirs(path):
    "`(sequence, track, frame)` of one of our crops"
    track, frame, _ = path.stem.split('_')
    return path.parent.name, int(track), int(frame)

def test_reassociation_on_mot(reid, mot, tmp_path):
    import_module('reid.data.mot').generate_mot_patches(mot, tmp_path/'theirs', split='full', class_ids=[1])
    parse = import_module('reid.data.mot')._parse_crop_path
    for gap, stride in (30, 60), (30, 30), (7, 10):
        bench = read_set(every(stride), mot, gap=gap)
        features = {ours_as_theirs(s.path): random_features([s])[0] for s in [*bench.query, *bench.gallery]}
        want, nq, ng = theirs(reid.ReassociationProtocol(gap_frames=gap, query_stride=stride),
                              reid.load_identity_folders(tmp_path/'theirs'), None,
                              lambda p: features[parse(import_module('pathlib').Path(p))])
        assert (nq, ng) == (len(bench.query), len(bench.gallery)) and nq > 5
        assert figures(bench) == pytest.approx(want, abs=1e-6) and set(want) == {'rank1', 'MRR'}

def test_reassociation_on_real_crops(reid, data, tmp_path):
    real = data/'real_city'
    extract(real/'videos', real/'dets', tmp_path/'crops', workers=1)
    bench = read_benchmark('reassociation', tmp_path/'crops')
    def named(path): return f'{path.parent.name}_{int(path.stem[:6])}/{path.parent.name}_{int(path.stem[7:14])}.jpg'
    paths = sorted((tmp_path/'crops').glob('*/*/*/*.jpg'))
    colors = dict(zip(map(named, paths), color_histogram([Sample(p, 1, 1) for p in paths])))
    split = reid.ReIDSplit([*colors], np.zeros(len(colors), int), np.zeros(len(colors), int))
    want, nq, ng = theirs(reid.ReassociationProtocol(gap_frames=30, query_stride=30), split, None, colors.get)
    assert (nq, ng) == (len(bench.query), len(bench.gallery)) and nq > 50
    assert figures(bench, color_histogram) == pytest.approx(want, abs=1e-6)

# -- by definition --------------------------------------------------------------------------------------------------

def by_definition(crops, gap, stride, feature):
    "{query: rank of its own track} of crops (video, track, frame), by looking at everything"
    ranks = {}
    for video in {v for v, *_ in crops}:
        seen = {f: {t for v, t, g in crops if (v, g) == (video, f)} for v, _, f in crops if v == video}
        step = min((b - a for a in seen for b in seen if b > a), default=0)
        def near(wanted):
            there = [(abs(f - wanted), f) for f in seen if abs(f - wanted) <= step//2]
            return min(there)[1] if there else None
        for q in {near(m) for m in range(0, max(seen) + stride + 1, stride)} - {None}:
            later = near(q + gap)
            if later is None or later <= q or len(seen[later]) < 2: continue
            for t in seen[q] & seen[later]:
                score = {u: feature[video, u, later] @ feature[video, t, q] for u in seen[later]}
                ranks[video, t, q] = 1 + sum(score[u] > score[t] for u in score)
    return ranks

@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.sets(st.tuples(st.sampled_from('ab'), st.integers(1, 4), st.integers(0, 24)), min_size=1, max_size=60),
       st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))
def test_reassociation_by_definition(tmp_path_factory, crops, gap, stride, spread):
    crops, root = {(v, t, f*spread) for v, t, f in crops}, tmp_path_factory.mktemp('crops')
    for v, t, f in crops:
        (root/v).mkdir(exist_ok=True)
        (root/v/f'{t:06d}_{f:07d}_00.jpg').write_bytes(b'x')
    feature = {c: rng_of('feature', *c).normal(size=6) for c in crops}
    feature = {c: x/np.linalg.norm(x) for c, x in feature.items()}
    want = by_definition(crops, gap, stride, feature)
    if not want:
        with pytest.raises(BadInput, match='try another --gap'): read_set(every(stride), root, gap=gap)
        return
    bench = read_set(every(stride), root, gap=gap)
    parts = [[ours_as_theirs(s.path) for s in part] for part in (bench.query, bench.gallery)]
    scores = rank(bench, *(np.array([feature[c] for c in part]) for part in parts))
    assert dict(zip(parts[0], scores.first)) == want and scores.valid.all()
    assert figures(bench, lambda part: np.array([feature[ours_as_theirs(s.path)] for s in part])) == pytest.approx(
        dict(rank1=np.mean([x == 1 for x in want.values()]), MRR=np.mean([1/x for x in want.values()])))
    guess = float(bench.notes[0].split()[-1])
    assert guess == pytest.approx(chance(bench)['rank1'], abs=1e-3)

# -- folders of people ----------------------------------------------------------------------------------------------

@pytest.fixture
def folders(tmp_path):
    "Three people with nested pictures of the same names, one with a single picture, and what is no picture"
    root = tmp_path/'people'
    names = ('ann/in/1.jpg ann/out/1.jpg bob/in/1.jpg bob/2.PNG cleo/in/1.jpg cleo/2.png dan/1.jpg '
             '.hidden/1.jpg x.jpg bob/a.txt')
    for name in names.split():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(b'x')
    (root/'bob/gone.jpg').symlink_to('nowhere.jpg')
    return root

def test_folders_of_people(folders):
    bench = read_benchmark('identity_folders', folders)
    everything = [*bench.query, *bench.gallery]
    assert [s.pid for s in bench.query] == [1, 2, 3] and sorted(s.pid for s in bench.gallery) == [0, 1, 2, 3]
    assert len({s.path for s in everything}) == len(everything) == 7
    assert {s.path.relative_to(folders).parts[0] for s in everything if s.pid == 2} == {'bob'}
    assert '1 people with one picture' in bench.notes[0] and '3 files left out' in bench.notes[1]
    assert not any(bench.protocol.rule(q, *labels(bench.gallery)).any() for q in bench.query)
    splits = {tuple(s.path for s in read_identities(folders, seed).query) for seed in range(20)}
    assert len(splits) > 2 and read_identities(folders, 7).query == read_identities(folders, 7).query
    (folders/'aaron').mkdir()      # another person changes nobody else's query
    (folders/'aaron/1.jpg').write_bytes(b'x')
    assert [s.path for s in read_identities(folders).query] == [s.path for s in bench.query]

def test_pictures_of_the_same_name_in_deep_folders(folders, tmp_path):
    bench = read_benchmark('identity_folders', folders)
    qf, gf = random_features(bench.query), random_features(bench.gallery)
    write_features(tmp_path/'f.npz', bench, qf, gf)
    back = read_features(tmp_path/'f.npz', bench)
    assert np.allclose(back[0], qf) and np.allclose(back[1], gf)
    assert len({*full_names([*bench.query, *bench.gallery])}) == 7
    np.savez(tmp_path/'bare.npz', **{s.path.name: x for s, x in zip([*bench.query, *bench.gallery], [*qf, *gf])})
    with pytest.raises(BadInput, match='1.jpg is in two folders'): read_features(tmp_path/'bare.npz', bench)

# -- MOTChallenge ---------------------------------------------------------------------------------------------------

def test_crops_of_mot_are_cut_once(mot):
    bench = read_benchmark('reassociation', mot, gap='1s')
    assert bench.protocol.settings == dict(gap='1s')
    assert [s[1:] for s in bench.query] == [s[1:] for s in read_benchmark('reassociation', mot, gap=20).query]
    where, track, frame = ours_as_theirs(bench.query[0].path)
    line = [x for x in (mot/where/'gt'/'gt.txt').read_text().split() if x.startswith(f'{frame},{track},')]
    x, y, w, h = (float(v) for v in line[0].split(',')[2:6])
    whole = cv2.imread(str(mot/where/'img1'/f'{frame:06d}.jpg'))
    want = whole[max(0, round(y)):round(y + h), max(0, round(x)):round(x + w)]
    got = cv2.imread(str(bench.query[0].path))
    assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 25
    times = {p: p.stat().st_mtime_ns for p in mot.rglob('crops/*/*.jpg')}
    assert {s.path for s in [*bench.query, *bench.gallery]} <= {*times}
    bench.query[0].path.write_bytes(b'cut')     # as a copy that was broken off leaves it
    assert read_benchmark('reassociation', mot, gap=20).digest == bench.digest
    new = {p for p in times if p.stat().st_mtime_ns != times[p]}
    assert new == {bench.query[0].path} and cv2.imread(str(bench.query[0].path)).shape == want.shape
    assert sum('2 boxes' not in n and 'boxes left out' in n for n in bench.notes) <= 2

def test_a_video_in_three_copies_counts_once(mot):
    bench = read_benchmark('reassociation', mot)
    for name in 'T-01', 'T-02':
        for detector in 'DPM', 'SDP': (mot/f'{name}-{detector}').symlink_to(mot/name)
        (mot/name).rename(mot/f'{name}-FRCNN')
        for detector in 'DPM', 'SDP':
            (mot/f'{name}-{detector}').unlink()
            (mot/f'{name}-{detector}').symlink_to(mot/f'{name}-FRCNN')
    again = read_benchmark('reassociation', mot)
    assert [s[1:] for s in again.query] == [s[1:] for s in bench.query] and len(find_sequences(mot)) == 2

def test_tracks_without_gt(mot, caplog):
    for name in 'T-01', 'T-02':
        (mot/name/'gt').rename(mot/name/'det')
        (mot/name/'det'/'gt.txt').rename(mot/name/'det'/'det.txt')
    more = read_benchmark('reassociation', mot)
    assert len(more.query) > 5
    for name in 'T-01', 'T-02':
        lines = [x.split(',') for x in (mot/name/'det'/'det.txt').read_text().split()]
        (mot/name/'det'/'det.txt').write_text('\n'.join(','.join([f, '-1', *box]) for f, _, *box in lines))
        if name == 'T-01': notes = read_benchmark('reassociation', mot).notes
    assert 'T-01: left out, no box with a track number' in notes
    with pytest.raises(BadInput, match='no box of a person with a track number'): read_benchmark('reassociation', mot)
    (mot/'T-02'/'det'/'det.txt').unlink()
    with pytest.raises(BadInput, match='in 1 sequences'): read_benchmark('reassociation', mot)
    assert 'T-02: left out, frames with neither' in caplog.text

def test_frames_are_read_once(mot, monkeypatch):
    "However many are in it."
    from reid_nb.parts import benchmarks
    read, before = [], benchmarks.read_rgb
    monkeypatch.setattr(benchmarks, 'read_rgb', lambda p: read.append(p) or before(p))
    cut_boxes({mot/f'{k}.jpg': (mot/'T-01'/'img1'/f'{1 + k%2:06d}.jpg', (0, 0, 9, 9)) for k in range(6)})
    assert len(read) == 2

# -- side by side ---------------------------------------------------------------------------------------------------

@pytest.fixture
def crops(tmp_path):
    "Crops of four people in one video, every third frame, and features: good ones, better ones, and noise"
    root = tmp_path/'crops'
    (root/'u/v/w').mkdir(parents=True)
    for t in range(1, 5):
        for f in range(0, 400, 3):
            if (f//90 + t)%5: (root/f'u/v/w/{t:06d}_{f:07d}_00.jpg').write_bytes(b'x')
    bench = read_benchmark('reassociation', root, gap=20)
    for name, part in dict(good=.5, better=.2, noise=99).items():
        def features(samples):
            who = np.eye(5)[[int(s.path.stem[:6]) for s in samples]]
            return who + part*np.array([rng_of(name, s.path).normal(size=5) for s in samples])
        write_features(tmp_path/f'{name}.npz', bench, features(bench.query), features(bench.gallery))
    return root

def test_side_by_side(run, crops, tmp_path):
    names = [tmp_path/f'{n}.npz' for n in ('good', 'better', 'noise')]
    there = '--data', crops, '--protocol', 'reassociation', '--gap', 20
    done = run('reid_evaluate', *names, *there, '--out', tmp_path/'r.json')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path/'r.json').read_text())
    assert result == compare_models([str(n) for n in names], crops, 'reassociation', gap='20')
    assert result['best'] == 1 and 'comparison' not in result['models'][1] and result['settings'] == dict(gap=20)
    bench = read_benchmark('reassociation', crops, gap=20)
    scores = [rank(bench, *read_features(n, bench)) for n in names]
    for k, model in enumerate(result['models']):
        alone = evaluate(data=crops, protocol='reassociation', features=names[k], gap=20)
        assert set(model['figures']) == {'rank1', 'MRR'} and model['figures'] == alone['figures']
        assert (model['pairs'], model['thresholds'], model['open_set'], model['roc']) == (None, {}, None, None)
        if k == 1: continue
        difference = compare_scores(scores[k], scores[1])
        assert model['comparison']['figures'] == dict(rank1=difference['rank1'], MRR=difference['mAP'])
        assert model['comparison']['source'] == 'better.npz'
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table[-4:]] == ['better.npz', 'good.npz', 'noise.npz', 'guessing']
    assert table[-4].endswith('the best') and result['chance']['rank1'] == pytest.approx(chance(bench)['rank1'])
    one = run('reid_evaluate', '--features', names[0], *there)
    assert 'reassociation, gap 20:' in one.stdout and 'MRR ' in one.stdout
    assert not any(w in one.stdout for w in ('mAP', 'mINP', 'rank5', 'AUC', 'FMR'))

def test_files_of_one_name_are_told_apart(crops, tmp_path):
    for d in 'a', 'b':
        (tmp_path/d).mkdir()
        (tmp_path/d/'f.npz').write_bytes((tmp_path/'good.npz').read_bytes())
    table = describe_models(compare_models([tmp_path/'a/f.npz', tmp_path/'b/f.npz'], crops, 'reassociation', gap=20))
    assert str(tmp_path/'a/f.npz') in table and str(tmp_path/'b/f.npz') in table
    assert '+0.000 [+0.000, +0.000] *' in table and table.endswith('cannot tell it from the best')

def test_no_thresholds_from_moments(crops):
    with pytest.raises(BadInput, match='tracks of one moment are not people'): calibrate(None, crops, 'reassociation')

# -- what is wrong is said ------------------------------------------------------------------------------------------

def refused(words, folder):
    "The one line of a refused command"
    (folder/'here').mkdir(exist_ok=True)
    code, err = call('reid_evaluate', [str(w) for w in words], folder/'here')
    lines = [x for x in err.splitlines() if x.startswith('reid_evaluate: ')]
    assert code == 2 and len(lines) == 1 and 'a fault of' not in err, err
    return lines[0]

@pytest.mark.parametrize('gap, words', [
    ('2000', 'over 399 frames: try another --gap'), ('2s', 'give the gap in frames'), ('soon', 'a number of frames'),
    ('0', 'at least one frame'), ('-3', 'a number of frames'), ('nan', 'a number of frames'),
    ('1', 'try another --gap'), ('9'*30, 'a number of frames')])
def test_a_gap_that_makes_no_sense(crops, tmp_path, gap, words):
    assert words in refused(['--data', crops, '--protocol', 'reassociation', f'--gap={gap}'], tmp_path)

def test_crops_that_are_none(market, crops, tmp_path):
    def said(*words): return refused(['--protocol', 'reassociation', '--data', *words], tmp_path)
    assert 'no crops named TRACK_FRAME_BOX.jpg' in said(market)
    assert 'has no gap' in refused(['--data', market, '--gap', '30'], tmp_path)
    assert 'no such folder' in said(tmp_path/'none')
    assert 'go with one checkpoint' in said(crops, tmp_path/'good.npz', tmp_path/'better.npz', '--features', 'x')
    for name, words in ('none.npz', 'none.npz: no such file'), ('none.safetensors', 'no checkpoint at'):
        assert words in said(crops, tmp_path/'good.npz', tmp_path/name, '--gap', '20')
    assert 'no features for' in said(crops, tmp_path/'good.npz', tmp_path/'better.npz', '--gap', '33')
    for p in [*crops.rglob('*.jpg')]:
        if int(p.stem[:6]) > 1: p.unlink()
    assert 'one person alone' in said(crops)
    for p in [*crops.rglob('*.jpg')]: p.rename(p.with_name('000000' + p.name[6:]))
    assert 'made without a tracker' in said(crops)
    assert 'at least two folders' in refused(['--protocol', 'identity_folders', '--data', crops], tmp_path)

@pytest.mark.parametrize('text', ['', 'a,b,c,d,e,f\n', '1,1,0,0,9\n', '1,1,0,0,9,nan,1,1,1\n', '1.5,1,0,0,9,9,1,1,1\n',
                                  '1,1,0,0,9,9,1,1,1\n2,1,0\n', '1,1,0,0,1e300,9,1,1,1\n', '\0\0\0'])
def test_a_broken_gt(mot, tmp_path, text):
    (mot/'T-02'/'gt'/'gt.txt').write_text(text)
    line = refused(['--data', mot, '--protocol', 'reassociation'], tmp_path)
    assert 'T-02/gt/gt.txt: not boxes of MOTChallenge' in line and not [*mot.rglob('crops')]

WORDS = st.text('0123456789,.-+_einfas \n\0é²١', max_size=40)   # with digits that are none to us

@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(WORDS, WORDS, WORDS)
def test_whatever_stands_there(tmp_path_factory, text, gap, name):
    "Boxes, gaps, names of crops, frame rates: a result that is sound, or `BadInput`."
    root = tmp_path_factory.mktemp('any')
    (root/'x').write_text(text, encoding='utf-8')
    try: rows = read_lines(root/'x', True)
    except BadInput: rows = np.zeros((0, 6), int)
    assert rows.dtype.kind == 'i' and rows.shape[1:] == (6,) and (rows[:, 1] >= 0).all()
    try: assert gap_frames(gap, 25) >= 1
    except BadInput: pass
    (root/'ini').write_text(f'[Sequence]\nframeRate={text}\n', encoding='utf-8')
    assert not read_rate(root/'ini') or 0 < read_rate(root/'ini') < 10_000
    for k in 1, 2: (root/f"{k}_1{name.translate({0: 'x', 10: 'y', 47: 'z'})}.jpg").write_bytes(b'x')
    with pytest.raises(BadInput): read_tracks(root)   # two crops of one moment are never enough

def test_mot_without_frames_or_rate(mot, tmp_path):
    (mot/'T-01'/'seqinfo.ini').write_text('[Sequence]\nframeRate=fast\n')
    assert 'give the gap in frames' in refused(['--data', mot, '--protocol', 'reassociation', '--gap', '2s'], tmp_path)
    for p in (mot/'T-02'/'img1').iterdir(): p.unlink()
    assert 'img1: no frames in it' in refused(['--data', mot, '--protocol', 'reassociation'], tmp_path)
