"""What may go wrong around a training: numbers that are none, fields out of their range, little shared memory, two at
once, checkpoints of others and damaged ones. Each ends in a result, or in one line."""
import json
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from test_finetune import finetune
from test_moco import FAST as MOCO, pretrain, torchrun, wait_for_step

from reid_nb.crop_store import pack
from reid_nb.parts.core import BadInput, lock, rng_of, sha256, write_image
from reid_nb.parts.models import build_backbone
from reid_nb.parts.pretraining import MoCoRecipe, warn_of_collapse
from reid_nb.parts.supervised import Recipe, RECIPES, training_set
from reid_nb.parts.training import change_recipe, get_recipe, read_state, Run, Session, StateFiles
from reid_nb.parts.weights import (
    export_onnx, load_checkpoint, load_model, read_thresholds, read_weights, save_checkpoint, SMALL, transfer_weights)

TUNE = dict(arch='osnet_x0_25', epochs=3, batch=16, size=(64,32), device='cpu')
NAN = torch.tensor([1., math.nan])

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "64 small crops of coloured noise in a store, eight tracks in two videos."
    root = tmp_path_factory.mktemp('doors')
    for i in range(64):
        path = root/f'crops/alba/porto/v{i%2:010d}/{i%8:06d}_{i:07d}_00.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, rng_of('crop', i).integers(0, 255, (40,20,3), np.uint8))
    return pack(root/'crops', root/'crops.lmdb').path

def one_line(f, *args, **kw):
    "What it gives, or its one line."
    try: return f(*args, **kw)
    except BadInput as e:
        assert str(e) and '\n' not in str(e), e
        return str(e)

# --- Numbers that are none --------------------------------------------------------------------------------------------

def diverging(kind, store, market):
    if kind=='moco': return 'moco', lambda out, **kw: pretrain(store, out, **MOCO, **{'lr': 1e20, **kw})
    return 'reid', lambda out, **kw: finetune(market, out=out, **TUNE, **{'lr': 1e18, 'warmup': 0., **kw})

@pytest.mark.parametrize('kind', ['moco','reid'])
def test_a_loss_that_is_no_number_ends_it(kind, store, market, tmp_path):
    "At that step, with the last good state kept; the same call says the same, and a smaller rate is another training."
    name,train = diverging(kind, store, market)
    with pytest.raises(BadInput, match=r'the loss is (nan|inf) at step \d+.* smaller lr') as first: train(tmp_path)
    assert not (tmp_path/f'{name}.safetensors').exists()
    with pytest.raises(BadInput) as again: train(tmp_path, save_every=0)
    assert str(again.value)==str(first.value) and '\n' not in str(first.value)
    assert all(t.isfinite().all() for t in read_state(tmp_path/f'{name}.session.pt')['parts']['model'].values()
               if t.is_floating_point())
    with pytest.raises(BadInput, match='other settings'): train(tmp_path, lr=.01)

def test_the_command_says_so_in_one_line(run, market, tmp_path):
    p = run('reid_finetune', market, '--out', tmp_path/'out', '--size', '64x32', '--batch', 16, '--epochs', 6,
            '--steps', 12, '--arch', 'osnet_x0_25', '--change', 'lr=1e18 warmup=0.')
    said = [x for x in p.stderr.replace('\r', '\n').splitlines() if x.startswith('reid_finetune:')]
    assert p.returncode==2 and not p.stdout and len(said)==1 and 'the loss is nan at step' in said[0]
    assert 'Traceback' not in p.stderr and not (tmp_path/'out/reid.safetensors').exists()
    p = run('reid_finetune', market, '--out', tmp_path/'out2', '--init', tmp_path/'out/reid.safetensors')
    assert p.returncode==2 and 'no weights at' in p.stderr and not (tmp_path/'out2').exists()

