"The demo as people use it: a real browser, headless. Screenshots go to the folder that REID_SCREENSHOTS names."
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from playwright.sync_api import expect, sync_playwright
from test_demo import better  # noqa: F401

from reid_nb import demo
from reid_nb.parts import network as network_
from reid_nb.parts import serve as serve_
from reid_nb.parts import page as page_
from reid_nb.parts import tracks as people
from reid_nb.biometrics import enroll
from reid_nb.evaluate import calibrate
from reid_nb.finetune import finetune
from reid_nb.parts.toy_city import write_video
from reid_nb.parts.video import read_frames
from reid_nb.parts.weights import SMALL

SHOTS = Path(os.environ.get('REID_SCREENSHOTS', ROOT/'nbs'/'_run'/'screenshots'))
SIZES = dict(desktop=dict(width=1280, height=900), phone=dict(width=375, height=812))

@pytest.fixture(scope='module')
def browser():
    names = 'chromium', 'chromium-browser', 'google-chrome'
    exe = next(filter(None, map(shutil.which, names)), None)
    if not exe: pytest.skip(f'no browser here: none of {", ".join(names)} is installed')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield browser
        browser.close()

@pytest.fixture(scope='module')
def network(toy):
    "The network of the lessons, with its thresholds."
    ckpt = finetune(toy/'market', out=ROOT/'nbs'/'_run'/'network', arch='resnet10_x0_5', epochs=60, size=(96, 48))
    calibrate(ckpt, toy/'market')
    return ckpt

@pytest.fixture
def site(network, toy, tmp_path):
    "The running demo, with nobody enrolled: (its address, the gallery's folder)"
    app = demo.build_demo(tmp_path/'gallery', network, 'motion', examples=toy/'clips')
    _, url, _ = serve_.serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False)
    yield url, tmp_path/'gallery'
    app.close()

class Visitor:
    "Someone at a page: finds things by what is written on them."
    def __init__(self, browser, url, size='desktop', **kw):
        self.size, self.page = size, browser.new_page(viewport=SIZES[size], **kw)
        self.page.set_default_timeout(300_000)
        self.errors, self.asked = [], set()
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('request', lambda r: re.search('/gradio_api/(queue|run)/', r.url) and self.asked.add(r))
        for event in 'requestfinished', 'requestfailed': self.page.on(event, lambda r: self.asked.discard(r))
        self.page.goto(url)
        self.page.get_by_role('tab', name='Enrollment').wait_for()     # comes after the heading, on a slow machine

    @property
    def panel(self): return self.page.locator('[role=tabpanel]:visible')

    def tab(self, name):
        tab = self.page.get_by_role('tab', name=name)
        if not tab.is_visible():    # on a phone the last ones are behind a button
            self.page.locator('.overflow-menu button').first.click()
            tab = self.page.locator('.overflow-dropdown').get_by_text(name)
        tab.click()
        self.page.wait_for_timeout(300)

    def settle(self):
        "Wait until the page has all its answers: what comes late would be taken for an answer to what comes next."
        end, quiet = time.monotonic() + 300, 0
        while quiet < 3:
            # an idle moment: the events of clicks have been sent
            self.page.evaluate('() => new Promise(done => requestIdleCallback(done, {timeout: 1000}))')
            self.page.wait_for_timeout(100)
            quiet = 0 if self.asked else quiet + 1
            assert time.monotonic() < end, f'no answer to {[r.url for r in self.asked]}'

    def example(self, name):
        "Choose a clip of the toy city; wait until this clip is there, and the sliders know it"
        self.panel.get_by_role('button', name=name, exact=True).click()
        self.panel.locator(f'video[src*="{name}"]').first.wait_for()
        self.settle()
        self.page.wait_for_function("""() => [...document.querySelectorAll('[role=tabpanel] input[type=number]')]
            .filter(x => x.offsetParent).some(x => x.max > 0 && x.max < 4999)""")

    def upload(self, path):
        self.settle()
        self.forget()
        self.panel.locator('input[type=file]').first.set_input_files(path)

    def forget(self):
        "Answers that are there by now are old"
        self.page.evaluate("document.querySelectorAll('.answer').forEach(x => x.dataset.old = 1)")

    def click(self, name):
        if name != 'Cancel': self.settle()
        self.forget()
        self.panel.get_by_role('button', name=name, exact=True).click()

    def answer(self, kind):
        "The text of the answer, which must be of this kind"
        box = self.panel.locator('.answer:not([data-old])')
        box.wait_for()
        text = box.inner_text()
        assert kind in box.get_attribute('class'), text
        return text

    def submit(self, kind):
        self.click('Submit')
        return self.answer(kind)

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS/f'{name}_{self.size}.png', full_page=True)

