"The model in the box: its card says what can be measured, and it arrives with the package."
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT

from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.core import BadInput, sha256
from reid_nb.parts.models import build_backbone, ReidModel
from reid_nb.parts.weights import (
    embed, export_onnx, load_checkpoint, load_model, read_image, read_thresholds, save_checkpoint, slim, SMALL)
from reid_nb.evaluate import evaluate

CARD = (SMALL.parent/'README.md').read_text(encoding='utf-8')

def test_card_and_files_belong_together():
    for f in SMALL.parent.glob(f'{SMALL.stem}.*'): assert sha256(f) in CARD, f.name
    assert read_thresholds(SMALL)['thresholds'] and SMALL.stat().st_size < 5_000_000

@pytest.mark.long
def test_the_card_says_what_is_measured(data):
    ways = {}, dict(flip=True), dict(by_camera=True)
    plain, _, by_camera = got = [evaluate(None, data/'cuhk03_p1', 'cuhk03_p1', **way) for way in ways]
    for result in got:
        for k in ('rank1', 'mAP'):
            numbers = [100*result['figures'][k][v] for v in ('value', 'low', 'high')]
            assert '{:.1f} ({:.1f} to {:.1f})'.format(*numbers) in CARD
    for known, result in (read_thresholds(SMALL), plain), (read_thresholds(SMALL, by_camera=True), by_camera):
        for fmr, t in result['thresholds'].items():
            own = known['thresholds'][fmr]
            assert own['threshold'] == pytest.approx(t['threshold'], abs=1e-3)
            assert '{threshold:.3f} ({low:.3f} to {high:.3f}) | {tmr:.2f} |'.format(**own) in CARD

@pytest.mark.long
def test_onnx_embeds_real_people_as_the_weights_do(data, tmp_path):
    model, meta = load_model(SMALL)
    paths = [s.path for s in read_benchmark('cuhk03_p1', data/'cuhk03_p1').query[:64]]
    net = onnxruntime.InferenceSession(export_onnx(SMALL, tmp_path/'small.onnx'), providers=['CPUExecutionProvider'])
    got = net.run(None, {'images': np.stack([read_image(p, meta['size']) for p in paths])})[0]
    assert np.abs(got - embed(model, meta, paths)).max() < 1e-4

def test_it_comes_with_the_package(tmp_path):
    build = [sys.executable, 'setup.py', '-q', 'build', '--build-base', tmp_path/'base', '--build-lib', tmp_path/'lib']
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    there = {f.name: sha256(f) for f in (tmp_path/'lib'/'reid_nb'/'weights').iterdir()}
    assert there == {f.name: sha256(f) for f in SMALL.parent.iterdir()}

def test_only_a_trained_model_is_given_away(tmp_path):
    moco = save_checkpoint(tmp_path/'moco.safetensors', {}, dict(kind='moco'))
    with pytest.raises(BadInput, match='not from reid_finetune'): slim(moco, tmp_path/'out.safetensors')
    assert not (tmp_path/'out.safetensors').exists()

def test_what_is_given_away_has_no_classifier_and_half_its_bits(tmp_path):
    net = ReidModel(build_backbone('resnet10_x0_5'), 9, neck=True)
    about = dict(kind='reid', arch='resnet10_x0_5', classes=9, model=dict(neck=True), size=[64, 32], mean=[.5]*3,
                 std=[.2]*3)
    whole = save_checkpoint(tmp_path/'whole.safetensors', net.state_dict(), about)
    given, meta = load_checkpoint(slim(whole, tmp_path/'given.safetensors'))
    assert meta['classes'] == 0 and not any('classifier' in k for k in given)
    assert {str(v.dtype) for v in given.values() if v.ndim > 1} == {'torch.float16'}
    assert not any(v.dtype == torch.float16 for v in given.values() if v.ndim < 2)
    pictures = [np.random.default_rng(k).integers(0, 256, (64, 32, 3), np.uint8) for k in range(8)]
    one, two = (embed(*load_model(tmp_path/f'{name}.safetensors'), pictures) for name in ('whole', 'given'))
    assert (one*two).sum(1).min() > .99999

def test_the_command(run, tmp_path):
    done = run('reid_export', tmp_path/'none.safetensors')
    assert done.returncode == 2 and 'no checkpoint at' in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path/'cut.safetensors').write_bytes(SMALL.read_bytes()[:1000])
    with pytest.raises(BadInput, match='not a whole'): export_onnx(tmp_path/'cut.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['cut.safetensors']

def test_what_is_kept_about_training_people():
    meta = json.loads(SMALL.with_suffix('.json').read_text())
    assert meta['classes'] == 0 and str(ROOT) not in json.dumps(meta) and '/work' not in json.dumps(meta)
