"The demo's answers, without a browser and through a running app: known faults, paths, old results."
# ruff: noqa: F401, F811
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from gradio_client import Client, handle_file
from hypothesis import given, settings
from hypothesis import strategies as st
from test_biometrics import BLUE, MATCHER, POINTS, RED, ckpt, colours, crops, files, film, films, template
from test_people import fresh
from test_published import entry, hub

from reid_nb import biometrics as bio
from reid_nb.parts import gallery as gal
from reid_nb.parts import tracks as ppl
from reid_nb import demo
from reid_nb.parts import serve as serve_
from reid_nb.parts import page as page_
from reid_nb.parts import network as network_
from reid_nb.parts.core import BadInput, sha256
from reid_nb.parts.tracks import frame_times
from reid_nb.parts.weights import load_checkpoint, read_thresholds, save_checkpoint, SMALL, thresholds_path

def text(reply): return reply if isinstance(reply, str) else reply[0]
def kind(reply): return re.search(r'class="answer (\w+)"', text(reply))[1]
def images(reply): return text(reply).count('<img')

@pytest.fixture
def backend(tmp_path):
    return demo.DemoBackend(tmp_path/'root'/'gallery', MATCHER, 'motion')

@pytest.fixture
def known(backend, films):
    "Red and Blue are enrolled."
    for name in ('Red', 'Blue'): assert kind(backend.enroll_clip(films[name.lower()], 0, 59, name, True)) == 'good'
    return backend

# --- the faults of the demo that the course is based on

def test_hits_are_counted_for_each_person(known, films):
    got = known.identify_clip(films['green'], 0, 59, 'gallery', 'query', '0.01')
    assert kind(got) == 'bad' and 'unknown' in got.html
    known.erase('Blue', True)
    got = known.identify_clip(films['both'], 0, 59, 'gallery', 'query', '0.01')
    assert '1 of 2 people identified: Red' in got.html and 'unknown' in got.html and images(got) == 2

def test_verification_compares_with_the_claimed_identity(known, films):
    assert kind(known.verify_clip(films['again'], 0, 59, 'Red', '0.01')) == 'good'
    got = known.verify_clip(films['again'], 0, 59, 'Blue', '0.01')
    assert kind(got) == 'bad' and 'Red' not in got.html

def test_a_failed_run_shows_nothing_old(known, films, tmp_path):
    (tmp_path/'root'/'notes.mp4').write_text('not a video')
    wrong = [(None, 0, 59, 'Red'), (films['red'], 50, 10, 'Red'), (tmp_path/'root'/'notes.mp4', 0, 59, 'Red'),
             (films['red'], 0, 59, None), (films['nobody'], 0, 59, 'Red')]
    got = [known.verify_clip(*args, '0.01') for args in wrong] + [known.enroll_clip(*args, True) for args in wrong]
    for got in *got, known.identify_clip(films['red'], 0, 59, '', 'query', '0.01'), known.erase('Red', False):
        assert kind(got) == 'error' and images(got) == 0 and not got.film and str(tmp_path) not in got.html, got

def test_a_person_among_several_is_asked_for(backend, films):
    got = backend.enroll_clip(films['both'], 0, 59, 'Red', True)
    assert kind(got) == 'ask' and images(got) == 2 and backend.names() == [] and got.people == (1, 2)
    assert len(frame_times(got.film)) == 60     # a film with the numbers
    tracks = ppl.find_tracks(films['both'], 'motion')
    number = next(t.number for t in tracks if colours([s.crop for s in t.shots]).mean(0).argmax() == 0)
    assert kind(backend.enroll_clip(films['both'], 0, 59, 'Red', True, number)) == 'good'
    assert (gal.Gallery(backend.gallery).samples('Red')[1].argmax(1) == 0).all()
    assert kind(backend.enroll_clip(films['both'], 0, 59, 'Red', True, 7)) == 'error'

def test_enrolling_again_adds(known, films):
    before = crops(known.gallery)
    assert 'templates in all: 2' in known.enroll_clip(films['again'], 0, 59, 'Red', True).html
    assert set(before) < set(crops(known.gallery))

