"The documentation site without Quarto: every notebook passes nbdev's processors and stands in the sidebar."
import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.serve import proc_nbs

cfg = get_config()
names = sorted(p.name for p in nbglob(cfg.nbs_path, as_path=True))

def test_every_notebook_passes_the_processors():
    assert names == sorted(p.name for p in proc_nbs(force=True).glob('*.ipynb'))

def test_there_is_one_quarto_yml():
    assert (cfg.nbs_path/'_quarto.yml').resolve() == (cfg.config_path/'_quarto.yml').resolve()

def test_every_notebook_is_in_the_sidebar():
    site = yaml.safe_load((cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'))['website']
    parts = [s['contents'] if isinstance(s, dict) else [s] for s in site['sidebar']['contents']]
    assert names == sorted(name for part in parts for name in part)
