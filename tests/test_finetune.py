"Weights that arrive or are refused, recipes, resuming, and one epoch on real people."
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from reid_nb.parts.models import build_backbone
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.metrics import chance, rank
from reid_nb.parts.core import BadInput
from reid_nb import finetune as finetuning
from reid_nb.parts.weights import embed, load_model
from reid_nb.finetune import score, Trainer
from reid_nb.parts.supervised import pk_batches, RECIPES, take_labels, TrainImages, training_set
from reid_nb.parts.weights import load_checkpoint, save_checkpoint
from reid_nb.parts.training import change_recipe, read_state, Run
from reid_nb.parts.weights import read_weights, transfer_weights

FAST = dict(arch='osnet_x0_25', epochs=3, batch=16, size=(64,32), device='cpu')

def finetune(data, recipe='bot', **kw):
    "The same with the fields of `Run` among those of the recipe."
    run = Run(**{f.name: kw.pop(f.name) for f in fields(Run) if f.name in kw})
    return finetuning.finetune(data, recipe, run=run, **kw)

@pytest.fixture(scope='module')
def donor(): return build_backbone('resnet10').state_dict()

def same(a, b):
    a,b = load_checkpoint(a)[0],load_checkpoint(b)[0]
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('prefix', ['module.encoder_q.', 'encoder_q.', 'backbone.', 'module.', 'model.', ''])
def test_known_prefixes(donor, prefix, tmp_path):
    torch.save({'state_dict': {prefix+k: v for k,v in donor.items()}, 'epoch': 3}, tmp_path/'a.pth')
    model = build_backbone('resnet10')
    table = transfer_weights(model, tmp_path/'a.pth', show=False)
    assert table.prefix==prefix and table.share==1 and not table.missing
    assert all(torch.equal(v, donor[k]) for k,v in model.state_dict().items())

def test_encoder_q_and_not_encoder_k(donor, tmp_path):
    both = {f'module.encoder_{e}.{k}': v.float()*(e=='q') for e in 'kq' for k,v in donor.items()}
    torch.save({'state_dict': both}, tmp_path/'moco.pth')
    model = build_backbone('resnet10')
    transfer_weights(model, tmp_path/'moco.pth', show=False)
    assert torch.equal(model.conv1.weight, donor['conv1.weight'])

def test_torchvision_and_torchreid(tmp_path):
    import torchreid.reid.models as models
    import torchvision
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path/'tv.pth')
    table = transfer_weights(build_backbone('resnet50'), tmp_path/'tv.pth', show=False)
    assert table.share==1 and table.unexpected==['fc.weight','fc.bias']
    osnet = models.build_model('osnet_x0_25', num_classes=7, pretrained=False)
    torch.save({'state_dict': {f'module.{k}': v for k,v in osnet.state_dict().items()}}, tmp_path/'os.pth')
    assert transfer_weights(build_backbone('osnet_x0_25'), tmp_path/'os.pth', show=False).share==1

def test_old_files_without_batch_counters(donor, tmp_path):
    torch.save({k: v for k,v in donor.items() if 'num_batches' not in k}, tmp_path/'old.pth')
    assert transfer_weights(build_backbone('resnet10'), tmp_path/'old.pth', show=False).share==1

class Bomb:
    def __reduce__(self): return open, ('bomb-went-off','w')

def spoil(donor, how, path):
    if how=='prefix': torch.save({f'net_{k}': v for k,v in donor.items()}, path)
    if how=='head': torch.save({'fc.weight': torch.zeros(9,512), 'fc.bias': torch.zeros(9)}, path)
    if how=='deeper': torch.save(build_backbone('resnet18').state_dict(), path)
    if how=='shallower': torch.save({k: v for k,v in donor.items() if not k.startswith('layer4')}, path)
    if how=='wider': torch.save({k: v for k,v in build_backbone('resnet50').state_dict().items()}, path)
    if how=='nothing': torch.save([1,2,3], path)
    if how in ('cut','bomb'): torch.save(donor, path)
    if how=='cut': path.write_bytes(path.read_bytes()[:100_000])
    if how=='bomb': path.write_bytes(pickle.dumps({'state_dict': Bomb()}))

