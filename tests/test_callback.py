"`BYOLCallback` in fastai's loop: lock-step with plain torch, and everything that users hang on the loop"
from conftest import *
from fastai.callback.all import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix,MixUp
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastbyol import callback

# --- a whole training run against plain torch

class PlainBYOL:
    "BYOL in plain float64 torch, written from the paper: no batch norm, views `x` and its mirror, SGD with momentum"
    def __init__(self, m, lr, mom, tau, n_steps):
        self.p = {k:v.detach().double().clone().requires_grad_() for k,v in m.named_parameters() if not k.startswith('target')}
        self.t = {k:v.detach().clone() for k,v in self.p.items() if not k.startswith('predictor')}
        self.mean,self.std,self.lr,self.mom,self.tau,self.n,self.k = m.mean.double(),m.std.double(),lr,mom,tau,n_steps,0
        self.v = {k:torch.zeros_like(v) for k,v in self.p.items()}
    def project(self, p, x):
        for i in (0,2): x = torch.tanh(F.conv2d(x, p[f'body.{i}.weight'], p[f'body.{i}.bias'], 2, 1))
        return self.mlp(p, 'projector', x.mean((2,3)))
    def mlp(self, p, nm, x): return torch.relu(x@p[f'{nm}.0.weight'].T + p[f'{nm}.0.bias'])@p[f'{nm}.3.weight'].T
    def loss(self, x):
        a,b = ((o.double()-self.mean)/self.std for o in (x,x.flip(-1)))
        unit = lambda o: o/o.norm(dim=1, keepdim=True)
        (q1,q2),(z1,z2) = (unit(self.mlp(self.p,'predictor',self.project(self.p,v))) for v in (a,b)),(unit(self.project(self.t,v)).detach() for v in (a,b))
        return ((q1-z2)**2).sum(1).mean() + ((q2-z1)**2).sum(1).mean()
    def step(self, x):
        loss = self.loss(x); grads = torch.autograd.grad(loss, list(self.p.values()))
        tau = 1-(1-self.tau)*(math.cos(math.pi*self.k/self.n)+1)/2
        with torch.no_grad():
            for (k,p),g in zip(self.p.items(), grads): self.v[k].mul_(self.mom).add_(g); p.sub_(self.lr*self.v[k])
            for k,t in self.t.items(): t.copy_(tau*t+(1-tau)*self.p[k])
        self.k += 1
        return loss.item()
    def check(self, m, tol=1e-5):
        for k,v in m.named_parameters():
            want = self.t[k[7:]] if k.startswith('target.') else self.p[k]
            torch.testing.assert_close(v.detach().double(), want.detach(), atol=tol, rtol=tol, msg=lambda s: f'{k}: {s}')

torch_sgd = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))

@cpu_only('compares with float64 on the CPU')
@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), torch_sgd], ids=['fastai','torch'])
@pytest.mark.parametrize('norm', [None, imagenet_stats])
def test_training_is_that_of_plain_torch_step_by_step(opt, norm):
    x,n = noise(40),4*3
    dls = image_dls(x, norm=norm and [Normalize.from_stats(*norm, cuda=False)])
    m,grab = small_byol(bn=False),Grab()
    ref = PlainBYOL(m, .5, .9, .9, n)
    learn = byol_learn(dls, m, opt_func=opt, cbs=grab); learn.moms = None
    learn.fit(3, lr=.5)
    want = [ref.step(x[i*8:i*8+8]) for _ in range(3) for i in range(4)]
    np.testing.assert_allclose(grab.losses, want, rtol=1e-4); assert max(want)-min(want)>1e-2
    ref.check(m)
    x_val = x[32:]; np.testing.assert_allclose(learn.validate()[0], ref.loss(x_val).item(), rtol=1e-4)

@pytest.mark.parametrize('tau,tau_end', [(0.,0.), (1.,1.), (.5,.5), (.5,1.)])
def test_target_follows_timms_ema_stepped_alongside(tau, tau_end):
    from timm.utils import ModelEmaV3
    class Alongside(Callback):
        order = 60
        def before_fit(self):
            m = self.learn.model; self.net = nn.ModuleDict(dict(body=m.body, projector=m.projector)); self.ema = ModelEmaV3(self.net, exclude_buffers=True)
        def after_step(self): self.ema.decay = self.learn.byol.taus[-1]; self.ema.update(self.net)
    learn = byol_learn(tau=tau, tau_end=tau_end, cbs=[o:=Alongside()]); learn.fit(5, 1e-2)
    for a,b in zip(learn.model.target.parameters(), o.ema.module.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(learn.byol.taus)==15 and learn.byol.taus[0]==pytest.approx(tau)

@pytest.mark.parametrize('steps', [1,7,40])
def test_tau_is_the_cosine_of_the_paper(steps):
    got = [target_decay(k, steps, .99) for k in range(steps+1)]
    np.testing.assert_allclose(got, 1-(1-.99)*(np.cos(np.pi*np.arange(steps+1)/steps)+1)/2, rtol=1e-12)

# --- one update of the target per step that happened

def moved(learn, **kw):
    "Per batch of a fit: did the online weights change, did the target's?"
    class Watch(Callback):
        order = 90
        def before_fit(self): self.sd,self.log = sd_of(self.learn),[]
        def after_batch(self):
            if not self.training: return
            new = sd_of(self.learn); d = {k for k in new if not torch.equal(new[k], self.sd[k]) and 'running' not in k and 'num_b' not in k}; self.sd = new
            self.log.append((any(not k.startswith('target') for k in d), any(k.startswith('target') for k in d)))
    learn.fit(kw.pop('n',1), .05, cbs=[w:=Watch(), *L(kw.pop('cbs',None))], **kw)
    return w.log

def test_target_moves_with_every_step(): assert moved(byol_learn())==[(True,True)]*3
def test_target_rests_where_a_step_is_cancelled(): assert moved(byol_learn(cbs=CancelSteps(0,2)))==[(False,False),(True,True),(False,False)]

@pytest.mark.parametrize('event,ex', [('before_batch',CancelBatchException),('after_pred',CancelBatchException),('before_backward',CancelBatchException),('before_step',CancelBatchException),('before_step',CancelStepException)])
def test_target_rests_where_a_batch_is_cancelled(event, ex):
    def cancel(self):
        if self.training and self.iter==1: raise ex()
    class Cancel(Callback): order = 50
    setattr(Cancel, event, cancel)
    log = moved(byol_learn(cbs=Cancel()))
    assert log[0]==log[2]==(True,True) and log[1] in ((False,False),)

def test_accumulation_updates_the_target_once_per_step():
    assert moved(byol_learn(image_dls(noise(40))), cbs=GradientAccumulation(16))==[(False,False),(True,True)]*2

@pytest.mark.parametrize('opt', [SGD, partial(SGD, mom=.9), Adam])
def test_accumulating_two_halves_equals_the_whole_batch(opt):
    x,ms = noise(40),[]
    start = small_byol(bn=False)
    for bs,cbs in ((8,[]),(4,[GradientAccumulation(8)])):
        learn = byol_learn(image_dls(x, bs=bs), deepcopy(start), opt_func=opt, cbs=cbs)
        learn.fit(2, 1e-2); ms.append((sd_of(learn),learn.byol.taus))
    assert ms[0][1]==pytest.approx(ms[1][1]) and len(ms[0][1])==8
    for k in ms[0][0]: torch.testing.assert_close(ms[0][0][k], ms[1][0][k], atol=1e-5, rtol=1e-4)

def cpu_amp(dtype, **scaler):
    "fastai's `MixedPrecision` on the CPU, where fastai itself only knows CUDA"
    class CPUMixedPrecision(MixedPrecision):
        def before_fit(self):
            self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=dtype),GradScaler('cpu', **scaler),L()
    return CPUMixedPrecision()

