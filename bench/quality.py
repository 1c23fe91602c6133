"""kNN accuracy after the same time, or after the same number of epochs

    python -m bench quality FOLDER                                                    # ten minutes each, three seeds
    python -m bench quality FOLDER --only 'fastbyol;fastbyol, views of kornia' --epochs 3 --seconds 0     # the same number of epochs
    python -m bench quality FOLDER --only 'fastbyol;fastbyol, opt=lars;fastbyol, lr=1e-3, tau=.95' --epochs 5 --seconds 0 # other numbers in its recipe

FOLDER holds train/ and val/ with a folder per class, such as Imagenette's. A ResNet-18 begins with random weights and is pretrained on train/,
labels unseen, by each library with its own documented pipeline and settings; then the photos of val/ are classified by
their nearest neighbours in train/. The time begins when the library is handed the files: decoding counts. Epochs, where
a schedule needs them, follow from a few steps timed beforehand. Seeds run one after another, the contestants in turns.
"""
import logging, statistics, sys, time, warnings
from ast import literal_eval
from json import loads
from pathlib import Path

import torch
from fastai.vision.all import set_seed
from fastcore.script import call_parse

from fastbyol.all import byol_views, find_images, knn_predict, labelled_dls, pool_features
from fastbyol.core import eval_mode
from bench.contestants import Stop, registry
from bench.kornia_views import kornia_view
from bench.timing import setting, table, write

settings = { # how `train` is called; 'fastbyol, lr=1e-3, tau=.95' is known, too: arguments of `recipe`
    'random weights': {},
    'fastbyol': {},
    'fastbyol, views of kornia': dict(views=lambda size: tuple(map(kornia_view, byol_views(size)))),
    'lightly': {},
    'byol-pytorch': {},
}

class Watch:
    "`tick` that counts images and stops after `seconds`"
    def __init__(self, seconds=None): self.seconds, self.images, self.start = seconds, 0, time.perf_counter()
    def __call__(self, n):
        self.images += n
        if self.seconds and time.perf_counter()-self.start>self.seconds: raise Stop()
    @property
    def took(self): return time.perf_counter()-self.start

def calibrate(nm, files, size, bs, workers, steps=8):
    "Images per second of `nm` once it runs"
    ends = []
    def tick(n):
        ends.append(time.perf_counter())
        if len(ends)>steps: raise Stop()
    run(nm, files[:bs*(steps+2)], size, bs, 1, tick, workers)
    return bs*(len(ends)-1)/(ends[-1]-ends[0]) if ends else 0

@torch.no_grad()
def features(body, stats, dl):
    "Features and labels of all images"
    mean, std = (torch.tensor(o).view(1, -1, 1, 1) for o in stats)
    with eval_mode(body): res = [(pool_features(body((x-mean)/std)), y) for x, y in dl.new(shuffle=False, drop_last=False)]
    return tuple(torch.cat([torch.as_tensor(o[i]).as_subclass(torch.Tensor) for o in res]) for i in range(2))

def arguments(nm):
    "How `train` is called for `nm`; None where there is no such contestant"
    if nm in settings: return dict(settings[nm])
    base, *numbers = nm.split(', ')
    if base!='fastbyol' or not all('=' in o for o in numbers): return None
    def value(o):
        try: return literal_eval(o)
        except ValueError: return o # a word
    return {k: value(v) for k, v in (o.split('=', 1) for o in numbers)}

def run(nm, files, size, bs, epochs, tick, workers):
    kw = arguments(nm)
    if 'views' in kw: kw['views'] = kw['views'](size)
    return registry[nm.split(',')[0]]().train(files, size, bs, epochs, tick, workers, **kw)

@call_parse
def main(
    folder:str, # holds train/ and val/
    seconds:float=600., # for each run; 0: no limit, `epochs` decide
    epochs:int=0, # of each run; 0: as many as fit into `seconds`
    seeds:int=3, # runs of each contestant
    size:int=64, # side of the views, in pixels
    bs:int=64, # images per batch
    workers:int=2, # of those whose pipeline decodes each time
    only:str='random weights;fastbyol;lightly', # contestants, separated by semicolons
    threads:int=None, # threads of torch; torch's own choice when left out
    json:str=None, # file to write the figures to, after each run; runs that it holds already are left out
    chart:str=None, # picture to draw
):
    "Pretrain with each library for the same time and compare kNN accuracy"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    if threads: torch.set_num_threads(threads)
    names = only.split(';')
    if any(arguments(o) is None for o in names): sys.exit(f"Contestants are {'; '.join(settings)}; and fastbyol, NUMBER=VALUE, …; got {only}")
    if not seconds and not epochs: sys.exit('Give `--seconds` or `--epochs`')
    files = {o: find_images(f'{folder}/{o}') for o in ('train', 'val')}
    dls = labelled_dls(files['train'], size, valid=files['val'])
    what = dict(size=size, bs=bs, limit_s=seconds, epochs=epochs)
    runs = {nm: [] for nm in names}
    if json and Path(json).exists():
        old = loads(Path(json).read_text())
        if any(old[k]!=v for k, v in what.items()): sys.exit(f'{json} holds runs of other settings: name another file')
        runs.update(old['runs'])
    print(f"{len(files['train']):,} photos, {size} pixels, ResNet-18, batches of {bs}, {torch.get_num_threads()} threads, " + (f'{seconds:.0f} s a run' if seconds else f'{epochs} epochs a run'), flush=True)
    for seed in range(seeds):
        for nm in names:
            if any(o['seed']==seed for o in runs[nm]): continue
            set_seed(seed)
            n = epochs or max(1, int(seconds*calibrate(nm, files['train'], size, bs, workers)/len(files['train'])))
            set_seed(seed)
            watch = Watch(seconds)
            body, stats = run(nm, files['train'], size, bs, n, watch, workers)
            took = watch.took
            (bank, by), (queries, qy) = (features(body, stats, o) for o in (dls.train, dls.valid))
            acc = (knn_predict(bank, by, queries)==qy).float().mean().item()
            runs[nm].append(dict(seed=seed, accuracy=acc, images=watch.images, seconds=took, epochs=n))
            print(f'seed {seed}  {nm:<26} kNN {100*acc:.1f} %  {watch.images:,} images in {took:.0f} s, schedule of {n} epochs', flush=True)
            write(dict(setting(**what), runs=runs), json)
    print()
    accs = {nm: [100*o['accuracy'] for o in r] for nm, r in runs.items()}
    table(['', 'kNN %', 'least', 'most', 'images/s'], [[nm, *[f'{f(o):.1f}' for f in (statistics.mean, min, max)], f"{statistics.mean(r['images']/r['seconds'] for r in runs[nm]):.0f}"] for nm, o in accs.items()])
    write(dict(setting(**what), runs=runs), json, chart, 'kNN accuracy, %', {nm: (statistics.mean(o), min(o), max(o)) for nm, o in accs.items()})
