"""Is the training wired as it says? Spies and tiny inputs, no training to convergence, seconds in all.

Each test dies when one wire is wrong; `tests/benchmarks/faults.py` cuts them one by one and looks whether it does."""
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid_nb import finetune as finetuning
from reid_nb.parts import models
from reid_nb import moco as moco_
from reid_nb.parts.align import apply_fit, choose_fit, score_offsets
from reid_nb.parts.models import IBN
from reid_nb.biometrics import decide, rank_people
from reid_nb.parts.benchmarks import Benchmark, Protocol, read_benchmark, Sample
from reid_nb.parts.metrics import score_counts
from reid_nb.parts.core import decode
from reid_nb.crop_store import CropDataset, CropStore, pack
from reid_nb.parts.core import BadInput, encode_jpeg
from reid_nb.parts.detect import yolo_boxes
from reid_nb.parts.detections import Dets
from reid_nb.parts.metrics import operating_points, select_part, split_people
from reid_nb.parts.supervised import alter, pk_batches, RECIPES
from reid_nb.parts.gallery import Gallery
from reid_nb.parts.models import ReidModel
from reid_nb.moco import MoCo, train_step
from reid_nb.parts.pretraining import lr_at, view_loader
from reid_nb.parts.tracks import Matcher, Shot, Template, Track
from reid_nb.parts.weights import load_checkpoint
from reid_nb.parts.training import read_state, Run
from reid_nb.parts.core import rng_of
from reid_nb.parts.augment import Augment, crop_batches, View, ViewPairs

HOW = dict(arch='osnet_x0_25', epochs=2, batch=8, size=(64,32), optimizer='sgd')
CPU = Run(device='cpu', precision='fp32')

def pretrain(store, out, **kw): return moco_.pretrain(store, out, run=CPU, **kw)
MOVING = {'running_mean','running_var','num_batches_tracked'}

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "32 crops: two videos with four tracks each, four crops a track, every crop of a colour of its own."
    root = tmp_path_factory.mktemp('wiring')
    for i in range(32):
        img = np.full((64,32,3), rng_of('tint', i).integers(20, 200, 3), np.uint8)
        img += rng_of('crop', i).integers(0, 50, (64,32,3), np.uint8)
        path = root/f'crops/alba/porto/v{i//16:010d}/{i//4:06d}_{i:07d}_00.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), img)
    return pack(root/'crops', root/'crops.lmdb').path

@pytest.fixture
def steps(monkeypatch):
    "What reaches each `train_step` of MoCo: rate, both views, places; and which weights came out."
    seen,real = [],moco_.train_step
    def spy(net, opt, x_q, x_k, places=None, *rest):
        before = [p.detach().clone() for p in net.encoder_q.parameters()]
        out = real(net, opt, x_q, x_k, places, *rest)
        moved = max((p.detach()-b).abs().max().item() for p,b in zip(net.encoder_q.parameters(), before))
        seen.append(SimpleNamespace(lr=opt.param_groups[0]['lr'], x_q=x_q.clone(), x_k=x_k.clone(), places=places,
                                    moved=moved, rest=rest))
        return out
    monkeypatch.setattr(moco_, 'train_step', spy)
    return seen

@pytest.fixture
def unaltered(monkeypatch):
    "Views that are the crop as it is."
    monkeypatch.setattr(Augment, 'draw', lambda self, hw, rng: View((0,0,*hw)))

# --- MoCo -------------------------------------------------------------------------------------------------------------

def test_the_rate_is_the_schedules_and_moves_the_weights(store, tmp_path, steps):
    pretrain(store, tmp_path, lr=.08, **HOW)
    assert [s.lr for s in steps] == [lr_at(i, 8, 8, .08) for i in range(8)]
    assert max(s.lr for s in steps) == pytest.approx(.08*8/256)    # linear scaling by the batch (Goyal 2017)
    assert all(s.moved > 0 for s in steps)

def test_the_precision_is_in_the_checkpoint(store, market, tmp_path):
    assert load_checkpoint(pretrain(store, tmp_path, **HOW))[1]['precision'] == 'fp32'
    assert load_checkpoint(tune(market, tmp_path))[1]['precision'] == 'fp32'

