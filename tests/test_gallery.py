"The gallery and its search: rename, merge and take back, another network, caches, two processes, kills."
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_biometrics import BLUE, GREEN, MATCHER, POINTS, RED, colours, consistent, crops, template

from reid_nb.parts import gallery as gal
from reid_nb.parts.core import BadInput, sha256
from reid_nb.parts.tracks import Matcher
from reid_nb.parts.gallery import best_people, ExactIndex, FaissIndex, QdrantIndex
from reid_nb.parts.weights import SMALL

@pytest.fixture
def here(tmp_path):
    "Ada (red, twice) and Bob (blue)."
    here = gal.Gallery(tmp_path/'g', MATCHER, create=True)
    for name, colour in ('Ada', RED), ('Ada', RED), ('Bob', BLUE): here.add(name, template(colour))
    return here

def closest(here, colour=RED): return here.nearest(template(colour).feature)[0][0]

# --- names

def test_rename_moves_the_folder_and_nothing_else(here):
    before = {f.split('/')[1]: (here.root/f).read_bytes() for f in here.samples('Ada')[0]}
    assert here.rename('ada', ' Ada  Lovelace') == 'Ada Lovelace'
    after = {f.split('/')[1]: (here.root/f).read_bytes() for f in here.samples('Ada Lovelace')[0]}
    assert after == before and consistent(here.root) == ['Ada Lovelace', 'Bob'] and closest(here) == 'Ada Lovelace'
    with pytest.raises(BadInput, match='not enrolled'): here.find('Ada')
    here.rename('Ada Lovelace', 'ADA LOVELACE')      # only capitals
    assert consistent(here.root) == ['ADA LOVELACE', 'Bob']
    assert all('Ada' not in str(row) for row in here.store.history())

@pytest.mark.parametrize('to, why', [('Bob', 'merge the two'), ('bob', 'merge the two'), ('a/b', 'cannot be a name'),
                                     ('x'*10_000, 'cannot be a name'), ('Eve', 'in the way'), ('Mal', 'in the way')])
def test_rename_refused_changes_nothing(here, tmp_path, to, why):
    (here.root/'Eve').symlink_to(tmp_path)
    (here.root/'Mal').write_text('mine')
    before = crops(here.root), here.people()
    with pytest.raises(BadInput, match=why): here.rename('Ada', to)
    assert (crops(here.root), here.people()) == before and not (here.root/'pending.json').exists()

def test_a_merge_can_be_taken_back(here):
    before = here.people()
    here.merge('Bob', 'Ada')
    assert here.names() == ['Ada'] and closest(here, BLUE) == 'Ada' and here.find('BOB') == here.find('Ada')
    here.add('Bob', template(GREEN))       # goes with Bob, when he goes
    assert len(here.templates('Ada')[0]) == 4 and here.people()[0]['merged'] == ['Bob']
    here.unmerge('Bob')
    assert len(here.templates('Bob')[0]) == 2 and here.people()[0] == before[0] and closest(here, BLUE) == 'Bob'
    assert consistent(here.root) == ['Ada', 'Bob']

def test_merges_of_merges(here):
    here.add('Cy', template(GREEN))
    here.merge('Cy', 'Bob')
    here.merge('Bob', 'Ada')
    assert here.names() == ['Ada'] and here.people()[0]['merged'] == ['Bob', 'Cy']
    for name, into in ('Cy', 'Bob'), ('Ada', 'Cy'):
        with pytest.raises(BadInput, match='one person already'): here.merge(name, into)
    here.unmerge('Cy')
    assert here.names() == ['Ada', 'Cy']
    with pytest.raises(BadInput, match='into nobody'): here.unmerge('Ada')
    receipt = here.erase('Bob')       # Bob is Ada
    assert (receipt['name'], receipt['merged'], consistent(here.root)) == ('Ada', ['Bob'], ['Cy'])

class Model(dict):
    "What a gallery should hold: name -> (head, templates)"
    def names(self): return sorted(n for n, (head, _) in self.items() if head == n)

@given(st.lists(st.tuples(st.sampled_from('add rename merge unmerge erase'.split()), st.sampled_from('ABC'),
                          st.sampled_from('ABC')), max_size=12))
