"Precision and layout: what is chosen, that it is what runs, and that nothing else changes"
from conftest import *
from fastbyol.core import eval_mode
from fastbyol.device import GPUKernels, measure_ways
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.channelslast import ChannelsLast
from torch.utils._python_dispatch import TorchDispatchMode
import fastbyol.device as P

def learner(precision, n=24, size=32, cbs=None, arch='resnet18'):
    set_seed(0); return hush(byol_learner(image_dls(noise(n+8, size)), arch, hidden_size=32, projection_size=8, views=(same,mirror), precision=precision, cbs=cbs))
def conv_weight(m): return first(o for o in m.modules() if isinstance(o, nn.Conv2d)).weight
def is_last(w): return w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()

class Look(Callback):
    "In which precision things happen"
    order = BYOLCallback.order+1
    def __init__(self): self.rows = []
    def before_batch(self): self.rows.append((torch.is_autocast_enabled('cpu'), self.yb[0].dtype, [v.dtype for v in self.xb]))
    def after_pred(self): self.preds = self.pred.dtype

@pytest.mark.parametrize('p,cast,last', [('fp32',False,False), ('channels_last',False,True), ('bf16',True,True)])
def test_a_precision_is_what_runs(p, cast, last):
    learn = learner(p, cbs=(look:=Look())); learn.fit(1, 1e-3)
    assert learn.precision==p and {r[0] for r in look.rows}=={cast} and is_last(conv_weight(learn.model.body))==last==is_last(conv_weight(learn.model.target))
    assert all(r[2]==[torch.float32]*2 for r in look.rows) and look.preds==torch.float32 # views and what the loss sees
    assert all(o.dtype==torch.float32 for o in learn.model.parameters()) and not torch.is_autocast_enabled('cpu')

def test_views_are_made_in_float32_and_targets_as_the_online_network():
    seen = []
    def view(x): seen.append((x.dtype, torch.is_autocast_enabled('cpu'))); return x
    set_seed(0); learn = hush(byol_learner(image_dls(noise(32,32)), 'resnet18', hidden_size=32, views=(view,mirror), precision='bf16', cbs=(look:=Look()))); learn.fit(1, 1e-3)
    assert {o[0] for o in seen}=={torch.float32} and not any(o[1] for o in seen) and {r[1] for r in look.rows}=={torch.bfloat16}

def test_bfloat16_learns_as_float32_does():
    a,b = learner('fp32'),learner('bf16')
    for l in (a,b): l.dls.train.rng = random.Random(0); l.fit(3, 1e-3)
    x,y = (torch.stack(list(l.recorder.losses)) for l in (a,b)); assert not torch.equal(x, y) and (x-y).abs().max()<.15

def test_layout_changes_rounding_only():
    a,b = learner('fp32'),learner('channels_last')
    for l in (a,b): l.dls.train.rng = random.Random(0); l.fit(1, 1e-4)
    for (k,v),w in zip(sd_of(a.model).items(), sd_of(b.model).values()): torch.testing.assert_close(v, w, rtol=1e-2, atol=1e-3, msg=k)

@pytest.mark.parametrize('secs,best', [(dict(fp32=1.,channels_last=.91,bf16=.95),'fp32'), (dict(fp32=1.,channels_last=.7,bf16=.5),'bf16'), (dict(fp32=1.,channels_last=.7,bf16=.9),'channels_last'), (dict(fp32=.001),'fp32')])
def test_auto_takes_the_quickest_where_it_is_worth_while(monkeypatch, secs, best):
    monkeypatch.setattr(P, 'measure_ways', lambda *a, **k: secs); learn = learner('auto')
    assert learn.precision==best and bool(learn.cbs.filter(risinstance(MixedPrecision)))==(best=='bf16') and bool(learn.cbs.filter(risinstance(ChannelsLast)))==(best!='fp32')

def test_measuring_changes_nothing():
    m = BYOL('resnet18', hidden_size=8); m.body[0].eval() if isinstance(m.body, nn.Sequential) else None
    x = torch.rand(2,3,32,32); sd,modes,rng = {k:v.clone() for k,v in m.state_dict().items()},[o.training for o in m.modules()],torch.get_rng_state()
    secs = measure_ways(m.body, x, turns=1, idle=0.)
    assert set(secs)=={'fp32','channels_last','bf16'} and all(o>0 for o in secs.values())
    assert same_sd(sd, m.state_dict()) and all(v.stride()==sd[k].stride() for k,v in m.state_dict().items()) and modes==[o.training for o in m.modules()] and torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in m.parameters())

def test_measuring_keeps_to_its_budget():
    calls = []; body = nn.Conv2d(3,2,3); orig = body.forward
    def slow(x): calls.append(1); time.sleep(.05); return orig(x)
    body.forward = slow; measure_ways(body, torch.rand(1,3,8,8), turns=50, idle=.01, budget=.2); assert len(calls)<=4+3*3

