"Views and devices: parameters drawn as torchvision draws them, the two renderers against its own functions, input."
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision import transforms as T
from torchvision.transforms import functional as tv

from reid_nb.parts.core import BadInput
from reid_nb.parts.core import rng_of
from reid_nb.parts.device import autocast, pick_precision, to_input
from reid_nb.parts.augment import (
    Augment, AUGMENTS, color_maps, crop_batches, middle_box, pack_pairs, random_box, render, render_batch,
    render_pairs, tabulate, to_canvas, View, ViewPairs)
from reid_nb.parts.training import prefetch

def render_exact(img, view, size, fill=(128,128,128)):
    "Render one view number for number as torchvision does from a tensor."
    x = tv.resized_crop(torch.from_numpy(img).permute(2,0,1), *view.box, size, antialias=True)
    jitters = tv.adjust_brightness,tv.adjust_contrast,tv.adjust_saturation,tv.adjust_hue
    for i in view.order if view.jitter else (): x = jitters[i](x, view.jitter[i])
    if view.gray: x = tv.rgb_to_grayscale(x, 3)
    if view.sigma: x = tv.gaussian_blur(x, max(13, 2*math.ceil(3*view.sigma)+1), view.sigma)
    if view.flip: x = tv.hflip(x)
    if view.erase: x = tv.erase(x, *view.erase, torch.tensor(fill).view(3,1,1).to(x))
    return x.permute(1,2,0).numpy()

def test_the_oracle_is_torchvisions_pipeline():
    "Its parameters come from one generator, one after another: the same seed draws them again."
    size,img = (128,64),np.random.default_rng(0).integers(0, 255, (100,50,3), np.uint8)
    pipeline = T.Compose([T.RandomResizedCrop(size, (.2,1)), T.ColorJitter(.4,.4,.4,.1),
                          T.GaussianBlur(13), T.RandomHorizontalFlip()])
    def drawn(x):
        box = T.RandomResizedCrop.get_params(x, [.2,1], [3/4,4/3])
        order,*jitter = T.ColorJitter.get_params(*[(.6,1.4)]*3, (-.1,.1))
        sigma = T.GaussianBlur.get_params(.1, 2)
        return View(box, jitter, tuple(order.tolist()), sigma=sigma, flip=bool(torch.rand(1)<.5))
    x = torch.from_numpy(img).permute(2,0,1)
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = pipeline(x).permute(1,2,0).numpy()
        torch.manual_seed(seed)
        assert (render_exact(img, drawn(x), size)==theirs).all()

def test_every_crop_once_an_epoch():
    steps = list(crop_batches(20, 4, 0, 10, seed=3))
    for epoch in (0,1):
        got = [p for b in steps[5*epoch:5*epoch+5] for p in b]
        assert {e for e,_ in got}=={epoch} and sorted(i for _,i in got)==list(range(20))

@pytest.mark.parametrize('how', AUGMENTS)
def test_views_of_odd_crops(how):
    aug = Augment((64,32), **AUGMENTS[how])
    for shape in ((1,1,3), (200,3,3), (3,200,3), (500,200,3)):
        img = np.full(shape, 99, np.uint8)
        for i in range(20): assert render(img, aug.draw(shape[:2], rng_of(i)), (64,32)).shape==(64,32,3)

@pytest.mark.parametrize('hw', [(128,64), (40,100), (50,50)])
def test_boxes_are_drawn_as_torchvision_draws_them(hw):
    "Means and spreads of place and size over 4,000 draws agree within four standard errors."
    scale, ratio, img = (.2, 1), (3/4, 4/3), torch.zeros(3, *hw)
    torch.manual_seed(0)
    theirs = np.array([T.RandomResizedCrop.get_params(img, scale, ratio) for _ in range(4000)])
    rng = rng_of('boxes')
    ours = np.array([random_box(hw, rng, scale, ratio) or middle_box(hw, ratio) for _ in range(4000)])
    error = np.hypot(ours.std(0), theirs.std(0))/4000**.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4*error).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=.08, atol=.3)

def test_the_fallback_is_torchvisions():
    for hw in ((300,20), (20,300), (64,64)):
        torch.manual_seed(0)
        got = T.RandomResizedCrop.get_params(torch.zeros(3, *hw), (1,1), (3/4,4/3))
        assert middle_box(hw, (3/4,4/3))==got

@pytest.mark.parametrize('name,odds', [('gray',.2), ('sigma',.5), ('flip',.5), ('erase',.5), ('jitter',0)])
def test_odds(name, odds):
    aug, rng = Augment((64,32), **AUGMENTS['luperson']), rng_of('odds')
    hits = np.mean([bool(getattr(aug.draw((100,50), rng), name)) for _ in range(4000)])
    assert abs(hits - odds)<.035

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 200), st.sampled_from(sorted(AUGMENTS)))
def test_two_renderers_agree_with_torchvision(seed, h, w, how):
    "The same parameters on a smooth picture; without hue, which torchvision turns in another colour space."
    # Colours that never clip: torchvision clips after each of its steps, and rounds down in each.
    y, x = np.mgrid[:h,:w]
    img = np.stack([80+60*y/h, 140-60*x/w, 110+30*np.sin(y/9)], 2).astype(np.uint8)
    view = Augment((64,32), **AUGMENTS[how]).draw((h,w), rng_of(seed))
    if view.jitter: view = view._replace(jitter=(*view.jitter[:3], 0))
    fast, exact = [f(img, view, (64,32)).astype(int) for f in (render, render_exact)]
    batch = render_batch(to_canvas([torch.zeros(3,7,9).byte(), torch.from_numpy(img).permute(2,0,1)]),
                         tabulate([View((0,0,7,9)), view]), (64,32))[1].numpy()
    assert np.abs(fast - batch).mean()<1.5 and np.abs(fast - exact).mean()<4

