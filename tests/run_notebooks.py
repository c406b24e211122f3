"""Runs the notebooks in order, each in a kernel of its own, in an empty folder, and saves what they print.

    python tests/run_notebooks.py [NAME ...] [--check] [--kernel NAME]

NAME: such as 03_moco or parts/13_augment; none: all of them. --check saves nothing, and says where a saved output
is not what the code prints now. --kernel: a Jupyter kernel of another Python."""
import argparse
import html
import json
import os
import re
import shutil
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4.rwbase import split_lines

NBS = Path(__file__).resolve().parent.parent/'nbs'
NUMBER = re.compile(r'[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?')

os.environ.setdefault('REID_DETECTOR', 'motion')   # with a network and without, pages print the same
os.environ['REID_HOME'] = str(NBS/'_run'/'library')  # nor does it matter what you have imported

def names():
    "All notebooks, in the order in which they lean on each other."
    return [f.relative_to(NBS).with_suffix('').as_posix()
            for d in (NBS/'parts', NBS) for f in sorted(d.glob('[0-9]*.ipynb'))] + ['measured']

def copy_notebooks(folder):
    "Copy the notebooks alone: what else lies in the repository must not be needed."
    for name in names():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(NBS/f'{name}.ipynb', folder/f'{name}.ipynb')

def option(cell, name):
    "The value of `#| name: value` in a cell, or None."
    found = re.search(rf'^#\| *{name}: *(.+)$', cell.source, re.M)
    return found and found[1]

class Client(NotebookClient):
    "Notes how long a reader of the notebook sees nothing move."
    silent, last = 0., None

    def process_message(self, msg, cell, cell_index):
        now = time.time()
        if msg['msg_type'] == 'execute_input': self.last = now
        if self.last: self.silent, self.last = max(self.silent, now - self.last), now
        return super().process_message(msg, cell, cell_index)

def run_notebook(folder, name, kernel='python3'):
    "Run the copy of a notebook in `folder` -> (notebook with fresh outputs, seconds, longest silence in seconds)."
    path = folder/f'{name}.ipynb'
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == 'code' and option(cell, 'eval') == 'false': cell.metadata.tags = ['skip-execution']
    client = Client(nb, timeout=None, kernel_name=kernel, resources={'metadata': {'path': str(path.parent)}},
                    skip_cells_with_tag='skip-execution', store_widget_state=False, record_timing=False)
    begin = time.time()
    client.execute(env={**os.environ, 'IN_TEST': '1'})
    for cell in nb.cells:
        cell.metadata.pop('tags', None)
        if cell.cell_type == 'code' and option(cell, 'eval') != 'false': cell.outputs = readable(cell.outputs)
    return nb, time.time() - begin, client.silent

def readable(outputs):
    "What a page can show: no progress bars and notes, no live widgets, what was printed in one piece."
    kept = []
    for out in outputs:
        if out.get('name') == 'stderr' or 'application/vnd.jupyter.widget-view+json' in out.get('data', {}): continue
        if out.output_type == 'stream' and kept and kept[-1].output_type == 'stream': kept[-1].text += out.text
        else: kept.append(out)
    return kept

def said(cell):
    "The text that a cell's outputs show; a picture counts as one word."
    def text(out):
        if out.output_type == 'stream': return out.text
        data = out.get('data', {})
        if 'image/png' in data: return '<picture>'
        if 'text/html' in data: return html.unescape(re.sub('<[^>]+>', ' ', data['text/html']))
        return data.get('text/plain', '')
    return '\n'.join(text(out) for out in cell.outputs)

def differs(old, new, within=.01):
    "Whether two texts say different words, or numbers further apart than `within` (of the number, if it is over 1)."
    if NUMBER.sub('#', old).split() != NUMBER.sub('#', new).split(): return True
    numbers = ([float(n.replace(',', '')) for n in NUMBER.findall(text)] for text in (old, new))
    return any(abs(a - b) > within*max(1, abs(a)) for a, b in zip(*numbers))

def differences(saved, fresh):
    "The cells whose saved output is not what the code prints: [(number of the cell, saved text, fresh text)]"
    found = []
    for i, (a, b) in enumerate(zip(saved.cells, fresh.cells, strict=True)):
        if a.cell_type != 'code' or option(a, 'varies') or option(a, 'eval') == 'false': continue
        if differs(said(a), said(b), float(option(a, 'within') or .01)): found.append((i, said(a), said(b)))
    return found

def save(name, nb):
    "Write a notebook in nbdev's own form, a line of it on a line."
    text = json.dumps(split_lines(deepcopy(nb)), indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    (NBS/f'{name}.ipynb').write_text(text, encoding='utf-8')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*')
    p.add_argument('--check', action='store_true')
    p.add_argument('--kernel', default='python3')
    args = p.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_notebooks(Path(folder))
        for name in args.names or names():
            saved = nbformat.read(NBS/f'{name}.ipynb', 4)
            fresh, seconds, silent = run_notebook(Path(folder), name, args.kernel)
            print(f'{name:24} {seconds:6.1f} s, longest silence {silent:5.1f} s', flush=True)
            for i, a, b in differences(saved, fresh):
                print(f'  cell {i}, saved:\n{a}\n  cell {i}, now:\n{b}', flush=True)
                bad += args.check
            if not args.check: save(name, fresh)
    sys.exit(bool(bad))

if __name__ == '__main__': main()
