"MoCo: the leak, resuming after kill -9 and SIGTERM, one process and two, what reid_pretrain refuses."
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from reid_nb.crop_store import pack
from reid_nb.parts.core import BadInput
from reid_nb.parts.models import build_backbone
from reid_nb import moco
from reid_nb.moco import MoCo
from reid_nb.parts.pretraining import lr_at, queue_batches, tiny_backbone
from reid_nb.parts.weights import load_checkpoint
from reid_nb.parts.training import read_state, Run
from reid_nb.parts.core import rng_of

FAST = dict(arch='osnet_x0_25', epochs=6, batch=8, size=(64,32), device='cpu')

def pretrain(store, out, validate=None, **kw):
    "The same with the fields of `Run` among those of the recipe."
    run = Run(**{f.name: kw.pop(f.name) for f in fields(Run) if f.name in kw})
    return moco.pretrain(store, out, run=run, validate=validate, **kw)

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
    code = f'from test_moco import pretrain; pretrain({str(store)!r}, {str(out)!r}, **{ {**FAST, **kw}!r})'
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=Path(__file__).parent)

def wait_for_step(state, step, process):
    end = time.monotonic()+1200
    while time.monotonic()<end:
        try: reached = read_state(state)['step']
        except BadInput: reached = -1   # not there yet, or just moved aside for the next
        if reached>=step: return
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
    "Six epochs of 8 steps equal 2 + kill -9 + 4, bit for bit, and so does the curve; then another kill in between."
    state = tmp_path/'moco.session.pt'
    pretrain(store, tmp_path, steps=16, **FAST)
    assert read_state(state)['step']==16
    for step in (17, 31):
        p = start(store, tmp_path, save_every=0)
        wait_for_step(state, step, p)
        p.kill(); p.communicate()
        assert not load_checkpoint(tmp_path/'moco.safetensors')[1]['finished']
    end = pretrain(store, tmp_path, **FAST)
    assert same(whole, end) and not list(tmp_path.glob('*session*'))
    assert load_checkpoint(whole)[1]['history'] == load_checkpoint(end)[1]['history']

@pytest.mark.long
def test_sigterm_saves(store, whole, tmp_path):
    p = start(store, tmp_path, save_every=1e6, epochs=400)
    wait_for_step(tmp_path/'moco.session.pt', 0, p)
    time.sleep(2)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=600)
    assert p.returncode==128+signal.SIGTERM
    assert read_state(tmp_path/'moco.session.pt')['step']>0

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
    with pytest.raises(BadInput, match='epochs 6 there, 5 now'): pretrain(store, whole.parent, **{**FAST, 'epochs': 5})

@pytest.mark.parametrize('seed', [0,1])
def test_leak_on_noise(seed):
    "The key is another image of the batch, all images are noise: only batch statistics could give it away."
    acc = {}
    for bn in ('batch','momentum'):
        torch.manual_seed(seed)
        model = MoCo(tiny_backbone(), K=16, dim=32, m=0., bn=bn, head_bn=False).train()
        opt,seen = torch.optim.Adam(model.encoder_q.parameters(), 3e-4),[]
        for i in range(1300):
            x = .2*torch.randn(2,3,16,8) + 2*torch.randn(2,3,1,1)
            k = model.keys(x.flip(0))
            loss,a,_ = model(x, k)
            model.enqueue(k)
            if i<1000: opt.zero_grad(); loss.backward(); opt.step()
            elif i>=1016: seen.append(a.item())
        acc[bn] = np.mean(seen)
    assert acc['batch'] > .3 and acc['momentum'] < .2, acc

def test_keys_do_not_know_their_batch():
    torch.manual_seed(0)
    model = MoCo(build_backbone('osnet_x0_25'), K=8).train()
    x = torch.randn(8,3,64,32)
    model(x, model.keys(x))
    with torch.no_grad(): assert torch.allclose(model.encoder_k(x)[:2], model.encoder_k(x[:2]), atol=1e-5)

def test_momentum_update():
    torch.manual_seed(0)
    model = MoCo(build_backbone('osnet_x0_25'), K=8, m=.5).train()
    model.t = 1000
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
    loss,_,_ = model(x, model.keys(x.flip(3)))
    with torch.no_grad():
        q = torch.nn.functional.normalize(model.encoder_q(x), dim=1)
        k = torch.nn.functional.normalize(model.encoder_k(x.flip(3)), dim=1)
        pos,neg = ((q*k).sum(1)/.2).exp(),(q@queue/.2).exp().sum(1)
    assert torch.allclose(loss, -(pos/(pos+neg)).log().mean(), atol=1e-5)

def test_schedule_ends_where_the_run_ends():
    for total in (10, 1000):
        rates = [lr_at(s, total, 256) for s in range(total)]
        assert max(rates)==pytest.approx(.03, rel=.05) and rates[-1]<.03*.05