def toy(out, losses, total=9, every=1, **kw):
    "A session of one weight that follows the losses."
    s,net = Session(out, 'toy', {}, Run(**kw)),torch.nn.Linear(1, 1)
    s.resume(net=net)
    for _ in s.steps(range(s.step, total), total, 'toy', 1):
        s.record(every, loss=torch.tensor(losses[s.step]))
        net.weight.data.fill_(losses[s.step])
    return s.finish(total, net.state_dict(), {})

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_the_state_before_is_kept(tmp_path, bad):
    losses = [1.,2.,3.,bad,5.,6.,7.,8.,9.]
    for _ in range(3):
        with pytest.raises(BadInput, match='at step 4: .*last good state is kept'): toy(tmp_path, losses, save_every=0)
        state = read_state(tmp_path/'toy.session.pt')
        assert state['step']==3 and state['parts']['net']['weight'].item()==3
        assert [h['loss'] for h in state['history']]==[1,2,3]
    assert not (tmp_path/'toy.safetensors').exists()
    with pytest.raises(BadInput, match='at step 1'): toy(tmp_path/'first', [bad, *losses], save_every=0)
    with pytest.raises(BadInput, match='at step 9'): toy(tmp_path/'last', [*losses[:3], *losses[4:], bad])

def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    "Also where every loss was a number: in the session, at its end, in a checkpoint."
    s,net = Session(tmp_path, 'toy', {}),torch.nn.Linear(1, 1)
    s.resume(net=net)
    good = s.files.newest.read_bytes()
    net.weight.data.fill_(math.inf)
    with pytest.raises(BadInput, match='net.weight is not finite'): s.save()
    assert s.files.newest.read_bytes()==good and not s.files.before.exists()
    with pytest.raises(BadInput, match='weight is not finite'): s.finish(0, net.state_dict(), {})
    with pytest.raises(BadInput, match='a is not finite'): save_checkpoint(tmp_path/'x.safetensors', {'a': NAN}, {})
    assert [p.name for p in tmp_path.iterdir()]==['toy.session.pt']

def test_a_validation_that_is_no_number_ends_it(store, tmp_path):
    with pytest.raises(BadInput, match='val_mAP is nan at step 8'):
        pretrain(store, tmp_path, validate=lambda net: dict(val_mAP=math.nan), **MOCO)
    assert not (tmp_path/'moco.safetensors').exists() and read_state(tmp_path/'moco.session.pt')['step']==0

def test_a_scaler_may_skip_a_step(tmp_path):
    "In fp16 a gradient may overflow: the scaler leaves the step out. Only the loss has to be a number."
    net = torch.nn.Linear(1, 1)
    opt = torch.optim.SGD(net.parameters(), 1e-12)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**126, growth_interval=99)
    s,skipped = Session(tmp_path, 'toy', {}, Run(save_every=0)),0
    s.resume(net=net, opt=opt, scaler=scaler)
    for x in s.steps((torch.full((1,1), 1e4) for _ in range(40)), 40, 'toy', 1):
        loss = net(x).square().mean()
        scaler.scale(loss).backward()
        skipped += not all(p.grad.isfinite().all() for p in net.parameters())
        scaler.step(opt); scaler.update(); opt.zero_grad()
        s.record(1, loss=loss)
    assert 0<skipped<40 and s.finish(40, net.state_dict(), {}).exists()

def test_no_collapse_is_seen_in_nan(caplog):
    class Odd: step,history = 9,[dict(step=9, alike=math.nan)]
    warn_of_collapse(Odd)
    assert not caplog.text

def test_no_loader_takes_them(tmp_path, market):
    tensors,meta = load_checkpoint(SMALL)
    first = next(k for k in tensors if tensors[k].is_floating_point())
    ours,foreign,pth = tmp_path/'a.safetensors',tmp_path/'b.safetensors',tmp_path/'c.pth'
    bad = {**tensors, first: torch.full_like(tensors[first], math.nan)}
    safetensors.torch.save_file(bad, ours, {'reid_nb': json.dumps(meta)})
    safetensors.torch.save_file(bad, foreign)
    torch.save({'state_dict': bad}, pth)
    for load,path in ((load_checkpoint,ours), (load_model,ours), (read_weights,ours), (read_weights,foreign),
                      (read_weights,pth), (export_onnx,ours)):
        with pytest.raises(BadInput, match=f'{path.name}.*not finite'): load(path)
    for path in (ours, foreign, pth):
        with pytest.raises(BadInput, match='not finite'): finetune(market, init=path, out=tmp_path/'out', **TUNE)
    s = Session(tmp_path, 'toy', {})
    s.resume(net=torch.nn.Linear(1, 1))
    state = read_state(s.files.newest)
    state['parts']['net']['weight'] = NAN
    torch.save(state, s.files.newest)
    with pytest.raises(BadInput, match='net.weight has numbers that are not finite'): read_state(s.files.newest)
    assert not (tmp_path/'out').exists() and not (tmp_path/'a.onnx').exists()

