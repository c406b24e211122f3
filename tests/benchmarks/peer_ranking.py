"""Scoring at the size of Market-1501 beside Roboflow's `reid`, in one process: seconds, ratios, and the same figures.

    pip install --no-deps --target PEERS reid==0.1.0rc1 supervision pydeprecate timm
    python tests/benchmarks/peer_ranking.py PEERS [--repeats 3]

3,368 queries, 19,732 gallery pictures (750 people, 6 cameras, distractors), random unit vectors of 512 numbers.
"""
import argparse
import os
import platform
import sys
from importlib.metadata import version

import numpy as np
from ranking import make, medians, timed

from reid_nb.parts.benchmarks import labels
from reid_nb.parts.metrics import distances, normalize, rank, rank_rows

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('peers')
    p.add_argument('--repeats', type=int, default=3)
    args = p.parse_args()
    sys.path.insert(0, args.peers)
    from reid.eval.metrics import _compute_reid_metrics, distance_matrix
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}, '
          f'reid {version("reid")}, {os.environ.get("OMP_NUM_THREADS", "all")} threads')
    bench, *features = make(dim=512)
    qf, gf = map(normalize, features)
    (qp, qc), (gp, gc) = labels(bench.query), labels(bench.gallery)
    dist = distances(qf, gf)
    def theirs(): return _compute_reid_metrics(dist, qp, gp, qc, gc)
    def theirs_whole(): return _compute_reid_metrics(distance_matrix(qf, gf), qp, gp, qc, gc)
    for what, peer, ours in (('ranking alone', theirs, lambda: rank_rows(bench, dist)),
                             ('with the product of the features', theirs_whole, lambda: rank(bench, qf, gf))):
        a, b = medians(peer, args.repeats), medians(ours, args.repeats)
        print(f'{what}: reid {a:.1f} s, ours {b:.2f} s: {a/b:.1f} times')
    _, want = timed(theirs)
    got = rank_rows(bench, dist).figures()
    names = dict(mAP='mean_average_precision', mINP='minp')
    apart = max(abs(100*x - getattr(want, names.get(k, k))) for k, x in got.items())
    print(f'largest difference of a figure: {apart/100:.1e}')

if __name__ == '__main__': main()
