"Checkpoint files, states that are damaged or belong to others, random states that come back."
import logging
import os
import pickle
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from reid_nb.parts.core import BadInput
from reid_nb.parts.weights import load_checkpoint, save_checkpoint
from reid_nb.parts.training import read_state, Run, Session
from reid_nb.parts.core import HOST

def test_checkpoint_files(tmp_path):
    path = save_checkpoint(tmp_path/'a.safetensors', {'w': torch.arange(6.).view(2,3)}, {'kind':'moco'})
    assert sorted(p.name for p in tmp_path.iterdir())==['a.json','a.safetensors']
    data = path.read_bytes()
    for cut in (0, 4, 50, len(data)-1):
        path.write_bytes(data[:cut])
        with pytest.raises(BadInput): load_checkpoint(path)

def test_what_a_kill_left_is_swept(tmp_path):
    "The half-written file of a dead process goes when anything is written there again; that of a living one stays."
    code = """if 1:
        import os, signal, sys
        from reid_nb.parts.core import atomic_write
        with atomic_write(sys.argv[1]) as f:
            f.write('half'); f.flush()
            if sys.argv[2:]: print('writing', flush=True); sys.stdin.readline()
            else: os.kill(os.getpid(), signal.SIGKILL)"""
    call = [sys.executable, '-c', code, str(tmp_path/'a.safetensors')]
    assert subprocess.run(call).returncode == -signal.SIGKILL
    dead, = tmp_path.iterdir()
    with subprocess.Popen([*call, 'wait'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive:
        assert alive.stdout.readline() == 'writing\n'
        living, = set(tmp_path.iterdir()) - {dead}
        elsewhere = tmp_path/dead.name.replace(HOST, 'another-host')
        elsewhere.write_text('half')
        save_checkpoint(tmp_path/'b.safetensors', {}, {})
        assert {*tmp_path.iterdir()} == {living, elsewhere, tmp_path/'b.safetensors', tmp_path/'b.json'}
        alive.stdin.close()
        assert alive.wait() == 0
    assert (tmp_path/'a.safetensors').read_text() == 'half' and not living.exists()
    os.utime(elsewhere, (0, 0))     # of another machine we know only the age
    save_checkpoint(tmp_path/'b.safetensors', {}, {})
    assert not elsewhere.exists()

def test_a_session_keeps_its_precision(tmp_path, monkeypatch, caplog):
    "A CPU with bf16 began it, one without goes on: in what it can, and it is said."
    cpu = torch.device('cpu')
    caplog.set_level(logging.INFO)
    for has, asked, want in ((True, None, 'bf16'), (True, 'fp32', 'fp32'), (True, None, 'fp32'), (False, None, 'fp32'),
                             (False, 'bf16', 'bf16'), (False, None, 'fp32')):
        monkeypatch.setattr('reid_nb.parts.device.has_bf16', lambda device: has)
        monkeypatch.setattr('reid_nb.parts.training.has_bf16', lambda device: has)
        caplog.clear()
        s = Session(tmp_path, 'toy', {}, Run(precision=asked))
        assert s.choose_precision(cpu) == want
        assert f'computing in {want}' in (said := caplog.text)
        assert ('no instructions for bf16' in said) == (want == 'bf16' and not has)
        s.resume(); s.save()
    assert 'begun in bf16' in said and read_state(s.files.newest)['precision'] == 'fp32'

def test_random_states_come_back(tmp_path):
    "Whoever goes on draws what an uninterrupted training would have drawn: PyTorch, NumPy, Python."
    def draw(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]
    training(tmp_path, 1).save()
    want = draw()
    torch.manual_seed(7); np.random.seed(7); random.seed(7)
    training(tmp_path, 1)
    assert draw() == want

def test_session_refuses_the_state_of_others(tmp_path):
    Session(tmp_path, 'moco', {'arch':'resnet50'}).resume()
    with pytest.raises(BadInput, match='arch resnet50 there, resnet10 now'):
        Session(tmp_path, 'moco', {'arch':'resnet10'}).resume()

@pytest.mark.parametrize('name', ['moco.session.safetensors','moco.session.before.safetensors'])
def test_a_state_of_an_older_version_is_refused_and_kept(tmp_path, name):
    old = save_checkpoint(tmp_path/name, {}, {'settings': {}, 'step': 3})
    with pytest.raises(BadInput, match='of an older version') as e: Session(tmp_path, 'moco', {}).resume()
    assert '\n' not in str(e.value) and sorted(tmp_path.iterdir())==[old.with_suffix('.json'), old]

class Bomb:
    def __reduce__(self): return open, ('bomb-went-off','w')

@pytest.mark.parametrize('state', [dict(settings={}, step=1, parts=Bomb()), [1,2], {'w': torch.zeros(2)}, b'text',
                                   None], ids=['bomb','list','weights','no zip','missing'])
def test_foreign_states_are_refused_in_one_line(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    path = tmp_path/'x.session.pt'
    if isinstance(state, bytes): path.write_bytes(state)
    elif state: torch.save(state, path, pickle_module=pickle)
    with pytest.raises(BadInput, match='x.session.pt is not a whole session') as e: read_state(path)
    assert '\n' not in str(e.value) and not (tmp_path/'bomb-went-off').exists()

def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    s = training(tmp_path, 0)
    s.save()
    data = s.files.newest.read_bytes()
    whole,found = read_state(s.files.newest),0
    for at in range(0, len(data), 97):
        s.files.newest.write_bytes(data[:at] + bytes([data[at]^1]) + data[at+1:])
        try: state = read_state(s.files.newest)
        except BadInput: found += 1
        else: assert str(state)==str(whole), at    # between two parts, where nothing is read
    assert found > 50

def training(out, step, **kw):
    "A session with one layer, at a step"
    s = Session(out, 'toy', {'lr': 1}, Run(**kw))
    net = torch.nn.Linear(2, 1)
    s.resume(net=net)
    s.step = max(s.step, step)
    return s

def test_a_cut_state_falls_back_and_two_are_refused(tmp_path, caplog):
    s = training(tmp_path, 0)
    for s.step in (1, 2): s.save()
    data = s.files.newest.read_bytes()
    for cut in (0, 9, len(data)-1):
        s.files.newest.write_bytes(data[:cut])
        assert training(tmp_path, 0).step==1
        assert 'going on from toy.session.before.pt' in caplog.text
        caplog.clear()
    s.files.before.write_bytes(b'')
    with pytest.raises(BadInput, match='copy it again'): training(tmp_path, 0)

def test_a_kill_between_two_files_leaves_the_one_before(tmp_path):
    s = training(tmp_path, 0)
    for s.step in (1, 2): s.save()
    s.files.newest.unlink()
    assert training(tmp_path, 0).step==1

def test_the_state_before_is_refused_too_when_it_is_of_others(tmp_path):
    s = training(tmp_path, 3)
    s.save(); s.files.newest.unlink()
    with pytest.raises(BadInput, match='lr 1 there, 2 now'): Session(tmp_path, 'toy', {'lr': 2}).resume()

def test_steps_count_from_where_the_session_began(tmp_path):
    seen = []
    for _ in range(3):
        s = training(tmp_path, 0, steps=2)
        seen.append([s.step for _ in s.steps(range(s.step, 5), 5, 'toy', 1)])
    assert seen==[[0,1], [2,3], [4]]

def test_interrupted_in_the_middle_by_an_error(tmp_path):
    s = training(tmp_path, 0, save_every=0)
    with pytest.raises(ZeroDivisionError):
        for x in s.steps(range(5), 5, 'toy', 1): 1/(2-x)
    assert read_state(s.files.newest)['step']==2