def test_the_list_is_read_afresh(known, films):
    bio.enroll('Late', films['green'], known.gallery, MATCHER, weights='motion')
    assert known.names() == ['Blue', 'Late', 'Red'] and images(known.show_samples('Late')) > 0
    gal.Gallery(known.gallery).erase('Late')
    assert known.names() == ['Blue', 'Red'] and known.show_samples('Late') == ''

def test_few_crops_are_shown(backend, films):
    got = backend.enroll_clip(films['red'], 10, 16, 'Red', True)
    assert kind(got) == 'good' and 5 <= images(got) < 9
    assert images(backend.show_samples('Red')) == images(got)
    backend.enroll_clip(films['again'], 0, 59, 'Red', True)
    assert images(backend.show_samples('Red')) <= 9

def test_the_network_is_loaded_once(ckpt, films, tmp_path, monkeypatch):
    from reid_nb.parts import weights as finetune
    loads, load = [], finetune.load_model
    monkeypatch.setattr(finetune, 'load_model', lambda path: loads.append(path) or load(path))
    backend = demo.DemoBackend(tmp_path/'gallery', ckpt, 'motion')
    for _ in range(2): backend.enroll_clip(films['red'], 0, 59, 'Red', True)
    backend.verify_clip(films['red'], 0, 59, 'Red', '0.01')
    assert len(loads) == 1

# --- consent, erasing, paths

def test_nobody_is_enrolled_without_consent(backend, films):
    assert 'consent' in backend.enroll_clip(films['red'], 0, 59, 'Red', False).html and backend.names() == []
    backend.enroll_clip(films['red'], 0, 59, 'Red', True)
    assert gal.Gallery(backend.gallery).store.read('SELECT consent FROM templates') == [(page_.CONSENT,)]

def test_deleting_gives_a_receipt_and_takes_the_query_too(known, films, tmp_path):
    known.identify_clip(films['red'], 0, 59, 'gallery', 'query', '0.01')
    assert crops(tmp_path/'root'/'query')
    got = known.erase('Red', True)
    assert 'Receipt: Red is forgotten' in got.html and known.names() == ['Blue'] and not crops(tmp_path/'root'/'query')
    assert not any('Red' in f for f in files(tmp_path/'root'))
    assert all('Red' not in str(row) for row in known.log_rows())

def test_query_crops_are_those_of_the_last_query_only(known, films, tmp_path):
    query = tmp_path/'root'/'query'
    known.identify_clip(films['both'], 0, 59, 'gallery', 'query', '0.01')
    assert {Path(f).parent.name for f in crops(query)} == {'person_1', 'person_2'}
    known.identify_clip(films['red'], 0, 59, 'gallery', 'query', '0.01')
    assert {Path(f).parent.name for f in crops(query)} == {'person_1'}
    (query/'thesis.txt').write_text('mine')
    before = files(query)
    assert kind(known.identify_clip(films['red'], 0, 59, 'gallery', 'query', '0.01')) == 'error'
    assert files(query) == before

OUTSIDE = ['', '.', '..', '/etc', '/', '../other', 'a/../..', 'gallery', 'gallery/Red', 'a\0b', '~'*300, 'link/x']

@pytest.mark.parametrize('path', OUTSIDE, ids=lambda p: ascii(p)[:20])
def test_paths_stay_below_the_root(known, films, tmp_path, path):
    (tmp_path/'other').mkdir()
    (tmp_path/'root'/'link').symlink_to(tmp_path/'other')
    before = files(tmp_path)
    assert kind(known.identify_clip(films['red'], 0, 59, 'gallery', path, '0.01')) == 'error'
    if path != 'gallery': assert kind(known.identify_clip(films['red'], 0, 59, path, 'query', '0.01')) == 'error'
    assert files(tmp_path) == before

@given(st.text())
@settings(max_examples=300, deadline=None)
def test_no_text_leads_out_of_the_root(path):
    root = Path('/tmp').resolve()/'root'
    try: full = page_.confine(root, path)
    except BadInput: return
    assert root in full.parents

