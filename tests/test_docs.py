"The site without Quarto: pages as nbdev hands them over, their names, and every link between them."
import json
import os
import re
from pathlib import PurePosixPath

import pytest
import yaml
from build_site import LINK, plain_address, plain_code, process
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config()
SITE = f'{cfg.doc_host}{cfg.doc_baseurl}/'
GITHUB = f'{cfg.git_url}/blob/{cfg.branch}/'
names = sorted(p.relative_to(cfg.nbs_path).as_posix() for p in nbglob(cfg.nbs_path, as_path=True))
quarto = yaml.safe_load((cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'))

def slug(heading):
    "The identifier that Pandoc gives a heading"
    text = re.sub(r'\{[^}]*\}\s*$|[*`]|\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    text = re.sub(r'[^\w\s.-]', '', text.lower())
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', text.strip())) or 'section'

class Page:
    "A page as Quarto gets it: its address on the site, its text, its anchors"
    def __init__(self, folder, name):
        cells = json.loads((folder/name).read_text(encoding='utf-8'))['cells']
        front = yaml.safe_load(''.join(cells[0]['source']).strip().strip('-'))
        self.address = (PurePosixPath(name).parent/front['output-file']).as_posix()
        made = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', [])
                if 'text/markdown' in o.get('data', {})]
        self.text = '\n\n'.join(''.join(c['source']) for c in cells[1:] if c['cell_type'] == 'markdown')
        whole = '\n\n'.join([self.text, *made])
        plain = re.sub(r'```.*?```', '', whole, flags=re.S)
        self.links = links(whole)
        self.code = re.findall(r'```.*?```', whole, flags=re.S)
        self.anchors = {slug(h) for h in re.findall(r'^#+\s+(.+)$', plain, re.M)}
        self.anchors |= {a or b for a, b in re.findall(r'\bid="([^"]+)"|\{#([\w-]+)', plain)}

def links(text):
    "All targets of links and pictures in a markdown text, code left out"
    plain = re.sub(r'```.*?```|`[^`\n]*`(?!\])', '', text, flags=re.S)
    return re.findall(r'\]\(<?([^)\s>]+)', plain) + re.findall(r'(?:href|src)="([^"]+)"', plain)

@pytest.fixture(scope='module')
def pages():
    "All pages, as Quarto gets them"
    made = process()
    return {name: Page(made, p.relative_to(made).as_posix()) for name in names for p in [made/name]}

def fault_of(target, page, pages):
    "What is wrong with a link on a page, or None"
    where, _, anchor = target.partition('#')
    at = {p.address: p for p in pages.values()}
    if where.startswith(SITE):
        found = at.get(where[len(SITE):] or 'index.html')
        if not found: return 'no page of the site has this address'
    elif where.startswith(GITHUB):
        return None if (cfg.config_path/where[len(GITHUB):]).exists() else 'no such file'
    elif '://' in where or where.startswith('mailto:'): return None
    elif where.endswith('.html'): return 'a page is linked by its notebook'
    else:
        name = os.path.normpath(PurePosixPath(page).parent/where) if where else page
        if where and not (cfg.nbs_path/name).is_file(): return 'no such file'
        found = pages.get(name)
        if name.endswith('.ipynb') and not found: return 'not a page'
    if anchor and found and anchor not in found.anchors: return 'no such heading'

def test_every_notebook_passes_the_processors(pages):
    made = cfg.config_path/'_proc'
    assert names == sorted(p.relative_to(made).as_posix() for p in made.rglob('*.ipynb'))

def test_every_page_has_an_address_of_its_own(pages):
    "A page's name is the notebook's, without its number."
    assert len({p.address for p in pages.values()}) == len(pages)
    plain = re.compile(r'(^|/)\d+_')
    assert {n: p.address for n, p in pages.items()} == {n: plain.sub(r'\1', n)[:-6] + '.html' for n in names}

def test_no_address_stands_in_code(pages):
    assert [c for p in pages.values() for c in p.code if LINK.search(c)] == []
    assert plain_code(['[`f`](x)\n', '```python\n', 'a, # [`f`](x)\n', '```\n', '[`f`](x)']) == [
        '[`f`](x)\n', '```python\n', 'a, # `f`\n', '```\n', '[`f`](x)']
    assert plain_address(f'[`A.b`]({SITE}a.html#a.b) [`A`](a.html#a)') == f'[`A.b`]({SITE}a.html#a) [`A`](a.html#a)'

def test_links_between_pages_lead_somewhere(pages):
    faults = {(n, t): fault_of(t, n, pages) for n, p in pages.items() for t in p.links}
    assert len(faults) > 100 and {k: v for k, v in faults.items() if v} == {}

@pytest.mark.parametrize('planted, fault', [
    ('01_dataset.html', 'by its notebook'), ('dataset.html', 'by its notebook'),
    ('parts/99_none.ipynb', 'no such file'), ('../parts/00_core.ipynb', 'no such file'),
    ('images/none.png', 'no such file'),
    ('00_start.ipynb#no-such-heading', 'heading'), (f'{SITE}01_dataset.html', 'address'),
    (f'{SITE}parts/core.html#nothing', 'heading'), (f'{GITHUB}NONE.md', 'no such file')])
def test_a_planted_link_is_found(pages, planted, fault):
    assert links(f'see [it]({planted}), <a href="{planted}">it</a> and `[x](y)`') == [planted, planted]
    assert fault in fault_of(planted, 'index.ipynb', pages)

@pytest.mark.parametrize('good', ['00_start.ipynb', '02_lmdb.ipynb#summary', '#nine-lessons', SITE,
                                  f'{SITE}parts/core.html#badinput', f'{GITHUB}CONTRIBUTING.md'])
def test_a_good_link_is_none(pages, good): assert fault_of(good, 'index.ipynb', pages) is None

def test_the_package_index_names_addresses_of_the_site(pages):
    "What nbdev links a word in backticks to."
    from reid_nb._modidx import d
    at = {p.address for p in pages.values()}
    linked = {address.partition('#')[0] for syms in d['syms'].values() for address, _ in syms.values()}
    assert len(linked) > 20 and linked - at == set()

def test_citations_have_their_entries(pages):
    text = '\n'.join(p.text for p in pages.values())
    plain = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    cited = {k for group in re.findall(r'\[([^\]\n]*@[^\]]+)\]', plain) for k in re.findall(r'@(\w+)', group)}
    entries = re.findall(r'^@\w+\{(\w+),', (cfg.nbs_path/'references.bib').read_text(encoding='utf-8'), re.M)
    assert len(entries) == len(set(entries)) and cited - set(entries) == set()

def test_there_is_one_quarto_yml():
    assert (cfg.nbs_path/'_quarto.yml').resolve() == (cfg.config_path/'_quarto.yml').resolve()

def sidebar():
    "Pairs of notebook and text in the sidebar; a bare line has no text"
    items = [i for s in quarto['website']['sidebar']['contents'] for i in (s['contents'] if 'section' in s else [s])]
    return [(i['href'], i['text']) if isinstance(i, dict) else (i, '') for i in items]

def test_every_notebook_is_in_the_sidebar_once_under_its_number():
    assert names == sorted(href for href, _ in sidebar())
    numbers = {n: re.match(r'\d+|', PurePosixPath(n).name)[0] for n in names}
    assert {n: numbers[n] for n, text in sidebar() if not text.startswith(numbers[n])} == {}
    assert [s['section'] for s in quarto['website']['sidebar']['contents'] if 'section' in s] == [
        'Course', 'Measured', 'Parts']

def test_what_the_site_names_is_there(pages):
    "Files, and the addresses of navbar and footer; the rest of Quarto's settings come from settings.ini."
    site, html = quarto['website'], quarto['format']['html']
    made = {f: yaml.safe_load((cfg.nbs_path/f).read_text(encoding='utf-8')) for f in quarto['metadata-files']}
    assert made['nbdev.yml']['website']['site-url'] + '/' == SITE
    for file in (quarto['bibliography'], html['css']): assert (cfg.nbs_path/file).is_file()
    assert set(html['theme']) == {'light', 'dark'}
    bar = [i['href'] for side in ('left', 'right') for i in site['navbar'][side]]
    assert [h for h in bar if h not in names] == [cfg.git_url]
    foot = links(' '.join(site['page-footer'].values()))
    assert len(foot) >= 3 and [t for t in foot if not (cfg.config_path/t.replace(GITHUB, '')).is_file()] == []

def test_the_tables_of_contributing_hold_every_page():
    text = (cfg.config_path/'CONTRIBUTING.md').read_text(encoding='utf-8').split('## How a notebook')[0]
    rows = re.findall(r'^\| `(\d\d_\w+)` \|', text, re.M)
    assert sorted(rows) == sorted(PurePosixPath(n).stem for n in names if re.search(r'(^|/)\d', n))

@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'DATA.md'])
def test_links_of_the_repository_lead_somewhere(page):
    targets = links((cfg.config_path/page).read_text(encoding='utf-8'))
    inside = [t.partition('#')[0] for t in targets if '://' not in t]
    assert len(targets) > 1 and [t for t in inside if t and not (cfg.config_path/t).is_file()] == []

