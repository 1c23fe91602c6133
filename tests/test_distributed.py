"Several processes on the CPU: equal targets on all ranks, and the result of one process"
from conftest import *
from fastbyol.core import eval_mode, online_model
from fastbyol.checkpoint import checkpoints, load_state
from fastbyol.distributed import BYOLTrainer, ShardedDL, sync_bn_, undo_sync_bn_
import io, signal, subprocess, sys
from contextlib import redirect_stdout
from accelerate import PartialState, debug_launcher
from fastai.distributed import DistributedTrainer
from fastai.callback.training import GradientAccumulation
from timm.optim import Lars
from sklearn.datasets import load_digits

def in_two(f, *args):
    "Run `f` in two processes, forked from this one, and return what it returned in each"
    with tempfile.TemporaryDirectory() as d:
        def one():
            signal.alarm(120) # one that waits for ever is killed, and the test fails
            PartialState(cpu=True); torch.set_num_threads(1); set_seed(0)
            r = torch.distributed.get_rank(); os.environ['RANK'] = str(r); res = f(*args); torch.save(res, f'{d}/{r}')
        debug_launcher(one, num_processes=2)
        return [torch.load(f'{d}/{r}', weights_only=False) for r in range(2)]

def fit(learn, n=2, lr=5e-2, f='fit', **kw):
    with learn.distrib_ctx(): getattr(learn, f)(n, lr, **kw)
    return learn

def result(learn): return dict(model=sd_of(learn), losses=[o.item() for o in learn.recorder.losses], values=[list(o) for o in learn.recorder.values], taus=learn.byol.taus)
def near(a, b, eps=1e-5):
    for k in a['model']: torch.testing.assert_close(a['model'][k], b['model'][k], rtol=0, atol=eps)
    np.testing.assert_allclose(a['losses'], b['losses'], atol=eps); assert a['taus']==b['taus']
    return True

def dls_of(bs, n=72, **kw): return image_dls(noise(n), bs=bs, **{**dict(shuffle=True), **kw})

# --- two processes and one

def digits(bs):
    d = load_digits(); x = torch.tensor(d.images[:160]/16, dtype=torch.float32)[:,None].repeat_interleave(2,2).repeat_interleave(2,3)
    return image_dls(x, bs=bs, n_val=32, y=list(d.target[:160]), shuffle=True)

def twenty_steps(bs, opt=None, lr=5e-2):
    set_seed(0); dls = digits(bs); learn = byol_learn(dls, small_byol(bn=False, n_in=1), opt_func=opt or partial(SGD, mom=.9)); fit(learn, 5, lr, 'fit_one_cycle')
    knn = None if rank_distrib() else knn_accuracy(learn, dls.train, dls.valid, k=5)
    return {**result(learn), 'knn':knn}

@pytest.mark.parametrize('opt,lr', [(None,5e-2), (partial(OptimWrapper, opt=Lars, momentum=.9, weight_decay=1e-4),5.)], ids=['sgd','lars'])
def test_two_processes_equal_one(opt, lr):
    one = twenty_steps(32, opt, lr); a,b = in_two(twenty_steps, 16, opt, lr)
    assert len(one['losses'])==20 and same_sd(a['model'], b['model']) and near(one, a) and abs(one['knn']-a['knn'])<1e-5
    print(f"largest difference {max((one['model'][k]-a['model'][k]).abs().max() for k in one['model']):.1e}, kNN {one['knn']:.4f} and {a['knn']:.4f}")

def other_weights():
    set_seed(rank_distrib()+7); learn = byol_learn(dls_of(8)); before = sd_of(learn)
    with torch.no_grad():
        for p in learn.model.target.parameters(): p.add_(torch.randn_like(p))
    fit(learn, 1, 1e-2); return before,sd_of(learn)

def test_ranks_that_began_with_other_weights_are_equal_afterwards():
    (a0,a),(b0,b) = in_two(other_weights); assert not same_sd(a0, b0) and same_sd(a, b)

