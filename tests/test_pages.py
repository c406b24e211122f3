"What a reader of the pages sees: every picture described, no red beside green, lessons of a readable size."
import re
from statistics import median

import nbformat
import pytest
from conftest import ROOT
from run_notebooks import names, option

LESSONS = [n for n in names() if re.match(r'\d', n)]
MODELS = ['class MoCo', 'def pretrain', 'def finetune']   # one model or one training loop may be longer than 30 lines

def cells(nb): return nbformat.read(ROOT/'nbs'/f'{nb}.ipynb', 4).cells

def lines(cell):
    "The lines to be read: without options of the page, imports, and the signature with its line for each parameter."
    text = re.sub(r'^(from|import) [^(\n]*(\([^)]*\))?$', '', cell.source, flags=re.M)
    text = re.sub(r'^ *\w+(:[^#\n]*|=[^#\n]*)?,? # .*$|^\).*:.*$', '', text, flags=re.M)
    return [l for l in text.splitlines() if l.strip() and not l.startswith('#|')]

def undescribed(cells):
    "Cells that draw and have no caption or no description; pictures in the text without one."
    drawn = [c for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    bare = [c.source for c in drawn if not (option(c, 'fig-cap') and len(option(c, 'fig-alt') or '') > 20)]
    return bare + [m for c in cells if c.cell_type == 'markdown' for m in re.findall(r'!\[\s*\]\([^)]*\)', c.source)]

@pytest.mark.parametrize('nb', names())
def test_every_picture_is_described(nb):
    assert undescribed(cells(nb)) == []

def test_a_picture_without_a_description_is_found():
    picture = nbformat.v4.new_output('display_data', {'image/png': ''})
    good = '#| fig-cap: "A crop"\n#| fig-alt: "A person in a red coat, seen from behind"\nshow()'
    drawn = [nbformat.v4.new_code_cell(s, outputs=[picture]) for s in (good, '#| fig-cap: "A"\nshow()')]
    assert undescribed(drawn) == ['#| fig-cap: "A"\nshow()']
    assert undescribed([nbformat.v4.new_markdown_cell('![](a.png) ![a page](b.png)')]) == ['![](a.png)']

@pytest.mark.parametrize('nb', LESSONS)
def test_a_lesson_is_short_enough_to_be_read(nb):
    "The bounds of CONTRIBUTING, section Lessons."
    text = [(c.cell_type, c.source, lines(c)) for c in cells(nb)]
    code = sorted(len(l) for kind, _, l in text if kind == 'code' and l)
    free = [len(l) for kind, s, l in text if kind == 'code' and not any(m in s for m in MODELS)]
    prose = sum(len(l) for kind, _, l in text if kind == 'markdown')
    assert len(text) <= 45 and median(code) <= 9 and code[int(.9*len(code))] <= 15 and max(free) <= 30
    assert .4 <= prose/(prose + sum(code))

@pytest.mark.parametrize('nb', LESSONS)
def test_the_code_of_a_lesson_is_on_its_page(nb):
    "`#| export` shows a signature only: enough for a command; what a lesson is about is shown whole."
    for c in cells(nb):
        defines = [l for l in c.source.splitlines() if re.match(r'(def|class) ', l)]
        assert not c.source.startswith('#| export\n') or all(d.startswith('def reid_') for d in defines)
        assert len(defines) <= 1 or '#| export' not in c.source

@pytest.mark.parametrize('nb', LESSONS)
def test_a_lesson_has_its_parts(nb):
    text = '\n'.join(c.source for c in cells(nb))
    missing = [w for w in ('# What you will learn', '# What can go wrong', '<details>', '# Try it', '# Summary',
                           '# Exercises', '# Further reading', 'colab-badge.svg', "MODE = 'toy'") if w not in text]
    assert missing == []
