"Thresholds that say on whom they were measured, and those that come with the package for published files."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, HealthCheck, settings, strategies as st
from reid_nb.evaluate import calibrate
from reid_nb.parts import published
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.core import BadInput, sha256
from reid_nb.parts.drift import check_drift
from reid_nb.parts.models import torchreid_model
from reid_nb.parts.published import CALIBRATIONS, describe_import, import_weights, keep_calibration
from reid_nb.parts.tracks import load_matcher
from reid_nb.parts.weights import calibration_words, read_thresholds, SMALL, thresholds_path

POINTS = {'0.01': dict(threshold=.6, low=.5, high=.7), '0.001': dict(threshold=.8, low=.7, high=.9)}
ABOUT = dict(protocol='market_folder', data='shop', identities=1040, measured='2026-11-29', thresholds=POINTS)
WORDS = 'calibrated on shop (market_folder), 1,040 people'

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Two published files."
    folder = tmp_path_factory.mktemp('published')
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        torch.save(torchreid_model('osnet_x0_25').state_dict(), folder/f'{name}.pth')
    return folder

@pytest.fixture
def known(files, tmp_path, monkeypatch):
    "Thresholds of the first file, measured once and kept; the folder that an installation has them in"
    monkeypatch.setattr(published, 'CALIBRATIONS', tmp_path/'calibrations')
    (tmp_path/'calibrations').mkdir()
    ckpt, _ = import_weights(files/'a.pth', out=tmp_path/'measured')
    scores = dict(edges=[-1, 0, .3, 1], impostor=[50, 40, 10])
    told = ABOUT | dict(checkpoint_digest=sha256(ckpt), scores=scores, data_digest='0'*64)
    thresholds_path(ckpt).write_text(json.dumps(told))
    path = keep_calibration(ckpt, tmp_path/'calibrations')
    path.write_text(path.read_text().replace(sha256(ckpt), '0'*64))    # of a checkpoint that somebody else has made
    return path

def said(*args, **how):
    out, found = import_weights(*args, **how)
    return out, describe_import(out, found).splitlines()[-2]

def test_a_known_file_brings_its_thresholds(files, known, tmp_path, monkeypatch):
    "From any folder and by any name of the checkpoint; another file, or other pictures, bring none."
    out, line = said(files/'a.pth', out=tmp_path/'ours')
    assert line.startswith(f'{WORDS}: match from 0.700 at FMR 1 %; measure on your own: reid_calibrate {out} --data')
    assert load_matcher(out).thresholds == POINTS and load_matcher(out).calibration == WORDS
    for name, how in ('b.pth', {}), ('a.pth', dict(size='128x64')), ('a.pth', dict(stats='luperson')):
        other, line = said(files/name, out=tmp_path/f'{name}{len(how)}{how}', **how)
        assert line == f'not calibrated: reid_calibrate {other} --data ROOT measures its thresholds'
        with pytest.raises(BadInput, match='no thresholds.*reid_calibrate'): load_matcher(other)

def test_the_same_file_makes_the_same_checkpoint(files, known, tmp_path, monkeypatch):
    "Named from here or from there: a gallery goes on, and so do its thresholds."
    out, _ = import_weights(files/'a.pth', out=tmp_path/'one')
    monkeypatch.chdir(files)
    again, _ = import_weights('a.pth', out=tmp_path/'two')
    assert sha256(out) == sha256(again)
    assert thresholds_path(out).read_bytes() == thresholds_path(again).read_bytes()

def test_thresholds_of_ones_own_stay(files, known, tmp_path):
    out, _ = import_weights(files/'a.pth', out=tmp_path/'ours')
    own = dict(ABOUT, checkpoint_digest=sha256(out), protocol='my_shop', data='my_shop', identities=30)
    thresholds_path(out).write_text(json.dumps(own))
    _, line = said(files/'a.pth', out=tmp_path/'ours')
    assert line.startswith('calibrated on my_shop, 30 people: ') and read_thresholds(out) == own
    thresholds_path(out).write_text('{"of": "nothing"}')
    _, line = said(files/'a.pth', out=tmp_path/'ours')    # it is not mended, and not hidden
    assert 'damaged' in line and 'reid_calibrate' in line and thresholds_path(out).read_text() == '{"of": "nothing"}'

