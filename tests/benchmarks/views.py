"""From the JPEGs of a store to a normalised batch of two views, on one core, side by side in one run.

    python tests/benchmarks/views.py STORE [--crops 512] [--repeats 5] [--size 256x128]

The usual loader decodes with PIL and alters with torchvision's transforms, as MoCo's and LUPerson's code does; ours
renders the same recipe with OpenCV (`render`), and as a batch of tensors on the CPU (`render_pairs`, made for a GPU).
The views are `luperson` and `moco_v2`.
"""
import argparse
import io
import os
import platform
import random
import statistics
import time

os.environ['OMP_NUM_THREADS'] = '1'

import cv2
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageFilter
from torchvision import transforms as T

from reid_nb.crop_store import CropDataset
from reid_nb.parts.core import parse_size
from reid_nb.parts.device import to_input
from reid_nb.parts.augment import Augment, AUGMENTS, pack_pairs, render_pairs, ViewPairs

MEAN, STD = (.3525, .3106, .3140), (.2660, .2522, .2505)

class PilBlur:
    def __call__(self, x): return x.filter(ImageFilter.GaussianBlur(random.uniform(.1, 2)))

def pil_recipe(size, jitter=0., erase=0.):
    return T.Compose([
        T.RandomResizedCrop(size, (.2, 1)), T.RandomApply([T.ColorJitter(.4, .4, .4, .1)], jitter),
        T.RandomGrayscale(.2), T.RandomApply([PilBlur()], .5),
        T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD),
        T.RandomErasing(erase, (.02, .6))])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('store')
    p.add_argument('--crops', type=int, default=512)
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--size', default='256x128')
    p.add_argument('--batch', type=int, default=64)
    args = p.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    size, crops = parse_size(args.size), CropDataset(args.store)
    picked = np.random.default_rng(0).integers(len(crops), size=args.crops).tolist()
    batches = [picked[i:i+args.batch] for i in range(0, len(picked), args.batch)]
    rows = crops.store.rows[crops.idx]
    jpegs,sizes = torch.utils.data.Subset(crops.store, crops.idx),np.stack([rows['height'], rows['width']], 1)
    height,width = np.median(sizes[picked], 0).astype(int)
    print(f'{platform.machine()}, one core of {os.cpu_count()}, Python {platform.python_version()}, '
          f'torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, '
          f'OpenCV {cv2.__version__}; {args.crops} crops of median {height}x{width}, views of {args.size}')

    def usual(how):
        recipe = pil_recipe(size, how.get('jitter', 0), how.get('erase', 0))
        for b in batches:
            imgs = [Image.open(io.BytesIO(crops.store[crops.idx[i]])).convert('RGB') for i in b]
            yield torch.stack([torch.stack([recipe(im) for im in imgs]) for _ in 'qk'], 1)
    def ours(how):
        pairs = ViewPairs(crops, Augment(size, **how))
        for b in batches:
            x = torch.from_numpy(np.stack([pairs[0, i][0] for i in b]))
            yield [to_input(x[:, k], MEAN, STD) for k in (0, 1)]
    def as_batch(how):
        aug = Augment(size, **how)
        pairs = ViewPairs(jpegs, aug, sizes=sizes)
        for b in batches:
            x = render_pairs(pack_pairs([pairs[0, i] for i in b]), aug)
            yield [to_input(x[:, k], MEAN, STD) for k in (0, 1)]

    for name in ('luperson', 'moco_v2'):
        how = AUGMENTS[name]
        ways = {'PIL and torchvision': lambda: usual(how), 'render': lambda: ours(how),
                'render_pairs': lambda: as_batch(how)}
        times = {k: [] for k in ways}
        for _ in range(args.repeats):
            for k, way in ways.items():
                t = time.process_time()
                for _ in way(): pass
                times[k].append(time.process_time() - t)
        base = statistics.median(times['PIL and torchvision'])
        for k, ts in times.items():
            ratios = sorted(a/b for a, b in zip(times['PIL and torchvision'], ts))
            print(f'{name:9} {k:20} {args.crops/statistics.median(ts):7.0f} crops a second, '
                  f'{base/statistics.median(ts):5.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})')

if __name__ == '__main__': main()
