"""The store beside raw py-lmdb with the same keys and values, and beside an image folder, in one run.

    python tests/benchmarks/store.py [--records 100000] [--repeats 5] [--height 256] [--dest FOLDER]

Medians of several rounds; in each round every system does the same, one after another. JPEGs from the crops of the toy
city, all of one height, several thousand different ones, repeated; keys as extraction gives them. Writing: from
pictures in memory until all is on the disk; databases sync at every commit, the folder once at the end. Reading: page
cache warm, seconds of the processor; and once in order after the system was asked to forget the files, seconds of the
clock. LUPerson's reader encodes the key and begins a transaction for each picture.
"""
import argparse
import gc
import os
import platform
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import lmdb
import numpy as np

from reid_nb.parts.core import decode
from reid_nb.crop_store import CropStore, pack
from reid_nb.parts.packing import Source
from reid_nb.parts.store import close_readers, forget_files, Item, read_in_order
from reid_nb.parts.toy_city import build_toy


def make_records(n, height):
    "[(key, JPEG)]"
    files = sorted((build_toy(Path(__file__).parents[2]/'nbs'/'_run'/'toy')/'market').rglob('*.jpg'))[:3000]
    pictures = [cv2.resize(cv2.imread(str(f)), (height//2, height)) for f in files]
    jpegs = [cv2.imencode('.jpg', im, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for im in pictures]
    keys = [f'alba/porto/toyVideo{k//5000:03d}/{k//20:06d}_{k:07d}_00' for k in range(n)]
    return [(key, jpegs[k % len(jpegs)]) for k, key in enumerate(keys)]

def write_folder(root, records):
    for key, jpeg in records:
        path = f'{root}/{key}.jpg'
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as f: f.write(jpeg)

def write_lmdb(path, records):
    with lmdb.open(str(path), subdir=False, map_size=1 << 40) as env:
        for at in range(0, len(records), 1000):
            with env.begin(write=True) as txn:
                for key, jpeg in records[at:at+1000]: txn.put(key.encode(), jpeg, append=True)

def source(records, measures):
    def items(start): return (Item(key.encode(), jpeg, measures=measures) for key, jpeg in records[start:])
    return Source('benchmark', len(records), items)

def write_ours(path, records): pack(source(records, (128, 64, (.5,)*3, (.2,)*3)), path)

def write_ours_measuring(path, records): pack(source(records, None), path)

def readers(root, records):
    "{what: {system: function of the numbers to read}}"
    keys = [key.encode() for key, _ in records]
    env = lmdb.open(f'{root}/raw.lmdb', subdir=False, readonly=True, lock=False, readahead=False)
    txn, store = env.begin(), CropStore(f'{root}/ours.lmdb')
    def folder(order):
        for i in order:
            with open(f'{root}/folder/{records[i][0]}.jpg', 'rb') as f: f.read()
    def luperson(order):
        for i in order:
            key = records[i][0]
            with env.begin(write=False) as one: one.get(key.encode('ascii'))
    def raw(order):
        for i in order: txn.get(keys[i])
    def ours(order):
        for i in order: store[i]
    def by_key(order):
        for i in order: store.get(keys[i])
    def raw_decoded(order):
        for i in order: decode(txn.get(keys[i]))
    def ours_decoded(order):
        for i in order: decode(store[i])
    reads = {'raw get': raw, 'ours': ours}
    return {'random reads': reads | {'ours, by key': by_key, 'LUPerson': luperson, 'folder': folder},
            'read and decode': {'raw get': raw_decoded, 'ours': ours_decoded}, 'reads in order': reads}

def scan_raw(root, **kw):
    with lmdb.open(f'{root}/raw.lmdb', subdir=False, readonly=True, lock=False, **kw) as env, env.begin() as txn:
        for _ in txn.cursor(): pass

def scan_ours(root):
    for _ in read_in_order(CropStore(f'{root}/ours.lmdb')): pass

def open_raw(root):
    with lmdb.open(f'{root}/raw.lmdb', subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        list(txn.cursor().iternext(values=False))

def taken(path):
    "Bytes of disk"
    files = [path] if path.is_file() else path.rglob('*')
    return sum(f.stat().st_blocks*512 for f in files if f.is_file())

def timed(f, clock=time.perf_counter):
    gc.collect()
    t = clock()
    f()
    return clock() - t

def report(what, times, n, peer):
    "Medians, and ratios within a round"
    for name, ts in times.items():
        ratios = sorted(p/t for p, t in zip(times[peer], ts))
        print(f'{what:>15} {name:22} {n/statistics.median(ts):10,.0f} a second, {statistics.median(ratios):6.2f} times '
              f'{peer} ({ratios[0]:.2f} to {ratios[-1]:.2f})', flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--records', type=int, default=100_000)
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--writes', type=int, default=3, help='rounds of writing')
    p.add_argument('--height', type=int, default=256, help='of a picture, in pixels')
    p.add_argument('--dest', help='folder for what is written; it is deleted again')
    args = p.parse_args()
    records = make_records(args.records, args.height)
    size, n = sum(len(jpeg) for _, jpeg in records), len(records)
    print(f'{n:,} records of {size/n:,.0f} bytes; {platform.machine()}, {os.cpu_count()} cores, Python '
          f'{platform.python_version()}, lmdb {lmdb.__version__}, numpy {np.__version__}, cv2 {cv2.__version__}')
    writers = {'raw put': (write_lmdb, 'raw.lmdb'), 'ours': (write_ours, 'ours.lmdb'),
               'ours, each decoded': (write_ours_measuring, 'measured.lmdb'), 'folder': (write_folder, 'folder')}
    with tempfile.TemporaryDirectory(dir=args.dest) as folder:
        times, root = {name: [] for name in writers}, Path(folder)
        for _ in range(args.writes):
            for name, (write, where) in writers.items():
                close_readers()
                if (root/where).is_dir(): shutil.rmtree(root/where)
                (root/where).unlink(missing_ok=True)
                os.sync()
                times[name].append(timed(lambda: (write(root/where, records), os.sync())))
        report('writes', times, n, 'raw put')
        print('disk taken over the sum of the JPEG bytes:')
        for name, (_, where) in writers.items(): print(f'    {name:20} {taken(root/where)/size - 1:+8.1%}')
        close_readers()
        times = {'raw, all keys': [], 'ours': []}
        for _ in range(args.repeats):
            times['raw, all keys'].append(timed(lambda: open_raw(root)))
            times['ours'].append(timed(lambda: CropStore(root/'ours.lmdb')))
        for name, ts in times.items(): print(f'opening: {name:20} {1000*statistics.median(ts):8.1f} ms')
        scans = {'raw cursor': scan_raw, 'raw, page by page': partial(scan_raw, readahead=False), 'ours': scan_ours}
        times = {name: [] for name in scans}
        for _ in range(args.repeats):
            for name, scan in scans.items():
                close_readers()
                os.sync()
                forget_files([root/'raw.lmdb', root/'ours.lmdb'])
                times[name].append(timed(lambda: scan(root)))
        report('cold, in order', times, n, 'raw cursor')
        shuffled = np.random.default_rng(0).permutation(n).tolist()
        for what, reads in readers(root, records).items():
            order = list(range(n)) if 'order' in what else shuffled[:10_000] if 'decode' in what else shuffled
            for f in reads.values(): f(order)   # warm
            times = {name: [] for name in reads}
            for _ in range(args.repeats):
                spent = dict.fromkeys(reads, 0.)
                for at in range(0, len(order), 2000):   # by turns, so that other work on the machine hits all of them
                    for name, f in reads.items(): spent[name] += timed(lambda: f(order[at:at+2000]), time.process_time)
                for name in reads: times[name].append(spent[name])
            report(what, times, len(order), 'raw get')

if __name__ == '__main__': main()