@cpu_only('autocast of the CPU')
def test_float16_overflow_skips_the_target_too():
    learn = byol_learn(image_dls(noise(136)), cbs=cpu_amp(torch.float16, init_scale=2.**24, growth_interval=1000))
    log = moved(learn); n = log.index((True,True))
    assert 0<n<len(log) and log==[(False,False)]*n+[(True,True)]*(len(log)-n) # overflows, until the scale has come down
    assert len(learn.byol.taus)==len(log)-n

@cpu_only('autocast of the CPU')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_online_and_target_run_under_autocast_and_views_in_float32(dtype):
    seen = defaultdict(set)
    def view(x): seen['view'].add((torch.is_autocast_enabled('cpu'),x.dtype,(x@x).dtype)); return x
    m = small_byol()
    for nm,o in dict(online=m.body[0], projector=m.projector[0], target=m.target['body'][0], target_projector=m.target['projector'][0]).items():
        o.register_forward_hook(lambda o,i,y,nm=nm: seen[nm].add((torch.is_autocast_enabled('cpu'),y.dtype)))
    learn = byol_learn(model=m, views=(view,view), cbs=cpu_amp(dtype, enabled=False))
    class Watch(Callback):
        order = 40
        def after_pred(self): seen['types'].add((self.pred.dtype,self.xb[0].dtype))
        def after_loss(self): seen['loss'].add(self.loss.dtype)
    learn.fit(1, 1e-2, cbs=Watch())
    assert seen.pop('view')=={(False,torch.float32,torch.float32)}
    assert seen.pop('types')=={(torch.float32,torch.float32)} and seen.pop('loss')=={torch.float32}
    assert len(seen)==4 and all((True,dtype) in o for o in seen.values())
    assert seen['online']==seen['target']

@cpu_only('autocast of the CPU')
@pytest.mark.parametrize('to', ['to_fp16','to_bf16'])
@pytest.mark.filterwarnings('ignore')
def test_fastais_mixed_precision_runs_on_the_cpu(to):
    learn = byol_learn(); getattr(learn, to)()
    log = moved(learn); assert log==[(True,True)]*3 and np.isfinite(learn.validate()[0])

@cpu_only('autocast of the CPU')
def test_an_error_in_the_first_batch_leaves_autocast_off():
    learn = byol_learn(model=small_byol(n_in=1), cbs=cpu_amp(torch.bfloat16, enabled=False))
    try:
        with pytest.raises(ValueError, match='n_in=3'): learn.fit(1)
        assert not torch.is_autocast_enabled('cpu')
    finally: learn.cbs[-1].autocast.__exit__(None, None, None)

# --- the target lives in the model

def test_statistics_of_the_target_move_with_each_batch_and_come_back_after_a_nan():
    stats = lambda m: {k:v.clone() for k,v in m.target.state_dict().items() if 'running' in k}
    class Log(Callback):
        order = 90
        def before_fit(self): self.at = [stats(self.learn.model)]
        def after_batch(self):
            if self.training: self.at.append(stats(self.learn.model))
    learn = byol_learn(image_dls(noise(48)), cbs=[CancelSteps(0,2), log:=Log()]); learn.fit(1, .05)
    moved = [not same_sd(a, b) for a,b in zip(log.at, log.at[1:])]
    assert moved==[True]*5
    class Spoil(Callback):
        order = 15
        def before_batch(self):
            if self.iter==1: self.learn.kept = sd_of(self.learn); self.xb[0][0] = float('nan')
    class Before(Callback): # the target's own statistics have moved by the time that `Spoil` looks
        order = 11
        def before_batch(self): self.sd = sd_of(self.learn)
    learn = byol_learn(image_dls(noise(48)), cbs=[Spoil(), b:=Before()])
    with pytest.raises(FloatingPointError): learn.fit(1, .05)
    assert same_sd(sd_of(learn), b.sd) and all(v.isfinite().all() for v in b.sd.values())

@cpu_only('autocast of the CPU')
@pytest.mark.parametrize('amp', [None,torch.bfloat16])
def test_the_target_trains_is_saved_and_resumes(amp, tmp_path):
    mk = lambda: (set_seed(3), byol_learn(image_dls(noise(40)), small_byol(), path=tmp_path, cbs=cpu_amp(amp, enabled=False) if amp else None))[1]
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: self.learn.save('half'); raise CancelFitException()
    whole = mk(); whole.fit(4, 1e-2); a = mk(); a.fit(4, 1e-2, cbs=Stop()); b = mk(); b.create_opt(); b.load('half'); b.fit(4, 1e-2, start_epoch=2)
    for k,v in sd_of(whole).items(): torch.testing.assert_close(sd_of(b)[k], v, rtol=1e-5, atol=1e-6, msg=k)
    assert np.isfinite(whole.validate()[0]) and whole.validate()==whole.validate()

