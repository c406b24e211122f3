"Weights that arrive or are refused, recipes, resuming, and one epoch on real people."
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from reid_nb.benchmarks import chance, rank, read_benchmark
from reid_nb.dataset import BadInput
from reid_nb.finetune import (RECIPES, ReidModel, TrainImages, embed, finetune, load_model, pk_batches, read_weights,
                              take_labels, transfer_weights)
from reid_nb.sessions import load_checkpoint, save_checkpoint
from reid_nb.toy_city import rng_of

FAST = dict(arch='osnet_x0_25', epochs=3, batch=16, size=(64,32), device='cpu')

@pytest.fixture(scope='module')
def market(tmp_path_factory):
    "A Market-style folder: 8 identities, each a colour, 6 images each."
    root = tmp_path_factory.mktemp('market')
    for part,pids in dict(bounding_box_train=range(1,9), query=range(11,15), bounding_box_test=range(11,15)).items():
        (root/part).mkdir()
        for pid in pids:
            for i in range(6):
                img = rng_of(part, pid, i).integers(0, 99, (64,32,3), np.uint8)
                img += rng_of(pid).integers(0, 150, 3, np.uint8)
                cam = 1 if part=='query' else 2+i%2
                cv2.imwrite(str(root/part/f'{pid:04d}_c{cam}s1_{i:06d}_00.jpg'), img)
    return root

@pytest.fixture(scope='module')
def donor(): return ReidModel('resnet10').backbone.state_dict()

def same(a, b):
    a,b = load_checkpoint(a)[0],load_checkpoint(b)[0]
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('prefix', ['module.encoder_q.', 'encoder_q.', 'backbone.', 'module.', 'model.', ''])
def test_known_prefixes(donor, prefix, tmp_path):
    torch.save({'state_dict': {prefix+k: v for k,v in donor.items()}, 'epoch': 3}, tmp_path/'a.pth')
    model = ReidModel('resnet10', 5)
    table = transfer_weights(model, tmp_path/'a.pth', show=False)
    assert table.prefix==prefix and table.share==1 and not table.missing
    assert all(torch.equal(v, donor[k]) for k,v in model.backbone.state_dict().items())

def test_encoder_q_and_not_encoder_k(donor, tmp_path):
    both = {f'module.encoder_{e}.{k}': v.float()*(e=='q') for e in 'kq' for k,v in donor.items()}
    torch.save({'state_dict': both}, tmp_path/'moco.pth')
    model = ReidModel('resnet10')
    transfer_weights(model, tmp_path/'moco.pth', show=False)
    assert torch.equal(model.backbone.conv1.weight, donor['conv1.weight'])

def test_torchvision_and_torchreid(tmp_path):
    import torchreid.reid.models as models
    import torchvision
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path/'tv.pth')
    table = transfer_weights(ReidModel('resnet50'), tmp_path/'tv.pth', show=False)
    assert table.share==1 and table.unexpected==['fc.weight','fc.bias']
    osnet = models.build_model('osnet_x0_25', num_classes=7, pretrained=False)
    torch.save({'state_dict': {f'module.{k}': v for k,v in osnet.state_dict().items()}}, tmp_path/'os.pth')
    assert transfer_weights(ReidModel('osnet_x0_25'), tmp_path/'os.pth', show=False).share==1

def test_old_files_without_batch_counters(donor, tmp_path):
    torch.save({k: v for k,v in donor.items() if 'num_batches' not in k}, tmp_path/'old.pth')
    assert transfer_weights(ReidModel('resnet10'), tmp_path/'old.pth', show=False).share==1

class Bomb:
    def __reduce__(self): return open, ('bomb-went-off','w')

def spoil(donor, how, path):
    if how=='prefix': torch.save({f'net.{k}': v for k,v in donor.items()}, path)
    if how=='head': torch.save({'fc.weight': torch.zeros(9,512), 'fc.bias': torch.zeros(9)}, path)
    if how=='deeper': torch.save(ReidModel('resnet18').backbone.state_dict(), path)
    if how=='shallower': torch.save({k: v for k,v in donor.items() if not k.startswith('layer4')}, path)
    if how=='wider': torch.save({k: v for k,v in ReidModel('resnet50').backbone.state_dict().items()}, path)
    if how=='nothing': torch.save([1,2,3], path)
    if how in ('cut','bomb'): torch.save(donor, path)
    if how=='cut': path.write_bytes(path.read_bytes()[:100_000])
    if how=='bomb': path.write_bytes(pickle.dumps({'state_dict': Bomb()}))

@pytest.mark.parametrize('how,why', dict(prefix='no name fits', head='no name fits', deeper='deeper network',
    shallower='do not fit', wider='do not fit', nothing='no tensors', cut='not opened', bomb='not opened').items())
