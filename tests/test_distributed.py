"Several processes on the CPU: equal targets on all ranks, and the result of one process"
from conftest import *
from fastbyol.core import online_model
from fastbyol.checkpoint import checkpoints, load_state
from fastbyol.distributed import DistributedBYOL, ShardedDL
from fastbyol.model import batch_norms
import fastai.distributed, io, signal, subprocess, sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from accelerate import PartialState, debug_launcher
from fastai.distributed import DistributedDL, DistributedTrainer
from fastai.callback.training import GradientAccumulation
from timm.optim import Lars
from sklearn.datasets import load_digits

# --- every check marked `in_both` runs in the same two processes, forked once; a test looks at what it returned in each

checks = {}
def in_both(f):
    checks[f.__name__] = f
    return f

def run_checks(folder):
    signal.alarm(120) # processes that wait forever are killed, and the tests fail
    os.environ['RANK'] = str(PartialState(cpu=True).process_index)
    torch.set_num_threads(1)
    default_device(use=False)
    os.environ['FASTBYOL_CACHE'] = str(folder/'cache')
    results = {}
    for name,check in checks.items():
        set_seed(0)
        try: results[name] = check(folder)
        except Exception as e: results[name] = e
        torch.distributed.barrier()
    torch.save(results, folder/f'{rank_distrib()}.pth')

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('both')
    photos(folder/'photos', broken=())
    photos(folder/'broken', broken=(1,2,3,5))
    debug_launcher(run_checks, (folder,), num_processes=2)
    return [torch.load(folder/f'{i}.pth', weights_only=False) for i in range(2)],folder

@pytest.fixture
def both(results):
    def get(check):
        for o in (res := [r[check.__name__] for r in results[0]]):
            if isinstance(o, Exception): raise o
        return res
    return get

def photos(folder, broken):
    folder.mkdir()
    for i,o in enumerate(noise(24, 40)):
        PILImage.create(np.uint8(o.permute(1,2,0)*255)).save(file := folder/f'{i:02d}.png')
        if i in broken: file.write_bytes(file.read_bytes()[:-200])

def fit(learn, n=2, lr=5e-2, f='fit', **kw):
    with learn.distrib_ctx(): getattr(learn, f)(n, lr, **kw)
    return learn

def result(learn):
    rec = learn.recorder
    return dict(model=sd_of(learn), losses=[o.item() for o in rec.losses], values=[list(o) for o in rec.values],
                taus=learn.byol.taus)

def near(a, b, eps=1e-5):
    for k in a['model']: torch.testing.assert_close(a['model'][k], b['model'][k], rtol=0, atol=eps)
    np.testing.assert_allclose(a['losses'], b['losses'], atol=eps)
    return a['taus']==b['taus']

def dls_of(bs, n=72): return image_dls(noise(n), bs=bs, shuffle=True)
def n_at_once(bs): return bs//max(num_distrib(), 1)
momentum = partial(SGD, mom=.9)

# --- two processes and one

def digits(bs):
    d = load_digits()
    x = torch.tensor(d.images[:160]/16, dtype=torch.float32)[:,None].repeat_interleave(2,2).repeat_interleave(2,3)
    return image_dls(x, bs=bs, n_val=32, y=list(d.target[:160]), shuffle=True)

def twenty_steps(opt, lr):
    dls = digits(n_at_once(32))
    learn = byol_learn(dls, small_byol(bn=False, n_in=1), opt_func=opt)
    return result(fit(learn, 5, lr, 'fit_one_cycle'))

@in_both
def sgd_steps(_): return twenty_steps(momentum, 5e-2)
@in_both
def lars_steps(_): return twenty_steps(partial(OptimWrapper, opt=Lars, momentum=.9, weight_decay=1e-4), 5.)

@pytest.mark.parametrize('check', [sgd_steps,lars_steps])
def test_two_processes_equal_one(both, check):
    one,(a,b) = check(0),both(check)
    assert len(one['losses'])==20 and same_sd(a['model'], b['model']) and near(one, a)

@in_both
def other_weights(_):
    set_seed(rank_distrib()+7)
    learn = byol_learn(dls_of(8))
    before = sd_of(learn)
    with torch.no_grad():
        for p in learn.model.target.parameters(): p.add_(torch.randn_like(p))
    return before,sd_of(fit(learn, 1, 1e-2))
