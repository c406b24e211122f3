"""Names for each person alone, and for all who are in view together: how many are right, and how many wrong?

    python tests/benchmarks/one_place.py CHECKPOINT SET [--by_camera] [--scenes 1000]

Each person of a set's gallery is a template before each of two cameras. In a scene some people, enrolled ones and
others, stand before the second camera at the same time; the gallery has templates of the first. Names are given from
the checkpoint's own upper threshold for FMR 1 % on, per cent of the people in view."""
import argparse

import numpy as np

from reid_nb.parts.benchmarks import labels, read_benchmark
from reid_nb.parts.decisions import name_everybody
from reid_nb.parts.metrics import normalize
from reid_nb.parts.tracks import Track
from reid_nb.parts.weights import embed, embed_by_camera, load_model, read_thresholds

SCENES = (6, 3, 1), (6, 3, .5), (6, 6, .5), (20, 6, 1), (20, 6, .5), (20, 6, .2)   # enrolled, in view, share enrolled

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('checkpoint')
    p.add_argument('set')
    p.add_argument('--by_camera', action='store_true')
    p.add_argument('--scenes', type=int, default=1000)
    a = p.parse_args()
    model, meta = load_model(a.checkpoint)
    samples = read_benchmark('market_folder', a.set).gallery
    paths, (pids, camids) = [s.path for s in samples], labels(samples)
    f = embed_by_camera(model, meta, paths, camids) if a.by_camera else embed(model, meta, paths)
    people, cameras = np.unique(pids), np.unique(camids)[:2]
    gallery, probes = (normalize(np.stack([f[(pids == p) & (camids == c)].mean(0) for p in people])) for c in cameras)
    known = read_thresholds(a.checkpoint, a.by_camera)['thresholds']
    least, upper, rng = min(t['low'] for t in known.values()), known['0.01']['high'], np.random.default_rng(0)
    print('| enrolled | in view | of them enrolled | one by one: right, wrong | together: right, wrong |')
    print('|---'*5 + '|')
    for n, k, share in SCENES:
        counts = np.zeros((2, 2))
        for _ in range(a.scenes):
            drawn, known = rng.permutation(len(people)), min(rng.binomial(k, share), n)
            enrolled, here = drawn[:n], np.r_[rng.permutation(drawn[:n])[:known], drawn[n:n + k - known]]
            rankings = [sorted(zip(enrolled, s), key=lambda x: -x[1]) for s in probes[here] @ gallery[enrolled].T]
            alone = [r[0][0] for r in rankings]
            together = name_everybody([Track(i, [(0, None)]) for i in range(k)], rankings, least)
            for row, names in zip(counts, (alone, together)):
                for person, name, ranking in zip(here, names, rankings):
                    if name is not None and dict(ranking)[name] >= upper: row[int(name != person)] += 1
        one, both = (' and '.join(f'{x:.2f}' for x in row) for row in 100*counts/(k*a.scenes))
        print(f'| {n} | {k} | {share:.0%} | {one} | {both} |', flush=True)

if __name__ == '__main__': main()
