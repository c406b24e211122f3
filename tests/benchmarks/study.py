"""Does pre-training pay on real people? The whole study from one command, on a GPU or on a CPU.

    python tests/benchmarks/study.py DATA OUT [--minutes 9] [--arch resnet50] [--size 256x128] [--recipes bot mgn]
                                     [--labels .1 .3 1] [--seeds 3] [--tracks] [--init moco.safetensors]

DATA holds `real_city` and `cuhk03_p1`. The crops of real_city, and those of cuhk03_p1's training part under names that
tell only the camera (with --tracks also a number that one camera's pictures of a person share), become one store; MoCo
learns from it; each recipe trains from nothing, from MoCo, and from a control, MoCo at learning rate 0, which has seen
the same crops and learned nothing, at each share of the labelled people, with each seed.
All are scored on cuhk03_p1's query and gallery, which nothing else looks at. Below each table stands what MoCo adds:
the difference of the means over the seeds, with its interval over people. --init takes weights that are there already.

Each command works for --minutes at most and prints the rows that are whole; the same command goes on. The result is
OUT/study.json, the curves are OUT/study.png.
"""
import argparse
import json
import math
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from real import make_store

from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.metrics import bootstrap
from reid_nb.finetune import controls
from reid_nb.parts.supervised import print_controls, RECIPES, training_set
from reid_nb.moco import pretrain
from reid_nb.parts.weights import load_checkpoint
from reid_nb.parts.training import change_recipe, latest, plot_history, Run
from reid_nb.parts.core import parse_size
from reid_nb.parts.device import pick_device

matplotlib.use('agg')
AGAIN = 'not finished, the same command goes on'

def gain(more, less):
    "What one set of trainings has more than another, `Scores` of each: {figure: value, low, high} over people"
    def mean(runs): return {k: np.mean([s.per_query()[k] for s in runs], 0) for k in ('rank1', 'mAP')}
    a, b = mean(more), mean(less)
    return bootstrap({k: a[k] - b[k] for k in a}, more[0].pids[more[0].valid])

def print_gains(cells):
    for share in dict.fromkeys(s for _, s in cells):
        if ('moco', share) not in cells: continue
        for other in ('nothing', 'rate0'):
            found = gain(cells['moco', share], cells[other, share])
            print(f'{share:<8.0%}MoCo adds to {other:8}' + ', '.join(
                f'{k} {100*v["value"]:.1f} ({100*v["low"]:.1f} to {100*v["high"]:.1f})' for k, v in found.items()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path)
    p.add_argument('out', type=Path)
    p.add_argument('--minutes', type=float, default=math.inf)
    p.add_argument('--arch', default='resnet50')
    p.add_argument('--size', default='256x128')
    p.add_argument('--init', type=Path)
    p.add_argument('--tracks', action='store_true')
    p.add_argument('--pretrain', type=int, default=200, help='epochs of MoCo')
    p.add_argument('--batch', type=int, default=256, help='of MoCo')
    p.add_argument('--lr', type=float, default=.004, help='of MoCo, at a batch of 256')
    p.add_argument('--recipes', nargs='+', default=['bot', 'mgn'])
    p.add_argument('--change', default='', help="of the recipes, such as 'lr=1e-3 ema=.999'")
    p.add_argument('--epochs', type=int, help="of fine-tuning; default the recipe's")
    p.add_argument('--labels', nargs='+', type=float, default=[.1, .3, 1.])
    p.add_argument('--seeds', type=int, default=3)
    args = p.parse_args()
    start, size = time.monotonic(), parse_size(args.size)
    def left(): return max(0, args.minutes - (time.monotonic() - start)/60)
    gpu = pick_device().type == 'cuda'
    print(f'{torch.cuda.get_device_name() if gpu else platform.machine()}, {os.cpu_count()} cores, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}; {args.arch} at {args.size}')

    make_store(args.data, args.out, read_benchmark('cuhk03_p1', args.data/'cuhk03_p1').train, args.tracks)
    speed = {}
    def watch(session): speed.update(session.now)
    def contrast(name, **kw):
        return pretrain(args.out/'crops.lmdb', args.out/name, 'street', Run(minutes=left(), watch=watch),
                        arch=args.arch, batch=args.batch, size=size, positives='track' if args.tracks else 'crop',
                        compile=gpu, **kw)
    control = contrast('rate0', epochs=1, lr=0.)   # batch statistics forget all but the last fifty batches
    init = args.init or contrast('moco', epochs=args.pretrain, lr=args.lr)
    if not args.init:
        if speed: print('MoCo: {images_a_second:,.0f} images a second, {waiting:.0%} of it waiting'.format(**speed))
        print('MoCo:', ', '.join(f'{k} {v}' for k, v in latest(load_checkpoint(init)[1]['history']).items()))
        if not load_checkpoint(init)[1]['finished']: return print(AGAIN)

    report, tables = {}, {}
    for name in args.recipes:
        recipe = change_recipe(RECIPES[name], args.change)
        if args.epochs: recipe = replace(recipe, epochs=args.epochs)
        if not left(): break
        cells = controls(training_set(args.data/'cuhk03_p1', 'cuhk03_p1'),
                         dict(nothing=None, rate0=control, moco=init), args.labels, args.seeds, args.out/name,
                         minutes=left(), recipe=recipe, arch=args.arch, size=size)
        tables[name] = cells
        report[name] = [dict(init=i, labels=s, runs=[r.figures() for r in runs]) for (i, s), runs in cells.items()]
    (args.out/'study.json').write_text(json.dumps(report, indent=1))
    for name, cells in tables.items():
        print(f'\n{" ".join([name, *args.change.split()])}, cuhk03_p1, {args.seeds} seeds')
        print_controls(cells)
        print_gains(cells)
    if sum(map(len, tables.values())) < 3*len(args.labels)*len(args.recipes): return print(AGAIN)
    axs = None
    for folder in sorted(args.out.glob(f'*/*_{max(args.labels):g}_0')):
        history = load_checkpoint(folder/'reid.safetensors')[1]['history']
        axs = plot_history(history, ('loss', 'accuracy'), f'{folder.parent.name}, {folder.name[:-4]}', axs)
    axs[0].legend()
    axs[0].figure.savefig(args.out/'study.png', dpi=90)

if __name__ == '__main__': main()
