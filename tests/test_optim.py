"LARS and schedules against DeepMind's formulas, written again in float64 from the text of their release"
from conftest import *
from fastbyol.optim import Lars
from fastai.callback.all import *
import timm.optim

# --- the independent reference

def dm_cosine(step, n, v): return v*.5*(1 + np.cos(np.pi*min(step, n)/n))
def dm_lr(step, lr, total, warmup): return step/int(warmup)*lr if step<warmup else dm_cosine(step-warmup, total-warmup, lr)
def dm_tau(step, base, total): return 1 - (1-base)*dm_cosine(step, total, 1.)

class DMLars:
    "optax chain of the release: add_weight_decay, scale_by_lars, scale(-lr); both left out for biases and norms"
    def __init__(self, params, excluded, wd, mom=.9, eta=1e-3, sum_of_norms=False):
        self.p = {k:np.asarray(v).astype(np.float64) for k,v in params.items()}
        self.mu = {k:np.zeros_like(v) for k,v in self.p.items()}
        self.excluded,self.wd,self.mom,self.eta,self.sum_of_norms = excluded,wd,mom,eta,sum_of_norms
    def step(self, grads, lr):
        for k,p in self.p.items():
            g = np.asarray(grads[k], dtype=np.float64)
            if k not in self.excluded:
                raw,g = g,g + self.wd*p
                pn,un = np.linalg.norm(p),np.linalg.norm(g)
                if self.sum_of_norms: un = np.linalg.norm(raw) + self.wd*pn # timm's denominator
                g = g*((self.eta*pn/un if un>0 else 1.) if pn>0 else 1.)
            self.mu[k] = self.mom*self.mu[k] + g
            self.p[k] = p - lr*self.mu[k]

class DMByol:
    "BYOL with layer norm in the heads in plain float64, for `small_byol(bn=False, norm='layer')`, views `x` and its mirror"
    def __init__(self, m, **kw):
        sd = {k:v.detach().double().clone() for k,v in m.named_parameters()}
        self.t = {k[7:]:v for k,v in sd.items() if k.startswith('target.')}
        names = [k for k in sd if not k.startswith('target.')]
        excluded = {k for k in names if k.endswith('.bias') or k.endswith('.1.weight')}
        self.opt = DMLars({k:sd[k] for k in names}, excluded, **kw)
        self.mean,self.std = m.mean.double(),m.std.double()
    def head(self, p, nm, x):
        x = x@p[f'{nm}.0.weight'].T + p[f'{nm}.0.bias']
        x = F.layer_norm(x, (16,), p[f'{nm}.1.weight'], p[f'{nm}.1.bias'], 1e-5)
        return torch.relu(x)@p[f'{nm}.3.weight'].T
    def project(self, p, x):
        for i in (0,2): x = torch.tanh(F.conv2d(x, p[f'body.{i}.weight'], p[f'body.{i}.bias'], 2, 1))
        return self.head(p, 'projector', x.mean((2,3)))
    def step(self, x, lr, tau):
        p = {k:torch.tensor(v).requires_grad_() for k,v in self.opt.p.items()}
        vs = [(o.double()-self.mean)/self.std for o in (x,x.flip(-1))]
        unit = lambda o: o/o.norm(dim=1, keepdim=True)
        q = [unit(self.head(p, 'predictor', self.project(p, v))) for v in vs]
        z = [unit(self.project(self.t, v)) for v in vs]
        (((q[0]-z[1])**2).sum(1) + ((q[1]-z[0])**2).sum(1)).mean().backward()
        self.opt.step({k:v.grad.numpy() for k,v in p.items()}, lr)
        self.t = {k:v + (1-tau)*(torch.tensor(self.opt.p[k])-v) for k,v in self.t.items()}
    def worst(self, m):
        "Largest difference to the weights of `m`, in parts of the largest weight of each tensor"
        want = {k:torch.tensor(v) for k,v in self.opt.p.items()} | {f'target.{k}':v for k,v in self.t.items()}
        assert want.keys()=={k for k,_ in m.named_parameters()}
        return max(((v.detach().double()-want[k]).abs().max()/want[k].abs().max()).item()
                   for k,v in m.named_parameters() if want[k].any())

lrs,taus = [dm_lr(k, .25, 20, 5) for k in range(20)],[dm_tau(k, .9, 20) for k in range(20)]

def reference(m, x, **kw):
    "20 steps of 8 images"
    ref = DMByol(m, wd=.05, **kw)
    for k in range(20): ref.step(x[k%4*8:k%4*8+8], lrs[k], taus[k])
    return ref