@given(st.text())
@settings(max_examples=200, deadline=None)
def test_nothing_gets_into_the_page_unescaped(text):
    plain = page_.answer_box('bad', 'x', ['x'])
    assert re.findall('<[^>]*', page_.answer_box('bad', text, [text])) == re.findall('<[^>]*', plain)

def test_another_models_gallery_is_refused(known, tmp_path):
    other = ppl.Matcher(colours, 'b'*64, POINTS)
    with pytest.raises(BadInput, match='another model'): demo.DemoBackend(known.gallery, other)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('mine')
    with pytest.raises(BadInput, match='no gallery'): demo.DemoBackend(tmp_path/'mine', MATCHER)

# --- the running app

@pytest.fixture
def client(tmp_path):
    app = demo.build_demo(tmp_path/'root'/'gallery', MATCHER, 'motion')
    _, url, public = serve_.serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False)
    assert url.startswith('http://127.0.0.1:') and not public
    client = Client(url, verbose=False)
    client.root = tmp_path/'root'
    yield client
    app.close()

def test_the_app_from_the_outside(client, films):
    clip = {name: handle_file(str(path)) for name, path in films.items()}
    first, last, answer = client.predict(clip['red'], api_name='/frames')
    assert (first['maximum'], last['maximum'], last['value'], answer) == (59, 59, 59, '')     # frames, not seconds
    assert kind(client.predict(clip['red'], 0, 59, 'Ada & Söhne', True, None, api_name='/enroll')) == 'good'
    assert client.predict(api_name='/people')[0]['choices'] == [['Ada & Söhne']*2]
    assert kind(client.predict(clip['again'], 0, 59, 'Ada & Söhne', '0.001', api_name='/verify')) in ('good', 'ask')
    assert kind(client.predict(clip['blue'], 0, 59, 'Ada & Söhne', '0.01', api_name='/verify')) == 'bad'
    assert kind(client.predict(clip['both'], 0, 59, 'gallery', 'query', '0.01', api_name='/identify')) == 'good'
    assert 'Ada &amp; Söhne is forgotten' in client.predict('Ada & Söhne', True, api_name='/erase')[0]
    assert client.predict(api_name='/people')[0]['choices'] == []

def test_the_page_says_what_looks(client):
    config = json.dumps(json.load(urlopen(f'{client.src}config')))
    assert f'Network: **{"a"*12}**' in config
    labels = ['Enrollment', 'Verification', 'Identification', 'Gallery', 'Video', 'From Frame', 'To Frame']
    labels += ['Who finds people', 'Name Surname', 'Gallery Path', 'Query Path', 'Claimed identity']
    assert [label for label in labels if f'"{label}"' not in config] == []

def test_a_program_has_names_and_data(client, films):
    "Every parameter of every service has a name and is explained; the answer is what the command prints as JSON."
    services = client.view_api(return_format='dict', print_info=False)['named_endpoints']
    assert len(services) == 11 and all(s['description'] for s in services.values())
    names = {k: [p['parameter_name'] for p in s['parameters']] for k, s in services.items()}
    assert not any(re.match(r'param_\d', n) for own in names.values() for n in own)
    assert names['/verify'] == ['video', 'first', 'last', 'name', 'fmr', 'detector', 'camera']
    assert 'fmr: False match rate' in services['/verify']['description']
    def ask(service, **given):
        clips = {k: handle_file(str(films[v])) for k, v in given.items() if k == 'video'}
        return client.predict(**given | clips, api_name=f'/{service}')[1]
    done = ask('enroll', video='red', name='Red', consent=True)
    assert (done['name'], done['templates'], done['alike']) == ('Red', 1, []) and len(done['crops']) > 4
    client.predict(api_name='/people')
    root = client.root/'gallery'
    for service, claim in ('verify', dict(name='Red')), ('identify', {}):
        own = bio.identify(films['again'], root, MATCHER, weights='motion', claimed=claim.get('name')).to_dict()
        assert ask(service, video='again', **claim) == json.loads(gal.as_json(own))
    late = handle_file(str(film(client.root/'late.mp4', (RED, 3, 6, 20), (BLUE, 50, 6, 130))))
    some = client.predict(video=late, last=53, api_name='/identify')[1]
    assert some['decisions'][0]['name'] == 'Red' and [*some['skipped']] == ['2']     # who has few pictures
    assert ask('verify', video='again', first=9, last=3, name='Red') == {'error': 'From Frame 9 comes after To Frame 3'}
    assert ask('enroll', video='both', name='Two', consent=True)['people'] == [1, 2]
    assert 'consent' in ask('enroll', video='red', name='Red')['error']
    assert ask('rename', name='Red', to='Ruby') == {'name': 'Ruby'}
    client.predict(api_name='/people')
    assert ask('erase', name='Ruby', sure=True)['crops'] == len(done['crops'])

