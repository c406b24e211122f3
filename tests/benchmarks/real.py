"""MoCo on real crops, on a CPU: does it beat an untrained network, and a colour histogram?

    python tests/benchmarks/real.py DATA OUT [--tracks] [--epochs 40] [--minutes 60] [--seed 0]

DATA holds `cuhk03_p1` and `real_city`. A hundred people of cuhk03_p1's training part are set aside to validate on
(query and gallery of its test stay unseen); the other people's crops, under names that tell only the camera, and those
of real_city become one store. The validation is the mAP of the pooled feature, by the rule of Market-1501: what the
same camera shows of the same person does not count. With --tracks, crops of one person from one camera carry a common
number, as a tracker would give it (nothing joins the cameras), and positives are two crops of a track. Start it again
with the same command, and it goes on.
"""
import argparse
import os
import platform
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import torch

from reid_nb.parts.models import build_backbone
from reid_nb.parts.benchmarks import hold_out, read_benchmark
from reid_nb.parts.metrics import color_histogram, rank
from reid_nb.crop_store import CropStore, pack
from reid_nb.dataset import extract
from reid_nb.parts.scoring import summarize
from reid_nb.parts.weights import embed, load_model
from reid_nb.parts.training import validator
from reid_nb.moco import pretrain
from reid_nb.parts.weights import load_checkpoint
from reid_nb.parts.training import Run

def make_store(data, out, rest, tracks):
    "real_city's crops, and those of `rest` under numbers, a folder a camera"
    if (out/'crops.lmdb').exists() and CropStore(out/'crops.lmdb').finished: return
    seen = {}
    extract(data/'real_city'/'videos', data/'real_city'/'dets', out/'crops')
    for number, k in enumerate(np.random.default_rng(0).permutation(len(rest))):
        track = seen.setdefault(rest[k][1:], len(seen))
        name = f'{track:06d}_{number:07d}_00.jpg' if tracks else f'{number:07d}.jpg'
        to = out/'crops'/'cuhk03'/'p1'/f'camera{rest[k].camid}'/name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(rest[k].path, to)
    pack(out/'crops', out/'crops.lmdb')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path)
    p.add_argument('out', type=Path)
    p.add_argument('--tracks', action='store_true')
    p.add_argument('--arch', default='resnet10_ibn')
    p.add_argument('--size', default='64x32')
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--validate_every', type=int, default=4)
    p.add_argument('--minutes', type=float)
    p.add_argument('--negatives', default='video')
    p.add_argument('--queue', type=int, default=4)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    bench = read_benchmark('cuhk03_p1', args.data/'cuhk03_p1')
    rest, held = hold_out(bench)
    make_store(args.data, args.out, rest, args.tracks)
    store, size = CropStore(args.out/'crops.lmdb'), tuple(map(int, args.size.split('x')))
    validate = validator(held, size, store.mean.tolist(), store.std.tolist())
    colors = color_histogram(held.query), color_histogram(held.gallery)
    floor = rank(held, *colors).figures()
    torch.manual_seed(args.seed)
    untrained = validate(build_backbone(args.arch).eval())
    run = Run(args.minutes, seed=args.seed, validate_every=args.validate_every)
    ckpt = pretrain(store.path, args.out/f'{args.arch}_{args.negatives}_{args.seed}', 'street', run, validate=validate,
                    arch=args.arch, epochs=args.epochs, size=size, queue=args.queue, negatives=args.negatives,
                    positives='track' if args.tracks else 'crop')
    curve = [h for h in load_checkpoint(ckpt)[1]['history'] if 'val_mAP' in h]
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, '
          f'torch {torch.__version__}; {len(store):,} crops, {args.arch} at {args.size}, seed {args.seed}')
    print(f'colour histogram      mAP {floor["mAP"]:.3f}, rank-1 {floor["rank1"]:.3f}')
    print(f'untrained             mAP {untrained["val_mAP"]:.3f}, rank-1 {untrained["val_rank1"]:.3f}')
    for h in curve: print(f'MoCo at step {h["step"]:>8,} mAP {h["val_mAP"]:.3f}, rank-1 {h["val_rank1"]:.3f}')
    net, meta = load_model(ckpt)
    learned = [embed(net, meta, [s.path for s in part]) for part in (held.query, held.gallery)]
    said = summarize(held, *learned, seed=args.seed, against=colors)
    for what, f in {'at the end': said['figures'], 'more than colours': said['comparison']['figures']}.items():
        value, low, high = [f['mAP'][k] for k in ('value', 'low', 'high')]
        print(f'{what:21} mAP {value:.3f}, 95 % over people {low:.3f} to {high:.3f}')
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3), layout='constrained')
    ax.plot([h['step'] for h in curve], [h['val_mAP'] for h in curve], 'o-', label='MoCo')
    for name, v in {'colour histogram': floor['mAP'], 'untrained': untrained['val_mAP']}.items():
        ax.axhline(v, ls=':', c='grey'); ax.annotate(name, (0, v), fontsize=8, va='bottom')
    ax.set(xlabel='step', ylabel='mAP, 100 people held out of cuhk03_p1', ylim=0)
    fig.savefig(ckpt.parent/'curve.png', dpi=90)

if __name__ == '__main__': main()
