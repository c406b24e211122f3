"""Does a threshold of single pictures fit templates, scaled to length 1 or not? Error rates of both.

    python tests/benchmarks/templates.py CHECKPOINT SET [SET ...] [--by_camera]

Of each person of a set's gallery one template for each of two cameras is made of all the pictures there, and held
against everybody's of the other camera, at the checkpoint's own threshold for FMR 1 %."""
import argparse

import numpy as np

from reid_nb.parts.benchmarks import labels, read_benchmark
from reid_nb.parts.metrics import normalize
from reid_nb.parts.weights import embed, embed_by_camera, load_model, read_thresholds

def rates(scores, same, bound):
    "False and true match rate."
    return f'FMR {(scores[~same] >= bound).mean():.4f}  TMR {(scores[same] >= bound).mean():.2f}'

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('checkpoint')
    p.add_argument('sets', nargs='+')
    p.add_argument('--by_camera', action='store_true')
    a = p.parse_args()
    model, meta = load_model(a.checkpoint)
    bound = read_thresholds(a.checkpoint, by_camera=a.by_camera)['thresholds']['0.01']['high']
    for root in a.sets:
        samples = [s for s in read_benchmark('market_folder', root).gallery if s.pid > 0]
        (pids, camids), paths = labels(samples), [s.path for s in samples]
        f = embed_by_camera(model, meta, paths, camids) if a.by_camera else embed(model, meta, paths)
        one, two = np.unique(camids)[:2]
        print(f'{root}, match from {bound:.3f}')
        same = pids[camids == one][:, None] == pids[camids == two]
        print(f'  single pictures     {rates(f[camids == one] @ f[camids == two].T, same, bound)}')
        people = sorted(set(pids[camids == one]) & set(pids[camids == two]))
        first, second = (np.stack([f[(pids == p) & (camids == c)].mean(0) for p in people]) for c in (one, two))
        same = np.eye(len(people), dtype=bool)
        print(f'  means, unscaled     {rates(first @ second.T, same, bound)}')
        print(f'  means of length 1   {rates(normalize(first) @ normalize(second).T, same, bound)}', flush=True)

if __name__ == '__main__': main()
