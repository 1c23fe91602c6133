"""A step on a GPU: images per second, how long the GPU is busy, where the time goes, and the share of its peak that is used

    python -m bench gpu FOLDER                          # ResNet-18, 128 pixels, batches of 256, the recipe 'imagenette'
    python -m bench gpu FOLDER --json gpu.json --chart gpu.png

FOLDER holds images at any depth. They are decoded once and kept on the GPU. One epoch warms up, the next is timed as it is; then `--steps` steps run under torch's
profiler, which tells when a kernel was at work, and as many with a pause after each part, which tells where the time goes. MFU is the
floating-point operations of one step, counted by torch, by the time of a step and the peak of the card in the precision that is used.
Without a GPU it runs on the CPU, with all but busy time and MFU.

The long run, DeepMind's 1000 epochs, is the command's; given again, it goes on where it was stopped:

    fastbyol-pretrain FOLDER/train --arch resnet18 --preset imagenette --epochs 1000 --bs 256 --size 128 --watch_knn FOLDER --out run
    fastbyol-eval run/body.safetensors FOLDER
"""
import logging, time, warnings
from collections import defaultdict

import torch
from fastai.vision.all import Callback, default_device, set_seed
from fastcore.script import call_parse
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.contestants import Stop, clock
from bench.timing import setting, table, write
from fastbyol.all import byol_learner, find_images, recipe, unlabelled_dls

# dense products, in TFLOP/s, by NVIDIA's data sheets: bfloat16, and float32 without and with TF32
peaks = {'H200': dict(bf16=989, fp16=989, tf32=494, fp32=67), 'H100': dict(bf16=989, fp16=989, tf32=494, fp32=67), 'A100': dict(bf16=312, fp16=312, tf32=156, fp32=19.5)}

def sync(): torch.cuda.synchronize() if torch.cuda.is_available() else None

def peak_tflops(precision, name):
    "Of the card `name` in `precision`; None where it is not known"
    return next((v.get(precision, v['fp32']) for k, v in peaks.items() if k in name), None)

class Mark(Callback):
    "Adds the time since the last mark to a part of the step, after the GPU has finished it"
    run_valid = False
    def __init__(self, clock, order, **events): self.clock, self.order, self.events = clock, order, events
    def __call__(self, event_name):
        if event_name in self.events and self.training: self.clock.mark(self.events[event_name])

class Parts:
    "Seconds of each part of a step, by callbacks around those of the `Learner`"
    def __init__(self, learn):
        self.secs, self.on = defaultdict(float), False
        model = learn.model
        self.hook = model.target['body'].register_forward_pre_hook(lambda *a: self.mark('views')) if model.momentum else None
        first = Mark(self, -100, before_batch='data')
        last = Mark(self, 100, before_batch='target', after_pred='online, forward', after_loss='loss', before_step='online, backward', after_batch='target update, callbacks')
        early = Mark(self, -99, after_step='optimiser')
        self.cbs = [first, early, last]
    def mark(self, part):
        sync()
        now = time.perf_counter()
        if self.on: self.secs[part] += now-self.last
        self.last = now
    def __enter__(self): self.on, self.last = True, time.perf_counter(); return self
    def __exit__(self, *a):
        self.on = False
        if self.hook: self.hook.remove()

def some_steps(learn, n, cbs=()):
    "Train for `n` steps; their seconds, the GPU's work included"
    done = []
    def tick(_):
        done.append(1)
        if len(done)==n: raise Stop()
    sync()
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(1+n//len(learn.dls.train), cbs=[clock(tick), *cbs])
    sync()
    return time.perf_counter()-start

def busy(prof):
    "Seconds in which at least one kernel was at work, and from the first to the last"
    spans = sorted((e.time_range.start, e.time_range.end) for e in prof.events() if e.device_type==torch.autograd.DeviceType.CUDA)
    if not spans: return None
    total, end = 0, spans[0][0]
    for a, b in spans: total, end = total+max(0, b-max(a, end)), max(end, b)
    return total/1e6, (end-spans[0][0])/1e6

@call_parse
def main(
    folder:str, # images at any depth
    arch:str='resnet18', # timm name
    size:int=128, # side of the views, in pixels
    bs:int=256, # images per batch
    steps:int=20, # under the profiler, and with pauses
    precision:str='auto', # as in `byol_learner`
    preset:str='imagenette', # recipe
    images:int=None, # of the folder's; all when left out
    seed:int=0, # of weights and views
    json:str=None, # file to write the figures to
    chart:str=None, # picture to draw
):
    "Measure a step of BYOL on this machine's GPU"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    set_seed(seed)
    cuda, files = torch.cuda.is_available(), find_images(folder)[:images]
    start = time.perf_counter()
    dls = unlabelled_dls(files, size, bs, valid_pct=0, in_memory='device' if cuda else True, device=default_device())
    decoded = time.perf_counter()-start
    learn = byol_learner(dls, arch, recipe=recipe(1000, bs, n_items=len(files), size=size, preset=preset), precision=precision)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    n = len(dls.train)
    per_step = some_steps(learn, n)/n
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as prof: some_steps(learn, steps)
    with (FlopCounterMode(display=False) as flops): some_steps(learn, 1)
    with (parts := Parts(learn)): some_steps(learn, steps, parts.cbs)
    used, total = busy(prof), sum(parts.secs.values())
    card = torch.cuda.get_device_name() if cuda else None
    peak = peak_tflops(learn.precision, card) if cuda else None
    res = setting(arch=arch, size=size, bs=bs, preset=preset, images=len(files), seed=seed, precision=learn.precision, decode_s=decoded, step_s=per_step, images_per_s=bs/per_step,
                  gflop_per_step=flops.get_total_flops()/1e9, parts={k: v/steps for k, v in parts.secs.items()}, busy=used and used[0]/used[1], peak_tflops=peak,
                  mfu=peak and flops.get_total_flops()/per_step/peak/1e12, memory_mb=torch.cuda.max_memory_allocated()/1e6 if cuda else None)
    print(f"{card or res['cpu']}, {arch}, {size} pixels, batches of {bs}, {learn.precision}: {len(files):,} images decoded in {decoded:.0f} s\n")
    table(['', 'ms a step', '%'], [[k, f'{1e3*v/steps:.1f}', f'{100*v/total:.0f}'] for k, v in parts.secs.items()])
    print(f"\n{res['images_per_s']:,.0f} images/s, {1e3*per_step:.1f} ms a step without pauses, {res['gflop_per_step']:,.0f} GFLOP")
    print(f"1000 epochs of them: {1000*n*per_step/60:.0f} minutes")
    if used: print(f"GPU busy {100*res['busy']:.1f} % of the time (at least 95), memory {res['memory_mb']:,.0f} MB")
    else: print('Busy time and MFU are of a GPU, and there is none')
    if cuda: print(f"MFU {100*res['mfu']:.1f} % of {peak} TFLOP/s" if peak else f"MFU: the peak of {card} is not known, add it to `peaks`")
    write(res, json, chart, 'ms a step', {k: (1e3*v/steps,)*3 for k, v in parts.secs.items()})
