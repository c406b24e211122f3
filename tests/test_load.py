"Twenty clients at once over loopback, and kill -9 in the middle; `tests/benchmarks/load.py` is the long form."
import sys
from pathlib import Path

import pytest
from benchmarks.load import consistent, kill_in_a_storm, start, storm
from test_biometrics import films  # noqa: F401

SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_biometrics import MATCHER
from reid_nb import demo
from reid_nb.parts import serve as serve_
serve_.serve_demo(demo.build_demo(sys.argv[2], MATCHER, 'motion'), int(sys.argv[3]), quiet=True)
"""

@pytest.mark.long
def test_twenty_at_once_and_a_kill(films, tmp_path):  # noqa: F811
    root = tmp_path/'root'/'gallery'
    server, url = start(lambda port: [sys.executable, '-c', SERVER, Path(__file__).parent, root, port])
    try:
        confirmed, kinds, _, failures = storm(url, films['short'], 20, 6, 13)
        assert failures == [] and set(kinds) <= {'good', 'busy'} and kinds['good'] == len(confirmed) > 0
        assert sorted(confirmed) == sorted(consistent(root))      # nobody lost, nobody too many
        later, kinds, failures = kill_in_a_storm(server, url, films['short'], 20, 6, 13)
    finally: server.kill()
    assert failures == [] and set(kinds) <= {'good', 'busy'}
    there = set(consistent(root))
    assert set(confirmed) | set(later) <= there
    assert len(there - set(confirmed) - set(later)) <= 1     # at most the one that was being stored
