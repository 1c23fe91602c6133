"""A walk through all that a user does, a line for each step: `python -m bench gpu --smoke FOLDER`

FOLDER holds train/ and val/ with a folder per class. Without a GPU it runs with a tiny network and few images.
"""
import subprocess, sys, time, traceback
from pathlib import Path

from fastai.vision.all import *
from fastbyol.all import *
from fastbyol.explore import find_duplicates, find_outliers, plot_embeddings, suggest_labels
from fastbyol.interop import from_hub, to_hub
from bench.kornia_views import kornia_view

steps = {}
def step(*choices):
    "Add a function to the walk, once for each of `choices`"
    def add(f):
        for o in choices or [None]:
            name = f.__name__ if o is None else f'{f.__name__}: {o}'
            steps[name] = f if o is None else partial(lambda f, o, walk: f(walk, o), f, o)
        return f
    return add

class Walk:
    "What the steps share"
    def __init__(self, folder, out):
        self.root, self.out, self.cuda = Path(folder), Path(out), torch.cuda.is_available()
        n_train, n_val = (60, 20) if self.cuda else (6, 4)
        self.arch, self.bs = ('resnet18', 32) if self.cuda else ('test_resnet', 8)
        self.train, self.val = self.pick('train', n_train), self.pick('val', n_val)
        self.labelled = labelled_dls(self.train, 64, bs=16, valid=self.val)
    def pick(self, part, n):
        return [f for c in sorted((self.root/part).iterdir()) if c.is_dir() for f in sorted(find_images(c))[:n]]
    def dls(self, **kw): return unlabelled_dls(self.train, 64, self.bs, valid_pct=.1, **kw)
    def learner(self, dls=None, **kw): return byol_learner(dls or self.dls(), self.arch, **kw)
    def fit(self, learn, f='fit', *args, **kw):
        with learn.no_bar(), learn.no_logging(): getattr(learn, f)(*args, **kw)
        return [round(float(o), 3) for o in learn.recorder.values[-1]] if len(learn.recorder.values) else None
    def graphs_of(self, learn):
        "Did it train with graphs, or why not?"
        if not hasattr(learn, 'graphed_passes'): return 'no graphs on this device'
        return learn.graphed_passes.why_not or 'graphs'
    @property
    def trained(self):
        if not hasattr(self, '_trained'):
            self._trained = self.learner(recipe=recipe(2, self.bs))
            self.fit(self._trained, 'fit_byol')
        return self._trained
    @property
    def body(self): return save_body(self.trained, self.out/'body', epochs=2)
    def photos(self, **kw):
        return ImageDataLoaders.from_path_func(self.root, self.train, parent_label, item_tfms=Resize(64), bs=16, **kw)

# --- pretraining

@step()
def fit_byol(w):
    learn = w.trained
    return learn.precision, str(learn.model.mean.device), w.graphs_of(learn), learn.recorder.values[-1]
@step()
def one_cycle(w): return w.fit(w.learner(), 'fit_one_cycle', 1, 1e-3)
@step('auto', 'device', True, 'disk', False)
def in_memory(w, o): return w.fit(w.learner(w.dls(in_memory=o, cache_dir=str(w.out/'cache'))), 'fit', 2, 1e-3)
@step('fp32', 'channels_last', 'bf16', 'fp16', 'auto')
def precision(w, o):
    if not w.cuda and o=='fp16': return 'on a GPU only'
    return w.fit(w.learner(precision=o), 'fit', 1, 1e-3)
@step()
def to_fp16(w): return w.fit(w.learner().to_fp16(), 'fit', 1, 1e-3)
@step()
def views_of_kornia(w): return w.fit(w.learner(views=tuple(map(kornia_view, byol_views(64)))), 'fit', 1, 1e-3)
@step()
def simsiam(w): return w.fit(w.learner(momentum=False), 'fit', 1, 1e-3)
@step()
def accumulation_and_clipping(w):
    return w.fit(w.learner(cbs=[GradientAccumulation(2*w.bs), GradientClip(1.)]), 'fit', 1, 1e-3)
