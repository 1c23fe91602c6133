"""What each choice in BYOL is worth: the same short run on Imagenette with one thing changed at a time

    python examples/ablations.py                                # downloads Imagenette (160 px) through fastai
    python examples/ablations.py --path FOLDER                  # a folder with train/ and val/, each with a folder per class
    python examples/ablations.py --only layer,group --seeds 5    # some of the variants
    python examples/ablations.py --table-only                    # only print what is in the output file

Each run pretrains without labels and is judged on the validation photos by kNN and by a linear classifier on the frozen body, both with the
labels of all training photos. A row is written as soon as a run has ended, and runs whose
row is in the output file already are left out: stop it and start it again at will, or start several at a time with different `--only`.

The defaults are for a CPU: some minutes per run on one thread. On a GPU, a size at which differences mean more:

    python examples/ablations.py --arch resnet18 --size 128 --bs 256 --epochs 100 --hidden-size 4096 --lr 1e-3
"""
import csv, platform, sys, time, warnings
from datetime import date
from fastcore.script import call_parse
from fastai.vision.all import *
from fastai.callback.training import GradientAccumulation
from sklearn.linear_model import RidgeClassifierCV
from fastbyol.all import *
from fastbyol.demo import small_resnet
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.kornia_views import kornia_view

variants = { # name -> (what the table calls it, arguments of `byol_learner`)
    'untrained': ('random weights, not trained', {}),
    'default':   ("default, with kornia's views", {}),
    'fused':     ('fused views', dict(fused=True)),
    'group':     ('heads with group norm, standardised weights', dict(norm='group')),
    'layer':     ('heads with layer norm', dict(norm='layer')),
    'none':      ('heads without norm', dict(norm=None)),
    'tau99':     ('tau from .99', dict(tau=.99)),
    'tau9':      ('tau from .9', dict(tau=.9)),
    'constant':  ('tau constant at .996', dict(tau=.996, tau_end=.996)),
    'simsiam':   ('no target network (SimSiam)', dict(momentum=False)),
    'symmetric': ('symmetric views', dict(symmetric=True)),
    'lars':      ("LARS, recipe 'imagenette'", dict(recipe='imagenette')), # these two with the recipe's schedules, not Adam and one cycle
    'lars_few':  ("LARS, recipe 'small_data'", dict(recipe='small_data')),
    'few_group': ('the same, heads with group norm', dict(recipe='small_data', norm='group')), # for small batches
    'few_256':   ('the same, steps of 256 images', dict(recipe='small_data', cbs=GradientAccumulation(256))),
    'few_both':  ('the same, both views in one batch', dict(recipe='small_data', both=True)),
}

def both_at_once(model):
    "Let batch norm see both views in one batch, in the online network and in the target"
    def halves(f, v1, v2): return torch.stack(f(torch.cat([v1,v2])).chunk(2), 1)
    model.forward = lambda v1,v2: halves(lambda v: model.predictor(model.projector(model.embed(v))), v1, v2)
    model.targets = torch.no_grad()(lambda v1,v2: halves(lambda v: model.target['projector'](model.embed(v, target=True)), v2, v1))

def pretrain(kw, dls, arch, size, epochs, lr, hidden_size, precision, seed):
    "A learner that has pretrained for `epochs`"
    set_seed(seed)
    dls.train.rng = random.Random(seed) # fastai shuffles with random numbers of the loader's own
    kw = dict(kw)
    views = byol_views(size)
    if kw.pop('symmetric', False): # one pipeline for both, whose probabilities are the means of the two
        blur_p,solarize_p = (sum(view.p[o] for view in views)/2 for o in ('blur','solarize'))
        views = (FusedView(size, blur_p=blur_p, solarize_p=solarize_p),)*2
    both = kw.pop('both', False)
    if not kw.pop('fused', False): views = tuple(map(kornia_view, views))
    body = small_resnet(3, (16,32,64,128)) if arch=='small' else arch
    learn = byol_learner(dls, body, views=views, hidden_size=hidden_size, precision=precision, **kw)
    if both: both_at_once(learn.model)
    if epochs:
        with learn.no_bar(), learn.no_logging():
            if 'recipe' in kw: learn.fit_byol(epochs)
            else: learn.fit_one_cycle(epochs, lr)
    return learn

def evaluate(learn, labelled):
    "Accuracy of kNN by the online body and by the target's, and of a linear classifier (ridge regression on standardised features)"
    accs = {}
    for nm,target in (('knn',False), ('knn_target',True)):
        if target and not learn.model.momentum:
            accs[nm] = math.nan
            continue
        (bank,y),(queries,qy) = (get_embeddings(learn, dl, target=target) for dl in (labelled.train, labelled.valid))
        accs[nm] = (knn_predict(bank, y, queries)==qy).float().mean().item()
        if target: continue
        z = lambda f: ((f-bank.mean(0))/(bank.std(0)+1e-6)).numpy()
        accs['linear'] = RidgeClassifierCV(np.logspace(-1,5,7)).fit(z(bank), y).score(z(queries), qy)
    return accs

