"""Time of an optimiser step of BYOL with a ResNet-18: our LARS and timm's, AdamW fused and not

    python -m bench optim                          # 2 threads, in turns, the least of 40 steps
    python -m bench optim --check --json optim.json

All take the same 16 million weights and gradients, in turns, in one process; compared are the least times, since other programs only add.
LARS is bound by memory: timm's passes over weights, gradients and momentum 15 times in units of one tensor, ours 13 times.
"""
import sys

import timm.optim
import torch
from fastcore.script import call_parse

from bench.timing import in_turns, seconds, setting, spread, table, verdict, write
from fastbyol.all import BYOL
from fastbyol.model import trainable_params
from fastbyol.optim import adamw, lars

def with_grads(model):
    "Copies of the weights, with gradients"
    params = [torch.nn.Parameter(p.detach().clone()) for p in trainable_params(model)]
    for p in params: p.grad = torch.randn_like(p)*.01
    return params

def timms(params, wd):
    groups = [[p for p in params if (p.ndim>1)==decays] for decays in (True, False)]
    groups = [dict(params=o, weight_decay=w) for o, w in zip(groups, (wd, 0.))]
    return timm.optim.Lars(groups, lr=.2, momentum=.9)

@call_parse
def main(
    arch:str='resnet18', # timm name
    repeats:int=40, # steps of each
    threads:int=2, # threads of torch
    device:str='cpu', # 'cpu' or 'cuda'
    json:str=None, # file to write the figures to
    check:bool=False, # exit with 1 where a target is missed
):
    "Time a step of each optimiser"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, wd = BYOL(arch).to(device), 1e-6
    opts = {"timm's LARS": timms(with_grads(model), wd), 'LARS': lars(with_grads(model), wd=wd),
            'AdamW, not fused': torch.optim.AdamW(with_grads(model), fused=False), 'AdamW': adamw(with_grads(model))}
    def step(opt):
        opt.step()
        if device=='cuda': torch.cuda.synchronize()
    runs = in_turns({name: (lambda o=o: seconds(lambda: step(o))) for name, o in opts.items()}, repeats)
    least = {name: 1e3*spread(o)['least'] for name, o in runs.items()}
    print(f'{arch}, {threads} threads, {device}, the least of {repeats} steps in turns\n')
    table(['', 'ms'], [[name, f'{ms:.2f}'] for name, ms in least.items()])
    print()
    checks = [("LARS, of timm's", least['LARS']/least["timm's LARS"], .5, True)]
    if device=='cuda': checks.append(('LARS, ms', least['LARS'], .8, True))
    ok = verdict(checks)
    write(dict(setting(arch=arch, device=device), ms=least), json)
    if check and not ok: sys.exit('A target is missed')
