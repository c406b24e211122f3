"""A checkpoint beside the zero-shot peer on cuhk03_p1, by our evaluation and by torchreid's.

    python tests/benchmarks/peer.py DATA CHECKPOINT

DATA holds `cuhk03_p1` and `peers/osnet_x0_25_msmt17.onnx`. Needs onnxruntime.
"""
import argparse
import warnings
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch

from reid_nb.parts.core import read_rgb
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.scoring import summarize
from reid_nb.parts.weights import embed, load_model

def embed_peer(model, samples, batch=64):
    "Features of the ONNX peer: 256x128, RGB, ImageNet's statistics"
    session, out = onnxruntime.InferenceSession(model), []
    mean, std = np.float32([.485, .456, .406]), np.float32([.229, .224, .225])
    for i in range(0, len(samples), batch):
        x = np.stack([cv2.resize(read_rgb(s.path), (128, 256)) for s in samples[i:i+batch]])/np.float32(255)
        x = np.ascontiguousarray(((x - mean)/std).transpose(0, 3, 1, 2))
        out.append(session.run(None, {session.get_inputs()[0].name: x})[0])
    return np.concatenate(out)

def by_torchreid(bench, qf, gf):
    "mAP and rank-1 as torchreid works them out"
    with warnings.catch_warnings():   # it tells that its compiled ranking is missing
        warnings.simplefilter('ignore')
        from torchreid.reid.metrics import compute_distance_matrix, evaluate_rank
    dist = compute_distance_matrix(torch.tensor(qf), torch.tensor(gf), 'cosine').numpy()
    rows = [np.array([s[k] for s in part]) for k in (1, 2) for part in (bench.query, bench.gallery)]
    cmc, mAP = evaluate_rank(dist, *rows, use_cython=False)
    return dict(mAP=mAP, rank1=cmc[0])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path)
    p.add_argument('checkpoint')
    args = p.parse_args()
    bench, (model, meta) = read_benchmark('cuhk03_p1', args.data/'cuhk03_p1'), load_model(args.checkpoint)
    parts = bench.query, bench.gallery
    peer = [embed_peer(str(args.data/'peers'/'osnet_x0_25_msmt17.onnx'), part) for part in parts]
    features = {'peer': peer} | {f'ours{", flipped too"*flip}': [embed(model, meta, [s.path for s in part], flip=flip)
                                                                for part in parts] for flip in (False, True)}
    for name, f in features.items():
        said, theirs = summarize(bench, *f, against=None if f is peer else peer), by_torchreid(bench, *f)
        for k in 'rank1', 'mAP':
            figures = said['figures'][k], *([said['comparison']['figures'][k]] if f is not peer else [])
            text = ' more than the peer by '.join(f'{100*x["value"]:5.1f} ({100*x["low"]:.1f} to {100*x["high"]:.1f})'
                                                  for x in figures)
            print(f'{name:20}{k:6}{text}; torchreid differs by {abs(theirs[k] - figures[0]["value"]):.0e}')

if __name__ == '__main__': main()