@step()
def monitors(w):
    learn = byol_learner(w.photos(), w.arch, size=64, cbs=[KNNCallback(w.labelled), OnlineProbe(), HealthMonitor()])
    w.fit(learn, 'fit', 2, 1e-3)
    learn.plot_curves()
    return learn.health.report(), w.graphs_of(learn)
@step()
def a_second_fit_after_freeze(w):
    learn = w.learner()
    w.fit(learn, 'fit', 1, 1e-3)
    learn.freeze()
    return w.fit(learn, 'fit', 1, 1e-3), w.graphs_of(learn)
@step()
def growing_views(w): return w.fit(w.learner(), 'fit_byol', 2, 1e-3, sizes=(32, 64))
@step()
def teacher(w): return w.fit(w.learner(teacher=w.body), 'fit', 1, 1e-3)
@step()
def compiled(w):
    learn = w.learner(compile=True)
    return w.fit(learn, 'fit', 1, 1e-3), w.graphs_of(learn)
@step('plain', 'simsiam', 'accumulation', 'clipping')
def graphs_give_the_same_in_20_steps(w, o):
    kw = dict(momentum=False) if o=='simsiam' else {}
    torch.backends.cudnn.allow_tf32 = False # or both could use other algorithms
    def run(graphs):
        set_seed(0)
        cbs = dict(accumulation=GradientAccumulation(2*w.bs), clipping=GradientClip(1.)).get(o)
        learn = w.learner(precision='fp32', graphs=graphs, cbs=cbs, opt_func=SGD, **kw)
        def weights(): return nn.utils.parameters_to_vector(trainable_params(learn.model)).detach().cpu()
        before = weights()
        w.fit(learn, 'fit', 1+20//len(learn.dls.train), 1e-4)
        return before, weights(), w.graphs_of(learn)
    (_, a, used), (start, b, _) = run(True), run(False)
    apart = ((a-b).norm()/(b-start).norm()).item() # rounding grows tenfold within ten steps
    assert apart<.1 and (used=='graphs' or not w.cuda), (apart, used)
    return f'apart by {100*apart:.1g} % of the way, {used}'
@step()
def lr_find(w):
    learn = w.learner()
    with learn.no_bar(): return learn.lr_find(show_plot=False)
@step()
def validation_is_deterministic(w):
    with w.trained.no_bar(): a, b = (w.trained.validate()[0] for _ in range(2))
    assert a==b, (a, b)
    return a
@step('convnext_atto', 'vit_tiny_patch16_224', 'efficientnet_b0', 'swin_tiny_patch4_window7_224')
def arch(w, o):
    if not w.cuda: return 'on a GPU only'
    dls = unlabelled_dls(w.train[:128], 224 if '224' in o else 64, 16, valid_pct=.1)
    return w.fit(byol_learner(dls, o), 'fit', 1, 1e-3)

# --- pictures, files, resuming

@step()
def show_views(w): w.trained.byol.show_views().savefig(w.out/'views.png')
@step()
def resume(w):
    def run(name, stop):
        set_seed(0)
        learn = w.learner(recipe=recipe(3, w.bs), cbs=CheckpointCallback(w.out/name))
        learn.resume(w.out/name, missing_ok=True)
        try: w.fit(learn, 'fit_byol', cbs=StopAfter(2) if stop else None)
        except KeyboardInterrupt: pass
        return learn.model.state_dict()
    whole, _, resumed = run('whole', False), run('parts', True), run('parts', False)
    return f"largest difference {max((whole[k].float()-resumed[k].float()).abs().max().item() for k in whole)}"
class StopAfter(Callback):
    order = 1010 # after the checkpoint is written
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1==self.n: raise KeyboardInterrupt
@step()
def export(w):
    w.trained.export(w.out/'e.pkl')
    return type(load_learner(w.out/'e.pkl', cpu=not w.cuda).model).__name__

# --- hand over

@step()
def body_file(w): return load_body(w.body)[1]['arch']
@step()
def hub_folder(w): return type(from_hub(to_hub(w.body, f"local-dir:{w.out/'hub'}"))).__name__
@step()
def vision_learner_of_the_learner(w):
    return w.fit(w.trained.to_vision_learner(w.photos(), metrics=accuracy), 'fine_tune', 1)
@step()
def vision_learner_of_a_file_fp16(w):
    return w.fit(byol_vision_learner(w.photos(), w.body, metrics=accuracy).to_fp16(), 'fine_tune', 1)
@step()
def unet(w):
    def mask(f): return (np.array(Image.open(f).convert('L').resize((64,64)))>100).astype(np.uint8)
    block = DataBlock((ImageBlock, MaskBlock(['a','b'])), get_y=mask, item_tfms=Resize(64))
    learn = byol_learner(w.dls(), 'resnet18')
    return w.fit(learn.to_unet_learner(block.dataloaders(w.train[:32], bs=8)), 'fit', 1)
@step()
def timm_model(w): return type(to_timm(w.trained)).__name__

# --- evaluation and the pool

@step()
def knn(w): return knn_accuracy(w.trained, w.labelled.train, w.labelled.valid)
@step()
def linear(w):
    ways = dict(fast=True), dict(epochs=2)
    return [str(linear_eval(w.trained, w.labelled, **kw)).splitlines()[0] for kw in ways]
@step()
def few_labels_compared(w):
    return label_efficiency(w.trained, w.labelled, per_class=(1,), seeds=1, steps=5).table().to_dict()
@step()
def pool(w):
    plot_embeddings(w.trained, w.labelled.valid).figure.savefig(w.out/'map.png')
    tools = find_duplicates, find_outliers, suggest_labels
    return [len(tool(w.trained, w.labelled.train, **({} if tool is find_duplicates else dict(n=5)))) for tool in tools]

# --- commands

def command(w, name, *args):
    code = f'import sys; from fastbyol.cli import {name}_main as main; sys.argv[0] = "fastbyol-{name}"; main()'
    cmd = [sys.executable, '-W', 'ignore', '-c', code, *map(str, args)]
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=180)
    assert done.returncode==0, done.stderr[-600:]
    return (done.stdout.strip().splitlines() or [''])[-1]
