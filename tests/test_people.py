"Who is found in a clip, by what, and under which number: by a network where it can be had, else by motion."
import json
import os
import shutil
import socket
import time
import warnings
from collections import Counter
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_nb.biometrics import enroll, identify
from reid_nb.parts import decisions as dec
from reid_nb.parts import detect
from reid_nb.parts import tracks as tracks_
from reid_nb.parts.core import BadInput

GROUND = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (200, 600, 3), np.uint8), (0, 0), 2)
WEARS = np.kron(np.random.default_rng(1).integers(0, 256, (10, 3, 3), np.uint8), np.ones((8, 8, 1), np.uint8))

def film(path, frames):
    with av.open(str(path), 'w') as f:
        s = f.add_stream('libx264', rate=10, options=dict(crf='18', preset='ultrafast'))
        for k, rgb in enumerate(frames):
            if k == 0: s.height, s.width, s.pix_fmt = *rgb.shape[:2], 'yuv420p'
            f.mux(s.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb))))
        f.mux(s.encode())
    return path

def scene(x):
    "The street with somebody whose left side is at x; nobody where it is None."
    rgb = GROUND[:, :320].copy()
    if x is not None: rgb[60:140, x:x + 24] = WEARS
    return rgb

NOBODY = np.zeros((0, 6), np.float32)

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    "As on a fresh machine: no choice, no weights, no network; the current folder is empty."
    from ultralytics import utils
    monkeypatch.delenv('REID_DETECTOR')
    monkeypatch.setenv('REID_HOME', str(tmp_path/'home'))
    monkeypatch.setitem(utils.SETTINGS, 'weights_dir', str(tmp_path/'ultralytics'))
    monkeypatch.setattr(utils, 'is_online', lambda: False)
    monkeypatch.setattr(detect, 'getproxies', dict)
    (tmp_path/'cwd').mkdir()
    monkeypatch.chdir(tmp_path/'cwd')
    detect.auto_weights.cache_clear()
    yield tmp_path
    detect.auto_weights.cache_clear()
    detect.yolo_boxes.cache_clear()
    assert not list((tmp_path/'cwd').iterdir())

@pytest.fixture
def network(fresh, monkeypatch):
    "A network finds what is set as `found`: a function from a frame to boxes."
    def use(found):
        (fresh/'ultralytics').mkdir(exist_ok=True)
        (fresh/'ultralytics'/detect.AUTO).touch()
        real = detect.yolo_boxes
        monkeypatch.setattr(detect, 'yolo_boxes', lambda weights: found)
        monkeypatch.setattr(detect.yolo_boxes, 'cache_clear', real.cache_clear, raising=False)
    return use

@pytest.fixture(scope='module')
def passer(tmp_path_factory):
    "Somebody walks by."
    return film(tmp_path_factory.mktemp('people')/'passer.mp4', map(scene, range(10, 250, 6)))

# Which detector

def test_without_a_network_it_is_motion(fresh, passer, monkeypatch, caplog):
    tried = []
    real = detect.fetch_auto
    monkeypatch.setattr(detect, 'fetch_auto', lambda folder: tried.append(1) or real(folder))
    begin = time.time()
    for _ in range(3): found = tracks_.find_tracks(passer)
    assert len(tried) == 1 and time.time() - begin < 15
    assert (found.detector, len(found)) == ('motion', 1)
    assert found.found_by == 'found by motion: yolo26n cannot be had here (no network)'
    assert [r.getMessage().partition(';')[0] for r in caplog.records] == ['yolo26n cannot be had here (no network)']
    assert not (fresh/'home').exists()

def test_nothing_answers(fresh, monkeypatch):
    "A proxy that is gone, and one that says nothing: a few seconds, once."
    with socket.create_server(('127.0.0.1', 0)) as silent:
        for port, limit in ((1, 2), (silent.getsockname()[1], 6)):
            for name in ('HTTPS_PROXY', 'https_proxy'): monkeypatch.setenv(name, f'http://127.0.0.1:{port}')
            for name in ('NO_PROXY', 'no_proxy'): monkeypatch.delenv(name, raising=False)
            monkeypatch.setattr(detect, 'getproxies', lambda: dict(https='yes'))
            detect.auto_weights.cache_clear()
            begin = time.time()
            weights, why = detect.auto_weights()
            assert weights == 'motion' and why.startswith('yolo26n cannot be had here (') and '\n' not in why
            assert time.time() - begin < limit
    assert not (fresh/'home').exists()