def bn_types():
    learn = byol_learn(dls_of(8)); before = str(learn.model); fit(learn); return before==str(learn.model),result(learn)

def test_batch_norm_statistics_are_those_of_the_first_process():
    (ta,a),(tb,b) = in_two(bn_types); assert ta and tb and same_sd(a['model'], b['model']) and a['values'][0][:2]==b['values'][0][:2]

def unsynchronised():
    learn = byol_learn(image_dls(noise(32), bs=4, n_val=0)); fit(learn); return sd_of(learn)
def test_they_are_so_without_validation_too(): # with it, `DistributedDataParallel` would see to that
    a,b = in_two(unsynchronised); assert same_sd(a, b)

def swapped(error):
    # the real one needs a GPU: what counts here is when it comes and goes
    import fastbyol.distributed as D
    class Other(nn.BatchNorm2d): pass
    def convert(m): o = Other(m.num_features); o._parameters.update(m._parameters); o._buffers.update(m._buffers); return o
    D.convert_sync_batchnorm = convert; learn = byol_learn(dls_of(8), BYOL(conv_body(), norm=None, hidden_size=16, projection_size=8)); before,inside = str(learn.model),[]
    learn.add_cb(Callback(before_batch=lambda self: inside.append(sum(isinstance(m, Other) for m in online_model(self.learn.model).modules()))))
    class Boom(Callback):
        def after_batch(self): raise RuntimeError('boom')
    with learn.distrib_ctx():
        learn.byol_trainer.sync_bn = True
        if error:
            with pytest.raises(RuntimeError, match='boom'): learn.fit(1, 1e-2, cbs=Boom())
        learn.fit(1, 1e-2); learn.fit(1, 1e-2)
    return set(inside),str(learn.model)==before,sd_of(learn),[p is q for g in learn.opt.param_lists for p,q in zip(g, trainable_params(learn.model))]
@pytest.mark.parametrize('error', [False,True])
def test_synchronised_batch_norm_is_there_while_training(error):
    (n,same_,a,ps),(*_,b,_) = in_two(swapped, error); assert n=={2} and same_ and same_sd(a, b) and all(ps) # online and target

