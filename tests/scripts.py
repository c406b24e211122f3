"""Console scripts in processes of their own, which begin with everything imported.

A command spends most of its seconds on imports, and the tests run hundreds. Here one process imports what they import,
and each command is forked from it; the same script is run, with its own arguments, folder and environment."""
import atexit
import contextlib
import fcntl
import multiprocessing
import os
import runpy
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torchvision', 'reid_nb.biometrics', 'reid_nb.evaluate', 'reid_nb.finetune',
                               'reid_nb.moco', 'reid_nb.parts.published'])

def be_script(exe, args, cwd, env, *outputs):
    "Run a console script in this process."
    for number, path in enumerate(outputs, 1): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [exe, *args]
    try: runpy.run_path(exe, run_name='__main__')
    finally: atexit._run_exitfuncs()     # multiprocessing ends a process without them

def run_script(name, *args, cwd=None, timeout=None):
    "Like `subprocess.run` of a console script of this interpreter, with its output captured as text."
    exe, args = str(Path(sys.executable).parent/name), [*map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder)/k for k in ('out', 'err')]
        p = SERVER.Process(target=be_script, args=(exe, args, cwd or os.getcwd(), dict(os.environ), *map(str, outputs)))
        p.start()
        p.join(timeout)
        if p.exitcode is None:
            p.kill()
            raise subprocess.TimeoutExpired([exe, *args], timeout)
        return subprocess.CompletedProcess([exe, *args], p.exitcode, *(f.read_text() for f in outputs))

def run_in_terminal(name, *args):
    "What a console script of this interpreter shows in a terminal of 80 columns; raises `CalledProcessError`."
    here, there = os.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    command, seen = [Path(sys.executable).parent/name, *map(str, args)], b''
    with subprocess.Popen(command, stdout=there, stderr=there) as p:
        os.close(there)
        with contextlib.suppress(OSError):       # the terminal is gone when the script has ended
            while True: seen += os.read(here, 1 << 16)
    os.close(here)
    if p.returncode: raise subprocess.CalledProcessError(p.returncode, command, seen.decode())
    return seen.decode()
