"The documentation site without Quarto: every notebook passes nbdev's processors and stands in the sidebar."
import json
import re

import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.serve import proc_nbs

cfg = get_config()
names = sorted(str(p.relative_to(cfg.nbs_path)) for p in nbglob(cfg.nbs_path, as_path=True))

def test_every_notebook_passes_the_processors():
    made = proc_nbs(force=True)
    assert names == sorted(str(p.relative_to(made)) for p in made.rglob('*.ipynb'))

def test_there_is_one_quarto_yml():
    assert (cfg.nbs_path/'_quarto.yml').resolve() == (cfg.config_path/'_quarto.yml').resolve()

def test_every_notebook_is_in_the_sidebar():
    site = yaml.safe_load((cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'))['website']
    parts = [s['contents'] if isinstance(s, dict) else [s] for s in site['sidebar']['contents']]
    assert names == sorted(name for part in parts for name in part)

def test_links_between_pages_lead_somewhere():
    "A link names the notebook, from which Quarto makes the page's address."
    broken = []
    for name in names:
        page = cfg.nbs_path/name
        cells = json.loads(page.read_text(encoding='utf-8'))['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        targets = [t.partition('#')[0] for t in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in t]
        broken += [(name, t) for t in targets if t and not (page.parent/t).is_file()]
    assert broken == []

def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r'\]\(([^)\s]+)\)', (cfg.config_path/'README.md').read_text(encoding='utf-8'))
    assert len(targets) > 20 and [t for t in targets if not (cfg.config_path/t).is_file()] == []
