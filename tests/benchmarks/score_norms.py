"""Scores that travel? Raw cosine beside scores normalised by a cohort, at thresholds chosen on another campus.

    python tests/benchmarks/score_norms.py DATA MEASURE WEIGHTS CHECKPOINT [CHECKPOINT ...] [--cache DIR]

DATA holds `cuhk03_p1` and `real_city`, MEASURE holds `cuhk01_dev`, WEIGHTS is a detector of people for Ultralytics.
Thresholds are chosen on all pairs of the 100 test people of cuhk03_p1 and kept; then the false matches and the true
ones are counted on cuhk01_dev, with 95 % over the people searched for, and on six people of real_city (see
`real_city.py`), templates against templates.

A normalised score says by how many standard deviations a pair is more alike than one of the two and a cohort of
others: the enrolled one (z-norm), the probe (t-norm; Auckenthaler and others, 2000) or both (s-norm), or both and the
50 most alike of the cohort alone (adaptive s-norm; Matejka and others, 2017). The cohort is either the gallery's
people other than the two, or means of clusters of the training people of cuhk03_p1, several people each.
"""
import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from real_city import at, ENROLLED, SOUGHT
from reid_nb.parts.benchmarks import labels, read_benchmark
from reid_nb.parts.decisions import find_usable_tracks
from reid_nb.parts.metrics import draw_people, normalize
from reid_nb.parts.tracks import make_template, Matcher
from reid_nb.parts.weights import embed, load_model

TARGETS, NEAREST, TIMES = (.01, .001), 50, 1000

def person_means(features, pids):
    "Unit mean of each person's pictures"
    return normalize(np.stack([features[pids == p].mean(0) for p in np.unique(pids)]))

def cluster_means(features, pids, clusters=200):
    "Unit means of clusters of three people or more: they identify nobody"
    people = person_means(features, pids)
    found = KMeans(clusters, n_init=1, random_state=0).fit_predict(people)
    return normalize(np.stack([people[found == k].mean(0) for k, n in Counter(found.tolist()).items() if n >= 3]))

def moments(s):
    "Mean and deviation of each row"
    return s.mean(1, keepdims=True), s.std(1, keepdims=True)

def moments_without(s, own, other):
    "Mean and deviation of each row n for each m, without the columns own[n] and other[m]: float[n,m] each"
    differ = own[:, None] != other
    def rest(s): return s.sum(1)[:, None] - s[np.arange(len(s)), own][:, None] - s[:, other]*differ
    n = s.shape[1] - 1 - differ
    mean = rest(s)/n
    return mean, np.sqrt(rest(s**2)/n - mean**2)

def all_scores(q, g, qp, gp, clusters):
    "{name: float[q,g]}; q, g: features, qp, gp: whose they are"
    raw, people, names = q @ g.T, person_means(g, gp), np.unique(gp)
    a, b = (np.searchsorted(names, p) for p in (qp, gp))
    of_both = {'others': (moments_without(q @ people.T, a, b), moments_without(g @ people.T, b, a)),
               'clusters': [moments(x @ clusters.T) for x in (q, g)],
               'nearest': [moments(np.sort(x @ clusters.T, 1)[:, -NEAREST:]) for x in (q, g)]}
    out = {'raw cosine': raw}
    for cohort, (of_q, of_g) in of_both.items():
        t, z = (raw - of_q[0])/of_q[1], (raw - of_g[0].T)/of_g[1].T
        if cohort == 'nearest': out['adaptive s-norm, clusters'] = (z + t)/2
        else: out |= {f'z-norm, {cohort}': z, f't-norm, {cohort}': t, f's-norm, {cohort}': (z + t)/2}
    return out

def pair_masks(bench):
    "Genuine and impostor pairs of a set: bool[q,g] each"
    pids, camids = labels(bench.gallery)
    counted = np.array([~bench.protocol.rule(s, pids, camids) for s in bench.query])
    same = labels(bench.query)[0][:, None] == pids
    return counted & same, counted & ~same

