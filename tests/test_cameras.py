"Each camera by its own statistics: in training, in an evaluation, and never by accident."
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from reid_nb.demo import DemoBackend
from reid_nb.evaluate import evaluate
from reid_nb.finetune import finetune
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.cameras import Profile, read_profile, see_camera, with_cameras, write_profile
from reid_nb.parts.core import BadInput, read_rgb
from reid_nb.parts.models import ReidModel
from reid_nb.parts.scoring import shipped_model
from reid_nb.parts.supervised import camera_groups
from reid_nb.parts.tracks import load_matcher
from reid_nb.parts.training import Run
from reid_nb.parts.weights import (
    camera_statistics, embed, embed_by_camera, export_onnx, load_checkpoint, load_model, read_statistics,
    read_thresholds, set_statistics)

@given(st.lists(st.integers(0, 6), min_size=1, max_size=80))
@settings(deadline=None)
def test_each_picture_is_in_one_group(cameras):
    groups = camera_groups(torch.tensor(cameras))
    assert sorted(i for g in groups for i in g.tolist()) == [*range(len(cameras))]
    assert all(len(g) >= 8 for g in groups) or len(groups) == 1
    for c in {*cameras}:    # a camera with enough pictures is not divided
        if cameras.count(c) >= 8: assert sum(c in {cameras[i] for i in g.tolist()} for g in groups) == 1

def test_which_steps_go_by_camera(market, tmp_path, monkeypatch):
    sizes, forward = [], ReidModel.forward
    monkeypatch.setattr(ReidModel, 'forward', lambda s, x, y=None: sizes.append(len(x)) or forward(s, x, y))
    def train(out, steps=None, **how):
        sizes.clear()
        recipe = dict(arch='resnet10_x0_5', size=(64, 32), epochs=8, batch=32) | how
        ckpt = finetune(market, out=tmp_path/out, run=Run(steps=steps, device='cpu'), **recipe)
        return load_checkpoint(ckpt), sizes[:]
    whole, plain = train('plain', 4)
    assert plain == [32]*4
    (_, meta), every = train('every', 4, by_camera=1.)
    assert len(every) > 4 and sum(every) == 4*32 and max(every) < 32
    (half, _), mixed = train('half', 4, by_camera=.5)
    assert mixed.count(32) == 2 and sum(mixed) == 4*32
    train('stopped', 1, by_camera=.5); train('stopped', 2, by_camera=.5)
    (again, _), _ = train('stopped', 1, by_camera=.5)
    assert all(torch.equal(half[k], again[k]) for k in half)    # the steps alternate as they would have

@pytest.fixture(scope='module')
def small(toy):
    bench = read_benchmark('market_folder', toy/'market')
    return *load_model(shipped_model()), [s.path for s in bench.query], [s.camid for s in bench.query]

def test_statistics_are_those_of_the_pictures(small):
    model, meta, paths, _ = small
    own, new = read_statistics(model), camera_statistics(model, meta, paths[:40])
    first = next(iter(new))     # the first layer sees the pictures through one convolution
    seen = []
    layer = dict(model.named_modules())[first]
    hook = layer.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    embed(model, meta, paths[:40])
    hook.remove()
    x = torch.cat(seen).transpose(0, 1).flatten(1)
    assert torch.allclose(new[first][0], x.mean(1), atol=1e-4) and torch.allclose(new[first][1], x.var(1), rtol=1e-3)
    assert all(torch.equal(a, b) for k in own for a, b in zip(own[k], read_statistics(model)[k]))
    set_statistics(model, new)
    assert not torch.equal(read_statistics(model)[first][0], own[first][0])
    set_statistics(model, own)

def test_the_network_is_put_back_after_a_broken_picture(small, tmp_path):
    model, meta, paths, _ = small
    (tmp_path/'broken.jpg').write_bytes(b'no picture')
    before = embed(model, meta, paths[:8])
    with pytest.raises(BadInput):      # when the first camera's statistics are in
        embed_by_camera(model, meta, [*paths[:40], tmp_path/'broken.jpg'], [0]*20 + [1]*21)
    assert (embed(model, meta, paths[:8]) == before).all() and not model.training
    assert not any(m.training for m in model.modules())

def test_a_camera_with_few_pictures_keeps_the_network(small):
    model, meta, paths, _ = small
    f = embed_by_camera(model, meta, paths[:40], [0]*30 + [1]*10)
    assert np.allclose(f[30:], embed(model, meta, paths[30:40]), atol=1e-6)
    assert np.abs(f[:30] - embed(model, meta, paths[:30])).max() > .01
    order = np.random.default_rng(0).permutation(40)    # cameras may come in any order
    g = embed_by_camera(model, meta, [paths[i] for i in order], np.r_[[0]*30, [1]*10][order])
    assert np.allclose(g[order.argsort()], f, atol=.02)

