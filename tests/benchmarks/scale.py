"""The whole line at the size of the paper: seconds and memory of each step at a hundredth, a tenth and all of it.

    python tests/benchmarks/scale.py WORK [--share .01] [--steps census,extract,...] [--kill S] [--ray] [--table]

The paper has 44,550 names, 20,000 videos and 1,095,923 crops of 43,454 people; here are 44,550 names, 20,000 videos of
two people, and 1,000,000 crops. The material is cheap: one video of a second and its 50 crops of real size (320 pixels
high) are hard links under many names. Of the videos a hundred are not cut yet (at a hundredth: ten). What a step has
taken is written into WORK/scale.json, so that the same command goes on after the last step that has ended; --table
prints what is known, and draws WORK/scale.png.

Seconds are those of the clock. Memory is the most that all processes of a step hold together, without the pages of
files, which the system keeps as long as it likes. --kill SECONDS kills each of --steps (extract, pack, pretrain) after
so long, says how long the same command takes until it goes on, and holds the result against the one made in one go.
--ray extracts and packs on a Ray cluster of four nodes, a worker killed in each, and compares as well.
"""
import argparse
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch

from reid_nb.crop_store import CropDataset, CropStore, folder_source, pack
from reid_nb.dataset import extract
from reid_nb.parts.augment import crop_batches
from reid_nb.parts.core import read_rgb
from reid_nb.parts.detections import Dets, write_dets
from reid_nb.parts.download import VideoName
from reid_nb.parts.store import read_in_order
from reid_nb.parts.toy_city import build_toy, write_video
from reid_nb.parts.training import StateFiles

NAMES, VIDEOS, CROPS, GALLERY = 44_550, 20_000, 50, 100_000
HIGH, WIDE, FRAMES = 320, 160, 25

# --- material

