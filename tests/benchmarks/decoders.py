"""JPEG decoders on one core, beside OpenCV: crops a second and ratios, medians of rounds in one run.

    python tests/benchmarks/decoders.py [--repeats 7]

Crops of the toy city at four sizes, quality 95. CPU time. simplejpeg takes part if it is installed.
"""
import argparse
import io
import os
import platform
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.io import decode_jpeg

from reid_nb.parts.core import decode
from reid_nb.parts.toy_city import build_toy


def decoders():
    "{name: function of JPEG bytes -> uint8[h,w,3] RGB}"
    found = {'OpenCV': decode, 'Pillow': lambda j: np.asarray(Image.open(io.BytesIO(j))),
             'torchvision': lambda j: decode_jpeg(torch.frombuffer(j, dtype=torch.uint8)).permute(1, 2, 0).numpy()}
    try: from simplejpeg import decode_jpeg as simple
    except ImportError: print('simplejpeg: not installed')
    else: found['simplejpeg'] = simple
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=7)
    args = p.parse_args()
    all_of_them = decoders()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, cv2 {cv2.__version__}, '
          f'torchvision {torchvision.__version__}')
    toy = build_toy(Path(__file__).parents[2]/'nbs'/'_run'/'toy')
    crops = [cv2.imread(str(f)) for f in sorted((toy/'market').rglob('*.jpg'))[:500]]
    for size in (32, 64), (64, 128), (128, 256), (200, 500):
        jpegs = [cv2.imencode('.jpg', cv2.resize(im, size), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                 for im in crops]
        times = {}
        for _ in range(args.repeats):
            for name, f in all_of_them.items():
                assert (f(jpegs[0]) == decode(jpegs[0])).all()
                t = time.process_time()
                for jpeg in jpegs: f(jpeg)
                times.setdefault(name, []).append(time.process_time() - t)
        for name, ts in times.items():
            ratio = statistics.median(a/b for a, b in zip(times['OpenCV'], ts))
            print(f'{size[1]:>4} x {size[0]:<4} {name:12} {len(jpegs)/statistics.median(ts):9,.0f} a second and core, '
                  f'{ratio:.2f} times OpenCV')

if __name__ == '__main__': main()
