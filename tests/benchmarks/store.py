"""The store beside its peers, in one run: an image folder, raw py-lmdb, and the reader that LUPerson has.

    python tests/benchmarks/store.py [--records 100000] [--repeats 5]

Medians of several rounds; in each round every system does the same, one after another. JPEGs of 128x64 from the toy
city, several thousand different ones, repeated. Writing: from pictures in memory until all is on the disk; databases
sync at every commit, the folder once at the end. Reading: random order, page cache warm. LUPerson's reader encodes
the key and begins a transaction for each picture.
"""
import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import lmdb
import numpy as np

from reid_nb.crop_store import Item, Source, pack
from reid_nb.toy_city import build_toy


def make_records(n):
    "[(name, JPEG)]: names as LUPerson-NL gives them"
    files = sorted((build_toy(Path(__file__).parents[2]/'nbs'/'_run'/'toy')/'market').rglob('*.jpg'))
    small = [cv2.resize(cv2.imread(str(f)), (64, 128)) for f in files]
    jpegs = [cv2.imencode('.jpg', im, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for im in small]
    return [(f'{k//500:05d}_{k//20:06d}_{k:07d}_00', jpegs[k % len(jpegs)]) for k in range(n)]

def write_folder(root, records):
    for name, jpeg in records:
        folder = root/name[:5]
        if not folder.exists(): folder.mkdir(parents=True)
        with open(f'{folder}/{name}.jpg', 'wb') as f: f.write(jpeg)

def write_lmdb(path, records):
    with lmdb.open(str(path), subdir=False, map_size=1 << 34) as env:
        for at in range(0, len(records), 1000):
            with env.begin(write=True) as txn:
                for name, jpeg in records[at:at+1000]: txn.put(name.encode(), jpeg, append=True)

def source(records, seen):
    def items(start): return (Item(name.encode(), jpeg, seen=seen) for name, jpeg in records[start:])
    return Source('benchmark', len(records), items)

def write_ours(path, records): pack(source(records, (128, 64, (.5,)*3, (.2,)*3)), path)

def write_ours_looking(path, records): pack(source(records, None), path)

def readers(root, records, order):
    "{system: function that reads all of `order`}"
    names = [name for name, _ in records]
    paths = [f'{root}/folder/{name[:5]}/{name}.jpg' for name in names]
    def folder():
        for i in order:
            with open(paths[i], 'rb') as f: f.read()
    env = lmdb.open(f'{root}/raw.lmdb', subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    def luperson():
        for i in order:
            key = names[i]
            with env.begin(write=False) as txn: txn.get(key.encode('ascii'))
    keys = [name.encode() for name in names]
    def raw():
        with env.begin() as txn:
            for i in order: txn.get(keys[i])
    store = pack(source(records, None), f'{root}/ours.lmdb')   # it stands: this opens it
    def ours():
        for i in order: store[i]
    return {'folder': folder, 'LUPerson': luperson, 'raw get': raw, 'ours': ours}

def taken(path):
    "Bytes of disk"
    files = [path] if path.is_file() else path.rglob('*')
    return sum(f.stat().st_blocks*512 for f in files if f.is_file())

def timed(f):
    gc.collect()
    t = time.perf_counter()
    f()
    return time.perf_counter() - t

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--records', type=int, default=100_000)
    p.add_argument('--repeats', type=int, default=5)
    args = p.parse_args()
    records = make_records(args.records)
    size = sum(len(jpeg) for _, jpeg in records)
    print(f'{len(records):,} records of {size/len(records):,.0f} bytes; {platform.machine()}, {os.cpu_count()} cores, '
          f'Python {platform.python_version()}, lmdb {lmdb.__version__}, numpy {np.__version__}, cv2 {cv2.__version__}')
    writers = {'folder': (write_folder, 'folder'), 'raw put': (write_lmdb, 'raw.lmdb'),
               'ours': (write_ours, 'ours.lmdb'), 'ours, each decoded': (write_ours_looking, 'looked.lmdb')}
    with tempfile.TemporaryDirectory(dir=Path(__file__).parents[2]/'nbs'/'_run') as folder:
        times = {name: [] for name in writers}
        for k in range(args.repeats):   # each time anew, and nothing is deleted meanwhile
            root = Path(folder)/str(k)
            root.mkdir()
            for name, (write, where) in writers.items():
                os.sync()
                times[name].append(timed(lambda: (write(root/where, records), os.sync())))
        report('writes', times, len(records), 'folder')
        print('disk taken over the sum of the JPEG bytes:')
        for name, (_, where) in writers.items():
            print(f'    {name:20} {taken(root/where)/size - 1:+8.1%}')
        order = np.random.default_rng(0).permutation(len(records)).tolist()
        reads = readers(root, records, order)
        for f in reads.values(): f()   # warm
        times = {name: [] for name in reads}
        for _ in range(args.repeats):
            for name, f in reads.items(): times[name].append(timed(f))
        report('random reads', times, len(order), 'raw get')

def report(what, times, n, peer):
    "Medians, and ratios within a round"
    for name, ts in times.items():
        ratios = sorted(p/t for p, t in zip(times[peer], ts))
        print(f'{what:>14} {name:20} {n/statistics.median(ts):10,.0f} a second, {statistics.median(ratios):6.2f} times '
              f'{peer} ({ratios[0]:.2f} to {ratios[-1]:.2f})')

if __name__ == '__main__': main()