def test_rate_zero_moves_nothing(store, tmp_path, steps):
    "The control of every claim that pre-training teaches: only the batch statistics move."
    end = pretrain(store, tmp_path, lr=0., **HOW)
    assert not any(s.moved for s in steps)
    torch.manual_seed(0)
    first,last = models.build_backbone(HOW['arch']).state_dict(),load_checkpoint(end)[0]
    still = {k: torch.equal(v, last[f'backbone.{k}']) for k,v in first.items()}
    assert {k.split('.')[-1] for k,same in still.items() if not same} <= MOVING

def test_two_views_of_one_crop_differ(store, tmp_path, steps):
    pretrain(store, tmp_path/'a', **HOW)
    assert all((a-b).abs().mean() > .05 for s in steps for a,b in zip(s.x_q, s.x_k))

def test_two_views_belong_together(store, unaltered):
    pairs = ViewPairs(CropDataset(CropStore(store)), Augment((64,32)))
    assert all((a==b).all() for a,b in (pairs[0,i][0] for i in range(8)))

def test_keys_are_of_the_second_view(monkeypatch):
    torch.manual_seed(0)
    net = MoCo(tiny(), K=8, dim=8, bn='frozen').train()
    asked = {}
    for name in ('keys','forward'):
        def spy(x, *rest, name=name, real=getattr(net, name)):
            asked[name] = x
            return real(x, *rest)
        monkeypatch.setattr(net, name, spy)
    x_q,x_k = torch.randn(4,3,16,8),torch.randn(4,3,16,8)
    train_step(net, torch.optim.SGD(net.encoder_q.parameters(), .1), x_q, x_k, precision='fp32')
    assert torch.equal(asked['keys'], x_k) and torch.equal(asked['forward'], x_q)

def tiny(w=8):
    net = nn.Sequential(nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU())
    net.dim = w
    return net

def tiny_with_halves():
    "What `halves` can cut"
    net = nn.Sequential(tiny(), nn.Conv2d(8, 8, 1), nn.ReLU())
    net.dim = 8
    return net

def gradients(**kw):
    "Of one step, as the optimiser sees them"
    torch.manual_seed(0)
    net,seen = MoCo(tiny(), K=16, dim=8, bn='frozen').train(),[]
    weights = list(net.encoder_q.parameters())
    opt = torch.optim.SGD(weights, .1)
    opt.register_step_pre_hook(lambda *a: seen.append(torch.cat([p.grad.flatten() for p in weights])))
    train_step(net, opt, torch.randn(8,3,16,8), torch.randn(8,3,16,8), precision='fp32', **kw)
    return seen[0]

def test_pieces_add_up_to_the_batch(): assert torch.allclose(gradients(), gradients(accumulate=4), atol=1e-6)

def test_no_gradient_is_left_for_the_next_step():
    torch.manual_seed(0)
    net = MoCo(tiny(), K=16, dim=8, bn='frozen').train()
    opt = torch.optim.SGD(net.encoder_q.parameters(), .1)
    train_step(net, opt, torch.randn(8,3,16,8), torch.randn(8,3,16,8), precision='fp32')
    assert not any(p.grad is not None and p.grad.any() for p in net.encoder_q.parameters())

def test_the_queue_is_a_ring():
    net = MoCo(tiny(), K=6, dim=8)
    keys = [torch.full((2,8), float(i)) for i in range(4)]
    for i,k in enumerate(keys): net.enqueue(k, torch.tensor([i,i]))
    assert net.queue[0].tolist() == [3,3,1,1,2,2] and net.places.tolist() == [3,3,1,1,2,2] and net.ptr == 2

def test_a_long_gradient_is_cut():
    whole,cut = gradients(),gradients(clip=1e-3)
    assert whole.norm() > .01 and cut.norm() == pytest.approx(1e-3, rel=1e-3)
    assert torch.allclose(cut/cut.norm(), whole/whole.norm(), atol=1e-4)

def test_options_reach_the_step(store, tmp_path, steps):
    pretrain(store, tmp_path, clip=.5, accumulate=2, **HOW)
    assert all(s.rest[-2:] == (2,.5) for s in steps)