@pytest.mark.parametrize('whole', [False, True])
def test_a_download_is_whole_or_absent(fresh, monkeypatch, whole):
    from ultralytics.utils import downloads
    def download(file, **kw):
        Path(file).write_bytes(b'half')
        if not whole: raise ConnectionError('the line broke')
        return file
    monkeypatch.setattr(downloads, 'attempt_download_asset', download)
    monkeypatch.setattr(detect, 'urlopen', lambda *a, **kw: open(os.devnull))
    monkeypatch.setattr(detect, 'getproxies', lambda: dict(https='yes'))
    monkeypatch.setattr(detect, 'yolo_boxes', lambda weights: None)
    monkeypatch.setattr(detect.yolo_boxes, 'cache_clear', lambda: None, raising=False)
    weights, why = detect.auto_weights()
    left = [p.name for p in fresh.rglob('*') if p.is_file()]
    if whole: assert (Path(weights).read_bytes(), why, left) == (b'half', '', [detect.AUTO])
    else: assert (weights, why, left) == ('motion', 'yolo26n cannot be had here (the line broke)', [])

@pytest.mark.parametrize('folder', ['ultralytics', 'home/detectors'])
def test_weights_that_are_here_need_no_network(fresh, passer, monkeypatch, folder):
    (fresh/folder).mkdir(parents=True)
    (fresh/folder/detect.AUTO).touch()
    asked = []
    monkeypatch.setattr(detect, 'yolo_boxes', lambda weights: asked.append(weights) or (lambda rgb: NOBODY))
    monkeypatch.setattr(detect.yolo_boxes, 'cache_clear', lambda: None, raising=False)
    tracks_.find_tracks(passer)
    assert set(asked) == {str(fresh/folder/detect.AUTO)}

def test_weights_that_are_broken(fresh, passer):
    (fresh/'ultralytics').mkdir()
    (fresh/'ultralytics'/detect.AUTO).write_bytes(b'no weights')
    found = tracks_.find_tracks(passer)
    assert found.detector == 'motion' and 'yolo26n cannot be had here (' in found.found_by and len(found) == 1

def test_the_environment_decides(fresh, passer, monkeypatch):
    monkeypatch.setenv('REID_DETECTOR', 'motion')
    found = tracks_.find_tracks(passer)
    assert (found.detector, found.found_by) == ('motion', '')
    detect.auto_weights.cache_clear()
    monkeypatch.setenv('REID_DETECTOR', str(fresh/'none.onnx'))
    with pytest.raises(BadInput, match='none.onnx: no such file'): tracks_.find_tracks(passer)

def test_a_network_that_finds_nobody(network, passer):
    network(lambda rgb: NOBODY)
    found = tracks_.find_tracks(passer)
    assert (found.detector, found.found_by, len(found)) == ('motion', 'found by motion: yolo26n found nobody', 1)

def test_a_network_that_finds_nobody_well_enough(network, passer):
    network(lambda rgb: np.array([[10, 10, 30, 40, .9, 0]], np.float32))
    found = tracks_.find_tracks(passer)
    assert found.found_by == 'found by motion: yolo26n found nobody well enough'

def test_a_network_that_finds_somebody(network, passer):
    network(lambda rgb: np.array([[100, 60, 124, 140, .9, 0]], np.float32))
    found = tracks_.find_tracks(passer)
    assert (found.detector, found.found_by) == (detect.AUTO, 'found by yolo26n')
    assert {box for _, box in found[0].seen} == {(100, 60, 124, 140)}

def test_a_drawn_clip_that_a_network_does_not_understand(network, toy):
    network(lambda rgb: NOBODY)
    found = tracks_.find_tracks(toy/'clips'/'ada_bruno_c2.mp4', start=40, stop=70)
    assert found.detector == 'motion' and [t.number for t in found] == [1, 2]

