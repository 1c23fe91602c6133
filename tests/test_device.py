"Precision, layout, kernels and graphs: what is chosen, that it is what runs, and that nothing else changes"
from conftest import *
from fastbyol import device
from fastbyol.core import eval_mode
from fastbyol.device import DeviceMixedPrecision, GraphedPasses, best_precision, _why_no_graphs
from fastai.callback.all import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.channelslast import ChannelsLast
import pickle

def learner(precision='fp32', n=16, size=16, cbs=None, added=(), dls=None, model=None, **kw):
    "A convolutional body with fixed views; `added` are callbacks that `byol_learner` does not see"
    set_seed(0); dls = dls or image_dls(noise(n+8, size))
    kw = {**dict(hidden_size=16, projection_size=8, views=(same,mirror)), **kw}
    return hush(byol_learner(dls, model or conv_body(), precision=precision, cbs=cbs, **kw)).add_cbs(added)
def conv_weight(m): return first(o for o in m.modules() if isinstance(o, nn.Conv2d)).weight
def is_last(w): return w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
def has(learn, kind): return len(learn.cbs.filter(risinstance(kind)))

# --- the rule

@pytest.mark.parametrize('bf16,want', [(True,'bf16'), (False,'fp16')])
def test_a_gpu_trains_in_bfloat16_where_it_has_it(monkeypatch, bf16, want):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16); assert best_precision('cuda')==want

@pytest.mark.parametrize('avx,amx,want', [(False,False,'channels_last'), (True,False,'bf16'), (False,True,'bf16')])
def test_a_cpu_trains_in_bfloat16_only_with_instructions_for_it(monkeypatch, avx, amx, want):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    assert best_precision('cpu')==want==learner('auto').precision

def test_other_devices_train_in_float32(): assert best_precision('mps')=='fp32'

@pytest.mark.parametrize('p', ['fp16','half'])
def test_a_precision_that_is_not_there_is_refused(p):
    with pytest.raises(ValueError, match=f"on cpu is one of .*'bf16'.*, got '{p}'"): learner(p)

# --- precision is what runs

class Look(Callback):
    "In which precision things happen"
    order = BYOLCallback.order+1
    def __init__(self): self.rows = []
    def before_batch(self):
        self.rows.append((torch.is_autocast_enabled('cpu'), self.yb[0].dtype, *[v.dtype for v in self.xb]))
    def after_pred(self): self.preds = self.pred.dtype

@pytest.mark.parametrize('p,cast,last', [('fp32',False,False), ('channels_last',False,True), ('bf16',True,True)])
def test_a_precision_is_what_runs(p, cast, last):
    learn = learner(p, cbs=(look:=Look())); learn.fit(1, 1e-3)
    targets = torch.bfloat16 if cast else torch.float32
    assert learn.precision==p and set(look.rows)=={(cast,targets,torch.float32,torch.float32)}
    assert look.preds==torch.float32 # what the loss sees
    for m in (learn.model.body,learn.model.target): assert is_last(conv_weight(m))==last
    assert all(o.dtype==torch.float32 for o in learn.model.parameters()) and not torch.is_autocast_enabled('cpu')

def test_views_are_made_outside_autocast():
    seen = []
    def view(x): seen.append((x.dtype, torch.is_autocast_enabled('cpu'))); return x
    learner('bf16', views=(view,mirror)).fit(1, 1e-3); assert set(seen)=={(torch.float32,False)}

@pytest.mark.parametrize('p,tol', [('channels_last',1e-3), ('bf16',.1)])
def test_a_precision_changes_rounding_only(p, tol):
    a,b = learner('fp32'),learner(p)
    for l in (a,b): l.fit(2, 1e-2)
    x,y = (torch.stack(list(l.recorder.losses)) for l in (a,b)); assert (x-y).abs().max()<tol