def enrol(visitor, name, clip, kind='good'):
    visitor.tab('Enrollment')
    visitor.example(clip)
    visitor.panel.get_by_label('Name Surname').fill(name)
    visitor.panel.get_by_label(page_.CONSENT).check()
    return visitor.submit(kind)

@pytest.mark.long
def test_a_visit(browser, site):
    "Enrol three people, a true and a false claim, a known and an unknown person, look after the gallery, erase."
    url, gallery = site
    v = Visitor(browser, url)
    for name, clip in ('Ada', 'ada_c1'), ('Bruno', 'bruno_c1'), ('Chiara', 'chiara_c1'):
        assert f'Completed: {name} is enrolled' in enrol(v, name, clip)
    v.shot('enrollment')
    assert 'Choose the one who is meant' in enrol(v, 'Elena', 'chiara_elena_c3', 'ask')
    plays(v)
    v.shot('who_is_meant')
    v.tab('Verification')
    v.example('ada_c3')
    v.panel.get_by_label('Ada').check()
    v.panel.locator('figure').first.wait_for()     # her enrolled crops
    assert 'Ada is recognised' in v.submit('good')
    plays(v)
    v.shot('verification_true')
    v.panel.get_by_label('Bruno').check()
    text = v.submit('bad')
    assert 'nobody in the clip is recognised as Bruno' in text and 'Ada' not in text
    v.shot('verification_false')
    v.tab('Identification')
    v.example('ada_c3')
    assert '1 of 1 people identified: Ada' in v.submit('good')
    plays(v)
    v.shot('identification_known')
    v.example('fabio_c3')
    assert 'unknown' in v.submit('bad')
    v.shot('identification_unknown')
    look_after(v)
    assert sorted(p.name for p in gallery.iterdir()) == ['Ada', 'Bruno', 'gallery.sqlite'] and v.errors == []

def plays(visitor):
    "The film with boxes and names is there, and the browser can decode it."
    film = visitor.panel.locator('video').last
    film.wait_for()
    visitor.page.wait_for_function('v => v.readyState >= 2 && v.videoWidth > 0', arg=film.element_handle())
    film.evaluate('v => { v.currentTime = .6*v.duration }')      # where people are, for the screenshot
    visitor.page.wait_for_function('v => !v.seeking', arg=film.element_handle())

def look_after(v):
    "Rename, merge, undo, erase."
    v.tab('Gallery')
    v.panel.get_by_label('Chiara').check()
    v.panel.locator('figure').first.wait_for()
    v.panel.get_by_text('Another name', exact=True).click()
    v.panel.get_by_label('New name').fill('Chiara B')
    v.click('Rename')
    assert 'Chiara is now called Chiara B' in v.answer('good')
    v.panel.get_by_label('Chiara B').check()
    v.panel.get_by_text('Two names, one person', exact=True).click()
    choose(v, 'Is the same person as', 'Ada')
    v.click('Merge')
    assert 'one person now, Ada' in v.answer('good')
    v.panel.get_by_label('Chiara B', exact=True).wait_for(state='detached')
    v.shot('gallery_merged')
    choose(v, 'Merged names', 'Chiara B')
    v.click('Undo this merge')
    assert 'Chiara B is a person of their own' in v.answer('good')
    v.panel.get_by_label('Chiara B', exact=True).check()
    v.panel.get_by_text('Forget', exact=True).click()
    v.panel.get_by_label('Delete this person for good').check()
    v.click('Delete')
    assert 'Receipt: Chiara B is forgotten' in v.answer('good')
    v.shot('gallery_receipt')