@pytest.fixture(scope='module')
def kept(files, tmp_path_factory):
    "Thresholds of the first file as they are kept, and the settings of its import"
    folder = tmp_path_factory.mktemp('kept')
    ckpt, found = import_weights(files/'a.pth', out=folder/'measured')
    thresholds_path(ckpt).write_text(json.dumps(ABOUT | dict(checkpoint_digest=sha256(ckpt))))
    return keep_calibration(ckpt, folder), found.meta

@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_damage_of_what_comes_along(kept, data):
    "One line, or thresholds that can be read."
    path, meta = kept
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = whole[place + data.draw(st.integers(0, 5)):]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, 'CALIBRATIONS', path.parent)
        path.write_bytes(whole[:place] + data.draw(st.binary(max_size=3)) + cut)
        try: got = published.known_calibration(path.stem, meta)
        except BadInput as e: assert '\n' not in str(e) and 'damaged' in str(e) and 'install reid_nb again' in str(e)
        else: assert all(t['low'] <= t['high'] for t in got.get('thresholds', {}).values()) and calibration_words(got)
        finally: path.write_bytes(whole)

def test_damage_is_one_line_of_the_command(files, known, tmp_path):
    whole = known.read_text()
    for text in whole[:-9], json.dumps(json.loads(whole) | dict(identities='many')), whole.replace('0.7', '"a"'):
        known.write_text(text)
        with pytest.raises(BadInput, match=f'{known}: damaged.*install reid_nb again') as e:
            import_weights(files/'a.pth', out=tmp_path/'ours')
        assert '\n' not in str(e.value) and not [*tmp_path.glob('ours*')]
    assert import_weights(files/'b.pth', out=tmp_path/'ours')[0].exists()    # what is not asked for does no harm

def test_what_can_be_kept(files, known, tmp_path):
    out, _ = import_weights(files/'b.pth', out=tmp_path/'ours')
    with pytest.raises(BadInput, match='not calibrated'): keep_calibration(out, tmp_path)
    ours = tmp_path/'small.safetensors'
    for p in SMALL.parent.glob('mobilenet_v2.[jst]*'): shutil.copy(p, tmp_path/p.name.replace('mobilenet_v2', 'small'))
    with pytest.raises(BadInput, match='not imported'): keep_calibration(ours, tmp_path)

def test_what_comes_with_the_package():
    "Each file is whole, of the file that its name tells, and says where and when."
    shipped = sorted(CALIBRATIONS.glob('*'))
    assert shipped and 'calibrations/*' in (Path(__file__).parent.parent/'setup.py').read_text()
    for path in shipped:
        t = json.loads(path.read_text())
        assert path.suffix == '.json' and len(path.stem) == 64 and published.load_thresholds(path, '') == t
        assert {'0.01', '0.001'} == {*t['thresholds']} and t['inputs'] and t['source'] and t['measured']
        assert t['identities'] >= 100 and sum(t['scores']['impostor']) > 10_000

# ---- who says so

def test_drift_tells_whose_they_are(toy, known, files, tmp_path):
    out, _ = import_weights(files/'a.pth', out=tmp_path/'ours')
    market = read_benchmark('market_folder', toy/'market')
    rng = np.random.default_rng(0)
    qf, gf = (abs(rng.normal(size=(len(x), 8))) for x in (market.query, market.gallery))
    there = read_thresholds(out)
    assert check_drift(there, market, qf, gf).endswith(f'data like this (now they are {WORDS})')
    assert check_drift(there | dict(scores={}), market, qf, gf) == ''

