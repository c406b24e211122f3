"Prints README.md: the text of nbs/index.ipynb. `python tests/readme.py > README.md`"
import json
import re
import sys
from pathlib import Path

nb = json.loads((Path(__file__).parent.parent/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
text = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown']
text = '\n\n'.join(['<!-- made from nbs/index.ipynb by tests/readme.py: edit there -->', *text]) + '\n'
text = re.sub(r'\]\(((?:parts/)?\w+\.ipynb)\)', r'](nbs/\1)', text)   # the lessons lie beside the index
sys.stdout.write(text.replace('https://github.com/reid-nb/reid_nb/blob/main/', ''))