@pytest.mark.long
def test_two_processes_stop_together(tmp_path):
    "One of them meets it; both end at that step, and neither waits for the other."
    script = tmp_path/'odd.py'
    script.write_text(f"""if 1:
        import math, torch, torch.distributed as dist
        from reid_nb.parts.core import BadInput
        from reid_nb.parts.device import pick_device
        from reid_nb.parts.training import join_processes, Run, Session
        rank,world = join_processes(pick_device('cpu'))
        s = Session({str(tmp_path/'out')!r}, 'toy', {{}}, Run(save_every=0))
        try:
            with s.alone():
                s.resume(net=torch.nn.Linear(1, 1))
                for i in s.steps(range(9), 9, 'toy', 1):
                    s.record(2, loss=torch.tensor(math.nan if rank and i==4 else 1.))
        except BadInput as e: print(f'<{{rank}} stopped in step {{s.step}}: {{e}}>')
        dist.destroy_process_group()""")
    said = torchrun(script)
    assert said.count('stopped in step 4')==2 and said.count('the loss is nan at step 5')==1 and 'smaller lr' in said
    assert read_state(tmp_path/'out/toy.session.pt')['step']==4

# --- Ranges -----------------------------------------------------------------------------------------------------------

BAD = [(MoCoRecipe, dict(tau=0.)), (MoCoRecipe, dict(m=2)), (MoCoRecipe, dict(lr=math.nan)),
       (MoCoRecipe, dict(lr=math.inf)), (MoCoRecipe, dict(lr=-1.)), (MoCoRecipe, dict(epochs=0)),
       (MoCoRecipe, dict(epochs=1.5)), (MoCoRecipe, dict(queue=0)),
       (MoCoRecipe, dict(batch=1)), (MoCoRecipe, dict(clip=0.)), (MoCoRecipe, dict(accumulate=0)),
       (MoCoRecipe, dict(size=(64,))), (MoCoRecipe, dict(size=5)), (MoCoRecipe, dict(bn='none')),
       (MoCoRecipe, dict(augment=None)), (MoCoRecipe, dict(arch=['resnet10'])), (MoCoRecipe, dict(compile=1)),
       (Recipe, dict(instances=-2)), (Recipe, dict(epochs=True)), (Recipe, dict(batch=7)), (Recipe, dict(lr=None)),
       (Recipe, dict(smoothing=1.1)), (Recipe, dict(warmup=-.1)), (Recipe, dict(drops=(.5,2))),
       (Recipe, dict(drops=.5)),
       (Recipe, dict(cosine=(1.,.1))), (Recipe, dict(cosine=(.1,))), (Recipe, dict(stripes=())),
       (Recipe, dict(stripes=(1.5,))), (Recipe, dict(width=0)), (Recipe, dict(ema=1.)), (Recipe, dict(erase=math.nan)),
       (Recipe, dict(pad=-1)), (Recipe, dict(pool='max')), (Recipe, dict(stats='market')), (Recipe, dict(freeze=9)),
       (Recipe, dict(margin=-1.)), (Recipe, dict(decay=-1.)),
       (Run, dict(steps=-1)), (Run, dict(minutes=math.nan)), (Run, dict(save_every=-1.)), (Run, dict(workers=-1)),
       (Run, dict(seed=-1)), (Run, dict(seed=2**64)), (Run, dict(validate_every=0)), (Run, dict(precision='int8')),
       (Run, dict(watch=3))]

