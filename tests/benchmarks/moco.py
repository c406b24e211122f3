"""MoCo beside lightly's modules, in one run: one step, and the whole path from a store to the optimiser.

    pip install lightly
    python tests/benchmarks/moco.py [--arch resnet10] [--size 128x64] [--batch 64] [--steps 20] [--repeats 3]
    python tests/benchmarks/moco.py --store crops.lmdb [--arch resnet50] [--size 256x128] [--batch 256] [--steps 100]
                                    [--workers 16] [--compile]

The first form compares steps on crops that are in memory already, same encoder and batch: images a second and peak
memory. lightly is driven as its documentation shows it (memory bank, shuffled batch, momentum update), in the memory
format that it is given by default and in channels_last. On a CPU each contestant runs in processes of its own, in
turn, so that peak memory is its own.

The second form measures the whole path, from the JPEGs in a store to the optimiser's step, and the share of the time
in which the GPU (or, without one, the training process) has nothing to do but wait for batches. The peer is lightly's
step with the usual loader (PIL and torchvision, the same recipe and as many processes). The first rounds of the log
are left out.
"""
import argparse
import gc
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from PIL import Image
from torch import nn

from reid_nb.parts.models import build_backbone
from reid_nb.crop_store import CropDataset
from reid_nb.moco import MoCo, pretrain, train_step
from reid_nb.parts.training import Run, Session
from reid_nb.parts.core import parse_size
from reid_nb.parts.device import autocast, pick_device
from reid_nb.parts.augment import AUGMENTS, crop_batches

def our_step(args, device):
    model = MoCo(build_backbone(args.arch), K=16*args.batch, head_bn=False)
    model = model.to(device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(model.encoder_q.parameters(), .01, momentum=.9, weight_decay=1e-4)
    return lambda a, b: train_step(model, opt, a, b, precision=args.precision)['loss']

def lightly_step(args, device, memory):
    import copy

    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
    net = build_backbone(args.arch)
    encoder = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), MoCoProjectionHead(net.dim, net.dim, 128))
    encoder = encoder.to(device, memory_format=memory).train()
    momentum = copy.deepcopy(encoder).requires_grad_(False)
    loss_of = NTXentLoss(temperature=.1, memory_bank_size=(16*args.batch, 128)).to(device)
    opt = torch.optim.SGD(encoder.parameters(), .01, momentum=.9, weight_decay=1e-4)
    def step(a, b):
        update_momentum(encoder, momentum, m=.999)
        with autocast(device, args.precision):
            q = encoder(a)
            with torch.no_grad():
                mixed, order = batch_shuffle(b)
                k = batch_unshuffle(momentum(mixed), order)
            loss = loss_of(q.float(), k.float())
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()
    return step

NAMES = ['lightly', 'lightly channels_last', 'ours']

def measure(args, name):
    "One contestant: images a second (median of the steps), and the peak memory in bytes"
    device = pick_device()
    memory = torch.channels_last if name != 'lightly' else torch.contiguous_format
    if device.type == 'cuda':
        gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    step = our_step(args, device) if name == 'ours' else lightly_step(args, device, memory)
    torch.manual_seed(0)
    views = [torch.randn(args.batch, 3, *parse_size(args.size), device=device).to(memory_format=memory)
             for _ in 'qk']
    def wait():
        if device.type == 'cuda': torch.cuda.synchronize()
    for _ in range(3): step(*views)
    times = []
    for _ in range(args.steps):
        wait(); t = time.perf_counter()
        step(*views)
        wait(); times.append(time.perf_counter() - t)
    peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss*1024
    return dict(rate=args.batch/statistics.median(times), peak=peak)

def alone(args, name):
    "The same in a process of its own"
    done = subprocess.run([sys.executable, *sys.argv, '--only', name], capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])