def test_who_finds_people_is_one_of_those_offered(backend, films):
    mine = '/home/ada/people.pt'
    other = demo.DemoBackend(backend.gallery, MATCHER, mine)
    assert other.detectors == {'auto': 'auto', 'motion': 'motion', 'people.pt': mine}
    assert '/home/ada' not in json.dumps(demo.build_demo(backend.gallery, MATCHER, mine).get_config_file())
    got = other.enroll_clip(films['red'], 0, 59, 'Red', True, None, '/etc/other.pt')
    assert 'unknown detector' in got.data['error'] and other.names() == []
    assert kind(other.enroll_clip(films['red'], 0, 59, 'Red', True, None, 'motion')) == 'good'

NUMBERS = st.one_of(st.none(), st.integers(-99, 10**12), st.floats(-99, 1e12))

@given(NUMBERS, NUMBERS, st.text(), st.booleans(), st.one_of(st.none(), st.text()))
@settings(max_examples=60, deadline=None)
def test_whatever_a_program_asks(films, first, last, name, sure, detector):
    "An answer, or one line that says why not; nothing is stored on the way."
    with tempfile.TemporaryDirectory() as root:
        page = demo.DemoBackend(Path(root)/'g', MATCHER, 'motion')
        for got in (page.enroll_clip(films['nobody'], first, last, name, sure, None, detector),
                    page.verify_clip(films['short'], first, last, name, '0.01', detector),
                    page.identify_clip(films['short'], first, last, name, 'query', '0.01', detector),
                    page.rename(name, name), page.merge(name, name), page.erase(name, sure)):
            why = got.data['error']
            assert why and len(why.splitlines()) == 1 and 'fault of this page' not in why and root not in why, why
        assert page.names() == [] and crops(root) == []

# --- which network

@pytest.fixture
def better(tmp_path, monkeypatch):
    "A network in the library: other settings, and the weights of the small one"
    monkeypatch.setenv('REID_HOME', str(tmp_path/'library'))
    tensors, meta = load_checkpoint(SMALL)
    name = network_.BETTER
    path = save_checkpoint(tmp_path/'library'/f'{name}.safetensors', tensors, meta | dict(source=name))
    thresholds_path(path).write_text(json.dumps(read_thresholds(SMALL) | dict(checkpoint_digest=sha256(path))))
    return path

def test_an_imported_network_is_the_default(better, tmp_path, caplog):
    assert ppl.load_matcher().path == better
    found = network_.heading(demo.DemoBackend(tmp_path/'g'))
    assert f'Network: **{better.stem}** · learned from MSMT17: 15 cameras' in found and 'cuhk03_p1' in found
    thresholds_path(better).write_text('{"thresholds":')
    assert ppl.load_matcher().path == SMALL and 'damaged' in caplog.text
    thresholds_path(better).unlink()
    found = network_.heading(demo.DemoBackend(tmp_path/'g'))
    assert 'Network: **the small one in the box** · learned from CUHK03, two cameras of one campus' in found

def test_a_gallery_keeps_its_network(better, tmp_path, caplog):
    "The better one is mentioned, and nobody is lost; where the gallery's is gone, that is said."
    small = ppl.load_matcher(SMALL)
    gal.Gallery(tmp_path/'g', small, create=True).add('Ada', template())
    with caplog.at_level('INFO'): assert demo.DemoBackend(tmp_path/'g').matcher.digest == small.digest
    assert 'reid_gallery --reembed' in caplog.text and better.stem in caplog.text
    gal.Gallery(tmp_path/'other', MATCHER, create=True).add('Ada', template())
    with pytest.raises(BadInput, match='made with another model'): demo.DemoBackend(tmp_path/'other')

