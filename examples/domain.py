"""A domain of your own: do published weights get better by BYOL on your unlabelled images?

    python examples/domain.py FOLDER                    # FOLDER has a folder of images for each class
    python examples/domain.py FOLDER --weights FILE     # published weights from a local file instead of a download

Half of each class is the pool: BYOL sees it without labels, and a few of its images are labelled later. All accuracies are on the other half.
Compares the published weights as they are, the same after BYOL on the pool, training from scratch and bare pixels. The body of the last
epoch is measured, so nothing is chosen by labels.
"""
import json, platform, sys, time, warnings
from datetime import date
from fastcore.script import call_parse
from fastai.vision.all import *
from fastbyol.all import *

class EpochLog(Callback):
    "Prints loss and nearest neighbours after each epoch"
    order = KNNCallback.order+20
    def before_fit(self): self.start = time.time()
    def after_epoch(self):
        loss,knn,minutes = self.recorder.log[1],self.learn.knn.rows[-1]['knn'],(time.time()-self.start)/60
        print(f"  epoch {self.epoch+1:2} of {self.n_epoch}: loss {loss:.3f}, kNN {100*knn:.1f} %, {minutes:.1f} min", flush=True)

@call_parse
def main(
    folder:str, # images, in a folder for each class
    arch:str='tf_efficientnet_lite0', # timm name of the body
    weights:str=None, # file of its published weights; downloaded when left out
    epochs:int=10, # epochs of BYOL
    size:int=96, # side of the views and of the labelled images, in pixels
    bs:int=64, # images per batch
    hidden:int=1024, # hidden width of the heads
    per_class:str='1,5,10,25', # labels per class
    draws:int=5, # draws of labels
    steps:int=50, # optimiser steps of fine-tuning and of training from scratch
    measure:str='all', # 'linear', 'fine-tuned', 'scratch' or 'all'
    body:str=None, # file of a body that an earlier call pretrained, to measure it alone
    seed:int=0, # of the halves, of BYOL and of the first draw
    out:str=None, # file for the body and, as JSON, for all figures
    freeze_bn:bool=True, # keep the statistics of the body's batch norms?
):
    "Published weights against BYOL from them on a domain of your own"
    warnings.filterwarnings('ignore', category=FutureWarning) # of torch, about its own modules
    set_seed(seed)
    pool,test = split_files(folder, .5, seed)
    labelled = labelled_dls(pool, size, bs, valid=test, in_memory=True)
    print(f"{date.today()}, {torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, seed {seed}")
    print(f"{len(pool):,} images of {len(labelled.vocab)} classes in the pool, {len(test):,} to measure on", flush=True)

    overlay = dict(pretrained_cfg_overlay=dict(file=weights)) if weights else {}
    about = dict(command=' '.join(['python', *sys.argv]), date=str(date.today()), images=len(pool), size=size)
    if body: source = body
    else:
        unlabelled = unlabelled_dls(pool, size, bs, valid_pct=0, in_memory=True)
        source = learn = byol_learner(unlabelled, arch, recipe=recipe(epochs, bs, pretrained=True), hidden_size=hidden,
                                      freeze_bn=freeze_bn, model_args=overlay, cbs=KNNCallback(labelled))
        with learn.no_bar(), learn.no_logging(): learn.fit_byol(cbs=EpochLog())
        about.update(knn=learn.knn.history.to_dict('records'), steps=learn.recipe.steps)
        before,*_,after = 100*learn.knn.history.knn
        print(f"{learn.recipe}\nkNN {before:.1f} % with the published weights, {after:.1f} % after BYOL", flush=True)
        if out: save_body(learn, out)

    kinds = {'linear':('BYOL, linear','ImageNet weights, linear','pixels, nearest'),
             'fine-tuned':('BYOL, fine-tuned','ImageNet weights, fine-tuned'), 'scratch':('from scratch',)}
    others = {'ImageNet weights':as_encoder(arch, **overlay)}
    amounts,runs = [int(o) for o in per_class.split(',')],[]
    for kind,contestants in kinds.items():
        if measure not in (kind,'all'): continue
        start = time.time()
        res = label_efficiency(source, labelled, amounts, draws, contestants, others=others, steps=steps, seed=seed, cbs=ChannelsLast())
        print(f"\nLabels per class, accuracy in % (mean ± standard error of {draws} draws), {(time.time()-start)/60:.0f} min\n")
        print(res.table().to_string(), flush=True)
        runs += res.runs.to_dict('records')
        if out: Path(out).with_suffix('.json').write_text(json.dumps(dict(about, runs=runs)))