def dm_learner(x, body, dtype=torch.float64, bs=8, **kw):
    set_seed(0)
    # large numbers, so that 20 steps go somewhere
    r = recipe(5, bs, 32, 16, preset='imagenette', effective_bs=8, base_lr=8., wd=.05, tau=.9)
    # fastai averages losses in float32; the gradient of a cast is 1
    loss = lambda p,t: byol_loss(p, t).float()
    learn = byol_learner(image_dls(x, bs=bs), deepcopy(body), recipe=r, views=(same,mirror), loss_func=loss,
                         hidden_size=16, projection_size=8, norm='layer', precision='fp32', **kw)
    learn.model.to(dtype)
    return hush(learn)

def check_schedules(found_lrs, found_taus, bs):
    np.testing.assert_allclose(found_lrs[8//bs-1::8//bs], lrs, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found_taus, taus, rtol=1e-12)

# rounding alone: 20 steps in float64 (2e-16), or in float32 (1.2e-7)
@pytest.mark.parametrize('dtype,tol,bs', [(torch.float64,1e-12,8), (torch.float64,1e-12,4), (torch.float32,2e-6,8)])
def test_20_steps_of_lr_tau_and_weights_are_deepminds(dtype, tol, bs):
    x = noise(40); learn = dm_learner(x, conv_body(bn=False), dtype, bs); start = deepcopy(learn.model)
    ref = reference(start, x)
    learn.fit_byol()
    check_schedules(learn.recorder.lrs, learn.byol.taus, bs)
    assert ref.worst(learn.model)<tol
    # timm's denominator would show
    assert reference(start, x, sum_of_norms=True).worst(learn.model)>20*tol

def test_20_steps_are_deepminds_after_a_resume_too(tmp_path):
    x,body = noise(40),conv_body(bn=False)
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: self.learn.save('half'); raise CancelFitException()
    a = dm_learner(x, body, bs=4, path=tmp_path); start = deepcopy(a.model); a.fit_byol(cbs=Stop())
    b = dm_learner(x, body, bs=4, path=tmp_path); b.create_opt(); b.load('half'); b.fit_byol(start_epoch=2)
    check_schedules(a.recorder.lrs+b.recorder.lrs, a.byol.taus+b.byol.taus, 4)
    assert (len(a.byol.taus),len(b.byol.taus))==(8,12) and reference(start, x).worst(b.model)<1e-12

class LogSchedules(Callback):
    order = 70
    def before_fit(self): self.log = []
    def after_step(self): self.log.append((self.opt.hypers[0]['lr'], self.learn.byol.taus[-1]))

@pytest.mark.parametrize('n_acc', [8,20,64]) # 20: three batches for a step; 64: over the end of an epoch
def test_lr_and_tau_stay_together_whatever_the_accumulation(n_acc):
    learn = byol_learn(image_dls(noise(40)), small_byol(bn=False), cbs=[GradientAccumulation(n_acc), log:=LogSchedules()],
                       opt_func=SGD)
    learn.fit_byol(6, lr=1., warmup=2)
    n = 24//math.ceil(n_acc/8)
    np.testing.assert_allclose(log.log, [(dm_lr(k, 1., n, int(n/3)), dm_tau(k, .9, n)) for k in range(n)])

@pytest.mark.parametrize('epochs,per_epoch', [(1000,36), (3,7)])
def test_schedules_are_deepminds_over_a_whole_run(epochs, per_epoch):
    n = epochs*per_epoch; warm = int(min(10, epochs/4)*per_epoch)
    for k in np.unique(np.linspace(0, n, 500).astype(int)):
        assert warmup_cosine(k, n, warm)==pytest.approx(dm_lr(k, 1., n, warm), rel=1e-12, abs=1e-15)
        assert target_decay(k, n, .99)==pytest.approx(dm_tau(k, .99, n), rel=1e-12)

def test_the_schedule_works_in_any_fit():
    learn = byol_learn(image_dls(noise(24)), small_byol(bn=False), opt_func=SGD)
    learn.fit(4, cbs=LRSchedule(1., warmup_epochs=1))
    np.testing.assert_allclose(learn.recorder.lrs, [dm_lr(k, 1., 8, 2) for k in range(8)], atol=1e-12)

# --- LARS

shapes = dict(w=(4,3), conv=(2,3,3,3), bias=(4,), scale=(3,), scalar=())
def draw(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {k:torch.randn(s, generator=g, dtype=dtype) for k,s in shapes.items()}
def some_params(dtype=torch.float64): return {k:nn.Parameter(v) for k,v in draw(0, dtype).items()}
def set_grads(ps, grads):
    for k,p in ps.items(): p.grad = grads[k].clone()
def as_numpy(ps): return {k:p.detach().numpy() for k,p in ps.items()}

@pytest.mark.parametrize('wd', [0., .1])
def test_lars_is_deepminds_while_lr_changes(wd):
    ps = some_params(); ref = DMLars(as_numpy(ps), {'bias','scale','scalar'}, wd)
    opt = lars(L(ps.values())); opt.set_hypers(wd=wd) # as `fit` does
    for i in range(6):
        grads = draw(i+1); set_grads(ps, grads)
        opt.set_hypers(lr=.3/(i+1)); opt.step(); ref.step({k:g.numpy() for k,g in grads.items()}, .3/(i+1))
    for k,p in ps.items(): np.testing.assert_allclose(p.detach().numpy(), ref.p[k], rtol=1e-12, atol=1e-14, err_msg=k)

@pytest.mark.parametrize('clip', [False,True])
def test_lars_without_decay_is_timms(clip):
    ps,qs = some_params(),some_params()
    ours = Lars(ps.values(), lr=.3, trust_clip=clip)
    timms = timm.optim.Lars(qs.values(), lr=.3, momentum=.9, trust_clip=clip, always_adapt=True, eps=0.)
    for i in range(5):
        for o in (ps,qs): set_grads(o, draw(i+1))
        ours.step(); timms.step()
    for a,b in zip(ps.values(), qs.values()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

def test_an_optimiser_state_of_timms_lars_continues_in_ours():
    ps,qs = some_params(),some_params()
    timms = timm.optim.Lars(qs.values(), lr=.3, momentum=.9, always_adapt=True, eps=0.)
    set_grads(qs, draw(1)); timms.step()
    ours = Lars(ps.values())
    for a,b in zip(ps.values(), qs.values()): a.data.copy_(b)
    ours.load_state_dict(deepcopy(timms.state_dict()))
    for o in (ps,qs): set_grads(o, draw(2))
    ours.step(); timms.step()
    for a,b in zip(ps.values(), qs.values()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

@pytest.mark.parametrize('zero_w,zero_g', [(True,False), (False,True), (True,True)])
def test_lars_takes_weights_and_gradients_of_zero_as_deepmind_does(zero_w, zero_g):
    w = nn.Parameter(torch.full((3,2), float(not zero_w), dtype=torch.float64))
    g = torch.full((3,2), 2.*(not zero_g), dtype=torch.float64)
    ref = DMLars({'w':w.detach().numpy()}, set(), 0.); opt = lars(L(w), lr=.1, wd=0.)
    for _ in range(2): w.grad = g.clone(); opt.step(); ref.step({'w':g.numpy()}, .1)
    np.testing.assert_allclose(w.detach().numpy(), ref.p['w'], rtol=1e-12)

# the ratio over lr, at most 1, as in solo-learn: .02*5/.01/.2 = 50 > 1, and .02*5/10/.2 = .05
@pytest.mark.parametrize('grad,want', [((.006,.008), (3-.2*.006, 4-.2*.008)), ((6.,8.), (3-.01*6, 4-.01*8))])
def test_clipped_lars_never_steps_further_than_sgd(grad, want):
    p = nn.Parameter(torch.tensor([[3.,4.]], dtype=torch.float64)); p.grad = torch.tensor([grad], dtype=torch.float64)
    lars(L(p), lr=.2, wd=0., eta=.02, trust_clip=True).step()
    np.testing.assert_allclose(p.detach(), [want], rtol=1e-12)

def test_lars_leaves_parameters_without_gradient_alone():
    ps = some_params(); before = {k:p.detach().clone() for k,p in ps.items()}; opt = lars(L(ps.values()), wd=.1)
    ps['w'].grad = torch.ones(4,3, dtype=torch.float64); opt.step()
    assert [k for k,p in ps.items() if not torch.equal(p, before[k])]==['w'] and len(opt.opt.state)==1

def test_lars_reads_nothing_back_from_the_device():
    from torch.utils._python_dispatch import TorchDispatchMode
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
            return func(*args, **(kwargs or {}))
    ps = some_params(); set_grads(ps, draw(1)); opt = lars(L(ps.values()), wd=.1, trust_clip=True)
    with NoWaiting(): opt.step()

# --- AdamW, groups and state

def test_adamw_is_torchs_with_two_groups():
    ps,qs = some_params(),some_params()
    opt = adamw(L(ps.values()), lr=.1); opt.set_hypers(wd=.3)
    weights,plain = [qs['w'],qs['conv']],[qs[k] for k in ('bias','scale','scalar')]
    ref = torch.optim.AdamW([dict(params=weights, weight_decay=.3), dict(params=plain, weight_decay=0.)], lr=.1)
    for i in range(5):
        for o in (ps,qs): set_grads(o, draw(i+1))
        opt.step(); ref.step()
    # fused, it rounds in another order
    for a,b in zip(ps.values(), qs.values()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

@pytest.mark.parametrize('opt_func', [lars,adamw])
def test_state_in_another_layout_than_its_weight_makes_no_difference(opt_func):
    "torch's fused AdamW goes through memory from end to end, and would mix up the numbers"
    def run(change):
        w = nn.Parameter(torch.randn(8,4,3,3, generator=torch.Generator().manual_seed(0)))
        opt = opt_func(L(w), lr=.1)
        for i in range(2):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(i)).to(w).contiguous(
                memory_format=torch.channels_last if change and i else torch.contiguous_format)
            opt.step()
            if change: w.data = w.data.contiguous(memory_format=torch.channels_last)
        return w
    torch.testing.assert_close(run(True), run(False))

@pytest.mark.parametrize('opt_func', [lars,adamw])
def test_nothing_that_fastai_does_decays_biases_and_norms(opt_func, tmp_path):
    learn = byol_learn(image_dls(noise(24)), small_byol(norm='layer'), opt_func=opt_func, splitter=byol_splitter,
                       wd=.3, path=tmp_path)
    def check(wd):
        groups = learn.opt.opt.param_groups
        assert len(groups)==6 and len(learn.opt.hypers)==len(learn.opt.param_lists)==3
        for weights,plain in zip(groups[::2], groups[1::2]):
            assert (weights['weight_decay'],plain['weight_decay'])==(wd,0.)
            assert {p.ndim>1 for p in weights['params']}=={True} and {p.ndim>1 for p in plain['params']}=={False}
        if opt_func is lars: assert [g['always_adapt'] for g in groups]==[True,False]*3
    learn.fit(1, .01); check(.3)
    learn.fit_one_cycle(1, slice(.001,.1), wd=.2); check(.2)
    assert learn.opt.hypers[0]['lr']<learn.opt.hypers[1]['lr']<learn.opt.hypers[2]['lr']
    learn.freeze(); learn.fit(1, .01, wd=.1); check(.1)
    assert not learn.model.body[0].weight.requires_grad and learn.model.predictor[0].weight.requires_grad
    learn.unfreeze(); check(.1); assert learn.model.body[0].weight.requires_grad
    learn.lr_find(num_it=6, show_plot=False); check(.3) # fastai's `lr_find` works with the learner's own
    learn.save('a'); learn.opt.set_hypers(wd=.5); learn.load('a'); check(.3)
    learn.opt.clear_state(); learn.fit_byol(1, lr=.01, wd=.05); check(.05)
    trained = {id(p) for g in learn.opt.opt.param_groups for p in g['params']}
    assert trained=={id(p) for p in learn.model.parameters() if p.requires_grad}

def test_each_parts_factor_holds_under_every_schedule():
    learn = byol_learn(image_dls(noise(24)), small_byol(bn=False), splitter=byol_splitter,
                       opt_func=partial(lars, lr_mults=(.2,1.,10.)))
    class CheckFactor(Callback):
        order = 70
        def before_step(self):
            rates = [self.opt.opt.param_groups[i]['lr'] for i in (0,2,4)]
            assert rates==pytest.approx([.2*rates[1],rates[1],10*rates[1]])
    learn.fit(1, .1, cbs=CheckFactor()); learn.fit_one_cycle(1, .1, cbs=CheckFactor())
    learn.fit_byol(2, lr=.1, cbs=CheckFactor()); assert max(learn.recorder.lrs)==pytest.approx(.1)

def test_a_gradient_scaler_and_clipping_see_all_parameters():
    from test_callback import cpu_amp
    learn = byol_learn(image_dls(noise(24)), opt_func=lars, cbs=[cpu_amp(torch.float16, init_scale=2.**8), GradientClip(1e-3)])
    class Norms(Callback):
        order = 13
        def before_fit(self): self.norms = []
        def before_step(self):
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.norms.append(nn.utils.get_total_norm(grads).item())
    learn.fit_byol(2, lr=.1, cbs=(log:=Norms())); assert max(log.norms)==pytest.approx(1e-3, rel=1e-3)

@pytest.mark.parametrize('opt_func', [lars,adamw])
def test_saved_optimiser_state_is_whole(opt_func, tmp_path):
    mk = lambda: byol_learn(image_dls(noise(24)), opt_func=opt_func, path=tmp_path)
    a = mk(); a.fit_one_cycle(1, .01); a.save('a'); b = mk(); b.create_opt(); b.load('a')
    assert all(type(g['lr']) is float for g in a.opt.opt.param_groups)
    for p,q in zip(trainable_params(a.model), trainable_params(b.model)):
        s,t = a.opt.opt.state[p],b.opt.opt.state[q]
        assert s and s.keys()==t.keys() and all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for k in s)