def test_a_better_network_on_request(better, tmp_path, monkeypatch):
    "Used at once where nobody is enrolled; who is enrolled stays with the old one; one without thresholds waits."
    monkeypatch.setattr(network_, 'import_weights', lambda name: (better, None))
    def visit(gallery): return demo.DemoBackend(gallery, SMALL)
    new, emptied, known = visit(tmp_path/'new'), visit(tmp_path/'emptied'), visit(tmp_path/'known')
    for b in emptied, known: gal.Gallery(b.gallery, b.matcher, create=True).add('Ada', template())
    emptied.erase('Ada', True)
    for b in new, emptied:
        assert b.get_network().data == dict(network=better.stem, used=True) and b.matcher.path == better
        gal.Gallery(b.gallery, b.matcher, create=True)
    got = known.get_network()
    assert got.data == dict(network=better.stem, used=False) and '--reembed' in got.html and known.matcher.path == SMALL
    thresholds_path(better).unlink()
    assert 'fetched' in (why := visit(tmp_path/'new2').get_network().data['error']) and 'reid_calibrate' in why

def test_a_download_when_the_button_is_pressed(hub, monkeypatch, tmp_path):
    file, asked = hub
    entry(monkeypatch, hashlib.sha256(file).hexdigest())
    page = demo.DemoBackend(tmp_path/'g')
    assert asked == [] and page.matcher.path == SMALL
    assert 'calibrate it with reid_calibrate' in page.get_network().data['error'] and asked

def test_a_fresh_machine(fresh, toy, monkeypatch):
    "No weights, no network: the page starts, says what it has, and works on the toy clips; a download fails soon."
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(fresh/'cache'))
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    app = demo.build_demo(fresh/'gallery', examples=toy/'clips')
    _, url, _ = serve_.serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False)
    page = Client(url, verbose=False, download_files=fresh/'films')
    assert 'the small one in the box' in json.dumps(page.config) and 'ada_c1' in json.dumps(page.config)
    def ask(clip, service, **given):
        clip = handle_file(str(toy/'clips'/f'{clip}.mp4'))
        words, data, *_ = page.predict(video=clip, **given, api_name=f'/{service}')
        assert data['detector'] == 'motion' and 'found by motion' in words and 'found by motion' in data['found_by']
        return data
    assert ask('ada_c1', 'enroll', name='Ada', consent=True)['name'] == 'Ada'
    assert ask('ada_c3', 'identify')['decisions'][0]['ranking'][0][0] == 'Ada'
    began = time.monotonic()
    why = page.predict(api_name='/get_network')[1]['error']
    assert 'cannot be had' in why and 'reid_import FILE' in why and len(why.splitlines()) == 1
    assert time.monotonic() - began < 15
    app.close()

@pytest.mark.long
def test_the_command(run, ckpt, tmp_path):
    done = run('reid_demo', '--gallery', tmp_path/'g', '--checkpoint', tmp_path/'none.safetensors')
    assert done.returncode == 2 and done.stderr.startswith('reid_demo: ') and len(done.stderr.splitlines()) == 1
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    exe = Path(sys.executable).parent/'reid_demo'
    args = [exe, '--port', port, '--gallery', tmp_path/'g', '--checkpoint', ckpt]
    server = subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(200):
            time.sleep(.3)
            with socket.socket() as s:
                if s.connect_ex(('127.0.0.1', port)) == 0: break
        assert 'reid_nb' in urlopen(f'http://127.0.0.1:{port}/').read().decode()
        if shutil.which('ss'):
            listening = subprocess.run(['ss', '-ltnH', f'sport = :{port}'], capture_output=True, text=True).stdout
            assert '127.0.0.1' in listening and '0.0.0.0' not in listening.split()[3]
        busy = run('reid_demo', '--port', port, '--gallery', tmp_path/'g', '--checkpoint', ckpt)
        assert busy.returncode == 2 and len(busy.stderr.strip().splitlines()) == 1, busy
    finally:
        server.terminate()
        server.wait(30)
