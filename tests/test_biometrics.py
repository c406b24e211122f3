"From video to a decision: the faults that a demo can have, hostile names, kills, full disks and two processes at once."
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_nb import biometrics as bio
from reid_nb.parts import decisions as dec
from reid_nb.parts import gallery as gal
from reid_nb.parts import tracks as ppl
from reid_nb.parts.core import read_rgb
from reid_nb.parts.core import BadInput
from reid_nb.parts.detect import Person

RED, GREEN, BLUE, YELLOW = (220, 40, 40), (40, 200, 60), (50, 60, 220), (220, 200, 40)

def film(path, *people, n=60, pix='yuv420p', codec='libx264', times=None, turned=False):
    "A fixed camera; a person is (colour, first frame, pixels a frame, row): a checked box that walks to the right."
    h, w = 240, 400
    ground = np.random.default_rng(0).integers(90, 110, (h, w, 3)).astype(np.uint8)
    checks = (np.indices((80, 30))//5).sum(0) % 2
    with av.open(str(path), 'w') as f:
        s = f.add_stream(codec, rate=12, options=dict(crf='15', threads='1') if codec == 'libx264' else {})
        s.width, s.height, s.pix_fmt = (h, w, pix) if turned else (w, h, pix)
        if times is not None: s.codec_context.time_base = Fraction(1, 1000)
        for i in range(n):
            a = ground.copy()
            for colour, first, speed, y in people:
                x = 10 + speed*(i - first)
                if i < first or x >= w - 40: continue
                a[y:y+80,x:x+30] = np.where(checks[...,None], colour, np.array(colour)*.75)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(a)) if turned else a, format='rgb24')
            if times is not None: frame.pts, frame.time_base = int(1000*times[i]), Fraction(1, 1000)
            f.mux(s.encode(frame))
        f.mux(s.encode())
    return path

