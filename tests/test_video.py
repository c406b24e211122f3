"Frames by number: pixel for pixel those of a full sequential decode, on whatever people call a video."
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from reid_nb.parts import video as video_
from reid_nb.parts import core

GROUND = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 400, 3), np.uint8), (0, 0), 3)

def film(path, n=150, codec='libx264', times=None, container=None, **options):
    "A street that pans, with a square that walks the other way."
    with av.open(str(path), 'w', container_options=container or {}) as f:
        s = f.add_stream(codec, rate=25, options=dict(threads='1') | options)
        s.width, s.height, s.pix_fmt = 160, 96, 'yuv420p'
        if times is not None: s.codec_context.time_base = Fraction(1, 1000)
        for i in range(n):
            rgb = GROUND[:, i:i + 160].copy()
            rgb[20:70, 150 - i:150 - i + 8] = 250
            if i == n//2: rgb[:] = 255 - rgb
            frame = av.VideoFrame.from_ndarray(rgb)
            if times is not None: frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            f.mux(s.encode(frame))
        f.mux(s.encode())
    return path

def turned(path, source):
    "The same film, with a note in it to turn the picture by 90 degrees."
    raw = bytearray(film(source).read_bytes())
    at = raw.find(b'tkhd') + 44
    raw[at:at + 36] = struct.pack('>9i', 0, 1 << 16, 0, -1 << 16, 0, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(raw)
    return path

def x264(**options): return {'x264-params': ':'.join(f'{k.replace("_", "-")}={v}' for k, v in options.items())}

def cut_off(path, source, share=.6, **kw):
    raw = film(source, **kw).read_bytes()
    path.write_bytes(raw[:int(len(raw)*share)])
    return path

def mistimed(path, source):
    "A film whose packets all claim to be shown when they are decoded."
    with av.open(str(film(source, **x264(keyint=40, bframes=3)))) as f, av.open(str(path), 'w') as out:
        s = out.add_stream_from_template(f.streams.video[0])
        for p in f.demux(video=0):
            if p.size:
                p.dts, p.pts, p.stream = p.dts + 1024, p.dts + 1024, s
                out.mux(p)
    return path

def damaged(path, source):
    raw = bytearray(film(source, container=dict(movflags='faststart'), **x264(keyint=30)).read_bytes())
    for at in range(len(raw)//2, len(raw)//2 + 200): raw[at] ^= 0x55
    path.write_bytes(raw)
    return path

FAST = dict(container=dict(movflags='faststart'))
WHEN = np.random.default_rng(0).choice([20, 40, 80, 400], 150).cumsum()
KINDS = {  # name: (what makes the file, may the plan be used?)
    'defaults': (lambda d: film(d/'a.mp4'), True),
    'short groups': (lambda d: film(d/'a.mp4', **x264(keyint=20)), True),
    'matroska': (lambda d: film(d/'a.mkv', **x264(keyint=40)), True),
    'variable rate': (lambda d: film(d/'a.mp4', times=WHEN, **x264(keyint=50)), True),
    'variable rate, matroska': (lambda d: film(d/'a.mkv', times=WHEN, **x264(keyint=50)), True),
    'open groups': (lambda d: film(d/'a.mp4', **x264(open_gop=1, keyint=24, bframes=4)), True),
    'no fresh start': (lambda d: film(d/'a.mp4', **x264(intra_refresh=1, keyint=25)), True),
    'many slices': (lambda d: film(d/'a.mp4', **x264(slices=4, keyint=30, b_pyramid='strict')), True),
    'interlaced': (lambda d: film(d/'a.mp4', **x264(tff=1, keyint=30)), True),
    'no B': (lambda d: film(d/'a.mp4', **x264(bframes=0, keyint=30)), True),
    'fragments': (lambda d: film(d/'a.mp4', container=dict(movflags='frag_keyframe+empty_moov'), **x264(keyint=30)),
                  True),
    'rotation': (lambda d: turned(d/'a.mp4', d/'b.mp4'), True),
    'starts late': (lambda d: film(d/'a.mp4', times=WHEN + 5000, **x264(keyint=50)), True),
    'times of decoding': (lambda d: mistimed(d/'a.mp4', d/'b.mp4'), True),
    'transport stream': (lambda d: film(d/'a.ts', **x264(keyint=30)), False),
    'MPEG-4 in AVI': (lambda d: film(d/'a.avi', codec='mpeg4', bf='2'), False),
    'H.264 in AVI': (lambda d: film(d/'a.avi', **x264(keyint=30)), False),
    'cut-off mp4': (lambda d: cut_off(d/'a.mp4', d/'b.mp4', **FAST, **x264(keyint=30)), None),
    'cut-off matroska': (lambda d: cut_off(d/'a.mkv', d/'b.mkv', **x264(keyint=30)), None),
    'cut-off stream': (lambda d: cut_off(d/'a.ts', d/'b.ts'), False),
    'damaged': (lambda d: damaged(d/'a.mp4', d/'b.mp4'), None)}

def all_frames(path):
    "What a sequential decode gives, up to its end or to an error."
    found = []
    try:
        for _, rgb in video_.read_frames(path): found.append(rgb)
    except core.BadInput: found.append(None)
    return found

@pytest.mark.parametrize('kind', KINDS)
def test_each_frame_is_the_one_of_its_number(kind, tmp_path):
    make, planned = KINDS[kind]
    path = make(tmp_path)
    whole = all_frames(path)
    broken = whole and whole[-1] is None
    n = len(whole) - bool(broken)
    if planned is not None: assert bool(video_.list_packets(path)) == planned
    film, k = cv2.VideoCapture(str(path)), 0
    while (read := film.read())[0] and k < n:  # it has its own ways with damage and with the colours of half pictures
        assert kind in ('damaged', 'interlaced') or (read[1][..., ::-1] == whole[k]).all(), k
        k += 1
    if not broken: assert k == n
    rng = np.random.default_rng(0)
    for wanted in ([0], [n - 1], [n//2, n//2 + 1], range(0, n, 12), rng.choice(n, 15), range(n), [], [5, n + 9]):
        found = []
        try:
            for i, rgb in video_.read_frames(path, wanted): found.append((i, rgb))
        except core.BadInput: assert broken
        due = sorted({int(i) for i in wanted if i < n})
        if not broken: assert [i for i, _ in found] == due
        assert all(i in due and (rgb == whole[i]).all() for i, rgb in found if i < n)

def decoded(path, wanted):
    return sum(video_.plan_packets(video_.list_packets(path), wanted))

def test_the_plan_decodes_little(tmp_path):
    path = film(tmp_path/'a.mp4', **x264(keyint=30, scenecut=0))
    assert decoded(path, [0]) == 1 and decoded(path, range(150)) == 150 and decoded(path, []) == 0
    assert decoded(path, [30, 60]) == 2 and decoded(path, [149]) < 30 and decoded(path, range(0, 150, 12)) < 100

def test_a_list_that_lies_is_found_out(tmp_path, monkeypatch):
    path = film(tmp_path/'a.mp4', **x264(keyint=30))
    whole, honest = dict(video_.read_frames(path)), video_.list_packets(path)
    swapped = [p._replace(pts=q.pts) for p, q in zip(honest, honest[1:] + honest[:1])]
    late = [p._replace(pts=p.pts + 10**6*(k % 2)) for k, p in enumerate(honest)]
    for lie in (swapped, late, [p._replace(pts=-p.pts) for p in honest]):
        monkeypatch.setattr(video_, 'list_packets', lambda video: lie)
        for wanted in (range(0, 140, 12), [77], range(100, 140)):
            found = dict(video_.read_frames(path, wanted))
            assert list(found) == list(wanted) and all((rgb == whole[i]).all() for i, rgb in found.items())

def test_rotation_is_applied(tmp_path):
    for turn, (a, b, c, d, x, y) in {90: (0, 1, -1, 0, 96, 0), 180: (-1, 0, 0, -1, 160, 96),
                                     270: (0, -1, 1, 0, 0, 160)}.items():
        raw = bytearray(film(tmp_path/'a.mp4', 5).read_bytes())
        at = raw.find(b'tkhd') + 44
        raw[at:at + 36] = struct.pack('>9i', *(v << 16 for v in (a, b)), 0, *(v << 16 for v in (c, d)), 0,
                                      x << 16, y << 16, 1 << 30)
        (tmp_path/'turned.mp4').write_bytes(raw)
        (_, lying), = video_.read_frames(tmp_path/'a.mp4', [0])
        (_, up), = video_.read_frames(tmp_path/'turned.mp4', [0])
        assert (up == np.rot90(lying, -turn//90)).all()

def test_broken_videos_are_bad_input(tmp_path):
    raw = film(tmp_path/'a.mp4', 60).read_bytes()
    cases = dict(cut=raw[:len(raw)//2], empty=b'', text=b'hello'*100, page=b'<html>not a video</html>')
    for name, content in cases.items():
        path = tmp_path/f'{name}.mp4'
        path.write_bytes(content)
        for wanted in (None, [0, 30]):
            with pytest.raises(core.BadInput): list(video_.read_frames(path, wanted))

def test_real_frames(data):
    for path in sorted((data/'real_city'/'videos').rglob('*.mp4')):
        wanted, film, k = range(3, 400, 11), cv2.VideoCapture(str(path)), -1
        for i, rgb in video_.read_frames(path, wanted):
            while k < i: k, bgr = k + 1, film.read()[1]
            assert (bgr[..., ::-1] == rgb).all()