def test_ranks_that_began_with_other_weights_are_equal_afterwards(both):
    (a0,a),(b0,b) = both(other_weights)
    assert not same_sd(a0, b0) and same_sd(a, b)

@in_both
def batch_norm(_): return result(fit(byol_learn(dls_of(8))))
@in_both
def batch_norm_without_validation(_):
    # with it, `DistributedDataParallel` would send them
    return result(fit(byol_learn(image_dls(noise(32), bs=4, n_val=0))))
@pytest.mark.parametrize('check', [batch_norm,batch_norm_without_validation])
def test_batch_norm_statistics_are_those_of_the_first_process(both, check):
    a,b = both(check)
    assert same_sd(a['model'], b['model'])

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = conv_body(bn=False),nn.Linear(16*16,4)
    def forward(self, x): return self.b(self.a(x).flatten(1))

@in_both
def unused(_):
    model = BYOL(Own(), layer='a', size=16, hidden_size=16, projection_size=8, norm=None)
    learn = fit(byol_learn(dls_of(n_at_once(16)), model, opt_func=momentum))
    return {**result(learn), 'unused':any('.b.' in n and p.grad is None for n,p in learn.model.body.named_parameters())}
def test_weights_without_a_gradient_are_no_error(both):
    one,(a,b) = unused(0),both(unused)
    assert a['unused'] and near(one, a) and same_sd(a['model'], b['model'])

@in_both
def accumulated(_):
    cbs = GradientAccumulation(2*n_at_once(16))
    return result(fit(byol_learn(dls_of(n_at_once(16)), small_byol(bn=False), cbs=cbs, opt_func=momentum)))
def test_accumulated_gradients_are_those_of_one_process(both):
    one,(a,b) = accumulated(0),both(accumulated)
    assert near(one, a) and same_sd(a['model'], b['model']) and len(one['taus'])==4

# --- data

class Alone(ShardedDL):
    def _broadcast(self, t, rank): return t

def shards(items, bs, n_processes, **kw):
    def one(rank):
        set_seed(0)
        dl = TfmdDL(items, bs=bs, device=cpu, **{**dict(num_workers=0), **kw})
        return Alone(dl, rank=rank, world_size=n_processes)
    return [[b.tolist() for b in one(i)] for i in range(n_processes)],len(one(0))

@pytest.mark.parametrize('drop_last', [True,False])
@pytest.mark.parametrize('n_processes', [1,2,3])
def test_nothing_comes_twice_and_all_have_equally_many(n_processes, drop_last):
    for n,bs in ((1,2),(7,3),(24,4),(33,2)):
        set_seed(0)
        kw = dict(shuffle=True, drop_last=drop_last)
        one = [b.tolist() for b in TfmdDL([*range(n)], bs=bs*n_processes, num_workers=0, device=cpu, **kw)]
        parts,n_batches = shards([*range(n)], bs, n_processes, **kw)
        flat = sum(sum(parts, []), [])
        assert {len(p) for p in parts}=={n_batches} and len(set(flat))==len(flat)
        assert len({tuple(map(len, p)) for p in parts})==1
        assert n-len(flat)<(bs*n_processes if drop_last else n_processes)
        for batch,whole in zip(zip(*parts), one): assert sum(batch, [])==whole[:len(sum(batch, []))]

@pytest.mark.parametrize('workers', [0,2])
def test_worker_processes_share_whole_batches(workers):
    assert shards([*range(16)], 3, 2, num_workers=workers)==([[[0,1,2],[6,7,8],[12,13]],[[3,4,5],[9,10,11],[14,15]]],3)

class Holes(list):
    def __init__(self, n, bad): super().__init__(range(n)); self.bad = bad
    def __getitem__(self, i):
        if i in self.bad: raise SkipItemException()
        return torch.tensor(super().__getitem__(i))
def test_what_cannot_be_read_leaves_no_process_short():
    assert shards(Holes(16, (3,4,11)), 4, 2)==([[[0,1,2,0],[8,9,10,8]],[[5,6,7,5],[12,13,14,15]]],2)
    with pytest.raises(ValueError, match='None of the 4 items'): shards(Holes(8, range(4)), 4, 1)

@in_both
def broken_files(folder):
    kw = dict(bs=4, valid_pct=0, in_memory=False, num_workers=0, device=cpu)
    learn = byol_learn(unlabelled_dls(folder/'broken', 16, **kw), small_byol(bn=False), cbs=(g:=Grab()))
    with warnings.catch_warnings(action='ignore'): fit(learn, 1)
    return [len(x[0]) for x in g.xs],sd_of(learn)