@pytest.mark.parametrize('kind,field', BAD, ids=lambda x: '' if isinstance(x, type) else str(x))
def test_a_field_out_of_its_range_is_named(kind, field):
    with pytest.raises(BadInput) as e: kind(**field)
    name, = field
    assert str(e.value).startswith(name) and '\n' not in str(e.value)

def test_none_where_it_means_something():
    assert Recipe(margin=None).margin is None and Recipe(width=None)
    assert MoCoRecipe(queue=None) and Run(minutes=math.inf)

WORDS = ['64x32','17x33','resnet10','gem','after','adamw','track','video','device','shuffle','64x','²x³']
WILD = (st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.floats(-.5, 1.5)
        | st.text(max_size=5) | st.sampled_from(WORDS)
        | st.lists(st.integers(-1, 40) | st.floats(-.5, 1.5), max_size=3).map(tuple))

@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_value_is_taken_or_refused_in_one_line(data):
    kind = data.draw(st.sampled_from([MoCoRecipe, Recipe, Run]))
    some = data.draw(st.lists(st.sampled_from(fields(kind)), min_size=1, max_size=3))
    changes = {f.name: data.draw(WILD) for f in some}
    made = one_line(kind, **changes)
    assert isinstance(made, (str,kind))
    text = ' '.join(f'{k}={v}' for k,v in changes.items() if ' ' not in str(v))
    if kind is not Run: one_line(change_recipe, kind(), text)

def tried(kind, draw):
    "A recipe that differs in some fields and is taken, its numbers small enough for a test."
    small = dict(
        epochs=st.integers(1, 3), batch=st.integers(2, 40), queue=st.integers(1, 9), accumulate=st.integers(1, 9),
        instances=st.integers(0, 9), stripes=st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple),
        width=st.integers(1, 64), size=st.sampled_from([(64,32), (17,33), (16,16), '33x20']), compile=st.just(False),
        arch=st.sampled_from(['osnet_x0_25','resnet10_x0_5','resnet10_x0_5_ibn','osnet_ain_x1_0']))
    names = draw(st.lists(st.sampled_from(fields(kind)), min_size=1, max_size=3, unique_by=lambda f: f.name))
    values = {f.name: draw(small.get(f.name, WILD)) for f in names}
    return {k: v for k,v in values.items() if isinstance(one_line(kind, **{k: v}), kind)}

@pytest.mark.long
@pytest.mark.parametrize('kind', [MoCoRecipe, Recipe])
def test_what_is_taken_runs_or_is_refused_in_one_line(kind, store, market, tmp_path):
    bench,count = training_set(market),[0]
    @given(st.data())
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test(data):
        count[0] += 1
        how,out = {**TUNE, 'steps': 2, **tried(kind, data.draw)},tmp_path/str(count[0])
        if kind is Recipe: made = one_line(finetune, bench, out=out, **how)
        else: made = one_line(pretrain, store, out, **how)
        assert isinstance(made, str) or load_checkpoint(made)[1]['step']>0, how
        if isinstance(made, str) and 'diverged' not in made: assert not out.exists(), (how, made)
    test()

@pytest.mark.parametrize('how,words', [
    (dict(batch=17), 'batch=17 with instances=4.* 16 or 20'), (dict(batch=8, instances=16), '32 or 48'),
    (dict(softmax=0., triplet=0.), 'softmax=0 and triplet=0'), (dict(size=(32,32), stripes=(1,2,3)), 'too low for 3'),
    (dict(size=(16,16), arch='resnet10_x0_5_ibn'), 'too small for'), (dict(validate=-1), 'validate=-1'),
    (dict(device='cuda:99'), 'not on this machine'), (dict(device='banana'), 'not on this machine')], ids=str)
def test_what_does_not_go_together(market, tmp_path, how, words):
    with pytest.raises(BadInput, match=words): finetune(market, out=tmp_path/'out', **{**TUNE, **how})
    assert not (tmp_path/'out').exists()

def test_batches_of_moco_that_cannot_be(store, tmp_path):
    for how,words in ((dict(accumulate=8), 'accumulate 8.* one crop'), (dict(batch=100), '100 from 64 crops'),
                      (dict(arch='osnet_ain_x1_0', size='16x16'), 'too small')):
        with pytest.raises(BadInput, match=words): pretrain(store, tmp_path/'out', **{**MOCO, **how})
    assert not (tmp_path/'out').exists()

