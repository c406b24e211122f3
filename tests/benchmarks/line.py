"""Draws nbs/images/line.png, README's picture of the line, from pictures of the toy city.

    python tests/benchmarks/line.py [TOY]

TOY is the folder of a toy city; it is drawn where it is missing (default: nbs/_run/toy).
"""
import json
import sys
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from torchvision.transforms import v2

from reid_nb.parts.benchmarks import read_benchmark
from reid_nb.parts.core import read_rgb
from reid_nb.parts.detections import read_dets
from reid_nb.parts.metrics import color_histogram, distances
from reid_nb.parts.toy_city import build_toy
from reid_nb.parts.video import read_frames

ROOT = Path(__file__).resolve().parents[2]
INK, QUIET, BLUE, ORANGE = '#1d2733', '#5b6775', '#1f5fa8', '#b3541e'
WIDE, HIGH = 240, 196   # of a panel, in the units of its own axes

def panel(fig, k, title, lesson):
    "Make the k-th of eight panels: a frame, and above it a number, a title and the lesson"
    row, column = divmod(k, 4)
    ax = fig.add_axes((.012 + .25*column, .525 - .51*row, .222, .4))
    ax.set(xlim=(0, WIDE), ylim=(HIGH, 0), xticks=[], yticks=[])
    ax.set_axis_off()
    ax.add_patch(FancyBboxPatch((2, 2), WIDE - 4, HIGH - 4, 'round,pad=0,rounding_size=8', fc='#f4f6f8', ec='#c7ced6'))
    ax.text(4, -9, f'{k + 1}', fontsize=16, fontweight='bold', color=BLUE)
    ax.text(23, -9, title, fontsize=16, fontweight='bold', color=INK)
    ax.text(WIDE - 4, -9, lesson, fontsize=12, color=QUIET, ha='right')
    return ax

def put(ax, picture, x, y, high, color=None, dashed=False):
    "Draw a picture with its upper left corner at x, y; returns its width"
    wide = high*picture.shape[1]/picture.shape[0]
    ax.imshow(picture, extent=(x, x + wide, y + high, y), aspect='auto', interpolation='lanczos', zorder=3)
    line = '--' if dashed else '-'
    if color: ax.add_patch(Rectangle((x, y), wide, high, fill=False, ec=color, lw=3, ls=line, zorder=4))
    return wide

def arrow(ax, start, end, color=INK, both=False):
    style = '<|-|>' if both else '-|>'
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=16, lw=2, color=color, zorder=5))

def say(ax, x, y, text, color=INK, size=13, **kw): ax.text(x, y, text, fontsize=size, color=color, zorder=6, **kw)

def crops_of(toy, pid, part='bounding_box_test'):
    "A crop of a person from each camera of the Porto set"
    return [read_rgb(sorted((toy/'market'/part).glob(f'{pid:04d}_c{c}*'))[0]) for c in (1, 2, 3)]

def draw_videos(ax, toy):
    for k, video in enumerate(sorted((toy/'videos').rglob('*porto*.mp4'))):
        frame = next(iter(read_frames(video, [720])))[1]
        put(ax, frame, 12 + 22*k, 14 + 33*k, 97, 'white')

def draw_crops(ax, toy):
    video = sorted((toy/'videos').rglob('*porto*.mp4'))[0]
    dets = read_dets(toy/'dets'/f'{video.stem}.pkl')
    frame = next(iter(read_frames(video, [720])))[1]
    boxes = [b.round().astype(int) for b in np.asarray(dets.box)[np.asarray(dets.frame) == 720]]
    boxes = sorted((b for b in boxes if b[3] - b[1] > 90 and b[0] > 0 and b[2] < 640), key=lambda b: b[0])
    shown = frame.copy()
    for x1, y1, x2, y2 in boxes: cv2.rectangle(shown, (x1, y1), (x2, y2), (255, 210, 0), 3)
    put(ax, shown[60:300], 12, 12, 81)
    x = 12
    for x1, y1, x2, y2 in boxes:
        crop = cv2.resize(frame[max(0, y1):y2, x1:x2], (64, 128))
        if x + 38 < WIDE - 8: x += put(ax, crop, x, 106, 76) + 6

def draw_store(ax, toy):
    ax.add_patch(FancyBboxPatch((12, 12), 216, 172, 'round,pad=0,rounding_size=6', fc='white', ec=BLUE, lw=2))
    for k, pid in enumerate((121, 122, 123)):
        put(ax, crops_of(toy, pid)[0], 24, 24 + 52*k, 44)
        say(ax, 56, 42 + 52*k, f'porto/…/{pid:06d}_…', size=12, family='monospace')
        say(ax, 56, 60 + 52*k, 'its JPEG', QUIET, 12)

