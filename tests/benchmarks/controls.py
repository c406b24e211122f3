"""Does pre-training help? The same fine-tuning from several first weights, with fewer labels, with several seeds.

    python tests/benchmarks/controls.py DATA OUT --init moco.safetensors [--protocol cuhk03_p1] [--labels .1 .3 1]
                                        [--seeds 3] [--arch resnet10_ibn] [--size 64x32] [--epochs 10]

Rows: random weights, and each file named after --init. Every training is a folder below OUT; start the command again
and it goes on, with --minutes in pieces of that length. The score is of the protocol's query and gallery.
"""
import argparse
import os
import platform
import time
from pathlib import Path

import torch

from reid_nb.finetune import RECIPES, change_recipe, controls, print_controls
from reid_nb.views import parse_size

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data')
    p.add_argument('out', type=Path)
    p.add_argument('--init', nargs='*', type=Path, default=[])
    p.add_argument('--protocol', default='cuhk03_p1')
    p.add_argument('--labels', nargs='+', type=float, default=[.1, .3, 1.])
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--recipe', default='bot')
    p.add_argument('--change', default='lr=1e-3 drops=() cosine=(.1,1e-6)')
    p.add_argument('--arch', default='resnet10_ibn')
    p.add_argument('--size', default='64x32')
    p.add_argument('--epochs', type=int, default=10)
    args = p.parse_args()
    inits = {'nothing': None} | {f.stem: f for f in args.init}
    recipe = change_recipe(RECIPES[args.recipe], args.change)
    start = time.monotonic()
    cells = controls(args.data, inits, args.labels, args.seeds, args.out, protocol=args.protocol, recipe=recipe,
                     arch=args.arch, size=parse_size(args.size), epochs=args.epochs)
    print(f'{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch '
          f'{torch.__version__}; {args.protocol}, {args.recipe} with {args.change}, {args.arch} at {args.size}, '
          f'{args.epochs} epochs, {args.seeds} seeds; {(time.monotonic() - start)/60:.0f} minutes')
    print_controls(cells)

if __name__ == '__main__': main()
