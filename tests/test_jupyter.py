"""Notebooks as students touch them: a real JupyterLab in a headless browser, a slider moved, the demo in a cell.

Of a notebook with widgets only the cells run that the widgets need, found from the names they use: a whole lesson
takes minutes, and test_notebooks.py runs it. Screenshots go to the folder that REID_SCREENSHOTS names."""
import ast
import builtins
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import symtable
import sys
import time
from importlib.util import find_spec
from urllib.request import urlopen

import pytest
from conftest import ROOT
from test_browser import SHOTS, browser, network  # noqa: F401

from reid_nb.parts.page import CONSENT

# --- which cells a widget needs

WIDGET = re.compile(r'\binteract(_manual)?\(|^@interact', re.M)

def sources(notebook):
    "The code cells that run outside Colab, in order."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return [s for s in code if '%pip' not in s]

def names_in(source):
    "Names that a cell gives to the notebook, and names that it takes from there."
    source = '\n'.join('pass' if line.startswith(('%', '!')) else line for line in source.splitlines())
    tables = [symtable.symtable(source, 'cell', 'exec')]
    gives, takes = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}, set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        takes |= {s.get_name() for s in table.get_symbols()
                  if s.is_referenced() and (s.is_global() or table.get_type() == 'module')}
    changed = {n.target.id for n in ast.walk(ast.parse(source))
               if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    return gives, takes - (gives - changed) - {*dir(builtins)}

def needed(cells):
    "The widgets' cells, and the cells before them that give a name which they use; a mere effect is not seen."
    names, kept = [names_in(s) for s in cells], {k for k, s in enumerate(cells) if WIDGET.search(s)}
    last, before = max(kept), None
    while before != kept:
        before, wanted = {*kept}, set().union(*(names[k][1] for k in kept))
        kept |= {k for k in range(last) if names[k][0] & wanted}
    return [cells[k] for k in sorted(kept)]

def test_the_cells_of_a_widget():
    cells = ['import os\nfrom math import sin', 'def f(x): return sin(x) + y', 'y = 1', 'z = [q for q in range(3)]',
             'y += 2', 'class C: pass', '%matplotlib inline\ninteract(f, x=(0, 1), c=C())', 'print(f(1))', 'y = 3']
    assert needed(cells) == [cells[k] for k in (0, 1, 2, 4, 5, 6)]

# --- JupyterLab

SETTINGS = {'@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False)}

def server_of(folder, address, settings):
    "Start JupyterLab in a folder; nothing of the user's own configuration is read or written."
    for name, value in SETTINGS.items():
        path = settings/'lab'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(value))
    env = {f'JUPYTER_{k}_DIR': str(settings/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    env |= dict(JUPYTERLAB_SETTINGS_DIR=str(settings/'lab'), JUPYTERLAB_WORKSPACES_DIR=str(settings/'spaces'),
                JUPYTER_TOKEN=address['token'], IPYTHONDIR=str(settings/'ipython'),
                PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    options = [f'--ServerApp.port={address["port"]}', f'--ServerApp.root_dir={folder}', '--ServerApp.ip=127.0.0.1',
               '--ServerApp.port_retries=0', '--LabApp.expose_app_in_browser=True', '--no-browser', '--allow-root']
    log = open(settings/'log.txt', 'w')
    return subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], env=os.environ | env, cwd=folder,
                            stdout=log, stderr=subprocess.STDOUT)

class Lab:
    "A running JupyterLab."
    def __init__(self, new_page, folder, url, token):
        self.new_page, self.folder, self.url, self.token = new_page, folder, url, token

    def open(self, path, cells):
        "Write a notebook below the folder, and open it; returns the page."
        meta = dict(kernelspec=dict(name='python3', display_name='Python 3'), language_info=dict(name='python'))
        cells = [dict(cell_type='code', id=f'c{k}', metadata={}, source=s, outputs=[], execution_count=None)
                 for k, s in enumerate(cells)]
        (self.folder/path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder/path).write_text(json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)))
        page = self.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(120_000)
        page.goto(f'{self.url}/lab/tree/{path}?reset&token={self.token}')
        page.locator('.jp-Notebook .jp-Cell').first.wait_for()
        page.wait_for_function("() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel")
        return page

