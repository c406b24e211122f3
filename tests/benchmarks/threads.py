"""How PyTorch's threads wait for each other, quiet and beside two busy processes.

    python tests/benchmarks/threads.py [--rounds 5] [--busy 0 2] [--walk]

Threads of GNU OpenMP spin for some milliseconds before they sleep. `reid_nb` lets them spin ten thousand times only
(GOMP_SPINCOUNT, set before PyTorch is loaded, unless the user has set something). Each task runs in a process of its
own, in turns as it was and as it is; medians, and the range of the rounds. `--walk` adds `reid_quickstart --small`."""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

# KMP_BLOCKTIME means nothing to GNU OpenMP; that it is set tells `reid_nb` to change nothing
WAYS = dict(before={'KMP_BLOCKTIME': '200'}, short={'GOMP_SPINCOUNT': '10000'})
TASKS = ['moco', 'finetune', 'embed']
BATCH, SIZE = 64, (96, 48)

def child(task):
    "Prints the images a second of a task, median of its steps over 8 seconds."
    import numpy as np
    import torch
    from reid_nb.parts.models import build_backbone
    from reid_nb.parts.weights import embed
    from reid_nb.finetune import Trainer
    from reid_nb.parts.supervised import RECIPES
    from reid_nb.parts.models import ReidModel
    from reid_nb.moco import MoCo, train_step
    from reid_nb.parts.device import to_input
    torch.manual_seed(0)
    cpu, about = torch.device('cpu'), dict(size=SIZE, mean=(.5, .5, .5), std=(.2, .2, .2))
    pixels = np.random.default_rng(0).integers(0, 255, (BATCH, *SIZE, 3), np.uint8)
    net = build_backbone('resnet10')
    if task == 'moco':
        moco = MoCo(net, K=8*BATCH).to(memory_format=torch.channels_last).train()
        opt = torch.optim.AdamW(moco.encoder_q.parameters(), 1e-3)
        x = to_input(pixels, about['mean'], about['std'])
        def step(): train_step(moco, opt, x, x, precision='fp32')
    else:
        model = ReidModel(net, 16).to(memory_format=torch.channels_last)
        trainer = Trainer(model, RECIPES['bot'], about['mean'], about['std'], cpu, 'fp32')
        batch = dict(img=torch.from_numpy(pixels), pid=torch.arange(16).repeat_interleave(4))
        def step(): trainer.train_batch(batch)
        if task == 'embed':
            model.eval()
            images = list(pixels)
            def step(): embed(model, about, images)
    seconds, end = [], time.monotonic() + 8
    step()
    while time.monotonic() < end or len(seconds) < 3:
        t = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - t)
    print(BATCH/median(seconds))

def run(task, way):
    names = 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= WAYS[way]
    if task != 'walk':
        call = [sys.executable, __file__, '--child', task]
        return float(subprocess.run(call, capture_output=True, text=True, env=env, check=True).stdout)
    with tempfile.TemporaryDirectory() as tmp:
        t = time.perf_counter()
        exe = Path(sys.executable).parent/'reid_quickstart'
        subprocess.run([exe, '--small', '--dest', f'{tmp}/walk'], capture_output=True, env=env, check=True)
        return 1/(time.perf_counter() - t)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--busy', type=int, nargs='+', default=[0, 2])
    parser.add_argument('--walk', action='store_true')
    parser.add_argument('--child', choices=TASKS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child: return child(a.child)
    print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; speeds, and short over before in the same round')
    for busy in a.busy:
        others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
        try:
            for task in TASKS + ['walk']*a.walk:
                seen = [{way: run(task, way) for way in WAYS} for _ in range(a.rounds)]
                ratio = sorted(s['short']/s['before'] for s in seen)
                unit = 'walks a second' if task == 'walk' else 'images a second'
                speeds = ', '.join(f'{way} {median(s[way] for s in seen):.3g}' for way in WAYS)
                spread = f'{median(ratio):.2f} times ({ratio[0]:.2f} to {ratio[-1]:.2f})'
                print(f'{busy} busy  {task:9} {speeds} {unit}; {spread}', flush=True)
        finally:
            for p in others: p.kill()

if __name__ == '__main__': main()
