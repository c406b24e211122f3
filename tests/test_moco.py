"MoCo and its sessions: the leak, resuming after kill -9 and SIGTERM, what reid_pretrain refuses."
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from reid_nb.crop_store import pack
from reid_nb.dataset import BadInput
from reid_nb.moco import (AUGMENTS, Augment, MoCo, Session, build_backbone, crop_batches, load_checkpoint, lr_at,
                          pretrain, queue_batches, save_checkpoint)
from reid_nb.toy_city import rng_of

FAST = dict(arch='osnet_x0_25', epochs=4, batch=8, size=(64,32), device='cpu')

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "64 small crops of coloured noise in a store."
    root = tmp_path_factory.mktemp('moco')
    for i in range(64):
        img = rng_of('crop', i).integers(0, 255, (40,20,3), np.uint8)//2
        img += rng_of('tint', i).integers(0, 120, 3, np.uint8)
        path = root/f'crops/alba/porto/v{i%2:010d}/{i%8:06d}_{i:07d}_00.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), img)
    pack(root/'crops', root/'crops.lmdb')
    return root/'crops.lmdb'

def same(a, b):
    a,b = load_checkpoint(a)[0],load_checkpoint(b)[0]
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def start(store, out, **kw):
    code = f'from reid_nb.moco import pretrain; pretrain({str(store)!r}, {str(out)!r}, **{ {**FAST, **kw}!r})'
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def wait_for_step(state, step, process):
    end = time.monotonic()+120
    while time.monotonic()<end:
        if state.exists() and load_checkpoint(state)[1]['step']>=step: return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(.02)
    raise AssertionError(f'{state} did not reach step {step}')

@pytest.fixture(scope='module')
def whole(store, tmp_path_factory): return pretrain(store, tmp_path_factory.mktemp('whole'), **FAST)

def test_same_seed_same_numbers(store, whole, tmp_path):
    assert same(whole, pretrain(store, tmp_path, **FAST))
    other = pretrain(store, tmp_path/'seed', **{**FAST, 'seed': 1})
    assert not same(whole, other)

@pytest.mark.long
def test_kill_and_resume(store, whole, tmp_path):
    "kill -9 in the middle, twice; the end equals the uninterrupted run, bit for bit, and so does the curve."
    state = tmp_path/'moco.session.safetensors'
    for step in (5, 17):
        p = start(store, tmp_path, save_every=0)
        wait_for_step(state, step, p)
        p.kill(); p.communicate()
        assert not (tmp_path/'moco.safetensors').exists()
    end = pretrain(store, tmp_path, **FAST)
    assert same(whole, end) and not state.exists()
    assert load_checkpoint(whole)[1]['history'] == load_checkpoint(end)[1]['history']

@pytest.mark.long
def test_sigterm_saves(store, whole, tmp_path):
    p = start(store, tmp_path, save_every=1e6, epochs=400)
    wait_for_step(tmp_path/'moco.session.safetensors', 0, p)
    time.sleep(2)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    assert p.returncode==128+signal.SIGTERM
    assert load_checkpoint(tmp_path/'moco.session.safetensors')[1]['step']>0

def test_minutes_stop_and_go_on(store, whole, tmp_path):
    first = pretrain(store, tmp_path, minutes=0, **FAST)
    assert not load_checkpoint(first)[1]['finished']
    assert same(whole, pretrain(store, tmp_path, **FAST))
    assert load_checkpoint(first)[1]['finished']

def test_loader_processes_do_not_change_numbers(store, whole, tmp_path):
    assert same(whole, pretrain(store, tmp_path, workers=2, **FAST))

def test_other_settings_are_refused(store, whole, tmp_path):
    pretrain(store, tmp_path, minutes=0, **FAST)
    with pytest.raises(BadInput, match='seed 0 there, 7 now'): pretrain(store, tmp_path, seed=7, **FAST)
    with pytest.raises(BadInput, match='epochs 4 there, 5 now'): pretrain(store, whole.parent, **{**FAST, 'epochs': 5})

