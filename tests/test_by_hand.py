"Galleries that somebody has changed by hand, that cannot be written to, or that were made elsewhere."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_biometrics import BLUE, GREEN, MATCHER, POINTS, RED, colours, crops, films, template  # noqa: F401

from reid_nb import biometrics as bio
from reid_nb import demo
from reid_nb.parts import decisions as dec
from reid_nb.parts import gallery as gal
from reid_nb.parts.core import BadInput
from reid_nb.parts.tracks import Matcher

@pytest.fixture
def root(tmp_path, films):  # noqa: F811
    "Red and Blue are enrolled from clips."
    for name in 'Red', 'Blue': bio.enroll(name, films[name.lower()], tmp_path/'g', MATCHER)
    gal.NOTICED.clear()
    return tmp_path/'g'

def files_of(root, name): return sorted((root/name).glob('*.jpg'))

# --- crops that are gone

@pytest.mark.parametrize('spoil', [Path.unlink, lambda p: p.write_bytes(b''), lambda p: p.write_bytes(b'no picture')])
def test_a_lost_crop_takes_no_answer_away(root, films, spoil):  # noqa: F811
    for path in files_of(root, 'Red'): spoil(path)
    outcome = bio.identify(films['again'], root, MATCHER)
    assert outcome.decisions[0].name == 'Red'
    assert (dec.evidence(outcome.decisions[0], root)[:,-40:] == dec.side_by_side(
        outcome.decisions[0].shot.crop, gal.missing_picture())[:,-40:]).all()
    backend = demo.DemoBackend(root, MATCHER, 'motion')
    for reply in (backend.identify_clip(films['again'], 0, 59, 'g', 'query', '0.01'),
                  backend.verify_clip(films['again'], 0, 59, 'Red', '0.01')):
        assert 'class="answer good"' in reply.html and '<img' in reply.html
    assert backend.show_samples('Red').count('<img') == 7

@pytest.mark.parametrize('find', [lambda root: root/'Red', lambda root: files_of(root, 'Red')[0]])
def test_a_folder_or_a_link_in_the_place_of_a_crop(root, films, tmp_path, find):  # noqa: F811
    path = find(root)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if path.suffix: path.mkdir()
    else: path.symlink_to(tmp_path)
    assert bio.identify(films['again'], root, MATCHER).decisions[0].name == 'Red'
    reply = demo.DemoBackend(root, MATCHER, 'motion').identify_clip(films['again'], 0, 59, 'g', 'q', '0.01')
    assert 'Red' in reply.html and reply.html.count('<img') == 1

def test_what_is_missing_is_listed_and_repaired(run, root):
    first, *_ = files_of(root, 'Red')
    first.unlink()
    shutil.rmtree(root/'Blue')
    said = run('reid_gallery', '--gallery', root)
    assert said.returncode == 0 and 'Red: number 1, 1 templates' in said.stdout and '(1 of them missing)' in said.stdout
    assert 'no folder for Blue' in said.stderr and 'reid_gallery --repair' in said.stderr
    before = gal.Gallery(root).templates('Red')[1]
    done = run('reid_gallery', '--gallery', root, '--repair')
    assert 'Red: 1 crops missing or damaged, struck off' in done.stderr and 'Blue: erased' in done.stderr, done
    here = gal.Gallery(root)
    assert here.names() == ['Red'] and (here.templates('Red')[1] == before).all()
    assert gal.missing_crops(here.store) == []
    assert sorted(here.samples('Red')[0]) == crops(root)
    assert 'nothing to repair' in run('reid_gallery', '--gallery', root, '--repair').stderr
    assert here.store.history()[-1][1] == 'repaired'

def test_a_damaged_crop_is_struck_off_and_its_file_goes(root):
    first, *_ = files_of(root, 'Red')
    first.write_bytes(b'')
    assert gal.repair_gallery(gal.Gallery(root)) == ['Red: 1 crops missing or damaged, struck off']
    assert not first.exists() and sorted(gal.Gallery(root).samples('Red')[0]) == [f for f in crops(root) if 'Red' in f]

def test_a_folder_renamed_by_hand(root, caplog):
    (root/'Red').rename(root/'Rosa')
    gal.NOTICED.clear()
    assert gal.Gallery(root).names() == ['Blue', 'Red'] and gal.Gallery(root)
    assert [r.message for r in caplog.records if 'no folder for Red' in r.message and 'nobody in Rosa' in r.message]
    assert len(caplog.records) == 1     # said once, not with each opening
    here = gal.Gallery(root)
    assert here.rename('Red', 'Rot') == 'Rot' and here.rename('Rot', 'Red') == 'Red'     # crops are missing: no matter
    assert 'Rosa: renamed by hand, is Red again' in gal.repair_gallery(here)[0]
    assert gal.missing_crops(here.store) == [] and gal.repair_gallery(here) == []