def test_files_that_break_on_one_rank_do_not_stop_the_others(both):
    (a,model_a),(b,model_b) = both(broken_files)
    assert a==b==[4,4] and same_sd(model_a, model_b)

@in_both
def little_to_validate(_):
    res = []
    for n_val in (0,1,3):
        learn = fit(byol_learn(image_dls(noise(16+n_val), bs=4, n_val=n_val), small_byol(bn=False)), 1)
        res.append((sd_of(learn),learn.recorder.values[0][1]))
    return res
def test_little_or_nothing_to_validate(both):
    for (a,loss_a),(b,loss_b),n_val in zip(*both(little_to_validate), (0,1,3)):
        assert same_sd(a, b) and loss_a==loss_b and (loss_a is None)==(n_val==0)

@in_both
def broken_valid(_):
    class Broken(Holes):
        def __getitem__(self, i): return TensorImage(noise(16)[super().__getitem__(i)]),
    def dl(items): return TfmdDL(items, bs=4, num_workers=0, device=cpu)
    dls = DataLoaders(dl(Broken(16, ())), dl(Broken(16, (9,10,11))), device=cpu)
    return fit(byol_learn(dls, small_byol(bn=False)), 1).recorder.values[0][1]
def test_broken_files_in_validation_leave_no_process_waiting(both):
    a,b = both(broken_valid)
    assert a==b and 0<a<8

@in_both
def memory(folder):
    res = []
    for in_memory in ('auto','disk'):
        dls = unlabelled_dls(folder/'photos', 16, bs=4, device=cpu, in_memory=in_memory)
        res.append(result(fit(byol_learn(dls, small_byol(bn=False), views=None, size=16), 1)))
    return res
def test_images_in_memory(both):
    for a,b in zip(*both(memory)): assert same_sd(a['model'], b['model']) and len(a['losses'])==2

# --- random numbers

def draws(): return random.random(),np.random.rand(),torch.rand(1).item()

@in_both
def views_seen(_):
    res = []
    for _ in range(2):
        set_seed(0)
        train,valid = Grab(),Grab(valid=True)
        x = noise(1).repeat(40,1,1,1)
        fit(byol_learn(image_dls(x, bs=4), small_byol(bn=False), views=None, size=16, cbs=[train,valid]), 1)
        res.append((torch.cat([o[0] for o in train.xs]),torch.cat([o[0] for o in valid.xs]),draws()))
    return res
def test_each_image_has_its_own_draw_and_a_seed_repeats_them(both):
    a,b = both(views_seen)
    for i in (0,1): # training and validation
        views = torch.cat([a[0][i],b[0][i]]).flatten(1)
        assert len(views.unique(dim=0))==len(views)
        assert torch.equal(a[0][i], a[1][i]) and torch.equal(b[0][i], b[1][i])
    assert all(x!=y for x,y in zip(a[0][2], b[0][2])) and a[0][2]==a[1][2] and b[0][2]==b[1][2]
    assert torch.equal(views_seen(0)[0][0][:4], a[0][0][:4]) # the first process draws as one alone would

# --- what goes wrong

class Spoil(Callback):
    "NaN in batch `at` of the first fit, on `ranks`"
    order,done = 15,False
    def __init__(self, at, *ranks): self.at,self.ranks = at,ranks
    def before_batch(self):
        if not self.training or self.done or self.iter!=self.at: return
        self.done = True
        if rank_distrib() in self.ranks: self.xb[0][0] = float('nan')

@in_both
def nan_on_one(_):
    learn = byol_learn(dls_of(8), small_byol(bn=False), cbs=Spoil(2, 1))
    try: fit(learn)
    except FloatingPointError as e: return str(e),sd_of(online_model(learn.model))
def test_nan_on_one_rank_stops_all_of_them(both):
    (said_a,a),(said_b,b) = both(nan_on_one)
    assert 'epoch 0, batch 2' in said_a and said_a==said_b
    assert same_sd(a, b) and all(o.isfinite().all() for o in a.values())

@in_both
def again(_):
    "A fit that the NaN stop ends, and another"
    learn = byol_learn(dls_of(n_at_once(16)), small_byol(bn=False), cbs=Spoil(1, 0, 1), opt_func=momentum)
    with learn.distrib_ctx():
        try: learn.fit(2, 5e-2)
        except FloatingPointError: learn.fit(2, 1e-2)
    return {**result(learn), 'left':[type(o).__name__ for o in (learn.model, *learn.dls.loaders)]}