def test_a_change_of_mind():
    learn = learner('bf16').set_precision('bf16'); assert has(learn, MixedPrecision)==1
    learn.set_precision('fp32'); assert not has(learn, (MixedPrecision,ChannelsLast)) and not is_last(conv_weight(learn.model.body))
    learn.set_precision('bf16').to_fp32(); assert not has(learn, MixedPrecision) # fastai's own way back

def test_mixed_precision_of_fastai_is_kept_under_auto():
    learn = learner('auto', cbs=MixedPrecision(amp_mode='bf16', init_scale=4.))
    kept, = learn.cbs.filter(risinstance(MixedPrecision)); assert learn.precision=='bf16' and kept.kwargs['init_scale']==4.
    with pytest.raises(ValueError, match="got 'fp16'"): learner('auto', cbs=MixedPrecision())
    assert learner('fp32', cbs=MixedPrecision()).precision=='fp32' # what is named counts

def test_the_mixed_precision_that_came_last_is_the_one():
    learn = learner('bf16').add_cb(later:=DeviceMixedPrecision('bf16')); learn.fit(1, 1e-3) # as `to_bf16` does
    assert list(learn.cbs.filter(risinstance(MixedPrecision)))==[later] and learn.mixed_precision is later
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('p', ['channels_last','bf16'])
def test_files_and_hand_over_do_not_depend_on_the_layout(tmp_path, p):
    learn = learner(p, model='resnet18', size=32); learn.fit(1, 1e-3)
    body,meta = load_body(save_body(learn, tmp_path/'b')); w = conv_weight(body)
    assert w.is_contiguous() and torch.equal(w, conv_weight(learn.model.body))
    x = noise(4,32); mean,std = (tensor(o).view(1,-1,1,1) for o in meta.spec.stats)
    with eval_mode(learn.model): want = learn.model.embed(learn.model.normalize(x))
    with torch.no_grad(): found = pool_features(body((x-mean)/std), meta.spec.nhwc)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    assert pickle.loads(pickle.dumps(learn.cbs.filter(risinstance((MixedPrecision,ChannelsLast)))))

def test_a_resumed_run_in_bfloat16_is_the_same(tmp_path):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: raise KeyboardInterrupt
    def run(folder, *cbs):
        learn = learner('bf16', cbs=[CheckpointCallback(tmp_path/folder), *cbs])
        learn.resume(tmp_path/folder, missing_ok=True)
        try: learn.fit_one_cycle(3, 1e-3)
        except KeyboardInterrupt: pass
        return sd_of(learn.model)
    whole = run('a'); run('b', Stop()); assert same_sd(whole, run('b'))

# --- CUDA graphs: what decides about them, with a stand-in for torch's function

class Wrapped(nn.Module):
    def __init__(self, module): super().__init__(); self.module = module
    def forward(self, *x): return self.module(*x)

def test_what_keeps_graphs_from_running_is_named():
    learn = learner(); model = learn.model; assert 'not on a CUDA' in _why_no_graphs(learn)
    hook = model.projector[0].register_forward_hook(noop); assert _why_no_graphs(learn)=='`projector.0` has hooks'; hook.remove()
    model.body.grad_checkpointing = True; assert 'checkpointing' in _why_no_graphs(learn); del model.body.grad_checkpointing
    learn.model = nn.DataParallel(model); assert 'DataParallel' in _why_no_graphs(learn); learn.model = model

def fake_graphs(log, fail=None):
    "Like `make_graphed_callables`: warms up, then fixed shapes and outputs in fixed memory; gradients in fixed memory, too"
    def make(callables, samples, allow_unused_input=False):
        if fail and fail(): raise RuntimeError('cannot capture this\nat all')
        targets,model = callables; forward,shape = model.forward,samples[0][0].shape; log.append(tuple(shape))
        for _ in range(3): targets(*samples[0]); forward(*samples[1])
        kept = model.features
        params,out,grads = [p for p in model.parameters() if p.requires_grad],{},{}
        def run(name, f):
            def replay(*views):
                assert views[0].shape==shape and model.training
                res = f(*views)
                if name=='forward' and kept is not None: model.features = kept.copy_(model.features)
                if name not in out: out[name] = torch.empty_like(res.detach())
                out[name].copy_(res.detach())
                return out[name] if name=='targets' else Static.apply(res, out[name])
            return replay
        class Static(torch.autograd.Function):
            @staticmethod
            def forward(ctx, res, memory): return memory.view_as(memory)
            @staticmethod
            def backward(ctx, g): return g,None
        model.forward = run('forward', forward)
        return run('targets', targets),model
    return make