@pytest.mark.parametrize('how,why', dict(prefix='no name fits', head='no name fits', deeper='another network',
    shallower='do not fit', wider='do not fit', nothing='no tensors', cut='not opened', bomb='not opened').items())
def test_refused_with_the_reason(donor, how, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(donor, how, tmp_path/'x.pth')
    model = build_backbone('resnet10')
    before = model.conv1.weight.clone()
    with pytest.raises(BadInput, match=why) as e: transfer_weights(model, tmp_path/'x.pth', show=False)
    assert 'x.pth' in str(e.value) and '\n' not in str(e.value)
    assert torch.equal(before, model.conv1.weight) and not Path('bomb-went-off').exists()

def test_partial_when_told(donor, tmp_path, capsys):
    spoil(donor, 'shallower', tmp_path/'x.pth')
    table = transfer_weights(build_backbone('resnet10'), tmp_path/'x.pth', partial=True)
    assert 0<table.share<1 and all(n.startswith('layer4') for n in table.missing)
    assert 'layer4' in capsys.readouterr().out

def test_pk_batches_hold_p_people_k_times(caplog):
    samples = [(f'{p}_{i}', p, 0) for p in range(20) for i in range(2+p%7)]
    for batch in pk_batches(samples, 16, 4, 0, 30, seed=1):
        assert sorted(Counter(samples[i][1] for _,i in batch).values())==[4]*4
    assert len({k for b in pk_batches(samples, 16, 4, 0, 30) for k,_ in b})==30*16
    assert not caplog.text
    list(pk_batches(samples, 8, 4, 0, 1))
    assert 'only 2 identities' in caplog.text

def test_share_of_labels(market):
    train = read_benchmark('market_folder', market).train
    few = take_labels(train, .5)
    assert {s.pid for s in few}=={0,1,2,3} and len(few)==24
    assert few==take_labels(train, .5) and few!=take_labels(train, .5, seed=2)
    for labels in (0, 1.5, .1):
        with pytest.raises(BadInput): take_labels(train, labels)

def test_images_depend_on_key_and_seed_only(market):
    train = take_labels(read_benchmark('market_folder', market).train)
    a,b = [TrainImages(train, (64,32), RECIPES['bot'], (9,9,9), seed) for seed in (0,1)]
    assert (a[5,2]['img']==a[5,2]['img']).all() and a[5,2]['img'].shape==(64,32,3)
    assert (a[5,2]['img']!=a[6,2]['img']).any() and (a[5,2]['img']!=b[5,2]['img']).any()

@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_learn(market, tmp_path, recipe):
    large = recipe in ('sbs','mgn')
    arch,dim = ('resnet10',512) if large else ('osnet_x0_25',128)
    how = replace(RECIPES[recipe], instances=min(4, RECIPES[recipe].instances))   # 8 people are too few for 16 each
    ckpt = finetune(market, how, out=tmp_path, **{**FAST, 'epochs': 12 if large else 6, 'arch': arch})
    history = load_checkpoint(ckpt)[1]['history']
    assert all(np.isfinite(h['loss']) for h in history)
    assert np.mean([h['loss'] for h in history[-3:]]) < np.mean([h['loss'] for h in history[:3]])
    model,meta = load_model(ckpt)
    assert model.dim==(2048 if recipe=='mgn' else dim) and meta['model']['pool']==how.pool
    paths = [s.path for s in read_benchmark('market_folder', market).query]
    assert embed(model, meta, paths).shape==(24, model.dim)

def test_published_recipes():
    "The figures of fast-reid and LUPerson that a recipe stands for."
    bot,sbs,mgn = [RECIPES[n] for n in ('bot','sbs','mgn')]
    assert (bot.epochs, bot.batch//bot.instances, bot.size, bot.margin)==(120, 16, (256,128), .3)
    assert (sbs.epochs, sbs.batch//sbs.instances, sbs.size, sbs.margin)==(60, 4, (384,128), None)
    assert np.allclose([sbs.lr_at(s, 6000) for s in (0,1000,3000,4500,6000)],
                       [3.5e-5, 3.5e-4, 3.5e-4, (3.5e-4+7.7e-7)/2, 7.7e-7])
    assert np.allclose([bot.lr_at(s, 1200) for s in (0,100,399,400,899,900)],
                       [3.5e-6, 3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6])
    assert mgn.stripes==(1,2,3) and mgn.width==256 and not mgn.autoaug and mgn.circle and not mgn.nonlocals

def test_nonlocals_need_a_resnet(market, tmp_path):
    with pytest.raises(BadInput, match='ResNet'): finetune(market, 'sbs', out=tmp_path, **FAST)

def test_only_the_heads_learn_at_first(market, tmp_path):
    kw = dict(FAST, arch='resnet10', epochs=8)
    whole = 8*3
    finetune(market, 'mgn', out=tmp_path, steps=whole//6, **kw)
    def state(): return read_state(tmp_path/'reid.session.pt')['parts']['model']
    tensors = state()
    torch.manual_seed(0)
    first = build_backbone('resnet10').state_dict()
    def now(t): return {k.removeprefix('backbone.'): v for k,v in t.items() if k.startswith('backbone.')}
    assert all(torch.equal(v, first[k]) for k,v in now(tensors).items())
    assert tensors['heads.0.neck.num_batches_tracked']==whole//6
    finetune(market, 'mgn', out=tmp_path, steps=1, **kw)
    tensors = state()
    assert not torch.equal(now(tensors)['conv1.weight'], first['conv1.weight'])

def test_moving_average_is_the_result(market, tmp_path):
    kw = dict(FAST, epochs=1)
    recipe = replace(RECIPES['bot'], ema=.5)
    states = []
    for steps in (1,2,3):
        finetune(market, recipe, out=tmp_path, steps=1, **kw)
        tensors = (read_state(tmp_path/'reid.session.pt')['parts']['model'] if steps<3
                   else load_checkpoint(tmp_path/'reid.safetensors')[0])
        states.append(tensors['backbone.conv1.conv.weight'])
    plain = finetune(market, out=tmp_path/'plain', **kw)
    last = load_checkpoint(plain)[0]['backbone.conv1.conv.weight']
    assert torch.allclose(states[2], .25*states[0] + .25*states[1] + .5*last, atol=1e-6)

ALL = dict(recipe=replace(RECIPES['mgn'], ema=.9, clip=1.), arch='resnet10')

@pytest.mark.parametrize('how', [dict(precision='fp16'), ALL], ids=['fp16','mgn'])
def test_everything_goes_on(market, tmp_path, how):
    kw = {**FAST, 'epochs': 2, **how}
    finetune(market, out=tmp_path/'parts', steps=2, **kw)
    assert same(finetune(market, out=tmp_path/'parts', **kw), finetune(market, out=tmp_path/'whole', **kw))

def test_clipping(market, tmp_path):
    "A gradient of next to no length changes next to nothing that Adam does not divide by it again: so look at it."
    seen,real = [],torch.nn.utils.clip_grad_norm_
    def clip(parameters, longest):
        parameters = list(parameters)
        real(parameters, longest)
        seen.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
        finetune(market, replace(RECIPES['bot'], clip=.01), out=tmp_path, **{**FAST, 'epochs': 1})
    assert seen and max(seen)<=.0101

def test_validation_is_on_people_of_the_training_part(market, tmp_path, monkeypatch):
    ckpt = finetune(market, out=tmp_path, validate=3, validate_every=2, **{**FAST, 'batch': 8, 'epochs': 4})
    meta = load_checkpoint(ckpt)[1]
    lines = [h for h in meta['history'] if 'val_mAP' in h]
    assert meta['classes']==5 and len(lines)==2 and lines[-1]['step']==meta['step']
    assert all(0<=h['val_mAP']<=1 for h in lines)

def test_change_of_a_recipe():
    bot = RECIPES['bot']
    new = change_recipe(bot, 'lr=1e-3 drops=() cosine=(.1,1e-6) margin=None neck=False epochs=3')
    assert (new.lr, new.drops, new.cosine, new.margin, new.neck, new.epochs)==(1e-3, (), (.1,1e-6), None, False, 3)
    assert change_recipe(bot, None)==bot
    assert change_recipe(bot, 'arch=osnet_x0_25 size=128x64 pool="gem"').size==(128,64)
    for text in ('cake=1','lr','lr=','lr=fast','neck=1','epochs=1.5','drops=3','lr=__import__("os").getcwd()'):
        with pytest.raises(BadInput): change_recipe(bot, text)

def test_extra_bn_is_for_weights_without_labels(market, tmp_path):
    w = {f'backbone.{k}': v for k,v in build_backbone('resnet10').state_dict().items()}
    about = dict(arch='resnet10', size=[64,32], mean=[.1,.2,.3], std=[.4,.5,.6], digest='x')
    for kind,names in dict(moco=3, reid=0).items():
        init = save_checkpoint(tmp_path/f'{kind}.safetensors', w, dict(about, kind=kind))
        ckpt = finetune(market, 'mgn', init=init, out=tmp_path/kind, epochs=1, batch=16, device='cpu')
        tensors = load_checkpoint(ckpt)[0]
        assert len({k.split('.')[1] for k in tensors if k.startswith('norms.')})==names

def test_protocols_to_train_on(tmp_path):
    "CUHK03 in its three forms from a .mat like the published one, and a wrong split."
    from test_benchmarks import PEOPLE, write_cuhk03
    root = write_cuhk03(tmp_path/'cuhk03_release')
    bench = training_set(root, 'cuhk03_classic_labeled', 7)
    assert len({s.pid for s in bench.train})==sum(PEOPLE)-3
    bench = training_set(root, 'cuhk03_classic_detected', 2)
    ckpt = finetune(bench, out=tmp_path/'out', **{**FAST, 'epochs': 1})
    assert load_checkpoint(ckpt)[1]['classes']==sum(PEOPLE)-3
    with pytest.raises(BadInput, match='0 to 19'): training_set(root, 'cuhk03_classic_labeled', 20)
    with pytest.raises(BadInput, match='unknown protocol'): training_set(root, 'cuhk04')

def test_torchreids_reader_gives_the_same_lists(market, tmp_path):
    from torchreid.reid.data.datasets.image.market1501 import Market1501
    shutil.copytree(market, tmp_path/'market1501')
    theirs,ours = Market1501(str(tmp_path), verbose=False),read_benchmark('market_folder', market)
    for part,rows in dict(train=take_labels(ours.train), query=ours.query, gallery=ours.gallery).items():
        a = sorted((Path(r[0]).name, r[1], r[2]+1) for r in getattr(theirs, part))
        assert a==sorted((s.path.name, s.pid, s.camid) for s in rows)

def test_torchreid_is_what_trains(market, tmp_path, monkeypatch):
    "Every step is taken inside torchreid's own loop, on batches of its sampler, by its network."
    from torchreid.reid import models
    from torchreid.reid.data import ImageDataset
    from torchreid.reid.data.sampler import RandomIdentitySampler
    from torchreid.reid.engine.engine import Engine
    calls,inside = Counter(),[]
    def count(owner, name):
        real = getattr(owner, name)
        def counted(*args, **kw):
            calls[name] += 1
            inside.append(name)
            try: return real(*args, **kw)
            finally: inside.pop()
        monkeypatch.setattr(owner, name, counted)
    for owner,name in ((Engine,'train'), (RandomIdentitySampler,'__iter__'), (ImageDataset,'get_num_pids'),
                       (models,'build_model')): count(owner, name)
    within,step = [],Trainer.train_batch
    def train_batch(self, data):
        within.append(list(inside))
        return step(self, data)
    monkeypatch.setattr(Trainer, 'train_batch', train_batch)
    finetune(market, out=tmp_path, **FAST)
    assert within==[['train']]*9 and 'train' not in vars(Trainer) and 'run' not in vars(Trainer)
    assert calls['train']==1 and calls['build_model']==1 and calls['__iter__']>=3 and calls['get_num_pids']

def test_torchreids_evaluation_agrees(market, whole):
    from torchreid.reid.metrics import compute_distance_matrix, evaluate_rank
    bench,(model,meta) = read_benchmark('market_folder', market),load_model(whole)
    qf,gf = [embed(model, meta, [s.path for s in part]) for part in (bench.query, bench.gallery)]
    dist = compute_distance_matrix(torch.tensor(qf), torch.tensor(gf), 'cosine').numpy()
    rows = [np.array([s[k] for s in part]) for k in (1,2) for part in (bench.query, bench.gallery)]
    cmc,mAP = evaluate_rank(dist, *rows, use_cython=False)
    ours = rank(bench, qf, gf).figures()
    assert abs(mAP-ours['mAP'])<1e-6 and abs(cmc[0]-ours['rank1'])<1e-6

@pytest.fixture(scope='module')
def whole(market, tmp_path_factory): return finetune(market, out=tmp_path_factory.mktemp('whole'), **FAST)

@pytest.mark.long
def test_kill_and_resume(market, whole, tmp_path):
    "kill -9 right after the state of step 4 was written; the end equals the uninterrupted run, bit for bit."
    code = f"""if 1:
        import os, signal
        from test_finetune import finetune
        from reid_nb.parts.training import Session
        write = Session.save
        def save(self):
            write(self)
            if self.step==4: os.kill(os.getpid(), signal.SIGKILL)
        Session.save = save
        finetune({str(market)!r}, out={str(tmp_path)!r}, save_every=0, **{FAST!r})"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert p.returncode==-signal.SIGKILL, p.stderr
    assert not (tmp_path/'reid.safetensors').exists()
    assert read_state(tmp_path/'reid.session.pt')['step']==4
    assert same(whole, finetune(market, out=tmp_path, **FAST))

@pytest.mark.parametrize('precision', [None,'fp16'])
def test_a_gpu_goes_on(market, tmp_path, cuda, precision):
    kw = dict(FAST, epochs=6, device=None, workers=2, precision=precision)
    finetune(market, out=tmp_path, steps=3, **kw)
    assert read_state(tmp_path/'reid.session.pt')['step']==3
    end = finetune(market, out=tmp_path, **kw)
    history = load_checkpoint(end)[1]['history']
    assert [x['step'] for x in history]==list(range(1,19)) and np.isfinite([x['loss'] for x in history]).all()
    bench = read_benchmark('market_folder', market)
    assert score(end, bench).figures()['mAP'] > chance(bench)['mAP']

def test_steps_stop_and_go_on(market, whole, tmp_path):
    finetune(market, out=tmp_path, steps=3, **FAST)
    assert read_state(tmp_path/'reid.session.pt')['step']==3
    assert same(whole, finetune(market, out=tmp_path, **FAST))

def test_global_random_states_are_left_alone(market, tmp_path):
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
    with pytest.raises(BadInput, match='is a session'): load_model(tmp_path/'reid.session.pt')

def test_statistics_travel(market, tmp_path):
    torch.manual_seed(0)
    w = {f'backbone.{k}': v for k,v in build_backbone('osnet_x0_25').state_dict().items()}
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
    assert not [f for f in tiny_disk.rglob('*') if f.suffix in ('.safetensors','.pt','.tmp')]

def test_read_weights_says_what_is_missing(tmp_path):
    with pytest.raises(BadInput, match='no weights at'): read_weights(tmp_path/'none.pth')

@pytest.mark.long
def test_real_people(run, data, tmp_path):
    "One epoch on CUHK03's first camera pair: the figures rise above chance on people never seen."
    root = data/'cuhk03_p1'
    p = run('reid_finetune', root, '--epochs', 1, '--batch', 32, '--size', '96x48', '--arch', 'resnet10_x0_5',
            '--change', 'lr=2e-3 drops=() cosine=(.1,1e-6) start=.1', '--out', tmp_path)
    assert p.returncode==0, p.stderr
    bench,(model,meta) = read_benchmark('cuhk03_p1', root),load_model(tmp_path/'reid.safetensors')
    scores = rank(bench, *[embed(model, meta, [s.path for s in part]) for part in (bench.query, bench.gallery)])
    figures,random = scores.figures(),chance(bench)
    print(figures, random)
    assert figures['mAP'] > 2*random['mAP'] and figures['rank1'] > 2*random['rank1']