def test_after_an_error_the_learner_fits_again_as_one_process_does(both):
    one,(a,b) = again(0),both(again)
    assert a['left']==b['left']==['BYOL','TfmdDL','TfmdDL']
    assert same_sd(a['model'], b['model']) and near(one, a) and len(a['losses'])==8

# --- only the first process writes

@in_both
def writes(folder):
    folder = folder/'writes'
    learn = byol_learn(dls_of(8), path=folder)
    learn.logger = print
    with redirect_stdout(io.StringIO()) as out: fit(learn, 1)
    save_body(learn, folder/f'body{rank_distrib()}')
    learn.save(f'm{rank_distrib()}')
    return out.getvalue()
def test_only_the_first_process_writes(both, results):
    a,b = both(writes)
    assert a.startswith('[0, ') and b==''
    assert {o.name for o in (results[1]/'writes').rglob('*.*')}=={'body0.safetensors','m0.pth'}

# --- checkpoints

class Stop(Callback):
    order = CheckpointCallback.order+1
    def __init__(self, *at): self.at = at
    def after_batch(self):
        if self.training and self.at==(self.epoch,self.iter+1): raise KeyboardInterrupt
    def after_epoch(self):
        if self.at==(self.epoch+1,0): raise KeyboardInterrupt

def checkpointed(folder, seed, at=None):
    "Two epochs; stopped at `at`, or resumed where a checkpoint is"
    distrib_barrier() # the run before has been written
    set_seed(seed)
    cbs = [CheckpointCallback(folder, every_batches=1, keep=None), *([Stop(*at)] if at else [])]
    learn = byol_learn(dls_of(8, 40), views=None, size=16, cbs=cbs)
    with redirect_stdout(io.StringIO()): learn.resume(folder, missing_ok=True)
    try: fit(learn, 2, 1e-2, 'fit_one_cycle')
    except KeyboardInterrupt: pass
    return learn

stops = (1,0),(1,1)
@in_both
def resumed(folder):
    res = [result(checkpointed(folder/'whole', 1))]
    for at in stops:
        checkpointed(folder/f'{at}', 1, at)
        res.append(result(checkpointed(folder/f'{at}', 5)))
    checkpointed(folder/'stopped', 1, (1,1))
    return res
def test_a_resumed_run_is_the_same_on_all_ranks(both, results):
    for whole,*others in both(resumed):
        for o in others: assert same_sd(whole['model'], o['model']) and {**whole, 'model':0}=={**o, 'model':0}
    states = load_state(checkpoints(results[1]/'stopped')[0])['chance']
    assert len(states)==2 and not torch.equal(*[o['rng']['torch'] for o in states])

def test_another_number_of_processes_is_told(both, results):
    both(resumed)
    with pytest.warns(UserWarning, match=r'processes=2 \(now 1\)'): one = checkpointed(results[1]/'stopped', 5)
    assert np.isfinite(result(one)['losses']).all()

# --- monitors

def watched(monitors):
    dls = digits(n_at_once(32))
    dls.c = 10
    cbs = [KNNCallback(digits(16), k=5), OnlineProbe(), HealthMonitor(n_items=32)] if monitors else None
    return fit(byol_learn(dls, small_byol(bn=False, n_in=1), cbs=cbs, opt_func=momentum))

@in_both
def unwatched_run(_): return result(watched(False))
@in_both
def watched_run(_):
    learn = watched(True)
    tables = [o.history.to_dict('list') for o in (learn.knn, learn.probe)]
    tables += [learn.health.history['std'].tolist()]
    return {**result(learn), 'tables':tables, 'head':learn.probe.head[1].weight.detach()}
def test_monitors_see_the_data_of_all_processes_and_leave_training_alone(both):
    (plain,_),(a,b),one = both(unwatched_run),both(watched_run),watched(True)
    assert same_sd(plain['model'], a['model']) and plain['losses']==a['losses'] # to the bit
    np.testing.assert_allclose(a['tables'][0]['knn'], one.knn.history.knn, atol=1e-5)
    assert a['tables']==b['tables'] and np.isfinite(a['tables'][2]).all()
    assert torch.equal(a['head'], b['head']) # the classifier is one, trained on the labels of both