@pytest.fixture
def graphs(monkeypatch):
    "Graphs as on CUDA, with what was captured in the order of capture"
    log = []
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fake_graphs(log))
    monkeypatch.setattr(device, '_why_no_graphs', lambda learn: None)
    return log

def weights_after(n=32, epochs=2, graphed=True, cbs=(), dls=None, **kw):
    learn = learner(n=n, dls=dls, added=[*([GraphedPasses()] if graphed else []), *cbs], **kw)
    learn.fit(epochs, 1e-2); assert not {'forward','targets'} & set(vars(learn.model))
    return sd_of(learn.model)

settings = dict(plain={}, simsiam=dict(momentum=False), bf16=dict(precision='bf16'))
@pytest.mark.parametrize('name', settings)
def test_a_run_with_graphs_gives_the_same_weights(graphs, name):
    "Batch norm statistics, too, which capturing moves"
    a,b = weights_after(**settings[name]),weights_after(graphed=False, **settings[name])
    assert graphs==[(8,3,16,16)] and same_sd(a, b)

@pytest.mark.parametrize('cb', [lambda: GradientAccumulation(16), lambda: GradientClip(1e-2)])
def test_accumulation_and_clipping_give_the_same_with_graphs(graphs, cb):
    assert same_sd(weights_after(cbs=[cb()]), weights_after(graphed=False, cbs=[cb()])) and graphs

def test_an_online_probe_learns_the_same_with_graphs(graphs):
    "It takes its features from the model, and keeps no graph from running by a hook"
    def run(graphed):
        dls = image_dls(noise(36,16), bs=8, y=[i%2 for i in range(36)], drop_last=False) # 8, 8, 8, 4
        learn = learner(dls=dls, added=[OnlineProbe(n_out=2), *([GraphedPasses()] if graphed else [])])
        reason = Callback(before_batch=lambda self: reasons.add(_why_no_graphs(self.learn)))
        reasons = set(); learn.fit(2, 1e-2, cbs=reason)
        assert reasons=={'the model is not on a CUDA device'} and not learn.model.keeps_features
        return sd_of(learn.probe.head),learn.probe.history
    (a,rows),(b,plain) = run(True),run(False)
    assert same_sd(a, b) and rows.equals(plain) and graphs==[(8,3,16,16)]

def test_gradients_that_wait_leave_the_memory_of_the_graph():
    "pytorch#181723: the graph's next pass overwrites them"
    learn = learner(added=[GraphedPasses(), GradientAccumulation(16)]); p = first(learn.model.parameters())
    memory = torch.ones_like(p); p.grad = memory
    learn.graphed_passes.after_cancel_batch(); assert p.grad.data_ptr()!=memory.data_ptr() and torch.equal(p.grad, memory)

def test_a_last_batch_of_another_size_runs_without_graph(graphs):
    dls = lambda: image_dls(noise(28), bs=8, drop_last=False) # 8, 8, 4
    assert same_sd(weights_after(dls=dls()), weights_after(dls=dls(), graphed=False)) and graphs==[(8,3,16,16)]

def test_another_size_from_the_first_batch_of_an_epoch_is_captured(graphs):
    learn = learner(size=32, views=None, added=GraphedPasses()); learn.fit_byol(4, sizes=(16,24))
    assert graphs==[(8,3,16,16),(8,3,24,24)]

def test_each_fit_captures_and_validation_does_not(graphs):
    learn = learner(added=GraphedPasses()); learn.validate(); assert graphs==[]
    learn.fit(1, 1e-3); learn.freeze(); learn.fit(1, 1e-3); learn.get_preds(); assert len(graphs)==2