def colours(crops):
    "An embedding: the mean colour of the middle, less grey."
    f = np.array([c[c.shape[0]//4:-c.shape[0]//4, c.shape[1]//4:-c.shape[1]//4].reshape(-1, 3).mean(0) for c in crops])
    f = f - f.mean(1, keepdims=True)
    return np.float32(f/np.linalg.norm(f, axis=1, keepdims=True))

POINTS = {'0.01': dict(threshold=.9, low=.88, high=.91), '0.001': dict(threshold=.96, low=.95, high=.97)}
MATCHER = ppl.Matcher(colours, 'a'*64, POINTS)

@pytest.fixture(scope='session')
def films(tmp_path_factory):
    "Clips by name: who is in them, by first letter."
    root = tmp_path_factory.mktemp('films')
    return dict(red=film(root/'red.mp4', (RED, 3, 6, 60)), again=film(root/'again.mp4', (RED, 3, 5, 90)),
                blue=film(root/'blue.mp4', (BLUE, 3, 6, 60)), green=film(root/'green.mp4', (GREEN, 3, 6, 60)),
                both=film(root/'both.mp4', (RED, 3, 6, 20), (BLUE, 3, 6, 130)),
                nobody=film(root/'nobody.mp4'), short=film(root/'short.mp4', (RED, 3, 6, 60), n=14))

def template(colour=RED, n=6):
    shots = [ppl.Shot(i, (0, 0, 9, 9), quality=.5, crop=np.full((80, 30, 3), colour, np.uint8)) for i in range(n)]
    return ppl.Template(shots, colours([s.crop for s in shots]))

def crops(root): return sorted(p.relative_to(root).as_posix() for p in Path(root).rglob('*.jpg'))
def files(root):
    "All files, but for a journal that SQLite has let go"
    found = sorted(p.relative_to(root).as_posix() for p in Path(root).rglob('*') if p.is_file())
    return [f for f in found if not f.endswith('-journal')]

def consistent(root):
    "Opens a gallery; database and folders say the same. Returns the names."
    here = gal.Gallery(root)
    known = sorted(f for n in here.names() for f in here.samples(n)[0])
    assert crops(root) == known and files(root) == sorted(['gallery.sqlite', *known])
    return here.names()

# --- the faults of the demo that the course is based on

def test_a_stranger_does_not_pass_on_somebody_elses_hits(films, tmp_path):
    bio.enroll('Red', films['red'], tmp_path/'g', MATCHER)
    bio.enroll('Green', films['green'], tmp_path/'g', MATCHER)
    found = bio.identify(films['both'], tmp_path/'g', MATCHER)
    assert sorted((d.name or '', d.answer) for d in found.decisions) == [('', 'no match'), ('Red', 'match')]
    claim = bio.verify('Green', films['both'], tmp_path/'g', MATCHER)
    assert claim.answer == 'no match' and len(claim.decisions) == 2

def test_only_the_claimed_identity_counts(films, tmp_path):
    bio.enroll('Red', films['red'], tmp_path/'g', MATCHER)
    bio.enroll('Blue', films['blue'], tmp_path/'g', MATCHER)
    claim = bio.verify('Blue', films['again'], tmp_path/'g', MATCHER)
    assert claim.answer == 'no match' and [n for n, _ in claim.decisions[0].ranking] == ['Blue']
    assert claim.decisions[0].pair['crop'].startswith('Blue/')
    gal.Gallery(tmp_path/'g').erase('Red')
    alone = bio.verify('Blue', films['again'], tmp_path/'g', MATCHER)
    assert alone.decisions[0].score == claim.decisions[0].score
    assert bio.verify('blue', films['blue'], tmp_path/'g', MATCHER).answer == 'match'

def test_the_network_sees_rgb_and_so_does_the_gallery(films, tmp_path):
    seen = []
    matcher = ppl.Matcher(lambda crops: seen.extend(crops) or colours(crops), 'a'*64, POINTS)
    done = bio.enroll('Red', films['red'], tmp_path/'g', matcher)
    assert all(c[20:60,8:22].reshape(-1, 3).mean(0).argmax() == 0 for c in seen)
    assert all(read_rgb(tmp_path/'g'/f)[20:60,8:22].reshape(-1, 3).mean(0).argmax() == 0 for f in done['crops'])

def test_people_are_never_mixed_under_one_name(films, tmp_path):
    with pytest.raises(BadInput, match='person 1 .frames .*person 2 .frames .*which of these'):
        bio.enroll('Blue', films['both'], tmp_path/'g', MATCHER)
    assert not (tmp_path/'g').exists()
    tracks = ppl.find_tracks(films['both'])
    blue = next(t.number for t in tracks if colours([s.crop for s in t.shots]).mean(0).argmax() == 2)
    bio.enroll('Blue', films['both'], tmp_path/'g', MATCHER, track=blue)
    features = gal.Gallery(tmp_path/'g').samples('Blue')[1]
    assert (features.argmax(1) == 2).all()
    with pytest.raises(BadInput, match='no such number'):
        bio.enroll('Blue', films['both'], tmp_path/'g', MATCHER, track=9)

def test_enrolling_again_adds_and_never_deletes(films, tmp_path):
    first = bio.enroll('Red', films['red'], tmp_path/'g', MATCHER)
    before = {f: (tmp_path/'g'/f).read_bytes() for f in crops(tmp_path/'g')}
    second = bio.enroll('RED', films['red'], tmp_path/'g', MATCHER)
    assert second['name'] == 'Red' and second['templates'] == 2 and not set(first['crops']) & set(second['crops'])
    assert all((tmp_path/'g'/f).read_bytes() == b for f, b in before.items())
    assert consistent(tmp_path/'g') == ['Red'] and len(crops(tmp_path/'g')) == 2*len(before)
    assert all(re.fullmatch(r'Red/\d{8}_\d\d\.jpg', f) for f in crops(tmp_path/'g'))

def test_few_pictures_are_enough_or_are_named(films, tmp_path):
    done = bio.enroll('Red', films['red'], tmp_path/'g', MATCHER, start=10, stop=17)
    assert 5 <= len(done['crops']) < 9
    with pytest.raises(BadInput, match='good pictures of .* needed'):
        bio.enroll('Red', films['red'], tmp_path/'g', MATCHER, start=10, stop=13)
    with pytest.raises(BadInput, match='nobody found'): bio.enroll('Red', films['nobody'], tmp_path/'g', MATCHER)

def test_frames_are_frames(films, tmp_path):
    done = bio.enroll('Red', films['red'], tmp_path/'g', MATCHER, start=20, stop=32)
    assert {int(Path(f).stem[:8]) for f in done['crops']} <= set(range(20, 32))
    found = bio.identify(films['red'], tmp_path/'g', MATCHER, start=20, stop=32).decisions[0]
    (first, last, *times), = found.seen
    assert first >= 20 and last < 32 and times == [round(f/12, 2) for f in (first, last)]

# --- decisions

def test_three_zones(films, tmp_path):
    points = {'0.01': dict(low=.2, high=.4), '0.001': dict(low=.999999, high=1.1)}
    matcher = ppl.Matcher(colours, 'a'*64, points)
    bio.enroll('Red', films['red'], tmp_path/'g', matcher)
    ask = lambda clip, fmr: bio.verify('Red', films[clip], tmp_path/'g', matcher, fmr=fmr)
    answers = [ask(clip, fmr).answer for clip, fmr in (('again', .01), ('again', .001), ('blue', .001))]
    assert answers == ['match', 'inconclusive', 'no match']
    assert 'inconclusive' in str(ask('again', .001))
    with pytest.raises(BadInput, match='0.01, 0.001'): ask('red', .3)

def test_nobody_is_in_two_places(films, tmp_path):
    "Before a camera that turns everybody redder, blue is most like Red, but not beside Red."
    points = {'0.01': dict(low=.2, high=.3)}
    for name in 'Red', 'Blue': bio.enroll(name, films[name.lower()], tmp_path/'g', ppl.Matcher(colours, 'a'*64, points))
    red, = colours([np.full((80, 30, 3), RED, np.uint8)])
    def redder(crops): return (x := colours(crops) + 1.1*red)/np.linalg.norm(x, axis=1, keepdims=True)
    matcher = ppl.Matcher(redder, 'a'*64, points)
    alone = bio.identify(films['blue'], tmp_path/'g', matcher)
    assert [(d.name, d.answer) for d in alone.decisions] == [('Red', 'match')]
    both = bio.identify(films['both'], tmp_path/'g', matcher)
    d = {d.name: d for d in both.decisions}
    assert [n for n, _ in d['Blue'].ranking] == ['Red', 'Blue'] and d['Blue'].score == d['Blue'].ranking[1][1]
    assert d['Blue'].pair['crop'].startswith('Blue/') and d['Blue'].elsewhere == {'Red': d['Red'].track}
    assert re.search(rf'Blue .Red 0.\d+ is person {d["Red"].track}, seen at the same time', str(both))
    claim = bio.verify('Red', films['both'], tmp_path/'g', matcher)
    assert {(c.track, c.name, c.answer) for c in claim.decisions} == {
        (d['Red'].track, 'Red', 'match'), (d['Blue'].track, 'Red', 'no match')}
    json.dumps(both.to_dict())
    strict = ppl.Matcher(redder, 'a'*64, {'0.01': dict(low=.6, high=.9)})
    nobody = next(d for d in bio.identify(films['both'], tmp_path/'g', strict).decisions if d.name is None)
    assert nobody.ranking[0][0] == 'Red' and nobody.closest == 'Blue' and nobody.pair['crop'].startswith('Blue/')

spells = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=4)

@given(spells, st.data())
@settings(max_examples=150, deadline=None)
def test_names_are_the_best_of_all_that_are_possible(spells, data):
    score = st.integers(0, 100).map(lambda k: k/100)
    rankings = [[(n, data.draw(score)) for n in 'abc'] for _ in spells]
    tracks = [ppl.Track(k, [(f, (0, 0, 8, 16)) for f in range(first, first + n)])
              for k, (first, n) in enumerate(spells)]
    met = [(i, j) for i, j in combinations(range(len(tracks)), 2)
           if {f for f, _ in tracks[i].seen} & {f for f, _ in tracks[j].seen}]
    def possible(names): return all(names[i] != names[j] or names[i] is None for i, j in met)
    def gain(names): return sum(dict(r)[n] - .3 for n, r in zip(names, rankings) if n)
    found = dec.name_everybody(tracks, rankings, .3)
    assert possible(found) and all(dict(r)[n] >= .3 for n, r in zip(found, rankings) if n)
    assert gain(found) == pytest.approx(max(map(gain, filter(possible, product([None, *'abc'], repeat=len(tracks))))))
    assert dec.who_is_elsewhere(tracks, found) == [
        {found[j]: j for j in range(len(tracks)) if found[j] and ((i, j) in met or (j, i) in met)}
        for i in range(len(tracks))]

def test_a_decision_carries_its_evidence(films, tmp_path):
    bio.enroll('Red', films['red'], tmp_path/'g', MATCHER)
    d = bio.identify(films['again'], tmp_path/'g', MATCHER).decisions[0]
    assert (tmp_path/'g'/d.pair['crop']).is_file() and d.pair['score'] >= d.score and d.upper == .91
    assert dec.evidence(d, tmp_path/'g').shape[0] == 256
    json.dumps(bio.identify(films['again'], tmp_path/'g', MATCHER).to_dict())

def test_a_template_is_a_mean_of_length_1():
    rng = np.random.default_rng(0)
    unit = lambda x: np.float32(x/np.linalg.norm(x, axis=-1, keepdims=True))
    features, quality = unit(rng.normal(size=(9, 8))), rng.random(9)
    t = ppl.Template([ppl.Shot(i, (), quality=q) for i, q in enumerate(quality)], features)
    assert np.allclose(t.feature, unit(quality @ features), atol=1e-6)

def test_an_old_gallery_of_unscaled_templates_answers_like_a_new_one(films, tmp_path):
    for root in ('new', 'old'): bio.enroll('Red', films['red'], tmp_path/root, MATCHER)
    with closing(sqlite3.connect(tmp_path/'old'/'gallery.sqlite')) as db, db:
        [(number, feature)] = db.execute('SELECT id, feature FROM templates')
        short = np.frombuffer(feature, np.float32)*np.float32(.25)
        db.execute('UPDATE templates SET feature = ? WHERE id = ?', [short.tobytes(), number])
    new, old = (bio.identify(films['again'], tmp_path/root, MATCHER).decisions[0] for root in ('new', 'old'))
    assert np.isclose(old.score, new.score) and old.name == new.name

# --- names

@given(st.text())
@settings(max_examples=500, deadline=None)
def test_names_never_leave_the_gallery(name):
    root = Path('/gallery')
    try: clean = gal.clean_name(name)
    except BadInput as e:
        assert str(e).isascii()   # the complaint can be printed anywhere
        return
    path = Path(os.path.normpath(root/clean))
    assert path.parent == root and path.name == clean and clean == gal.clean_name(clean)
    assert len(clean.encode()) < 255 and not clean.startswith(('.', 'gallery.sqlite'))
    assert clean.replace('\u200c', '').replace('\u200d', '').isprintable()

HOSTILE = ['..', '.', '/etc', '../../x', 'a/../../b', 'a\\..\\b', 'C:\\x', 'x\0', 'a\nb/', '\u202egpj', '', '   ',
           'con', 'NUL.txt', 'gallery.sqlite', 'Gallery.SQLite-journal', 'pending.json', '~/', '\ud800', 'x'*10_000,
           'é'*120, '...', '\u200d']

@pytest.mark.parametrize('name', HOSTILE, ids=lambda n: ascii(n)[:20])
def test_hostile_names_store_nothing(films, tmp_path, name):
    with pytest.raises(BadInput, match='cannot be a name'): bio.enroll(name, films['red'], tmp_path/'g', MATCHER)
    assert list(tmp_path.iterdir()) == []

WORLD = ['Ada Lovelace', "D'Arcy-Ó Néill", '王小明', 'مریم', 'नेहा', 'Zoe\u0308', '-rf', '~root', '%s{0}', 'नि\u200dल']

@pytest.mark.parametrize('name', WORLD, ids=ascii)
def test_names_of_the_world_are_welcome(tmp_path, name):
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    done = here.add(name, template())
    assert consistent(tmp_path/'g') == [done['name']] and here.find(name)
    assert here.erase(name)['left'] == [] and files(tmp_path) == ['g/gallery.sqlite']

def test_links_and_files_in_the_way_are_refused(tmp_path):
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'g'/'Eve').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'g'/'Mal').write_text('mine')
    for name in ('Eve', 'Mal'):
        with pytest.raises(BadInput, match='in the way'): here.add(name, template())
    assert here.names() == [] and files(tmp_path/'elsewhere') == []

