"The door for pictures: whatever a file holds, a picture or one line; a set keeps count of what is left out."
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reid_nb.crop_store import pack
from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.core import BadInput, decode, read_rgb
from reid_nb.parts.scoring import features_of
from reid_nb.parts.weights import SMALL

def encoded(form, mode='RGB', **kw):
    out = io.BytesIO()
    rgb = np.random.default_rng(0).integers(0, 255, (64, 32, 3), np.uint8)
    Image.fromarray(rgb).convert(mode).save(out, form, **kw)
    return out.getvalue()

def claims(width, height, data=zlib.compress(bytes(99))):
    "A PNG that claims to be large"
    def number(n): return struct.pack('>I', n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', data) + chunk(b'IEND', b'')

GOOD = {'rgb.jpg': encoded('JPEG'), 'grey.jpg': encoded('JPEG', 'L'), 'ink.jpg': encoded('JPEG', 'CMYK'),
        'rgb.png': encoded('PNG'), 'palette.png': encoded('PNG', 'P'), 'glass.png': encoded('PNG', 'RGBA'),
        'bits.png': encoded('PNG', '1'), 'rgb.bmp': encoded('BMP'), 'rgb.webp': encoded('WEBP'),
        'glass.webp': encoded('WEBP', 'RGBA'), 'steps.jpg': encoded('JPEG', progressive=True)}
BAD = {'empty.jpg': b'', 'text.jpg': b'no picture', 'half.png': GOOD['rgb.png'][:60], 'huge.png': claims(10**5, 10**5),
       'large.png': claims(30_000, 30_000), 'none.png': claims(0, 0), 'zeros.jpg': bytes(5000),
       'gif.jpg': encoded('GIF')[:9]}

@pytest.mark.parametrize('name', sorted(GOOD))
def test_every_kind_is_read_as_rgb(tmp_path, name):
    (tmp_path/name).write_bytes(GOOD[name])
    rgb = read_rgb(tmp_path/name)
    assert rgb.shape == (64, 32, 3) and rgb.dtype == np.uint8 and (rgb == decode(GOOD[name])).all()

@pytest.mark.parametrize('name', sorted(BAD))
def test_what_is_no_picture_is_one_line(tmp_path, name):
    (tmp_path/name).write_bytes(BAD[name])
    assert decode(BAD[name]) is None
    with pytest.raises(BadInput, match=f'{name}: not a picture'): read_rgb(tmp_path/name)

def bomb(side):
    "A black PNG, whole: a million times smaller than its pixels"
    size, packer, zeros = side*(3*side + 1), zlib.compressobj(1), bytes(1 << 20)
    data = b''.join(packer.compress(zeros) for _ in range(size >> 20))
    return claims(side, side, data + packer.compress(bytes(size % (1 << 20))) + packer.flush())

def test_a_small_file_of_many_pixels_takes_no_memory(tmp_path):
    (tmp_path/'bomb.png').write_bytes(bomb(20_000))
    code = ('from reid_nb.parts.core import decode; print(decode(open("bomb.png", "rb").read()), '
            'next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])')
    # VmHWM is this process's own peak; ru_maxrss outlives exec, so that of the test's process would be in it
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('None ') and int(done.stdout[5:]) < 1_000_000    # kB; its pixels are 1,200,000

@given(st.sampled_from(sorted(GOOD)), st.integers(0, 10**6), st.integers(0, 10**6), st.binary(max_size=20))
@settings(deadline=None, max_examples=300)
def test_a_damaged_picture_is_a_picture_or_none(name, at, cut, junk):
    data = GOOD[name]
    at, cut = at % len(data), cut % (len(data) + 1)
    rgb = decode(data[:at] + junk + data[at + len(junk):][:cut])
    assert rgb is None or rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8

def test_packing_keeps_count(tmp_path):
    (tmp_path/'crops').mkdir()
    for k, (name, data) in enumerate((GOOD | BAD).items()): (tmp_path/'crops'/f'{k:02d}_{name}').write_bytes(data)
    store = pack(tmp_path/'crops', tmp_path/'crops.lmdb')
    assert len(store) == len(GOOD) and len(store.skipped) == len(BAD)

@pytest.mark.parametrize('name', ['text.jpg', 'huge.png'])
def test_a_benchmark_names_the_picture(tmp_path, name):
    for part, camera in ('query', 1), ('bounding_box_test', 2):
        (tmp_path/part).mkdir()
        for pid in range(1, 4): (tmp_path/part/f'{pid:04d}_c{camera}s1_000000_00.jpg').write_bytes(GOOD['rgb.jpg'])
    (tmp_path/'query'/'0002_c1s1_000000_00.jpg').write_bytes(BAD[name])
    with pytest.raises(BadInput, match='0002_c1s1_000000_00.jpg'):
        features_of(read_benchmark('market_folder', tmp_path), SMALL, False)