def tiny_backbone(w=32):
    block = lambda i,o: [torch.nn.Conv2d(i, o, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(o), torch.nn.ReLU()]
    net = torch.nn.Sequential(*block(3,w), *block(w,w), *block(w,2*w))
    net.dim = 2*w
    return net

@pytest.mark.parametrize('seed', [0,1])
def test_leak_on_noise(seed):
    "The key is another image of the batch, all images are noise: only batch statistics could give it away."
    acc = {}
    for eman in (False,True):
        torch.manual_seed(seed)
        model = MoCo(tiny_backbone(), K=16, dim=32, m=0., eman=eman, head_bn=False).train()
        opt,seen = torch.optim.Adam(model.encoder_q.parameters(), 3e-4),[]
        for i in range(1300):
            x = .2*torch.randn(2,3,16,8) + 2*torch.randn(2,3,1,1)
            loss,a = model(x, x.flip(0))
            if i<1000: opt.zero_grad(); loss.backward(); opt.step()
            elif i>=1016: seen.append(a.item())
        acc[eman] = np.mean(seen)
    assert acc[False] > .3 and acc[True] < .2, acc

def test_keys_do_not_know_their_batch():
    torch.manual_seed(0)
    model = MoCo(build_backbone('osnet_x0_25'), K=8).train()
    x = torch.randn(8,3,64,32)
    model(x, x)
    with torch.no_grad(): assert torch.allclose(model.encoder_k(x)[:2], model.encoder_k(x[:2]), atol=1e-5)

def test_momentum_update():
    torch.manual_seed(0)
    model = MoCo(build_backbone('osnet_x0_25'), K=8, m=.5).train()
    model.t.fill_(1000)
    q,k = next(model.encoder_q.parameters()),next(model.encoder_k.parameters())
    with torch.no_grad(): q.add_(1)
    was = k.clone()
    model.update_key_encoder()
    assert torch.allclose(k, was+.5, atol=1e-6) and not k.requires_grad

def test_loss_by_hand():
    torch.manual_seed(0)
    model = MoCo(build_backbone('osnet_x0_25'), K=8, tau=.2).eval()
    x = torch.randn(4,3,64,32)
    queue = model.queue.clone()
    loss,_ = model(x, x.flip(3))
    with torch.no_grad():
        q = torch.nn.functional.normalize(model.encoder_q(x), dim=1)
        k = torch.nn.functional.normalize(model.encoder_k(x.flip(3)), dim=1)
        pos,neg = ((q*k).sum(1)/.2).exp(),(q@queue/.2).exp().sum(1)
    assert torch.allclose(loss, -(pos/(pos+neg)).log().mean(), atol=1e-5)

def test_every_crop_once_an_epoch():
    steps = list(crop_batches(20, 4, 0, 10, seed=3))
    for epoch in (0,1):
        got = [p for b in steps[5*epoch:5*epoch+5] for p in b]
        assert {e for e,_ in got}=={epoch} and sorted(i for _,i in got)==list(range(20))

def test_schedule_ends_where_the_run_ends():
    for total in (10, 1000):
        rates = [lr_at(s, total, 256) for s in range(total)]
        assert max(rates)==pytest.approx(.03, rel=.05) and rates[-1]<.03*.05

def test_queue_warnings(capsys):
    queue_batches(100, 10, 20)
    assert 'queries meet themselves' in capsys.readouterr().err
    queue_batches(10**6, 64, 1024)
    assert 'stale' in capsys.readouterr().err
    queue_batches(10**6, 64)
    assert not capsys.readouterr().err

@pytest.mark.parametrize('how', AUGMENTS)
def test_views_of_odd_crops(how):
    aug = Augment((64,32), **AUGMENTS[how])
    for shape in ((1,1,3), (200,3,3), (3,200,3), (500,200,3)):
        for i in range(20): assert aug(np.full(shape, 99, np.uint8), rng_of(i)).shape==(64,32,3)

@pytest.mark.parametrize('arch,dim', [('resnet18',512), ('resnet50',2048), ('osnet_x1_0',512), ('osnet_ain_x1_0',512)])
def test_backbones(arch, dim):
    net = build_backbone(arch).eval()
    with torch.no_grad(): assert net(torch.zeros(1,3,64,32)).shape==(1,dim,4,2)
    assert net.dim==dim

def test_checkpoint_files(tmp_path):
    path = save_checkpoint(tmp_path/'a.safetensors', {'w': torch.arange(6.).view(2,3)}, {'kind':'moco'})
    assert sorted(p.name for p in tmp_path.iterdir())==['a.json','a.safetensors']
    data = path.read_bytes()
    for cut in (0, 4, 50, len(data)-1):
        path.write_bytes(data[:cut])
        with pytest.raises(BadInput): load_checkpoint(path)

def test_session_refuses_the_state_of_others(tmp_path):
    save_checkpoint(tmp_path/'moco.session.safetensors', {}, {'settings': {'arch':'resnet50'}, 'step': 3})
    with pytest.raises(BadInput, match='arch resnet50 there, resnet10 now'):
        Session(tmp_path, 'moco', {'arch':'resnet10'}).resume()

def bad(p, *words):
    assert p.returncode==2 and 'Traceback' not in p.stderr, p.stderr
    last = p.stderr.strip().splitlines()[-1]
    assert last.startswith('reid_pretrain:') and all(w in last for w in words), last

def test_bad_input(run, store, tmp_path):
    bad(run('reid_pretrain', tmp_path/'none.lmdb', '--out', tmp_path/'out'), 'none.lmdb')
    bad(run('reid_pretrain', store, '--arch', 'resnet9', '--out', tmp_path/'out'), 'resnet9', 'resnet50', 'osnet')
    bad(run('reid_pretrain', store, '--size', 'big', '--out', tmp_path/'out'), 'HEIGHTxWIDTH')
    bad(run('reid_pretrain', store, '--batch', 100, '--out', tmp_path/'out'), '64 crops')
    assert not (tmp_path/'out').exists()

def test_command(run, store, tmp_path):
    args = ['reid_pretrain', store, '--out', tmp_path, '--arch', 'osnet_x0_25', '--epochs', 2, '--batch', 8,
            '--size', '64x32', '--cities', 'alba/porto']
    p = run(*args)
    assert p.returncode==0, p.stderr
    assert 'finished' in p.stdout and len(p.stdout.splitlines())==1
    meta = load_checkpoint(tmp_path/'moco.safetensors')[1]
    assert meta['size']==[64,32] and meta['kind']=='moco' and len(meta['mean'])==3 and meta['digest']

def test_full_disk(run, store, tiny_disk):
    p = run('reid_pretrain', store, '--out', tiny_disk/'out', '--epochs', 1, '--batch', 8, '--size', '64x32')
    bad(p, 'No space left')
    assert not [f for f in Path(tiny_disk).rglob('*') if f.suffix in ('.safetensors','.tmp')]
