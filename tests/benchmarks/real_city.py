"""People of a real street: enrolled before one camera, looked for before another, hits and misses as they are.

    python tests/benchmarks/real_city.py DATA WEIGHTS [--people 300] [--checkpoint FILE.safetensors [--cameras]]

DATA holds `real_city`, `cuhk03_p1` and `peers/osnet_x0_25_msmt17.onnx`; WEIGHTS is a detector of people for
Ultralytics. Frames 0 to 100 of v01 and of v05 show the same square at the same time from two sides. Six people are
enrolled from v01; who is who was decided by looking at the clips, and is written below as a point in each person's
box. The embedding is the peer OSNet, trained on other people; its thresholds are measured on `--people` people of
cuhk03_p1's training part, camera against camera. With --checkpoint the embedding is that one, with its own thresholds;
with --cameras each clip is seen through a profile of its camera, which has learned from this clip alone.
No picture leaves the temporary folder.
"""
import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np

from reid_nb.parts.core import read_rgb
from reid_nb.parts.benchmarks import Benchmark, PROTOCOLS, read_benchmark
from reid_nb.biometrics import identify
from reid_nb.parts.decisions import explain, find_usable_tracks
from reid_nb.parts.cameras import see_camera, with_cameras
from reid_nb.parts.core import sha256
from reid_nb.parts.metrics import operating_points
from reid_nb.parts.gallery import Gallery
from reid_nb.parts.tracks import load_matcher, make_template, Matcher

# frame, x, y of a point in the person's box
ENROLLED = {'brown jacket': (0, 511, 189), 'black coat': (0, 664, 279), 'leather jacket, papers': (0, 267, 260),
            'red vest': (20, 703, 320), 'blond woman': (40, 617, 276), 'bald man': (60, 632, 283)}
SOUGHT = [('leather jacket, papers', (0, 594, 338)), ('brown jacket', (0, 307, 218)), ('black coat', (21, 687, 286)),
          ('red vest', (49, 689, 259)), ('bald man', (73, 680, 236)), ('black coat', (82, 36, 277))]

def peer(path):
    "Function: RGB crops -> float32[n,512], rows of length 1"
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    net = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = net.get_inputs()[0].name
    def embed(crops):
        x = np.stack([cv2.resize(c, (128, 256)) for c in crops]).astype(np.float32)/255
        x = (x - [.485, .456, .406])/[.229, .224, .225]
        f = net.run(None, {name: np.float32(x.transpose(0, 3, 1, 2))})[0]
        return f/np.linalg.norm(f, axis=1, keepdims=True)
    return embed

def measure(embed, data, people):
    "Thresholds on people of cuhk03_p1's training part, camera 1 against camera 2"
    train = [s for s in read_benchmark('cuhk03_p1', data/'cuhk03_p1').train if s.pid <= people]
    parts = [[s for s in train if s.camid == cam] for cam in sorted({s.camid for s in train})]
    features = [np.concatenate([embed([read_rgb(s.path) for s in p[k:k+32]]) for k in range(0, len(p), 32)])
                for p in parts]
    benchmark = Benchmark([], *parts, '', [], (), PROTOCOLS['cuhk03_p1'])
    return operating_points(benchmark, *features)

def at(tracks, frame, x, y):
    "The track of somebody whose box holds a point"
    inside = [t for t in tracks for f, (x1, y1, x2, y2) in t.seen if f == frame and x1 <= x <= x2 and y1 <= y <= y2]
    return inside[0] if len(inside) == 1 else None

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', type=Path)
    p.add_argument('weights')
    p.add_argument('--people', type=int, default=300)
    p.add_argument('--checkpoint')
    p.add_argument('--cameras', action='store_true')
    a = p.parse_args()
    if a.checkpoint:
        plain = load_matcher(a.checkpoint)
        matcher = with_cameras(plain) if a.cameras else plain
    else:
        model = a.data/'peers'/'osnet_x0_25_msmt17.onnx'
        embed = peer(model)
        plain = matcher = Matcher(embed, sha256(model), measure(embed, a.data, a.people))
    for fmr, t in matcher.thresholds.items():
        print(f'FMR {fmr}: threshold {t["threshold"]:.3f} [{t["low"]:.3f}, {t["high"]:.3f}], '
              f'true matches there {t["tmr"]:.2f}', flush=True)
    clips = {v: next((a.data/'real_city').rglob(f'*{v}.mp4')) for v in ('v01', 'v05')}
    with tempfile.TemporaryDirectory() as tmp:
        profile = {v: Path(tmp)/f'{v}.safetensors' if a.cameras else None for v in clips}
        here = Gallery(Path(tmp)/'gallery', matcher, create=True)
        tracks, _ = find_usable_tracks(clips['v01'], a.weights, 0, 101)
        seer, line = see_camera(matcher, profile['v01'], clips['v01'], tracks)
        print(line)
        for name, point in ENROLLED.items():
            track = at(tracks, *point)
            if track: here.add(name, make_template(track, seer))
            print(f'{name}: ' + (f'enrolled, {track.good} good pictures' if track else 'no usable track'), flush=True)
        got = identify(clips['v05'], here.root, plain, 0, 101, a.weights, film=Path(tmp)/'film.mp4',
                       camera=profile['v05'])
        print(*explain(got)[1:], sep='\n')
        count = dict(first=0, match=0, look=0, wrong=0, missing=0)
        for name, point in SOUGHT:
            track = at(got.tracks, *point)
            d = next((d for d in got.decisions if track and d.track == track.number), None)
            if d is None: count['missing'] += 1
            else:
                count['first'] += d.closest == name
                count['match'] += d.answer == 'match' and d.name == name
                count['look'] += d.answer == 'inconclusive' and d.name == name
                count['wrong'] += d.answer == 'match' and d.name != name
            print(f'{name}: ' + (f'person {d.track}: {d.answer} {d.name or ""}; ranked ' +
                                 ', '.join(f'{n} {s:.3f}' for n, s in d.ranking[:3]) if d else 'no usable track'))
        print('{first} ranked first, {match} matched, {look} to look at, {wrong} matched to somebody else, {missing} '
              'without a usable track, '.format(**count) + f'of {len(SOUGHT)}, at FMR 0.01')

if __name__ == '__main__': main()