def test_a_recipe_is_a_name_or_a_recipe():
    for other in (5, None, Run(), MoCoRecipe()):
        with pytest.raises(BadInput, match='a name, or a Recipe'): get_recipe(RECIPES, other)

@pytest.mark.parametrize('text', ['lr='+'('*5000, 'lr='+'9'*9999, 'epochs='+'-'*9999+'1', 'lr=1e999', 'lr=nan',
                                  'drops=(1,'*500], ids=lambda t: t[:9])
def test_hostile_text_of_a_change(text):
    with pytest.raises(BadInput) as e: change_recipe(Recipe(), text)
    assert '\n' not in str(e.value)

def test_why_there_is_nothing_to_train_on(market, tmp_path):
    "The notes of the reader stand in the line: here are pictures, but none with a label."
    root = tmp_path/'set'
    shutil.copytree(market, root)
    for f in (root/'bounding_box_train').iterdir(): f.rename(f.with_name(f'x{f.name}'))
    with pytest.raises(BadInput, match='no labelled pictures to train on; .*no labels in their names'):
        training_set(root)

# --- Shared memory ----------------------------------------------------------------------------------------------------

def small_shm(size, *cmd):
    "Run a command where /dev/shm holds that much, in a mount namespace of its own."
    words = ' '.join(map(str, cmd))
    inside = f'mount -t tmpfs -o size={size} none /dev/shm && exec {words}'
    if subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode: pytest.skip('no right to mount here')
    return subprocess.run(['unshare', '-m', 'sh', '-c', inside], capture_output=True, text=True, timeout=600)

@pytest.mark.parametrize('name', ['reid_finetune','reid_pretrain'])
@pytest.mark.parametrize('size', ['4k','500k'])
def test_little_shared_memory_is_named(name, size, store, market, tmp_path):
    exe,data = Path(sys.executable).parent/name,market if name=='reid_finetune' else store
    args = [exe, data, '--arch', 'osnet_x0_25', '--size', '256x128', '--batch', 32, '--steps', 1, '--epochs', 2,
            '--out']
    p = small_shm(size, *args, tmp_path/'a', '--workers', 2)
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode==2 and last.startswith(f'{name}: 2 loader processes') and '--workers 0' in last, p.stderr
    assert 'Traceback' not in p.stderr
    p = small_shm('500k', *args, tmp_path/'a', '--workers', 0)
    assert p.returncode==0 and 'step 1' in p.stdout, p.stderr

def test_a_broken_picture_is_one_line_from_a_loader_process_too(market, tmp_path):
    root = tmp_path/'set'
    shutil.copytree(market, root)
    for f in (root/'bounding_box_train').iterdir(): f.write_bytes(b'no picture')
    for workers in (0, 2):
        with pytest.raises(BadInput) as e: finetune(root, out=tmp_path/str(workers), workers=workers, **TUNE)
        assert 'not a picture that can be read' in str(e.value) and '\n' not in str(e.value)
        assert str(e.value).startswith(str(root))

