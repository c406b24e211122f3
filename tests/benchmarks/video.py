"""Cutting people out of a video beside OpenCV, in one run: crops a second of CPU time, medians of rounds, and ratios.

    python tests/benchmarks/video.py [--frames 3000] [--repeats 3]

The film is made first (a minute or two): H.264 at 1280 x 720 with x264's defaults (250 frames from one fresh start to
the next, three B pictures in a row), a panning camera, walkers, grain. Three people are cut out of each wanted frame
and compressed as JPEG, in three ways: by `cut_people`; by OpenCV in order, which decodes all and converts what is
wanted; by OpenCV with a seek for each frame, which is what LUPerson's script does.
"""
import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

from reid_nb.parts.core import encode_jpeg
from reid_nb.dataset import cut_people
from reid_nb.parts.detections import Dets

H, W, PEOPLE = 720, 1280, 3

def walker(k, i):
    "Box of a person in a frame"
    x, y = (k*131 + i*(1 + k % 4)) % (W - 60), 60 + k*48
    return x, y, x + 40, y + 120

def make_film(path, frames):
    "Film a street"
    r = np.random.default_rng(0)
    ground = cv2.GaussianBlur(r.integers(0, 256, (H, W + 200, 3), np.uint8), (0, 0), 6)
    ground = cv2.normalize(ground, None, 30, 220, cv2.NORM_MINMAX)
    grain = r.normal(0, 2, (8, H, W, 1)).astype(np.int8)
    with av.open(str(path), 'w') as f:
        s = f.add_stream('libx264', rate=25)
        s.width, s.height, s.pix_fmt = W, H, 'yuv420p'
        for i in range(frames):
            x = int(100 + 80*np.sin(i/150))
            rgb = ground[:, x:x + W].copy()
            for k in range(12):
                x1, y1, x2, y2 = walker(k, i)
                rgb[y1:y2, x1:x2] = k*20, 255 - k*20, k*71 % 255
            rgb = np.clip(rgb + grain[i % 8].astype(np.int16), 0, 255).astype(np.uint8)
            f.mux(s.encode(av.VideoFrame.from_ndarray(rgb)))
        f.mux(s.encode())

def ours(path, wanted):
    frame = np.repeat(wanted, PEOPLE)
    obj = np.tile(np.arange(PEOPLE), len(wanted))
    box = np.float32([walker(k, i) for i, k in zip(frame, obj)])
    dets = Dets('LUPerson-NL', frame, obj, obj, box, np.ones(len(box), np.float32), H, 25)
    return [encode_jpeg(cut.rgb) for cut in cut_people(path, dets)]

def jpegs(bgr, i):
    "Three crops of OpenCV's frame"
    boxes = (walker(k, i) for k in range(PEOPLE))
    crops = [np.ascontiguousarray(bgr[y1:y2, x1:x2]) for x1, y1, x2, y2 in boxes]
    return [cv2.imencode('.jpg', c, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for c in crops]

def in_order(path, wanted):
    film, found, picked = cv2.VideoCapture(str(path)), [], set(wanted.tolist())
    for i in range(wanted[-1] + 1):
        film.grab()
        if i in picked: found += jpegs(film.retrieve()[1], i)
    return found

def seeking(path, wanted):
    film, found = cv2.VideoCapture(str(path)), []
    for i in wanted:
        film.set(cv2.CAP_PROP_POS_FRAMES, i)
        found += jpegs(film.read()[1], i)
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--frames', type=int, default=3000)
    p.add_argument('--repeats', type=int, default=3)
    args = p.parse_args()
    cv2.setNumThreads(1)
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, cv2 {cv2.__version__}, '
          f'PyAV {av.__version__}')
    n, r = args.frames, np.random.default_rng(1)
    cases = {'every 12th': np.arange(0, n, 12), '1 % at random': np.sort(r.choice(n, n//100, False)),
             'runs of 25': np.concatenate([np.arange(k, k + 25) for k in range(100, n - 25, 600)]),
             'each frame': np.arange(n)}
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder)/'film.mp4'
        make_film(film, n)
        print(f'{n} frames of {W} x {H}, {film.stat().st_size/1e6:.1f} MB')
        for name, wanted in cases.items():
            ways = dict(ours=ours, order=in_order, seek=seeking)
            if name == 'each frame': ways.pop('seek')
            times, results = {way: [] for way in ways}, {}
            for _ in range(args.repeats):
                for way, f in ways.items():
                    t = time.process_time()
                    results[way] = f(film, wanted)
                    times[way].append(time.process_time() - t)
            assert results['ours'] == results['order'], 'other pixels than a sequential decode'
            crops = len(results['ours'])
            print(f'{name:14} {crops:6,} crops;', '; '.join(
                f'{way} {crops/statistics.median(ts):7.1f} a second'
                + ('' if way == 'ours' else f', ours {statistics.median(map(np.divide, ts, times["ours"])):.2f} times')
                for way, ts in times.items()), flush=True)

if __name__ == '__main__': main()