def test_a_quick_network_is_not_measured_further():
    calls = []; body = nn.Conv2d(3,2,3); body.register_forward_hook(lambda *a: calls.append(1)); assert list(measure_ways(body, torch.rand(1,3,8,8), idle=10.))==['fp32'] and len(calls)==2

def test_a_change_of_mind():
    learn = learner('bf16').set_precision('bf16'); assert len(learn.cbs.filter(risinstance(MixedPrecision)))==1
    learn.set_precision('fp32'); assert not learn.cbs.filter(risinstance((MixedPrecision,ChannelsLast))) and not is_last(conv_weight(learn.model.body))
    learn.set_precision('bf16').to_fp32(); assert not learn.cbs.filter(risinstance(MixedPrecision)) # fastai's own way back

@pytest.mark.parametrize('p,says', [('fp16','needs a GPU'), ('half','one of')])
def test_a_precision_that_is_not_there(p, says):
    with pytest.raises(ValueError, match=says): learner(p)

@pytest.mark.parametrize('p', ['channels_last','bf16'])
def test_files_and_hand_over_do_not_depend_on_the_layout(tmp_path, p):
    learn = learner(p); learn.fit(1, 1e-3); f = save_body(learn, tmp_path/'b'); body,_ = load_body(f); w = conv_weight(body)
    assert w.is_contiguous() and torch.equal(w, conv_weight(learn.model.body)); x = noise(4,32)
    with eval_mode(learn.model): a = learn.model.embed(learn.model.normalize(x))
    m,meta = load_body(f); mean,std = (tensor(o).view(1,-1,1,1) for o in meta.spec.stats)
    with torch.no_grad(): torch.testing.assert_close(pool_features(m((x-mean)/std), meta.spec.nhwc), a, rtol=1e-3, atol=1e-4)
    import pickle; assert pickle.loads(pickle.dumps(learn.cbs.filter(risinstance((MixedPrecision,ChannelsLast)))))

@pytest.mark.parametrize('p', ['channels_last','bf16'])
def test_a_resumed_run_is_the_same(tmp_path, p):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: raise KeyboardInterrupt
    def run(d, *cbs, resume=False):
        learn = learner(p, cbs=[CheckpointCallback(tmp_path/d), *cbs])
        if resume: learn.resume(tmp_path/d)
        else: learn.dls.train.rng = random.Random(0)
        try: learn.fit_one_cycle(3, 1e-3)
        except KeyboardInterrupt: pass
        return sd_of(learn.model)
    whole = run('a'); run('b', Stop()); assert same_sd(whole, run('b', resume=True))

def test_compilation_falls_back_with_a_message():
    def broken(gm, inputs): raise RuntimeError('no compiler here')
    learn = learner('fp32')
    with pytest.warns(UserWarning, match='stays as it is'): learn.to_compiled(backend=broken)
    learn.fit(1, 1e-3)

def test_compiled_is_the_same():
    a,b = learner('fp32'),learner('fp32').to_compiled(backend='aot_eager'); keys = list(a.model.state_dict())
    for l in (a,b): l.dls.train.rng = random.Random(0); l.fit(1, 1e-4)
    assert list(b.model.state_dict())==keys
    for v,w in zip(a.model.state_dict().values(), b.model.state_dict().values()): torch.testing.assert_close(v, w, rtol=1e-2, atol=1e-3)

def gpu_flags(): return torch.backends.cudnn.benchmark,torch.backends.cudnn.allow_tf32,torch.get_float32_matmul_precision()

@pytest.mark.parametrize('tf32', [False,True])
def test_settings_of_a_gpu_hold_while_fitting_and_no_longer(tf32):
    class Fail(Callback):
        def before_epoch(self): raise RuntimeError('no more')
    before,seen = gpu_flags(),[]
    learn = learner('fp32').add_cbs([GPUKernels(tf32), Callback(after_pred=lambda self: seen.append(gpu_flags()))])
    learn.fit(1, 1e-3); assert set(seen)=={(True,tf32,'high' if tf32 else 'highest')} and gpu_flags()==before
    with pytest.raises(RuntimeError, match='no more'): learn.fit(1, 1e-3, cbs=Fail())
    learn.fit(1, 1e-3); assert gpu_flags()==before # also after a fit that ended with an error
    import pickle; assert pickle.loads(pickle.dumps(learner('fp32').add_cb(GPUKernels(tf32)).gpu_kernels)).tf32==tf32

@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='torch before 2.9 has no setting per operation')
@pytest.mark.parametrize('where', ['', 'cudnn.', 'cuda.matmul.', 'cudnn.conv.'])
def test_settings_per_operation_are_kept_too(monkeypatch, where):
    get = lambda: [o.fp32_precision for o in P._per_op()]
    before,at = get(),torch.backends
    for o in filter(None, where.split('.')): at = getattr(at, o)
    seen = []; learn = learner('fp32').add_cbs([GPUKernels(), Callback(after_pred=lambda self: seen.append((torch.backends.cudnn.conv.fp32_precision,torch.backends.cuda.matmul.fp32_precision)))])
    learn.fit(1, 1e-3); assert get()==before # 'none' is none again, and follows what is set for all
    old = at.fp32_precision; at.fp32_precision = 'ieee' if old=='tf32' else 'tf32'
    try:
        mine = get(); seen.clear(); learn.fit(1, 1e-3)
        assert set(seen)<={('ieee','ieee'),('none','ieee'),('ieee','none')} and get()==mine
    finally:
        at.fp32_precision = old
        for o,v in zip(P._per_op(), before): o.fp32_precision = v

