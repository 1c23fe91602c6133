"""Seconds of an optimiser step, two views given: ResNet-18, batches of 32

    python -m bench step                       # 96 pixels; the table, ratios to the floor
    python -m bench step --size 32
    python -m bench step --check --json step.json --chart step.png

The floor is a loop in plain torch, float32, both views in one pass, without any library. All run in turns of `--steps` steps in one
process; compared are medians over all steps. Overhead is what a `Learner` with `BYOLCallback` takes beyond plain torch with the same arithmetic:
view by view, in the same precision and layout.
"""
import logging, sys, warnings

import torch
from fastcore.script import call_parse

from bench.contestants import available, registry
from bench.timing import in_turns, setting, spread, table, verdict, write

peers = 'lightly', 'byol-pytorch', 'self_supervised'
same = {'fastbyol, fp32':'plain torch, view by view', 'fastbyol, channels_last':'plain torch, view by view, channels last',
        'fastbyol, bf16':'plain torch, view by view, channels last, bfloat16'}

@call_parse
def main(
    size:int=96, # side of the views, in pixels
    bs:int=32, # images per batch
    steps:int=3, # steps in a turn
    repeats:int=7, # turns
    only:str=None, # contestants, separated by semicolons; all when left out
    seed:int=0, # of weights and views
    threads:int=None, # threads of torch; torch's own choice when left out
    json:str=None, # file to write the figures to
    chart:str=None, # picture to draw
    check:bool=False, # exit with 1 where a target is missed
):
    "Time an optimiser step of each library on the same views"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    if threads: torch.set_num_threads(threads)
    names = available(only.split(';') if only else [o for o in registry if o not in ('random weights', 'fastbyol, optimiser of lightly')])
    torch.manual_seed(seed)
    v1, v2 = torch.rand(2, bs, 3, size, size)
    made = {nm: registry[nm]() for nm in names}
    runs = in_turns({nm: (lambda c=c: c.times(v1, v2, steps)) for nm, c in made.items()}, repeats)
    res = {nm: spread(o) for nm, o in runs.items()}
    floor = res.get('plain torch', next(iter(res.values())))['median']
    print(f"ResNet-18, {bs} images, {size} pixels, two views given, {torch.get_num_threads()} threads, median of {steps*repeats} steps\n")
    table(['', 'ms', 'least', 'most', 'of the floor'], [[nm, *[f'{o[k]*1e3:.0f}' for k in ('median','least','most')], f"{o['median']/floor:.2f}"] for nm, o in sorted(res.items(), key=lambda o: o[1]['median'])])
    if 'fastbyol' in made: print(f"\nfastbyol chose {made['fastbyol'].learn.precision}")
    checks, med = [], {k: o['median'] for k, o in res.items()}
    if size>=96:
        if 'fastbyol' in med: checks.append(('fastbyol, of the floor', med['fastbyol']/floor, .55, True))
        if 'fastbyol' in med and any(o in med for o in peers): checks.append(('fastbyol, of the quickest peer', med['fastbyol']/min(med[o] for o in peers if o in med), .65, True))
        if 'fastbyol, channels_last' in med: checks.append(('fastbyol in float32, channels last, of the floor', med['fastbyol, channels_last']/floor, .90, True))
    checks += [(f'{a}, of {b}', med[a]/med[b], 1.03, True) for a, b in same.items() if a in med and b in med]
    print()
    ok = verdict(checks)
    bars = {nm: tuple(o[k]/floor for k in ('median','least','most')) for nm, o in res.items() if nm in ('plain torch', 'fastbyol', 'fastbyol, channels_last', *peers)}
    write(dict(setting(size=size, bs=bs, seed=seed), seconds=runs, **{'of floor': {k: v/floor for k, v in med.items()}}), json, chart, 'time of a step, plain torch in float32 = 1', bars)
    if check and not ok: sys.exit('A target is missed')