@pytest.fixture(scope='module')
def lab(browser, tmp_path_factory):  # noqa: F811
    "JupyterLab in an empty folder, but for the toy city that other tests have drawn."
    missing = [m for m in ('jupyterlab', 'ipywidgets') if not find_spec(m)]
    if missing: pytest.skip(f'{" and ".join(missing)} not installed: no notebook is opened')
    folder, settings = (tmp_path_factory.mktemp(name) for name in ('lab', 'settings'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    url, token = f'http://127.0.0.1:{port}', secrets.token_hex(16)
    server = server_of(folder, dict(port=port, token=token), settings)
    (folder/'nbs'/'_run').mkdir(parents=True)
    (folder/'nbs'/'_run'/'toy').symlink_to(ROOT/'nbs'/'_run'/'toy')
    try:
        wait_for_server(server, f'{url}/api?token={token}', settings/'log.txt')
        yield Lab(browser.new_page, folder, url, token)
    finally:
        server.terminate()      # it ends its kernels, and whatever they serve
        try: server.wait(60)
        except subprocess.TimeoutExpired: server.kill()

def wait_for_server(server, url, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try: return urlopen(url, timeout=10).close()
        except OSError: time.sleep(.3)
    raise AssertionError(f'JupyterLab did not start:\n{log.read_text()[-3000:]}')

def run_all(page):
    "Run all cells; returns what went wrong."
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    return page.evaluate("""() => jupyterapp.shell.currentWidget.content.widgets
        .flatMap(c => c.model.sharedModel.outputs ?? [])
        .filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)""")

def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS/f'jupyter_{name}.png')

# --- widgets

def settled(page, box):
    "The widget's pictures, when nothing is being computed any more."
    before, now = None, pictures(box)
    while before != now or not page.evaluate(IDLE):
        page.wait_for_timeout(500)
        before, now = now, pictures(box)
    return now

IDLE = "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'"

def pictures(box): return box.locator('img, canvas').evaluate_all('all => all.map(x => x.src ?? x.toDataURL())')

def still_dead(page, box, slider, seconds=60):
    "Move a slider with the keyboard; says what is wrong where no picture changes."
    before, end = settled(page, box), time.monotonic() + seconds
    slider.focus()
    full = slider.get_attribute('aria-valuenow') == slider.get_attribute('aria-valuemax')
    place = slider.locator('..')      # what is said of the value is rounded
    at = place.get_attribute('style')
    for _ in range(3): page.keyboard.press('ArrowLeft' if full else 'ArrowRight')
    while settled(page, box) == before and time.monotonic() < end: page.wait_for_timeout(200)
    if place.get_attribute('style') == at: return 'it does not move'
    return '' if before and pictures(box) != before else 'its picture stays as it was'

def try_widgets(page, name, **kw):
    "Move every slider of every widget on a page; returns those that change no picture."
    dead = {}
    boxes = page.locator('.widget-interact')
    boxes.first.locator('img, canvas').first.wait_for()
    for k in range(boxes.count()):
        sliders = boxes.nth(k).locator('[role=slider]')
        if not sliders.count(): dead[k] = 'no slider'
        for n in range(sliders.count()):
            if why := still_dead(page, boxes.nth(k), sliders.nth(n), **kw): dead[k, n] = why
        boxes.nth(k).scroll_into_view_if_needed()
        shot(page, f'{name}_{k}')
    return dead

SMALL = ['import matplotlib.pyplot as plt\nfrom ipywidgets import interact',
         'def draw(power):\n    plt.plot([x**power for x in range(5)])\n    plt.show()',
         'interact(draw, power=(0, 3));']

@pytest.mark.long
def test_a_slider_changes_a_picture(lab):
    page = lab.open('small/small.ipynb', SMALL)
    assert (run_all(page), try_widgets(page, 'small')) == ([], {})
    page.close()

@pytest.mark.long
def test_a_slider_that_does_nothing_is_seen(lab):
    dead_one = 'interact(lambda power, unused: draw(power), power=(0, 3), unused=(0, 9));'
    page = lab.open('small/dead.ipynb', [*SMALL, dead_one, '1/0'])
    errors, dead = run_all(page), try_widgets(page, 'dead', seconds=3)
    assert errors == ['ZeroDivisionError: division by zero'] and dead == {(1, 1): 'its picture stays as it was'}
    page.close()

NOTEBOOKS = [nb for d in ('nbs', 'nbs/parts') for nb in sorted((ROOT/d).glob('[0-9]*.ipynb'))]

@pytest.mark.long
@pytest.mark.parametrize('nb', [nb for nb in NOTEBOOKS if any(map(WIDGET.search, sources(nb)))], ids=lambda nb: nb.stem)
def test_widgets(lab, nb, toy):
    page = lab.open(nb.relative_to(ROOT).as_posix(), needed(sources(nb)))
    assert (run_all(page), try_widgets(page, nb.stem)) == ([], {})
    page.close()

# --- the demo in a cell

@pytest.mark.long
def test_the_demo_in_the_last_cell(lab, network):  # noqa: F811
    "All cells of the lesson run, and the page below the last one works: somebody is enrolled in it."
    shutil.copytree(network.parent, lab.folder/'nbs'/'_run'/'network')     # else the lesson trains it once more
    page = lab.open('nbs/08_demo.ipynb', sources(ROOT/'nbs'/'08_demo.ipynb'))
    assert run_all(page) == []
    frame = page.locator('.jp-Notebook .jp-Cell').last.locator('iframe')
    frame.scroll_into_view_if_needed()
    assert frame.get_attribute('src').startswith('http://127.0.0.1:')
    demo = frame.content_frame
    demo.get_by_role('heading', name='Who is it?').wait_for()
    shot(page, 'demo')
    demo.get_by_role('button', name='bruno_c1', exact=True).click()
    demo.locator('video[src*="bruno_c1"]').wait_for()
    demo.get_by_label('Name Surname').fill('Bruno')
    demo.get_by_label(CONSENT).check()
    demo.get_by_role('button', name='Submit', exact=True).click()
    demo.get_by_text('Completed: Bruno is enrolled').wait_for()
    demo.locator('.answer').scroll_into_view_if_needed()
    shot(page, 'demo_enrolled')
    page.close()