def packed(how, n=12):
    "Smooth pictures of several sizes as a loader would hand them over, and their colours."
    aug,items = Augment((64,32), **AUGMENTS[how]),[]
    for i in range(n):
        y, x = np.mgrid[:90+i,:40+2*i]
        img = np.stack([80+y, 200-x, 110+30*np.sin(y/9+i)], 2).astype(np.uint8)
        views = [aug.draw(img.shape[:2], rng_of(i, k)) for k in (0,1)]
        items.append(([cv2.imencode('.jpg', img)[1].tobytes()], views, i))
    return aug, pack_pairs(items)

@pytest.mark.parametrize('how', AUGMENTS)
def test_a_gpu_draws_what_a_cpu_draws(how, cuda):
    aug, batch = packed(how)
    here, there = render_pairs(batch, aug), render_pairs(batch, aug, cuda)
    assert there.is_cuda and (there.cpu().int() - here.int()).abs().float().mean()<2

def test_pairs_need_no_store():
    "Pictures, or bytes with sizes: the same parameters either way, and a crop with no track is its own mate."
    r = np.random.default_rng(0)
    imgs = [r.integers(0, 255, (40+i,20,3), np.uint8) for i in range(6)]
    jpegs = [cv2.imencode('.png', im[...,::-1])[1].tobytes() for im in imgs]
    aug,tracks = Augment((32,16), **AUGMENTS['luperson']),np.array([0,0,1,1,-1,-1])
    here = ViewPairs(imgs, aug, 3, tracks, range(6))
    there = ViewPairs(jpegs, aug, 3, tracks, range(6), [im.shape[:2] for im in imgs])
    for i in range(6):
        (pair,place),(data,views,same) = here[1,i],there[1,i]
        assert len(data)==(2 if i<4 else 1) and data[0]==jpegs[i] and place==same==i
        which = [imgs[jpegs.index(d)] for d in data]
        assert all((render(which[k], v, aug.size)==pair[k]).all() for k,v in zip((0,-1), views))

def test_a_broken_crop_is_named():
    aug, batch = packed('luperson')
    batch['data'][batch['ends'][3]:batch['ends'][4]] = 0
    with pytest.raises(BadInput, match='a crop is broken'): render_pairs(batch, aug)

def test_prefetched_batches_are_whole_and_in_order(cuda):
    def prepare(i): return torch.full((2000,2000), i, device=cuda).cumsum(0), None
    for i,(x,none) in enumerate(prefetch(range(30), prepare, cuda)):
        assert none is None and (x[-1]==2000*i).all()
    assert i==29
    for x,_ in prefetch(iter(range(10**9)), prepare, cuda): break   # who stops early is not held up
    def fails(i): return (torch.full((2,), 1/(3-i), device=cuda),)
    with pytest.raises(ZeroDivisionError): assert len([*prefetch(range(9), fails, cuda)])

def test_unknown_precision():
    with pytest.raises(BadInput, match='choose one of fp32, bf16, fp16'): autocast(torch.device('cpu'), 'int8')

def test_a_gpu_without_bf16_takes_fp16(monkeypatch):
    for has,want in ((True,'bf16'), (False,'fp16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has)
        assert pick_precision(torch.device('cuda'))==want
    assert pick_precision(torch.device('cuda'), 'fp32')=='fp32'

def test_input_of_a_slice_is_that_of_a_copy():
    x = torch.randint(0, 255, (4,2,8,6,3), dtype=torch.uint8)
    a, b = to_input(x[:,1], (.3,.4,.5), (.2,.2,.3)), to_input(x[:,1].clone(), (.3,.4,.5), (.2,.2,.3))
    want = (x[:,1].permute(0,3,1,2)/255 - torch.tensor([.3,.4,.5]).view(3,1,1))/torch.tensor([.2,.2,.3]).view(3,1,1)
    assert torch.equal(a, b) and torch.allclose(a, want, atol=1e-5)
    assert a.is_contiguous(memory_format=torch.channels_last)

def test_a_third_of_a_turn_makes_red_green():
    "Hue is a fraction of the whole circle, and turns as torchvision turns it."
    A, _ = color_maps(View((0,0,1,1), jitter=(1,1,1,1/3)))
    assert np.allclose(A @ [1,0,0], [0,1,0], atol=1e-9) and np.allclose(A @ [.5,.5,.5], .5)
    img = np.full((8,8,3), (200,40,40), np.uint8)
    turned = render_exact(img, View((0,0,8,8), jitter=(1,1,1,1/3)), (8,8))[0,0]
    assert turned.argmax() == render(img, View((0,0,8,8), jitter=(1,1,1,1/3)), (8,8))[0,0].argmax() == 1
