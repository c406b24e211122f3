"Whatever is called a video: frames as a player shows them, counted the same everywhere, or one line; never an address."
import logging
import multiprocessing
import os
import struct
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reid_nb.parts import decisions as dec
from reid_nb.parts import page as page_
from reid_nb.parts import tracks as tracks_
from reid_nb.parts import video as video_
from reid_nb.parts.core import BadInput
from reid_nb.parts.download import video_facts
from reid_nb.parts.film import draw_film

GROUND = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8), (0, 0), 3)

def scene(n, height, width):
    "A street with somebody who walks; red in the upper left corner, green in the upper right, blue below on the left."
    ground = cv2.resize(GROUND, (width, height))
    for i in range(n):
        rgb, x = ground.copy(), 3*i % max(1, width - 10)
        rgb[height//3:-height//8 or None, x:x + 10] = 250
        for y, x, colour in ((0, 0, (255, 0, 0)), (0, -1, (0, 255, 0)), (-1, 0, (0, 0, 255))):
            rgb[:12 if y == 0 else None, :16 if x == 0 else None][-12 if y else 0:, -16 if x else 0:] = colour
        yield rgb

def film(path, n=40, height=96, width=160, codec='libx264', pix='yuv420p', times=None, rate=10, ratio=None, **options):
    with av.open(f'file:{path}', 'w') as f:
        s = f.add_stream(codec, rate=rate, options=options)
        s.width, s.height, s.pix_fmt = width, height, pix
        if ratio: s.codec_context.sample_aspect_ratio = Fraction(ratio)
        if times is not None: s.codec_context.time_base = Fraction(1, 1000)
        for i, rgb in enumerate(scene(n, height, width)):
            frame = av.VideoFrame.from_ndarray(rgb)
            if times is not None: frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            f.mux(s.encode(frame))
        f.mux(s.encode())
    return path

def joined(path, *parts):
    path.write_bytes(b''.join(film(path.with_name(f'{k}{path.suffix}'), **kw).read_bytes()
                              for k, kw in enumerate(parts)))
    return path

def frames(path, *a): return [rgb for _, rgb in video_.read_frames(path, *a)]

# Turned and mirrored

TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
EIGHT = TURNS + [(-a, b, -c, d) for a, b, c, d in TURNS]

def with_matrix(path, source, matrix, box=b'tkhd'):
    "The same film, with this matrix in the header of its track, or of the whole file."
    raw, (a, b, c, d) = bytearray(source.read_bytes()), (round(x*65536) for x in matrix)
    at = raw.index(box) + 4
    assert raw[at] == 0     # version 0: times of four bytes
    at += 40 if box == b'tkhd' else 36
    raw[at:at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
    return path

def as_players_show(rgb, matrix):
    "Each pixel where ISO 14496-12 puts it: (x, y) at (ax + cy, bx + dy)."
    a, b, c, d = matrix
    y, x = np.indices(rgb.shape[:2])
    to_x, to_y = a*x + c*y, b*x + d*y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    shown = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    shown[to_y, to_x] = rgb
    return shown

@pytest.mark.parametrize('box', [b'tkhd', b'mvhd'])
@pytest.mark.parametrize('matrix', EIGHT)
def test_all_eight_positions(tmp_path, matrix, box):
    plain = film(tmp_path/'plain.mp4')
    path = with_matrix(tmp_path/'a.mp4', plain, matrix, box)
    due = [as_players_show(rgb, matrix) for rgb in frames(plain)]
    for wanted in (None, range(40), [0, 7, 33]):
        for i, rgb in video_.read_frames(path, wanted): assert rgb.flags.c_contiguous and (rgb == due[i]).all()
    for k, (i, rgb) in zip((30, 31, 32), video_.frames_between(path, 30, 33), strict=True):
        assert i == k and (rgb == due[i]).all()
    assert video_facts(path)['height'] == len(due[0])
    shown = frames(draw_film(path, tmp_path/'film.mp4', [], {}, start=3, stop=8))   # for browsers, with no matrix
    assert shown[0].shape == due[3].shape and np.abs(shown[0].astype(int) - due[3]).mean() < 8

def test_two_matrices_are_multiplied(tmp_path):
    plain = film(tmp_path/'plain.mp4', 3)
    once = with_matrix(tmp_path/'once.mp4', plain, (0, 1, -1, 0))
    twice = with_matrix(tmp_path/'twice.mp4', once, (-1, 0, 0, 1), b'mvhd')
    assert (frames(twice)[0] == as_players_show(frames(once)[0], (-1, 0, 0, 1))).all()

@pytest.mark.parametrize('ending', ['mp4', 'mkv', 'mov'])
@pytest.mark.parametrize('degrees, mirror', [(90, False), (180, False), (270, False), (0, True), (90, True)])
def test_as_others_write_it(tmp_path, ending, degrees, mirror):
    "FFmpeg's own writers, Matroska's projection among them."
    path, plain = tmp_path/f'a.{ending}', film(tmp_path/'plain.mp4', 5)
    with av.open(str(plain)) as f, av.open(str(path), 'w') as out:
        s = out.add_stream_from_template(f.streams.video[0])
        s.set_display_rotation(degrees, hflip=mirror)
        for p in f.demux(video=0):
            if p.size: p.stream = s; out.mux(p)
    rgb, shown = frames(plain)[0], frames(path)[0]
    turned = [np.rot90(x, k) for x in (rgb[:, ::-1] if mirror else rgb, ) for k in (degrees//90, -degrees//90)]
    if mirror: turned += [x[:, ::-1] for x in (np.rot90(rgb, degrees//90), np.rot90(rgb, -degrees//90))]
    assert any(shown.shape == x.shape and (shown == x).all() for x in turned)
    if mirror and not degrees: assert (shown == rgb[:, ::-1]).all()

@pytest.mark.parametrize('degrees, near', [(17, 0), (45, 0), (73, 1), (200, 2), (359.9, 0)])
def test_odd_angles_become_the_nearest(tmp_path, degrees, near):
    plain, (c, s) = film(tmp_path/'plain.mp4', 3), (np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
    shown = frames(with_matrix(tmp_path/'a.mp4', plain, (c, s, -s, c)))[0]
    assert (shown == np.rot90(frames(plain)[0], -near)).all()

@pytest.mark.parametrize('matrix', [(0, 0, 0, 0), (1, 1, 1, 1), (32767, 0, 0, 32767), (.5, 0, 0, 1), (-2**15, 0, 0, 1)])
def test_matrices_without_sense_end_nothing(tmp_path, matrix):
    assert len(frames(with_matrix(tmp_path/'a.mp4', film(tmp_path/'plain.mp4', 3), matrix))) == 3

def test_a_selfie_is_followed_like_its_mirror_image(tmp_path):
    plain = film(tmp_path/'plain.mp4', height=240, width=320)
    selfie = with_matrix(tmp_path/'selfie.mp4', plain, (-1, 0, 0, 1))
    (a,), (b,) = tracks_.find_tracks(plain), tracks_.find_tracks(selfie)
    for (i, (x1, y1, x2, y2)), (j, box) in zip(a.seen, b.seen, strict=True):
        assert i == j and np.abs(np.array(box) - (320 - x2, y1, 320 - x1, y2)).max() <= 12
    assert np.mean([box[0] for _, box in a.seen[:5]]) < 100 < np.mean([box[0] for _, box in b.seen[:5]])

# Pictures that change on the way

LARGE = dict(height=144, width=240)
CHANGES = {'larger': ('ts', [{}, LARGE]), 'smaller': ('ts', [LARGE, {}]), 'and back': ('ts', [{}, LARGE, {}]),
           'upright': ('ts', [{}, dict(height=160, width=96)]), 'raw': ('h264', [{}, LARGE]),
           'other pixels': ('ts', [{}, dict(pix='yuv422p'), dict(pix='yuv420p10le')]),
           'other pixels and size': ('ts', [{}, dict(pix='yuv444p') | LARGE])}

@pytest.mark.parametrize('change', CHANGES)
def test_one_size_from_the_first_frame_to_the_last(tmp_path, caplog, change):
    ending, parts = CHANGES[change]
    path, n = joined(tmp_path/f'all.{ending}', *parts), 40*len(parts)
    shape = (parts[0].get('height', 96), parts[0].get('width', 160), 3)
    video_.warn_once.cache_clear()      # a passed test's folder is deleted, and its path comes again
    with caplog.at_level(logging.WARNING): whole = frames(path)
    assert len(whole) == n and {rgb.shape for rgb in whole} == {shape}
    for (i, rgb), due in zip(video_.read_frames(path, [45, 60, n - 1]), (45, 60, n - 1), strict=True):
        assert i == due and (rgb == whole[i]).all()     # the size is that of frame 0, wanted or not
    first, last = whole[0], whole[-1]
    for y, x in ((2, 2), (2, -3), (-3, 2)):             # the corners stay in their places: scaled, and not cut
        assert np.abs(first[y, x].astype(int) - last[y, x]).max() < 60
    notes = [r for r in caplog.records if 'change from' in r.message]
    assert len(notes) == (change != 'other pixels') and all(path.name in r.message for r in notes)
    list(tracks_.find_tracks(path))
    draw_film(path, tmp_path/'film.mp4', [], {})

def test_the_others_of_a_folder_get_done(run, tmp_path):
    there = tmp_path/'videos'
    there.mkdir()
    odd = joined(tmp_path/'odd.ts', dict(height=240, width=320), dict(height=360, width=480))
    names = [f'it+rome+vid0000000{k}' for k in range(1, 5)]
    for k, name in enumerate(names): (there/f'{name}.ts').write_bytes((odd if k == 1 else tmp_path/'0.ts').read_bytes())
    done = run('reid_detect', there, '--dest', tmp_path/'dets')
    assert done.returncode == 0 and sorted(p.stem for p in (tmp_path/'dets').glob('*.pkl')) == names
    assert done.stderr.count('change from 320x240 to other sizes') >= 1 and 'Traceback' not in done.stderr

@pytest.mark.parametrize('height, width', [(1, 1), (1, 200), (2, 2), (97, 161), (3, 401), (2000, 2)])
def test_odd_sizes(tmp_path, height, width):
    path = film(tmp_path/'a.mkv', 12, height, width, codec='ffv1', pix='yuv444p')
    assert {rgb.shape for rgb in frames(path)} == {(height, width, 3)}
    assert tracks_.find_tracks(path) is not None
    assert len(frames(draw_film(path, tmp_path/'film.mp4', [], {}))) == 12

@pytest.mark.parametrize('ratio, width, matrix', [('1', 160, EIGHT[0]), ('2', 320, EIGHT[0]), ('1/2', 80, EIGHT[4]),
                                                  ('2', 96, EIGHT[1])])
def test_pixels_that_are_not_square(tmp_path, ratio, width, matrix):
    "Boxes are in stored pixels, as OpenCV's; the film has the shape that players give it."
    path = with_matrix(tmp_path/'a.mp4', film(tmp_path/'plain.mp4', 5, ratio=ratio), matrix)
    turned = matrix[0] == 0
    assert frames(path)[0].shape[:2] == ((160, 96) if turned else (96, 160))
    shown = frames(draw_film(path, tmp_path/'film.mp4', [], {}))[0].shape
    assert shown[:2] == ((160, 48) if turned and ratio == '2' else (160, 96) if turned else (96, width))

# Names, and what is inside

NAMES = [
    b'12:30:05.mp4', b'cam:1.mp4', b'http:foo.mp4', b'concat:a|b.mp4', b'file:x.mp4', b'data:text,x.mp4', b'pipe:0',
    b'-lead.mp4', b'film%03d.mp4', b'new\nline.mp4', b'o\'neill "x" `$x`.mp4', 'ünï 日本 🎥.mp4'.encode(),
    b'\xff\xfe.mp4', b'subfile,,start,1,end,9,,:x.mp4', b'crypto:x.mp4', b'50%25 #1 ?a=b&c.mp4', b'~.mp4', b'a\\b.mp4',
    b'noend', b'up.MP4', b'*.mp4', b' .mp4', b'lavfi:testsrc.mp4', b'tee:x.mp4', b'rtp:1.mp4', b'film.m3u8',
    b'film.sdp']

@pytest.mark.parametrize('name', NAMES, ids=ascii)
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    source = film(tmp_path/'source.mp4', 5)
    (tmp_path/'names').mkdir()
    monkeypatch.chdir(tmp_path/'names')
    name, out = os.fsdecode(name), os.fsdecode(b'film ' + name + b'.mp4')
    Path(name).write_bytes(source.read_bytes())
    assert len(frames(name)) == len(frames(Path(name).absolute())) == video_.count_frames(name) == 5
    assert len(tracks_.frame_times(name)) == video_facts(name)['frames'] == page_.check_clip(name) == 5
    assert [i for i, *_ in video_.read_frames(name, [1, 3])] == [1, 3]
    assert len(frames(draw_film(name, out, [], {}))) == 5 and Path(out).is_file()
    assert len(list(Path().iterdir())) == 2

def test_a_picture_by_a_name_with_a_pattern(tmp_path):
    for name, grey in ('film%03d.png', 9), ('film001.png', 200):
        cv2.imwrite(str(tmp_path/name), np.full((8, 8, 3), grey, np.uint8))
    assert frames(tmp_path/'film%03d.png')[0].max() == 9

HLS = '#EXTM3U\n#EXT-X-TARGETDURATION:9\n'
LISTS = {
    'hls': HLS + '#EXTINF:9,\n{url}/a.ts\n#EXT-X-ENDLIST\n',
    'hls of files': HLS + '#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n',
    'hls with a key': HLS + '#EXT-X-KEY:METHOD=AES-128,URI="{url}/k"\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n',
    'hls of lists': '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}/list.m3u8\n',
    'concat': 'ffconcat version 1.0\nfile {url}/a.mp4\n', 'concat of files': 'ffconcat version 1.0\nfile secret.ts\n',
    'sdp': 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n'
           'a=rtpmap:96 H264/90000\n',
    'dash': '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
            'bandwidth="1"><BaseURL>{url}/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
    'asx': '<asx version="3"><entry><ref href="{url}/x.wmv"/></entry></asx>', 'rtsp': 'rtsptext\nrtsp://127.0.0.1/x\n',
    'smil': '<smil><body><video src="{url}/a.mp4"/></body></smil>', 'address': '{url}/a.mp4\n'}

@pytest.fixture(scope='module')
def server():
    "A server of this machine: (its address, what it was asked for)"
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)
        def log_message(self, *a): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}', asked
        s.shutdown()

@pytest.mark.parametrize('ending', ['mp4', 'ts', 'm3u8', 'sdp', 'mpd'])
@pytest.mark.parametrize('kind', LISTS)
def test_a_list_of_addresses_is_no_video(tmp_path, server, kind, ending):
    url, asked = server
    secret = film(tmp_path/'secret.ts', 3)
    path = tmp_path/f'list.{ending}'
    path.write_text(LISTS[kind].format(url=url, secret=secret))
    for f in (frames, video_.count_frames, tracks_.frame_times, video_facts, page_.check_clip, tracks_.find_tracks):
        with pytest.raises(BadInput, match='this is not a video'): f(path)
    assert asked == []

@pytest.mark.parametrize('address', [
    '{url}/a.mp4', 'concat:{secret}|{secret}', 'file:{secret}', 'pipe:0', '-', '/dev/zero', 'testsrc',
    'data:video/mp4;base64,AAAA', 'subfile,,start,0,end,0,,:{secret}'])
def test_an_address_is_no_file(tmp_path, server, address):
    address = address.format(url=server[0], secret=film(tmp_path/'secret.ts', 3))
    for f in (frames, video_.count_frames, tracks_.frame_times, tracks_.find_tracks):
        with pytest.raises(BadInput, match='no such video file'): f(address)
    assert server[1] == []

# The best stream

def with_cover(path, attached=True, stills=1, last=False):
    "A film of 40 frames and a picture of 64x64, before it or behind it."
    with av.open(str(film(path.with_name('source.mp4')))) as f, av.open(str(path), 'w') as out:
        def add_cover():
            s = out.add_stream('mjpeg', rate=1)
            s.width = s.height = 64
            s.pix_fmt = 'yuvj420p'
            if attached: s.disposition = av.stream.Disposition.attached_pic
            return s
        cover = None if last else add_cover()
        s = out.add_stream_from_template(f.streams.video[0])
        cover = cover or add_cover()
        for _ in range(stills): out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        for p in f.demux(video=0):
            if p.size: p.stream = s; out.mux(p)
        out.mux(cover.encode())
    return path

def counts(path):
    "How many frames there are, said by everything that says so."
    return {len(frames(path)), video_.count_frames(path), len(tracks_.frame_times(path)), video_facts(path)['frames'],
            page_.check_clip(path), len(frames(draw_film(path, path.with_name('film.mp4'), [], {})))}

@pytest.mark.parametrize('ending', ['mkv', 'mp4', 'mov'])
@pytest.mark.parametrize('kw', [dict(), dict(attached=False), dict(attached=False, stills=4), dict(last=True),
                                dict(attached=False, last=True)], ids=str)
def test_the_film_and_not_its_cover(tmp_path, ending, kw):
    path = with_cover(tmp_path/f'a.{ending}', **kw)
    assert counts(path) == {40} and frames(path)[0].shape == (96, 160, 3) and video_facts(path)['fps'] == 10

def sound(path, cover):
    with av.open(str(path), 'w') as f:
        s = f.add_stream('aac', rate=16_000)
        if cover:
            c = f.add_stream('mjpeg', rate=1)
            c.width, c.height, c.pix_fmt, c.disposition = 64, 64, 'yuvj420p', av.stream.Disposition.attached_pic
            f.mux(c.encode(av.VideoFrame(64, 64, 'yuvj420p')))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 16_000
        for p in (*s.encode(frame), *s.encode()): f.mux(p)
    return path

@pytest.mark.parametrize('cover', [False, True])
def test_sound_alone(tmp_path, cover):
    path = sound(tmp_path/'a.mp4', cover)
    for f in (frames, video_.count_frames, tracks_.frame_times, video_facts, page_.check_clip, tracks_.find_tracks):
        with pytest.raises(BadInput, match='holds no video stream'): f(path)

def test_a_codec_that_nobody_knows_and_a_title_in_latin_1(tmp_path):
    raw = film(tmp_path/'a.mp4', 5).read_bytes()
    (tmp_path/'b.mp4').write_bytes(raw.replace(b'avc1', b'zzz9'))
    with pytest.raises(BadInput, match='video stream'): frames(tmp_path/'b.mp4')
    with av.open(str(tmp_path/'a.mkv'), 'w') as f:
        f.metadata['title'] = 'Zoe Zoe'
        s = f.add_stream('libx264', rate=10)
        s.width, s.height, s.pix_fmt = 64, 64, 'yuv420p'
        for p in (*s.encode(av.VideoFrame(64, 64, 'yuv420p')), *s.encode()): f.mux(p)
    (tmp_path/'a.mkv').write_bytes((tmp_path/'a.mkv').read_bytes().replace(b'Zoe Zoe', b'Zo\xeb Zo\xff'))
    assert counts(tmp_path/'a.mkv') == {1}

# As many frames everywhere, and when

def trimmed(path, source, cut=2.7, key=2.0, end=9.):
    "As `ffmpeg -ss 2.7 -c copy`: packets from the key frame on; where the container can say so, shown from 2.7 s on."
    with av.open(str(source)) as f, av.open(str(path), 'w') as out:
        s = f.streams.video[0]
        o, later = out.add_stream_from_template(s), int(cut/s.time_base)
        for p in f.demux(s):
            if p.size and key <= p.pts*s.time_base < end:
                p.pts, p.dts, p.stream = p.pts - later, p.dts - later, o
                out.mux(p)
    return path

KEYS = dict(g='20', sc_threshold='0')
def x264(d, **kw): return film(d/'b.mp4', 60, **KEYS | kw)
def x265(d, open_groups=0):
    groups = f'keyint=20:min-keyint=20:scenecut=0:open-gop={open_groups}:log-level=none'
    return film(d/'b.mp4', 60, codec='libx265', **{'x265-params': groups})
def vpx(d, codec): return film(d/'a.webm', 90, codec=codec, **{'auto-alt-ref': '1', 'lag-in-frames': '16'})
def cut(path, start=0, share=1.):
    raw = path.read_bytes()
    path.write_bytes(raw[start:int(share*len(raw))])
    return path

KINDS = {  # name: (what makes the file, how many frames; None: as many as are read)
    'trimmed mp4': (lambda d: trimmed(d/'a.mp4', x264(d)), 33),
    'trimmed mp4, no B': (lambda d: trimmed(d/'a.mp4', x264(d, bf='0')), 33),
    'trimmed mov': (lambda d: trimmed(d/'a.mov', x264(d)), 33),
    'trimmed hevc': (lambda d: trimmed(d/'a.mp4', x265(d)), 33),
    'trimmed hevc, open groups': (lambda d: trimmed(d/'a.mp4', x265(d, 1)), 33),
    'trimmed into mkv': (lambda d: trimmed(d/'a.mkv', x264(d)), 40),
    'trimmed into ts': (lambda d: trimmed(d/'a.ts', x264(d)), 40),
    'hevc': (x265, 60), 'hevc, open groups': (lambda d: x265(d, 1), 60),
    'hevc, cut at an open group': (lambda d: trimmed(d/'a.mkv', x265(d, 1), cut=2.), None),
    'vp8 with hidden frames': (lambda d: vpx(d, 'libvpx'), 90), 'vp9': (lambda d: vpx(d, 'libvpx-vp9'), 90),
    'av1': (lambda d: film(d/'a.mp4', codec='libsvtav1'), 40),
    'gif': (lambda d: film(d/'a.gif', codec='gif', pix='rgb8'), 40),
    'ts from the middle': (lambda d: cut(film(d/'a.ts', 60, **KEYS), 7000), None),
    'ts twice': (lambda d: joined(d/'a.ts', {}, {}), 80),
    'avi': (lambda d: film(d/'a.avi', codec='mpeg4', bf='2'), 40),
    'mpeg': (lambda d: film(d/'a.mpg', codec='mpeg2video', rate=25), 40), 'flv': (lambda d: film(d/'a.flv'), 40),
    'cut-off mkv': (lambda d: cut(film(d/'a.mkv', 60), share=.8), None),
    'one frame': (lambda d: film(d/'a.mp4', 1), 1),
    'interlaced': (lambda d: film(d/'a.ts', **{'x264-params': 'tff=1:keyint=20'}), 40)}

@pytest.mark.parametrize('kind', KINDS)
def test_as_many_frames_everywhere(tmp_path, kind):
    make, n = KINDS[kind]
    path = make(tmp_path)
    n = n or len(frames(path))
    assert counts(path) == {n} and (np.diff(tracks_.frame_times(path)) > 0).all()
    with pytest.raises(BadInput, match=f'it has no frame {n}, only {n} frames'): tracks_.find_tracks(path, start=n)
    assert [i for i, _ in video_.frames_between(path, max(0, n - 2), n + 9)] == list(range(n))[-2:]

def test_a_file_that_is_written_anew_is_counted_anew(tmp_path):
    path = film(tmp_path/'a.ts', 20)
    assert video_.count_frames(path) == 20
    film(path, 30)
    assert video_.count_frames(path) == 30

STEADY, LATER = np.arange(40)*100, np.arange(40) >= 20

@pytest.mark.parametrize('ending', ['ts', 'mp4', 'mkv'])
@pytest.mark.parametrize('hours', [1, 10, 26])
def test_a_clock_that_jumps(tmp_path, ending, hours):
    path = film(tmp_path/f'a.{ending}', times=STEADY + 3_600_000*hours*LATER)
    times = tracks_.frame_times(path)
    assert len(times) == 40 and (np.diff(times) > 0).all() and times[-1] < 15 and abs(times[19] - 1.9) < .01
    assert page_.check_clip(path) == 40 and 40/video_facts(path)['fps'] < 15

def test_clocks(tmp_path):
    def seconds(ms, rate=0): return video_.pts_to_seconds(list(ms), 1e-3, rate)
    assert np.allclose(seconds(STEADY), STEADY/1000)
    assert np.allclose(seconds(STEADY + 5_000*LATER), (STEADY + 5_000*LATER)/1000)     # five seconds may be meant
    assert np.allclose(seconds(STEADY + 36_000_000*LATER)[[20, -1]], [11.9, 13.8])
    assert np.allclose(seconds(STEADY - 36_000_000*LATER), STEADY/1000)                # back
    assert np.allclose(seconds(STEADY*36_000), STEADY*36)                              # a picture an hour
    gone = [None if i == 17 else int(t) for i, t in enumerate(STEADY)]
    assert np.allclose(seconds(gone), STEADY/1000)
    for nothing in ([None]*40, [7]*40, [0, 0, 1, 1]*10): assert np.allclose(seconds(nothing, 10), STEADY/1000)
    assert np.allclose(seconds([None]*40, 1e6), np.arange(40)/25)
    assert seconds([5]).tolist() == [0] and seconds([None]).tolist() == [0]

@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-2**62, 2**62), st.integers(0, 10**4)), min_size=1, max_size=60),
       st.sampled_from([0., 1., 25., 1e9]))
def test_a_clock_always_rises_and_never_runs_away(pts, rate):
    times = video_.pts_to_seconds(pts, 1e-3, rate)
    assert len(times) == len(pts) and times[0] == 0 and (np.diff(times) > 0).all() and np.isfinite(times).all()

# Nobody moves

def still(path, n=20):
    rgb = next(scene(1, 240, 320))
    with av.open(str(path), 'w') as f:
        s = f.add_stream('libx264', rate=10)
        s.width, s.height, s.pix_fmt = 320, 240, 'yuv420p'
        for _ in range(n): f.mux(s.encode(av.VideoFrame.from_ndarray(rgb)))
        f.mux(s.encode())
    return path

def photo(path):
    cv2.imwrite(str(path), next(scene(1, 240, 320)))
    return path

@pytest.mark.parametrize('make', [lambda d: still(d/'a.mp4'), lambda d: still(d/'a.mp4', 1), lambda d: photo(d/'a.jpg'),
                                  lambda d: photo(d/'a.png')], ids=['still', 'one frame', 'jpg', 'png'])
def test_motion_finds_only_what_moves(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(BadInput, match='motion finds only what moves.*--weights'): dec.find_usable_tracks(path)
    with pytest.raises(BadInput) as e: tracks_.require_usable(path, tracks_.ClipTracks(detector='yolo26n.pt'))
    assert 'nobody found' in str(e.value) and 'finds only' not in str(e.value)

def test_the_note_of_detect(run, tmp_path):
    still(tmp_path/'it+rome+vid00000001.mp4')
    done = run('reid_detect', tmp_path, '--dest', tmp_path/'dets')
    assert done.returncode == 0 and 'detections written: 1' in done.stdout
    assert 'motion finds only what moves' in done.stderr

# Anything at all

def look_at(pipe):
    "A process that reads what it is told to, and says what came of it."
    av.logging.set_level(av.logging.PANIC)
    for path in iter(pipe.recv, None):
        said = []
        for f in (lambda p: len({rgb.shape for rgb in frames(p)}), video_.count_frames,
                  lambda p: len(frames(p, [0, 3, 99])), lambda p: tracks_.frame_times(p)[-1], video_.frame_rate,
                  video_.pixel_ratio, lambda p: len(list(video_.frames_between(p, 5, 7)))):
            try: said.append(f(path))
            except BadInput as e: said.append(f'{type(e).__name__}: {e}')
        pipe.send(said)

class Looker:
    "Reads videos in a process of its own, which may crash or hang."
    def __init__(self): self.process = None
    def __call__(self, path):
        if not self.process or not self.process.is_alive():
            self.pipe, other = multiprocessing.Pipe()
            self.process = multiprocessing.get_context('spawn').Process(target=look_at, args=[other], daemon=True)
            self.process.start()
            other.close()
        self.pipe.send(path)
        assert self.pipe.poll(120), 'it hangs'
        return self.pipe.recv()     # EOFError where the process is dead: a crash, or another exception
    def close(self):
        if self.process: self.process.kill()

@pytest.fixture(scope='module')
def looker():
    one = Looker()
    yield one
    one.close()

SEEDS = {'mp4': {}, 'mkv': {}, 'mov': {}, 'ts': {}, 'flv': {}, 'avi': dict(codec='mpeg4'),
         'webm': dict(codec='libvpx'), 'mpg': dict(codec='mpeg2video', rate=25), 'gif': dict(codec='gif', pix='rgb8'),
         'nut': dict(codec='mjpeg', pix='yuvj420p')}

@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    there = tmp_path_factory.mktemp('seeds')
    return {k: film(there/f'a.{k}', 10, 48, 64, **kw).read_bytes() for k, kw in SEEDS.items()} | dict(
        text=b'hello\n'*200, empty=b'', list=LISTS['hls'].encode(), jpg=photo(there/'a.jpg').read_bytes())

def flips(most, n): return st.lists(st.tuples(st.floats(0, most), st.integers(1, 255)), min_size=1, max_size=n)
MUTATION = st.one_of(
    st.tuples(st.just('cut'), st.floats(0, 1)), st.tuples(st.just('behead'), st.floats(0, 1)),
    st.tuples(st.just('flip'), flips(1, 8)), st.tuples(st.just('flip at the start'), flips(.1, 4)),
    st.tuples(st.just('header of'), st.sampled_from([*SEEDS, 'jpg', 'list'])),
    st.tuples(st.just('join'), st.sampled_from([*SEEDS, 'text'])), st.tuples(st.just('bytes'), st.binary(max_size=64)))

def mutate(raw, how, what, seeds):
    if how == 'cut': return raw[:int(what*len(raw))]
    if how == 'behead': return raw[int(what*len(raw)):]
    if how == 'header of': return seeds[what][:200] + raw[200:]
    if how == 'join': return raw + seeds[what]
    if how == 'bytes': return what + raw[len(what):]
    raw = bytearray(raw)
    for where, bits in what if raw else (): raw[min(len(raw) - 1, int(where*len(raw)))] ^= bits
    return bytes(raw)

@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(start=st.sampled_from([*SEEDS, 'text', 'empty', 'list', 'jpg']),
       ending=st.sampled_from([None, *SEEDS, 'm3u8', 'jpg', '']), mutations=st.lists(MUTATION, max_size=3))
def test_frames_or_one_line(looker, seeds, tmp_path_factory, start, ending, mutations):
    raw = seeds[start]
    for m in mutations: raw = mutate(raw, *m, seeds)
    path = tmp_path_factory.getbasetemp()/f'any.{start if ending is None else ending}'
    path.write_bytes(raw)
    sizes, count, *others = looker(path)
    for said in (sizes, count, *others):
        assert not isinstance(said, str) or said.startswith(f'BadInput: {path}: ') and '\n' not in said
    assert isinstance(sizes, str) or sizes == 1
    if start in SEEDS and not mutations and ending is None: assert (sizes, count) == (1, 10)