@step('first', 'again')
def pretrain_command(w, o):
    args = '--arch', w.arch, '--epochs', 2, '--size', 64, '--bs', 16, '--out', w.out/'run'
    return command(w, 'pretrain', w.root/'val', *args)
@step()
def finetune_command(w):
    return command(w, 'finetune', w.out/'run/body.safetensors', w.root/'val', '--out', w.out/'classifier')
@step()
def eval_command(w):
    quick = '--draws', 1, '--steps', 5, '--per_class', '1'
    return command(w, 'eval', w.out/'run/body.safetensors', w.root, '--out', w.out/'evaluation', *quick)
@step()
def embed_command(w): return command(w, 'embed', w.out/'run/body.safetensors', w.root/'val', w.out/'e.npz')

def walk(folder, out, seconds=540):
    "Run every step, each guarded; returns {name: 'ok' or the error}"
    w, res, end = Walk(folder, out), {}, time.perf_counter()+seconds
    for name, f in steps.items():
        if time.perf_counter()>end: res[name] = 'no time left'; continue
        start = time.perf_counter()
        try:
            shown, res[name] = f(w), 'ok'
            print(f"ok   {name:<40} {time.perf_counter()-start:6.1f} s  {str(shown)[:200]}", flush=True)
        except BaseException as e:
            if isinstance(e, (SystemExit, KeyboardInterrupt)) and not str(e): raise
            res[name] = f'{type(e).__name__}: {e}'[:400]
            print(f'BAD  {name:<40} {res[name]}', flush=True)
            traceback.print_exc(limit=-4)
    n_ok = sum(o=='ok' for o in res.values())
    print(f"\n{n_ok} of {len(res)} steps passed")
    return res
