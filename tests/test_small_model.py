"The model in the box: its card says what can be measured, and it arrives with the package."
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT

from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.core import BadInput, sha256
from reid_nb.parts.weights import read_thresholds
from reid_nb.evaluate import evaluate
from reid_nb.parts.weights import embed, load_model
from reid_nb.parts.weights import read_image
from reid_nb.parts.weights import save_checkpoint
from reid_nb.parts.weights import export_onnx, slim, SMALL

CARD = (SMALL.parent/'README.md').read_text(encoding='utf-8')

def test_card_and_files_belong_together():
    for f in SMALL.parent.glob(f'{SMALL.stem}.*'): assert sha256(f) in CARD, f.name
    assert read_thresholds(SMALL)['thresholds'] and SMALL.stat().st_size < 1_000_000

@pytest.mark.long
def test_the_card_says_what_is_measured(data):
    for flip in (False, True):
        got = evaluate(None, data/'cuhk03_p1', 'cuhk03_p1', flip=flip)
        for k in ('rank1', 'mAP'):
            numbers = [100*got['figures'][k][v] for v in ('value', 'low', 'high')]
            assert '{:.1f} ({:.1f} to {:.1f})'.format(*numbers) in CARD
    for fmr, t in evaluate(None, data/'cuhk03_p1', 'cuhk03_p1')['thresholds'].items():
        assert read_thresholds(SMALL)['thresholds'][fmr]['threshold'] == pytest.approx(t['threshold'], abs=1e-3)

@pytest.mark.long
def test_onnx_embeds_real_people_as_the_weights_do(data):
    model, meta = load_model(SMALL)
    paths = [s.path for s in read_benchmark('cuhk03_p1', data/'cuhk03_p1').query[:64]]
    net = onnxruntime.InferenceSession(SMALL.with_suffix('.onnx'), providers=['CPUExecutionProvider'])
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

def test_the_command(run, tmp_path):
    done = run('reid_export', tmp_path/'none.safetensors')
    assert done.returncode == 2 and 'no checkpoint at' in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path/'cut.safetensors').write_bytes(SMALL.read_bytes()[:1000])
    with pytest.raises(BadInput, match='not a whole'): export_onnx(tmp_path/'cut.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['cut.safetensors']

def test_what_is_kept_about_training_people():
    meta = json.loads(SMALL.with_suffix('.json').read_text())
    assert meta['classes'] == 0 and str(ROOT) not in json.dumps(meta) and '/work' not in json.dumps(meta)
