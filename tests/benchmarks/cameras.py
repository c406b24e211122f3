"""How much of a camera's own statistics to take, after so many people have been seen: mAP on the toy city.

    python tests/benchmarks/cameras.py TOY [--draws 2]

TOY is a toy city (`build_toy`). Of each of its three cameras some people are drawn, the small network's statistics are
taken from all their pictures there, blended with its own by several shares, and the whole test is ranked.
"""
import argparse
from pathlib import Path

import numpy as np

from reid_nb.parts.benchmarks import labels, read_benchmark
from reid_nb.parts.cameras import blend
from reid_nb.parts.metrics import rank
from reid_nb.parts.weights import (
    camera_statistics, embed, load_model, read_image, read_statistics, set_statistics, SMALL)

SHARES, PEOPLE = (0, .1, .25, .5, .75, 1), (1, 2, 4, 8, 16, 40)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('toy', type=Path)
    p.add_argument('--draws', type=int, default=2)
    a = p.parse_args()
    model, meta = load_model(SMALL)
    bench = read_benchmark('market_folder', a.toy/'market')
    samples, n, own = [*bench.query, *bench.gallery], len(bench.query), read_statistics(model)
    pictures, (pids, camids) = [read_image(s.path, meta['size']) for s in samples], labels(samples)
    at = {c: np.flatnonzero(camids == c) for c in np.unique(camids)}

    def mAP(statistics, share):
        f = np.zeros((len(samples), model.dim), np.float32)
        for c, rows in at.items():
            set_statistics(model, blend(own, statistics[c], share))
            f[rows] = embed(model, meta, [pictures[i] for i in rows])
        set_statistics(model, own)
        return rank(bench, f[:n], f[n:]).figures()['mAP']

    print('people  ' + ''.join(f'{share:>8}' for share in SHARES))
    for people in PEOPLE:
        found = []
        for draw in range(a.draws):
            rng, statistics = np.random.default_rng(draw), {}
            for c, rows in at.items():
                seen = np.unique(pids[rows][pids[rows] > 0])
                drawn = rng.choice(seen, min(people, len(seen)), replace=False)
                statistics[c] = camera_statistics(model, meta, [pictures[i] for i in rows if pids[i] in drawn])
            found.append([mAP(statistics, share) for share in SHARES])
        print(f'{people:<8}' + ''.join(f'{x:8.3f}' for x in np.mean(found, 0)), flush=True)

if __name__ == '__main__': main()