def test_only_keys_of_the_same_video_count():
    "Loss by hand, over the keys whose place is the query's."
    torch.manual_seed(0)
    net = MoCo(tiny(), K=6, dim=8, tau=.2, bn='frozen').train()
    net.places = torch.tensor([0,0,1,1,2,-1])
    x,places = torch.randn(3,3,16,8),torch.tensor([0,1,2])
    k = net.keys(x.flip(3))
    with torch.no_grad():
        q = F.normalize(net.encoder_q(x), dim=1)
        own = ((q*k).sum(1)/.2).exp()
        others = torch.stack([(q[i]@net.queue[:,net.places==p]/.2).exp().sum() for i,p in enumerate(places)])
        assert net(x, k, places)[0] == pytest.approx(-(own/(own+others)).log().mean().item(), rel=1e-5)

def test_the_places_are_the_crops_videos(store, tmp_path, steps):
    pretrain(store, tmp_path, negatives='video', augment='luperson', **HOW)
    crops = CropDataset(CropStore(store))
    order = [j for b in crop_batches(32, 8, 0, 8) for _,j in b]
    videos = np.unique(crops.store.videos, return_inverse=True)[1]
    got = torch.cat([s.places for s in steps]).numpy()
    assert len(set(got)) == 2 and len({*zip(got, videos[order])}) == 2

def test_a_track_is_a_positive(store, unaltered):
    crops = CropDataset(CropStore(store))
    loader = view_loader(crops, Augment((64,32)), crop_batches(32, 8, 0, 4), positives='track')
    order = [j for b in crop_batches(32, 8, 0, 4) for _,j in b]
    seconds = np.concatenate([views[:,1].numpy() for views,_ in loader])
    for i,second in zip(order, seconds):
        mate = next(j for j in range(32) if (second==crops[j]).all())
        assert mate != i and crops.store.tracks[mate] == crops.store.tracks[i]

def test_the_input_has_mean_0_and_deviation_1(store, tmp_path, steps, unaltered):
    pretrain(store, tmp_path, **{**HOW, 'epochs': 1})
    x = torch.cat([s.x_q for s in steps])
    assert x.mean((0,2,3)).abs().max() < .02 and (x.std((0,2,3))-1).abs().max() < .02

# --- Fine-tuning ------------------------------------------------------------------------------------------------------

def tune(market, out, recipe='bot', run=CPU, **kw):
    how = dict(arch='osnet_x0_25', epochs=3, batch=16, size=(64,32), **kw)
    return finetuning.finetune(market, recipe, out=out, run=run, **how)

@pytest.fixture
def passes(monkeypatch):
    "Rate and batch of each step of fine-tuning, and whether weights moved."
    seen,real = [],finetuning.Trainer.forward_backward
    def spy(self, data):
        w = self.model.backbone.conv1.conv.weight
        before = w.detach().clone()
        out = real(self, data)
        seen.append(SimpleNamespace(lr=[g['lr'] for g in self.opt.param_groups], img=data['img'].clone(),
                                    pid=data['pid'].tolist(), moved=(w.detach()-before).abs().max().item()))
        return out
    monkeypatch.setattr(finetuning.Trainer, 'forward_backward', spy)
    return seen

def test_every_step_has_the_recipes_rate(market, tmp_path, passes):
    tune(market, tmp_path)
    recipe = replace(RECIPES['bot'], epochs=3)
    assert [s.lr for s in passes] == [[recipe.lr_at(i, 9)] for i in range(9)]
    assert all(s.moved > 0 for s in passes)

