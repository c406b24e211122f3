"""Published weights in and out: what networks of torchreid, fast-reid and Roboflow's reid embed, here and there.

The peers are their packages from the registry, as they are (conftest's `peers`)."""
import hashlib
import json
import pickle
import re
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from reid_nb.parts import published
from reid_nb.parts.core import BadInput
from reid_nb.parts.device import to_input
from reid_nb.parts.models import torchreid_model
from reid_nb.parts.published import export_weights, import_weights, REGISTRY, TORCHREID
from reid_nb.parts.weights import embed, load_checkpoint, load_model, read_image

def stir(net, scale=1):
    "Give a network random norms, and statistics as training gives: those of what really comes in."
    def measure(norm, args):
        x, dims = args[0], [0, 2, 3][:args[0].ndim - 1]
        norm.running_mean.copy_(x.mean(dims)), norm.running_var.copy_(x.var(dims) + .1)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase) and m.affine]
    for m in norms: torch.nn.init.normal_(m.weight, 1, .1), torch.nn.init.normal_(m.bias, 0, .1)
    hooks = [m.register_forward_pre_hook(measure) for m in norms if m.track_running_stats]
    with torch.no_grad(): net.eval()(torch.rand(4, 3, 384, 128)*scale)
    for h in hooks: h.remove()
    return net

def unit(x): return np.asarray(x)/np.linalg.norm(x, axis=1, keepdims=True)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Pictures of many sizes."
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i, (h, w) in enumerate([(256, 128), (128, 64), (300, 90), (501, 203), (64, 60), (97, 41)]):
        small = rng.integers(0, 256, (h//8, w//8, 3), np.uint8)
        cv2.imwrite(str(folder/f'{i}.png'), cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC))
    return sorted(folder.iterdir())

# ---- torchreid

@pytest.mark.parametrize('arch', ['osnet_x0_25', 'osnet_ain_x1_0', 'resnet50', 'resnet50_fc512', 'mlfn', 'pcb_p6'])
def test_torchreid_embeds_the_same(arch, pictures, tmp_path):
    from torchreid.reid.utils import FeatureExtractor, save_checkpoint
    torch.manual_seed(0)
    net = stir(torchreid_model(arch))
    save_checkpoint(dict(state_dict=net.state_dict(), epoch=3, rank1=np.float64(.5), optimizer={'lr': .1}), tmp_path)
    saved, = tmp_path.glob('*.pth*')
    out, found = import_weights(saved.rename(tmp_path/'model.pth.tar-3'), out=tmp_path/'ours')
    assert found.meta['arch'] == arch and all(k.startswith('classifier') for k in found.left)
    model, meta = load_model(out)
    torch.save(dict(state_dict=net.state_dict()), tmp_path/'plain.pth')
    plain, size = str(tmp_path/'plain.pth'), tuple(meta['size'])
    theirs = FeatureExtractor(arch, plain, image_size=size, device='cpu', verbose=False)
    if arch.startswith('osnet'):
        assert np.abs(embed(model, meta, pictures) - unit(theirs([*map(str, pictures)]))).max() < 1e-5
    with torch.no_grad():    # random weights blow up the rounding of float32
        x = torch.stack([theirs.preprocess(Image.open(p).convert('RGB')) for p in pictures]).double()
        mine = np.stack([read_image(p, size, meta['resize']) for p in pictures])
        mine = to_input(mine, meta['mean'], meta['std'])
        got, want = model.double().embed(mine.double()), theirs.model.double()(x)
    assert np.abs(unit(got) - unit(want)).max() < 1e-5

@pytest.mark.long
def test_every_network_of_torchreid_has_tensors_of_its_own():
    def names(arch):
        with torch.device('meta'): net = torchreid_model(arch)
        return tuple((k, '' if k.startswith('classifier') else v.shape) for k, v in sorted(net.state_dict().items()))
    seen = {arch: names(arch) for arch in TORCHREID}
    assert len({*seen.values()}) == len(TORCHREID)

# ---- fast-reid

def fastreid_net(peers, kind, depth, ibn, monkeypatch):
    monkeypatch.syspath_prepend(peers)
    from fastreid.config import get_cfg
    from fastreid.modeling import build_model
    c = get_cfg()
    m, b, h = c.MODEL, c.MODEL.BACKBONE, c.MODEL.HEADS
    m.DEVICE, m.META_ARCHITECTURE = 'cpu', 'MGN' if kind == 'mgn' else 'Baseline'
    b.NAME, b.PRETRAIN, b.DEPTH, b.WITH_IBN, b.WITH_NL = 'build_resnet_backbone', False, depth, ibn, kind == 'sbs'
    b.FEAT_DIM = 2048 if depth in ('50x', '101x') else 512
    h.NAME, h.NUM_CLASSES, h.WITH_BNNECK = 'EmbeddingHead', 7, True
    if kind != 'bot': h.POOL_LAYER, h.CLS_LAYER = 'GeneralizedMeanPoolingP', 'CircleSoftmax'
    if kind == 'mgn': h.EMBEDDING_DIM = 256
    torch.manual_seed(0)
    return stir(build_model(c), 255)

@pytest.mark.parametrize('kind, depth, ibn', [
    ('bot', '18x', False), ('bot', '50x', False), ('sbs', '50x', True), ('sbs', '101x', False), ('mgn', '50x', True)])
def test_fastreid_both_ways(kind, depth, ibn, peers, monkeypatch, tmp_path):
    net = fastreid_net(peers, kind, depth, ibn, monkeypatch)
    torch.save(dict(model=net.state_dict(), iteration=9), tmp_path/'model_final.pth')
    out, found = import_weights(tmp_path/'model_final.pth', out=tmp_path/'ours')
    assert {re.sub('.*head|s', '', k) for k in found.left} == {'.weight'}   # the classifiers alone
    model, meta = load_model(out)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *meta['size'], 3), np.uint8)
    with torch.no_grad():
        want = net.double()(torch.from_numpy(pixels).permute(0, 3, 1, 2).double())
        got = model.double().embed(to_input(pixels, meta['mean'], meta['std']).double())
    if kind == 'mgn': got = torch.cat([got.split(256, 1)[i] for i in (0, 1, 4, 2, 3, 5, 6, 7)], 1)
    assert np.abs(unit(got) - unit(want)).max() < 1e-5
    back, notes = export_weights(out, 'fastreid')
    state = torch.load(back, weights_only=True)['model']
    lost = net.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys and {*lost.missing_keys} == {*found.left} and not notes
    assert all(torch.equal(state[k].double(), v.double()) for k, v in net.state_dict().items() if k in state)