def test_a_result_says_that_it_adapted(toy, run, tmp_path):
    how = 'reid_evaluate', '--data', toy/'market', '--out', tmp_path/'a.json'
    done = run(*how, '--by_camera')
    assert done.returncode == 0, done.stderr
    assert 'options: by_camera' in done.stdout and 'without their labels, in 3 of 3 cameras' in done.stdout
    adapted, plain = json.loads((tmp_path/'a.json').read_text()), evaluate(None, toy/'market')
    assert adapted['options'] == dict(by_camera=True) and 'options' not in plain
    assert adapted['figures']['mAP']['value'] > 2*plain['figures']['mAP']['value']

def test_what_has_no_cameras_or_no_statistics(toy, run, tmp_path):
    folders = tmp_path/'people'
    for s in read_benchmark('market_folder', toy/'market').gallery[:60]:
        (folders/str(s.pid)).mkdir(parents=True, exist_ok=True)
        (folders/str(s.pid)/s.path.name).write_bytes(s.path.read_bytes())
    lines = [run('reid_evaluate', '--data', folders, '--protocol', 'identity_folders', '--by_camera'),
             run('reid_evaluate', '--features', tmp_path/'a.npz', '--data', toy/'market', '--by_camera')]
    onnx = export_onnx(shipped_model(), tmp_path/'small.onnx')
    assert run('reid_import', onnx, '--out', tmp_path/'onnx.safetensors').returncode == 0
    lines.append(run('reid_evaluate', tmp_path/'onnx.safetensors', '--data', toy/'market', '--by_camera'))
    for done, word in zip(lines, ('does not say which', 'by_camera goes with a checkpoint', 'not one in ONNX')):
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) <= 2, done.stderr

# Profiles of cameras

def tracks_of(bench, camera, people):
    "The crops of some people before one camera, as tracks of a clip"
    seen = {}
    for s in bench.gallery:
        if s.camid == camera and s.pid > 0: seen.setdefault(s.pid, []).append(SimpleNamespace(crop=read_rgb(s.path)))
    return [SimpleNamespace(shots=seen[pid]) for pid in sorted(seen)[people]]

@pytest.fixture(scope='module')
def seer(): return with_cameras(load_matcher(shipped_model()))

@given(st.lists(st.tuples(st.integers(1, 9), st.floats(-3, 3), st.floats(0, 4)), min_size=1, max_size=6))
@settings(deadline=None)
def test_clips_add_up(clips):
    "Clip by clip, in any order, comes to what all tracks together have."
    def learn(order):
        p = Profile()
        for k in order:
            tracks, *pair = clips[k]
            p = p.add(f'clip {k}', {'layer': [torch.tensor(x) for x in pair]}, tracks)
        return p
    n, means, variances = (np.array(x, float) for x in zip(*clips))
    mean = (n*means).sum()/n.sum()
    due = mean, (n*(variances + (means - mean)**2)).sum()/n.sum()
    for order in range(len(clips)), reversed(range(len(clips))):
        p = learn(order)
        assert np.allclose([x.item() for x in p.statistics['layer']], due, atol=1e-4)
        assert p.tracks == n.sum() and p.share == (n.sum()/(n.sum() + 4) if n.sum() >= 4 else 0)

def test_few_people_are_not_kept(toy, seer, tmp_path):
    bench, clip = read_benchmark('market_folder', toy/'market'), toy/'clips'/'ada_c1.mp4'
    with pytest.raises(BadInput, match='3 people to be seen well, and it takes 4'):
        see_camera(seer, tmp_path/'gate.safetensors', clip, tracks_of(bench, 1, slice(3)))
    assert not (tmp_path/'gate.safetensors').exists()   # the mean of three people would be like them
    before = read_statistics(seer.network[0])
    through, line = see_camera(seer, tmp_path/'gate.safetensors', clip, tracks_of(bench, 1, slice(4)))
    assert line == 'camera gate: 4 people seen in 1 clip, its statistics weigh 50%'
    crops = [s.crop for t in tracks_of(bench, 1, slice(8, 12)) for s in t.shots]
    assert (through.embed(crops)*seer.embed(crops)).sum(1).max() < .95    # cosines
    with pytest.raises(FileNotFoundError): through.embed([tmp_path/'none.jpg'])
    assert all(torch.equal(a, b) for k in before for a, b in zip(before[k], read_statistics(seer.network[0])[k]))
    kept = (tmp_path/'gate.safetensors').read_bytes()
    _, line = see_camera(seer, tmp_path/'gate.safetensors', clip, tracks_of(bench, 1, slice(4, 12)))
    assert line.startswith('camera gate: 4 people')     # the same clip is no new one
    assert (tmp_path/'gate.safetensors').read_bytes() == kept

