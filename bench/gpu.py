"""What a GPU does: steps, views, busy share, decoding, evaluation, and lightly beside it; or a walk through everything

    python -m bench gpu FOLDER                          # ResNet-18, 128 pixels, batches of 256, the recipe 'imagenette'
    python -m bench gpu FOLDER --json gpu.json
    python -m bench gpu --smoke FOLDER                  # every way to train, hand over, save, resume and evaluate
    python -m bench gpu FOLDER --tiny                   # a small network and few images, to try the command on a CPU

FOLDER holds train/ and val/ with a folder per class. Each measurement has a time limit and is printed and written to
`--json` as soon as it is there. A step is timed as the `Learner` runs it: views, forward and backward pass, optimiser,
target update and callbacks. The share of time in which the GPU is busy comes from torch's profiler. lightly runs its
documented loop with heads of the same width, with views given and from files. Without a GPU all runs on the CPU.
"""
import logging, os, signal, sys, tempfile, time, warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.vision.all import default_device, set_seed
from fastcore.script import call_parse
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from bench import contestants
from bench.contestants import Photos, Stop, clock, registry
from bench.timing import setting, write
from fastbyol.all import byol_learner, byol_views, find_images, knn_accuracy, labelled_dls, recipe, unlabelled_dls
from fastbyol.views import make_views

cuda = torch.cuda.is_available()

def sync():
    if cuda: torch.cuda.synchronize()

def milliseconds(f, n):
    "Mean time of a call of `f`, the GPU's work included, after two to warm up"
    for _ in range(2): f()
    sync()
    start = time.perf_counter()
    for _ in range(n): f()
    sync()
    return 1e3*(time.perf_counter()-start)/n

@contextmanager
def at_most(seconds):
    "Raise a `TimeoutError` after `seconds`, where the system has alarms"
    def stop(*_): raise TimeoutError(f'more than {seconds:.0f} s')
    if hasattr(signal, 'SIGALRM'):
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(max(1, int(seconds)))
    try: yield
    finally:
        if hasattr(signal, 'SIGALRM'): signal.alarm(0)

class Report:
    "Figures as they come: each stage is a generator of (name, figure)"
    def __init__(self, json, **kw): self.json, self.res = json, setting(**kw, figures={}, missing={})
    def stage(self, f, *args, limit=60):
        try:
            with at_most(limit):
                for name, o in f(*args): self.put(name, o)
        except Exception as e:
            self.res['missing'][f.__name__] = f'{type(e).__name__}: {e}'[:300]
            print(f"{f.__name__}: not measured ({self.res['missing'][f.__name__]})", flush=True)
        write(self.res, self.json)
    def put(self, name, o):
        self.res['figures'][name] = o
        print(f"{name:<56} {o if isinstance(o, str) else format(o, ',.2f'):>10}", flush=True)
    def ratio(self, name, a, b):
        got = self.res['figures']
        if got.get(a) and got.get(b): self.put(name, got[a]/got[b])

