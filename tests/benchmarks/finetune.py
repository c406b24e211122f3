"""A training step of `reid_finetune` beside torchreid's ImageTripletEngine: same network, batch and crops, one run.

    python tests/benchmarks/finetune.py DATA [--arch resnet18] [--size 128x64] [--batch 64] [--rounds 7] [--steps 5]

DATA is a Market-style folder. Both train with softmax and batch-hard triplets on batches that are ready in memory
(`step`), and with their own loaders, from files to the optimiser (`whole`). torchreid's engine computes in fp32; ours
also as the machine does best (bf16 where it has it).
"""
import argparse
import io
import os
import platform
import statistics
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from reid_nb.parts.models import build_backbone
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.finetune import Trainer
from reid_nb.parts.supervised import pk_batches, RECIPES, take_labels, TrainImages
from reid_nb.parts.models import ReidModel
from reid_nb.parts.core import parse_size
from reid_nb.parts.device import pick_device

with warnings.catch_warnings():   # it tells that its compiled ranking is missing
    warnings.simplefilter('ignore')
    from torchreid.reid.data import ImageDataManager
    from torchreid.reid.engine import ImageTripletEngine

MEAN, STD = (.485, .456, .406), (.229, .224, .225)

class Plain(nn.Module):
    "Our BoT network as torchreid's engine wants it: logits and features"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        side = self.model.sides(x)[0][0]
        return self.model.heads[0].classifier(side['after']), side['before']

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data')
    p.add_argument('--arch', default='resnet18')
    p.add_argument('--size', default='128x64')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--steps', type=int, default=5)
    p.add_argument('--workers', type=int, default=0)
    args = p.parse_args()
    size, device = parse_size(args.size), pick_device()
    train = take_labels(read_benchmark('market_folder', args.data).train)
    classes = len({s.pid for s in train})
    root = tempfile.TemporaryDirectory()
    (Path(root.name)/'market1501').symlink_to(Path(args.data).absolute())
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')     # the published folder has a second name
        manager = ImageDataManager(root.name, 'market1501', height=size[0], width=size[1], norm_mean=MEAN,
                                   norm_std=STD, transforms=['random_flip', 'random_crop', 'random_erase'],
                                   batch_size_train=args.batch, num_instances=4, workers=args.workers,
                                   train_sampler='RandomIdentitySampler', use_gpu=device.type == 'cuda')
    torch.manual_seed(0)
    def model(): return ReidModel(build_backbone(args.arch), classes).to(device).train()
    plain = Plain(model())
    theirs = ImageTripletEngine(manager, plain, torch.optim.Adam(plain.parameters(), 3.5e-4), label_smooth=True,
                                use_gpu=device.type == 'cuda')
    ours = {name: Trainer(model().to(memory_format=torch.channels_last), RECIPES['bot'], MEAN, STD, device, precision)
            for name, precision in {'ours, fp32': 'fp32', 'ours': None}.items()}
    for trainer in ours.values(): trainer.train_mode(False)
    images = TrainImages(train, size, RECIPES['bot'], tuple(255*m for m in MEAN))
    ready = next(iter(DataLoader(images, batch_sampler=pk_batches(train, args.batch, 4, 0, 1))))
    ready_theirs = next(iter(manager.train_loader))
    def sync():
        if device.type == 'cuda': torch.cuda.synchronize()
    def timed(work):
        sync(); t = time.perf_counter(); work(); sync()
        return time.perf_counter() - t
    def steps(step, batch): return lambda: [step(batch) for _ in range(args.steps)]
    def whole(step, loader): return lambda: [step(b) for b in islice(iter(loader), args.steps)]
    def loader(k): return DataLoader(images, batch_sampler=pk_batches(train, args.batch, 4, 0, args.steps, k),
                                     num_workers=args.workers, pin_memory=device.type == 'cuda')
    ways = {('step', 'torchreid'): lambda k: steps(theirs.forward_backward, ready_theirs),
            ('whole', 'torchreid'): lambda k: whole(theirs.forward_backward, manager.train_loader)}
    for name, trainer in ours.items():
        ways['step', name] = lambda k, t=trainer: steps(t.train_batch, ready)
        ways['whole', name] = lambda k, t=trainer: whole(t.train_batch, loader(k))
    for way in ways.values(): timed(way(0))
    times = {name: [] for name in ways}
    for k in range(args.rounds):
        for name, way in ways.items(): times[name].append(timed(way(k)))
    print(f'{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python '
          f'{platform.python_version()}, torch {torch.__version__}, '
          f'{torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"}; {args.arch} at {args.size}, '
          f'batch {args.batch}, {classes} identities')
    for what in 'step', 'whole':
        for name in 'torchreid', *ours:
            t, base = times[what, name], times[what, 'torchreid']
            ratios = sorted(b/a for a, b in zip(t, base))
            print(f'{what:6} {name:12} {args.batch*args.steps/statistics.median(t):7.1f} images a second, '
                  f'{statistics.median(ratios):5.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})')

if __name__ == '__main__': main()