def test_profiles_that_cannot_be(seer, tmp_path):
    path, own = tmp_path/'gate.safetensors', read_statistics(seer.network[0])
    good = Profile({k: (m.clone(), v.clone()) for k, (m, v) in own.items()}, {'a': 5})
    first = next(iter(own))
    for wrong in (Profile(good.statistics | {first: (own[first][0][:1], own[first][1])}, {'a': 5}),
                  Profile(good.statistics | {first: (own[first][0], own[first][1]*0 - 1)}, {'a': 5}),
                  Profile({k: v for k, v in own.items() if k != first}, {'a': 5}),
                  *[Profile(good.statistics, clips) for clips in ({}, {'a': 0}, {'a': 'b'})]):
        write_profile(path, wrong, seer.digest)
        with pytest.raises(BadInput, match='damaged: remove it'): read_profile(path, seer)
    write_profile(path, good, 'of another')
    with pytest.raises(BadInput, match='of another network'): read_profile(path, seer)
    write_profile(path, good, seer.digest)
    assert read_profile(path, seer).clips == {'a': 5}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput): read_profile(path, seer)
    with pytest.raises(BadInput, match='no camera profile'): read_profile(shipped_model(), seer)

def test_a_street_is_learned_and_people_are_found_in_it(toy, run, tmp_path):
    street = sorted((toy/'videos'/'alba').rglob('*.mp4'))[0]
    gate, how = tmp_path/'gate.safetensors', ('--weights', 'motion', '--gallery', tmp_path/'gallery')
    learned = run('reid_camera', gate, street, '--weights', 'motion')
    assert learned.returncode == 0 and 'people seen in 1 clip' in learned.stdout, learned.stderr
    clips = toy/'clips'
    done = run('reid_enroll', 'Ada', clips/'ada_c1.mp4', '--camera', gate, '--json', *how)
    assert 'in 2 clips' in json.loads(done.stdout)['camera'], done.stderr
    found = run('reid_identify', clips/'ada_c2.mp4', '--camera', gate, '--json', *how)
    outcome = json.loads(found.stdout)
    by_camera = read_thresholds(shipped_model(), by_camera=True)['thresholds']['0.01']
    assert outcome['decisions'][0]['upper'] == by_camera['high'] and outcome['calibration'].endswith('by camera')
    for words in ('reid_identify', clips/'ada_c2.mp4'), ('reid_enroll', 'Bruno', clips/'bruno_c1.mp4'):
        done = run(*words, *how)
        assert done.returncode == 2 and 'enrolled with camera profiles: name the camera' in done.stderr
    plain = '--weights', 'motion', '--gallery', tmp_path/'plain'
    assert run('reid_enroll', 'Ada', clips/'ada_c1.mp4', *plain).returncode == 0
    mixed = run('reid_identify', clips/'ada_c2.mp4', '--camera', gate, *plain)
    assert mixed.returncode == 2 and 'enrolled without camera profiles: name no camera' in mixed.stderr
    the_page_does_the_same(clips/'ada_c2.mp4', tmp_path, outcome)

def the_page_does_the_same(clip, folder, outcome):
    "The page sees through the same profile, asks for it, and takes no other gallery."
    page = DemoBackend(folder/'gallery', None, 'motion', folder)
    assert page.camera_names() == ['gate'] and page.matcher.calibration.endswith('by camera')
    got = page.identify_clip(clip, 0, 4999, 'gallery', 'query', '0.01', None, 'gate').data
    assert got['decisions'][0]['score'] == outcome['decisions'][0]['score'] and got['camera'] == outcome['camera']
    assert 'before which camera' in page.verify_clip(clip, 0, 4999, 'Ada', '0.01').data['error']
    assert 'cannot be a name' in page.verify_clip(clip, 0, 4999, 'Ada', '0.01', None, '../gate').data['error']
    with pytest.raises(BadInput, match='name the camera'): DemoBackend(folder/'gallery')
    with pytest.raises(BadInput, match='name no camera'): DemoBackend(folder/'plain', None, 'motion', folder)

def test_a_network_without_thresholds_by_camera(run, tmp_path):
    for ending in '.safetensors', '.thresholds.json':
        (tmp_path/'net').with_suffix(ending).write_bytes(shipped_model().with_suffix(ending).read_bytes())
    done = run('reid_camera', tmp_path/'gate.safetensors', 'none.mp4', '--checkpoint', tmp_path/'net.safetensors')
    assert done.returncode == 2 and '--by_camera measures them' in done.stderr
