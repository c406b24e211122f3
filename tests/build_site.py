"""Builds the site into _docs, as `nbdev_docs` does, but leaves README alone and mends what nbdev spoils.

    python tests/build_site.py [--no-render]

--no-render stops before Quarto's own step, and so needs no Quarto; the pages as Quarto gets them are in _proc."""
import json
import re
import shutil
import subprocess
import sys

from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

LINK = re.compile(r'\[(`[^`\]]+`)\]\([^)]+\)')

def plain_code(lines):
    "Take the links out of code: nbdev links words in backticks there, too, and a reader sees the address."
    inside, mended = False, []
    for line in lines:
        if line.startswith('```'): inside = not inside
        mended.append(LINK.sub(r'\1', line) if inside else line)
    return mended

def plain_address(text):
    "Let a link to a method lead to its class: a method has no heading of its own."
    return re.sub(r'(\.html#\w+)\.\w+\)', r'\1)', text)

def mend(path):
    "Mend the links on a page that nbdev has processed."
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = plain_address(''.join(cell['source']))
        for data in (o['data'] for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})):
            lines = plain_code(''.join(data['text/markdown']).splitlines(True))
            data['text/markdown'] = plain_address(''.join(lines))
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False), encoding='utf-8')

def process():
    "Do everything before Quarto's own step -> the folder that Quarto renders."
    refresh_quarto_yml()
    made = proc_nbs(force=True)
    shutil.copy(get_config().nbs_path/'nbdev.yml', made)
    for path in made.rglob('*.ipynb'): mend(path)
    return made

def main():
    made, docs = process(), get_config().doc_path
    if '--no-render' in sys.argv: return print(made)
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=made, check=True)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(made/docs.name, docs)

if __name__ == '__main__': main()
