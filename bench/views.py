"""Two views of each image: images per second

    python -m bench views                      # batches of 128 images at 96 pixels, and at 32
    python -m bench views --check --json views.json --chart views.png

`fastbyol` is `byol_views`, and `kornia` the same by kornia's operations: a batch of images a quarter larger than the views, each image with its
own draw. lightly's transform takes one PIL image, torchvision's v2 one tensor: both run in a data loader with no workers and with
as many as there are cores, and the quicker counts. Images are in memory, decoded. All run in turns in one process.
"""
import logging, os, sys, warnings

import torch
from fastcore.script import call_parse
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from fastbyol.all import blur_kernel, byol_views
from fastbyol.views import make_views
from bench.contestants import Lightly
from bench.kornia_views import kornia_view
from bench.timing import in_turns, seconds, setting, spread, table, verdict, write

def torchvision_views(size):
    "The paper's pipeline from torchvision's v2 operations, for one image"
    def view(blur_p, solarize_p):
        return v2.Compose([v2.RandomResizedCrop(size, (.08, 1.), interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(.4, .4, .2, .1)], .8), v2.RandomGrayscale(.2),
            v2.RandomApply([v2.GaussianBlur(blur_kernel(size), (.1, 2.))], blur_p), v2.RandomSolarize(.5, solarize_p)])
    views = [view(b, s) for b, s in zip((1., .1) if size>32 else (0., 0.), (0., .2))]
    return lambda x: [v(x) for v in views]

class Images(Dataset):
    def __init__(self, ims, tfm): self.ims, self.tfm = ims, tfm
    def __len__(self): return len(self.ims)
    def __getitem__(self, i): return self.tfm(self.ims[i])

def contestants(x, size, bs, workers):
    "Name -> function that makes two views of all of `x`"
    todo = {}
    ours = byol_views(size)
    for nm, views in (('fastbyol', ours), ('kornia', tuple(map(kornia_view, ours)))):
        def run(views=views):
            for b in x.split(bs): make_views(views, b.float()/255)
        todo[nm] = run
    def loaded(ims, tfm, n):
        dl = DataLoader(Images(ims, tfm), bs, num_workers=n, persistent_workers=n>0)
        def run():
            for _ in dl: pass
        return run
    each = {'torchvision v2': (list(x.float()/255), torchvision_views(size))}
    try: each['lightly'] = [to_pil_image(o) for o in x], Lightly.views(size)
    except ImportError as e: print(f'lightly is left out: {e} (`pip install -e .[bench]`)')
    for nm, o in each.items():
        for n in workers: todo[f"{nm}, {n} worker{'s'*(n!=1)}"] = loaded(*o, n)
    return todo

@call_parse
def main(
    sizes:str='96,32', # sides of the views, in pixels, separated by commas
    bs:int=128, # images per batch
    batches:int=8, # batches in a turn
    repeats:int=7, # turns
    threads:int=None, # threads of torch; torch's own choice when left out
    json:str=None, # file to write the figures to
    chart:str=None, # picture to draw
    check:bool=False, # exit with 1 where a target is missed
):
    "How many images per second get two views"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    if threads: torch.set_num_threads(threads)
    n, out, checks, bars = bs*batches, {}, [], {}
    for size in map(int, sizes.split(',')):
        x = torch.randint(0, 256, (n, 3, size*5//4, size*5//4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        todo = contestants(x, size, bs, (0, os.cpu_count()))
        runs = in_turns({nm: (lambda f=f: n/seconds(f)) for nm, f in todo.items()}, repeats)
        res = {nm: spread(o) for nm, o in runs.items()}
        med = {k: o['median'] for k, o in res.items()}
        print(f"{size} pixels, batches of {bs}, {torch.get_num_threads()} threads, median of {repeats} turns\n")
        table(['', 'images/s', 'least', 'most', 'of kornia'], [[nm, *[f'{o[k]:,.0f}' for k in ('median','least','most')], f"{o['median']/med['kornia']:.2f}"] for nm, o in sorted(res.items(), key=lambda o: -o[1]['median'])])
        print()
        checks.append((f'fastbyol, of kornia at {size} pixels', med['fastbyol']/med['kornia'], 3.5 if size>32 else 4., False))
        peer = [v for k, v in med.items() if k.startswith('lightly')]
        if peer and size>32: checks.append((f'fastbyol, of lightly at {size} pixels', med['fastbyol']/max(peer), 5., False))
        out[size] = runs
        for nm, o in res.items(): bars[f'{nm}, {size} px'] = tuple(o[k] for k in ('median','least','most'))
    ok = verdict(checks)
    write(dict(setting(bs=bs), **{'images per second': out}), json, chart, 'images per second, two views each', bars)
    if check and not ok: sys.exit('A target is missed')