def film(path, toy):
    "A second of two people who stand before a wall."
    wall = np.random.default_rng(0).integers(90, 130, (720, 1280, 3), np.uint8)
    files = sorted((toy/'market'/'bounding_box_train').glob('*.jpg'))[:2*FRAMES]
    def frames():
        for k in range(FRAMES):
            frame = wall.copy()
            for x, f in ((200, files[k]), (800, files[k + FRAMES])):
                picture = np.asarray(read_rgb(f))
                rows = np.arange(HIGH)*len(picture)//HIGH
                frame[200:200 + HIGH, x:x + WIDE] = picture[rows][:, np.arange(WIDE)*picture.shape[1]//WIDE]
            yield frame
    return write_video(path, frames())

def detections():
    "Two people in each frame."
    frame = np.repeat(np.arange(FRAMES), 2)
    left = np.tile([200, 800], FRAMES)
    box = np.stack([left, np.full(2*FRAMES, 200), left + WIDE, np.full(2*FRAMES, 200 + HIGH)], 1)
    return Dets('LUPerson-NL', frame, np.tile([0, 1], FRAMES), np.tile([1, 2], FRAMES), np.float32(box),
                np.ones(2*FRAMES, np.float32), 720, 25.)

def name_of(k): return VideoName(f'land{k//2000:02d}', f'city{k//500:03d}', f'video{k:06d}')

def link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists(): os.link(source, target)

def make_material(root, share):
    "Names, videos, detections and crops; what is there stays."
    toy, one, n = build_toy(root.parent/'toy'), root/'one', round(VIDEOS*share)
    if (root/'whole').exists(): return
    names = [name_of(k) for k in range(round(NAMES*share))]
    (root/'videos').mkdir(parents=True, exist_ok=True)
    (root/'names.txt').write_text(''.join(f'{v.stem}\n' for v in names))
    first = names[0]
    first.path(one/'videos').parent.mkdir(parents=True, exist_ok=True)
    (one/'dets').mkdir(exist_ok=True)
    film(first.path(one/'videos'), toy)
    write_dets(one/'dets'/f'{first.stem}.pkl', detections())
    extract(one/'videos', one/'dets', one/'crops')
    cut = one/'crops'/first.country/first.city/first.id
    counts = json.loads((cut/'counts.json').read_text())
    crops, undone = sorted(cut.glob('*.jpg')), min(100, n//20)
    for k, v in enumerate(names[:n]):
        link(first.path(one/'videos'), v.path(root/'videos'))
        link(one/'dets'/f'{first.stem}.pkl', root/'dets'/f'{v.stem}.pkl')
        if k < undone: continue
        folder = root/'crops'/v.country/v.city/v.id
        for f in crops: link(f, folder/f.name)
        (folder/'counts.json').write_text(json.dumps(counts | dict(video=v.stem)))
    (root/'whole').touch()

def make_benchmark(root, share):
    "A labelled set and features for it: 200 queries, a gallery of a million."
    if (root/'features.npz').exists(): return
    cut = sorted((root/'one'/'crops').rglob('*.jpg'))
    rng, found = np.random.default_rng(0), {}
    n = round(VIDEOS*CROPS*share)
    for part, count, camera in (('query', 200, 1), ('bounding_box_test', n, 2)):
        for k in range(count):
            pid = k % (200 if part == 'query' else max(200, n//25)) + 1
            name = f'{pid:05d}_c{camera}s1_{k:07d}_00.jpg'
            link(cut[k % len(cut)], root/'market'/part/name)
            person = np.random.default_rng(pid).normal(size=128)
            found[f'{part}/{name}'] = np.float32(person + 2*rng.normal(size=128))
    np.savez(root/'part.npz', **found)
    os.replace(root/'part.npz', root/'features.npz')

# --- measuring

def held(pid):
    "Megabytes that a process and those that it has started hold now, without the pages of files."
    try:
        status, children = (Path('/proc', f'{pid}', k).read_text() for k in ('status', f'task/{pid}/children'))
        return int(re.search(r'RssAnon:\s+(\d+)', status)[1])/1024 + sum(map(held, children.split()))
    except (OSError, TypeError): return 0.     # it has ended, or not begun

def measure(command, log):
    "Run a command; returns seconds, and megabytes at the peak of all its processes together."
    memory = 0.
    with open(log, 'w') as out:
        begin = time.perf_counter()
        p = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while p.poll() is None:
            memory = max(memory, held(p.pid))
            time.sleep(.05)
    if p.returncode: raise SystemExit(f'{" ".join(map(str, command))}: exit code {p.returncode}, see {log}')
    return time.perf_counter() - begin, memory

def script(name, *args): return [Path(sys.executable).parent/name, *map(str, args)]
def this(function, *args): return [sys.executable, __file__, args[0], '--call', function, *map(str, args[1:])]

def commands(root, share, out=None):
    "The steps by name, each a command; each works on what those before have made, and writes into `out`."
    out = out or root
    train = ['reid_pretrain', root/'crops.lmdb', '--out', out/'moco', '--arch', 'resnet10_x0_5', '--size', '64x32',
             '--epochs', 1, '--save_every', 1e6 if out == root else 5, '--steps']
    return dict(
        census=script('reid_download', root/'names.txt', '--dest', root/'videos', '--census'),
        extract=script('reid_extract', root/'videos', root/'dets', '--dest', out/'crops'),
        pack=script('reid_pack', root/'crops', out/'crops.lmdb'),
        read=this('read', root),
        stats=script('reid_pack', root/'gone', root/'crops.lmdb', '--stats'),
        verify=script('reid_pack', root/'gone', root/'crops.lmdb', '--verify'),
        pretrain=script(*train, 20), resume=script(*train, 20),
        evaluate=script('reid_evaluate', '--features', root/'features.npz', '--data', root/'market'),
        identify=this('identify', root, round(GALLERY*share)))

def read(root):
    "Open the store, draw an epoch's order, and read its first batch."
    data = CropDataset(f'{root}/crops.lmdb')
    batch = next(crop_batches(len(data), 256, 0, 1))
    print(len(data), sum(data[i].size for _, i in batch))

def identify(root, n):
    "Fill a gallery, and ask it who somebody is."
    from search import fill
    from reid_nb.parts.gallery import Gallery
    from reid_nb.parts.tracks import Matcher
    shutil.rmtree(f'{root}/gallery', ignore_errors=True)
    here = Gallery(Path(root)/'gallery', Matcher(None, 'a'*64, {}), create=True)
    f = fill(here, int(n), 512)
    for what in 'first', 'second':
        begin = time.perf_counter()
        (name, _), *_ = here.nearest(f[7])
        print(f'{what} question: {time.perf_counter() - begin:.3f} s, {name}')

# --- kills

GOING = re.compile(r'(\d[\d,.]*k?M?)/[\d,.]+k?M? ')

def until_it_goes_on(command, log):
    "Seconds from the start of a command until its bar moves; it runs to its end."
    begin, moved, seen, text = time.perf_counter(), None, set(), ''
    here, there = os.openpty()     # bars are drawn on terminals
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    p = subprocess.Popen(command, stdout=there, stderr=there)
    os.close(there)
    while chunk := read_terminal(here):
        text += chunk.decode(errors='replace')
        seen |= {*GOING.findall(text)}
        if moved is None and len(seen) > 1: moved = time.perf_counter() - begin   # where it began, and one step on
    os.close(here)
    log.write_text(text)
    if p.wait(): raise SystemExit(f'{command[0]}: exit code {p.returncode}, see {log}')
    return moved

def read_terminal(here):
    try: return os.read(here, 1 << 16)
    except OSError: return b''      # whoever wrote has ended

def undo(root, out):
    "Crops as the material has them: the first videos are not cut yet."
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(['cp', '-al', root/'crops', out], check=True)
    n = sum(1 for _ in (root/'dets').iterdir())
    for k in range(min(100, n//20)):
        v = name_of(k)
        shutil.rmtree(out/v.country/v.city/v.id)

def kill(step, root, share, seconds):
    "Kill a step after some seconds, let the same command go on, and hold its result against the one made in one go."
    out = root/'killed'
    out.mkdir(exist_ok=True)
    if step == 'extract': undo(root, out/'crops')
    command = commands(root, share, out)[step]
    if step == 'pretrain': command = [*command[:-1], '40']     # as many as `pretrain` and `resume` take together
    log = root/f'{step}.killed.log'
    with open(log, 'w') as f: p = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
    time.sleep(seconds)
    if p.poll() is not None: raise SystemExit(f'{step} ended before it was killed: try a smaller --kill')
    p.kill()
    p.wait()
    if step == 'pretrain': command[-1] = str(40 - StateFiles(out/'moco', 'moco').read()['step'])
    waited = until_it_goes_on(command, log)
    print(f'{step}: killed after {seconds:g} s, goes on after {waited:.1f} s, {same(step, root, out)}', flush=True)

def same(step, root, out):
    "Hold two results against each other; says what is the same, or raises `AssertionError`."
    if step == 'pack': return same_stores(root/'crops.lmdb', out/'crops.lmdb')
    if step == 'pretrain':
        one, two = (StateFiles(d/'moco', 'moco').read() for d in (root, out))
        assert one['step'] == two['step'] == 40
        a, b = one['parts']['model'], two['parts']['model']
        assert all(torch.equal(a[k], b[k]) for k in a)
        return f'{len(a)} tensors after step 40 are the same'
    one, two = (sorted(f.relative_to(d/'crops') for f in (d/'crops').rglob('*.*')) for d in (root, out))
    cut = [f for v in map(name_of, range(100)) for f in (root/'crops'/v.country/v.city/v.id).glob('*')]
    assert one == two and all(f.read_bytes() == (out/f.relative_to(root)).read_bytes() for f in cut)
    return f'{len(one):,} files are the same'

def same_stores(one, two):
    "Hold every crop of two stores against each other."
    a, b = CropStore(one), CropStore(two)
    assert sorted(a.keys) == sorted(b.keys)
    in_order = read_in_order(b) if (a.keys == b.keys).all() else (b.get(key) for key in a.keys.tolist())
    assert all(x == y for x, y in zip(read_in_order(a), in_order, strict=True))
    return f'{len(a):,} crops are the same'

# --- many machines

def on_machines(root, share):
    "Extract and pack on a Ray cluster of four nodes, kill a worker in the middle of each; the stores must be equal."
    import ray
    from ray.cluster_utils import Cluster
    out = root/'ray'
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    undo(root, out/'crops')
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    for _ in range(3): cluster.add_node(num_cpus=1)
    os.environ['RAY_ADDRESS'] = cluster.address
    try:
        begin = time.perf_counter()
        p = subprocess.Popen(commands(root, share, out)['extract'] + ['--engine', 'ray', '--workers', '4'])
        kill_one('crop_video')
        assert p.wait() == 0
        print(f'ray, extract: {time.perf_counter() - begin:.0f} s with a worker killed, {same("extract", root, out)}')
        begin = time.perf_counter()
        ray.init(log_to_driver=False, logging_level='ERROR')
        parts, cities = [out/'parts'/f'{k}' for k in range(4)], sorted((out/'crops').glob('land*/*'))
        for k, city in enumerate(cities): link_folder(city, parts[4*k//len(cities)]/city.parent.name/city.name)
        (out/'stores').mkdir()
        task = ray.remote(max_retries=5)(pack_part)
        refs = [task.remote(part, out/'stores'/f'{part.name}.lmdb') for part in parts]
        kill_one('pack_part')
        ray.get(refs)
        subprocess.run(script('reid_pack', out/'stores', out/'crops.lmdb', '--merge'), check=True)
        print(f'ray, pack: {time.perf_counter() - begin:.0f} s with a worker killed, '
              f'{same_stores(root/"crops.lmdb", out/"crops.lmdb")}')
    finally:
        ray.shutdown()
        for node in cluster.list_all_nodes(): node.kill_all_processes(check_alive=False, allow_graceful=False)

def link_folder(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)

def pack_part(part, store): pack(folder_source(part), store)

def kill_one(name):
    "Wait until workers of Ray do a task, and kill one."
    def at_work(p): return f'ray::{name}' in ' '.join(p.info['cmdline'] or [])
    while not (found := [*filter(at_work, psutil.process_iter(['cmdline']))]): time.sleep(.02)
    time.sleep(1)
    found[0].kill()

# --- the table

def show(done):
    "Print the steps side by side, with the slope of the last tenfold, and draw them; returns the figure."
    shares = sorted({float(s) for step in done.values() for s in step})
    print('| step |' + ''.join(f' {s:g} |' for s in shares) + ' slope |')
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    for step, by in done.items():
        at = [(s, *by[f'{s:g}']) for s in shares if f'{s:g}' in by]
        slope = np.log(at[-1][1]/at[-2][1])/np.log(at[-1][0]/at[-2][0]) if len(at) > 1 else np.nan
        print(f'| {step} |' + ''.join(f' {t:,.1f} s, {MB:,.0f} MB |' for _, t, MB in at) + f' {slope:.2f} |')
        for ax, k in zip(axs, (1, 2)): ax.loglog([a[0] for a in at], [a[k] for a in at], 'o-', ms=4, label=step)
    for ax, what in zip(axs, ('seconds', 'MB at the peak')):
        ax.set(xlabel='share of the paper\'s size', ylabel=what, xticks=shares, xticklabels=[f'{s:g}' for s in shares])
        ax.minorticks_off()
    fig.legend(*axs[0].get_legend_handles_labels(), loc='outside right center', fontsize=8)
    return fig

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('work', type=Path)
    p.add_argument('--share', type=float, default=.01)
    p.add_argument('--steps', default='')
    p.add_argument('--kill', type=float, help='seconds before a step is killed')
    p.add_argument('--ray', action='store_true')
    p.add_argument('--table', action='store_true')
    p.add_argument('--call', nargs='+')
    a = p.parse_args()
    if a.call: return globals()[a.call[0]](a.work, *a.call[1:])
    a.work = a.work.absolute()
    a.work.mkdir(parents=True, exist_ok=True)
    notes, root = a.work/'scale.json', a.work/f'{a.share:g}'
    done = json.loads(notes.read_text()) if notes.exists() else {}
    if a.table: return show(done).savefig(a.work/'scale.png', dpi=110)
    make_material(root, a.share)
    if a.ray: return on_machines(root, a.share)
    steps = commands(root, a.share)
    for step in a.steps.split(',') if a.steps else steps:
        if a.kill:
            kill(step, root, a.share, a.kill)
            continue
        if f'{a.share:g}' in done.get(step, {}): continue
        if step == 'evaluate': make_benchmark(root, a.share)
        seconds, MB = measure(steps[step], root/f'{step}.log')
        done.setdefault(step, {})[f'{a.share:g}'] = seconds, MB
        notes.write_text(json.dumps(done, indent=1))
        print(f'{step:10} {seconds:8.1f} s {MB:8.0f} MB', flush=True)

if __name__ == '__main__': main()