def test_the_answer_says_what_has_found_the_people(network, passer, fresh):
    network(lambda rgb: NOBODY)
    words = 'found by motion: yolo26n found nobody'
    done = enroll('Ada', passer, fresh/'gallery')
    assert (done['detector'], done['found_by']) == ('motion', words)
    outcome = identify(passer, fresh/'gallery')
    assert outcome.to_dict()['found_by'] == words and outcome.detector == 'motion'
    assert dec.explain(outcome)[-1] == str(outcome).splitlines()[-1] == words
    assert words not in str(identify(passer, fresh/'gallery', weights='motion'))

def test_detect_wants_a_name(run, passer, tmp_path):
    shutil.copy(passer, tmp_path/'it+rome+vid00000001.mp4')
    done = run('reid_detect', tmp_path, '--dest', tmp_path/'dets', '--weights', 'auto')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'name a detector' in done.stderr

# Motion is honest

def test_what_is_left_of_the_background_is_nobody(tmp_path):
    "Somebody stands for two thirds of the clip, and leaves: his place is empty, and is no person."
    where = [100]*40 + list(range(100, 300, 10))
    clip = film(tmp_path/'a.mp4', map(scene, where))
    seen = Counter()
    for i, _, people in detect.detect_people(clip):
        for p in people: seen['ghost' if i > 46 and abs(p.box[0] - 100) < 15 else 'person' if i > 40 else 'early'] += 1
    assert seen['ghost'] == 0 and seen['person'] > 10, seen

def test_somebody_who_stands_for_a_while_stays(tmp_path):
    where = list(range(10, 100, 6)) + [100]*15 + list(range(100, 200, 6)) + [None]*10
    found = tracks_.find_tracks(film(tmp_path/'a.mp4', map(scene, where)), 'motion')
    assert len(found) == 1 and found[0].good >= 40

@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(['plain', 'noise', 'half', 'scene'])), min_size=1,
                max_size=40), st.integers(2, 400), st.integers(2, 160))
def test_any_frames_have_boxes_inside_or_a_camera_that_moves(made, height, width):
    def frame(seed, kind):
        random = np.random.default_rng(seed)
        if kind == 'scene': return cv2.resize(scene(seed % 296 if seed % 2 else None), (width, height))
        rgb = np.full((height, width, 3), random.integers(0, 256, 3), np.uint8)
        if kind == 'noise': rgb = random.integers(0, 256, (height, width, 3), np.uint8)
        if kind == 'half': rgb[:, random.integers(width):] = 255 - rgb[0, 0]
        return rgb
    frames = [frame(*m) for m in made]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try: find = detect.motion_boxes(detect.median_frame(frames))
        except BadInput as e: return None if str(e) == detect.CAMERA_MOVES else pytest.fail(str(e))
        found = np.concatenate([find(rgb) for rgb in frames])
    assert found.dtype == np.float32 and found.shape[1] == 6 and np.isfinite(found).all()
    assert (found[:, :2] >= 0).all() and (found[:, 2:4] <= [width + 1, height + 1]).all()

def pan(path, step): return film(path, [GROUND[:, step*i:step*i + 320] for i in range(40)])

@pytest.mark.parametrize('step', [2, 7])
def test_a_camera_that_moves(tmp_path, step):
    clip = pan(tmp_path/'a.mp4', step)
    with pytest.raises(BadInput, match='the camera moves.*--weights'): enroll('Ada', clip, tmp_path/'g')
    assert not (tmp_path/'g').exists()

def test_a_network_sees_while_the_camera_moves(network, tmp_path):
    clip = pan(tmp_path/'a.mp4', 7)
    network(lambda rgb: np.array([[100, 60, 124, 140, .9, 0]], np.float32))
    assert tracks_.find_tracks(clip).found_by == 'found by yolo26n'
    detect.auto_weights.cache_clear()
    network(lambda rgb: NOBODY)
    with pytest.raises(BadInput, match='nobody found.*looked for by yolo26n'): dec.find_usable_tracks(clip)

@pytest.mark.parametrize('where', [[100]*20, [100]], ids=['still', 'photo'])
def test_somebody_who_does_not_move_gets_the_hint(fresh, tmp_path, where):
    clip = film(tmp_path/'a.mp4', map(scene, where))
    with pytest.raises(BadInput, match='motion finds only what moves.*--weights.*yolo26n cannot be had here'):
        dec.find_usable_tracks(clip)