# --- Two at once ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['moco','reid'])
def test_the_second_is_told_and_a_kill_frees_it(kind, store, market, tmp_path):
    module,f = ('test_moco','pretrain') if kind=='moco' else ('test_finetune','finetune')
    data = store if kind=='moco' else market
    kw = {**TUNE, 'epochs': 4000}
    def train(**more): return (pretrain(data, tmp_path, **kw, **more) if kind=='moco' else
                               finetune(data, out=tmp_path, **kw, **more))
    code = f'from {module} import {f}; {f}({str(data)!r}, out={str(tmp_path)!r}, save_every=0, **{kw!r})'
    first = subprocess.Popen([sys.executable, '-c', code], cwd=Path(__file__).parent, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_step(tmp_path/f'{kind}.session.pt', 1, first)
        start = time.monotonic()
        with pytest.raises(BadInput, match=f'{tmp_path}: another process is writing it'): train()
        assert time.monotonic()-start<30 and first.poll() is None
    finally: first.send_signal(signal.SIGKILL); first.communicate()
    step = StateFiles(tmp_path, kind).read()['step']    # killed between two files, it has the one before
    assert load_checkpoint(train(steps=1))[1]['step']==step+1

def test_one_export_at_a_time(tmp_path):
    out = tmp_path/'new'/'net.onnx'
    out.parent.mkdir()
    with lock(out):
        with pytest.raises(BadInput, match='another process is writing it'): export_onnx(SMALL, out)
    assert not out.exists()

# --- Checkpoints of others --------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def donor():
    torch.manual_seed(5)
    return build_backbone('osnet_x0_25').state_dict()

def arrives(path, donor):
    "Whether all of the weights are taken, bit by bit."
    net = build_backbone('osnet_x0_25')
    table = transfer_weights(net, path, show=False)
    return table.share==1 and all(torch.equal(v, donor[k]) for k,v in net.state_dict().items())

def test_torchreids_own_checkpoint(donor, tmp_path, caplog, capsys):
    "Written by its own function, with the NumPy numbers that it keeps, and as its DataParallel names things."
    from torchreid.reid.utils import save_checkpoint as theirs
    caplog.set_level(logging.INFO)
    weights = {f'module.{k}': v for k,v in donor.items()} | {'module.classifier.weight': torch.zeros(7, 512)}
    state = dict(state_dict=weights, epoch=60, rank1=np.float64(.942),
                 optimizer=dict(state={}, param_groups=[dict(lr=np.float32(1e-3))]),
                 seen=np.int64(12936), best=np.bool_(True))
    theirs(state, str(tmp_path))
    assert arrives(tmp_path/'model.pth.tar-60', donor)
    n = len([k for k in donor if 'num_batches' not in k])
    assert f'{n} tensors taken, 1 not (module.classifier.weight' in caplog.text

@pytest.mark.parametrize('prefix', ['', 'module.', 'base.', 'module.base.', 'backbone.', 'net.', 'encoder.',
                                    'module.encoder_q.', 'model.backbone.', 'a.b.c.'])
@pytest.mark.parametrize('nest', [(), ('state_dict',), ('net',), ('model',), ('state_dict_ema',), ('teacher',),
                                  ('checkpoint',), ('checkpoint','state_dict')], ids=str)
def test_nests_and_prefixes(donor, prefix, nest, tmp_path):
    state = {prefix+k: v for k,v in donor.items()}
    for name in reversed(nest): state = {name: state, 'epoch': 3}
    torch.save(state, tmp_path/'x.pth')
    assert arrives(tmp_path/'x.pth', donor)

@pytest.mark.parametrize('good,other', [
    ('module.encoder_q.','module.encoder_k.'), ('module.base_encoder.','module.momentum_encoder.'),
    ('teacher.backbone.','student.backbone.')])
def test_of_two_encoders_the_right_one(donor, good, other, tmp_path):
    still = {other+k: torch.zeros_like(v) for k,v in donor.items()}
    torch.save(still | {good+k: v for k,v in donor.items()}, tmp_path/'x.pth')
    assert arrives(tmp_path/'x.pth', donor)

def test_a_moving_average_goes_before(donor, tmp_path):
    still = {k: torch.zeros_like(v) for k,v in donor.items()}
    torch.save({'state_dict': still, 'state_dict_ema': donor}, tmp_path/'x.pth')
    assert arrives(tmp_path/'x.pth', donor)

def test_foreign_safetensors(donor, market, tmp_path, capsys):
    path = tmp_path/'x.safetensors'
    safetensors.torch.save_file({f'trunk.{k}': v for k,v in donor.items()}, path, {'format': 'pt'})
    assert arrives(path, donor) and read_weights(path)[1]=={}
    ckpt = finetune(market, init=path, out=tmp_path/'out', steps=0, **TUNE)
    assert torch.equal(load_checkpoint(ckpt)[0]['backbone.conv1.conv.weight'], donor['conv1.conv.weight'])
    with pytest.raises(BadInput, match='no settings inside'): load_model(path)

def test_too_few_are_refused(donor, tmp_path):
    some = list(donor.items())
    torch.save(dict(some[:len(some)//2]), tmp_path/'half.pth')
    torch.save({'x.'+k: v for k,v in some[:9]}, tmp_path/'few.pth')
    torch.save({k: v.to(torch.int8) for k,v in some}, tmp_path/'whole_numbers.pth')
    torch.save({0: torch.zeros(2), 'a': torch.zeros(2).to_sparse()}, tmp_path/'odd.pth')
    net = build_backbone('osnet_x0_25')
    before = {k: v.clone() for k,v in net.state_dict().items()}
    for name,words in dict(half='do not fit', few='no name fits', whole_numbers='no name fits',
                           odd='no tensors').items():
        with pytest.raises(BadInput, match=words): transfer_weights(net, tmp_path/f'{name}.pth', show=False)
    with pytest.raises(BadInput, match='no name fits'):
        transfer_weights(net, tmp_path/'few.pth', partial=True, show=False)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

class Bomb:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call

@pytest.mark.parametrize('call', [(open, ('bomb-went-off','w')), (os.system, ('touch bomb-went-off',)),
                                  (eval, ('1+1',)), (np.load, ('x',)), (np.dtype, ('O',)),
                                  (getattr, ('','upper'))], ids='open system eval load dtype getattr'.split())
def test_code_does_not_run(donor, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for state in ({'state_dict': donor, 'epoch': Bomb(*call)}, Bomb(*call)):
        torch.save(state, tmp_path/'x.pth')
        got = one_line(read_weights, tmp_path/'x.pth')
        assert isinstance(got, str) or call[0] is np.dtype
        (tmp_path/'y.pth').write_bytes(pickle.dumps(state))
        assert isinstance(one_line(read_weights, tmp_path/'y.pth'), str)
    assert not (tmp_path/'bomb-went-off').exists()

def test_only_numbers_of_numpy(tmp_path):
    for odd in (np.str_('x'), np.datetime64('2020'), np.zeros(3), np.array([object()]), np.void(b'ab')):
        torch.save({'a': torch.zeros(2), 'odd': odd}, tmp_path/'x.pth')
        with pytest.raises(BadInput, match='not opened'): read_weights(tmp_path/'x.pth')

# --- Damaged checkpoints ----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def doors(tmp_path_factory):
    "A folder with one whole file of each kind, and what reads it."
    root = tmp_path_factory.mktemp('doors')
    tensors,meta = load_checkpoint(SMALL)
    save_checkpoint(root/'x.safetensors', tensors, meta)
    torch.save({'state_dict': tensors, 'rank1': np.float64(.9)}, root/'x.pth')
    shutil.copy(SMALL.with_suffix('.thresholds.json'), root/'y.thresholds.json')
    shutil.copy(SMALL, root/'y.safetensors')
    session(root).save()
    return root

def session(root):
    s = Session(root, 'z', {'lr': 1})
    s.resume(net=torch.nn.Linear(3, 2), opt=torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], .1, momentum=.9))
    return s

READERS = {'x.safetensors': [load_checkpoint, load_model, read_weights], 'x.pth': [read_weights],
           'y.thresholds.json': [lambda p: read_thresholds(p.with_name('y.safetensors'))],
           'z.session.pt': [lambda p: session(p.parent), read_state]}

def read(path):
    for f in READERS[path.name]: one_line(f, path)

@pytest.mark.parametrize('name', READERS)
def test_any_damage_is_a_result_or_one_line(doors, name):
    path = doors/name
    whole = path.read_bytes()
    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test(data):
        how = data.draw(st.sampled_from(['cut','flip','zeros','other','twice','head']))
        at,n,bit = [data.draw(st.integers(*ends)) for ends in ((0, len(whole)-1), (1, 200), (1, 255))]
        if data.draw(st.booleans()): at %= 400   # most of what can go wrong is at the beginning
        damaged = dict(cut=whole[:at], flip=whole[:at] + bytes([whole[at] ^ bit]) + whole[at+1:],
                       zeros=whole[:at] + bytes(n) + whole[at+n:], other=data.draw(st.binary(max_size=300)),
                       twice=whole[:at] + whole, head=data.draw(st.binary(min_size=8, max_size=8)) + whole[8:])[how]
        path.write_bytes(damaged)
        read(path)
        for f in path.parent.glob('z.session.before.pt'): f.unlink()
    try: test()
    finally: path.write_bytes(whole)

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=3),
                    max_leaves=6)

@given(st.data())
@settings(max_examples=150, deadline=None)
def test_settings_of_any_kind(doors, data):
    "A value of the header is replaced, or taken out: a model, or one line."
    path = doors/'x.safetensors'
    whole,(tensors,meta) = path.read_bytes(),load_checkpoint(path)
    inner = data.draw(st.booleans())
    place = meta['model'] if inner else meta
    outer = ['arch','size','mean','std','kind','model','classes','settings']
    key,numbers = data.draw(st.sampled_from(sorted(place) if inner else outer)),st.floats() | st.integers()
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON | st.integers(-2, 10**9) | st.lists(numbers, max_size=3))
    else: del place[key]
    try:
        safetensors.torch.save_file(tensors, path, {'reid_nb': json.dumps(meta)})
        read(path)
    finally: path.write_bytes(whole)