def choose(v, label, name):
    v.panel.get_by_label(label).click()
    v.page.get_by_role('option', name=name, exact=True).click()

TYPE_AT_ONCE = """text => new MutationObserver((_, observer) => {
    const label = [...document.querySelectorAll('label')].find(x => x.textContent.trim() == 'New name')
    const field = label && label.querySelector('input, textarea')
    if (!field) return
    observer.disconnect()
    Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), 'value').set.call(field, text)
    field.dispatchEvent(new Event('input', {bubbles: true}))
}).observe(document.body, {childList: true, subtree: true})"""

@pytest.mark.long
def test_a_late_list_undoes_no_choice(browser, site, network, toy, monkeypatch):
    "Who is faster than a slow server's list keeps choice and words; who comes back finds nothing chosen."
    url, gallery = site
    enroll('Ada', toy/'clips'/'ada_c1.mp4', gallery, network, weights='motion')
    v, come, people_now = Visitor(browser, url), threading.Event(), demo.DemoBackend.people
    v.tab('Gallery')
    ada, new_name = v.panel.get_by_label('Ada'), v.panel.get_by_label('New name')
    ada.wait_for()
    v.tab('Enrollment')
    enroll('Bruno', toy/'clips'/'bruno_c1.mp4', gallery, network, weights='motion')
    monkeypatch.setattr(demo.DemoBackend, 'people', lambda self: come.wait(60) and people_now(self))
    v.tab('Gallery')
    ada.check()
    v.page.evaluate(TYPE_AT_ONCE, 'Ada B')     # nobody types faster: in the very moment in which the field is there
    v.panel.get_by_text('Another name', exact=True).click()
    new_name.wait_for()
    v.page.wait_for_timeout(500)
    assert ada.is_checked() and new_name.input_value() == 'Ada B'
    assert v.panel.get_by_label('Bruno').count() == 0
    come.set()
    v.panel.get_by_label('Bruno').wait_for()
    assert ada.is_checked() and new_name.input_value() == 'Ada B'
    v.tab('Enrollment')
    v.tab('Gallery')
    expect(ada).not_to_be_checked(timeout=300_000)
    expect(new_name).to_have_value('', timeout=300_000)

@pytest.mark.long
def test_late_pictures_do_not_replace_a_receipt(browser, site, network, toy, monkeypatch):
    "Who is faster than a slow server's pictures of a person sees the receipt, not the pictures of who is forgotten."
    url, gallery = site
    enroll('Ada', toy/'clips'/'ada_c1.mp4', gallery, network, weights='motion')
    come, started, show_now = threading.Event(), threading.Event(), demo.DemoBackend.show_samples
    def late(self, *args):
        pictures = show_now(self, *args)
        started.set()
        come.wait(60)
        return pictures
    monkeypatch.setattr(demo.DemoBackend, 'show_samples', late)
    v = Visitor(browser, url)
    v.tab('Gallery')
    v.panel.get_by_label('Ada').check()
    v.panel.get_by_text('Forget', exact=True).click()
    v.panel.get_by_label('Delete this person for good').check()
    assert started.wait(60)
    v.panel.get_by_role('button', name='Delete', exact=True).click()
    assert 'Receipt: Ada is forgotten' in v.answer('good')
    come.set()
    v.settle()
    assert 'Receipt: Ada is forgotten' in v.answer('good') and v.panel.locator('figure').count() == 0

@pytest.mark.long
def test_a_clip_that_is_measured_late_does_not_wipe_an_answer(browser, site, monkeypatch):
    "Who presses Submit before the sliders know the clip keeps the answer."
    come, check, asked = threading.Event(), page_.check_clip, []
    def late(video):
        asked.append(video)
        if len(asked) == 1: come.wait(60)     # the sliders ask first
        return check(video)
    monkeypatch.setattr(page_, 'check_clip', late)
    v = Visitor(browser, site[0])
    v.panel.get_by_role('button', name='ada_c1', exact=True).click()
    v.panel.locator('video[src*="ada_c1"]').first.wait_for()
    while not asked: v.page.wait_for_timeout(100)
    v.panel.get_by_label('Name Surname').fill('Ada')
    v.panel.get_by_label(page_.CONSENT).check()
    v.panel.get_by_role('button', name='Submit', exact=True).click()
    assert 'Completed: Ada is enrolled' in v.answer('good')
    come.set()
    v.settle()
    assert 'Completed: Ada is enrolled' in v.answer('good')