def test_queue_warnings(caplog):
    queue_batches(1000, 10, 20, walk=12)
    assert 'warning: 2.4 of 200 keys show the person of the query' in caplog.text
    queue_batches(10**6, 64, 1024)
    assert 'stale' in caplog.text
    caplog.clear()
    queue_batches(10**6, 64)
    assert not caplog.text

@pytest.mark.parametrize('arch,dim', [('resnet18',512), ('resnet18_ibn',512), ('resnet50',2048),
                                       ('osnet_x1_0',512), ('osnet_ain_x1_0',512)])
def test_backbones(arch, dim):
    net = build_backbone(arch).eval()
    with torch.no_grad(): assert net(torch.zeros(1,3,64,32)).shape==(1,dim,4,2)
    assert net.dim==dim

def bad(p, *words):
    assert p.returncode==2 and 'Traceback' not in p.stderr, p.stderr
    last = p.stderr.strip().splitlines()[-1]
    assert last.startswith('reid_pretrain:') and all(w in last for w in words), last

def test_bad_input(run, store, tmp_path):
    bad(run('reid_pretrain', tmp_path/'none.lmdb', '--out', tmp_path/'out'), 'none.lmdb')
    bad(run('reid_pretrain', store, '--arch', 'resnet9', '--out', tmp_path/'out'), 'resnet9', 'resnet50', 'osnet')
    bad(run('reid_pretrain', store, '--size', 'big', '--out', tmp_path/'out'), 'HEIGHTxWIDTH')
    bad(run('reid_pretrain', store, '--batch', 100, '--out', tmp_path/'out'), '64 crops')
    bad(run('reid_pretrain', store, '--recipe', 'cake', '--out', tmp_path/'out'), 'cake', 'v2, short, street')
    bad(run('reid_pretrain', store, '--change', 'speed=9', '--out', tmp_path/'out'), 'speed', 'queue')
    assert not (tmp_path/'out').exists()

def test_command(run, store, tmp_path):
    args = ['reid_pretrain', store, '--out', tmp_path, '--arch', 'osnet_x0_25', '--epochs', 2, '--batch', 8,
            '--size', '64x32', '--cities', 'alba/porto', '--recipe', 'short', '--change', 'lr=.01 queue=2', '--seed', 3]
    p = run(*args)
    assert p.returncode==0, p.stderr
    assert 'finished' in p.stdout and len(p.stdout.splitlines())==1
    meta = load_checkpoint(tmp_path/'moco.safetensors')[1]
    given = FAST | dict(recipe='short', epochs=2, cities=['alba/porto'], lr=.01, queue=2, seed=3)
    assert same(tmp_path/'moco.safetensors', pretrain(store, tmp_path/'called', **given))
    assert meta['settings']['m']==.99 and meta['settings']['augment']=='person'
    assert meta['size']==[64,32] and meta['kind']=='moco' and len(meta['mean'])==3 and meta['digest']

def test_full_disk(run, store, tiny_disk):
    p = run('reid_pretrain', store, '--out', tiny_disk/'out', '--epochs', 1, '--batch', 8, '--size', '64x32')
    bad(p, 'No space left')
    assert not [f for f in Path(tiny_disk).rglob('*') if f.suffix in ('.safetensors','.pt','.tmp')]