class Own(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = conv_body(bn=False),nn.Linear(16*16,4)
    def forward(self, x): return self.b(self.a(x).flatten(1))
def unused(bs):
    set_seed(3); learn = byol_learn(dls_of(bs), small_byol_of(Own()), opt_func=partial(SGD, mom=.9)); fit(learn); return {**result(learn),'grad':learn.model.body.module.b.weight.grad}
def small_byol_of(net): return BYOL(net, layer='a', size=16, hidden_size=16, projection_size=8, norm=None)

def test_weights_without_a_gradient_are_no_error():
    one = unused(16); a,b = in_two(unused, 8); assert near(one, a) and same_sd(a['model'], b['model']) and a['grad'] is None

def accumulated(bs):
    set_seed(3); learn = byol_learn(dls_of(bs), small_byol(bn=False), cbs=GradientAccumulation(2*bs), opt_func=partial(SGD, mom=.9)); fit(learn, 2); return result(learn)
def test_accumulated_gradients():
    one = accumulated(16); a,b = in_two(accumulated, 8); assert near(one, a) and same_sd(a['model'], b['model']) and len(one['taus'])==4

def averaged():
    "EMAN: batch norm is each process's own, and yet its targets are equal"
    learn,(seen,own) = byol_learn(dls_of(8), small_byol(target_bn='eman')),([],[])
    def look(self): # before validation and the end of training send the first process's statistics to all
        if not self.training: return
        sd = {k:v.clone() for k,v in online_model(self.learn.model).state_dict().items() if 'running' in k}
        seen.append({k:v for k,v in sd.items() if k.startswith('target')}); own.append({k:v for k,v in sd.items() if not k.startswith('target')})
    learn.add_cb(Callback(after_batch=look)); fit(learn, 1); return seen,own
def test_averaged_statistics_are_equal_in_all_processes():
    (a,oa),(b,ob) = in_two(averaged)
    assert len(a)==4 and a[0] and all(same_sd(x, y) for x,y in zip(a, b)) and not same_sd(oa[-1], ob[-1])

# --- data

class Alone(ShardedDL):
    def _broadcast(self, t, rank): return t

def shards(n, bs, world, ds=None, **kw):
    def one(r): set_seed(0); return Alone(TfmdDL(ds or list(range(n)), bs=bs, num_workers=kw.pop('num_workers', 0), device=cpu, **kw), rank=r, world_size=world)
    return [[b.tolist() for b in one(r)] for r in range(world)],len(one(0))

@pytest.mark.parametrize('drop_last', [True,False])
@pytest.mark.parametrize('world', [1,2,3,4])
def test_nothing_twice_and_equally_many(world, drop_last):
    for n,bs in ((1,2),(7,3),(16,4),(24,4),(33,2),(40,5)):
        set_seed(0); one = [b.tolist() for b in TfmdDL(list(range(n)), bs=bs*world, shuffle=True, drop_last=drop_last, num_workers=0, device=cpu)]
        ps,k = shards(n, bs, world, shuffle=True, drop_last=drop_last); flat = sum(sum(ps, []), [])
        assert {len(p) for p in ps}=={k} and len(set(flat))==len(flat) and len({tuple(map(len, p)) for p in ps})==1
        assert n-len(flat)<(bs*world if drop_last else world)
        for b,o in zip(zip(*ps), one): assert sum(b, [])==o[:len(sum(b, []))] # in the order of one process

def test_a_last_batch_is_shared_out():
    ps,k = shards(19, 4, 2); assert [[len(b) for b in p] for p in ps]==[[4,4,1],[4,4,1]] and k==3

@pytest.mark.parametrize('workers', [0,2])
def test_worker_processes_see_to_whole_batches(workers):
    ps,_ = shards(24, 3, 2, num_workers=workers); assert ps==[[[0,1,2],[6,7,8],[12,13,14],[18,19,20]],[[3,4,5],[9,10,11],[15,16,17],[21,22,23]]]

class Holes(list):
    def __init__(self, n, bad): super().__init__(range(n)); self.bad = bad
    def __getitem__(self, i):
        if i in self.bad: raise SkipItemException()
        return torch.tensor(super().__getitem__(i))
def test_what_cannot_be_read_leaves_no_process_short():
    assert shards(16, 4, 2, Holes(16, (3,4,11)))==([[[0,1,2,0],[8,9,10,8]],[[5,6,7,5],[12,13,14,15]]],2)
    with pytest.raises(ValueError, match='None of the 4 items'): shards(8, 4, 1, Holes(8, range(4)))

def test_data_without_a_length_is_refused():
    class It(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(range(4))
    with pytest.raises(ValueError, match='__len__'): Alone(TfmdDL(It(), bs=2, num_workers=0, device=cpu), rank=0, world_size=2)

def broken_files(path):
    learn = byol_learn(unlabelled_dls(path, 16, bs=4, valid_pct=0, in_memory=False, num_workers=0, device=cpu), small_byol(bn=False), cbs=(g:=Grab()))
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); fit(learn, 1)
    return [len(x[0]) for x in g.xs],sd_of(learn)
def test_files_that_break_on_one_rank_do_not_stop_the_others(tmp_path):
    for i,o in enumerate(noise(24, 40)):
        f = tmp_path/f'{i:02d}.png'; PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(f)
        if i in (1,2,3,5): f.write_bytes(f.read_bytes()[:-200])
    (a,sa),(b,sb) = in_two(broken_files, tmp_path); assert a==b==[4,4,4] and same_sd(sa, sb)

def memory(path, in_memory):
    learn = byol_learn(unlabelled_dls(path, 16, bs=4, device=cpu, in_memory=in_memory, cache_dir=path/'cache'), small_byol(bn=False), views=None, size=16); fit(learn, 2); return result(learn)
def few_to_validate(n_val):
    learn = byol_learn(image_dls(noise(16+n_val), bs=4, n_val=n_val), small_byol(bn=False)); fit(learn, 1); return sd_of(learn),learn.recorder.values[0][1]
@pytest.mark.parametrize('n_val', [0,1,3])
def test_little_or_nothing_to_validate(n_val):
    (a,va),(b,vb) = in_two(few_to_validate, n_val); assert same_sd(a, b) and va==vb and (va is None)==(n_val==0)

def broken_valid():
    x,dl = noise(16),lambda ds,**k: TfmdDL(ds, bs=4, num_workers=0, device=cpu, **k)
    class Broken(list):
        def __getitem__(self, i):
            if 9<=i<=11: raise SkipItemException()
            return (TensorImage(x[i]),)
    learn = byol_learn(DataLoaders(dl([(TensorImage(o),) for o in x]), dl(Broken(range(16))), device=cpu), small_byol(bn=False)); fit(learn, 1); return learn.recorder.values[0][1]
def test_broken_files_in_validation_leave_no_process_waiting():
    a,b = in_two(broken_valid); assert a==b and 0<a<8

@pytest.mark.parametrize('in_memory', ['auto','disk'])
def test_images_in_memory(tmp_path, in_memory):
    for i,o in enumerate(noise(24, 40)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/f'{i:02d}.png')
    a,b = in_two(memory, tmp_path, in_memory); assert same_sd(a['model'], b['model']) and len(a['losses'])==4

# --- random numbers

def views_seen():
    x = noise(1).repeat(40,1,1,1); learn = byol_learn(image_dls(x, bs=4), small_byol(bn=False), views=None, size=16, cbs=[g:=Grab(),v:=GrabValid()]); fit(learn, 1)
    return [x[0] for x in g.xs],[x[0] for x in v.xs],draws()
class GrabValid(Grab):
    def __init__(self): super().__init__(valid=True)
def draws(): return random.random(),np.random.rand(),torch.rand(1).item()
def test_each_image_has_its_own_draw_and_a_seed_repeats_them():
    a,b = in_two(views_seen); again = in_two(views_seen)
    for i in (0,1): # training and validation
        every = torch.cat([*a[i],*b[i]]).flatten(1); assert len(every.unique(dim=0))==len(every)
        assert all(torch.equal(x, y) for p,q in zip((a,b), again) for x,y in zip(p[i], q[i]))
    assert all(x!=y for x,y in zip(a[2], b[2])) and [a[2],b[2]]==[o[2] for o in again]
    one = views_seen(); assert torch.equal(one[0][0], a[0][0]) # the first process draws as one alone would

# --- what goes wrong

class Spoil(Callback):
    order = 15
    def before_batch(self):
        if self.training and rank_distrib()==1 and self.iter==2: self.xb[0][0,0,0,0] = float('nan')
def nan_on_one():
    learn = byol_learn(dls_of(8), small_byol(bn=False), cbs=Spoil())
    try: fit(learn)
    except FloatingPointError as e: return str(e),sd_of(online_model(learn.model))
def test_nan_on_one_rank_stops_all_of_them():
    (m,a),(n,b) = in_two(nan_on_one); assert 'epoch 0, batch 2' in m and m==n and same_sd(a, b) and all(o.isfinite().all() for o in a.values())

class SpoilOnce(Callback):
    "NaN in the second batch of the first fit, in every process"
    order,done = 15,False
    def before_batch(self):
        if self.training and not self.done and self.iter==1: self.done = True; self.xb[0][0] = float('nan')
def again(bs, contexts):
    "A fit that the NaN stop ends, and another, within one context or two"
    learn = byol_learn(dls_of(bs), small_byol(bn=False), cbs=SpoilOnce(), opt_func=partial(SGD, mom=.9)); seen = []
    def look(): seen.append((type(learn.model).__name__,[type(o).__name__ for o in learn.dls.loaders]))
    def first_():
        try: learn.fit(2, 5e-2); raise AssertionError('not stopped')
        except FloatingPointError: pass
    if contexts==1:
        with learn.distrib_ctx(): first_(); learn.fit(2, 1e-2); look()
    else:
        with learn.distrib_ctx(): first_()
        look(); fit(learn, 2, 1e-2)
    look(); return {**result(learn),'seen':seen}
@pytest.mark.parametrize('contexts', [1,2])
def test_after_an_error_the_learner_fits_again_as_one_process_does(contexts):
    one = again(16, contexts); a,b = in_two(again, 8, contexts)
    assert a['seen']==b['seen']==[('BYOL',['TfmdDL','TfmdDL'])]*2 and same_sd(a['model'], b['model']) and near(one, a) and len(a['losses'])==8

# --- only the first process writes

def writes(path):
    out = io.StringIO(); learn = byol_learn(dls_of(8), path=path); learn.logger = print
    with redirect_stdout(out): fit(learn, 1)
    save_body(learn, path/f'body{rank_distrib()}'); learn.save(f'm{rank_distrib()}'); return out.getvalue()
def test_only_the_first_process_writes(tmp_path):
    a,b = in_two(writes, tmp_path); assert a.startswith('[0, ') and b=='' and {o.name for o in tmp_path.rglob('*.*')}=={'body0.safetensors','m0.pth'}

# --- checkpoints

class Stop(Callback):
    order = CheckpointCallback.order+1
    def __init__(self, *at): self.at = at
    def after_batch(self):
        if self.training and self.at==(self.epoch,self.iter+1): raise KeyboardInterrupt
    def after_epoch(self):
        if self.at==(self.epoch+1,0): raise KeyboardInterrupt

def checkpointed(d, at, seed):
    "Four epochs; stopped at `at`, or gone on with where a checkpoint is there"
    set_seed(seed); learn = byol_learn(dls_of(8), views=None, size=16, cbs=[CheckpointCallback(d, every_batches=1, monitor='valid_loss', keep=None), *([Stop(*at)] if at else [])])
    with redirect_stdout(io.StringIO()): learn.resume(d, missing_ok=True)
    try: fit(learn, 3, 1e-2, 'fit_one_cycle')
    except KeyboardInterrupt: pass
    return result(learn) if not at else None

@pytest.mark.parametrize('at', [(2,0),(1,2)])
def test_a_resumed_run_is_the_same_on_all_ranks(tmp_path, at):
    whole = in_two(checkpointed, tmp_path/'a', None, 1); in_two(checkpointed, tmp_path/'b', at, 1)
    st = load_state(checkpoints(tmp_path/'b')[0]); assert (st['epoch'],st['batch'])==at and len(st['chance'])==2 and not torch.equal(*[o['rng']['torch'] for o in st['chance']])
    again = in_two(checkpointed, tmp_path/'b', None, 5)
    for a,b in zip(whole, again): assert same_sd(a['model'], b['model']) and a['losses']==b['losses'] and a['taus']==b['taus'] and a['values']==b['values']
    assert (tmp_path/'b'/'best.ckpt').exists()

def test_resume_in_another_number_of_processes_warns(tmp_path):
    in_two(checkpointed, tmp_path, (1,0), 1)
    with pytest.warns(UserWarning, match='2 processes, now there are 8 and 1'): one = checkpointed(tmp_path, None, 5)
    assert np.isfinite(one['losses']).all()

# --- monitors

def watched(bs, monitors=True):
    set_seed(0); dls = digits(bs); dls.c = 10
    cbs = [KNNCallback(digits(16), k=5), OnlineProbe(), HealthMonitor(n_items=32)] if monitors else None
    learn = byol_learn(dls, small_byol(bn=False, n_in=1), cbs=cbs, opt_func=partial(SGD, mom=.9)); fit(learn, 3)
    if not monitors: return result(learn)
    return {**result(learn), 'knn':learn.knn.history.knn.tolist(), 'probe':learn.probe.history.to_dict('list'), 'head':learn.probe.head[1].weight.detach(), 'health':learn.health.history.drop(columns=['loss','grad_norm'], errors='ignore')}

def test_monitors_see_the_data_of_all_processes_and_leave_training_alone():
    plain,_ = in_two(watched, 16, False); a,b = in_two(watched, 16); one = watched(32)
    assert same_sd(plain['model'], a['model']) and plain['losses']==a['losses'] # to the bit
    assert a['knn']==b['knn'] and np.allclose(a['knn'], one['knn'], atol=1e-5) and len(a['knn'])==4 and a['knn'][-1]>.3
    assert a['probe']==b['probe'] and torch.equal(a['head'], b['head']) # the classifier is one, trained on the labels of both
    pd.testing.assert_frame_equal(a['health'], b['health']); assert len(a['health'])==4 and np.isfinite(a['health']['std']).all()

# --- and the rest of fastai

def classify():
    x,y = noise(40),[i%2 for i in range(40)]
    learn = hush(byol_vision_learner(image_dls(x, y=y, bs=4, shuffle=True), small_byol(), n_out=2, loss_func=CrossEntropyLossFlat(), metrics=accuracy)); fit(learn, 1, 1e-3, 'fine_tune')
    assert any(isinstance(m, nn.BatchNorm2d) for m in learn.model.modules()); return {k:v for k,v in sd_of(learn).items() if 'running' not in k and 'num_b' not in k}
def test_a_classifier_with_batch_norm_trains_on_cpus():
    a,b = in_two(classify); assert same_sd(a, b)

def twice():
    learn = byol_learn(dls_of(8))
    with learn.distrib_ctx(): learn.fit(1, 1e-2); v = learn.validate(); learn.fit(1, 1e-2); w = learn.validate(), learn.validate()
    return sd_of(learn),list(v),[list(o) for o in w],hasattr(learn, 'byol_trainer'),type(learn.dls.train).__name__
def test_two_fits_and_validation():
    (a,v,w,left,dl),(b,*_) = in_two(twice); assert same_sd(a, b) and w[0]==w[1] and not left and dl=='TfmdDL'

def test_batch_norm_goes_and_comes_back():
    for m in (small_byol(), BYOL('mobilenetv3_small_050', hidden_size=8)):
        x = noise(4,32); before = str(m); old = sync_bn_(m); assert not any(type(o) in (nn.BatchNorm2d,nn.BatchNorm1d) or 'BatchNormAct2d'==type(o).__name__ for o in m.modules())
        m.train(); m(x,x); m.targets(x,x); sd = sd_of(m); undo_sync_bn_(m, old); assert str(m)==before and same_sd(sd, sd_of(m))
        with eval_mode(m): y = m.embed(x)
        sync_bn_(m)
        with eval_mode(m): assert torch.equal(m.embed(x), y) # timm's activation is still there

def test_a_byol_gets_its_own_trainer():
    cbs = lambda learn: [o for o in learn.to_distributed(sync_bn=False, cpu=True).cbs if isinstance(o, DistributedTrainer)]
    assert [type(o) for o in cbs(byol_learn(dls_of(8)))]==[BYOLTrainer]
    assert [type(o) for o in cbs(hush(Learner(dls_of(8), conv_body(), loss_func=noop)))]==[DistributedTrainer]

def test_one_process_alone_is_left_alone():
    a = byol_learn(dls_of(8)); b = byol_learn(dls_of(8), deepcopy(a.model)); s = torch.get_rng_state()
    for l in (a,b): torch.set_rng_state(s); l.dls.train.rng = random.Random(1); fit(l, 1) if l is a else l.fit(1, 5e-2)
    assert same_sd(sd_of(a), sd_of(b)) and not hasattr(a, 'byol_trainer')

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
    for cmd in ([sys.executable], [sys.executable,'-m','torch.distributed.run','--standalone','--nproc_per_node','2']):
        res = subprocess.run([*cmd, tmp_path/'s.py', Path(__file__).parent, tmp_path], capture_output=True, text=True, timeout=300)
        assert res.returncode==0, res.stderr[-2000:]
    one,a,b = (torch.load(tmp_path/f) for f in ('0_0.pth','2_0.pth','2_1.pth'))
    assert same_sd(a, b)
    for k in one: torch.testing.assert_close(a[k], one[k], rtol=0, atol=1e-5)