def test_two_folders_that_fit_are_left_alone(root):
    shutil.copytree(root/'Red', root/'A')
    (root/'Red').rename(root/'B')
    lines = gal.repair_gallery(gal.Gallery(root))
    assert 'Red: erased, no crop is left' in lines and (root/'A').is_dir() and (root/'B').is_dir()

def test_repair_keeps_a_person_with_a_merged_name(tmp_path):
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    for name in 'Ada', 'Bea', 'Cleo': here.add(name, template())
    here.merge('Bea', 'Ada')
    shutil.rmtree(tmp_path/'g'/'Ada')
    shutil.rmtree(tmp_path/'g'/'Cleo')
    gal.repair_gallery(here)
    assert here.names() == ['Ada'] and here.people()[0]['merged'] == ['Bea'] and len(here.templates()[0]) == 1
    shutil.rmtree(tmp_path/'g'/'Bea')
    gal.repair_gallery(here)
    assert here.names() == [] and here.people() == []

def test_a_new_network_wants_all_crops(root):
    files_of(root, 'Red')[0].unlink()
    with pytest.raises(BadInput, match='1 crops are missing.*--repair'):
        gal.reembed_gallery(gal.Gallery(root), Matcher(colours, 'b'*64, POINTS))

def test_crops_without_a_database(root, films):  # noqa: F811
    (root/'gallery.sqlite').unlink()
    for f, *args in (bio.enroll, 'Red'), (bio.identify,):
        with pytest.raises(BadInput, match='gallery.sqlite is gone'): f(*args, films['red'], root, MATCHER)
    with pytest.raises(BadInput, match='gallery.sqlite is gone'): demo.DemoBackend(root, MATCHER, 'motion')
    assert not (root/'gallery.sqlite').exists()

# --- what cannot be written

def read_only(*args, root):
    "Run a command where the gallery is mounted read-only."
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    exe = Path(sys.executable).parent/args[0]
    return subprocess.run(['unshare', '-m', 'bash', '-c', mount, 'x', str(root), str(exe), *map(str, args[1:])],
                          capture_output=True, text=True)

needs_mounts = pytest.mark.skipif(subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode != 0,
                                  reason='no right to mount here')

@needs_mounts
@pytest.mark.long
@pytest.mark.parametrize('unfinished', [False, True])
def test_a_read_only_gallery_answers_and_then_warns(tmp_path, toy, unfinished):
    clip, root = toy/'clips'/'ada_c1.mp4', tmp_path/'g'
    bio.enroll('Ada', clip, root)
    if unfinished: (root/'pending.json').write_text('["Bob/00000001_00.jpg"]')
    got = read_only('reid_identify', clip, '--gallery', root, root=root)
    assert got.returncode == 0 and '1 of 1 people identified: Ada' in got.stdout, got
    assert 'this answer is not in the log' in got.stderr
    got = read_only('reid_verify', 'Ada', clip, '--gallery', root, '--json', root=root)
    assert got.returncode == 0 and json.loads(got.stdout)['notes'], got
    got = read_only('reid_enroll', 'Bob', clip, '--gallery', root, root=root)
    assert got.returncode == 2 and len(got.stderr.strip().splitlines()) <= 2 and 'Traceback' not in got.stderr, got

def test_the_demo_answers_where_nothing_can_be_written(root, films, monkeypatch):  # noqa: F811
    backend = demo.DemoBackend(root, MATCHER, 'motion')
    def full(*args): raise OSError(28, 'No space left on device', str(root.parent/'query'))
    monkeypatch.setattr(demo, 'write_query', full)
    got = backend.identify_clip(films['again'], 0, 59, 'g', 'query', '0.01')
    assert 'class="answer good"' in got.html and '1 of 1 people identified: Red' in got.html and 'No space' in got.html

# --- made elsewhere: nothing leaves the folder

@given(st.one_of(st.text(), st.sampled_from(['../victim/00000001_00.jpg', '/etc/passwd', 'Ada/../../x.jpg',
                                             '..\\x/00000001_00.jpg', 'Ada', './00000001_00.jpg', ''])))
@settings(deadline=None)
def test_no_list_of_files_leads_out(tmp_path_factory, file):
    base = tmp_path_factory.mktemp('x')
    (base/'victim').mkdir()
    (base/'victim'/'00000001_00.jpg').write_bytes(b'mine')
    store = gal.Gallery(base/'g', MATCHER, create=True).store
    store.pending.write_text(json.dumps([file]), encoding='utf-8')
    try: gal.Gallery(base/'g')
    except BadInput as e: assert 'no crop of a gallery' in str(e)
    assert (base/'victim'/'00000001_00.jpg').exists()

