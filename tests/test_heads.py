"Losses against plain loops, GeM and MGN against their definitions, and what a head may not change."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_nb.parts.models import build_backbone, halves, NonLocal
from reid_nb.parts.models import CircleSoftmax, GeM, Head, reid_loss, ReidModel, triplet

BATCHES = st.tuples(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 4), st.sampled_from([.3, 1., None]))

def batch_of(seed, people, each, dim=5):
    r = torch.Generator().manual_seed(seed)
    return torch.randn(people*each, dim, generator=r).double(), torch.arange(people).repeat_interleave(each)

@given(BATCHES)
@settings(max_examples=60, deadline=None)
def test_triplet_equals_plain_loops(batch):
    seed, people, each, margin = batch
    x, y = batch_of(seed, people, each)
    losses = []
    for a in range(len(x)):
        far = [math.dist(x[a], x[b]) for b in range(len(x)) if y[a] == y[b]]
        near = [math.dist(x[a], x[b]) for b in range(len(x)) if y[a] != y[b]]
        gap = max(far) - min(near)
        losses.append(math.log1p(math.exp(gap)) if margin is None else max(0, gap + margin))
    assert triplet(x, y, margin).item() == pytest.approx(np.mean(losses), rel=1e-6, abs=1e-9)

@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from([(64., .35), (5., .1)]))
@settings(max_examples=40, deadline=None)
def test_circle_equals_plain_loops(seed, classes, how):
    (s, m), (x, _) = how, batch_of(seed, 4, 1)
    y = torch.arange(4) % classes
    circle = CircleSoftmax(5, classes, s, m).double()
    z, cos = circle(x, y)
    for i in range(4):
        for j in range(classes):
            w = circle.weight[j].detach()
            c = float(x[i] @ w/(x[i].norm()*w.norm()))
            want = s*max(0, 1 + m - c)*(c - (1 - m)) if j == y[i] else s*max(0, c + m)*(c - m)
            assert z[i, j].item() == pytest.approx(want, abs=1e-6*s) and cos[i, j].item() == pytest.approx(c)

def test_circle_pulls_the_right_class_up():
    torch.manual_seed(0)
    circle, x, y = CircleSoftmax(8, 5), torch.randn(20, 8, requires_grad=True), torch.arange(20) % 5
    opt = torch.optim.SGD([x, circle.weight], .01)
    before = circle(x, y)[1]
    for _ in range(200):
        opt.zero_grad(); F.cross_entropy(circle(x, y)[0], y).backward(); opt.step()
    after = circle(x, y)[1]
    assert (after.argmax(1) == y).float().mean() > max(.9, (before.argmax(1) == y).float().mean())

def test_gem_between_mean_and_maximum():
    x = torch.rand(3, 4, 6, 2)
    assert torch.allclose(GeM(1.)(x), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(GeM(400.)(x.double()), x.amax((2, 3)).double(), rtol=.02)
    gem = GeM()
    gem(x).sum().backward()
    assert gem.p.grad.abs() > 0

def test_half_precision_goes_through_gem_and_circle():
    with torch.autocast('cpu', torch.bfloat16):
        assert GeM()(torch.rand(2, 3, 4, 2).bfloat16()).dtype == torch.float32
        assert CircleSoftmax(3, 2)(torch.rand(2, 3).bfloat16(), torch.tensor([0, 1]))[0].dtype == torch.float32

def test_label_smoothing_by_hand():
    z, y = torch.tensor([[2., 0., -1.]]), torch.tensor([0])
    logp = z.log_softmax(1)[0]
    want = -(.9*logp[0] + .1*logp.mean())
    assert reid_loss([z], [], y, weight=0.).item() == pytest.approx(want.item(), rel=1e-6)

def test_bnneck_normalises_without_bias():
    torch.manual_seed(0)
    head = Head(6, 4)
    sides = head.sides(torch.randn(32, 6, 4, 2))
    assert not head.neck.bias.requires_grad and head.classifier.bias is None
    assert torch.allclose(sides['after'].mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(sides['after'].std(0, correction=0), torch.ones(6), atol=1e-2)
    assert Head(6, 4, neck=False).classifier.bias is not None

def test_mgn_stripes_see_their_own_rows():
    "Behind its branch, a stripe's head depends on its rows of the map and on no others."
    torch.manual_seed(0)
    model = ReidModel(build_backbone('resnet10'), stripes=(1, 2, 3), width=16).eval()
    assert len(model.heads) == 8 and model.dim == 128 and len(model.twins) == 2
    (whole,), halved, thirds = model.maps(torch.randn(1, 3, 96, 32))
    rows = [m.shape[2] for m in (whole, *halved, *thirds)]
    assert rows == [6] + [6, 3, 3] + [6, 2, 2, 2]
    assert torch.equal(torch.cat(halved[1:], 2), halved[0]) and torch.equal(torch.cat(thirds[1:], 2), thirds[0])

@pytest.mark.parametrize('arch', ['resnet10', 'resnet18_ibn', 'osnet_x0_25'])
def test_twins_begin_as_copies_and_go_their_own_way(arch):
    torch.manual_seed(0)
    model = ReidModel(build_backbone(arch), 3, stripes=(1, 2, 3), width=8)
    own = halves(model.backbone)[1].state_dict()
    for twin in model.twins:
        assert all(torch.equal(v, own[k]) for k, v in twin.state_dict().items())
    logits, vectors, _ = model(torch.randn(6, 3, 64, 32), torch.arange(6) % 3)
    assert len(logits) == 8 and len(vectors) == 5
    reid_loss(logits, vectors, torch.arange(6) % 3).backward()
    grads = [next(m.parameters()).grad for m in (halves(model.backbone)[1], *model.twins)]
    assert not torch.equal(grads[0], grads[1]) and not torch.equal(grads[1], grads[2])

def test_nonlocal_is_the_sum_over_all_cells():
    torch.manual_seed(0)
    block, x = NonLocal(4).double().eval(), torch.randn(2, 4, 3, 2).double()
    torch.nn.init.ones_(block.out[1].weight)
    theta, phi, g = [f(x).flatten(2) for f in (block.theta, block.phi, block.g)]
    pairs = torch.einsum('bci,bcj->bij', theta, phi)/6
    y = torch.einsum('bij,bcj->bci', pairs, g).view(2, 2, 3, 2)
    assert torch.allclose(block(x), x + block.out(y))
