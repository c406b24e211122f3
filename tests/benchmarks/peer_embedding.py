"""How long 2,000 crops take to embed, beside Roboflow's reid: the same OSNet with the same weights, one core each.

    python tests/benchmarks/peer_embedding.py [N]

Needs `pip install --no-deps reid==0.1.0rc1 supervision timm pyDeprecate` beside the package. Three runs each, in turn,
in one process; the files are crops of the toy city, read from disk by both."""
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

torch.set_num_threads(1)

from reid import ReIDModel  # noqa: E402
from reid_nb import load  # noqa: E402
from reid_nb.parts.core import walk  # noqa: E402
from reid_nb.parts.models import torchreid_model  # noqa: E402
from reid_nb.parts.published import import_weights  # noqa: E402
from reid_nb.parts.toy_city import build_toy  # noqa: E402

def main(n=2000):
    files = [p for p in walk(build_toy('nbs/_run/toy')/'market') if p.suffix == '.jpg']
    files = (files*(n//len(files) + 1))[:n]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)/'osnet_x1_0.pth'
        torch.save(torchreid_model('osnet_x1_0').state_dict(), weights)
        ours = load(import_weights(weights, out=Path(folder)/'ours')[0])
        theirs = ReIDModel.from_pretrained(str(weights), architecture='osnet_x1_0', device='cpu')
        ways = dict(ours=lambda: ours.embed(files, batch=32),
                    theirs=lambda: theirs.extract_embeddings_from_paths([*map(str, files)], batch_size=32))
        seconds, found = {k: [] for k in ways}, {}
        for _ in range(3):
            for name, way in ways.items():
                begin = time.perf_counter()
                found[name] = way()
                seconds[name].append(time.perf_counter() - begin)
    unit = found['theirs']/np.linalg.norm(found['theirs'], axis=1, keepdims=True)
    print(f'{platform.machine()}, torch {torch.__version__}, reid {version("reid")}; {n:,} crops, one thread')
    for name, s in seconds.items(): print(f'{name:7} {median(s):7.1f} s ({min(s):.1f} to {max(s):.1f})')
    ratio = median(seconds["theirs"])/median(seconds["ours"])
    print(f'theirs/ours {ratio:.2f}; largest difference of the vectors {np.abs(unit - found["ours"]).max():.1e}')

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