@pytest.mark.long
@pytest.mark.parametrize('size', SIZES)
def test_a_page_with_cameras(browser, toy, tmp_path, size):
    "A camera is asked for, learned from a street, seen through, and offered to whoever comes next."
    street = next(iter(sorted((toy/'videos').rglob('*porto*.mp4'))))
    few = write_video(tmp_path/'street.mp4', (rgb for _, rgb in read_frames(street, [*range(120)])))
    app = demo.build_demo(tmp_path/'gallery', SMALL, 'motion', toy/'clips', tmp_path/'cameras')
    _, url, _ = serve_.serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False)
    v = Visitor(browser, url, size)
    assert 'before which camera is it?' in enrol(v, 'Ada', 'ada_c1', 'error')
    camera = v.page.get_by_label('Camera of the clip')
    camera.fill('gate')
    camera.press('Enter')
    assert 'it takes 4 to know a camera' in v.submit('error')
    v.tab('Cameras')
    v.upload(few)
    v.panel.locator('video').first.wait_for()
    assert 'The camera gate is known' in v.submit('good')
    v.shot('cameras')
    assert 'camera gate: ' in enrol(v, 'Ada', 'ada_c1')
    v.shot('through_a_camera')
    fits(v)
    other = Visitor(browser, url, size)
    other.page.get_by_label('Camera of the clip').click()
    other.page.get_by_role('option', name='gate', exact=True).wait_for()
    assert v.errors == other.errors == []
    assert sorted(p.name for p in (tmp_path/'cameras').iterdir()) == ['gate.json', 'gate.safetensors']
    app.close()

@pytest.mark.long
def test_a_visit_by_phone(browser, site):
    "Who is meant is chosen, not typed; nothing is wider than the screen; a stranger in company stays unknown."
    url, gallery = site
    v = Visitor(browser, url, 'phone', has_touch=True)
    fits(v)
    assert 'Choose the one who is meant' in enrol(v, 'Dario', 'dario_fabio_c1', 'ask')
    plays(v)
    v.panel.get_by_label('person 1').check()
    v.shot('who_is_meant')
    assert 'Dario is enrolled' in v.submit('good') and v.panel.get_by_label('person 1').count() == 0
    fits(v)
    v.tab('Identification')
    v.example('fabio_c3')
    assert 'unknown' in v.submit('bad')
    plays(v)
    fits(v)
    v.shot('identification')
    v.tab('Gallery')
    v.panel.get_by_label('Dario').wait_for()
    fits(v)
    v.shot('gallery')
    assert v.errors == []

def fits(v):
    assert v.page.evaluate('document.documentElement.scrollWidth') <= v.page.viewport_size['width']

@pytest.mark.long
def test_what_goes_wrong_is_said_and_replaces_the_old_answer(browser, site, tmp_path):
    url, gallery = site
    v = Visitor(browser, url)
    enrol(v, 'Ada', 'ada_c1')
    assert v.panel.locator('figure').count() > 5
    v.panel.get_by_label('Name Surname').fill('../../etc')
    assert 'cannot be a name' in v.submit('error') and v.panel.locator('figure').count() == 0
    v.panel.get_by_label(page_.CONSENT).uncheck()
    assert 'consent' in v.submit('error')
    v.tab('Verification')
    assert 'no identity is claimed' in v.submit('error')
    v.panel.get_by_label('Ada').check()
    assert 'upload a clip first' in v.submit('error')
    (tmp_path/'notes.mp4').write_text('these are notes')
    v.upload(tmp_path/'notes.mp4')
    assert 'notes.mp4: this is not a video' in v.answer('error')
    v.shot('not_a_video')
    assert str(tmp_path) not in v.page.content() and [p.name for p in gallery.glob('A*')] == ['Ada']