@pytest.mark.long
def test_a_table_is_nobody(data):
    "The first second of the film shows a table, at which people stand for most of the time that follows."
    clip = data/'real_city'/'videos'/'us'/'oregon'/'us+oregon+IntelOneBy1.mp4'
    assert not [p for _, _, people in detect.detect_people(clip, stop=10) for p in people if p.box[3] - p.box[1] > 200]

# Numbers

def some_tracks(good):
    "A stand-in for `detect_people`: track k has `good[k]` pictures that pass the gate, and two that are cut off."
    rgb = np.random.default_rng(2).integers(0, 256, (120, 60*len(good) + 60, 3), np.uint8)
    def people(video, weights, start, stop):
        for i in range(max(good, default=0) + 2):
            boxes = [np.float32([60*k + 10, 10 if i < n else 0, 60*k + 45, 110]) for k, n in enumerate(good)]
            yield i, rgb, [detect.Person(100 + k, b, .9) for k, b in enumerate(boxes) if i < good[k] + 2]
    return people

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=7))
def test_people_are_numbered_from_one(good):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tracks_, 'detect_people', some_tracks(good))
        m.setattr(tracks_, 'frame_times', lambda *a: np.arange(20.))
        found = tracks_.find_tracks('a.mp4', 'motion')
    usable, why = tracks_.select_usable(found)
    assert [t.number for t in found] == list(range(1, len(good) + 1))
    assert [t.number for t in usable] == list(range(1, len(usable) + 1))
    assert [t.good for t in usable] == [n for n in good if n >= 5]
    assert list(why) == list(range(len(usable) + 1, len(good) + 1))
    assert all(f'{t.good} good pictures of {t.good + 2}' in why[t.number] for t in found[len(usable):])

def test_a_number_means_the_same_everywhere(monkeypatch, tmp_path):
    "In the list to choose from, with --track, in the answer, in JSON and in the film."
    from reid_nb import biometrics
    good, clip = [2, 6, 0, 7], tmp_path/'a.mp4'
    for where in (tracks_, dec, biometrics): monkeypatch.setattr(where, 'frame_times', lambda *a: np.arange(20.))
    monkeypatch.setattr(tracks_, 'detect_people', some_tracks(good))
    several = pytest.raises(dec.SeveralPeople, match='person 1 .*person 2 .*--track N')
    with several as e: enroll('Ada', clip, tmp_path/'g')
    assert [(t.number, t.good) for t in e.value.tracks] == [(1, 6), (2, 7)]
    with pytest.raises(BadInput, match='person 3: 2 good pictures of 4'): enroll('Ada', clip, tmp_path/'g', track=3)
    assert len(enroll('Ada', clip, tmp_path/'g', track=2)['crops']) == 7
    outcome = identify(clip, tmp_path/'g')
    told = json.loads(biometrics.as_json(outcome.to_dict()))
    assert [d['track'] for d in told['decisions']] == [1, 2] and list(told['skipped']) == ['3', '4']
    assert [line[:9] for line in dec.explain(outcome)[1:5]] == ['person 1 ', 'person 2 ', 'person 3:', 'person 4:']
    labels = dec.film_labels(outcome)
    assert labels[3][0] == labels[4][0] == 'not decided' and sorted(labels) == [t.number for t in outcome.tracks]
    assert {t.number: t.good for t in outcome.tracks} == {1: 6, 2: 7, 3: 2, 4: 0}
    assert 'Ada' in labels[2][0]

def test_many_who_are_not_decided_take_one_line(monkeypatch, tmp_path):
    good, clip = [6] + [2]*7, tmp_path/'a.mp4'
    from reid_nb import biometrics
    for where in (tracks_, dec, biometrics): monkeypatch.setattr(where, 'frame_times', lambda *a: np.arange(20.))
    monkeypatch.setattr(tracks_, 'detect_people', some_tracks(good))
    enroll('Ada', clip, tmp_path/'g')
    _, _, line, thresholds = dec.explain(identify(clip, tmp_path/'g'))
    assert line == '7 more (person 2 to 8): not decided: too few good pictures each (14 cut by the edge)'
    assert thresholds.startswith('thresholds: ')
