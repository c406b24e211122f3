"""The demo under load: many clients at once over loopback, then memory, then kill -9 in the middle.

    python tests/benchmarks/load.py CHECKPOINT CLIPS [--clients 20] [--seconds 60] [--submits 200]

CLIPS is a folder with the toy city's clips. Each client enrols people under names of its own, and verifies one in
between, as fast as it is answered. Every confirmed enrolment must be found in the gallery afterwards, and nothing else;
every answer must be an answer or a polite "busy". Then one client submits over and over, and the server's memory is
read. At last all clients come again, and the server is killed: what it had confirmed is there, and folders and database
agree. Only 127.0.0.1 is used.
"""
import argparse
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from gradio_client import Client, handle_file

from reid_nb.parts.gallery import Gallery


def start(command):
    "A server on a free port: (its process, its address); `command` gets the port"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(list(map(str, command(port))), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as s:
            if s.connect_ex(('127.0.0.1', port)) == 0: return server, f'http://127.0.0.1:{port}'
        if server.poll() is not None: break
        time.sleep(.2)
    server.kill()
    raise RuntimeError('the server does not start')

def kind_of(html): return re.search(r'class="answer (\w+)"', html)[1]

def storm(url, clip, clients=20, seconds=60, frames=59, stop=None, tag='c'):
    "Many clients at once: (names that were confirmed, Counter of the kinds of answers, seconds of each, failures)"
    confirmed, kinds, took, failures = [], Counter(), [], []
    ready, stop = threading.Barrier(clients), stop or threading.Event()
    def visit(k):
        try:
            client = Client(url, verbose=False)
            ready.wait(120)
            end, n = time.monotonic() + seconds, 0
            while time.monotonic() < end and not stop.is_set():
                name, n, t = f'{tag}{k} number {n}', n + 1, time.monotonic()
                got = client.predict(handle_file(str(clip)), 0, frames, name, True, None, api_name='/enroll')[0]
                kinds[kind_of(got)] += 1
                took.append(time.monotonic() - t)
                if kind_of(got) == 'good': confirmed.append(name)
                else: time.sleep(.2)    # who is told that it is busy waits a little
        except Exception as e:
            if not stop.is_set(): failures.append(f'{type(e).__name__}: {e}')
    threads = [threading.Thread(target=visit, args=[k]) for k in range(clients)]
    for t in threads: t.start()
    for t in threads: t.join()
    return confirmed, kinds, took, failures

def memory(pid):
    "Resident memory of a process, in MB"
    text = Path(f'/proc/{pid}/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+)', text)[1])/1024

def consistent(root):
    "Names enrolled; folders and database must agree"
    here = Gallery(root)
    known = sorted(f for name in here.names() for f in here.samples(name)[0])
    found = sorted(p.relative_to(root).as_posix() for p in Path(root).rglob('*.jpg'))
    assert found == known and not (Path(root)/'pending.json').exists(), 'folders and database differ'
    return here.names()

def kill_in_a_storm(server, url, clip, clients, seconds, frames, tag='k'):
    "Storm, and kill -9 in the middle: the names that had been confirmed"
    stop = threading.Event()
    def kill():
        stop.set()
        os.kill(server.pid, signal.SIGKILL)
    timer = threading.Timer(seconds, kill)
    timer.start()
    confirmed, kinds, _, failures = storm(url, clip, clients, 10*seconds, frames, stop, tag)
    timer.join()
    server.wait()
    return confirmed, kinds, failures

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('checkpoint')
    p.add_argument('clips', type=Path)
    p.add_argument('--clients', type=int, default=20)
    p.add_argument('--seconds', type=float, default=60)
    p.add_argument('--submits', type=int, default=200)
    a = p.parse_args()
    clip, root = a.clips/'ada_c1.mp4', Path(tempfile.mkdtemp())/'gallery'
    exe = Path(sys.executable).parent/'reid_demo'
    def command(port): return [exe, '--port', port, '--gallery', root, '--checkpoint', a.checkpoint]
    server, url = start(command)
    confirmed, kinds, took, failures = storm(url, clip, a.clients, a.seconds)
    assert sorted(confirmed) == sorted(consistent(root)), 'an enrolment was lost, or is there unconfirmed'
    print(f'{a.clients} clients, {a.seconds:.0f} s: answers {dict(kinds)}, failures {failures or "none"}; '
          f'median {statistics.median(took):.1f} s, longest {max(took):.1f} s; '
          f'{len(confirmed)} enrolments confirmed, all there', flush=True)
    client, seen = Client(url, verbose=False), []
    client.predict(api_name='/people')
    for k in range(a.submits):
        client.predict(handle_file(str(clip)), 0, 59, confirmed[0], '0.01', api_name='/verify')
        seen.append(memory(server.pid))
        if k % (a.submits//4) == 0 or k == a.submits - 1: print(f'submit {k + 1}: {seen[-1]:.0f} MB', flush=True)
    confirmed2, kinds, failures = kill_in_a_storm(server, url, clip, a.clients, 15, 59)
    there = consistent(root)
    print(f'killed in a storm: {len(confirmed2)} confirmed by then, {len(set(confirmed2) - set(there))} of them lost, '
          f'{len(set(there) - set(confirmed) - set(confirmed2))} stored and not yet confirmed')

if __name__ == '__main__': main()