def test_a_second_fit_copies_nothing():
    learn = byol_learn(tau=.99); learn.fit(2, .05); before = sd_of(learn)
    learn.fit(1, 0.) # a fit that changes no weight: the target only moves on towards the online network
    for (k,t),o in zip(learn.model.target.named_parameters(), [*learn.model.body.parameters(),*learn.model.projector.parameters()]):
        want = before['target.'+k].to(dev)
        for tau in learn.byol.taus: want = tau*want+(1-tau)*o
        torch.testing.assert_close(t, want, rtol=1e-5, atol=1e-6)
    assert not all(torch.equal(a,b) for a,b in zip(learn.model.target.parameters(), [*learn.model.body.parameters(),*learn.model.projector.parameters()]))

@cpu_only('fastai loads the state of an optimiser of torch before the model is on the GPU')
@pytest.mark.parametrize('opt', [Adam, torch_sgd], ids=['adam','torch'])
def test_resuming_equals_never_having_stopped(opt, tmp_path):
    def mk(): set_seed(3); return byol_learn(image_dls(noise(40)), path=tmp_path, opt_func=opt)
    whole = mk(); whole.fit(4, 1e-2)
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: self.learn.save('half'); raise CancelFitException()
    a = mk(); a.fit(4, 1e-2, cbs=Stop())
    b = mk(); b.create_opt(); b.load('half'); b.fit(4, 1e-2, start_epoch=2)
    assert b.byol.taus==pytest.approx(whole.byol.taus[8:]) and len(b.byol.taus)==8
    for k,v in sd_of(whole).items(): torch.testing.assert_close(sd_of(b)[k], v, rtol=1e-5, atol=1e-6)

def test_tau_goes_on_after_a_resume_under_accumulation():
    learn = byol_learn(image_dls(noise(40)), cbs=GradientAccumulation(16)); learn.fit(4, 1e-2); taus = learn.byol.taus
    learn.fit(4, 1e-2, start_epoch=2); assert learn.byol.taus==pytest.approx(taus[4:]) and len(taus)==8

def test_save_and_load_keep_the_target(tmp_path):
    learn = byol_learn(path=tmp_path); learn.fit(1, .05); learn.save('a'); want = sd_of(learn)
    other = byol_learn(path=tmp_path); assert not same_sd(sd_of(other), want)
    other.load('a'); assert same_sd(sd_of(other), want)

