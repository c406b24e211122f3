"Around the page: the names under which it is served, pages of elsewhere, proxies, ports."
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_biometrics import MATCHER, template
from test_browser import browser  # noqa: F401

from reid_nb import demo
from reid_nb.parts import serve as serve_
from reid_nb.parts import page as page_
from reid_nb.parts.core import BadInput
from reid_nb.parts.gallery import Gallery

EVIL = 'evil.example'

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The running demo with Ada enrolled: its port"
    root = tmp_path_factory.mktemp('serve')/'gallery'
    Gallery(root, MATCHER, create=True).add('Ada', template())
    app = demo.build_demo(root, MATCHER, 'motion')
    _, url, _ = serve_.serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False, names=['reid.example.org'])
    yield int(url.rstrip('/').rsplit(':', 1)[1])
    app.close()

def ask(port, method, path, body=None, **headers):
    connection = HTTPConnection('127.0.0.1', port, timeout=60)
    connection.putrequest(method, path, skip_host='Host' in headers)
    for k, v in headers.items(): connection.putheader(k.replace('_', '-'), v)
    connection.putheader('Content-Length', str(len(body or b'')))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors='replace')

FORM = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\nabc\r\n--x--\r\n'
def upload(port, **headers):
    return ask(port, 'POST', '/gradio_api/upload', FORM, Content_Type='multipart/form-data; boundary=x', **headers)

def call(port, **headers):
    "Ask who is enrolled, as a program does"
    body = b'{"data": []}'
    return ask(port, 'POST', '/gradio_api/call/people', body, Content_Type='application/json', **headers)

@pytest.mark.parametrize('host', ['127.0.0.1:{}', 'localhost:{}', '[::1]:{}', 'LOCALHOST', 'reid.example.org'])
def test_names_that_are_meant(page, host):
    host = host.format(page)
    assert ask(page, 'GET', '/', Host=host)[0] == 200
    assert call(page, Host=host)[0] == call(page, Host=host, Origin=f'http://{host}')[0] == 200
    assert upload(page, Host=host)[0] == upload(page, Host=host, Origin=f'https://{host}')[0] == 200

@pytest.mark.parametrize('host', [EVIL, EVIL + ':{}', '127.0.0.1.' + EVIL, 'localhost@' + EVIL, f'{EVIL}@localhost', '',
                                  '10.0.0.7:{}', '[::1', 'reid.example.org.evil.example', '127.0.0.1, evil.example'])
def test_other_names_are_not_served(page, host):
    paths = '/', '/config', '/gradio_api/info', '/gradio_api/queue/data?session_hash=a', '/gradio_api/file=/etc/passwd'
    for path in paths:
        status, text = ask(page, 'GET', path, Host=host.format(page))
        assert status in (400, 403) and 'Ada' not in text and len(text.splitlines()) == 1, (path, status, text[:200])
    assert call(page, Host=host.format(page))[0] in (400, 403)

@pytest.mark.parametrize('origin', [f'http://{EVIL}', 'null', 'http://localhost:1', 'http://127.0.0.1:1', 'file://', '',
                                    f'http://127.0.0.1.{EVIL}', 'http://[', f'http://reid.example.org.{EVIL}'])
def test_other_pages_may_ask_nothing(page, origin):
    for f in call, upload: assert f(page, Origin=origin)[0] == 403
    for path in '/gradio_api/queue/join', '/gradio_api/component_server', '/gradio_api/reset', '/login':
        assert ask(page, 'POST', path, b'{}', Content_Type='text/plain', Origin=origin)[0] == 403

@given(st.text(), st.one_of(st.none(), st.text()))
def test_any_header_is_answered(host, origin):
    own = serve_.OwnPagesOnly(None, set)
    why = own.refuse(dict(host=host) | (dict(origin=origin) if origin is not None else {}))
    assert why or serve_.host_of(host) in ('127.0.0.1', 'localhost', '::1')
    assert '\n' not in why

def test_every_number_of_a_machine_that_listens_everywhere():
    own = serve_.OwnPagesOnly(None, lambda: {'box'}, numbers=True)
    def served(host): return not own.refuse(dict(host=host))
    assert all(map(served, ['192.168.1.5:7860', '[fe80::1]:7860', 'box', 'localhost']))
    assert not any(map(served, [EVIL, '1.2.3.4.example', 'fe80.example', '']))

class Elsewhere(http.server.BaseHTTPRequestHandler):
    "A page of somebody else, that sends forms to the demo"
    def do_GET(self):
        port = self.path.rsplit('/', 1)[-1]
        self.send_response(200)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        self.wfile.write(f"""<p id=done></p><script>
            const send = (path, body, type) => fetch('http://127.0.0.1:{port}/gradio_api/' + path,
                {{method: 'POST', mode: 'no-cors', headers: {{'Content-Type': type}}, body}})
            const form = new FormData()
            form.append('files', new Blob(['stolen']), 'planted.mp4')
            Promise.allSettled([
                fetch('http://127.0.0.1:{port}/gradio_api/upload', {{method: 'POST', mode: 'no-cors', body: form}}),
                send('call/erase', '{{"data": ["Ada", true]}}', 'text/plain'),
                fetch('http://127.0.0.1:{port}/config').then(r => r.text())
            ]).then(() => document.getElementById('done').textContent = 'done')</script>""".encode())
    def log_message(self, *args): "Say nothing."