def draw_moco(ax, toy):
    torch.manual_seed(4)
    crop = torch.tensor(crops_of(toy, 123)[0]).permute(2, 0, 1)
    view = v2.Compose([v2.RandomResizedCrop((128, 64), (.45, .8), (.4, .6)), v2.ColorJitter(.4, .4, .3, .05)])
    put(ax, crop.permute(1, 2, 0).numpy(), 12, 58, 76)
    for y in (18, 102): put(ax, view(crop).permute(1, 2, 0).numpy(), 84, y, 72, BLUE)
    arrow(ax, (52, 88), (82, 56))
    arrow(ax, (52, 104), (82, 136))
    say(ax, 72, 189, 'two views: alike', BLUE)
    for k, pid in enumerate((124, 126, 128, 130, 132, 134)):
        put(ax, crops_of(toy, pid)[k % 3], 158 + 36*(k % 2), 38 + 46*(k//2), 42, ORANGE, dashed=True)
    say(ax, 131, 29, 'queue: unlike', ORANGE, 12)

def draw_finetuning(ax, toy):
    for k, crop in enumerate(crops_of(toy, 125)): put(ax, crop, 14 + 46*k, 34, 76, BLUE)
    say(ax, 14, 26, 'identity 125: pull', BLUE)
    put(ax, crops_of(toy, 131)[0], 190, 34, 76, ORANGE, dashed=True)
    say(ax, 184, 26, '131', ORANGE)
    arrow(ax, (187, 72), (152, 72), ORANGE, both=True)
    say(ax, 152, 128, 'push', ORANGE)
    say(ax, 14, 160, 'few labels, many cameras,', QUIET)
    say(ax, 14, 178, 'weights from MoCo', QUIET)

QUERY = 144, 1   # identity and camera of a query with right and wrong answers among the first four

def draw_evaluation(ax, toy):
    market = read_benchmark('market_folder', toy/'market')
    d = distances(color_histogram(market.query), color_histogram(market.gallery))
    q = next(k for k, s in enumerate(market.query) if (s.pid, s.camid) == QUERY)
    seen = [g for g in np.argsort(d[q], kind='stable') if market.gallery[g][1:] != market.query[q][1:]][:4]
    put(ax, read_rgb(market.query[q].path), 12, 34, 76)
    say(ax, 12, 26, 'query')
    say(ax, 66, 26, 'ranked gallery')
    for k, g in enumerate(seen):
        right = market.gallery[g].pid == market.query[q].pid
        put(ax, read_rgb(market.gallery[g].path), 66 + 42*k, 34, 76, BLUE if right else ORANGE, not right)
        say(ax, 78 + 42*k, 130, '✓' if right else '✗', BLUE if right else ORANGE, 16)
    say(ax, 12, 160, 'Rank-k, mAP, mINP, ROC,', QUIET)
    say(ax, 12, 178, 'with intervals', QUIET)

def draw_decision(ax, toy):
    scores = np.linspace(0, 1, 200)
    for mean, wide, color, name, x in ((.33, .12, ORANGE, 'others', 40), (.76, .09, BLUE, 'the same', 150)):
        y = np.exp(-.5*((scores - mean)/wide)**2)
        ax.fill_between(14 + 212*scores, 150, 150 - 86*y, color=color, alpha=.35, lw=0)
        ax.plot(14 + 212*scores, 150 - 86*y, color=color, lw=2, ls='-' if color == BLUE else '--')
        say(ax, x, 52, name, color)
    ax.plot([14, 226], [150, 150], color=INK, lw=1.5)
    ax.plot([138, 138], [28, 160], color=INK, lw=2)
    say(ax, 138, 22, 'threshold', ha='center')
    say(ax, 12, 178, 'unknown', QUIET)
    say(ax, 228, 178, 'it is Ada', QUIET, ha='right')

def draw_demo(ax, toy):
    i, frame = next(iter(read_frames(toy/'clips'/'chiara_elena_c3.mp4', [40])))
    ax.add_patch(Rectangle((12, 14), 216, 20, fc='#d9dfe6', ec='none'))
    for k in range(3): ax.plot(22 + 12*k, 24, 'o', color=QUIET, ms=5)
    shown = frame[60:360, 60:600].copy()
    boxes = json.loads((toy/'clips'/'clips.json').read_text())['chiara_elena_c3.mp4']
    put(ax, shown, 12, 34, 120)
    for name, rows in boxes.items():
        for row in rows:
            if row[0] != i: continue
            x1, y1, x2, y2 = (np.array(row[1:]) - (60, 60, 60, 60))*.4 + (12, 34, 12, 34)
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec='white', lw=2.5, zorder=4))
            say(ax, x1, y1 - 4, name, 'white', 12, fontweight='bold',
                bbox=dict(fc=BLUE, ec='none', boxstyle='square,pad=.15'))
    say(ax, 12, 176, 'enrol, verify, identify', QUIET)

PANELS = [('videos', 'lesson 01', draw_videos), ('crops', 'lesson 01', draw_crops),
          ('LMDB', 'lesson 02', draw_store), ('MoCo', 'lesson 03', draw_moco),
          ('fine-tuning', 'lesson 04', draw_finetuning), ('evaluation', 'lesson 05', draw_evaluation),
          ('decision', 'lesson 06', draw_decision), ('demo', 'lesson 08', draw_demo)]

def draw_line(toy, file):
    "Draw the whole line into a PNG file"
    fig = plt.figure(figsize=(12, 5.6), dpi=120, facecolor='white')
    for k, (title, lesson, draw) in enumerate(PANELS): draw(panel(fig, k, title, lesson), toy)
    whole = fig.add_axes((0, 0, 1, 1), zorder=-1)
    whole.set(xlim=(0, 1), ylim=(0, 1))
    whole.set_axis_off()
    for x in (.242, .492, .742):
        for y in (.725, .215): arrow(whole, (x - .007, y), (x + .019, y))
    fig.canvas.draw()
    drawn = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
    drawn.quantize(160, dither=Image.Dither.NONE).save(file, optimize=True)   # a third of the size

if __name__ == '__main__':
    toy = build_toy(sys.argv[1] if len(sys.argv) > 1 else ROOT/'nbs'/'_run'/'toy')
    draw_line(toy, ROOT/'nbs'/'images'/'line.png')