def labelled_dls(n=24, **kw):
    "fastai's `DataBlock` of images and categories"
    ims = [PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()) for o in noise(n)]
    return DataBlock((ImageBlock,CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: 'ab'[i%2], splitter=IndexSplitter(range(16,n))).dataloaders(
        range(n), bs=8, num_workers=0, device=cpu, **kw)

def folder_dls(path, n=24, **kw):
    "`unlabelled_dls` of pictures that it writes"
    path.mkdir(exist_ok=True)
    for i,o in enumerate(noise(n)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(path/f'{i:02}.png')
    return unlabelled_dls(path, 16, **{**dict(bs=8, device=cpu, num_workers=0), **kw})

@pytest.mark.parametrize('in_memory', [True,False])
@pytest.mark.parametrize('views', [None,(same,mirror)], ids=['default','own'])
@pytest.mark.filterwarnings('ignore')
def test_export_and_load_learner_predict_the_same(tmp_path, in_memory, views):
    dls = folder_dls(tmp_path/'d', valid_pct=.3, in_memory=in_memory, batch_tfms=Normalize.from_stats([.5]*3,[.25]*3,cuda=False))
    learn = byol_learn(dls, path=tmp_path, views=views); learn.fit(1, .05); files = dls.valid_ds.items
    a = learn.get_preds(dl=dls.test_dl(files)); learn.export('e.pkl')
    new = hush(load_learner(tmp_path/'e.pkl')); b = new.get_preds(dl=new.dls.test_dl(files))
    assert same_sd(sd_of(new), sd_of(learn)) and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and len(a[0])==7
    assert torch.equal(a[0], learn.get_preds()[0]) and new.model.stats==((.5,)*3,(.25,)*3)
    assert (tmp_path/'e.pkl').stat().st_size < 300_000 # no images and no batches in it

@pytest.mark.parametrize('kw', [{}, dict(momentum=False), dict(norm='group', hidden_size=64)])
def test_lr_find_restores_everything_and_suggests(kw, tmp_path):
    learn = byol_learn(image_dls(noise(72)), small_byol(**kw), path=tmp_path); learn.fit(1, .05); before = sd_of(learn); state = deepcopy(learn.opt.state_dict())
    lr = learn.lr_find(num_it=20, show_plot=False)
    assert same_sd(sd_of(learn), before) and 1e-8<lr.valley<10
    for a,b in zip(learn.opt.state_dict()['state'], state['state']):
        for k in b: assert torch.equal(a[k],b[k]) if isinstance(b[k], Tensor) else a[k]==b[k]
    assert moved(learn)[0]==(True,learn.model.momentum)

def test_a_nan_only_ends_lr_find(tmp_path):
    class Spoil(Callback):
        order = 15
        def before_batch(self):
            if self.train_iter>=15: self.xb[0][0] = float('nan')
    learn = byol_learn(image_dls(noise(72)), path=tmp_path, cbs=Spoil()); before = sd_of(learn)
    learn.lr_find(num_it=40, show_plot=False); assert same_sd(sd_of(learn), before) and len(learn.recorder.losses)==15
    learn.remove_cb(Spoil); learn.fit(1, .01)

def test_lr_find_survives_a_learning_rate_that_explodes(tmp_path):
    learn = byol_learn(image_dls(noise(72)), small_byol(bn=False), path=tmp_path, opt_func=SGD); before = sd_of(learn)
    learn.lr_find(start_lr=1e-3, end_lr=1e30, num_it=40, stop_div=False, show_plot=False); assert same_sd(sd_of(learn), before)

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fit_flat_cos','fit_sgdr'])
def test_every_kind_of_fit_runs_and_learns(fit):
    learn = byol_learn(image_dls(noise(40)), tau=.99)
    getattr(learn, fit)(*((1,3) if fit=='fit_sgdr' else (3,)), **{'lr_max' if fit in ('fit_one_cycle','fit_sgdr') else 'lr':3e-3})
    n = 3*4; assert len(learn.byol.taus)==n and learn.byol.taus==pytest.approx([target_decay(k,n,.99) for k in range(n)])
    assert learn.recorder.values[-1][0]<learn.recorder.values[0][0]

# --- looking

def test_validation_is_deterministic_with_random_views_and_leaves_training_random():
    class Rng(Callback): # the random numbers just before and just after `BYOLCallback` draws its views
        def __init__(self, order): self.order,self.log = order,[]
        def before_batch(self): self.log.append((self.training, torch.get_rng_state(), random.getstate()))
    learn = byol_learn(image_dls(noise(40)), views=None, size=16, cbs=[r0:=Rng(11), r1:=Rng(13)]); learn.fit(1, .05); before = sd_of(learn)
    a,b = learn.validate(),learn.validate()
    assert a==b and same_sd(sd_of(learn), before)
    for p,q in zip(r0.log, r1.log): assert (torch.equal(p[1],q[1]) and p[2]==q[2])!=p[0]
    learn.remove_cb(Rng)
    g = Grab(); learn.fit(2, 0., cbs=g); assert not torch.equal(g.xs[0][0], g.xs[4][0]) # training draws anew
    v = Grab(valid=True); learn.fit(2, 0., cbs=v); assert all(torch.equal(p,q) for p,q in zip(v.xs[0], v.xs[1]))

def test_validation_batches_are_drawn_differently():
    x = noise(1).repeat(32,1,1,1); g = Grab(valid=True)
    byol_learn(image_dls(x, n_val=16), views=None, size=16, cbs=g).fit(1, 0.); assert not torch.equal(g.xs[0][0], g.xs[1][0])

@cpu_only('gives the model tensors of the CPU')
@pytest.mark.parametrize('kw', [dict(ds_idx=0), dict(ds_idx=1), dict(with_loss=True), dict(with_input=True), dict(with_input=True, with_loss=True)])
def test_get_preds(kw):
    learn = byol_learn(image_dls(noise(36), n_val=11)); learn.fit(1, .05); r = list(learn.get_preds(**kw))
    n,m = (25 if kw.get('ds_idx')==0 else 11),learn.model.eval()
    x = noise(36)[:25] if kw.get('ds_idx')==0 else noise(36)[25:]; v = m.normalize(x),m.normalize(mirror(x))
    if kw.get('with_input'): assert torch.equal(r.pop(0).as_subclass(Tensor), x) # the images, as the data loader gave them
    with torch.no_grad(): torch.testing.assert_close(r[0], m(*v)); torch.testing.assert_close(r[1], m.targets(*v))
    assert r[0].shape==r[1].shape==(n,2,8)
    if kw.get('with_loss'): torch.testing.assert_close(r[2], BYOLLoss('none')(r[0],r[1])); assert learn.loss_func.reduction=='mean'

@pytest.mark.parametrize('y', [None, [0,1]*16])
def test_summary_runs_and_leaves_statistics_alone(y):
    learn = byol_learn(image_dls(noise(32), y=y)); before = sd_of(learn)
    assert 'BYOL' in learn.summary() and same_sd(sd_of(learn), before)

@pytest.mark.parametrize('views', [None,(same,mirror)])
def test_show_views_leaves_everything_alone(views):
    learn = byol_learn(image_dls(noise(32), shuffle=True), views=views); before = sd_of(learn)
    fig = learn.byol.show_views(3); assert len(fig.axes)==9 and same_sd(sd_of(learn), before); plt.close(fig)

# --- fastai's callbacks

def test_gradient_clip_bounds_the_step():
    class Norm(Callback):
        order = 40
        def before_step(self): self.learn.norms.append(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item())
    learn = byol_learn(cbs=[GradientClip(1e-3), Norm()]); learn.norms = []; log = moved(learn)
    assert log==[(True,True)]*3 and max(learn.norms)<1.01e-3

def test_save_model_and_early_stopping_follow_the_validation_loss(tmp_path):
    class Spoil(Callback): # from the second epoch on the predictions point the other way
        order = 10
        def before_step(self):
            if self.epoch>=1: raise CancelStepException()
        def before_validate(self):
            if self.epoch==1: self.learn.first = sd_of(self.learn); self.learn.model.predictor[3].weight.data.neg_()
    learn = byol_learn(image_dls(noise(136)), path=tmp_path, cbs=[SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=2), Spoil()])
    learn.fit(9, 1e-2)
    keep = lambda sd: {k:v for k,v in sd.items() if 'running' not in k and 'num_batches' not in k} # cancelled steps still run batch norm
    assert len(learn.recorder.values)==3 and (tmp_path/'models'/'best.pth').exists()
    assert same_sd(keep(sd_of(learn)), keep(learn.first))

def test_csv_logger_writes_a_line_per_epoch(tmp_path):
    learn = byol_learn(path=tmp_path, cbs=CSVLogger()); learn.fit(2, 1e-3)
    df = pd.read_csv(tmp_path/'history.csv'); assert len(df)==2 and df[['train_loss','valid_loss']].notna().all().all()

def test_channels_last_changes_no_result():
    x,r = noise(40),[]
    m = small_byol()
    for cbs in ([],[ChannelsLast()]):
        learn = byol_learn(image_dls(x), deepcopy(m), cbs=cbs, opt_func=SGD); learn.fit(1, 1e-2); r.append(sd_of(learn))
    for k in r[0]: torch.testing.assert_close(*[o[k] for o in r], rtol=1e-3, atol=1e-5)
    assert learn.model.body[0].weight.is_contiguous(memory_format=torch.channels_last)

def test_metrics_see_prediction_target_and_the_true_batch_size():
    def cosine(p, t): return F.cosine_similarity(p, t, dim=-1).mean()
    learn = byol_learn(image_dls(noise(35), n_val=11), metrics=cosine, cbs=[g:=Grab()]); learn.fit(1, 1e-2)
    loss,cos = learn.validate(); assert loss==pytest.approx(4-4*cos, rel=1e-4)
    assert all(find_bs(y)==8 and y[0].shape==(8,2,8) for y in g.ys)

# --- data of every kind

def test_labels_never_reach_the_model_and_probes_find_them():
    y = [i%5 for i in range(32)]; seen = []
    class Probe(Callback):
        order = 40
        def after_pred(self): seen.append((len(self.xb),len(self.yb),self.yb[0].dtype,self.learn.byol.labels))
    learn = byol_learn(image_dls(noise(32), y=y), cbs=Probe()); learn.fit(1, 1e-2)
    assert all(o[:3]==(2,1,torch.float32) for o in seen)
    assert torch.cat([o[3][0] for o in seen]).tolist()==y

def test_labels_change_nothing():
    r = []
    m = small_byol()
    for y in (None, [0]*32, list(range(32))):
        set_seed(1); learn = byol_learn(image_dls(noise(32), y=y, shuffle=False), deepcopy(m), views=None, size=16); learn.fit(1, 1e-2); r.append(sd_of(learn))
    assert same_sd(r[0], r[1]) and same_sd(r[0], r[2])

def test_the_loss_of_labelled_data_is_replaced():
    learn = hush(Learner(labelled_dls(), small_byol(), cbs=BYOLCallback(views=(same,mirror))))
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    learn.fit(1, 1e-2); assert isinstance(learn.loss_func, BYOLLoss) and 0<=learn.validate()[0]<=8

def test_the_loss_of_labelled_data_is_replaced_before_a_fit_too():
    m = small_byol(); a = hush(Learner(labelled_dls(), m, cbs=BYOLCallback(views=(same,mirror)))).validate()[0]
    assert a==hush(Learner(labelled_dls(), m, loss_func=BYOLLoss(), cbs=BYOLCallback(views=(same,mirror)))).validate()[0]

@cpu_only('gives the model tensors of the CPU')
def test_the_statistics_of_the_data_hold_before_a_fit_too():
    learn = byol_learn(image_dls(noise(32), norm=[Normalize.from_stats([.5]*3,[.25]*3,cuda=False)])); a = learn.validate()[0]
    x,m = noise(32)[24:],learn.model.eval(); v = [(o-.5)/.25 for o in (x,mirror(x))]
    with torch.no_grad(): assert a==pytest.approx(byol_loss(m(*v), m.targets(*v)).item(), rel=1e-4)

def test_get_preds_on_a_loader_that_does_not_normalise():
    norm = [Normalize.from_stats(*imagenet_stats, cuda=False)]; learn = byol_learn(image_dls(noise(32), norm=norm))
    a,b = (learn.get_preds(dl=image_dls(noise(32), norm=o).valid)[0] for o in (norm,None)); torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('look', ['get_preds','summary'])
def test_looking_warns_of_nothing(look):
    learn = byol_learn()
    with warnings.catch_warnings(): warnings.filterwarnings('error', message='.*shadowing'); getattr(learn, look)()

@pytest.mark.parametrize('kind', ['x','xy'])
def test_plain_torch_loaders(kind):
    from torch.utils.data import TensorDataset, DataLoader as TorchDL
    ds = TensorDataset(*[noise(24), torch.arange(24)][:len(kind)])
    dls = DataLoaders(TorchDL(ds, 8, shuffle=True), TorchDL(ds, 8))
    learn = byol_learn(dls); assert moved(learn)==[(True,True)]*3 and np.isfinite(learn.validate()[0]) and learn.byol.labels is not None
    learn.byol.show_views(2); assert learn.get_preds(dl=dls.valid)[0].shape==(24,2,8)

def test_uint8_images_count_as_pixels():
    x = (noise(24)*255).byte(); a,b = Grab(),Grab()
    byol_learn(image_dls(x), cbs=a).fit(1,0.); byol_learn(image_dls(x.float()/255), cbs=b).fit(1,0.)
    torch.testing.assert_close(a.xs[0][0], b.xs[0][0])

@cpu_only('gives the model tensors of the CPU')
@pytest.mark.parametrize('own', [False,True])
def test_normalize_is_done_once_with_the_datas_statistics(own):
    x,stats,seen = noise(32),([.3,.4,.5],[.2,.25,.3]),[]
    def view(o): seen.append(o); return o
    norm = None if own else [Normalize.from_stats(*stats, cuda=False)]
    learn = byol_learn(image_dls(x, norm=norm), small_byol(stats=stats if own else None), views=(view,view), cbs=[g:=Grab()]); learn.fit(1, 0.)
    t = torch.tensor(stats)[:,None,:,None,None]
    torch.testing.assert_close(g.xs[0][0], (x[:8]-t[0])/t[1], atol=1e-5, rtol=1e-5)
    assert any(o.shape==x[:8].shape and torch.allclose(o, x[:8], atol=1e-6) for o in seen)
    np.testing.assert_allclose(learn.model.stats, stats, rtol=1e-6)

def test_an_empty_validation_set_fits(tmp_path):
    learn = byol_learn(folder_dls(tmp_path/'d', 9, bs=4, valid_pct=0)); assert moved(learn)==[(True,True)]*2 and learn.recorder.values[-1][-1] is None

@pytest.mark.parametrize('kw', [dict(bn=False), dict(norm='layer',bn=False)])
def test_batches_of_one_train_without_batch_norm(kw):
    assert moved(byol_learn(image_dls(noise(12), bs=1), small_byol(**kw)))==[(True,True)]*4

def test_a_last_batch_of_one_trains_without_batch_norm():
    assert moved(byol_learn(image_dls(noise(17), drop_last=False), small_byol(bn=False)))==[(True,True)]*2

def test_a_last_validation_batch_of_one_is_fine_with_batch_norm():
    learn = byol_learn(image_dls(noise(33), n_val=9)); learn.fit(1, 1e-2); assert np.isfinite(learn.validate()[0])

def test_a_loader_of_part_of_the_data_trains():
    from fastai.callback.data import PartialDL
    items = [(TensorImage(o),) for o in noise(33)]; dl = PartialDL(items, bs=8, partial_n=16, num_workers=0, device=cpu)
    assert [len(b[0]) for b in dl]==[8,8] and moved(byol_learn(DataLoaders(dl, dl, device=cpu)))==[(True,True)]*2

def test_simsiam_trains_without_a_target():
    learn = byol_learn(model=small_byol(momentum=False)); assert moved(learn)==[(True,False)]*3

def test_show_views_and_views_follow_the_size_of_the_images():
    learn = byol_learn(image_dls(noise(32, 24)), views=None); learn.fit(1, 0.); assert learn.model.view_size==24
    learn = byol_learn(image_dls(noise(32, 24)), views=None, size=16, cbs=[g:=Grab()]); learn.fit(1, 0.); assert g.xs[0][0].shape==(8,3,16,16) and learn.model.view_size==16

def test_default_views_grow_with_the_images_from_one_fit_to_the_next():
    learn = byol_learn(image_dls(noise(32, 16)), views=None); sizes = []
    for side in (16,24): g = Grab(); learn.dls = image_dls(noise(32, side)); learn.fit(1, 0., cbs=g); sizes.append(g.xs[0][0].shape[-1])
    assert sizes==[16,24] and learn.model.view_size==24

# --- when things go wrong

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','before_step','after_step'])
def test_an_interrupt_leaves_a_learner_that_can_go_on(event):
    def stop(self):
        if self.training and self.iter==1: raise KeyboardInterrupt
    class Stop(Callback): order = 5 if event=='before_step' else 50
    setattr(Stop, event, stop)
    learn = byol_learn()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .05, cbs=Stop())
    assert not learn._grab_cbs(Stop) and all(v.isfinite().all() for v in sd_of(learn).values())
    assert len(learn.byol.taus)==(2 if event=='after_step' else 1)
    assert moved(learn)==[(True,True)]*3 and len(learn.byol.taus)==3