def train_steps(learn, n):
    "Train for `n` steps; ms of each, the GPU's work included"
    ends = []
    def tick(_):
        ends.append(1)
        if len(ends)==n: raise Stop()
    sync()
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(1+n//max(1, len(learn.dls.train)), cbs=[clock(tick)])
    sync()
    return 1e3*(time.perf_counter()-start)/len(ends)

def busy_share(prof):
    "Share of the time from the first kernel to the last in which one was at work"
    on_gpu = [e for e in prof.events() if e.device_type==torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
    total, end = 0, spans[0][0]
    for a, b in spans: total, end = total+max(0, b-max(a, end)), max(end, b)
    return total/(end-spans[0][0])

class Bench:
    "Data, learner and stages"
    def __init__(self, folder, arch, size, bs, steps, preset, precision, tiny):
        self.arch, self.size, self.bs, self.steps, self.precision = arch, size, bs, steps, precision
        self.train, self.val = (find_images(f'{folder}/{o}') for o in ('train', 'val'))
        if tiny: self.train, self.val = self.train[::len(self.train)//64+1], self.val[::len(self.val)//32+1]
        self.plan = recipe(1000, bs, n_items=len(self.train), size=size, preset=preset)

    def photos(self, in_memory):
        dev = default_device()
        return unlabelled_dls(self.train, self.size, self.bs, valid_pct=0, in_memory=in_memory, device=dev)

    def decoding(self):
        "All photos from files into memory"
        start = time.perf_counter()
        memory = 'device' if cuda else True
        self.dls = self.photos(memory)
        took = time.perf_counter()-start
        yield 'photos decoded, a second', len(self.train)/took

    def learner(self, dls=None, **kw):
        return byol_learner(dls or self.dls, self.arch, recipe=self.plan, precision=self.precision, **kw)

    def steps_with_views(self):
        self.learn = self.learner()
        start = time.perf_counter()
        train_steps(self.learn, max(3, len(self.dls.train)))
        yield 'first epoch, s', time.perf_counter()-start
        yield 'precision', str(self.learn.precision)
        ms = train_steps(self.learn, self.steps)
        yield 'step with views, ms', ms
        yield 'step with views, images/s', 1e3*self.bs/ms
        yield '1000 epochs, minutes', 1000*len(self.dls.train)*ms/6e4

    def busy(self):
        if not cuda: raise RuntimeError('there is no GPU')
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof: train_steps(self.learn, 20)
        yield 'GPU busy, %', 100*busy_share(prof)
        yield 'GPU memory, MB', torch.cuda.max_memory_allocated()/1e6

    def views(self):
        x = torch.rand(self.bs, 3, self.size*5//4, self.size*5//4, device=default_device())
        views = [v.to(x.device) if hasattr(v, 'to') else v for v in byol_views(self.size)]
        yield 'both views, ms', milliseconds(lambda: make_views(views, x), self.steps)

    def steps_without_views(self):
        given = torch.rand(self.bs, 3, self.size, self.size, device=default_device())
        learn = self.learner(views=(lambda x: given[:len(x)], lambda x: given[:len(x)].flip(-1)))
        train_steps(learn, max(3, self.steps//2))
        yield 'step, views given, ms', train_steps(learn, self.steps)

    def parts(self):
        learn, model = self.learn, self.learn.model
        for p in model.parameters():
            if p.requires_grad and p.grad is None: p.grad = torch.zeros_like(p)
        if learn.opt is None: learn.create_opt()
        yield 'optimiser, ms', milliseconds(learn.opt.step, self.steps)
        yield 'target update, ms', milliseconds(lambda: model.update_target(.99), self.steps)

    def from_files(self):
        dls = self.photos(False)
        learn = self.learner(dls)
        yield 'from files each epoch, images/s', 1e3*self.bs/train_steps(learn, max(2, len(dls.train)))

    def evaluation(self):
        labelled = labelled_dls(self.train, self.size, valid=self.val)
        start = time.perf_counter()
        accuracy = knn_accuracy(self.learn, labelled.train, labelled.valid)
        sync()
        yield 'embeddings and kNN, s', time.perf_counter()-start
        yield 'kNN, %', 100*accuracy

    def lightly(self, fast):
        "lightly's documented loop on the device; `fast`: in bfloat16 and channels last"
        loop, dev = registry['lightly'](), default_device()
        layout = torch.channels_last if fast else torch.contiguous_format
        for m in vars(loop).values():
            if isinstance(m, torch.nn.Module): m.to(dev, memory_format=layout)
        def step(*views):
            views = [o.to(dev, memory_format=layout, non_blocking=True) for o in views]
            with torch.autocast(dev.type, torch.bfloat16, enabled=fast): loop.step(*views)
        return step

    def lightly_steps(self):
        views = torch.rand(2, self.bs, 3, self.size, self.size, device=default_device())
        for name, fast in (('as documented', False), ('bf16, channels last', True)):
            step = self.lightly(fast)
            yield f'lightly, {name}, step, views given, ms', milliseconds(lambda: step(*views), self.steps)

    def lightly_from_files(self):
        cores = os.cpu_count()
        for n in sorted({min(cores, 8), cores}):
            photos = Photos(self.train, registry['lightly']().views(self.size))
            dl = DataLoader(photos, self.bs, shuffle=True, drop_last=True, num_workers=n)
            step, start, done = self.lightly(True), None, 0
            for views, _ in dl:
                step(*views)
                if start is None: # the workers' start does not count
                    sync()
                    start = time.perf_counter()
                else: done += self.bs
                if start is not None and time.perf_counter()-start>15: break
            sync()
            if done: yield f'lightly from files, {n} workers, images/s', done/(time.perf_counter()-start)

@call_parse
def main(
    folder:str, # holds train/ and val/ with a folder per class
    smoke:bool=False, # walk through everything a user does instead of measuring
    arch:str='resnet18', # timm name
    size:int=128, # side of the views, in pixels
    bs:int=256, # images per batch
    steps:int=30, # of each measurement
    precision:str='auto', # as in `byol_learner`
    preset:str='imagenette', # recipe
    seed:int=0, # of weights and views
    json:str=None, # file to write the figures to
    out:str=None, # folder for what `--smoke` writes; a temporary one when left out
    tiny:bool=False, # try the command: a small network, few images
):
    "Measure training and evaluation on this machine's GPU, or walk through everything on it"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    if smoke:
        from bench.smoke import walk
        res = walk(folder, out or tempfile.mkdtemp())
        write(setting(steps=res), json)
        sys.exit(any(o!='ok' for o in res.values()))
    if tiny: arch, size, bs, steps = 'test_resnet', 32, min(bs, 16), 2
    set_seed(seed)
    card = torch.cuda.get_device_name() if cuda else 'CPU'
    print(f'{card}, {arch}, {size} pixels, batches of {bs}\n', flush=True)
    report = Report(json, arch=arch, size=size, bs=bs, preset=preset, seed=seed, card=card)
    b = Bench(folder, arch, size, bs, steps, preset, precision, tiny)
    contestants.hidden = 4096 # as wide as the recipe's heads
    report.stage(b.decoding)
    report.stage(b.steps_with_views, limit=150)
    for f in (b.busy, b.views, b.steps_without_views, b.parts, b.from_files, b.evaluation): report.stage(f)
    if not tiny:
        for f in (b.lightly_steps, b.lightly_from_files): report.stage(f)
    best = 'lightly, bf16, channels last, step, views given, ms'
    report.ratio("step with views, of lightly's with views given", 'step with views, ms', best)
    workers = f'lightly from files, {os.cpu_count()} workers, images/s'
    report.ratio("images/s with views, of lightly's from files", 'step with views, images/s', workers)
    write(report.res, json)
