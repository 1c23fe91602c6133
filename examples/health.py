"""What `HealthMonitor` measures in runs that are healthy and in runs that are made to collapse: where its limits come from.

The network and the data are those of `fastbyol-demo`, so nothing is downloaded.

    python examples/health.py                     # every kind of run, five seeds
    python examples/health.py --only healthy      # one of them
"""
import tempfile,warnings
from fastcore.script import call_parse
from fastai.vision.all import *
from fastbyol.all import *
from fastbyol.demo import write_digits, digit_view, small_resnet

# name -> (epochs, highest learning rate, arguments of `byol_learner`)
kinds = {
    'healthy':         (80, 2e-3, {}),
    'slow':            (10, 3e-6, {}),
    'simsiam':         (20, 1e-3, dict(momentum=False)),
    'two digits':      (40, 2e-3, {}),                          # six steps an epoch: batch norm takes its time
    'no predictor':    ( 3, 2e-3, {}),
    'tau=0, high lr':  ( 3, .1,   dict(tau=0., tau_end=0.)),
}

def run(
    kind:str, # a name of `kinds`
    seed:int, # of split, weights and views
)->HealthMonitor: # after the run
    "Pretrain on digits as `kind` says, and measure after each epoch"
    epochs,lr,kw = kinds[kind]
    set_seed(seed)
    with tempfile.TemporaryDirectory() as tmp:
        files = split_files(write_digits(tmp), seed=seed)[0]
        if kind=='two digits': files = [f for f in files if f.parent.name in '38']
        dls = unlabelled_dls(files, 32, 64, valid_pct=0, n_in=1, item_size=32, in_memory=True)
    learn = byol_learner(dls, small_resnet(), views=digit_view(), hidden_size=1024, precision='fp32', cbs=HealthMonitor(), **{'tau':.99, **kw})
    if kind=='no predictor': learn.model.predictor = nn.Identity()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn.health

@call_parse
def main(
    only:str=None, # kinds of run, with commas between; all when left out
    seeds:int=5, # seeds of each
    threads:int=1, # of torch
):
    "Print the range of what was measured after the first epoch and later, by kind of run"
    warnings.filterwarnings('ignore', category=FutureWarning) # of torch, about its own modules
    torch.set_num_threads(threads)
    for kind in only.split(',') if only else kinds:
        hs = [run(kind, s) for s in range(seeds)]
        rows = pd.concat([h.history.iloc[1:] for h in hs])
        called = [first(h.advice.query("finding=='collapsed'").epoch) for h in hs]
        span = '  '.join(f"{c} {rows[c].min():.2f} to {rows[c].max():.2f}" for c in ('std','agreement','rank'))
        print(f"{kind:15} {span}  called collapsed in epoch: {', '.join(str(o or 'never') for o in called)}", flush=True)