@pytest.mark.parametrize('text', ['', '{', '7', '"Ada"', '[1]', 'null', '[["a"]]'])
def test_a_damaged_list_is_one_line(tmp_path, text):
    store = gal.Gallery(tmp_path/'g', MATCHER, create=True).store
    store.pending.write_text(text)
    with pytest.raises(BadInput, match='pending.json|no crop of a gallery'): gal.Gallery(tmp_path/'g')

def test_a_row_that_leads_out_shows_and_deletes_nothing(root, films, tmp_path):  # noqa: F811
    victim = tmp_path/'victim'
    victim.mkdir()
    shutil.copy(files_of(root, 'Red')[0], victim/'00000001_00.jpg')
    store = gal.Gallery(root).store
    with store.writing() as db:
        first, = db.execute("SELECT file FROM samples WHERE file LIKE 'Red/%'").fetchone()
        db.execute("UPDATE samples SET file = '../victim/00000001_00.jpg' WHERE file = ?", [first])
    assert (gal.read_crop(root, '../victim/00000001_00.jpg') == gal.missing_picture()).all()
    gal.Gallery(root).erase('Red')
    assert (victim/'00000001_00.jpg').exists() and gal.Gallery(root).names() == ['Blue']

# --- one person, two names; new thresholds

def test_one_person_under_two_names(run, root, films, toy, tmp_path):  # noqa: F811
    done = bio.enroll('Rosa', films['again'], root, MATCHER)
    assert done['alike'][0][0] == 'Red' and done['alike'][0][1] > POINTS['0.01']['high'] and len(done['alike']) == 1
    assert bio.enroll('Rosa', films['red'], root, MATCHER)['alike'][0][0] == 'Red'     # not like herself
    assert bio.enroll('Green', films['green'], root, MATCHER)['alike'] == []
    text = str(bio.identify(films['again'], root, MATCHER))
    assert re.search(r'1 of 1 people identified: (Red|Rosa)\n', text), text
    assert re.search(r': (Red \(or Rosa|Rosa \(or Red) [01]\.\d+: they match, too\); score', text), text
    reply = demo.DemoBackend(root, MATCHER, 'motion').enroll_clip(films['blue'], 0, 59, 'Bleu', True)
    assert 'Bleu looks like Blue (' in reply.html and 'one person?' in reply.html
    gal.Gallery(root).merge('Rosa', 'Red')
    text = str(bio.identify(films['again'], root, MATCHER))
    assert 'identified: Red\n' in text and 'they match' not in text
    for name in 'Ada', 'Zoë': said = run('reid_enroll', name, toy/'clips'/'ada_c1.mp4', '--gallery', tmp_path/'h')
    assert said.returncode == 0 and 'Zoë looks like Ada (1.000)' in said.stderr, said

def test_new_thresholds_are_taken_and_said_once(root, films, caplog):  # noqa: F811
    strict = {k: v | dict(high=2.) for k, v in POINTS.items()}
    other = Matcher(colours, MATCHER.digest, strict)
    assert bio.identify(films['again'], root, MATCHER).answer == 'match'
    caplog.clear()
    for _ in range(2): assert bio.identify(films['again'], root, other).answer != 'match'
    assert sum('thresholds beside the checkpoint are new' in r.message for r in caplog.records) == 1
    assert 'new thresholds' in [e for _, e, *_ in gal.Gallery(root).store.history()]

# --- output in other alphabets

@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'utf-8'])
def test_any_name_on_any_terminal(tmp_path, encoding):
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    for name in 'Zoë', '李小龍': here.add(name, template())
    exe, env = Path(sys.executable).parent, os.environ | dict(PYTHONIOENCODING=encoding)
    def said(*args):
        done = subprocess.run([exe/args[0], *args[1:], '--gallery', tmp_path/'g'], capture_output=True, env=env)
        assert done.returncode == 0 and b'Traceback' not in done.stderr, done
        return done.stdout.decode(encoding)
    names = [p['name'] for p in json.loads(said('reid_gallery', '--json'))]
    assert names == ['Zoë', '李小龍']
    assert ('李小龍' if encoding == 'utf-8' else r'\u674e\u5c0f\u9f8d') in said('reid_gallery')
    assert 'is erased' in said('reid_erase', '李小龍')
    assert gal.Gallery(tmp_path/'g').names() == ['Zoë']
