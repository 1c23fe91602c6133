"""Decoding files by all cores against one process: images per second

    python -m bench decode                     # 600 JPEGs of 500×375, and 100 of them
    python -m bench decode --check --json decode.json
    python -m bench decode --folder FOLDER     # your own files

`unlabelled_dls` chooses its processes itself: none for a few hundred files. Both ways decode the same files to the same
pixels, in turns. On two cores processes should be at least 1.7 times as fast, and few files no slower than before.
"""
import os, sys, tempfile
from pathlib import Path

import numpy as np
from fastai.basics import defaults
from fastcore.script import call_parse
from PIL import Image

from bench.timing import in_turns, seconds, setting, spread, table, verdict, write
from fastbyol.all import find_images, unlabelled_dls

def make_photos(folder, n, size=(500, 375)):
    "JPEGs with soft shapes and some noise, so that they compress as photos do"
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse)+rng.normal(0, 8, (*size[::-1], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(Path(folder)/f'{i:04}.jpg', quality=90)

def rates(files, size, repeats):
    "Images per second of one process and of what `unlabelled_dls` chooses"
    def run(cpus):
        defaults.cpus = cpus
        unlabelled_dls(files, bs=1, valid_pct=0, in_memory=True, item_size=size)
    todo = {name: (lambda w=w: len(files)/seconds(lambda: run(w))) for name, w in (('one process', 0), ('as chosen', defaults.cpus))}
    return {name: spread(o) for name, o in in_turns(todo, repeats).items()}

@call_parse
def main(
    folder:str=None, # image files at any depth; JPEGs are made when left out
    images:int=600, # of them; a second measurement takes 100
    size:int=160, # side to decode to, in pixels
    repeats:int=5, # turns
    json:str=None, # file to write the figures to
    chart:str=None, # picture to draw
    check:bool=False, # exit with 1 where a target is missed
):
    "How many images per second are decoded"
    with tempfile.TemporaryDirectory() as tmp:
        if not folder: make_photos(tmp, images)
        files = find_images(folder or tmp)[:images]
        res = {n: rates(files[:n], size, repeats) for n in sorted({min(100, len(files)), len(files)})}
    rows = [[f'{n} files, {name}', *[f'{o[k]:,.0f}' for k in ('median', 'least', 'most')]] for n, each in res.items() for name, o in each.items()]
    table(['', 'images/s', 'least', 'most'], rows)
    ratios = {n: o['as chosen']['median']/o['one process']['median'] for n, o in res.items()}
    print(f'\n{os.cpu_count()} cores')
    ok = verdict([(f'{n} files, images/s of one process', ratio, 1.7 if n>=400 else .9, False) for n, ratio in ratios.items()])
    bars = {name: tuple(o[k] for k in ('median', 'least', 'most')) for name, o in res[max(res)].items()}
    write(dict(setting(size=size), runs=res, ratios=ratios), json, chart, 'images per second', bars)
    if check and not ok: sys.exit('A target is missed')