@settings(max_examples=25, deadline=None)
def test_any_order_of_changes(tmp_path_factory, changes):
    here, model = gal.Gallery(tmp_path_factory.mktemp('g')/'g', MATCHER, create=True), Model()
    for what, a, b in changes:
        try:
            if what == 'add': here.add(a, template(n=1))
            elif what in ('rename', 'merge'): getattr(here, what)(a, b)
            else: getattr(here, what)(a)
        except BadInput: continue
        head = model.get(a, (a, 0))[0]
        if what == 'add': model[a] = head, model.get(a, (a, 0))[1] + 1
        elif what == 'rename':
            model[b] = model.pop(a)
            for n, (h, k) in model.items(): model[n] = b if h == a else h, k
        elif what == 'merge':
            for n, (h, k) in model.items(): model[n] = model[b][0] if h == head else h, k
        elif what == 'unmerge': model[a] = a, model[a][1]
        else:
            for n in [n for n, (h, _) in model.items() if h == head]: del model[n]
    assert consistent(here.root) == model.names()
    assert {p['name']: p['templates'] for p in here.people()} == {
        n: sum(k for h, k in model.values() if h == n) for n in model.names()}

KILL = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from reid_nb.parts import gallery as gal
def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
copy, n = gal.shutil.copyfile, 0
def third(*args):
    global n
    n += 1
    return die() if n == 3 else copy(*args)