@pytest.mark.long
def test_progress_and_cancel(browser, site):
    "A long step says how far it is; Cancel ends it, and nothing is stored."
    url, gallery = site
    v = Visitor(browser, url)
    check_people = people.check_people
    def dawdle(*args): return time.sleep(.2) or check_people(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(people, 'check_people', dawdle)
        v.tab('Enrollment')
        v.example('ada_c1')
        v.panel.get_by_label('Name Surname').fill('Ada')
        v.panel.get_by_label(page_.CONSENT).check()
        v.click('Submit')
        v.page.get_by_text('looking for people').first.wait_for()
        v.shot('progress')
        v.click('Cancel')
        assert 'Nothing has been stored' in v.answer('stop')
    assert not gallery.exists()
    assert 'Completed' in v.submit('good')      # and the next one is served

@pytest.mark.long
def test_keyboard_and_labels(browser, site):
    "Everything that takes input has a name, and Submit is reached and pressed without a mouse."
    v = Visitor(browser, site[0])
    nameless = """() => [...document.querySelectorAll('input, textarea, select, button')].filter(x => x.offsetParent)
        .filter(x => !(x.innerText || x.ariaLabel || x.title || (x.labels && x.labels.length) || x.closest('label')
                       || x.getAttribute('aria-labelledby'))).map(x => x.outerHTML.slice(0, 160))"""
    for name in ('Enrollment', 'Verification', 'Identification', 'Gallery'):
        v.tab(name)
        assert v.page.evaluate(nameless) == []
    v.tab('Verification')
    v.page.get_by_role('tab', name='Verification').focus()
    for _ in range(60):
        v.page.keyboard.press('Tab')
        if v.page.evaluate('document.activeElement.innerText') == 'Submit': break
    v.page.keyboard.press('Enter')
    assert 'no identity is claimed' in v.answer('error')

@pytest.mark.long
def test_a_better_network(browser, better, toy, tmp_path, monkeypatch):  # noqa: F811
    "It is got when the button is pressed, stands under the heading at once, and is not offered again."
    got = []
    monkeypatch.setattr(network_, 'import_weights', lambda name: got.append(name) or (better, None))
    app = demo.build_demo(tmp_path/'gallery', SMALL, examples=toy/'clips')
    _, url, _ = serve_.serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False)
    v = Visitor(browser, url, 'phone')
    v.page.get_by_text('the small one in the box').wait_for()
    v.page.get_by_text('A better network', exact=True).click()
    assert got == []
    v.page.get_by_role('button', name='Get a network trained on more cameras').click()
    v.page.get_by_text(f'{better.stem} is used from now on').wait_for()
    v.page.locator('strong').get_by_text(better.stem, exact=True).wait_for()
    v.shot('better_network')
    v.page.get_by_label('motion: whatever moves').check()
    assert 'Ada is enrolled' in enrol(v, 'Ada', 'ada_c1') and got == [better.stem]
    v.page.reload()
    v.page.locator('strong').get_by_text(better.stem, exact=True).wait_for()
    expect(v.page.get_by_text('A better network', exact=True)).not_to_be_visible(timeout=60_000)
    assert v.errors == []
    fits(v)
    app.close()

@pytest.mark.long
def test_who_has_no_password_stays_outside(browser, network, tmp_path):
    (tmp_path/'login').write_text('ada:count:ess\n')
    app = demo.build_demo(tmp_path/'gallery', network)
    login = serve_.read_login(tmp_path/'login')
    _, url, _ = serve_.serve_demo(app, login=login, prevent_thread_lock=True, quiet=True, inline=False)
    page = browser.new_page()
    page.goto(url)
    def enter(password):
        page.get_by_label('username').fill('ada')
        page.get_by_label('password').fill(password)
        page.get_by_role('button', name='Login').click()
    enter('count')
    page.get_by_text('Incorrect').first.wait_for()
    assert page.get_by_text('Who is it?').count() == 0
    enter('count:ess')
    page.get_by_role('heading', name='Who is it?').wait_for()
    app.close()
