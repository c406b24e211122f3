"""Scoring at the size of Market-1501 beside torchreid, in one run: seconds, memory, and the same numbers.

    python tests/benchmarks/ranking.py [--repeats 3] [--grow]

3,368 queries, 19,732 gallery pictures (750 people, 6 cameras, distractors), random features of 2,048 numbers.
torchreid's ranking in Python is run once (it takes a minute or two); its Cython one takes part where it has been
built. With --grow the gallery gets up to ten times as large, with as many more people, and the seconds are drawn into
growth.png.
"""
import argparse
import os
import platform
import statistics
import time
import tracemalloc
import warnings

import numpy as np

from reid_nb.parts.benchmarks import Benchmark, labels, PROTOCOLS, Sample
from reid_nb.parts.metrics import distances, rank, rank_rows

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from torchreid.reid.metrics import rank as theirs
    from torchreid.reid.metrics.distance import compute_distance_matrix


def make(queries=3368, gallery=19732, dim=2048, seed=0):
    "A benchmark of nobody's pictures, and features for it"
    r = np.random.default_rng(seed)
    people = 750*gallery//19732
    def crowd(n, lowest): return [Sample('', *x) for x in r.integers((lowest, 1), (people + 1, 7), (n, 2)).tolist()]
    bench = Benchmark([], crowd(queries, 1), crowd(gallery, 0), '', [], (), PROTOCOLS['market1501'])
    return bench, *(r.standard_normal((n, dim), np.float32) for n in (queries, gallery))

def timed(f):
    t = time.perf_counter()
    out = f()
    return time.perf_counter() - t, out

def medians(f, repeats): return statistics.median(timed(f)[0] for _ in range(repeats))

def extra_memory(f):
    "Bytes that a call takes beyond its inputs, at its peak"
    tracemalloc.start()
    f()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def grow(repeats):
    "Seconds by size of the gallery, as a table and a picture"
    import matplotlib.pyplot as plt
    sizes, seconds = [19732*k for k in (1, 2, 4, 7, 10)], []
    for n in sizes:
        bench, qf, gf = make(gallery=n)
        seconds.append(medians(lambda: rank(bench, qf, gf), repeats))
        print(f'gallery {n:>9,}: {seconds[-1]:7.1f} s, {seconds[-1]/n*1e6:.0f} us a picture')
    fig, ax = plt.subplots(figsize=(5, 3), layout='constrained')
    ax.plot(sizes, seconds, 'o-')
    ax.set(xlabel='gallery pictures (3,368 queries, 2,048 numbers)', ylabel='seconds', xlim=0, ylim=0)
    fig.savefig('growth.png', dpi=90)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--grow', action='store_true')
    args = p.parse_args()
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}')
    if args.grow: return grow(args.repeats)
    bench, qf, gf = make()
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    dist = distances(qf, gf)
    def torchreid_ranking(cython=False): return theirs.evaluate_rank(dist, qp, gp, qc, gc, use_cython=cython)
    def torchreid_product():
        import torch
        return compute_distance_matrix(torch.from_numpy(qf), torch.from_numpy(gf), 'cosine').numpy()
    slow, (cmc, mAP) = timed(torchreid_ranking)
    ours, product = medians(lambda: rank_rows(bench, dist), args.repeats), medians(torchreid_product, args.repeats)
    whole = medians(lambda: rank(bench, qf, gf), args.repeats)
    print(f'ranking alone: torchreid in Python {slow:.1f} s, ours {ours:.2f} s: {slow/ours:.0f} times')
    print(f'with the product of the features: torchreid {slow + product:.1f} s, ours {whole:.2f} s: '
          f'{(slow + product)/whole:.0f} times')
    if theirs.IS_CYTHON_AVAI:
        fast = medians(lambda: torchreid_ranking(True), args.repeats)
        print(f"torchreid's Cython: {fast:.2f} s, {fast/ours:.0f} times; with the product "
              f'{fast + product:.2f} s, {(fast + product)/whole:.1f} times')
    else: print("torchreid's Cython ranking is not built here: no comparison with it")
    print(f'extra memory: ours {extra_memory(lambda: rank(bench, qf, gf))/1e6:.0f} MB, '
          f'the distance matrix alone {dist.nbytes/1e6:.0f} MB')
    scores = rank_rows(bench, dist)
    apart, by_blocks = (abs(s.figures()['mAP'] - mAP) for s in (scores, rank(bench, qf, gf)))
    print(f'largest difference: CMC {np.abs(scores.cmc - cmc).max():.1e}, mAP {apart:.1e}; by blocks {by_blocks:.1e}')

if __name__ == '__main__': main()
