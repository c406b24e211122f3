"Runs every notebook as `nbdev_test` does, one pytest item each."
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config()

@pytest.mark.long
@pytest.mark.parametrize('nb', sorted(nbglob(cfg.nbs_path, as_path=True)), ids=lambda p: p.stem)
def test_notebook(nb):
    ok, _ = run_nb(nb, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    assert ok
