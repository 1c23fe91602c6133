"""Imagenette as others run it: kNN, linear and few-label accuracy after a given number of epochs

    python -m bench imagenette FOLDER --epochs 100,200,800            # ResNet-18, 128 pixels, batches of 256
    python -m bench imagenette FOLDER --sizes 64,96,128               # views grow over the run
    python -m bench imagenette FOLDER --body FILE                     # measure a body of `save_body`, and share it
    python -m bench imagenette FOLDER --tiny                          # two epochs of a small network, to try it

FOLDER holds train/ and val/ with a folder per class. The recipe is the preset 'imagenette'. A call stops after
`--minutes`, at the end of an epoch; the same command resumes from the checkpoints in `--out`, until all runs are
done. Each leaves its figures, its body and a folder with a card for `from_hub`. Published figures to compare with:
lightly's BYOL reaches 70.5 % kNN after 200 epochs and 88.7 % after 800; DeepMind reaches 92.3 % linear after 1000.
"""
import logging, time, warnings
from json import dumps, loads
from pathlib import Path

import torch
from fastai.vision.all import Callback, set_seed
from fastcore.script import call_parse

from bench.timing import setting, table, write
from fastbyol.core import dl_n
from fastbyol.all import (CheckpointCallback, KNNCallback, as_encoder, byol_learner, find_images, knn_accuracy,
    label_efficiency, labelled_dls, linear_eval, load_body, recipe, save_body, unlabelled_dls)
from fastbyol.interop import from_hub, to_hub

published = {'lightly, 200 epochs, kNN': 70.5, 'lightly, 800 epochs, kNN': 88.7, 'DeepMind, 1000 epochs, linear': 92.3}

class Stopwatch(Callback):
    "Notes seconds and kNN of each epoch in a file, and stops the run at the time `end`"
    order, run_valid = 1010, False # after the checkpoint is written
    def __init__(self, file, end):
        self.file, self.end = file, end
        self.notes = loads(file.read_text()) if file.exists() else []
    def before_epoch(self): self.start = time.perf_counter()
    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names, self.recorder.log))
        note = dict(epoch=self.epoch+1, seconds=time.perf_counter()-self.start, loss=row.get('train_loss'))
        if isinstance(row.get('knn'), float) and row['knn']==row['knn']: note['knn'] = row['knn']
        self.notes = [o for o in self.notes if o['epoch']<=self.epoch] + [note]
        self.file.write_text(dumps(self.notes))
        if 'knn' in note: print(f"epoch {self.epoch+1:4}  {note['seconds']:6.1f} s  kNN {100*note['knn']:.1f} %")
        if time.perf_counter()<self.end or self.epoch+1==self.n_epoch: return
        self.learn.checkpoint.save_now()
        raise KeyboardInterrupt

def evaluate(source, labelled, brief, tiny):
    "Figures of a body, one after the other: (name, percent)"
    yield 'kNN', 100*knn_accuracy(source, labelled.train, labelled.valid)
    yield 'linear, logistic regression', 100*linear_eval(source, labelled, fast=True).top1
    if brief: return
    yield 'linear', 100*linear_eval(source, labelled, epochs=2 if tiny else 80).top1
    few = label_efficiency(source, labelled, pct=(.01, .1), seeds=1, steps=20 if tiny else 300)
    for row in few.to_dict('records'): yield f"{row['contestant']}, {100*row['pct']:g} % of labels", 100*row['mean']

