"Prints README.md: the text of nbs/index.ipynb. `python tests/readme.py > README.md`"
import json
import re
import sys
from pathlib import Path

nb = json.loads((Path(__file__).parent.parent/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
text = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown']
text = '\n\n'.join(['<!-- made from nbs/index.ipynb by tests/readme.py: edit there -->', *text]) + '\n'
# lessons and pictures lie beside the index
text = re.sub(r'(\]\(|src=")((?:parts/)?\w+\.ipynb|images/\w+\.png)(?=[)"])', r'\1nbs/\2', text)
sys.stdout.write(text.replace('https://github.com/reid-nb/reid_nb/blob/main/', ''))
