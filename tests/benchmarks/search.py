"""Identification in a large gallery, beside one matrix product on the same machine.

    python tests/benchmarks/search.py [--templates 100000] [--size 512] [--repeats 31]

A gallery of random people, two templates each, with one crop's embedding to each template, is written into a SQLite
file as `Gallery` keeps it. Asked is the whole way from a person's template to the decision: version of the gallery,
nearest people, their scores from the file, the best pair of crops. In each round the systems come one after another;
medians, and the median of the ratios to `features @ probe` of the same round. The first question after a change, which
has to read all templates, is reported apart.
"""
import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from reid_nb.biometrics import decide
from reid_nb.parts.gallery import fold_name, Gallery, utc_now
from reid_nb.parts.tracks import Matcher, Shot, Template, Track


def fill(here, n, size):
    "Random people into a gallery; returns their features"
    f = np.random.default_rng(0).normal(size=(n, size)).astype(np.float32)
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    with here.store.change() as db:
        names = [(f'Person {k}', fold_name(f'Person {k}')) for k in range(n//2)]
        db.executemany('INSERT INTO identities(name, folded) VALUES (?,?)', names)
        db.executemany('INSERT INTO templates VALUES (?,?,?,?,?)',
                       ((k + 1, utc_now(), k//2 + 1, '', x.tobytes()) for k, x in enumerate(f)))
        db.executemany('INSERT INTO samples VALUES (?,?,?,?)',
                       ((f'Person {k//2}/{k:08d}_00.jpg', x.tobytes(), 1., k + 1) for k, x in enumerate(f)))
    return f

def seconds(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--templates', type=int, default=100_000)
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--repeats', type=int, default=31)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        here = Gallery(Path(tmp)/'gallery', Matcher(None, 'a'*64, {}), create=True)
        f = fill(here, a.templates, a.size)
        rng, times = np.random.default_rng(1), np.arange(100)/25
        def person(k):
            "A track of the person of template `k`, seen again"
            x = f[k] + .3*rng.normal(size=(16, a.size))/a.size**.5
            shots = [Shot(i, (0, 0, 9, 9), quality=1.) for i in range(16)]
            return Track(1, [(i, ()) for i in range(16)]), Template(shots, np.float32(x))
        print(f'{a.templates:,} templates of {a.size} numbers, {platform.processor() or platform.machine()}, '
              f'numpy {np.__version__}')
        for search in 'exact', 'faiss':
            here.index.use(search)
            print(f'{search}: the first question, which reads all templates: '
                  f'{seconds(lambda: here.nearest(f[0])):.2f} s')
            rounds, right = [], 0
            for k in rng.integers(0, a.templates, a.repeats).tolist():
                (track, probe), got = person(k), []
                feature = probe.feature
                product = seconds(lambda: f @ feature)
                whole = seconds(lambda: got.append(decide(track, probe, here, (.3, .5), times)))
                rounds.append((product, seconds(lambda: here.nearest(feature)), whole))
                right += got[0].name == f'Person {k//2}'
            product, nearest, whole = (1000*statistics.median(x) for x in zip(*rounds))
            ratios = [statistics.median(r[i]/r[0] for r in rounds) for i in (1, 2)]
            print(f'{search}: product {product:.1f} ms, nearest {nearest:.1f} ms ({ratios[0]:.2f} products), '
                  f'decision {whole:.1f} ms ({ratios[1]:.2f} products), {right} of {a.repeats} right')

if __name__ == '__main__': main()