def read_runs(out): return pd.read_csv(out) if out.exists() else pd.DataFrame(columns=['variant','seed'])

def write_run(out, row):
    "Append `row` at once, so that several processes may write to one file"
    new = not out.exists()
    with out.open('a', newline='') as f:
        w = csv.DictWriter(f, row)
        if new: w.writeheader()
        w.writerow(row)

def mean_se(x, scale=100, digits=1, sign=False):
    x = scale*np.asarray(x, dtype=float)
    x = x[~np.isnan(x)]
    if not len(x): return '–'
    m = f'{x.mean():{"+" if sign else ""}.{digits}f}'
    return f'{m} ± {x.std(ddof=1)/len(x)**.5:.{digits}f}' if len(x)>1 else m

def table(runs):
    "Mean ± standard error over the seeds; differences are taken seed by seed"
    base,rows = runs[runs.variant=='default'].set_index('seed'),[]
    for nm,(title,_) in variants.items():
        r = runs[runs.variant==nm].set_index('seed')
        if not len(r): continue
        diff = {k:mean_se((r[k]-base[k]).dropna(), sign=True) if nm!='default' else '–' for k in ('knn','linear')}
        rows.append({'':title, 'kNN, %':mean_se(r.knn), 'Δ kNN':diff['knn'], 'linear, %':mean_se(r.linear), 'Δ linear':diff['linear'],
                     "target's kNN, %":mean_se(r.knn_target), 'last loss':mean_se(r.loss, 1, 2), 'runs':len(r)})
    return pd.DataFrame(rows).set_index('')

@call_parse
def main(
    path:str=None, # folder with train/ and val/; Imagenette is downloaded when left out
    epochs:int=8, # epochs of pretraining
    size:int=32, # side of the views in pixels
    arch:str='small', # 'small', or a timm name
    bs:int=64, # images per batch
    lr:float=2e-3, # highest learning rate of one cycle with Adam; recipes have their own
    hidden_size:int=512, # hidden width of projector and predictor
    n:int=0, # training photos, drawn with seed 0; 0: all
    seeds:int=3, # runs of each variant
    only:str=None, # names of variants, with commas between; left out: all
    out:str='ablations.csv', # file for the rows
    precision:str='bf16', # 'bf16', 'fp32' or 'fp16'
    threads:int=0, # threads of torch; 0: as many as it likes
    table_only:bool=False, # run nothing, print the table
):
    "One change at a time to BYOL, on Imagenette"
    warnings.filterwarnings('ignore', category=FutureWarning) # of torch, about its own modules
    out,only = Path(out),only.split(',') if only else list(variants)
    if unknown := set(only)-set(variants): raise SystemExit(f"There is no variant {', '.join(sorted(unknown))}: they are {', '.join(variants)}")
    if threads: torch.set_num_threads(threads)
    cfg = dict(epochs=epochs, size=size, arch=arch, bs=bs, lr=lr, hidden_size=hidden_size, n=n)
    mine = lambda df: df[np.logical_and.reduce([df[k]==v for k,v in cfg.items()])] if len(df) else df
    todo = [] if table_only else [(seed,nm) for seed in range(seeds) for nm in only]
    done = lambda: {(o.seed,o.variant) for o in mine(read_runs(out)).itertuples()}
    if set(todo)-done():
        path = Path(path) if path else untar_data(URLs.IMAGENETTE_160)
        train,test = find_images(path/'train'),find_images(path/'val')
        if n: train = sorted(random.Random(0).sample(train, n))
        dls = unlabelled_dls(train, size, bs, valid_pct=0, in_memory=True)
        labelled = labelled_dls(train, size, bs=256, valid=test)
        print(f"{date.today()}, {torch.get_num_threads()} thread(s) of {platform.machine()}, torch {torch.__version__}: {len(train):,} photos, {len(test):,} put aside, {cfg}", flush=True)
    for seed,nm in todo:
        if (seed,nm) in done(): continue
        start = time.time()
        learn = pretrain(variants[nm][1], dls, precision=precision, seed=seed, **{k:0 if nm=='untrained' and k=='epochs' else v for k,v in cfg.items() if k not in ('bs','n')})
        row = dict(variant=nm, seed=seed, **cfg, **evaluate(learn, labelled),
                   loss=learn.recorder.values[-1][0] if nm!='untrained' else math.nan, minutes=round((time.time()-start)/60, 2))
        write_run(out, row)
        print(f"{nm:10} seed {seed}: kNN {100*row['knn']:.1f} %, of the target {100*row['knn_target']:.1f} %, linear {100*row['linear']:.1f} %, loss {row['loss']:.2f}, {row['minutes']} min", flush=True)
    runs = mine(read_runs(out))
    if len(runs): print('\n'+table(runs).to_string())
