"The sessions room: checkpoint files, states that are cut or belong to others, dice that come back."
import pytest
import torch

from reid_nb.dataset import BadInput
from reid_nb.sessions import Session, load_checkpoint, save_checkpoint

def test_checkpoint_files(tmp_path):
    path = save_checkpoint(tmp_path/'a.safetensors', {'w': torch.arange(6.).view(2,3)}, {'kind':'moco'})
    assert sorted(p.name for p in tmp_path.iterdir())==['a.json','a.safetensors']
    data = path.read_bytes()
    for cut in (0, 4, 50, len(data)-1):
        path.write_bytes(data[:cut])
        with pytest.raises(BadInput): load_checkpoint(path)

def test_session_refuses_the_state_of_others(tmp_path):
    save_checkpoint(tmp_path/'moco.session.safetensors', {}, {'settings': {'arch':'resnet50'}, 'step': 3})
    with pytest.raises(BadInput, match='arch resnet50 there, resnet10 now'):
        Session(tmp_path, 'moco', {'arch':'resnet10'}).resume()

def training(out, step, **kw):
    "A session with one layer, at a step"
    s = Session(out, 'toy', {'lr': 1}, **kw)
    net = torch.nn.Linear(2, 1)
    s.resume(net=net)
    s.step = max(s.step, step)
    return s

def test_a_cut_state_falls_back_and_two_are_refused(tmp_path, capsys):
    s = training(tmp_path, 0)
    for s.step in (1, 2): s.save()
    data = s.state.read_bytes()
    for cut in (0, 9, len(data)-1):
        s.state.write_bytes(data[:cut])
        assert training(tmp_path, 0).step==1
        assert 'going on from toy.session.before.safetensors' in capsys.readouterr().err
    s.before.write_bytes(b'')
    with pytest.raises(BadInput, match='copy it again'): training(tmp_path, 0)

def test_a_kill_between_two_files_leaves_the_one_before(tmp_path):
    s = training(tmp_path, 0)
    for s.step in (1, 2): s.save()
    s.state.unlink()
    assert training(tmp_path, 0).step==1

def test_the_state_before_is_refused_too_when_it_is_of_others(tmp_path):
    s = training(tmp_path, 3)
    s.save(); s.state.unlink()
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
    assert load_checkpoint(s.state)[1]['step']==2