class NaNs(Callback):
    "A NaN in a view, or in a gradient, at batch 2"
    order = 9
    def __init__(self, where): self.where = where
    def before_batch(self):
        if self.training and self.iter==2: self.learn.kept = sd_of(self.learn)
    def after_pred(self):
        if self.where=='loss' and self.training and self.iter==2: self.learn.pred = self.pred*float('nan')
    def before_step(self):
        if self.where=='grad' and self.iter==2: self.learn.model.predictor[0].weight.grad[0,0] = float('nan')

class NaNView(Callback):
    order = 15
    def before_batch(self):
        if self.training and self.iter==2: self.xb[1][3,0,0,0] = float('nan')

def stopped(learn):
    with pytest.raises(FloatingPointError, match='epoch 0, batch 2.*learning rate.*to_bf16'): learn.fit(1, .05)
    now = sd_of(learn); assert all(v.isfinite().all() for v in now.values())
    return {k for k in now if not torch.equal(now[k], learn.kept[k])}

def nan_at_third():
    "A view that is NaN the third time it is asked for a whole batch"
    n = [0]
    def view(x):
        n[0] += len(x)==8
        return x/0 if n[0]==3 and len(x)==8 else x
    return view

@pytest.mark.parametrize('cbs,views', [([NaNs('loss')],same), ([NaNs('xb'),NaNView()],same), ([NaNs('view')],nan_at_third())], ids=['pred','xb','view'])
def test_a_nan_loss_stops_before_the_step_and_keeps_weights_and_statistics(cbs, views):
    changed = stopped(learn:=byol_learn(cbs=cbs, views=(views,mirror)))
    assert all('num_batches' in k for k in changed)
    assert all(p.grad is None or p.grad.abs().sum()==0 for p in learn.model.parameters())
    learn.remove_cbs(L(cbs)); learn.byol.views = (same,mirror); assert moved(learn)==[(True,True)]*3