def test_refused_with_the_reason(donor, how, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(donor, how, tmp_path/'x.pth')
    model = ReidModel('resnet10')
    before = model.backbone.conv1.weight.clone()
    with pytest.raises(BadInput, match=why) as e: transfer_weights(model, tmp_path/'x.pth', show=False)
    assert 'x.pth' in str(e.value) and '\n' not in str(e.value)
    assert torch.equal(before, model.backbone.conv1.weight) and not Path('bomb-went-off').exists()

def test_partial_when_told(donor, tmp_path, capsys):
    spoil(donor, 'shallower', tmp_path/'x.pth')
    table = transfer_weights(ReidModel('resnet10'), tmp_path/'x.pth', partial=True)
    assert 0<table.share<1 and all(n.startswith('layer4') for n in table.missing)
    assert 'layer4' in capsys.readouterr().out

def test_pk_batches_hold_p_people_k_times(capsys):
    samples = [(f'{p}_{i}', p, 0) for p in range(20) for i in range(2+p%7)]
    for batch in pk_batches(samples, 16, 4, 0, 30, seed=1):
        assert sorted(Counter(samples[i][1] for _,i in batch).values())==[4]*4
    assert len({k for b in pk_batches(samples, 16, 4, 0, 30) for k,_ in b})==30*16
    assert not capsys.readouterr().err
    list(pk_batches(samples, 8, 4, 0, 1))
    assert 'only 2 identities' in capsys.readouterr().err

def test_share_of_labels(market):
    train = read_benchmark('market_folder', market).train
    few = take_labels(train, .5)
    assert {s.pid for s in few}=={0,1,2,3} and len(few)==24
    assert few==take_labels(train, .5) and few!=take_labels(train, .5, seed=2)
    for labels in (0, 1.5, .1):
        with pytest.raises(BadInput): take_labels(train, labels)

def test_bnneck_has_no_bias_and_feature_sides():
    torch.manual_seed(0)
    x = torch.randn(4,3,64,32)
    model = ReidModel('osnet_x0_25', 6).eval()
    assert not model.neck.bias.requires_grad and model.classifier.bias is None
    before = model.embed(x)
    model.feature = 'after'
    after = model.embed(x)
    expected = before/(1+model.neck.eps)**.5
    assert torch.allclose(after, expected, atol=1e-5)
    assert not isinstance(ReidModel('osnet_x0_25', 6, neck=False).neck, torch.nn.BatchNorm1d)

def test_images_depend_on_key_and_seed_only(market):
    train = take_labels(read_benchmark('market_folder', market).train)
    a,b = [TrainImages(train, (64,32), RECIPES['bot'], (9,9,9), seed) for seed in (0,1)]
    assert (a[5,2]['img']==a[5,2]['img']).all() and a[5,2]['img'].shape==(64,32,3)
    assert (a[5,2]['img']!=a[6,2]['img']).any() and (a[5,2]['img']!=b[5,2]['img']).any()

@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_learn(market, tmp_path, recipe):
    ckpt = finetune(market, recipe, out=tmp_path, **{**FAST, 'epochs': 6})
    history = load_checkpoint(ckpt)[1]['history']
    assert all(np.isfinite(h['loss']) for h in history)
    assert np.mean([h['loss'] for h in history[-3:]]) < np.mean([h['loss'] for h in history[:3]])

@pytest.fixture(scope='module')
def whole(market, tmp_path_factory): return finetune(market, out=tmp_path_factory.mktemp('whole'), **FAST)

@pytest.mark.long
def test_kill_and_resume(market, whole, tmp_path):
    "kill -9 right after the state of step 4 was written; the end equals the uninterrupted run, bit for bit."
    code = f"""if 1:
        import os, signal
        from reid_nb.finetune import finetune
        from reid_nb.sessions import Session
        write = Session.save
        def save(self):
            write(self)
            if self.step==4: os.kill(os.getpid(), signal.SIGKILL)
        Session.save = save
        finetune({str(market)!r}, out={str(tmp_path)!r}, save_every=0, **{FAST!r})"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode==-signal.SIGKILL, p.stderr
    assert not (tmp_path/'reid.safetensors').exists()
    assert load_checkpoint(tmp_path/'reid.session.safetensors')[1]['step']==4
    assert same(whole, finetune(market, out=tmp_path, **FAST))

def test_steps_stop_and_go_on(market, whole, tmp_path):
    finetune(market, out=tmp_path, steps=3, **FAST)
    assert load_checkpoint(tmp_path/'reid.session.safetensors')[1]['step']==3
    assert same(whole, finetune(market, out=tmp_path, **FAST))

def test_global_dice_are_left_alone(market, tmp_path):
    np.random.seed(5); a = np.random.random()
    np.random.seed(5); list(pk_batches([(0,p,0) for p in range(8) for _ in range(4)], 16, 4, 0, 4))
    assert np.random.random()==a

def test_load_and_embed(market, whole):
    model,meta = load_model(whole)
    assert not model.training and meta['kind']=='reid' and meta['recipe']=='bot' and meta['classes']==8
    paths = [s.path for s in read_benchmark('market_folder', market).query]
    a = embed(model, meta, paths)
    assert a.dtype==np.float32 and a.shape==(len(paths), model.dim)
    assert np.allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    assert (a==embed(model, meta, paths)).all()
    arrays = [cv2.cvtColor(cv2.imread(str(p)), cv2.COLOR_BGR2RGB) for p in paths]
    assert np.allclose(a, embed(model, meta, arrays, batch=5), atol=1e-5)
    mirrored = [x[:,::-1].copy() for x in arrays]
    assert np.allclose(embed(model, meta, arrays, flip=True), embed(model, meta, mirrored, flip=True), atol=1e-5)
    assert embed(model, meta, []).shape==(0, model.dim)

def test_load_model_refuses_sessions(market, tmp_path):
    finetune(market, out=tmp_path, minutes=0, **FAST)
    with pytest.raises(BadInput, match='is a session'): load_model(tmp_path/'reid.session.safetensors')

def test_statistics_travel(market, tmp_path):
    torch.manual_seed(0)
    w = {f'backbone.{k}': v for k,v in ReidModel('osnet_x0_25').backbone.state_dict().items()}
    init = save_checkpoint(tmp_path/'moco.safetensors', w, dict(kind='moco', arch='osnet_x0_25', size=[64,32],
                           mean=[.1,.2,.3], std=[.4,.5,.6], digest='x'))
    meta = load_checkpoint(finetune(market, init=init, out=tmp_path/'out', epochs=1, batch=16, device='cpu'))[1]
    assert (meta['mean'], meta['std'], meta['size'], meta['arch'])==([.1,.2,.3], [.4,.5,.6], [64,32], 'osnet_x0_25')

def bad(p, *words):
    assert p.returncode==2 and 'Traceback' not in p.stderr, p.stderr
    last = p.stderr.strip().splitlines()[-1]
    assert last.startswith('reid_finetune:') and all(w in last for w in words), last

def test_bad_input(run, market, tmp_path):
    out = ['--out', tmp_path/'out', '--epochs', 1]
    one = tmp_path/'one'
    for part in ('bounding_box_train','query','bounding_box_test'): shutil.copytree(market/part, one/part)
    for f in (one/'bounding_box_train').iterdir():
        if not f.name.startswith('0001'): f.unlink()
    bad(run('reid_finetune', tmp_path/'nothing', *out), 'nothing')
    bad(run('reid_finetune', market, '--recipe', 'cake', *out), 'cake', 'bot', 'ide', 'trip')
    bad(run('reid_finetune', one, *out), '1 of 1 identities')
    bad(run('reid_finetune', market, '--init', tmp_path/'no.safetensors', *out), 'no.safetensors')
    bad(run('reid_finetune', market, '--labels', 7, *out), 'labels 7')
    assert not (tmp_path/'out').exists()

def test_full_disk(run, market, tiny_disk):
    p = run('reid_finetune', market, '--out', tiny_disk/'out', '--epochs', 1, '--batch', 16, '--size', '64x32')
    bad(p, 'No space left')
    assert not [f for f in tiny_disk.rglob('*') if f.suffix in ('.safetensors','.tmp')]

def test_read_weights_says_what_is_missing(tmp_path):
    with pytest.raises(BadInput, match='no weights at'): read_weights(tmp_path/'none.pth')

@pytest.mark.long
def test_real_people(run, data, tmp_path):
    "One epoch on CUHK03's first camera pair: the figures rise above chance on people never seen."
    root = data/'cuhk03_p1'
    p = run('reid_finetune', root, '--epochs', 1, '--batch', 32, '--size', '128x64', '--arch', 'resnet10',
            '--out', tmp_path)
    assert p.returncode==0, p.stderr
    bench,(model,meta) = read_benchmark('cuhk03_p1', root),load_model(tmp_path/'reid.safetensors')
    scores = rank(bench, *[embed(model, meta, [s.path for s in part]) for part in (bench.query, bench.gallery)])
    figures,random = scores.figures(),chance(bench)
    print(figures, random)
    assert figures['mAP'] > 2*random['mAP'] and figures['rank1'] > 2*random['rank1']