def test_epochs_draw_other_batches(market, tmp_path, passes):
    tune(market, tmp_path)
    epochs = [torch.cat([s.img for s in passes[i:i+3]]) for i in (0,3,6)]
    assert not any(torch.equal(a, b) for a,b in zip(epochs, epochs[1:]))
    samples = [(f'{p}_{i}', p, 0) for p in range(8) for i in range(6)]
    orders = [[k for b in pk_batches(samples, 16, 4, s, s+2) for _,k in b] for s in (0,2,4)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(crop_batches(9, 3, 0, 3)) != [[(0,j) for _,j in b] for b in crop_batches(9, 3, 3, 6)]

def test_erasing_paints_the_fill_over_2_to_40_per_cent():
    recipe,fill = replace(RECIPES['bot'], erase=1., pad=0),(7,99,201)
    img = np.tile(np.arange(64, dtype=np.uint8)[:,None,None], (1,32,3))    # mirroring changes nothing
    shares = []
    for i in range(200):
        out = alter(img, rng_of('erase', i), recipe, fill)
        painted = (out==fill).all(2)
        assert (out[~painted]==img[~painted]).all()
        shares.append(painted.mean())
    assert min(s for s in shares if s) > .015 and .3 < max(shares) < .42 and np.mean(shares) > .15

def test_ibn_normalises_each_picture_in_its_first_half():
    torch.manual_seed(0)
    x = torch.randn(4,6,8,8) + 5*torch.randn(4,6,1,1)
    y = IBN(6).train()(x)
    assert torch.allclose(y[:,:3], F.instance_norm(x[:,:3]), atol=1e-5)
    assert torch.allclose(y[:,3:], F.batch_norm(x[:,3:], None, None, training=True), atol=1e-5)

def test_the_embedding_is_behind_the_neck():
    torch.manual_seed(0)
    model = ReidModel(tiny_with_halves(), 4).eval()
    nn.init.zeros_(model.heads[0].neck.weight)
    assert not model.embed(torch.randn(2,3,32,16)).any()

def test_training_begins_with_the_given_weights(store, market, tmp_path):
    init = pretrain(store, tmp_path/'moco', **{**HOW, 'epochs': 1})
    tune(market, tmp_path, run=replace(CPU, steps=0), init=init)
    began = read_state(tmp_path/'reid.session.pt')['parts']['model']
    given = {k: v for k,v in load_checkpoint(init)[0].items() if not k.endswith('num_batches_tracked')}
    assert len(given) > 50 and all(torch.equal(began[k], v) for k,v in given.items())

def test_the_moving_average_is_the_result(market, tmp_path, monkeypatch):
    kept,real = [],finetuning.Trainer.fit
    def fit(self, *a): kept.append(self); return real(self, *a)
    monkeypatch.setattr(finetuning.Trainer, 'fit', fit)
    end = load_checkpoint(tune(market, tmp_path, replace(RECIPES['bot'], ema=.9)))[0]
    name = 'backbone.conv1.conv.weight'
    assert torch.equal(end[name], kept[0].ema.module.state_dict()[name])
    assert not torch.equal(end[name], kept[0].model.state_dict()[name])

# --- Elsewhere --------------------------------------------------------------------------------------------------------

RED = np.full((64,32,3), (250,10,10), np.uint8)

def test_crops_with_no_name_are_of_no_track(tmp_path):
    (tmp_path/'crops').mkdir()
    for name in ('a', 'b', '000007_0000001_00'): cv2.imwrite(str(tmp_path/'crops'/f'{name}.jpg'), RED)
    store = pack(tmp_path/'crops', tmp_path/'crops.lmdb')
    assert dict(zip(store.keys.tolist(), store.tracks.tolist())) == {b'000007_0000001_00': 0, b'a': -1, b'b': -1}

def test_a_distractor_is_in_the_gallery_and_junk_is_not(market, tmp_path):
    shutil.copytree(market, tmp_path/'set')
    for name in ('0000_c1s1_000001_00.jpg', '-1_c1s1_000001_00.jpg'):
        cv2.imwrite(str(tmp_path/'set'/'bounding_box_test'/name), RED)
    assert {s.pid for s in read_benchmark('market_folder', tmp_path/'set').gallery} == {0,11,12,13,14}

def test_red_stays_red_in_the_store(tmp_path):
    path = tmp_path/'crops/alba/porto/v0000000000/000001_0000001_00.jpg'
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), RED[...,::-1])
    rgb = CropDataset(pack(tmp_path/'crops', tmp_path/'crops.lmdb'))[0]
    assert rgb[...,0].min() > 200 and rgb[...,1:].max() < 60

def test_red_stays_red_in_a_crop():
    rgb = decode(encode_jpeg(RED))
    assert rgb[...,0].min() > 200 and rgb[...,1:].max() < 60