@cpu_only('autocast of the CPU')
def test_a_nan_loss_stops_float16_too_and_keeps_the_statistics():
    learn = byol_learn(cbs=[cpu_amp(torch.float16, init_scale=4.), NaNView(), NaNs('xb')], check_every=2); stopped(learn)

@pytest.mark.parametrize('cbs', [[], [GradientClip(1.)]], ids=['alone','clip'])
def test_a_nan_gradient_stops_before_the_step_and_keeps_the_weights(cbs):
    changed = stopped(learn:=byol_learn(cbs=[NaNs('grad'), *cbs]))
    assert all('num_batches' in k or 'running' in k for k in changed)
    learn.remove_cb(NaNs); assert moved(learn)==[(True,True)]*3

def test_a_nan_gradient_keeps_the_statistics(): assert all('num_batches' in k for k in stopped(byol_learn(cbs=NaNs('grad'))))

@cpu_only('autocast of the CPU')
def test_nan_under_autocast_leaves_autocast_off():
    learn = byol_learn(cbs=[NaNs('loss'), cpu_amp(torch.bfloat16, enabled=False)]); stopped(learn); assert not torch.is_autocast_enabled('cpu')

# --- the device is not read between batches

class Deferred(Callback):
    "What a batch leaves behind, from the first to the last"
    order = 90
    def before_fit(self): self.states = [sd_of(self.learn)]
    def after_batch(self):
        if self.training: self.states.append(sd_of(self.learn))

@pytest.mark.parametrize('every,batch', [(2,6), (3,6), (20,12)]) # found at the next check but one, or after the epoch
@pytest.mark.parametrize('where', ['loss','grad'])
def test_a_bad_batch_is_undone_at_once_and_named_later(every, batch, where):
    cbs = [NaNs(where), d:=Deferred()]
    learn = byol_learn(image_dls(noise(104)), cbs=cbs, opt_func=partial(Adam, wd=.1), check_every=every)
    with pytest.raises(FloatingPointError, match='epoch 0, batch 2.*learning rate.*to_bf16'): learn.fit(1, .05)
    assert len(d.states) in (batch,batch+1) and not same_sd(d.states[1], d.states[2])
    for state in [*d.states[3:], sd_of(learn)]: assert same_sd(state, d.states[2]) # weights, target, statistics
    learn.remove_cbs(L(cbs)); assert all(all(o) for o in moved(learn))

def test_checks_that_do_not_wait_change_no_training():
    m,res = small_byol(),[]
    for every in (1,3):
        learn = byol_learn(image_dls(noise(72)), deepcopy(m), check_every=every); learn.fit(2, .05); res.append(learn)
    assert same_sd(*map(sd_of, res)) and res[0].byol.taus==res[1].byol.taus
    assert torch.equal(*[torch.stack(list(o.recorder.losses)) for o in res])

def test_weights_with_gaps_in_memory_are_put_back():
    m = small_byol(); lin = m.predictor[0]
    lin.weight = nn.Parameter(lin.weight.detach().repeat_interleave(2, 1)[:,::2]); assert not lin.weight.is_contiguous()
    learn = byol_learn(image_dls(noise(104)), m, cbs=[NaNs('loss'), d:=Deferred()], check_every=3)
    with pytest.raises(FloatingPointError): learn.fit(1, .05)
    assert same_sd(sd_of(learn), d.states[2]) and not same_sd(d.states[1], d.states[2])

@pytest.mark.parametrize('every', [1,2])
def test_a_bad_batch_among_accumulated_ones_reaches_nothing(every):
    learn = byol_learn(image_dls(noise(104)), cbs=[GradientAccumulation(16), NaNs('xb'), NaNView()], check_every=every)
    changed = stopped(learn); assert all('num_batches' in k for k in changed)