# --- the gallery

def test_erasing_leaves_nothing_and_says_so(films, tmp_path):
    root = tmp_path/'g'
    bio.enroll('Red', films['red'], root, MATCHER, consent='signed by Red on paper')
    bio.enroll('Blue', films['blue'], root, MATCHER)
    bio.verify('Red', films['red'], root, MATCHER)
    here = gal.Gallery(root)
    (root/'Red'/'notes.txt').write_text('not ours')
    n, feature = len(here.samples('Red')[0]), here.templates('Red')[1][0].tobytes()
    assert feature in (root/'gallery.sqlite').read_bytes()
    receipt = here.erase('red')
    assert (receipt['name'], receipt['crops'], receipt['templates'], receipt['left']) == ('Red', n, 1, ['notes.txt'])
    raw = (root/'gallery.sqlite').read_bytes()
    assert feature not in raw and b'Red' not in raw and not (root/'gallery.sqlite-journal').exists()
    assert files(root/'Red') == ['notes.txt'] and here.names() == ['Blue']
    events = [(event, number) for _, event, number, _ in here.store.history()]
    assert events == [('enrolled', 1), ('enrolled', 2), ('verified', 1), ('erased', 1)]
    with pytest.raises(BadInput, match='not enrolled'): here.erase('Red')
    bio.enroll('Red', films['red'], root, MATCHER)
    assert here.find('Red')[0] == 3     # a number is never given twice