def test_fastreid_sees_the_same_pictures(peers, pictures, monkeypatch, tmp_path):
    "How they are made smaller, their colours and their statistics."
    net = fastreid_net(peers, 'bot', '18x', False, monkeypatch)
    from fastreid.config import get_cfg
    data = ModuleType('fastreid.data')    # its own __init__ wants torch._six, which PyTorch has no more
    data.__path__ = [str(peers/'fastreid'/'data')]
    monkeypatch.setitem(sys.modules, 'fastreid.data', data)
    from fastreid.data.transforms import build_transforms
    look = build_transforms(get_cfg(), is_train=False)
    with torch.no_grad(): want = unit(net(torch.stack([look(Image.open(p).convert('RGB')) for p in pictures])))
    torch.save(dict(model=net.state_dict()), tmp_path/'bot.pth')
    out, _ = import_weights(tmp_path/'bot.pth', out=tmp_path/'ours')
    assert np.abs(embed(*load_model(out), pictures) - want).max() < 1e-5

def test_another_first_pooling_is_another_network(peers, monkeypatch, tmp_path):
    "What a check of tensors cannot see."
    net = fastreid_net(peers, 'bot', '18x', False, monkeypatch)
    torch.save(dict(model=net.state_dict()), tmp_path/'bot.pth')
    out, _ = import_weights(tmp_path/'bot.pth', out=tmp_path/'ours')
    model, meta = load_model(out)
    x = torch.rand(2, 3, *meta['size'])
    with torch.no_grad():
        right = model.embed(x)
        model.backbone.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        assert np.abs(unit(model.embed(x)) - unit(right)).max() > .01

