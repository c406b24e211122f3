"""Renew the pictures of the demo in the lessons from the screenshots that the tests take:

    REID_SCREENSHOTS=shots python -m pytest -n 0 tests/test_browser.py -k "visit or cameras"
    python tests/renew_images.py shots

Each becomes nbs/images/demo_NAME.png, in 256 colours, at most 900 pixels wide and below 150 kB."""
import sys
from pathlib import Path

from PIL import Image

IMAGES, MOST = Path(__file__).resolve().parent.parent/'nbs'/'images', 150_000
SHOTS = dict(verification='verification_true_desktop', enrollment='who_is_meant_desktop',
             identification='identification_known_desktop', gallery='gallery_receipt_desktop',
             cameras='cameras_desktop')

def renew(shot, image):
    "Make a small picture of a screenshot."
    picture = Image.open(shot).convert('RGB')
    picture.thumbnail((900, 2000), Image.Resampling.LANCZOS)
    picture.quantize(256, dither=Image.Dither.NONE, kmeans=1).save(image, optimize=True)
    size = image.stat().st_size
    if size > MOST: raise SystemExit(f'{image.name}: {size:,} bytes, more than {MOST:,}')
    print(f'{image.name}: {picture.width}x{picture.height}, {size:,} bytes')

if __name__ == '__main__':
    if len(sys.argv) != 2: raise SystemExit(__doc__)
    for name, shot in SHOTS.items(): renew(Path(sys.argv[1])/f'{shot}.png', IMAGES/f'demo_{name}.png')
