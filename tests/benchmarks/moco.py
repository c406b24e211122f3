"""A step of MoCo beside lightly's modules: images a second and peak memory, same encoder, batch and crops, in one run.

    pip install lightly
    python tests/benchmarks/moco.py [--arch resnet10] [--size 128x64] [--batch 64] [--steps 20] [--repeats 3]
    python tests/benchmarks/moco.py --store crops.lmdb [--arch resnet50] [--size 256x128] [--batch 256] [--steps 50]

The first form compares steps on crops that are in memory already. Each contestant runs in processes of its own, in
turn, so that peak memory is its own. lightly is driven as its documentation shows it (memory bank, shuffled batch,
momentum update), in the memory format that it is given by default and in channels_last. The second form measures the
whole path, from the JPEGs in a store to the optimiser's step, and the share of the time spent on waiting for batches.
"""
import argparse
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
from torch import nn

from reid_nb.backbones import build_backbone
from reid_nb.moco import MoCo, pretrain, train_step
from reid_nb.views import autocast, parse_size, pick_device

def our_step(args, device):
    model = MoCo(build_backbone(args.arch), K=16*args.batch, head_bn=False)
    model = model.to(device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(model.encoder_q.parameters(), .01, momentum=.9, weight_decay=1e-4)
    return lambda a, b: train_step(model, opt, a, b, precision=args.precision)

def lightly_step(args, device):
    import copy

    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
    net = build_backbone(args.arch)
    encoder = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), MoCoProjectionHead(net.dim, net.dim, 128))
    encoder = encoder.to(device, memory_format=args.memory).train()
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
    return step

def measure(args):
    "One contestant in this process: images a second (median of the steps), and the peak memory in bytes"
    device = pick_device()
    args.memory = torch.channels_last if args.only != 'lightly' else torch.contiguous_format
    step = (our_step if args.only == 'ours' else lightly_step)(args, device)
    torch.manual_seed(0)
    views = [torch.randn(args.batch, 3, *parse_size(args.size), device=device).to(memory_format=args.memory)
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
    print(json.dumps(dict(rate=args.batch/statistics.median(times), peak=peak)))

def whole_path(args):
    "What a session tells about itself after so many steps of its first epoch"
    seen = []
    with tempfile.TemporaryDirectory() as out:
        pretrain(args.store, out, args.arch, epochs=1, size=args.size, batch=args.batch, steps=args.steps,
                 precision=args.precision, save_every=1e9, watch=lambda session: seen.append(session.now))
    print(', '.join(f'{k} {v:.3g}' for k, v in seen[-1].items()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet10')
    p.add_argument('--size', default='128x64')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--precision')
    p.add_argument('--store')
    p.add_argument('--only', choices=['ours', 'lightly', 'lightly channels_last'], help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.only: return measure(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{os.cpu_count()} CPU cores'
    print(f'{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}; '
          f'{args.arch} at {args.size}, batch {args.batch}, precision {args.precision or "as the device has it"}')
    if args.store: return whole_path(args)
    names, got = ['lightly', 'lightly channels_last', 'ours'], {}
    for _ in range(args.repeats):
        for name in names:
            done = subprocess.run([sys.executable, *sys.argv, '--only', name], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            got.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    base = statistics.median(r['rate'] for r in got['lightly'])
    for name in names:
        rate, peak = (statistics.median(r[k] for r in got[name]) for k in ('rate', 'peak'))
        ratios = sorted(a['rate']/b['rate'] for a, b in zip(got[name], got['lightly']))
        print(f'{name:22} {rate:7.0f} images a second, {rate/base:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}), '
              f'peak memory {peak/2**20:.0f} MiB')

if __name__ == '__main__': main()