if sys.argv[3] == 'copy': gal.shutil.copyfile = third
if sys.argv[3] == 'log': gal.log_event = die
here = gal.Gallery(sys.argv[2])
if sys.argv[3] == 'commit': gal.GalleryStore.settle = die
here.rename('Ada', 'Eva')
"""

@pytest.mark.parametrize('where, name', [('copy', 'Ada'), ('log', 'Ada'), ('commit', 'Eva')])
def test_kill_in_a_rename_leaves_the_old_name_or_the_new(here, where, name):
    args = [sys.executable, '-c', KILL, Path(__file__).parent, here.root, where]
    assert subprocess.run(list(map(str, args))).returncode == -signal.SIGKILL
    assert consistent(here.root) == sorted([name, 'Bob']) and len(here.samples(name)[0]) == 12

# --- another network

def test_embedded_again_on_request(here):
    other = Matcher(lambda x: colours(x)[:, ::-1].copy(), 'b'*64, {'0.01': dict(threshold=.5, low=.4, high=.6)})
    with pytest.raises(BadInput, match='--reembed'): gal.Gallery(here.root, other)
    old = here.templates()[1]
    told = []
    assert gal.reembed_gallery(here, other, lambda share, what: told.append(share)) == 3 and told[-1] == 1
    again = gal.Gallery(here.root, other)
    assert np.allclose(again.templates()[1], old[:, ::-1], atol=.03) and again.thresholds == other.thresholds
    assert again.nearest(other.embed([np.full((80, 30, 3), BLUE, np.uint8)])[0])[0][0] == 'Bob'
    assert consistent(here.root) == ['Ada', 'Bob']
    with pytest.raises(BadInput, match='another model'): gal.Gallery(here.root, MATCHER)

def test_embedding_again_is_all_or_nothing(here):
    other = Matcher(colours, 'b'*64, POINTS)
    def stop(share, what):
        if share > .5: raise BadInput('enough')
    with pytest.raises(BadInput, match='enough'): gal.reembed_gallery(here, other, stop)
    def meddle(share, what): gal.Gallery(here.root).add('Eve', template(GREEN)) if share == 1 else None
    with pytest.raises(BadInput, match='changed meanwhile'): gal.reembed_gallery(here, other, meddle)
    assert gal.Gallery(here.root, MATCHER).names() == ['Ada', 'Bob', 'Eve']

def test_the_word_of_older_galleries_is_read_as_inconclusive(here):
    with here.store.writing() as db: gal.log_event(db, 'verified', 1, answer='look yourself', people=1)
    assert here.store.history()[-1][1:] == ('verified', 1, '{"answer": "inconclusive", "people": 1}')

# --- search

@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 15), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_search_ranks_people_as_a_loop_would(n, templates, k, seed):
    rng = np.random.default_rng(seed)
    people, f = rng.integers(0, n, templates), np.float32(rng.normal(size=(templates, 8)))
    probe, ids = np.float32(rng.normal(size=8)), rng.permutation(1000)[:templates]
    row = {i: r for r, i in enumerate(ids.tolist())}
    read = lambda wanted: f[[row[i] for i in wanted.tolist()]]
    best = sorted(((float((f[people == p] @ probe).max()), p) for p in set(people.tolist())), reverse=True)[:k]
    for index, error in (ExactIndex(ids, people, read), 1e-5), (FaissIndex(ids, people, read), .05):
        got = index.nearest(probe, k)
        assert len(got) == len(best) == len({p for p, _ in got})
        assert np.allclose([s for _, s in got], [s for s, _ in best], atol=error)

def test_asking_for_more_ends():
    asked = []
    def search(n): return asked.append(n) or [(0, .9)]*n
    assert best_people(search, 5, 300) == [(0, .9)] and asked == [20, 80, 300]

def test_the_index_is_kept_until_anybody_changes_the_gallery(here):
    assert closest(here) == 'Ada'
    made = here.index.load()
    with here.store.writing() as db: gal.log_event(db, 'identified')      # is no change
    assert gal.Gallery(here.root).index.load() is made
    code = f'from reid_nb.parts.gallery import *; Gallery({str(here.root)!r}).erase("Ada")'
    subprocess.run([sys.executable, '-c', code], check=True)
    assert closest(here) == 'Bob' and here.index.load() is not made
    here.erase('Bob')
    with pytest.raises(BadInput, match='nobody is enrolled'): here.nearest(template().feature)
    assert here.index.key not in gal.INDEXES

def test_faiss_gives_the_exact_scores(here):
    exact = here.nearest(template(RED).feature)
    here.index.use('faiss')
    assert gal.Gallery(here.root).store.about()['search'] == 'faiss' and here.nearest(template(RED).feature) == exact
    with pytest.raises(BadInput, match='no such search'): here.index.use('magic')
    assert here.store.about()['search'] == 'faiss'

@pytest.fixture
def server(monkeypatch):
    "A Qdrant server in this process, at any URL but those with `silent` in it."
    import qdrant_client
    local = qdrant_client.QdrantClient(':memory:')
    class Fake:
        def __new__(cls, url, **kw): return real(url, **kw) if 'silent' in url or '127.0.0.1' in url else local
    real = qdrant_client.QdrantClient
    monkeypatch.setattr(qdrant_client, 'QdrantClient', Fake)
    return local

def test_a_server_is_kept_up_to_date(here, server):
    exact = here.nearest(template(RED).feature)
    here.index.use('http://vectors:6333')
    name, = [c.name for c in server.get_collections().collections]
    assert here.nearest(template(RED).feature) == exact and server.count(name).count == 3
    here.add('Cy', template(GREEN))
    assert closest(here, GREEN) == 'Cy' and server.count(name).count == 4
    here.merge('Cy', 'Bob')
    assert closest(here, GREEN) == 'Bob'
    here.erase('Ada')      # gone from the server at once
    assert server.count(name).count == 2 and closest(here, RED) == 'Bob'
    here.index.use('exact')
    assert server.get_collections().collections == [] and closest(here, GREEN) == 'Bob'

def test_a_stale_server_brings_nobody_back(here, server):
    here.index.use('http://vectors:6333')
    closest(here)
    version, made = gal.INDEXES[here.index.key]
    with here.store.change() as db: db.execute("DELETE FROM identities WHERE name = 'Ada'")
    gal.INDEXES[here.index.key] = here.store.about()['version'], made      # a server that has not heard of it
    assert [n for n, _ in here.nearest(template(RED).feature)] == ['Bob']

def test_a_silent_server_is_named_and_erasing_goes_on(here, server):
    with pytest.raises(BadInput, match='no answer'): here.index.use('http://127.0.0.1:9')
    assert here.store.about()['search'] == 'exact' and closest(here) == 'Ada'
    with here.store.change() as db: db.execute("UPDATE about SET value = 'http://127.0.0.1:9' WHERE key = 'search'")
    receipt = here.erase('Ada')
    assert 'on the server' in receipt['left'][0] and here.names() == ['Bob']

def test_a_server_sends_pages(server):
    n = 2500
    f = np.float32(np.random.default_rng(0).normal(size=(n, 4)))
    index = QdrantIndex(np.arange(1, n + 1), np.arange(n), lambda ids: f[ids - 1], server)
    assert sorted(index.stored_ids()) == list(range(1, n + 1))
    assert index.nearest(f[7], 3)[0][0] == (f @ f[7]).argmax()

# --- the commands

@pytest.mark.long
def test_gallery_command(run, here):
    there = '--gallery', here.root
    def said(*args):
        done = run('reid_gallery', *there, *args)
        assert done.returncode == 0, done
        return done.stdout
    assert said().splitlines()[0].startswith('Ada: number 1, 2 templates, 12 crops')
    assert 'Ada, also Bob' in said('--merge', 'Bob', '--to', 'Ada')
    said('--unmerge', 'Bob')
    assert 'Rob' in said('--rename', 'Bob', '--to', 'Rob') and consistent(here.root) == ['Ada', 'Rob']
    assert 'merged 2' in said('--log') and 'Bob' not in said('--log')
    for args in (('--rename', 'Ada'), ('--rename', 'Eve', '--to', 'Ada'), ('--search', 'magic'),
                 ('--reembed', '--checkpoint', 'none')):
        done = run('reid_gallery', *there, *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    said('--reembed')       # with the model of this package
    assert here.store.about()['model'] == sha256(SMALL)