def share(accepted, pairs, who):
    "Per cent of the pairs that are accepted, with 95 % over people, as text"
    people, k = np.unique(who, return_inverse=True)
    hit, n = (np.bincount(k, x.sum(1), len(people)) for x in (accepted & pairs, pairs))
    w = draw_people(len(people), TIMES, 0)
    low, high = np.percentile(w @ hit/(w @ n), [2.5, 97.5])
    return '{:.2f} ({:.2f} to {:.2f})'.format(*(100*x for x in (hit.sum()/n.sum(), low, high)))

def street_tracks(data, weights):
    "(name, `Track`) of the six people enrolled, and of the six tracks that are looked for"
    clips = [next((data/'real_city').rglob(f'*{v}.mp4')) for v in ('v01', 'v05')]
    found = [find_usable_tracks(clip, weights, 0, 101)[0] for clip in clips]
    return [[(name, at(tracks, *point)) for name, point in wanted]
            for tracks, wanted in zip(found, (ENROLLED.items(), SOUGHT))]

def threshold_for(impostor, target):
    "The highest threshold that accepts this share of the impostor scores"
    return np.sort(impostor)[::-1][int(target*len(impostor)) - 1]

def row(home, away, street, masks, who):
    "Cells of a score: of a set at home and one away, float[q,g], and of the street, with its genuine pairs"
    (genuine, impostor), (true, false), cells = *masks, []
    for target in TARGETS:
        threshold, own = threshold_for(home[impostor], target), threshold_for(away[false], target)
        accepted = street[0] >= threshold
        cells += [f'{100*(home[genuine] >= threshold).mean():.1f}', share(away >= threshold, false, who),
                  share(away >= threshold, true, who), f'{100*(away[true] >= own).mean():.1f}',
                  f'{accepted[street[1]].sum()} and {accepted[~street[1]].sum()}']
    return cells

def measure(ckpt, sets, masks, street, cache):
    "Print a row for each score of a network"
    model, meta = load_model(ckpt)
    def features(name, samples):
        file = cache/f'{ckpt.stem}_{name}.npy'
        if not file.exists(): np.save(file, embed(model, meta, [s.path for s in samples]))
        return np.load(file)
    home, away = sets
    clusters = cluster_means(features('train', home.train), labels(home.train)[0])
    parts = [[labels(x.query)[0], labels(x.gallery)[0], clusters] for x in sets]
    scores = [all_scores(features(f'{k}_query', x.query), features(f'{k}_gallery', x.gallery), *parts[k])
              for k, x in enumerate(sets)]
    matcher = Matcher(lambda crops: embed(model, meta, crops), '', {})
    gallery, probes = (np.stack([make_template(t, matcher).feature for _, t in part]) for part in street)
    gp, qp = (np.array([[*ENROLLED].index(name) for name, _ in part]) for part in street)
    there = all_scores(probes, gallery, qp, gp, clusters)
    for name in there:
        cells = row(scores[0][name], scores[1][name], (there[name], qp[:, None] == gp), masks, parts[1][0])
        print('|', ' | '.join([ckpt.stem, name, *cells]), '|', flush=True)
    print(f'{ckpt.stem}: clusters: {len(clusters)}', file=sys.stderr)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', type=Path)
    p.add_argument('measure', type=Path)
    p.add_argument('weights')
    p.add_argument('checkpoints', type=Path, nargs='+')
    p.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir())/'score_norms')
    a = p.parse_args()
    a.cache.mkdir(exist_ok=True)
    sets = read_benchmark('cuhk03_p1', a.data/'cuhk03_p1'), read_benchmark('market_folder', a.measure/'cuhk01_dev')
    masks, street = [pair_masks(x) for x in sets], street_tracks(a.data, a.weights)
    cells = [f'{x}, FMR {100*t:g} %' for t in TARGETS
             for x in ('true at home', 'false away', 'true away', 'true away at a threshold chosen there',
                       'street: true of 6 and false of 30')]
    print('|', ' | '.join(['network', 'score', *cells]), '|\n' + '|---'*(len(cells) + 2) + '|', flush=True)
    for ckpt in a.checkpoints: measure(ckpt, sets, masks, street, a.cache)

if __name__ == '__main__': main()