def torchrun(*args, n=2):
    "`n` processes over gloo on this machine."
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), *map(str, args)]
    p = subprocess.run(cmd, capture_output=True, text=True, timeout=3000, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert p.returncode==0, p.stderr[-3000:]
    return p.stdout

def pretrain_by_two(store, out, *more):
    args = [store, '--out', out, '--arch', 'osnet_x0_25', '--epochs', 2, '--batch', 8, '--size', '64x32',
            '--precision', 'fp32', *more]
    return torchrun('--no-python', Path(sys.executable).parent/'reid_pretrain', *args)

@pytest.mark.long
def test_two_processes_are_one(store, tmp_path):
    "Where no layer looks at its batch, two processes with half of it each have the same loss curve as one."
    said = pretrain_by_two(store, tmp_path/'two', '--change', 'bn=frozen')
    assert said.count('finished')==1
    pretrain(store, tmp_path/'one', **{**FAST, 'epochs': 2}, precision='fp32', bn='frozen')
    one,two = [load_checkpoint(tmp_path/k/'moco.safetensors') for k in ('one','two')]
    assert [h['step'] for h in one[1]['history']]==list(range(1,17))
    for a,b in zip(one[1]['history'], two[1]['history'], strict=True): assert a==pytest.approx(b, rel=1e-4, abs=1e-5)
    for k,v in one[0].items(): assert torch.allclose(v, two[0][k], atol=1e-4), k

@pytest.mark.long
def test_two_processes_go_on(store, tmp_path):
    "Two with shuffled batch normalisation stop after 5 steps, and end as two that never stopped."
    pretrain_by_two(store, tmp_path/'halves', '--steps', 5)
    assert read_state(tmp_path/'halves/moco.session.pt')['step']==5
    for name in ('halves','whole'): pretrain_by_two(store, tmp_path/name)
    assert load_checkpoint(tmp_path/'whole/moco.safetensors')[1]['settings']['bn']=='shuffle'
    assert same(*(tmp_path/name/'moco.safetensors' for name in ('halves','whole')))

def test_shuffled_keys_come_home(tmp_path):
    script = tmp_path/'shuffle.py'
    script.write_text("""if 1:
        import torch, torch.distributed as dist
        from reid_nb.parts.device import pick_device
        from reid_nb.parts.training import join_processes
        from reid_nb.parts.pretraining import shuffled
        rank,world = join_processes(pick_device('cpu'))
        x,batches = torch.arange(4.)[:,None] + 10*rank,[]
        def encoder(x): batches.append(x); return 2*x
        for step in range(8): assert torch.equal(shuffled(encoder, step)(x), 2*x)
        mine = torch.stack(batches).flatten(1)
        assert mine.min()<4 and mine.max()>=10, 'a process sees crops of the other'
        all_ = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(all_, mine)
        assert (torch.cat(all_, 1).sort(1)[0]==torch.tensor([0.,1,2,3,10,11,12,13])).all()
        print('fine')
        dist.destroy_process_group()""")
    assert torchrun(script).count('fine')==2

@pytest.mark.parametrize('kw', [dict(positives='track'), dict(negatives='video'), dict(draw='device'),
                                dict(draw='device', negatives='video'), dict(accumulate=2),
                                dict(clip=.1), dict(precision='fp16'), dict(optimizer='adamw')], ids=str)
def test_options_train(store, tmp_path, kw):
    h = load_checkpoint(pretrain(store, tmp_path, **{**FAST, 'epochs': 1}, **kw))[1]['history']
    assert len(h)==8 and np.isfinite([x['loss'] for x in h]).all()

@pytest.mark.parametrize('kw', [{}, dict(precision='fp16', draw='fast'), dict(negatives='video', positives='track')],
                         ids=str)
def test_a_gpu_goes_on(store, tmp_path, cuda, kw):
    seen,kw = [],dict(FAST, epochs=2, device=None, workers=2, **kw)
    pretrain(store, tmp_path, steps=5, **kw)
    state = read_state(tmp_path/'moco.session.pt')
    assert state['step']==5 and bool(state['parts']['scaler'])==('precision' in kw)
    end = pretrain(store, tmp_path, watch=lambda s: seen.append(s.now), **kw)
    h = load_checkpoint(end)[1]['history']
    assert [x['step'] for x in h]==list(range(1,17)) and np.isfinite([x['loss'] for x in h]).all()
    assert 0<=seen[-1]['waiting']<=1 and seen[-1]['gpu_gb']>0

def test_fp16_goes_on_with_its_scaler(store, tmp_path):
    kw = dict(FAST, epochs=2, precision='fp16')
    pretrain(store, tmp_path/'halves', steps=3, **kw)
    assert read_state(tmp_path/'halves/moco.session.pt')['parts']['scaler']['scale']>1
    assert same(pretrain(store, tmp_path/'halves', **kw), pretrain(store, tmp_path/'whole', **kw))

@pytest.mark.parametrize('first,then', [('fp16','bf16'), ('fp32','fp16')])
def test_another_machine_may_go_on_in_its_own_precision(store, tmp_path, first, then):
    kw = dict(FAST, epochs=1)
    pretrain(store, tmp_path, steps=3, precision=first, **kw)
    h = load_checkpoint(pretrain(store, tmp_path, precision=then, **kw))[1]['history']
    assert len(h)==8 and np.isfinite([x['loss'] for x in h]).all()

def test_validation_changes_nothing(store, whole, tmp_path):
    "Numbers of a function that is handed in are in the curve, every other epoch and at the end; the weights stay."
    asked = []
    def validate(backbone):
        assert not backbone.training
        asked.append(1)
        return dict(val_mAP=len(asked)/10)
    end = pretrain(store, tmp_path, validate=validate, validate_every=2, **FAST)
    lines = [h for h in load_checkpoint(end)[1]['history'] if 'val_mAP' in h]
    assert [(h['step'], h['val_mAP']) for h in lines]==[(16,.1), (32,.2), (48,.3)] and same(whole, end)

def test_collapse_is_said_once(store, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr('reid_nb.moco.MoCo.forward', lambda self, x, k, places=None: (
        (0*self.encoder_q(x)).sum(), torch.tensor(.5), torch.tensor(.999)))
    pretrain(store, tmp_path, **{**FAST, 'epochs': 1})
    assert caplog.text.count('collapse at')==1

def test_bad_options(store, tmp_path):
    for kw,words in {('bn','shuffle'): 'torchrun', ('bn','none'): 'choose one of momentum',
                     ('accumulate',3): 'multiple',
                     ('positives','person'): 'choose one of crop, track',
                     ('negatives','none'): 'choose one of all', ('draw','slow'): 'choose one of fast',
                     ('precision','int8'): 'choose one of fp32'}.items():
        with pytest.raises(BadInput, match=words): pretrain(store, tmp_path/kw[0], **FAST, **dict([kw]))