@given(st.data())
@settings(max_examples=150, deadline=None)
def test_thresholds_of_any_kind(doors, data):
    path = doors/'y.thresholds.json'
    whole = path.read_bytes()
    known = json.loads(whole)
    place = data.draw(st.sampled_from([known, known['thresholds'], known['thresholds']['0.01'], known['scores']]))
    key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()): place[data.draw(st.just(key) | st.text(max_size=4))] = data.draw(JSON)
    else: del place[key]
    try:
        path.write_text(json.dumps(known))
        got = one_line(read_thresholds, path.with_name('y.safetensors'))
        if not isinstance(got, str):
            for rate,t in got['thresholds'].items():
                assert 0<float(rate)<1 and t['low']<=t['high'] and math.isfinite(t['high']-t['low'])
    finally: path.write_bytes(whole)

@pytest.mark.parametrize('text', ['', '[]', '1', 'null', '['*100_000, '\ud800',
                                  '{"thresholds": 1, "checkpoint_digest": ""}'], ids=lambda t: t[:9])
def test_thresholds_that_are_other_things(doors, tmp_path, text):
    ckpt = shutil.copy(SMALL, tmp_path/'a.safetensors')
    (tmp_path/'a.thresholds.json').write_bytes(text.encode(errors='surrogatepass'))
    with pytest.raises(BadInput, match='a.thresholds.json: damaged') as e: read_thresholds(ckpt)
    assert '\n' not in str(e.value) and sha256(ckpt)==sha256(SMALL)