def test_a_stopped_run_leaves_the_kernels_as_they_were():
    before = gpu_flags(); learn = learner('fp32').add_cb(GPUKernels(True))
    with pytest.raises(FloatingPointError): learn.fit(1, 1e-3, cbs=Callback(after_pred=lambda self: setattr(self.learn, 'pred', self.pred*math.nan)))
    assert gpu_flags()==before
    torch.set_float32_matmul_precision('high')
    try: del learn; import gc; gc.collect(); assert torch.get_float32_matmul_precision()=='high' # no old value comes back later
    finally: torch.set_float32_matmul_precision(before[2])

def test_on_a_gpu_whole_batches_are_measured_however_quick_they_are(monkeypatch):
    learn = learner('fp32'); took = []
    monkeypatch.setattr(P, '_pass', lambda body, x, **kw: took.append(len(x)) or .002-.001*kw.get('bf16', False))
    x = P._some_images(learn); assert len(x)==8 and P.quickest(measure_ways(learn.model.body, x, idle=0.))=='bf16' and P.quickest(measure_ways(learn.model.body, x))=='fp32'
    class OnGPU(nn.Module): # weights that say they are on a GPU
        def parameters(self): yield SimpleNamespace(device=SimpleNamespace(type='cuda'))
    monkeypatch.setattr(P, 'online_model', lambda m: OnGPU()); monkeypatch.setattr(Tensor, 'to', lambda self, *a, **kw: self)
    monkeypatch.setattr(P, 'dl_bs', lambda dl: 300); assert len(P._some_images(learn))==300

def test_a_way_that_does_not_fit_into_memory_is_not_taken(monkeypatch):
    def one(body, x, bf16=False, **kw):
        if not bf16: raise torch.OutOfMemoryError('too much')
        return 1.
    monkeypatch.setattr(P, '_pass', one); secs = measure_ways(nn.Conv2d(3,2,3), torch.rand(1,3,8,8)); assert secs['fp32']==math.inf and P.quickest(secs)=='bf16'

def test_mixed_precision_of_fastai_is_kept_under_auto():
    learn = learner('auto', cbs=MixedPrecision(amp_mode='bf16', init_scale=4.)); cb = learn.cbs.filter(risinstance(MixedPrecision))
    assert learn.precision=='bf16' and len(cb)==1 and cb[0].kwargs['init_scale']==4. and not learn.precision_measured; learn.fit(1, 1e-3)
    with pytest.raises(ValueError, match='needs a GPU'): learner('auto', cbs=MixedPrecision())
    assert learner('fp32', cbs=MixedPrecision()).precision=='fp32' # what is named counts

def test_the_mixed_precision_that_came_last_is_the_one():
    learn = learner('bf16').add_cb(later:=P.Precision('bf16')); learn.fit(1, 1e-3) # as `to_bf16`, with what works on a CPU
    assert list(learn.cbs.filter(risinstance(MixedPrecision)))==[later] and learn.mixed_precision is later and not torch.is_autocast_enabled('cpu')

def test_a_gpu_has_what_its_generation_has(monkeypatch):
    cuda = torch.device('cuda')
    for ampere,names in ((True,['fp32','channels_last','tf32','bf16']), (False,['fp32','channels_last'])):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **kw: ampere); assert P._has(cuda)==names
    assert P._has(cpu)==['fp32','channels_last','bf16']

class Casts(TorchDispatchMode):
    "Counts the casts of weight `p`"
    def __init__(self, p): super().__init__(); self.p,self.n = p.data_ptr(),0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f is torch.ops.aten._to_copy.default and args[0].data_ptr()==self.p: self.n += 1
        return f(*args, **(kwargs or {}))

def test_both_views_share_one_cast_of_the_targets_weights_which_stay_without_gradient():
    m = small_byol(); w = conv_weight(m.target['body']); vs = torch.rand(2,4,3,16,16)
    plain = m.targets(*vs)
    with torch.autocast('cpu', torch.bfloat16):
        with Casts(w) as c: a = m.targets(*vs)
        assert c.n==1 and not a.requires_grad and not any(o.requires_grad for o in m.target.parameters())
        with torch.no_grad(): w.mul_(2.)
        assert not torch.equal(m.targets(*vs), a) # the next call casts anew
        m.predictor(m.project(vs[0])).sum().backward(); assert conv_weight(m.body).grad is not None # the online network's casts have a gradient
        w.data = torch.ones(1)
        with pytest.raises(RuntimeError): m.targets(*vs)
    assert (plain-a.float()).abs().max()<.1 and not any(o.requires_grad for o in m.target.parameters())