def test_an_answer_tells_whose_they_are(tmp_path):
    "In its text and in its JSON, the commands' as well."
    from test_biometrics import colours, film, RED
    from reid_nb import biometrics as bio
    from reid_nb.parts.tracks import Matcher
    clip = film(tmp_path/'red.mp4', (RED, 3, 6, 60))
    matcher = Matcher(colours, 'a'*64, POINTS, WORDS)
    bio.enroll('Ada', clip, tmp_path/'g', matcher)
    for outcome in bio.identify(clip, tmp_path/'g', matcher), bio.verify('Ada', clip, tmp_path/'g', matcher):
        assert str(outcome).splitlines()[-1] == f'thresholds: {WORDS}' and outcome.answer == 'match'
        assert json.loads(json.dumps(outcome.to_dict()))['calibration'] == WORDS
    outcome = bio.identify(clip, tmp_path/'g', Matcher(colours, 'a'*64, POINTS))
    assert 'thresholds:' not in str(outcome) and outcome.to_dict()['calibration'] == ''

def test_a_calibration_says_where_and_when(toy, tmp_path, monkeypatch):
    "Whatever its folder is called, and from wherever it was named."
    import reid_nb.evaluate as e
    from reid_nb.parts.metrics import color_histogram
    def features(bench, ckpt): return color_histogram(bench.query), color_histogram(bench.gallery)
    monkeypatch.setattr(e, 'features_of', features)
    odd = tmp_path/'my <b>shop\nI'
    odd.mkdir()
    for part in (toy/'market').iterdir(): (odd/part.name).symlink_to(part)
    ckpt = tmp_path/'a.safetensors'
    ckpt.write_bytes(b'weights')
    calibrate(ckpt, odd)
    got = read_thresholds(ckpt)
    assert calibration_words(got) == 'calibrated on my <b>shop I (market_folder), 48 people'
    assert len(got['measured']) == 10 and got['identities'] == 48

@given(st.dictionaries(st.sampled_from(['protocol', 'data', 'identities']),
                       st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_words_are_one_line(about):
    "Whatever a file says: one line that any page can show, or the file is called damaged."
    assert calibration_words(dict(thresholds=POINTS, data='a\udcff')).encode() == b'calibrated on a?'
    try: words = calibration_words(about | dict(thresholds=POINTS))
    except (TypeError, ValueError): return
    assert words.startswith('calibrated on ') and len(words.splitlines()) == 1 and words.encode()

# ---- the published network that is at hand

@pytest.fixture(scope='module')
def peer(data, tmp_path_factory):
    "The published OSNet x0.25 as ONNX, imported"
    path = data/'peers'/'osnet_x0_25_msmt17.onnx'
    if not path.is_file(): pytest.skip(f'no {path} here')
    return import_weights(path, out=tmp_path_factory.mktemp('peer')/'peer')

def test_the_peer_is_ready_at_once(peer):
    assert describe_import(*peer).splitlines()[-2].startswith('calibrated on cuhk03_p1, 100 people: match from 0.7')
    assert load_matcher(peer[0]).calibration == 'calibrated on cuhk03_p1, 100 people'

def test_what_is_shipped_is_what_is_measured(peer, data, tmp_path):
    shipped, ckpt = read_thresholds(peer[0]), shutil.copy(peer[0], tmp_path/'again.safetensors')
    calibrate(ckpt, data/'cuhk03_p1', 'cuhk03_p1')
    again = read_thresholds(ckpt)
    for key in 'protocol', 'data', 'data_digest', 'checkpoint_digest', 'identities': assert again[key] == shipped[key]
    for rate, t in shipped['thresholds'].items():
        for key in 'threshold', 'low', 'high': assert again['thresholds'][rate][key] == pytest.approx(t[key], abs=2e-3)
        assert again['thresholds'][rate]['tmr'] == pytest.approx(t['tmr'], abs=5e-3)