def test_fine_tuning_keeps_the_pooling_of_fastreid(peers, monkeypatch, market, tmp_path, run):
    net = fastreid_net(peers, 'bot', '18x', False, monkeypatch)
    torch.save(dict(model=net.state_dict()), tmp_path/'bot.pth')
    out, _ = import_weights(tmp_path/'bot.pth', out=tmp_path/'ours', size='64x32')
    done = run('reid_finetune', market, '--init', out, '--epochs', 1, '--batch', 16, '--out', tmp_path/'ft')
    assert not done.returncode, done.stderr
    tuned, = [p for p in (tmp_path/'ft').glob('*.safetensors') if 'session' not in p.name]
    assert load_checkpoint(tuned)[1]['backbone'] == dict(stem='ceil', last_stride=1)
    assert 'pools' not in run('reid_export', tuned, '--form', 'fastreid').stdout

def test_a_squeezed_resnet_is_refused(peers, monkeypatch, tmp_path):
    "Blocks that a network of ours has not."
    net = fastreid_net(peers, 'bot', '18x', False, monkeypatch)
    state = net.state_dict() | {'backbone.layer1.0.se.fc.0.weight': torch.zeros(4, 64)}
    torch.save(dict(model=state), tmp_path/'se.pth')
    with pytest.raises(BadInput, match='its backbone is none of'): import_weights(tmp_path/'se.pth', out=tmp_path/'x')
    assert not (tmp_path/'x.safetensors').exists()

# ---- Roboflow's reid

