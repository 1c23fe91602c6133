"""BYOL on real photos with two cores and a quarter of an hour: does pretraining help?

    python examples/imagenette_cpu.py                      # downloads Imagenette (160 px) through fastai
    python examples/imagenette_cpu.py --path FOLDER        # a folder with train/ and val/, each with a folder per class

Pretrains a small residual network at 64 px on the training photos without their labels for the minutes asked for, then prints kNN
accuracy on the validation photos before and after, and what 10 labels per class are worth with and without pretraining.
"""
import platform, time, warnings
from datetime import date
from fastcore.script import call_parse
from fastai.vision.all import *
from fastbyol.all import *
from fastbyol.demo import small_resnet

class EpochLog(Callback):
    "Prints the loss of each epoch"
    def before_fit(self): self.start = time.time()
    def after_epoch(self):
        print(f"  epoch {self.epoch+1:2} of {self.n_epoch}: loss {self.recorder.log[1]:.3f}, {(time.time()-self.start)/60:4.1f} min", flush=True)

def step_seconds(learn, n=10):
    "Seconds of a training step, after two to warm up"
    times = []
    class Clock(Callback):
        def after_batch(self):
            times.append(time.time())
            if len(times)==n+2: raise CancelFitException('measured')
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=Clock())
    return float(np.median(np.diff(times[1:])))

@call_parse
def main(
    path:str=None, # folder with train/ and val/; Imagenette is downloaded when left out
    minutes:float=14., # time for pretraining
    size:int=64, # side of the views in pixels
    bs:int=64, # images per batch
    draws:int=5, # draws of 10 labels per class
    seed:int=0, # seed
):
    "BYOL on Imagenette on a CPU"
    warnings.filterwarnings('ignore', category=FutureWarning) # of torch, about its own modules
    path = Path(path) if path else untar_data(URLs.IMAGENETTE_160)
    train,test = find_images(path/'train'),find_images(path/'val')
    set_seed(seed)
    start = time.time()
    dls = unlabelled_dls(train, size, bs, valid_pct=0, in_memory=True)
    labelled = labelled_dls(train, size, valid=test)
    print(f"{date.today()}, {torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, seed {seed}")
    print(f"{len(train):,} photos to pretrain on, {len(test):,} put aside, decoded in {time.time()-start:.0f} s")

    kw = dict(arch=small_resnet(3, (32,64,128,256)), tau=.99, hidden_size=1024)
    per_step = step_seconds(byol_learner(dls, **{**kw, 'arch':deepcopy(kw['arch'])}))
    epochs = max(1, int(minutes*60/(per_step*len(dls.train))))
    print(f"{1000*per_step:.0f} ms per step of {bs} images: {epochs} epochs of {len(dls.train)} steps")
    learn = byol_learner(dls, **kw)
    before = knn_accuracy(learn, labelled.train, labelled.valid)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 2e-3, cbs=EpochLog())
    after = knn_accuracy(learn, labelled.train, labelled.valid)
    print(f"kNN on the photos put aside: {100*before:.1f} % with random weights, {100*after:.1f} % after pretraining")

    res = label_efficiency(learn, labelled, per_class=(10,), seeds=draws, steps=150, seed=seed)
    print(f"\n10 labels per class, accuracy in % on the photos put aside (mean ± standard error of {draws} draws)\n")
    print(res.table().to_string())
    print(f"\n{(time.time()-start)/60:.1f} min in all")
