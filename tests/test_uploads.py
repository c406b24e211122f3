"What people upload: no videos, empty ones, endless ones, turned, odd and uneven ones; and what they type."
import struct
import threading
import time

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_biometrics import HOSTILE, MATCHER, RED, WORLD, consistent, film
from test_demo import images, kind

from reid_nb import biometrics as bio
from reid_nb.parts import film as film_
from reid_nb import demo
from reid_nb.parts import serve as serve_
from reid_nb.parts import page as page_
from reid_nb.parts.core import BadInput
from reid_nb.parts.tracks import find_tracks, frame_times
from reid_nb.parts.video import read_frames

@pytest.fixture(scope='module')
def clip(tmp_path_factory): return film(tmp_path_factory.mktemp('clip')/'red.mp4', (RED, 3, 6, 60), n=40)

@pytest.fixture
def backend(tmp_path): return demo.DemoBackend(tmp_path/'root'/'gallery', MATCHER, 'motion')

def refused(backend, path, word):
    "A complaint with this word from every door, and nothing is stored"
    for got in (backend.enroll_clip(path, 0, 59, 'Red', True), backend.verify_clip(path, 0, 59, 'Red', '0.01'),
                backend.identify_clip(path, 0, 59, 'gallery', 'query', '0.01')):
        assert kind(got) == 'error' and word in got.html and not got.film and str(path.parent) not in got.html, got
    updates = page_.slider_updates(str(path))
    assert kind(updates[2]) == 'error' and word in updates[2]
    assert not backend.root.exists()

def no_frames(path):
    "A film with a video stream and not one frame"
    with av.open(str(path), 'w') as f:
        s = f.add_stream('libx264', rate=12)
        s.width, s.height, s.pix_fmt = 64, 64, 'yuv420p'
        f.start_encoding()