def test_another_models_gallery_is_refused(films, tmp_path):
    bio.enroll('Red', films['red'], tmp_path/'g', MATCHER)
    other = ppl.Matcher(colours, 'b'*64, POINTS)
    for f, *args in (bio.enroll, 'Blue'), (bio.verify, 'Red'), (bio.identify,):
        with pytest.raises(BadInput, match='another model'): f(*args, films['red'], tmp_path/'g', other)
    assert consistent(tmp_path/'g') == ['Red']

def test_what_is_no_gallery_is_left_alone(films, tmp_path):
    with pytest.raises(BadInput, match='no gallery here'): bio.identify(films['red'], tmp_path/'none', MATCHER)
    assert not (tmp_path/'none').exists()
    (tmp_path/'g').mkdir()
    (tmp_path/'g'/'gallery.sqlite').write_text('hello '*500)
    for make in (False, True):
        with pytest.raises(BadInput, match='cannot be used'): gal.Gallery(tmp_path/'g', MATCHER, create=make)
    assert (tmp_path/'g'/'gallery.sqlite').read_text() == 'hello '*500

KILL = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_biometrics as t
from reid_nb.parts import decisions as dec
from reid_nb.parts import gallery as gal
def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
def after(n, f):
    def g(*args):
        nonlocal n
        n -= 1
        return die() if n < 0 else f(*args)
    return g