@pytest.fixture
def elsewhere():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()

@pytest.mark.long
def test_a_browser_on_a_page_of_elsewhere(browser, page, elsewhere):  # noqa: F811
    from gradio.utils import get_upload_folder
    def planted(): return [p for p in Path(get_upload_folder()).rglob('planted.mp4')]
    before, seen = planted(), []
    tab = browser.new_page()
    tab.on('response', lambda r: seen.append((r.url.rsplit('/', 1)[-1], r.status)))
    tab.goto(f'http://127.0.0.1:{elsewhere}/{page}')
    tab.get_by_text('done', exact=True).wait_for()
    assert ('upload', 403) in seen and ('erase', 403) in seen and ('config', 403) in seen, seen
    assert planted() == before and '"Ada"' in names_of(page)
    tab.close()

def names_of(page):
    "The names that the page gives to a program of this machine"
    status, text = call(page)
    event = text.split('"')[3]
    return ask(page, 'GET', f'/gradio_api/call/people/{event}')[1]

@pytest.mark.long
def test_a_browser_whose_name_server_lies(browser, page):  # noqa: F811
    rebound = browser.browser_type.launch(executable_path=demo_browser(), args=[
        '--no-sandbox', f'--host-resolver-rules=MAP {EVIL} 127.0.0.1, MAP reid.example.org 127.0.0.1'])
    tab = rebound.new_page()
    assert tab.goto(f'http://{EVIL}:{page}/').status == 403
    assert 'is not served as' in tab.inner_text('body') and 'Ada' not in tab.content()
    assert tab.evaluate("fetch('/config').then(r => r.status)") == 403
    assert tab.goto(f'http://reid.example.org:{page}/').status == 200
    tab.get_by_role('heading', name='Who is it?').wait_for()
    tab.get_by_role('tab', name='Gallery').click()
    tab.get_by_label('Ada').wait_for()
    rebound.close()

def demo_browser():
    import shutil
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))

# --- the command

def start(args, **env):
    "Start reid_demo; returns the process and its port, when the page answers or the process has ended"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    exe = Path(sys.executable).parent/'reid_demo'
    p = subprocess.Popen([exe, '--port', str(port), *args], env=os.environ | env, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    while p.poll() is None:
        try: return p, port, ask(port, 'GET', '/')[0]
        except OSError: time.sleep(.3)
    return p, port, None

@pytest.mark.long
@pytest.mark.parametrize('env', [dict(http_proxy='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9'),
                                 dict(ALL_PROXY='socks5://127.0.0.1:9'), dict(all_proxy='socks4://x', no_proxy='')])
def test_proxies_do_not_matter(tmp_path, env):
    p, port, status = start(['--gallery', tmp_path/'g'], REID_HOME=str(tmp_path/'none'), **env)
    time.sleep(3)       # what launching looks at comes after the first answer
    ended, config = p.poll(), ask(port, 'GET', '/config')[1] if status else ''
    p.kill()
    out, err = p.communicate()
    assert status == 200 and ended is None, (out, err)
    assert 'the small one in the box' in config and 'get_network' in config     # nothing was downloaded for it

def test_proxies_come_back(monkeypatch):
    monkeypatch.setenv('http_proxy', 'http://a:1')
    monkeypatch.setenv('NO_PROXY', 'b')
    before = dict(os.environ)
    for outside in False, True:
        with page_.no_proxies(outside):
            assert ('http_proxy' in os.environ) == outside and '127.0.0.1' in os.environ['no_proxy']
        assert dict(os.environ) == before

@pytest.mark.long
def test_a_port_that_is_taken(run, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        ports = [s.getsockname()[1], 0, 70000, -3]
        for port in ports:
            got = run('reid_demo', '--port', port, '--gallery', tmp_path/'g')
            assert got.returncode == 2 and '--port' in got.stderr and len(got.stderr.strip().splitlines()) == 1, got

def test_launching_never_ends_in_a_traceback(monkeypatch, tmp_path):
    app = demo.build_demo(tmp_path/'g', MATCHER)
    def no(*args, **kw): raise ValueError('When localhost is not\naccessible')
    monkeypatch.setattr(app, 'launch', no)
    with pytest.raises(BadInput, match='cannot be started: ValueError: When localhost is not accessible'):
        serve_.serve_demo(app)

# --- what was swept away, and what nobody foresaw

def test_a_clip_that_was_swept_away(page, tmp_path, capfd):
    backend = demo.DemoBackend(tmp_path/'g', MATCHER, 'motion')
    reply = backend.enroll_clip(str(tmp_path/'gone.mp4'), 0, 10, 'Ada', True)
    assert 'upload it again' in reply.html and 'class="answer error"' in reply.html
    assert 'upload it again' in page_.slider_updates(str(tmp_path/'gone.mp4'))[2]

def test_a_fault_is_an_answer(tmp_path, monkeypatch, capfd):
    backend = demo.DemoBackend(tmp_path/'g', MATCHER, 'motion')
    def no(*args): raise ZeroDivisionError('division by zero')
    monkeypatch.setattr(demo, 'check_range', no)
    assert 'a fault of this page, ZeroDivisionError' in backend.enroll_clip('a.mp4', 0, 9, 'Ada', True).html
    assert 'Traceback' in capfd.readouterr().err