def sound(path):
    with av.open(str(path), 'w') as f:
        s = f.add_stream('aac', rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 16_000
        for p in (*s.encode(frame), *s.encode()): f.mux(p)

NO_VIDEOS = {
    'text.mp4': (lambda p: p.write_text('hello '*500), 'not a video'),
    'empty.mp4': (lambda p: p.write_bytes(b''), 'not a video'),
    'page.html': (lambda p: p.write_text('<html><script>alert(1)</script>'), 'not a video'),
    'noise.mp4': (lambda p: p.write_bytes(np.random.default_rng(0).bytes(50_000)), 'not a video'),
    'frameless.mp4': (no_frames, ''),
    'sound.mp4': (sound, 'video stream')}

@pytest.mark.parametrize('name', NO_VIDEOS)
def test_what_is_no_video(backend, tmp_path, name):
    make, word = NO_VIDEOS[name]
    make(tmp_path/name)
    refused(backend, tmp_path/name, word)

def test_a_playlist_shows_nobody_elses_film(backend, tmp_path, clip):
    text = f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{film(tmp_path/"secret.ts", (RED, 3, 6, 60), n=40)}\n'
    (tmp_path/'list.mp4').write_text(text + '#EXT-X-ENDLIST\n')
    refused(backend, tmp_path/'list.mp4', 'not a video')

def test_cut_off(backend, tmp_path, clip):
    (tmp_path/'half.mp4').write_bytes(clip.read_bytes()[:3000])
    refused(backend, tmp_path/'half.mp4', 'half.mp4')

def test_ten_hours(backend, tmp_path, clip):
    endless = film(tmp_path/'endless.mp4', (RED, 3, 6, 60), n=40, times=np.arange(40)*900)
    assert frame_times(endless)[-1] == 39*900
    refused(backend, endless, 'it runs for 585 minutes')
    raw, claim = bytearray(clip.read_bytes()), struct.pack('>I', 36_000_000)    # the header lies, the packets do not
    at = raw.find(b'mvhd') + 4
    assert raw[at] == 0
    raw[at + 16:at + 20] = claim
    (tmp_path/'liar.mp4').write_bytes(raw)
    assert kind(backend.enroll_clip(tmp_path/'liar.mp4', 0, 59, 'Red', True)) == 'good'

def test_too_large(backend, tmp_path, clip, monkeypatch):
    monkeypatch.setattr(page_, 'MAX_PIXELS', 90_000)
    refused(backend, clip, '400x240 pixels')
    monkeypatch.undo()
    monkeypatch.setattr(page_, 'MAX_MB', .001)
    refused(backend, clip, 'more than')
    monkeypatch.undo()
    monkeypatch.setattr(page_, 'MAX_FRAMES', 10)
    assert 'at most 10' in backend.enroll_clip(clip, 0, 30, 'Red', True).html
    assert kind(backend.enroll_clip(clip, 20, 29, 'Red', True)) == 'good'

def test_uneven_times(backend, tmp_path):
    "Variable frame rate: times are those of the packets, in the answer and in the film"
    times = np.cumsum(np.where(np.arange(40) < 20, .08, .4))
    uneven = film(tmp_path/'uneven.mp4', (RED, 3, 6, 60), n=40, times=times)
    bio.enroll('Red', uneven, tmp_path/'g', MATCHER)
    (a, b, s, t), = bio.identify(uneven, tmp_path/'g', MATCHER, film=tmp_path/'film.mp4').decisions[0].seen
    assert b == 39 and abs(s - (times[a] - times[0])) < .02 and abs(t - (times[39] - times[0])) < .02
    assert np.abs(frame_times(tmp_path/'film.mp4') - (times - times[0])).max() < .01

def test_times_that_make_no_sense(tmp_path, clip):
    "A file that shows all its frames at once: frames by number, at a rate that somebody may have meant"
    with av.open(str(clip)) as f, av.open(str(tmp_path/'all_at_once.h264'), 'w') as out:
        s = out.add_stream_from_template(f.streams.video[0])
        for p in f.demux(video=0):
            if p.size:
                p.stream = s
                out.mux(p)
    times = frame_times(tmp_path/'all_at_once.h264')
    assert len(times) == 40 and (np.diff(times) > .004).all() and times[-1] < 40

def test_held_upright(backend, tmp_path, clip):
    "A phone notes that it was turned: people are found upright, and the film is upright"
    raw = bytearray(film(tmp_path/'lying.mp4', (RED, 3, 6, 60), n=40, turned=True).read_bytes())
    at = raw.find(b'tkhd') + 44
    raw[at:at + 36] = struct.pack('>9i', 0, 1 << 16, 0, -1 << 16, 0, 0, 400 << 16, 0, 1 << 30)
    (tmp_path/'phone.mp4').write_bytes(raw)
    straight, phone = (find_tracks(p)[0].seen for p in (clip, tmp_path/'phone.mp4'))
    assert len(phone) == len(straight) and np.abs(np.array([b for _, b in phone]) - [b for _, b in straight]).max() < 9
    bio.enroll('Red', tmp_path/'phone.mp4', tmp_path/'g', MATCHER)
    bio.identify(tmp_path/'phone.mp4', tmp_path/'g', MATCHER, film=tmp_path/'film.mp4')
    assert next(read_frames(tmp_path/'film.mp4'))[1].shape == (240, 400, 3)

ODD = {'yuv444p': ('libx264', 'mp4'), 'yuv420p10le': ('libx264', 'mp4'), 'gray': ('libx264', 'mp4'),
       'yuvj422p': ('mjpeg', 'avi'), 'bgra': ('ffv1', 'mkv'), 'rgb24': ('png', 'mov')}

@pytest.mark.parametrize('pix', ODD)
def test_odd_pixels(backend, tmp_path, pix):
    codec, suffix = ODD[pix]
    odd = film(tmp_path/f'odd.{suffix}', (RED, 3, 6, 60), n=40, pix=pix, codec=codec)
    assert kind(backend.enroll_clip(odd, 0, 59, 'Red', True)) == 'good'
    got = backend.verify_clip(odd, 0, 59, 'Red', '0.01')
    assert images(got) == 1 and got.film.is_file()
    with av.open(str(got.film)) as f:       # whatever came in, browsers can play what goes out
        assert (f.streams.video[0].codec_context.name, f.streams.video[0].pix_fmt) == ('h264', 'yuv420p')

@pytest.mark.parametrize('name', HOSTILE, ids=lambda n: ascii(n)[:20])
def test_hostile_names_in_the_demo(backend, clip, name):
    got = backend.enroll_clip(clip, 0, 59, name, True)
    assert kind(got) == 'error' and 'cannot be a name' in got.html and not backend.root.exists()

def test_the_demo_speaks_all_languages(backend, clip):
    for name in WORLD[:4]:
        assert kind(backend.enroll_clip(clip, 0, 59, name, True)) == 'good'
        assert kind(backend.verify_clip(clip, 0, 59, name, '0.01')) == 'good'
    assert len(consistent(backend.gallery)) == 4

@given(st.text(min_size=1, max_size=30), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_any_label_can_be_drawn(text, number):
    h, w, c = film_.label_picture(number, text, (0, 0, 0)).shape
    assert 16 <= h < 60 and w >= 8 and c == 3

@given(st.tuples(*[st.integers(-500, 900)]*4), st.integers(2, 50), st.integers(2, 500))
@settings(max_examples=100, deadline=None)
def test_any_box_can_be_painted(box, h, w):
    frame, label = np.zeros((120, 160, 3), np.uint8), np.full((h, w, 3), 255, np.uint8)
    film_.draw_box(frame, box, label, (9, 9, 9))
    assert (frame == 255).any()

# --- waiting in line

def test_visitors_are_served_in_the_order_of_their_coming(backend):
    served, gate = [], threading.Event()
    def visit(k):
        with backend.queue.turn(lambda share, what: None):
            gate.wait(30)
            served.append(k)
    threads = [threading.Thread(target=visit, args=[k]) for k in range(page_.MAX_VISITORS)]
    for k, t in enumerate(threads):
        t.start()
        while len(backend.queue.waiting) <= k: time.sleep(.01)
    with pytest.raises(page_.Busy), backend.queue.turn(page_.no_progress): served.append('too many')
    assert kind(backend.erase('Red', True)) == 'busy'
    gate.set()
    for t in threads: t.join()
    assert served == list(range(page_.MAX_VISITORS)) and backend.queue.waiting == []

def test_who_waits_can_leave(backend):
    def leave(share, what): raise page_.Cancelled
    backend.queue.waiting.append('somebody')
    assert kind(backend.rename('Red', 'Blue', progress=leave)) == 'stop' and backend.queue.waiting == ['somebody']

def test_films_do_not_pile_up(backend, clip):
    backend.enroll_clip(clip, 0, 59, 'Red', True)
    made = [backend.verify_clip(clip, 5, 25, 'Red', '0.01').film for _ in range(page_.MAX_VISITORS + 4)]
    there = set(p for p in made if p.is_file())
    assert made[-1] in there and len(there) <= page_.MAX_VISITORS + 1
    backend.erase('Red', True)
    assert not any(p.is_file() for p in made)

# --- logins

def test_others_need_a_login(tmp_path):
    app = demo.build_demo(tmp_path/'gallery', MATCHER)
    for kw in dict(host='0.0.0.0'), dict(share=True), dict(host='example.org'):
        with pytest.raises(BadInput, match='--login'): serve_.serve_demo(app, **kw)

@pytest.mark.parametrize('text', ['', 'ada', 'ada:', ':secret', 'ada:x\nbob', None])
def test_login_files_that_make_no_sense(tmp_path, text):
    if text is not None: (tmp_path/'login').write_text(text)
    with pytest.raises(BadInput, match='login'): serve_.read_login(tmp_path/'login')
