"Each camera by its own statistics: in training, in an evaluation, and never by accident."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from reid_nb.evaluate import evaluate
from reid_nb.finetune import finetune
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.core import BadInput
from reid_nb.parts.models import ReidModel
from reid_nb.parts.scoring import shipped_model
from reid_nb.parts.supervised import camera_groups
from reid_nb.parts.training import Run
from reid_nb.parts.weights import (
    camera_statistics, embed, embed_by_camera, load_checkpoint, load_model, read_statistics, set_statistics)

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
    with pytest.raises(BadInput): embed_by_camera(model, meta, [*paths[:20], tmp_path/'broken.jpg'], [0]*21)
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
    onnx = shipped_model().with_suffix('.onnx')
    assert run('reid_import', onnx, '--out', tmp_path/'onnx.safetensors').returncode == 0
    lines.append(run('reid_evaluate', tmp_path/'onnx.safetensors', '--data', toy/'market', '--by_camera'))
    for done, word in zip(lines, ('does not say which', 'by_camera goes with a checkpoint', 'not one in ONNX')):
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) <= 2, done.stderr