def one_step(args):
    got, run = {}, measure if torch.cuda.is_available() else alone
    for _ in range(args.repeats):
        for name in NAMES: got.setdefault(name, []).append(run(args, name))
    base = statistics.median(r['rate'] for r in got['lightly'])
    for name in NAMES:
        rate, peak = (statistics.median(r[k] for r in got[name]) for k in ('rate', 'peak'))
        ratios = sorted(a['rate']/b['rate'] for a, b in zip(got[name], got['lightly']))
        print(f'{name:22} {rate:7.0f} images a second, {rate/base:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}), '
              f'peak memory {peak/2**20:.0f} MiB')

class PilPairs(torch.utils.data.Dataset):
    "Two views of a crop as most loaders make them"
    def __init__(self, crops, size):
        from views import pil_recipe
        self.crops, self.recipe = crops, pil_recipe(size, **AUGMENTS['luperson'])
    def __getitem__(self, key):
        img = Image.open(io.BytesIO(self.crops.store[self.crops.idx[key[1]]])).convert('RGB')
        return self.recipe(img), self.recipe(img)

def usual_path(args, total, watch):
    "lightly's step behind the usual loader"
    device, crops = pick_device(), CropDataset(args.store)
    step, size = lightly_step(args, device, torch.channels_last), parse_size(args.size)
    loader = torch.utils.data.DataLoader(
        PilPairs(crops, size), batch_sampler=crop_batches(len(crops), args.batch, 0, total), num_workers=args.workers,
        pin_memory=device.type == 'cuda')
    def there(x): return x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as out:
        session = Session(out, 'usual', {}, Run(steps=args.steps, save_every=1e9, watch=watch))
        session.resume()
        for a, b in session.steps(loader, total, 'usual', args.batch):
            session.record(max(1, total//100), loss=step(there(a), there(b)))

def our_path(args, total, watch, draw):
    n = len(CropDataset(args.store))//args.batch
    with tempfile.TemporaryDirectory() as out:
        run = Run(steps=args.steps, save_every=1e9, precision=args.precision, workers=args.workers, watch=watch)
        pretrain(args.store, out, run=run, arch=args.arch, epochs=total//n, batch=args.batch, size=args.size, queue=16,
                 draw=draw, compile=args.compile)

def whole_path(args):
    n = len(CropDataset(args.store))//args.batch
    total = n*max(1, round(1000/n))   # about ten steps to a line of the log
    args.steps = max(args.steps, 5*(total//100))
    ways = {'usual loader, lightly': lambda w: usual_path(args, total, w),
            'ours, drawn on the CPU': lambda w: our_path(args, total, w, 'fast')}
    if torch.cuda.is_available(): ways['ours, on the GPU'] = lambda w: our_path(args, total, w, 'device')
    base = None
    for name, way in ways.items():
        seen = []
        if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        way(lambda s: seen.append((time.monotonic(), s.step, s.speed.waited)))
        (t, first, waited), (end, last, all_waited) = seen[1], seen[-1]
        rate = (last - first)*args.batch/(end - t)
        base = base or rate
        print(f'{name:22} {rate:7.0f} images a second, {rate/base:.2f} times, {(all_waited - waited)/(end - t):.0%} '
              f'waiting, {args.workers} loader processes'
              + (f', peak {torch.cuda.max_memory_allocated()/2**30:.1f} GiB' if torch.cuda.is_available() else ''))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet10')
    p.add_argument('--size', default='128x64')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--precision')
    p.add_argument('--store')
    p.add_argument('--workers', type=int, default=0)
    p.add_argument('--compile', action='store_true')
    p.add_argument('--only', choices=NAMES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.only: return print(json.dumps(measure(args, args.only)))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    print(f'{platform.machine()}, {os.cpu_count()} cores, {device}, Python {platform.python_version()}, '
          f'torch {torch.__version__}; {args.arch} at {args.size}, batch {args.batch}, precision '
          f'{args.precision or "as the device has it"}')
    whole_path(args) if args.store else one_step(args)

if __name__ == '__main__': main()
