"""Which photos to label first: how many of Imagenette's ten classes do 20 suggestions cover, and how many do 20 random photos?

    python examples/suggest_labels_imagenette.py                         # downloads Imagenette (160 px) through fastai
    python examples/suggest_labels_imagenette.py --path FOLDER           # a folder with train/, with a folder per class
    python examples/suggest_labels_imagenette.py --path FOLDER --body FILE   # with a body from an earlier `--save FILE`

Pretrains a small residual network at 64 px on the training photos without their labels, or reads a body from a file, and embeds
the photos. Then, for each seed, 20 photos out of 2,000 drawn at random are suggested for labelling. The labels serve to count the classes.
"""
import platform, time, warnings
from datetime import date
from fastcore.script import call_parse
from fastai.vision.all import *
from fastbyol.all import *
from fastbyol.explore import suggest_labels
from fastbyol.demo import small_resnet

class EpochLog(Callback):
    "Prints the loss of each epoch"
    order = 60 # after the recorder
    def before_fit(self): self.start = time.time()
    def after_epoch(self):
        print(f"  epoch {self.epoch+1:2} of {self.n_epoch}: loss {self.recorder.values[-1][0]:.3f}, {(time.time()-self.start)/60:4.1f} min", flush=True)

def summary(counts):
    "Mean ± standard error"
    t = tensor(counts).float()
    return f'{t.mean():.2f}' + (f' ± {t.std()/len(t)**.5:.2f}' if len(t)>1 else '')

@call_parse
def main(
    path:str=None, # folder with train/ and val/; Imagenette is downloaded when left out
    of:str='train', # suggest from the photos in this folder of it: train, or val, which pretraining has not seen
    body:str=None, # body file to read instead of pretraining
    arch:str=None, # timm name of the body; a small residual network when left out
    save:str=None, # file to write the pretrained body to
    epochs:int=20, # epochs of pretraining
    size:int=64, # side of the views in pixels
    bs:int=64, # images per batch of pretraining
    pool:int=2000, # photos drawn for each seed, to suggest from
    n:int=20, # photos to suggest
    seeds:int=10, # draws of a pool
    seed:int=0, # first of their seeds, and the seed of pretraining
):
    "Classes among suggested and among random photos"
    warnings.filterwarnings('ignore', category=FutureWarning) # of torch, about its own modules
    path,net = Path(path) if path else untar_data(URLs.IMAGENETTE_160),arch or small_resnet(3, (32,64,128,256))
    set_seed(seed)
    dls = unlabelled_dls(find_images(path/'train'), size, bs, valid_pct=0, in_memory=True)
    print(f"{date.today()}, {torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, seed {seed}, {len(dls.train_ds):,} photos", flush=True)
    if body: source = load_body(body, arch=None if arch else net)
    else:
        source = byol_learner(dls, net, tau=.99, hidden_size=1024, precision='bf16')
        with source.no_bar(), source.no_logging(): source.fit_one_cycle(epochs, 2e-3, cbs=[EpochLog()])
        if save: save_body(source, save, epochs=epochs)

    if of!='train': dls = unlabelled_dls(find_images(path/of), size, bs, valid_pct=0, in_memory=True)
    feats,_ = get_embeddings(source, dls.train)
    vocab = CategoryMap(L(dls.train_ds.items).map(parent_label).unique())
    y = tensor([vocab.o2i[parent_label(f)] for f in dls.train_ds.items])
    print(f"kNN from one half of the photos to the other: {100*(knn_predict(feats[::2], y[::2], feats[1::2])==y[1::2]).float().mean():.1f} %")
    count = lambda idxs: len(y[idxs].unique())
    suggested,drawn,often = [],[],[]
    for s in range(seed, seed+seeds):
        g = torch.Generator().manual_seed(s)
        some = torch.randperm(len(feats), generator=g)[:pool]
        suggested.append(count(some[suggest_labels(feats[some], n=n)['index'].tolist()])) # no labels here
        draws = [count(some[torch.randperm(len(some), generator=g)[:n]]) for _ in range(100)]
        drawn.append(draws[0]); often.append(sum(draws)/len(draws))
    print(f"\nClasses among {n} of {pool:,} photos, of {len(vocab)} (mean ± standard error of {seeds} pools)\n")
    for nm,c,each in (('suggest_labels',suggested,suggested), ('random',drawn,drawn), ('random, 100 draws for each pool',often,'')): print(f"  {nm:32} {summary(c):12} {each}")