def test_lr_find_ends_at_a_nan_with_checks_that_do_not_wait(tmp_path):
    class Spoil(Callback):
        order = 15
        def before_batch(self):
            if self.train_iter>=15: self.xb[0][0] = float('nan')
    learn = byol_learn(image_dls(noise(72)), path=tmp_path, cbs=Spoil(), check_every=10); before = sd_of(learn)
    learn.lr_find(num_it=40, show_plot=False); assert same_sd(sd_of(learn), before) and len(learn.recorder.losses)==15

class NoWaiting(TorchDispatchMode):
    """Raises where the host waits to know a value of a tensor; in views what they have drawn is known

    Everything stands on the CPU here, so what is drawn is told apart by what it comes from: no tensor from outside"""
    reads = {'_local_scalar_dense','is_nonzero','equal'}
    sizes = {'nonzero','masked_select','index','index_put','index_put_'}
    def __init__(self):
        super().__init__()
        self.in_views,self.drawn = False,[]
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name,tensors = func.overloadpacket.__name__,[o for o in tree_leaves((args,kwargs)) if isinstance(o, Tensor)]
        known = [any(o is d for d in self.drawn) for o in tensors]
        masks = [k for o,k in zip(tensors, known) if o.dtype==torch.bool] if 'index' in name else known
        waits = (name in self.reads and not all(known)) or (name in self.sizes and not all(masks))
        if waits: raise AssertionError(f'{func} waits for the device')
        res = func(*args, **(kwargs or {}))
        if self.in_views and all(known): self.drawn += [o for o in tree_leaves(res) if isinstance(o, Tensor)]
        return res

class Watched(Callback):
    "From here to `Unwatched` a training batch may read nothing; the first one's images are looked at"
    order,run_valid,mode = -20,False,None
    def before_batch(self):
        if not self.train_iter: return
        self.mode = NoWaiting()
        self.mode.__enter__()
    def leave(self):
        if self.mode: self.mode.__exit__(None, None, None)
        self.mode = None
class Unwatched(Callback):
    order,run_valid = 2000,False
    def after_batch(self): self.learn.watched.leave()

@pytest.fixture
def watch_views(monkeypatch):
    "What is drawn while views are made is known to the host"
    make = callback.make_views
    def make_views(views, x, **kw):
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        for mode in modes: mode.in_views = True
        try: return make(views, x, **kw)
        finally:
            for mode in modes: mode.in_views,mode.drawn = False,[]
    monkeypatch.setattr(callback, 'make_views', make_views)

def watched_learner(folder, opt='lars', cbs=(), **kw):
    "As a user builds it, with a bar and all monitors; checks as on a GPU"
    dls = image_dls(noise(40, 24), y=[i%2 for i in range(40)])
    pair = [o.new(shuffle=False, drop_last=False) for o in dls.loaders]
    monitors = [KNNCallback(pair, k=2), OnlineProbe(n_out=2), HealthMonitor(n_items=16), CheckpointCallback(folder)]
    r,heads = recipe(3, 8, opt=opt, size=24, **kw),dict(hidden_size=16, projection_size=8)
    cbs = [*monitors, Watched(), Unwatched(), *cbs]
    learn = byol_learner(dls, conv_body(), recipe=r, precision='fp32', cbs=cbs, model_args=heads)
    learn.byol.check_every,learn.logger = 2,noop
    return learn

@cpu_only('all tensors must be of the device under watch')
@pytest.mark.parametrize('opt,kw', [('lars',{}), ('adam',{}), ('lars',dict(effective_bs=16))])
def test_no_training_batch_waits_for_the_device(tmp_path, watch_views, opt, kw):
    "Of fastai's own, `Recorder`'s average and the bar's comment would: they are quieted. None of ours is left out"
    learn = watched_learner(tmp_path, opt, **kw)
    try: learn.fit_byol()
    finally: learn.watched.leave()
    assert len(learn.byol.taus)==learn.recipe.steps and learn.probe.rows and learn.knn.rows and learn.health.rows

waits = dict(item=lambda x: x.sum().item(), bool=lambda x: bool(x[0,0,0,0]>0), mask=lambda x: x[x>0],
             put=lambda x: x.__setitem__(x>9, 0.), nonzero=lambda x: x.nonzero(), equal=lambda x: torch.equal(x, x))
@cpu_only('all tensors must be of the device under watch')
@pytest.mark.parametrize('name', waits)
def test_what_waits_is_found(tmp_path, watch_views, name):
    "In a view, too, where it is not of what was drawn"
    def view(x):
        if len(x)==8: waits[name](x)
        return x
    learn = byol_learn(views=(view,mirror), cbs=[Watched(), Unwatched()], check_every=2)
    try:
        with pytest.raises(AssertionError, match='waits for the device'): learn.fit(1, 1e-2)
    finally: learn.watched.leave()

@cpu_only('all tensors must be of the device under watch')
@pytest.mark.parametrize('name', waits)
def test_what_was_drawn_is_known(watch_views, name):
    def view(x):
        waits[name](torch.rand(3,3,2,2)+.1)
        return x
    learn = byol_learn(views=(view,mirror), cbs=[Watched(), Unwatched()], check_every=2)
    try: learn.fit(1, 1e-2)
    finally: learn.watched.leave()

# --- callbacks and calls that pretraining cannot serve

def tensorboard(**kw):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    return TensorBoardCallback(**kw)

cannot = {
    'mixup': (lambda: MixUp(), 'mixes labels'), 'cutmix': (lambda: CutMix(), 'mixes labels'),
    'tensorboard': (lambda: tensorboard(), 'trace_model=False, log_preds=False'),
    'projector': (lambda: tensorboard(trace_model=False, log_preds=False, projector=True), 'pairs of views'),
    'save': (lambda: SaveModelCallback(), "validation images.*monitor='train_loss'"),
    'stop': (lambda: EarlyStoppingCallback(), "validation images.*monitor='train_loss'"),
    'plateau': (lambda: ReduceLROnPlateau('valid_loss'), "validation images.*monitor='train_loss'"),
    'curves': (lambda: tensorboard(trace_model=False, log_preds=False), 'needs validation images: set `valid_pct` above 0$'),
    'metric': (lambda: SaveModelCallback('mean_of_pred'), "validation images.*monitor='train_loss'")}
@pytest.mark.parametrize('kind', cannot)
@pytest.mark.parametrize('y', [None, [0]*24], ids=['unlabelled','labelled'])
def test_callbacks_that_cannot_work_say_why_before_training(kind, y, tmp_path):
    def mean_of_pred(pred, targ): return pred.mean()
    make,msg = cannot[kind]; dls = image_dls(noise(24), n_val=0, y=y)
    learn = byol_learn(dls, cbs=make(), path=tmp_path, metrics=mean_of_pred)
    with pytest.raises((TypeError,ValueError), match=msg): learn.fit(1)