def test_graphs_are_not_pickled():
    cb = GraphedPasses(); cb.passes = lambda: None; assert pickle.loads(pickle.dumps(cb)).passes is None

def test_a_failing_capture_is_said_once_and_changes_nothing(monkeypatch, graphs):
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fake_graphs([], lambda: True))
    with pytest.warns(UserWarning, match='without CUDA graphs: RuntimeError: cannot capture this$') as said: a = weights_after()
    assert len([o for o in said if 'graphs' in str(o.message)])==1 and same_sd(a, weights_after(graphed=False))

def test_why_there_are_no_graphs_is_said_once():
    with pytest.warns(UserWarning, match='not on a CUDA device') as said: learner(added=GraphedPasses()).fit(3, 1e-3)
    assert len([o for o in said if 'graphs' in str(o.message)])==1

@pytest.mark.parametrize('kw,want', [({},False), (dict(compile=True),True)])
def test_only_what_is_asked_for_is_compiled(monkeypatch, graphs, kw, want):
    seen = []
    monkeypatch.setattr(device, '_capture', lambda model, views, compiled: seen.append(compiled) or (model.targets,model.forward,None))
    class Stop(Callback):
        def after_batch(self): raise CancelFitException
    learner(added=[GraphedPasses(**kw), Stop()]).fit(4_000, 1e-3); assert seen==[want]

def test_the_parts_are_compiled_for_the_capture_only(graphs):
    learn = learner(added=GraphedPasses(compile=True)); m = learn.model; calls = []
    for part in (m.body,m.projector,m.predictor,*m.target.values()):
        part.compile = lambda dynamic, part=part: (calls.append(part), setattr(part, '_compiled_call_impl', part._call_impl))
    learn.fit(1, 1e-3); assert len(calls)==5 and all(o._compiled_call_impl is None for o in calls)

def test_without_a_compiler_graphs_remain_and_it_is_said(monkeypatch, graphs):
    tries = []
    make = fake_graphs(graphs, lambda: len(tries)<1 and not tries.append(1))
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', make)
    for part in (nn.Module,): monkeypatch.setattr(part, 'compile', lambda self, dynamic: None)
    with pytest.warns(UserWarning, match='without compilation: RuntimeError'): learner(added=GraphedPasses(compile=True)).fit(1, 1e-3)
    assert len(graphs)==1

def test_graphs_are_one_argument_away_from_off(monkeypatch):
    monkeypatch.setattr(device, '_device', lambda learn: torch.device('cuda')); learn = learner()
    assert has(learn.set_graphs(), GraphedPasses)==1==has(learn.set_graphs(compile=True), GraphedPasses)
    assert learn.graphed_passes.compile and not has(learn.set_graphs(False), GraphedPasses)

def test_on_a_cpu_there_are_no_graphs_and_compiling_says_so():
    assert not has(learner(), GraphedPasses)
    with pytest.warns(UserWarning, match='body.compile'): learner(compile=True)

# --- and on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('name', ['plain','simsiam','accumulate','clip'])
def test_20_steps_with_graphs_are_those_without_on_a_gpu(name):
    cbs = dict(accumulate=lambda: [GradientAccumulation(16)], clip=lambda: [GradientClip(1.)]).get(name, list)
    def weights(learn): return nn.utils.parameters_to_vector(trainable_params(learn.model)).detach().cpu()
    def run(graphs):
        dls = image_dls(noise(168,32)).cuda()
        learn = learner(dls=dls, model='resnet18', graphs=graphs, cbs=cbs(), opt_func=SGD, **settings.get(name, {}))
        before = weights(learn)
        with warnings.catch_warnings(): warnings.simplefilter('error', UserWarning); learn.fit(1, 1e-4)
        return before,weights(learn)
    (_,a),(start,b) = run(True),run(False)
    assert (a-b).norm()<.1*(b-start).norm() # rounding grows tenfold within ten steps
