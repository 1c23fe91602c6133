"LARS, schedules and recipes against DeepMind's formulas, written anew in numpy from the text of their release (deepmind-research/byol/utils)"
from conftest import *
from fastbyol.optim import default_warmup
from fastai.callback.all import *
import pickle, timm

# --- the independent reference, float64

def dm_cosine(k, n, v): return v*.5*(1 + np.cos(np.pi*min(k, n)/n))
def dm_lr(k, bs, base, total, warmup):
    lr = base*bs/256
    return k/int(warmup)*lr if k<warmup else dm_cosine(k-warmup, total-warmup, lr)
def dm_tau(k, base, total): return 1 - (1-base)*dm_cosine(k, total, 1.)

class DMLars:
    "optax chain of the release: add_weight_decay, scale_by_lars, scale(-lr); both left out for biases and norms"
    def __init__(self, params, excluded, wd, mom=.9, eta=1e-3, sum_of_norms=False):
        self.p = {k:np.asarray(v).astype(np.float64) for k,v in params.items()}
        self.mu,self.excluded,self.wd,self.mom,self.eta,self.sum_of_norms = {k:np.zeros_like(v) for k,v in self.p.items()},excluded,wd,mom,eta,sum_of_norms
    def step(self, grads, lr):
        for k,p in self.p.items():
            g = np.asarray(grads[k], dtype=np.float64)
            if k not in self.excluded:
                raw,g = g,g + self.wd*p
                pn,un = np.linalg.norm(p),np.linalg.norm(g)
                if self.sum_of_norms: un = np.linalg.norm(raw) + self.wd*pn # timm's own way
                g = g*((self.eta*pn/un if un>0 else 1.) if pn>0 else 1.)
            self.mu[k] = self.mom*self.mu[k] + g
            self.p[k] = p - lr*self.mu[k]

class DMByol:
    "BYOL with layer norm in the heads in plain float64 torch, for `small_byol(bn=False, norm='layer')`, views `x` and its mirror"
    def __init__(self, m, **kw):
        sd = {k:v.detach().double().clone() for k,v in m.named_parameters()}
        self.t = {k[7:]:v for k,v in sd.items() if k.startswith('target.')}
        names = [k for k in sd if not k.startswith('target.')]
        self.opt = DMLars({k:sd[k] for k in names}, {k for k in names if k.endswith('.bias') or k.endswith('.1.weight')}, **kw)
        self.mean,self.std = m.mean.double(),m.std.double()
    def head(self, p, nm, x):
        x = F.layer_norm(x@p[f'{nm}.0.weight'].T + p[f'{nm}.0.bias'], (16,), p[f'{nm}.1.weight'], p[f'{nm}.1.bias'], 1e-5)
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
        "Largest difference to the weights of `m`, in parts of the largest weight of each tensor, in online network and target"
        want = {**{k:torch.tensor(v) for k,v in self.opt.p.items()}, **{f'target.{k}':v for k,v in self.t.items()}}
        assert want.keys()=={k for k,_ in m.named_parameters()}
        return max(((v.detach().double()-want[k]).abs().max()/want[k].abs().max()).item() for k,v in m.named_parameters() if want[k].any())

rec = dict(n_items=32, size=16, preset='imagenette', base_lr=8., wd=.05, tau=.9) # large, so that 20 steps go somewhere

def reference(m, x, **kw):
    "20 steps of 8 images; lr and tau of each"
    ref = DMByol(m, wd=.05, **kw); lrs = [dm_lr(k, 8, 8., 20, 5) for k in range(20)]; taus = [dm_tau(k, .9, 20) for k in range(20)]
    for k in range(20): ref.step(x[k%4*8:k%4*8+8], lrs[k], taus[k])
    return ref,lrs,taus

def dm_learner(x, body, dtype=torch.float32, bs=8, recipe_=None, **kw):
    set_seed(0)
    learn = hush(byol_learner(image_dls(x, bs=bs), deepcopy(body), recipe=recipe_ or recipe(5, bs, effective_bs=8, **rec), views=(same,mirror),
                              # fastai averages losses in float32; the gradient of a cast is 1
                              loss_func=lambda p,t: byol_loss(p, t).float(), hidden_size=16, projection_size=8, norm='layer', **kw))
    learn.model.to(dtype)
    return learn