def open_photos(folder, size, bs, tiny=False):
    "Photos to pretrain on, and labelled ones to measure on"
    train, val = (find_images(f'{folder}/{o}') for o in ('train', 'val'))
    if tiny: train, val = train[::max(1, len(train)//64)], val[::max(1, len(val)//32)]
    start = time.perf_counter()
    dls, labelled = unlabelled_dls(train, size, bs, valid_pct=0), labelled_dls(train, size, valid=val)
    print(f"{len(train):,} + {len(val):,} photos opened in {time.perf_counter()-start:.1f} s", flush=True)
    return dls, labelled

def measure(source, labelled, out, brief, tiny, **about):
    "Measure a body, and write its figures, its file and a folder to share; `about` tells how it was made"
    res = about | dict(accuracy={}, published=published)
    for nm, o in evaluate(source, labelled, brief, tiny):
        res['accuracy'][nm] = o
        print(f'{nm}: {o:.1f} %', flush=True)
        write(res, out/'figures.json')
    notes = {k: v for k, v in res.items() if k not in ('accuracy', 'published', 'curve') and v is not None}
    notes |= {f'{nm}, %': round(o, 1) for nm, o in res['accuracy'].items()}
    body = save_body(source, out/'body', dtype=torch.float16, **notes)
    shared = to_hub(body, f'local-dir:{out}/hub', 'apache-2.0')
    print(f"kNN of {shared}: {100*knn_accuracy(from_hub(shared), labelled.train, labelled.valid):.1f} %\n")
    table(['', '%'], [[nm, f'{o:.1f}'] for nm, o in [*res['accuracy'].items(), *published.items()]])

def run(data, epochs, arch, grow, every, end, seed, out, **kw):
    "Pretrain, or resume, and measure; False: the time is over"
    if (out/'hub').exists(): return True # done by an earlier call
    (dls, labelled), watch = data, Stopwatch(out/'epochs.json', end)
    plan = recipe(epochs, dls.train.bs, n_items=dl_n(dls.train), size=dls.view_size, preset='imagenette')
    set_seed(seed)
    cbs = [KNNCallback(labelled, every=every), CheckpointCallback(out/'checkpoints', every, keep=1), watch]
    learn = byol_learner(dls, arch, recipe=plan, cbs=cbs)
    learn.resume(out/'checkpoints', missing_ok=True)
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_byol(sizes=grow)
    except KeyboardInterrupt: # by the watch, or by hand
        print(f"Stopped after epoch {len(watch.notes)} of {epochs}: give the same command again to resume")
        return False
    seconds = sum(o['seconds'] for o in watch.notes)
    print(f'\n{epochs} epochs in {seconds:.0f} s')
    curve = {o['epoch']: o['knn'] for o in watch.notes if 'knn' in o}
    made = setting(arch=arch, size=plan.size, bs=plan.bs, epochs=epochs, sizes=grow, seed=seed, precision=learn.precision,
                   seconds=round(seconds), curve=curve)
    measure(learn, labelled, out, **kw, **made)
    return True

@call_parse
def main(
    folder:str, # holds train/ and val/
    epochs:str='100', # of the whole run; several runs, one after the other, with commas between
    size:int=128, # side of the views, in pixels
    bs:int=256, # images per batch
    arch:str='resnet18', # timm name
    sizes:str=None, # sides of the views over the run, such as 64,96,128; the last is where it is measured
    every:int=10, # epochs from one kNN, and one checkpoint, to the next
    minutes:float=9., # after which this call stops; the same command resumes
    seed:int=0, # of weights and views
    out:str='imagenette-run', # folder with a folder for each run
    body:str=None, # file of `save_body` to measure; nothing is trained
    brief:bool=False, # measure kNN and logistic regression alone
    tiny:bool=False, # try the command: two epochs, 64 images, a small network
):
    "Pretrain on Imagenette with the preset 'imagenette', and evaluate"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    end, kw = time.perf_counter()+60*minutes, dict(brief=brief, tiny=tiny)
    if tiny: epochs, size, bs, arch, every = '2', 32, 16, 'test_resnet', 1
    grow = tuple(map(int, sizes.split(','))) if sizes else None
    data = open_photos(folder, size, bs, tiny)
    if body:
        where = Path(out)/Path(body).stem; where.mkdir(parents=True, exist_ok=True)
        loaded = load_body(body)
        return measure(as_encoder(loaded), data[1], where, **kw, **loaded[1]['info'])
    for n in map(int, epochs.split(',')):
        where = Path(out)/f"{n}{'-growing'*bool(grow)}-seed{seed}"; where.mkdir(parents=True, exist_ok=True)
        if not run(data, n, arch, grow, every, end, seed, where, **kw): break