if sys.argv[3] == 'crop': gal.write_jpeg = after(int(sys.argv[4]), gal.write_jpeg)
if sys.argv[3] == 'log': gal.log_event = die
if sys.argv[3] == 'commit': gal.GalleryStore.settle = after(1, gal.GalleryStore.settle)
here = gal.Gallery(sys.argv[2], t.MATCHER, create=True)
here.erase('Ada') if sys.argv[5] == 'erase' else here.add('Ada', t.template(t.BLUE))
"""

@pytest.mark.parametrize('where, n, what', [
    ('crop', 0, 'add'), ('crop', 3, 'add'), ('log', 0, 'add'), ('commit', 0, 'add'),
    ('log', 0, 'erase'), ('commit', 0, 'erase')])
def test_kill_leaves_all_or_nothing(tmp_path, where, n, what):
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    here.add('Bob', template())
    if what == 'erase': here.add('Ada', template(BLUE))
    args = [sys.executable, '-c', KILL, Path(__file__).parent, tmp_path/'g', where, n, what]
    assert subprocess.run(list(map(str, args))).returncode == -signal.SIGKILL
    stays = (what == 'erase') != (where == 'commit')
    assert consistent(tmp_path/'g') == (['Ada', 'Bob'] if stays else ['Bob'])
    here.add('Ada', template(BLUE))
    assert consistent(tmp_path/'g') == ['Ada', 'Bob']

MANY = """
import sys
from contextlib import closing
sys.path.insert(0, sys.argv[1])
import test_biometrics as t
from reid_nb.parts import decisions as dec
from reid_nb.parts import gallery as gal
for i in range(12):
    gal.Gallery(sys.argv[2], t.MATCHER, create=True).add(f'{sys.argv[3]} {i % 3}', t.template())
    gal.Gallery(sys.argv[2], t.MATCHER, create=True).add('Both', t.template(t.BLUE))
    if i % 3 == 2: gal.Gallery(sys.argv[2]).erase(f'{sys.argv[3]} 1')