# rounding alone: 20 steps in float64 (2e-16), or in float32 (1.2e-7)
@pytest.mark.parametrize('dtype,tol', [(torch.float64,1e-12), (torch.float32,2e-6)], ids=['float64','float32'])
@pytest.mark.parametrize('bs', [8,4], ids=['whole','accumulated'])
def test_20_steps_of_lr_tau_and_weights_are_deepminds(dtype, tol, bs):
    x = noise(40); learn = dm_learner(x, conv_body(bn=False), dtype, bs); start = deepcopy(learn.model)
    ref,lrs,taus = reference(start, x)
    learn.fit_byol()
    np.testing.assert_allclose(learn.recorder.lrs[8//bs-1::8//bs], lrs, rtol=1e-12, atol=1e-12); np.testing.assert_allclose(learn.byol.taus, taus, rtol=1e-12)
    assert ref.worst(learn.model)<tol, ref.worst(learn.model)
    assert min(((v-dict(start.named_parameters())[k]).abs().max()/v.abs().max()).item() for k,v in learn.model.named_parameters())>.003 # and the weights did move; timm's own denominator would show:
    assert reference(start, x, sum_of_norms=True)[0].worst(learn.model)>20*tol

@pytest.mark.parametrize('bs', [8,4], ids=['whole','accumulated'])
def test_20_steps_are_deepminds_after_a_resume_too(bs, tmp_path):
    x,body = noise(40),conv_body(bn=False)
    mk = lambda: dm_learner(x, body, torch.float64, bs, path=tmp_path)
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: self.learn.save('half'); raise CancelFitException()
    a = mk(); start = deepcopy(a.model); a.fit_byol(cbs=Stop())
    b = mk(); b.create_opt(); b.load('half'); b.fit_byol(start_epoch=2)
    ref,lrs,taus = reference(start, x)
    np.testing.assert_allclose((a.recorder.lrs+b.recorder.lrs)[8//bs-1::8//bs], lrs, rtol=1e-12, atol=1e-12); np.testing.assert_allclose(a.byol.taus+b.byol.taus, taus, rtol=1e-12)
    assert len(a.byol.taus)==8 and len(b.byol.taus)==12 and ref.worst(b.model)<1e-12

def test_lr_and_tau_stay_together_whatever_the_accumulation():
    class Log(Callback):
        order = 70
        def before_fit(self): self.log = []
        def after_step(self): self.log.append((self.opt.hypers[0]['lr'], self.learn.byol.taus[-1]))
    for n_acc in (8,16,20,64): # 20: three batches for a step; 64: over the end of an epoch
        learn = byol_learn(image_dls(noise(40)), small_byol(bn=False), cbs=[GradientAccumulation(n_acc), log:=Log()], opt_func=SGD)
        learn.fit_byol(6, lr=1., warmup=2); per = math.ceil(n_acc/8); n = 24//per
        assert len(log.log)==n
        for k,(lr,tau) in enumerate(log.log): assert lr==pytest.approx(dm_lr(k, 256, 1., n, int(n/3))) and tau==pytest.approx(dm_tau(k, .9, n))

@pytest.mark.parametrize('epochs,per_epoch', [(1000,36), (100,5004), (3,7)])
def test_schedules_are_deepminds_over_a_whole_run(epochs, per_epoch):
    n = epochs*per_epoch; warm = int(default_warmup(epochs)*per_epoch); ks = np.unique(np.linspace(0, n, 500).astype(int))
    np.testing.assert_allclose([warmup_cosine(k, n, warm) for k in ks], [dm_lr(k, 256, 1., n, warm) for k in ks], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose([target_decay(k, n, .99) for k in ks], [dm_tau(k, .99, n) for k in ks], rtol=1e-12)

# --- the optimisers

def some_params(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k:nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for k,s in dict(w=(4,3), conv=(2,3,3,3), bias=(4,), scale=(3,), scalar=()).items()}

def run_both(opt, ps, ref, n=6, lr=.3):
    for i in range(n):
        g = torch.Generator().manual_seed(i+1)
        for p in ps.values(): p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        grads = {k:p.grad.clone().numpy() for k,p in ps.items()}
        opt.set_hypers(lr=lr/(i+1)); opt.step(); ref.step(grads, lr/(i+1))
    for k,p in ps.items(): np.testing.assert_allclose(p.detach().numpy(), ref.p[k], rtol=1e-12, atol=1e-14, err_msg=k)

@pytest.mark.parametrize('wd', [0., .1])
def test_lars_is_deepminds_while_lr_changes(wd):
    ps = some_params(); ref = DMLars({k:p.detach().numpy() for k,p in ps.items()}, {'bias','scale','scalar'}, wd)
    opt = lars(L(ps.values())); opt.set_hypers(wd=wd) # as `fit` does
    assert isinstance(opt.opt, timm.optim.Lars); run_both(opt, ps, ref)

def test_lars_takes_weights_and_gradients_of_zero_as_deepmind_does():
    for zero_w,zero_g in ((True,False),(False,True),(True,True)):
        ps = {'w':nn.Parameter(torch.zeros(3,2, dtype=torch.float64) if zero_w else torch.ones(3,2, dtype=torch.float64))}
        ref = DMLars({'w':ps['w'].detach().numpy()}, set(), 0.); opt = lars(L(ps.values()), lr=.1, wd=0.)
        for _ in range(2):
            g = torch.zeros(3,2, dtype=torch.float64) if zero_g else torch.full((3,2), 2., dtype=torch.float64)
            ps['w'].grad = g.clone(); opt.step(); ref.step({'w':g.numpy()}, .1)
        np.testing.assert_allclose(ps['w'].detach().numpy(), ref.p['w'], rtol=1e-12)

def test_clipped_lars_never_steps_further_than_sgd():
    "As solo-learn's: the ratio over lr, at most 1"
    p = nn.Parameter(torch.tensor([[3.,4.]], dtype=torch.float64)); p.grad = torch.tensor([[.006,.008]], dtype=torch.float64)
    lars(L(p), lr=.2, wd=0., eta=.02, trust_clip=True).step(); np.testing.assert_allclose(p.detach(), [[3-.2*.006, 4-.2*.008]], rtol=1e-12) # .02*5/.01/.2 = 50 > 1
    p = nn.Parameter(torch.tensor([[3.,4.]], dtype=torch.float64)); p.grad = torch.tensor([[6.,8.]], dtype=torch.float64)
    lars(L(p), lr=.2, wd=0., eta=.02, trust_clip=True).step(); np.testing.assert_allclose(p.detach(), [[3-.01*6, 4-.01*8]], rtol=1e-12) # .02*5/10/.2*.2

def test_adamw_is_torchs_with_two_groups():
    ps,qs = some_params(),some_params()
    opt = adamw(L(ps.values()), lr=.1); opt.set_hypers(wd=.3)
    ref = torch.optim.AdamW([dict(params=[qs['w'],qs['conv']], weight_decay=.3), dict(params=[qs[k] for k in ('bias','scale','scalar')], weight_decay=0.)], lr=.1)
    for i in range(5):
        for a,b in zip(ps.values(), qs.values()): a.grad = torch.randn(a.shape, dtype=torch.float64); b.grad = a.grad.clone()
        opt.step(); ref.step()
    for a,b in zip(ps.values(), qs.values()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13) # fused, it rounds in another order

@pytest.mark.parametrize('opt_func', [lars,adamw])
def test_nothing_that_fastai_does_decays_biases_and_norms(opt_func, tmp_path):
    learn = byol_learn(image_dls(noise(40)), small_byol(norm='layer'), opt_func=opt_func, splitter=predictor_splitter, wd=.3, path=tmp_path)
    def check(wd):
        gs = learn.opt.opt.param_groups; assert len(gs)==4 and len(learn.opt.hypers)==len(learn.opt.param_lists)==2
        for a,b in zip(gs[::2], gs[1::2]):
            assert a['weight_decay']==wd and b['weight_decay']==0. and all(p.ndim>1 for p in a['params']) and all(p.ndim<=1 for p in b['params']) and a['params'] and b['params']
        if opt_func is lars: assert [g['always_adapt'] for g in gs]==[True,False]*2
    learn.fit(1, .01); check(.3)
    learn.fit_one_cycle(1, slice(.001,.1), wd=.2); check(.2); assert learn.opt.hypers[0]['lr']<learn.opt.hypers[1]['lr']
    learn.freeze(); learn.fit(1, .01, wd=.1); check(.1); assert not learn.model.body[0].weight.requires_grad and learn.model.predictor[0].weight.requires_grad
    learn.unfreeze(); check(.1); assert learn.model.body[0].weight.requires_grad
    learn.lr_find(num_it=6, show_plot=False); check(.3) # fastai's `lr_find` works with the learner's own
    learn.save('a'); learn.opt.set_hypers(wd=.5); learn.load('a'); check(.3); learn.opt.clear_state(); learn.fit_byol(1, lr=.01, wd=.05); check(.05)
    ids = [id(p) for g in learn.opt.opt.param_groups for p in g['params']]; assert len(ids)==len(set(ids))==len([p for p in learn.model.parameters() if p.requires_grad])

def test_the_predictors_factor_holds_under_every_schedule():
    learn = byol_learn(image_dls(noise(40)), small_byol(bn=False), splitter=predictor_splitter, opt_func=partial(lars, lr_mults=(1.,10.)))
    class Log(Callback):
        order = 70
        def before_step(self): a,b = [self.opt.opt.param_groups[i]['lr'] for i in (0,2)]; assert b==pytest.approx(10*a)
    learn.fit(1, .1, cbs=Log()); learn.fit_one_cycle(1, .1, cbs=Log()); learn.fit_byol(2, lr=.1, cbs=Log())
    assert max(learn.recorder.lrs)==pytest.approx(.1)

def test_a_gradient_scaler_and_clipping_see_all_parameters():
    from test_callback import cpu_amp
    learn = byol_learn(image_dls(noise(40)), opt_func=lars, cbs=[cpu_amp(torch.float16, init_scale=2.**8), GradientClip(1e-3)])
    class Norm(Callback):
        order = 13
        def before_fit(self): self.norms = []
        def before_step(self): self.norms.append(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item())
    learn.fit_byol(2, lr=.1, cbs=(n:=Norm())); assert max(n.norms)==pytest.approx(1e-3, rel=1e-3)

@pytest.mark.parametrize('opt_func', [lars,adamw])
def test_saved_optimiser_state_is_whole(opt_func, tmp_path):
    mk = lambda: byol_learn(image_dls(noise(40)), opt_func=opt_func, path=tmp_path)
    a = mk(); a.fit_one_cycle(1, .01); a.save('a'); b = mk(); b.create_opt(); b.load('a')
    assert all(type(g['lr']) is float for g in a.opt.opt.param_groups)
    for p,q in zip(a.model.parameters(), b.model.parameters()):
        if not p.requires_grad: continue
        s,t = a.opt.opt.state[p],b.opt.opt.state[q]; assert s.keys()==t.keys() and s and all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for k in s)

@pytest.mark.parametrize('mults', [(1.,), (1.,0.), (1.,-1.)])
def test_wrong_factors_are_named(mults):
    with pytest.raises(ValueError, match='2 groups'): lars(predictor_splitter(small_byol()), lr_mults=mults)

# --- recipes

@pytest.mark.parametrize('epochs,lr,wd,tau', [(40,.45,1e-6,.97), (100,.45,1e-6,.99), (300,.3,1e-6,.99), (1000,.2,1.5e-6,.996)])
def test_deepminds_presets_at_their_batch(epochs, lr, wd, tau):
    r = recipe(epochs, 4096, 1_281_167)
    assert (r.preset,r.opt,r.base_lr,r.wd,r.tau,r.warmup,r.mom,r.eta,r.tau_end)==('imagenet','lars',lr,wd,tau,10.,.9,1e-3,1.) and r.lr==pytest.approx(lr*16)
    assert f'DeepMind, {epochs} epochs'==r.sources['base_lr']==r.sources['tau']

@pytest.mark.parametrize('a,b', [(40,100),(100,300),(300,1000)])
def test_between_the_presets_numbers_are_those_of_the_logarithm(a, b):
    ra,rb = recipe(a, 256),recipe(b, 256); e = round((a*b)**.5); r = recipe(e, 256)
    f = (math.log(e)-math.log(a))/(math.log(b)-math.log(a))
    assert r.base_lr==pytest.approx(ra.base_lr+f*(rb.base_lr-ra.base_lr)) and r.wd==pytest.approx(ra.wd+f*(rb.wd-ra.wd))
    assert 1-r.tau==pytest.approx((1-ra.tau)**(1-f)*(1-rb.tau)**f) and 'ours' in r.sources['tau']

@pytest.mark.parametrize('epochs,nearest', [(1,40), (39,40), (5000,1000)])
def test_outside_the_nearest_preset_is_taken(epochs, nearest):
    a,b = recipe(epochs, 256),recipe(nearest, 256); assert (a.base_lr,a.wd,a.tau)==(b.base_lr,b.wd,b.tau) and 'nearest' in a.sources['tau']

def test_imagenette_is_deepminds_setup():
    r = recipe(1000, 256, 9469, 128); assert (r.preset,r.base_lr,r.lr,r.wd,r.tau,r.warmup,r.eta)==('imagenette',2.,2.,1e-6,.996,10.,1e-3)

@pytest.mark.parametrize('n,size,want', [(None,224,'imagenet'), (100_000,64,'imagenet'), (99_999,64,'imagenette'), (4_999,64,'small_data'), (50_000,32,'cifar'), (None,40,'cifar')])
def test_the_preset_follows_from_images_and_size(n, size, want): assert recipe(100, 64, n, size).preset==want
def test_a_run_of_few_steps_takes_the_preset_for_few_steps():
    assert [recipe(e, 256, 9469, 128).preset for e in (55,56)]==['short','imagenette'] and recipe(20, 64, 9469, 128, effective_bs=256).preset==recipe(20, 64, 500, 128).preset=='short'
    r = recipe(20, 64, 500, 128, opt='lars'); assert (r.preset,r.eta)==('small_data',.02) # LARS has its own for few steps
    r = recipe(20, 64, 500, 128); assert r.opt=='adam' and r.lr==pytest.approx(r.base_lr/4) and 'eta' not in r.values

@pytest.mark.parametrize('preset,opt', [('vit','lars'), ('short','lars')])
def test_a_rate_for_another_optimiser_is_refused(preset, opt):
    with pytest.raises(ValueError, match=f"'{preset}' is made for 'adam'.*not one for '{opt}'.*base_lr"): recipe(100, 64, preset=preset, opt=opt)
    assert recipe(100, 256, preset=preset, opt=opt, base_lr=.3).lr==recipe(100, 256, preset=preset, opt=opt, lr=.3).lr==.3

def test_the_rate_goes_with_the_images_of_a_step():
    for bs,eff,procs in ((64,None,1), (64,256,1), (32,256,4), (256,4096,16)):
        r = recipe(100, bs, effective_bs=eff, processes=procs)
        assert r.effective_bs==(eff or bs*procs) and r.accumulate*bs*procs==r.effective_bs and r.lr==pytest.approx(r.base_lr*r.effective_bs/256)
    assert recipe(10, 64, 1000, effective_bs=256).steps==10*15//4

def test_small_images_have_the_small_stem_and_no_blur():
    r = recipe(1000, 256, 50_000, 32); assert r.small_stem and not r.blur and (r.base_lr,r.eta,r.trust_clip,r.wd,r.tau)==(1.,.02,True,1e-5,.99)

def test_weights_to_start_from_lower_the_rate(): assert recipe(100, 256, pretrained=True).lr==pytest.approx(recipe(100, 256).lr/10) and recipe(100, 256, preset='warm_start').pretrained
def test_small_batches_accumulate(): r = recipe(100, 64, 9469, preset='small_batch'); assert (r.accumulate,r.cbs[0].n_acc,r.lr)==(4,256,2.)
def test_a_large_batch_needs_no_accumulation(): assert recipe(100, 512, 9469, preset='small_batch').effective_bs==512

def test_adam_has_its_own_numbers():
    r = recipe(100, 256, opt='adam'); assert r.opt_func.func is adamw and r.base_lr<.01 and 'eta' not in r.values
    v = recipe(300, 4096, preset='vit'); assert (v.opt,v.lr,v.wd,v.warmup,v.tau)==('adam',pytest.approx(2.4e-3),.1,40.,.99)

@pytest.mark.parametrize('steps,tau', [(10,.5), (150,.5), (1000,.9), (4000,.975), (24_999,.996), (100_000,.996)])
def test_the_target_averages_over_a_hundredth_of_a_short_run_at_most(steps, tau):
    assert recipe(steps, 100, 100, 64, preset='imagenette').tau==pytest.approx(tau, abs=1e-6); assert recipe(steps, 100, 100, 64, preset='imagenette', tau=.999).tau==.999

@pytest.mark.parametrize('kw', [{}, dict(n_items=9469, size=128), dict(size=32), dict(opt='adam', pretrained=True), *[dict(preset=o) for o in presets]])
def test_every_number_has_a_source_and_is_printed(kw):
    r = recipe(57, 64, **kw); assert r.values.keys()==r.sources.keys() and all(r.sources.values())
    lines = repr(r).split('\n'); assert len(lines)==len(r.values) and all(l.startswith(k) and l.endswith(r.sources[k]) for l,k in zip(lines, r.values))

def test_what_you_say_wins_and_is_marked_yours():
    own = dict(base_lr=.7, wd=.01, tau=.5, tau_end=.9, warmup=3., mom=.8, eta=.01, norm='group', small_stem=True, blur=False, pred_lr_mult=10., opt='lars', pretrained=True)
    r = recipe(100, 256, **own)
    for k,v in own.items(): assert r[k]==v and r.sources[k]=='yours', k
    assert recipe(100, 64, lr=.123).lr==.123 and recipe(100, 64, norm=None).sources['norm']=='yours'

@pytest.mark.parametrize('kw,msg', [
    (dict(epochs=0), '`epochs`.*1 or more'), (dict(epochs=2.5), '`epochs`'), (dict(bs=1), '2 or more'), (dict(bs=0), '`bs`'), (dict(bs=101), 'only 100: use bs=50'),
    (dict(effective_bs=128), 'only 100'), (dict(n_items=0), '`n_items`'), (dict(effective_bs=0), '`effective_bs`'), (dict(processes=0), '`processes`'), (dict(effective_bs=50), 'multiple of the 32'), (dict(tau=1.1), r'kept on the target, in \[0,1\]'), (dict(tau_end=-.1), 'tau_end'),
    (dict(size=7), 'at least 8'), (dict(opt='sgd'), "'lars' or 'adam'.*opt_func"), (dict(preset='nette'), 'imagenette'), (dict(lr=0.), '`lr` must be above 0'), (dict(lr=math.nan), '`lr`'),
    (dict(lr=1., base_lr=1.), 'one of `lr` and `base_lr`'), (dict(wd=-1.), '`wd`'), (dict(mom=1.), '`mom`'), (dict(warmup=11.), '`warmup`'), (dict(norm='instance'), 'norm'), (dict(pred_lr_mult=0.), 'pred_lr_mult')])
def test_nonsense_is_refused_with_the_remedy(kw, msg):
    with pytest.raises(ValueError, match=msg): recipe(**{**dict(epochs=10, bs=32, n_items=100, size=64), **kw})

def test_a_recipe_can_be_read_changed_and_pickled():
    r = recipe(100, 256, 9469); assert r.lr==r['lr']==dict(**r)['lr']==r.get('lr') and repr(pickle.loads(pickle.dumps(r)))==repr(deepcopy(r))==repr(r)
    assert r.replace(epochs=1000).tau==.996 and r.epochs==100
    with pytest.raises(AttributeError): r.learning_rate
    with pytest.raises(TypeError, match='taus'): r.replace(taus=1)

# --- with a learner

quick = dict(hidden_size=16, projection_size=8)

def test_a_learner_follows_the_recipe():
    r = recipe(4, 8, 24, 16, preset='imagenette', effective_bs=16, pred_lr_mult=10., norm='layer')
    learn = hush(byol_learner(image_dls(noise(32,16)), conv_body(), recipe=r, **quick))
    assert (learn.lr,learn.wd,learn.byol.tau,learn.byol.tau_end)==(r.lr,r.wd,r.tau,1.) and learn.gradient_accumulation.n_acc==16 and isinstance(learn.model.projector[1], nn.LayerNorm)
    learn.fit_byol(); assert len(learn.byol.taus)==r.steps==6 and isinstance(learn.opt.opt, timm.optim.Lars) and learn.opt.lr_mults==[1.,10.]

class AtOnce(Callback):
    "Ends a fit before its first batch"
    def before_train(self): raise CancelFitException
def test_a_run_of_another_length_takes_the_optimiser_of_its_preset():
    learn = hush(byol_learner(image_dls(noise(32,48)), conv_body(), recipe=recipe(4, 8), views=(same,mirror), cbs=AtOnce(), **quick))
    learn.fit_byol(); first = learn.opt; assert learn.recipe.preset=='short' and isinstance(first.opt, torch.optim.AdamW)
    learn.fit_byol(5); assert learn.opt is first # of the same kind: it keeps what it has learned
    learn.fit_byol(1000); assert learn.recipe.preset=='small_data' and isinstance(learn.opt.opt, timm.optim.Lars) and learn.opt.hypers[0]['lr']==pytest.approx(learn.recipe.lr)
    learn = hush(byol_learner(image_dls(noise(32,48)), conv_body(), recipe=recipe(4, 8, lr=.1), opt_func=SGD, views=(same,mirror), cbs=AtOnce(), **quick))
    learn.fit_byol(1000); assert learn.opt_func is SGD and isinstance(learn.opt, Optimizer)

def test_what_is_passed_besides_wins():
    learn = byol_learner(image_dls(noise(32,48)), 'resnet18', recipe=recipe(4, 8), lr=.3, wd=.2, tau=.5, norm=None, small_stem=True, opt_func=SGD, views=(same,mirror), cbs=GradientAccumulation(24), **quick)
    assert (learn.lr,learn.wd,learn.byol.tau,learn.byol.views,learn.opt_func)==(.3,.2,.5,(same,mirror),SGD) and learn.model.spec.small_stem and isinstance(learn.model.projector[1], nn.Identity)
    assert learn.gradient_accumulation.n_acc==24 and len(learn.cbs.filter(risinstance(GradientAccumulation)))==1
    r = learn.recipe; assert all(r.sources[k]=='yours' for k in ('lr','wd','tau','norm','small_stem','opt','views','effective_bs')) and r.opt=='SGD' and r.accumulate==3 and 'eta' not in r.values and 'blur' not in r.values
    learn = byol_learner(image_dls(noise(32,48)), conv_body(), recipe=recipe(4, 8, lr=.1), cbs=GradientAccumulation(24), **quick); assert learn.lr==.1
    assert byol_learner(image_dls(noise(32,48)), conv_body(), recipe=recipe(4, 8, base_lr=.1), lr=.3, **quick).lr==.3

def test_batches_of_a_batch_sampler_accumulate():
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(noise(32)), batch_sampler=torch.utils.data.BatchSampler(range(32), 8, True)); dl.device = cpu # it has no batch size of its own
    learn = hush(byol_learner(DataLoaders(dl, dl), conv_body(), recipe=recipe(2, 8, n_items=32, size=16), cbs=GradientAccumulation(16), **quick))
    assert (learn.recipe.effective_bs,learn.recipe.accumulate)==(16,2); learn.fit_byol(); assert len(learn.byol.taus)==learn.recipe.steps==4

def test_another_optimiser_at_the_recipes_rate_is_warned_of():
    with pytest.warns(UserWarning, match='pass `lr`'): byol_learner(image_dls(noise(32,16)), conv_body(), recipe=recipe(4, 8), opt_func=SGD, **quick)

def test_a_recipe_for_the_data_at_hand():
    dls = image_dls(noise(32,20)); learn = byol_learner(dls, conv_body(), recipe=True, **quick); r = learn.recipe
    assert (r.bs,r.n_items,r.size,r.preset)==(8,24,20,'cifar') and all(r.sources[k]=='your data' for k in ('bs','n_items','size')) and not r.small_stem and 'resnet' in r.sources['small_stem']
    assert byol_learner(dls, 'resnet18', recipe=True, **quick).model.spec.small_stem and not byol_learner(dls, 'resnetv2_50', recipe=True, **quick).model.spec.small_stem
    assert byol_learner(dls, xresnet18, recipe='cifar', **quick).recipe.small_stem
    hush(learn).fit_byol(3); assert learn.recipe.epochs==3 and len(learn.byol.taus)==9==learn.recipe.steps and learn.byol.tau==learn.recipe.tau

def test_views_are_not_blurred_where_the_recipe_says_so():
    for blur in (True,False):
        learn = hush(byol_learner(image_dls(noise(32,48)), conv_body(), recipe=recipe(1, 8, blur=blur), **quick)); learn.fit_byol()
        assert [v.p['blur']>0 for v in first(learn.byol._made.values())]==[blur]*2

@pytest.mark.parametrize('kw,exc,msg', [
    (lambda: dict(recipe=recipe(4, 16)), ValueError, r'bs=8.*recipe\(4, 8\).*effective_bs=16'), (lambda: dict(recipe='nette'), ValueError, 'imagenette'),
    (lambda: dict(recipe=3), TypeError, 'name of a preset'), (lambda: dict(recipe=recipe(4, 8), tau=2.), ValueError, 'kept'), (lambda: dict(recipe='short', lr=slice(1e-4,1e-3)), TypeError, 'one number.*fit_byol'), (lambda: dict(recipe=recipe(4, 8, pretrained=True)), ValueError, 'pretrained')])
def test_a_recipe_that_does_not_fit_is_named(kw, exc, msg):
    with pytest.raises(exc, match=msg): byol_learner(image_dls(noise(32,16)), conv_body(), **{**quick, **kw()})

def test_fit_byol_asks_for_what_it_needs():
    learn = byol_learn()
    with pytest.raises(ValueError, match='number of epochs'): learn.fit_byol()
    for kw in (dict(epochs=0), dict(epochs=2, start_epoch=2), dict(epochs=2, warmup=3)):
        with pytest.raises(ValueError): learn.fit_byol(**kw)
    with pytest.raises(TypeError, match='byol_learner'): hush(Learner(image_dls(noise(16)), conv_body(), loss_func=noop)).fit_byol(1)

def test_fit_byol_with_numbers_of_the_moment():
    learn = hush(byol_learner(image_dls(noise(32,16)), conv_body(), recipe=recipe(4, 8), **quick)); learn.fit_byol(2, lr=.5, warmup=1, wd=.1)
    assert learn.recipe.lr==.5 and learn.recipe.sources['lr']==learn.recipe.sources['epochs']=='yours' and max(learn.recorder.lrs)==.5 and learn.opt.hypers[0]['wd']==.1
    np.testing.assert_allclose(learn.recorder.lrs, [dm_lr(k, 256, .5, 6, 3) for k in range(6)], rtol=1e-12)

def test_a_learner_with_a_recipe_is_exported(tmp_path):
    from test_callback import folder_dls
    learn = hush(byol_learner(folder_dls(tmp_path/'d'), conv_body(), recipe=recipe(1, 8), path=tmp_path, **quick)); learn.fit_byol(); learn.export('e.pkl')
    assert repr(load_learner(tmp_path/'e.pkl').recipe)==repr(learn.recipe)

def test_the_picture_shows_both_schedules():
    ax = recipe(100, 256, 9469, 128).show_schedule(); a,b = ax.lines[0].get_ydata(),ax.figure.axes[1].lines[0].get_ydata()
    assert a[0]==0 and max(a)==pytest.approx(2., rel=1e-2) and a[-1]==pytest.approx(0, abs=1e-9) and b[0]==pytest.approx(1-100/3600) and b[-1]==1.; plt.close('all')