def test_huge_headers(tmp_path):
    path = tmp_path/'x.safetensors'
    head = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    for size in (2**63, 2**40, 2**27, 100, len(head)):
        path.write_bytes(size.to_bytes(8, 'little') + head)
        with pytest.raises(BadInput, match='not a whole safetensors file'): load_checkpoint(path)
    tensors,meta = load_checkpoint(SMALL)
    for name,value in (('classes',10**9), ('width',10**9), ('stripes',[10**6])):
        change = {name: value} if name=='classes' else dict(model=meta['model'] | {name: value})
        save_checkpoint(path, tensors, meta | change)
        with pytest.raises(BadInput, match='settings are damaged'): load_model(path)
    save_checkpoint(path, tensors, meta | dict(arch='resnet10'))
    with pytest.raises(BadInput, match='do not belong together'): load_model(path)

def test_a_session_of_another_program(tmp_path):
    s = session(tmp_path)
    whole = read_state(s.files.newest)
    for change in (dict(parts={}), dict(parts=[1]), dict(random={}), dict(step='x'), dict(settings=[1]),
                   dict(history=None), dict(parts={'net': {'weight': torch.zeros(9)}, 'opt': {}})):
        torch.save(whole | change, s.files.newest)
        got = one_line(session, tmp_path)
        assert isinstance(got, str) or 'history' in change or 'step' in change, change