# --- and the rest of fastai

@in_both
def twice(_):
    learn = byol_learn(dls_of(8))
    with learn.distrib_ctx():
        learn.fit(1, 1e-2)
        v = learn.validate()
        learn.fit(1, 1e-2)
        w,u = learn.validate(),learn.validate()
    left = [o for o in learn.cbs if isinstance(o, DistributedTrainer)]
    return sd_of(learn),list(w)==list(u),left,type(learn.dls.train).__name__
def test_two_fits_and_validation(both):
    (a,same_loss,left,dl),(b,*_) = both(twice)
    assert same_sd(a, b) and same_loss and left==[] and dl=='TfmdDL'

def test_other_learners_and_fastais_functions_are_left_alone():
    assert {f.__module__ for f in (Learner.to_distributed, Learner.detach_distributed)}=={'fastai.distributed'}
    assert DistributedDL._broadcast.__module__=='fastai.distributed'
    learn = hush(Learner(dls_of(8), conv_body(), loss_func=noop))
    cbs = learn.to_distributed(cpu=True).cbs
    assert [type(o) for o in cbs if 'Distributed' in type(o).__name__]==[DistributedTrainer]

@pytest.mark.parametrize('world,want', [('',[]), ('2',[DistributedBYOL])])
def test_a_learner_that_pretrains_has_our_callback_in_several_processes(monkeypatch, world, want):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    monkeypatch.setenv('WORLD_SIZE', world or '0')
    assert [type(o) for o in byol_learn(dls_of(8)).cbs if 'Distributed' in type(o).__name__]==want

def test_batch_norm_of_online_network_and_target_sees_all_processes_on_a_gpu(tmp_path):
    cbs = [DistributedBYOL(),DistributedTrainer(cpu=True)]
    learn = byol_learn(dls_of(8), BYOL('mobilenetv3_small_050', hidden_size=8), cbs=cbs)
    before,keys = learn.model.embed(noise(4,32)),[*learn.model.state_dict()]
    n_norms = len(batch_norms(learn.model))
    learn.distributed_byol._prepare(SimpleNamespace(device=torch.device('meta'), ddp_handler=None)) # stands for a GPU
    assert all(isinstance(o, nn.SyncBatchNorm) for o in batch_norms(learn.model))
    assert [*learn.model.state_dict()]==keys and len(batch_norms(learn.model))==n_norms
    assert torch.equal(learn.model.embed(noise(4,32)), before) # timm's activations are still there
    body,_ = load_body(save_body(learn, tmp_path/'body'))
    assert not any(isinstance(o, nn.SyncBatchNorm) for o in body.modules())

def test_one_process_alone_is_left_alone():
    a = byol_learn(dls_of(8))
    b = byol_learn(dls_of(8), deepcopy(a.model))
    state = torch.get_rng_state()
    for learn in (a,b):
        torch.set_rng_state(state)
        learn.dls.train.rng = random.Random(1)
        fit(learn, 1) if learn is a else learn.fit(1, 5e-2)
    assert same_sd(sd_of(a), sd_of(b))

# --- as a user starts it

script = '''
import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from conftest import *
torch.set_num_threads(1); default_device(use=False); set_seed(0); bs = 16//max(num_distrib(), 1)
learn = byol_learn(image_dls(noise(72), bs=bs, shuffle=True), small_byol(bn=False), opt_func=partial(SGD, mom=.9))
with learn.distrib_ctx(): learn.fit_one_cycle(5, 5e-2)
torch.save(learn.model.state_dict(), f'{sys.argv[2]}/{num_distrib()}_{rank_distrib()}.pth')
'''

@pytest.mark.slow
def test_torchrun(tmp_path):
    (tmp_path/'s.py').write_text(script)
    run = [sys.executable,'-m','torch.distributed.run','--standalone','--nproc_per_node']
    for cmd in ([sys.executable], [*run,'1'], [*run,'2']):
        cmd = [*cmd, tmp_path/'s.py', Path(__file__).parent, tmp_path]
        res = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
        assert res.returncode==0, res.stderr[-2000:]
    one,launched,a,b = (torch.load(tmp_path/f) for f in ('0_0.pth','1_0.pth','2_0.pth','2_1.pth'))
    assert same_sd(a, b) and same_sd(one, launched)
    for k in one: torch.testing.assert_close(a[k], one[k], rtol=0, atol=1e-5)
