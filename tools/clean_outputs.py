"""Leave of progress bars in stored outputs what was left to see of them on a screen

    python tools/clean_outputs.py nbs/index.ipynb [...]

A bar of text writes over its own line again and again, and all of it is stored. `nbdev-clean` leaves that; run this
after running a notebook that trains with a bar.
"""
import json, sys
from pathlib import Path

from fastcore.nbio import nb2str, dict2nb
from notebooks import shown

for path in map(Path, sys.argv[1:]):
    nb = dict2nb(json.loads(path.read_text(encoding='utf-8')))
    for cell in nb.cells:
        for out in cell.get('outputs', []):
            if out.output_type!='stream': continue
            text = ''.join(out.text)
            if '\r' in text: out['text'] = [f'{o}\n' for o in shown(text).split('\n')]
    path.write_text(nb2str(nb), encoding='utf-8')