"""

def test_two_processes_at_once(tmp_path):
    args = [sys.executable, '-c', MANY, str(Path(__file__).parent), str(tmp_path/'g')]
    both = [subprocess.Popen([*args, who]) for who in 'AB']
    assert [p.wait(300) for p in both] == [0, 0]
    assert consistent(tmp_path/'g') == ['A 0', 'A 2', 'B 0', 'B 2', 'Both']
    here = gal.Gallery(tmp_path/'g')
    assert len(here.templates('Both')[0]) == 24 and len(here.templates('A 0')[0]) == 4
    assert sum(e == 'erased' for _, e, _, _ in here.store.history()) == 8

def test_a_full_disk_stores_nothing(films, tiny_disk):
    bio.enroll('Red', films['red'], tiny_disk/'g', MATCHER)
    before = files(tiny_disk)
    free = os.statvfs(tiny_disk)
    (tiny_disk/'ballast').write_bytes(bytes(free.f_bavail*free.f_bsize - 16_384))
    with pytest.raises(OSError, match='No space left'): bio.enroll('Blue', films['blue'], tiny_disk/'g', MATCHER)
    (tiny_disk/'ballast').unlink()
    assert files(tiny_disk) == before and consistent(tiny_disk/'g') == ['Red']

def test_the_log_only_grows(tmp_path):
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    here.add('Ada', template())
    for query in ('DELETE FROM log', "UPDATE log SET event = ''"):
        with pytest.raises(gal.sqlite3.IntegrityError, match='only grows'):
            with here.store.writing() as db: db.execute(query)
    assert len(here.store.history()) == 1

# --- gate and tracks

def test_every_refusal_has_its_reason():
    canvas = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    boxes = dict(good=(20, 20, 60, 120), small=(70, 20, 95, 70), cut=(280, 20, 320, 120), front=(100, 20, 140, 120),
                 behind=(130, 20, 170, 120), nowhere=(400, 20, 440, 120), unsure=(180, 20, 220, 120),
                 flat=(225, 20, 265, 120))
    canvas[:,224:266] = 128
    people = [Person(k, np.float32(b), .05 if name == 'unsure' else .9) for k, (name, b) in enumerate(boxes.items())]
    assert [s.refused for s in ppl.check_people(0, canvas, people)] == [
        '', 'small', 'cut by the edge', 'overlap', 'overlap', 'outside', 'unsure', 'blurred']

def test_a_long_track_keeps_a_few_spread_pictures():
    track = ppl.Track(1)
    for i in range(5000): track.add(ppl.Shot(i, (0, 0, 9, 9), quality=.5 + .5*(i % 11 == 0)))
    frames = [s.frame for s in track.shots]
    assert 8 <= len(frames) <= 16 and all(f % 11 == 0 for f in frames) and max(np.diff(frames)) < 1400

# --- the network and its thresholds, and the commands

@pytest.fixture(scope='session')
def ckpt(tmp_path_factory):
    "A network that has learned nothing, with thresholds beside it."
    from reid_nb.parts.models import build_backbone
    from reid_nb.parts.core import sha256
    from reid_nb.parts.models import ReidModel
    from reid_nb.parts.weights import save_checkpoint
    path = tmp_path_factory.mktemp('ckpt')/'reid.safetensors'
    meta = dict(kind='reid', arch='resnet10', size=[64, 32], mean=[.5]*3, std=[.25]*3, digest='', classes=0)
    meta |= dict(model=dict(neck=True))
    save_checkpoint(path, ReidModel(build_backbone('resnet10')).state_dict(), meta)
    path.with_suffix('.thresholds.json').write_text(json.dumps(dict(checkpoint_digest=sha256(path), thresholds=POINTS)))
    return path

def test_thresholds_must_be_of_this_checkpoint(ckpt, tmp_path):
    assert ppl.load_matcher(ckpt).thresholds == POINTS
    other = tmp_path/'reid.safetensors'
    other.write_bytes(ckpt.read_bytes())
    with pytest.raises(BadInput, match='no thresholds.*reid_calibrate'): ppl.load_matcher(other)
    other.with_suffix('.thresholds.json').write_text('{"checkpoint_digest": "0", "thresholds": {}}')
    with pytest.raises(BadInput, match='of another checkpoint'): ppl.load_matcher(other)

def one_line(done, *words):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and done.stdout == '' and len(lines) == 1 and lines[0].startswith('reid_'), done
    assert all(w in lines[0] for w in words), lines

@pytest.mark.long
def test_commands(run, films, ckpt, tmp_path):
    there = '--gallery', tmp_path/'g', '--checkpoint', ckpt
    done = run('reid_enroll', 'Ada Ä', films['red'], *there, '--consent', 'yes')
    assert done.returncode == 0 and done.stdout.startswith('Ada Ä: '), done
    done = run('reid_verify', 'Ada Ä', films['red'], *there, '--json')
    answer = json.loads(done.stdout)
    assert done.returncode == 0, done
    assert (answer['answer'], answer['claimed'], answer['detector']) == ('match', 'Ada Ä', 'motion')
    done = run('reid_identify', films['red'], *there, '--start', 5, '--stop', 30)
    assert done.returncode == 0 and 'Ada Ä' in done.stdout
    one_line(run('reid_verify', 'Eve', films['red'], *there), 'Eve', 'not enrolled')
    one_line(run('reid_identify', films['nobody'], *there), 'nobody')

@pytest.mark.long
def test_bad_input_ends_in_one_line(run, films, ckpt, tmp_path):
    there = '--gallery', tmp_path/'g', '--checkpoint', ckpt
    broken = tmp_path/'broken.mp4'
    broken.write_bytes(films['red'].read_bytes()[:2000])
    one_line(run('reid_enroll', 'Ada', tmp_path/'no.mp4', *there), 'no.mp4')
    one_line(run('reid_enroll', 'Ada', broken, *there), 'broken.mp4')
    one_line(run('reid_enroll', 'Ada', films['red'], *there, '--start', 9, '--stop', 3), '9 to 3')
    one_line(run('reid_enroll', 'Ada', films['red'], *there, '--start', 999), 'frame')
    one_line(run('reid_enroll', 'a/b', films['red'], *there), 'cannot be a name')
    one_line(run('reid_enroll', 'Ada', films['both'], *there), '--track')
    one_line(run('reid_enroll', 'Ada', films['red'], *there, '--weights', tmp_path/'no.onnx'), 'no.onnx')
    one_line(run('reid_identify', films['red'], *there[:2], '--checkpoint', tmp_path/'no.x'), 'no checkpoint at')
    one_line(run('reid_identify', films['red'], *there), 'no gallery')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['broken.mp4']