def test_readme_is_short_and_has_its_two_commands():
    "One screen and a half; `.ci/run` takes the second command from it."
    text = (cfg.config_path/'README.md').read_text(encoding='utf-8')
    assert len(text.split()) < 900
    commands = re.findall(r'^python3 -m venv .*$', text, re.M)
    assert ['reid_quickstart' in commands[0], commands[1].endswith('-m pytest tests')] == [True, True]

def test_citation_says_what_settings_say():
    cite = yaml.safe_load((cfg.config_path/'CITATION.cff').read_text(encoding='utf-8'))
    assert (cite['version'], cite['repository-code'], cite['url'] + '/') == (cfg.version, cfg.git_url, SITE)

def test_published_workflow_builds_the_same_site():
    "Quarto is there before the site is built, and what is published is the folder that it is built into."
    flow = yaml.safe_load((cfg.config_path/'.github'/'workflows'/'docs.yml').read_text(encoding='utf-8'))
    steps = flow['jobs']['docs']['steps']
    order = [s.get('uses', s.get('run', '')).split('@')[0] for s in steps]
    assert order.index('quarto-dev/quarto-actions/setup') < next(k for k, s in enumerate(order) if 'build_site.py' in s)
    upload, = (s for s in steps if s.get('uses', '').startswith('actions/upload-pages-artifact'))
    assert upload['with']['path'] == cfg.doc_path.name