def test_roboflow_embeds_the_same(peers, pictures, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(peers)
    from reid import ReIDModel
    net = stir(torchreid_model('osnet_x1_0'))
    torch.save(net.state_dict(), tmp_path/'osnet_x1_0.pth')
    theirs = ReIDModel.from_pretrained(str(tmp_path/'osnet_x1_0.pth'), architecture='osnet_x1_0', device='cpu')
    want = unit(theirs.extract_embeddings_from_paths([str(p) for p in pictures]))
    theirs.save_pretrained(str(tmp_path/'folder'))
    for source in 'osnet_x1_0.pth', 'folder':
        out, _ = import_weights(tmp_path/source, out=tmp_path/f'{source}_ours')
        assert np.abs(embed(*load_model(out), pictures) - want).max() < 1e-5, source
    config = json.loads((tmp_path/'folder'/'reid_config.json').read_text())
    for change in dict(architecture='timm:resnet50'), dict(preprocessing=dict(resize_mode='letterbox')):
        (tmp_path/'folder'/'reid_config.json').write_text(json.dumps(config | change))
        with pytest.raises(BadInput): import_weights(tmp_path/'folder', out=tmp_path/'x')

# ---- ONNX

def test_onnx_of_our_own(pictures, tmp_path):
    "Our small model as ONNX, and back: it takes bytes, and has its statistics inside."
    from reid_nb.parts.weights import export_onnx, SMALL
    out, _ = import_weights(export_onnx(SMALL, tmp_path/'small.onnx'), out=tmp_path/'back')
    assert np.abs(embed(*load_model(out), pictures) - embed(*load_model(SMALL), pictures)).max() < 1e-4

@pytest.mark.long
@pytest.mark.parametrize('place, rank1, ap', [('data/cuhk03_p1', 33.0, 32.2), ('measure/cuhk01_dev', 49.2, 52.7)])
def test_the_peers_figures(place, rank1, ap, data, run, tmp_path):
    "OSNet x0.25 of torchreid as ONNX, by the commands, has the figures that its card tells."
    root = data.parent/place
    if not root.is_dir(): pytest.skip(f'no {root} here')
    done = run('reid_import', data/'peers'/'osnet_x0_25_msmt17.onnx', '--out', tmp_path/'peer.safetensors')
    assert not done.returncode, done.stderr
    done = run('reid_evaluate', tmp_path/'peer.safetensors', '--data', root, '--out', tmp_path/'r.json')
    assert not done.returncode, done.stderr
    figures = json.loads((tmp_path/'r.json').read_text())['figures']
    assert [round(100*figures[k]['value'], 1) for k in ('rank1', 'mAP')] == pytest.approx([rank1, ap], abs=.15)

# ---- what must not come in

class Bomb:
    def __reduce__(self): return print, ('boom',)

def test_refused_in_one_line(tmp_path, run, capsys):
    net = torchreid_model('osnet_x0_25')
    torch.save(net.state_dict(), tmp_path/'osnet.pth')
    (tmp_path/'cut.pth').write_bytes((tmp_path/'osnet.pth').read_bytes()[:-1000])
    (tmp_path/'bomb.pth').write_bytes(pickle.dumps({'state_dict': Bomb()}))
    (tmp_path/'bomb.onnx').write_bytes(b'not a network')
    torch.save({'a.weight': torch.zeros(3, 3)}, tmp_path/'other.pth')
    torch.save({k: v.new_full(v.shape, np.nan) if v.is_floating_point() else v for k, v in net.state_dict().items()},
               tmp_path/'nan.pth')
    pcb = torchreid_model('pcb_p6').state_dict()
    torch.save({k: v for k, v in pcb.items() if not k.startswith('classifier')}, tmp_path/'pcb.pth')
    (tmp_path/'empty').mkdir()
    cases = [('cut.pth', {}, 'cut short'), ('bomb.pth', {}, 'not opened'), ('bomb.onnx', {}, 'not an ONNX file'),
             ('other.pth', {}, 'neither of torchreid nor of fast-reid'), ('empty', {}, 'no folder of save_pretrained'),
             ('osnet.pth', dict(arch='osnet_x1_0'), 'is not a osnet_x1_0'), ('nan.pth', {}, 'not finite'),
             ('osnet.pth', dict(arch='osnet_x9'), 'osnet_x9'), ('nowhere.pth', {}, 'no such file'),
             ('osnet.pth', dict(size='0x0'), 'size'), ('osnet.pth', dict(stats='x'), 'stats'),
             ('pcb.pth', {}, '--arch')]
    for name, how, why in cases:
        with pytest.raises(BadInput, match=why) as e: import_weights(tmp_path/name, out=tmp_path/'out', **how)
        assert '\n' not in str(e.value), name
    assert 'boom' not in capsys.readouterr().out and not (tmp_path/'out.safetensors').exists()
    for name, why in ('bomb.pth', 'not opened'), ('hf://nobody', 'write hf://owner'):
        done = run('reid_import', name, cwd=tmp_path)
        assert (done.returncode, done.stderr.count('\n'), done.stdout) == (2, 1, '') and why in done.stderr, done

def test_a_checkpoint_of_another_file_stays(tmp_path):
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        torch.save(torchreid_model('osnet_x0_25').state_dict(), tmp_path/f'{name}.pth')
    out, _ = import_weights(tmp_path/'a.pth', out=tmp_path/'ours')
    before = out.read_bytes()
    with pytest.raises(BadInput, match='of another file'): import_weights(tmp_path/'b.pth', out=tmp_path/'ours')
    import_weights(tmp_path/'a.pth', out=tmp_path/'ours')    # the same again is no harm
    assert out.read_bytes() == before

def test_an_import_is_taken_everywhere(market, tmp_path, run):
    torch.save(stir(torchreid_model('osnet_x0_25')).state_dict(), tmp_path/'osnet.pth')
    ckpt = tmp_path/'ours.safetensors'
    tune = '--init', ckpt, '--epochs', 1, '--batch', 16, '--size', '64x32', '--out', tmp_path/'tuned'
    for command, *args in [
            ('reid_import', tmp_path/'osnet.pth', '--out', ckpt), ('reid_evaluate', ckpt, '--data', market),
            ('reid_calibrate', ckpt, '--data', market), ('reid_finetune', market, *tune),
            ('reid_export', ckpt), ('reid_export', ckpt, '--form', 'torchreid')]:
        done = run(command, *args)
        assert not done.returncode or 'too few' in done.stderr, (command, done.stderr)
    state = torch.load(tmp_path/'ours.torchreid.pth', weights_only=True)['state_dict']
    assert all(torch.equal(state[k], v) for k, v in torch.load(tmp_path/'osnet.pth').items() if 'classifier' not in k)

# ---- downloads, from a hub on this machine

class Hub(BaseHTTPRequestHandler):
    "As much of the Hugging Face Hub as its client asks for; the first answer breaks off in the middle."
    def __init__(self, file, asked, *args): self.file, self.asked = file, asked; super().__init__(*args)

    def log_message(self, *_): pass

    def head(self, code, n):
        self.send_response(code)
        sha = hashlib.sha256(self.file).hexdigest()
        tells = {'Content-Length': n, 'ETag': f'"{sha}"', 'X-Repo-Commit': 'a'*40, 'Accept-Ranges': 'bytes'}
        for k, v in tells.items(): self.send_header(k, str(v))
        self.end_headers()

    def do_HEAD(self): self.head(200, len(self.file))

    def do_GET(self):
        begin = int((re.findall(r'\d+', self.headers.get('Range') or '') or [0])[0])
        self.asked.append(begin)
        rest = self.file[begin:]
        self.head(206 if begin else 200, len(rest))
        self.wfile.write(rest[:len(rest)//2] if len(self.asked) == 1 else rest)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "(the file on it, where each request began)"
    import huggingface_hub.constants as constants
    more = dict(optimizer=dict(x=torch.zeros(8_000_000)))    # the client keeps pieces of 10 MB
    torch.save(dict(state_dict=torchreid_model('osnet_x0_25').state_dict(), **more), tmp_path/'osnet.pth')
    file, asked = (tmp_path/'osnet.pth').read_bytes(), []
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Hub, file, asked))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('REID_HOME', str(tmp_path/'home'))
    yield file, asked
    server.shutdown()
    server.server_close()

def entry(monkeypatch, sha256):
    known = REGISTRY['osnet_x0_25_msmt17']._replace(sha256=sha256, revision='a'*40)
    monkeypatch.setitem(published.REGISTRY, 'osnet_x0_25_msmt17', known)

def test_a_download_goes_on_and_is_checked(hub, monkeypatch, capsys, tmp_path):
    file, asked = hub
    entry(monkeypatch, hashlib.sha256(file).hexdigest())
    out, found = import_weights('osnet_x0_25_msmt17')
    assert out == tmp_path/'home'/'osnet_x0_25_msmt17.safetensors' and 'osnet_x0_25' in found.origin
    assert asked[0] == 0 and asked[1] > 0    # the second request begins where the first broke off
    assert 'academic research only' in capsys.readouterr().out
    n = len(asked)
    import_weights('osnet_x0_25_msmt17')
    assert len(asked) == n    # it is in the cache

def test_a_file_brought_by_hand_is_known(monkeypatch, tmp_path):
    "Where there is no network: it goes where the download would have gone, and `load` finds it."
    from reid_nb import load
    torch.save(torchreid_model('osnet_x0_25').state_dict(), tmp_path/'anything.pth')
    entry(monkeypatch, hashlib.sha256((tmp_path/'anything.pth').read_bytes()).hexdigest())
    monkeypatch.setenv('REID_HOME', str(tmp_path/'home'))
    out, _ = import_weights(tmp_path/'anything.pth')
    assert out == tmp_path/'home'/'osnet_x0_25_msmt17.safetensors'
    assert load('osnet_x0_25_msmt17').path == out

def test_a_wrong_digest_is_not_opened(hub, monkeypatch, tmp_path):
    entry(monkeypatch, '0'*64)
    monkeypatch.setattr(published, 'read_weights', lambda path: pytest.fail('it was opened'))
    with pytest.raises(BadInput, match='not the file that was published'): import_weights('osnet_x0_25_msmt17')
    assert not (tmp_path/'home').exists()

def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    with pytest.raises(BadInput, match='where there is a network, get osnet_x0_25.*then reid_import FILE'):
        import_weights('osnet_x0_25_msmt17')

# ---- one object for programs

def test_boxes_of_other_packages(peers, monkeypatch):
    "A frame with the detections of supervision, or with the boxes of Ultralytics, is a list of crops."
    monkeypatch.syspath_prepend(peers)
    import supervision as sv
    from reid_nb import load
    from ultralytics.engine.results import Boxes
    frame = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    corners = [[10, 20, 60, 150], [-9, 0, 40, 99]]
    model, crops = load(), [frame[20:150, 10:60], frame[0:99, 0:40]]
    want = model.embed(crops)
    boxes = torch.tensor([[*c, .9, 0] for c in corners], dtype=torch.float32)
    for found in sv.Detections(xyxy=np.float32(corners)), Boxes(boxes, frame.shape[:2]), corners:
        assert np.abs(model.embed(frame, found) - want).max() < 1e-6
    assert np.abs(model.embed(frame[..., ::-1], corners, bgr=True) - want).max() < 1e-6
    assert model.embed(frame, sv.Detections.empty()).shape == (0, model.model.dim)
