"""People of a real street by the demo's page: a real browser enrols six before one camera and asks about another.

    python tests/benchmarks/real_city_page.py DATA WEIGHTS [--checkpoint FILE] [--cameras] [--shots FOLDER]

The same clips, people and networks as in `real_city.py`, which says more. WEIGHTS is what the page looks for people
with; with --cameras it is told before which camera a clip was filmed. Screenshots show real people, and are not to be
published.
"""
import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from playwright.sync_api import sync_playwright
from real_city import at, ENROLLED, SOUGHT

from reid_nb import demo
from reid_nb.parts.decisions import find_usable_tracks
from reid_nb.parts.page import CONSENT
from reid_nb.parts.serve import serve_demo

def show(v, clip, camera):
    "Upload a clip, and choose its first hundred frames."
    v.upload(clip)
    v.panel.locator('video').first.wait_for()
    v.settle()
    last = v.panel.get_by_role('spinbutton').nth(1)
    last.fill('100')
    last.press('Tab')
    if camera:
        box = v.page.get_by_label('Camera of the clip')
        box.fill(camera)
        box.press('Enter')
    v.settle()

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', type=Path)
    p.add_argument('weights')
    p.add_argument('--checkpoint')
    p.add_argument('--cameras', action='store_true')
    p.add_argument('--shots', type=Path)
    a = p.parse_args()
    if a.shots: os.environ['REID_SCREENSHOTS'] = str(a.shots)
    from test_browser import Visitor
    v01, v05 = (next((a.data/'real_city').rglob(f'*{v}.mp4')) for v in ('v01', 'v05'))
    known, sought = (find_usable_tracks(v, a.weights, 0, 101)[0] for v in (v01, v05))
    number = {name: at(known, *point).number for name, point in ENROLLED.items()}
    expected = {at(sought, *point).number: name for name, point in SOUGHT}
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as play:
        cameras = Path(tmp)/'cameras' if a.cameras else None
        app = demo.build_demo(Path(tmp)/'gallery', a.checkpoint, a.weights, cameras=cameras)
        _, url, _ = serve_demo(app, prevent_thread_lock=True, quiet=True, inline=False)
        browser = play.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        v = Visitor(browser, url)
        show(v, v01, a.cameras and 'v01')
        for name, k in number.items():
            v.panel.get_by_label('Name Surname').fill(name)
            v.panel.get_by_label(CONSENT).check()
            v.submit('ask')
            v.panel.get_by_label(f'person {k}', exact=True).check()
            print(*v.submit('good').splitlines()[:2], flush=True)
        v.shot('real_city_enrolment')
        v.tab('Identification')
        show(v, v05, a.cameras and 'v05')
        print(v.submit('good'))
        v.shot('real_city_identification')
        print('expected:', expected)
        assert v.errors == []
        app.close()

if __name__ == '__main__': main()