from fastai.callback.data import CollectDataCallback
from fastai.callback.hook import ActivationStats
can = {
    'save': lambda path: SaveModelCallback('train_loss'), 'every epoch': lambda path: SaveModelCallback(every_epoch=True),
    'stop': lambda path: EarlyStoppingCallback('train_loss'), 'plateau': lambda path: ReduceLROnPlateau('train_loss'),
    'nan': lambda path: TerminateOnNaNCallback(), 'csv': lambda path: CSVLogger(), 'bn': lambda path: BnFreeze(),
    'short': lambda path: ShortEpochCallback(.5, short_valid=False), 'collect': lambda path: CollectDataCallback(),
    'stats': lambda path: ActivationStats(modules=None, every=1)}
@pytest.mark.parametrize('kind', can)
@pytest.mark.parametrize('n_val', [0,8])
def test_fastais_callbacks_train_and_validate_with_and_without_validation_images(kind, n_val, tmp_path):
    learn = byol_learn(image_dls(noise(24+n_val), n_val=n_val), path=tmp_path, cbs=can[kind](tmp_path))
    learn.fit(2, 1e-2); assert len(learn.recorder.losses)>0
    assert len(learn.get_preds(ds_idx=0)[0])==24

@pytest.mark.parametrize('opt', ['lars','adam'])
def test_tensorboard_logs_a_run_with_a_recipe(opt, tmp_path):
    cb = tensorboard(log_dir=tmp_path, trace_model=False, log_preds=False)
    learn = hush(byol_learner(image_dls(noise(24)), conv_body(), recipe=recipe(1, 8, opt=opt, size=16), precision='fp32', cbs=cb,
                              model_args=dict(hidden_size=16, projection_size=8)))
    learn.fit_byol(); assert list(tmp_path.glob('events*'))

@pytest.mark.parametrize('y', [None, [0,1]*16], ids=['unlabelled','labelled'])
@pytest.mark.parametrize('call', ['show_results','predict'])
def test_results_to_show_are_views(y, call):
    learn = byol_learn(image_dls(noise(32), y=y)); args = [TensorImage(noise(1)[0])] if call=='predict' else []
    learn.dls.test_dl = lambda items, **kw: image_dls(noise(8)).valid
    with pytest.raises(TypeError, match=r'learn\.byol\.show_views\(\)'): getattr(learn, call)(*args)

def two_inputs():
    return DataLoaders(*[TfmdDL([(o,o,torch.tensor(0)) for o in noise(16)], bs=8, num_workers=0, device=cpu) for _ in range(2)], device=cpu)

def bare_tensors():
    from torch.utils.data import DataLoader as TorchDL
    return DataLoaders(*[TorchDL(list(noise(16)), 8) for _ in range(2)])

@pytest.mark.parametrize('exc,msg,kw', [
    (ValueError, 'got 2.*n_inp=1', lambda: dict(dls=two_inputs())),
    (ValueError, r'give `\(images,\)`', lambda: dict(dls=bare_tensors())),
    (ValueError, 'drop_last=True', lambda: dict(dls=image_dls(noise(12), bs=1))),
    (ValueError, 'a batch of 1.*drop_last=True', lambda: dict(dls=image_dls(noise(17), drop_last=False))),
    (ValueError, 'pass more images', lambda: dict(dls=image_dls(noise(9), bs=2))),
    (ValueError, 'pass more images', lambda: dict(dls=image_dls(noise(9), bs=1))),
    (ValueError, 'IntToFloatTensor', lambda: dict(dls=image_dls(noise(32)*255))),
    (ValueError, 'NaN or infinity', lambda: dict(dls=image_dls(noise(32)/0))),
    (ValueError, 'n_in=3', lambda: dict(model=small_byol(n_in=1))),
    (ValueError, 'n_in=3', lambda: dict(model=small_byol(n_in=1, stats=((.5,),(.5,))), dls=image_dls(noise(32)))),
    (ValueError, 'n_in=3', lambda: dict(model=small_byol(n_in=1), dls=image_dls(noise(32), norm=[Normalize.from_stats(*imagenet_stats,cuda=False)]))),
    (TypeError, r'wrap your body with `BYOL\(body\)`', lambda: dict(model=conv_body())),
    (ValueError, 'channels', lambda: dict(views=(same,lambda x: x[:,:1]))),
    (TypeError, 'dtype', lambda: dict(views=(same,torch.Tensor.half))),
    (ValueError, 'Normalize', lambda: dict(views=(same,lambda x: x*5-2))),
    (ValueError, 'size=224', lambda: dict(model=BYOL('vit_tiny_patch16_224', hidden_size=8, projection_size=4))),
])
def test_mistakes_are_named_before_any_step(exc, msg, kw):
    kw = kw(); dls = kw.pop('dls', None) or image_dls(noise(32)); learn = byol_learn(dls, **kw); before = sd_of(learn)
    with pytest.raises(exc, match=msg): learn.fit(1, .1)
    assert same_sd(sd_of(learn), before)

def test_a_view_too_small_is_named_at_once():
    with pytest.raises(ValueError, match='at least 8'): BYOLCallback(size=4)

def test_default_views_see_all_of_wide_images_and_ones_own_the_middle(tmp_path):
    x = np.zeros((20,60,3), np.uint8)
    for i in range(3): x[:,20*i:20*i+20,i] = 255 # red, green, blue
    for i in range(8): Image.fromarray(x).save(tmp_path/f'{i}.png')
    dls = unlabelled_dls(tmp_path, 16, bs=8, valid_pct=0, device=cpu)
    still = dict(scale=(1.,1.), ratio=(3.,3.), jitter_p=0., gray_p=0., blur_p=(0.,0.), solarize_p=(0.,0.))
    for views,colours in ((byol_views(16, **still),[1/3]*3), ((same,mirror),[0.,1,0])):
        learn = byol_learn(dls, views=views); seen = []
        class Look(Callback):
            order = BYOLCallback.order+1
            def before_batch(self): seen.append([v*self.model.std+self.model.mean for v in self.xb])
        learn.fit(1, cbs=Look()); v = torch.stack(seen[0])
        assert (v.mean((0,1,3,4))-tensor(colours)).abs().max()<.1
        learn.byol.show_views(2); plt.close('all')
