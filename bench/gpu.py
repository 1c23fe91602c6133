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

def train_steps(learn, n, warm=5, prof=None):
    "Train for `warm` steps, in which graphs are captured, and `n` more; ms of each of these, the GPU's work included"
    count, start, took = 0, None, None
    def tick(_):
        nonlocal count, start, took
        count += 1
        if count not in (warm, warm+n): return
        sync()
        if count==warm+n:
            took = time.perf_counter()-start
            raise Stop()
        if prof: prof.start()
        start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(1+(warm+n)//len(learn.dls.train), cbs=[clock(tick)])
    if prof: prof.stop()
    return 1e3*took/n

def busy_and_whole(prof):
    "Time in which a kernel was at work, and from the first to the end of the last, in ms"
    on_gpu = [e for e in prof.events() if e.device_type==torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
    total, end = 0, spans[0][0]
    for a, b in spans: total, end = total+max(0, b-max(a, end)), max(end, b)
    return total/1e3, (end-spans[0][0])/1e3

lightly_ways = {False: 'as documented', True: 'bf16, channels last'}

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
        ms = train_steps(self.learn, self.steps)
        yield 'captured and trained for the first steps, s', time.perf_counter()-start
        yield 'precision', str(self.learn.precision)
        yield 'graphs', getattr(getattr(self.learn, 'graphed_passes', None), 'why_not', 'not on this device') or 'yes'
        yield 'step with views, not compiled, ms', ms
        yield 'step with views, images/s', 1e3*self.bs/ms
        yield '1000 epochs, minutes', 1000*len(self.dls.train)*ms/6e4

    def compiled_steps(self):
        if not cuda: raise RuntimeError('there is no GPU')
        learn = self.learner(compile=True)
        start = time.perf_counter()
        ms = train_steps(learn, self.steps)
        yield 'compiled, captured and trained for the first steps, s', time.perf_counter()-start
        yield 'step with views, compiled, ms', ms

    def busy(self):
        if not cuda: raise RuntimeError('there is no GPU')
        prof = profile(activities=[ProfilerActivity.CUDA])
        train_steps(self.learn, 20, prof=prof)
        busy, whole = busy_and_whole(prof)
        yield 'GPU busy, %', 100*busy/whole
        yield 'GPU at work in a step, ms', busy/20
        yield 'GPU memory, MB', torch.cuda.max_memory_allocated()/1e6

    def views(self):
        x = torch.rand(self.bs, 3, self.size*5//4, self.size*5//4, device=default_device())
        views = [v.to(x.device) if hasattr(v, 'to') else v for v in byol_views(self.size)]
        def both(): make_views(views, x)
        yield 'both views, ms', milliseconds(both, self.steps)
        sync()
        start = time.perf_counter()
        for _ in range(5): both() # few, so that they fit in the queue of the GPU
        yield 'both views, ms of the host', 1e3*(time.perf_counter()-start)/5
        if not cuda: return
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            for _ in range(10): both()
            sync()
        yield 'both views, ms of the GPU', busy_and_whole(prof)[0]/10

    def steps_without_views(self):
        given = torch.rand(self.bs, 3, self.size, self.size, device=default_device())
        learn = self.learner(views=(lambda x: given[:len(x)], lambda x: given[:len(x)].flip(-1)))
        yield 'step, views given, not compiled, ms', train_steps(learn, self.steps)

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
        yield 'from files each epoch, images/s', 1e3*self.bs/train_steps(learn, max(2, len(dls.train)), warm=2)

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
        for fast, name in lightly_ways.items():
            step = self.lightly(fast)
            yield f'lightly, {name}, step, views given, ms', milliseconds(lambda: step(*views), self.steps)

    def lightly_from_files(self, fast, seconds=8):
        "The documented pipeline, with a worker for every core"
        n = os.cpu_count()
        photos = Photos(self.train, registry['lightly']().views(self.size))
        dl = DataLoader(photos, self.bs, shuffle=True, drop_last=True, num_workers=n, persistent_workers=True)
        step, start, done = self.lightly(fast), None, 0
        while start is None or time.perf_counter()-start<seconds:
            for views, _ in dl:
                step(*views)
                sync()
                if start is None: start = time.perf_counter() # the workers' start does not count
                else: done += self.bs
                if time.perf_counter()-start>seconds: break
        yield f"lightly from files, {lightly_ways[fast]}, images/s", done/(time.perf_counter()-start)

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
    seconds:float=175, # for all measurements; what does not fit is named as missing
):
    "Measure training and evaluation on this machine's GPU, or walk through everything on it"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    if smoke:
        from bench.smoke import walk
        res = walk(folder, out or tempfile.mkdtemp())
        write(setting(steps=res), json)
        sys.exit(any(o!='ok' for o in res.values()))
    if tiny: arch, size, bs, steps = 'test_resnet', 32, min(bs, 8), 2
    set_seed(seed)
    card = torch.cuda.get_device_name() if cuda else 'CPU'
    print(f'{card}, {arch}, {size} pixels, batches of {bs}\n', flush=True)
    report = Report(json, arch=arch, size=size, bs=bs, preset=preset, seed=seed, card=card)
    b = Bench(folder, arch, size, bs, steps, preset, precision, tiny)
    contestants.hidden = 4096 # as wide as the recipe's heads
    end = time.perf_counter()+seconds
    def stage(f, *args, limit=30):
        left = end-time.perf_counter()
        if left>0: report.stage(f, *args, limit=min(limit, left))
        else: report.res['missing'][f.__name__] = 'no time left'
    stage(b.decoding)
    stage(b.steps_with_views)
    for f in (b.lightly_steps, b.views, b.steps_without_views, b.evaluation, b.busy, b.parts): stage(f)
    stage(b.compiled_steps, limit=75) # half a minute on an H200
    for fast in lightly_ways: stage(b.lightly_from_files, fast, 2 if tiny else 8)
    stage(b.from_files)
    for name in lightly_ways.values():
        report.ratio(f"step with views, of lightly's with views given, {name}",
                     'step with views, not compiled, ms', f'lightly, {name}, step, views given, ms')
        report.ratio(f"images/s with views, of lightly's from files, {name}",
                     'step with views, images/s', f'lightly from files, {name}, images/s')
    write(report.res, json)