def test_a_detector_sees_bgr(tmp_path, monkeypatch):
    "Ultralytics takes arrays as BGR; a stub of its class writes down what it is shown."
    shown = []
    class YOLO:
        names = {0: 'normal', 1: 'dog'}
        def __init__(self, weights, task=None): pass
        def predict(self, img, classes, **kw):
            shown.append((img.copy(), classes))
            data = torch.tensor([[1.,2,3,4,.9,0]])
            return [SimpleNamespace(boxes=SimpleNamespace(data=data))]
    import ultralytics
    monkeypatch.setattr(ultralytics, 'YOLO', YOLO)
    yolo_boxes.cache_clear()
    with pytest.raises(BadInput, match='stub.pt::normal'): yolo_boxes('stub.pt')
    assert yolo_boxes('stub.pt::normal')(RED)[0,:4].tolist() == [1,2,3,4]
    yolo_boxes.cache_clear()
    img,classes = shown[0]
    assert (img == RED[...,::-1]).all() and classes == [0]

def test_alignment_shifts_the_boxes_to_the_video(tmp_path, monkeypatch):
    "Boxes that were written down one frame late, on a copy of half the height, go back to where the person is."
    from reid_nb.parts import align
    def truth(i): return np.array([[40.+8*i, 20, 100+8*i, 180]], np.float32)
    frames, noise = np.arange(1, 30), rng_of('boxes').normal(0, 1, (29,4)).astype(np.float32)
    d = Dets('LUPerson-NL', frames, 0*frames, 0*frames, np.concatenate([truth(i-1)/2 for i in frames])+noise,
             np.ones(len(frames), np.float32), 360)
    class Frame(int):
        def __len__(self): return 720
    monkeypatch.setattr(align, 'read_frames', lambda video, wanted: ((i, Frame(i)) for i in sorted(wanted)))
    fit = choose_fit(*score_offsets('video', d, lambda frame: truth(int(frame))))
    assert (fit.height, fit.lines, fit.offset) == (720, 360, -1) and fit.iou > .9
    mended = apply_fit(d, fit)
    for i,box in zip(mended.frame, mended.box): assert np.allclose(box, truth(i)[0], atol=7)

def test_the_best_template_speaks_for_a_person(tmp_path):
    unit = np.eye(4, dtype=np.float32)
    def template(*features):
        shots = [Shot(k, (0,0,8,16), quality=1., crop=np.zeros((16,8,3), np.uint8)) for k in range(len(features))]
        return Template(shots, np.stack(features))
    gallery = Gallery(tmp_path, Matcher(None, 'digest', {'0.01': dict(threshold=.5, low=.4, high=.6)}), create=True)
    for who,features in dict(Ada=(unit[0], unit[1]), Bruno=(.8*unit[0]+.6*unit[2],)).items():
        for f in features: gallery.add(who, template(f), 'drawn')
    assert [n for n,_ in gallery.nearest(unit[0])] == ['Ada','Bruno']
    assert dict(gallery.nearest(unit[0])) == pytest.approx(dict(Ada=1., Bruno=.8), abs=1e-6)
    ranking = rank_people(template(unit[0]), gallery, 'Ada')
    said = decide(Track(1, [(0, (0,0,8,16))]), template(unit[0]), ranking, 'Ada', {}, gallery, (.4,.6), np.arange(3.))
    assert (said.answer, said.score) == ('match', pytest.approx(1.))

def test_thresholds_are_checked_on_people_who_did_not_choose_them():
    "The half that does not choose is made of people who look alike: there the threshold must fail, and say so."
    samples = [[Sample(Path(f'{p}_{c}.jpg'), p, c) for p in range(1,41)] for c in (1,2)]
    bench = Benchmark([], *samples, 'digest', [], (), Protocol('toy', None))
    chooses = split_people(bench, 0)[0][0]
    features = rng_of('features').normal(size=(40,16))
    features[~chooses] += 3
    found = operating_points(bench, features, features, times=10)['0.01']
    a,b = [score_counts(*select_part(bench, features, features, half)) for half in split_people(bench, 0)]
    def fmr(counts):
        return counts.impostor.sum(0)[counts.edges[:-1]>=found['threshold']-1e-9].sum()/counts.impostor.sum()
    assert fmr(a) <= .01 and fmr(b) > .5 and found['fmr'] == pytest.approx(fmr(b), abs=1e-6)
