"Weights of others: lock-step with a plain numpy ResNet in haiku's padding, with timm's loader, and with the networks that the weights are of"
from conftest import *
from fastbyol.interop import from_deepmind, from_hub, from_torch, read_data_pickle, to_hub
from copy import deepcopy
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import save_file
import json, pickle, sys, timm, torchvision, types

quick = dict(hidden_size=16, projection_size=8)
tiny = dict(layers=(2,1,1,1), channels=(4,8,8,12), stem=8, **quick)

def stir(m):
    "Give every weight and statistic of `m` a value of its own"
    with torch.no_grad(): [o.mul_(1+.1*torch.randn_like(o)).add_(.05*torch.rand_like(o)*(o.ndim==1)) for k,o in m.state_dict(keep_vars=True).items() if o.is_floating_point() and k not in ('mean','std')]
    return m.eval()

# --- DeepMind: a checkpoint drawn at random, and haiku's network written out in numpy

def draw(layers, channels, stem, bottleneck, hidden=16, proj=8, n_in=3, seed=0):
    "haiku's parameters and state of BYOL, drawn at random: {module: {name: array}} in HWIO"
    r,ps,st,x = np.random.default_rng(seed),{},{},4 if bottleneck else 1
    def conv(k, size, i, o): ps[k] = dict(w=(r.normal(size=(size,size,i,o))/np.sqrt(size*size*i)).astype('f4'))
    def norm(k, n, nd=4):
        one = (1,)*(nd-1)
        ps[k] = {o:r.uniform(.5, 1.5, (*one,n)).astype('f4') for o in ('scale','offset')}
        for o in ('mean','var'): st[f'{k}/~/{o}_ema'] = dict(counter=np.array(7,'i4'), hidden=r.uniform(5, 6, (*one,n)).astype('f4'), average=r.uniform(.2, 1, (*one,n)).astype('f4'))
    net = f"res_net{50 if bottleneck else 18}/~"
    conv(f'{net}/initial_conv', 7, n_in, stem); norm(f'{net}/initial_batchnorm', stem); n = stem
    for g,(k,c) in enumerate(zip(layers, channels)):
        for b in range(k):
            p = f'{net}/block_group_{g}/~/block_{b}/~'
            if b==0: conv(f'{p}/shortcut_conv', 1, n, c*x); norm(f'{p}/shortcut_batchnorm', c*x)
            for i,(size,a,o) in enumerate(((1,n,c),(3,c,c),(1,c,c*4)) if bottleneck else ((3,n,c),(3,c,c))): conv(f'{p}/conv_{i}', size, a, o); norm(f'{p}/batchnorm_{i}', o)
            n = c*x
    for h,i in (('projector',n),('predictor',proj)):
        for k,a,o in (('linear',i,hidden),('linear_1',hidden,proj)): ps[f'{h}/{k}'] = dict(w=r.normal(size=(a,o)).astype('f4'))
        ps[f'{h}/linear']['b'] = r.normal(size=hidden).astype('f4'); norm(f'{h}/batch_norm', hidden, 2)
    ps['classifier'] = dict(w=r.normal(size=(n,10)).astype('f4'), b=np.zeros(10,'f4'))
    return ps,st

def windows(x, k, stride, fill):
    "(n,h,w,c) -> (n,h',w',c,k,k), padded SAME: where the number of pixels added is odd, the one more comes after"
    pads = [max((-(-s//stride)-1)*stride + k - s, 0) for s in x.shape[1:3]]
    x = np.pad(x, ((0,0), *((p//2, p-p//2) for p in pads), (0,0)), constant_values=fill)
    return sliding_window_view(x, (k,k), (1,2))[:,::stride,::stride]

def haiku_forward(ps, st, x, layers, bottleneck):
    "Representation, projection and prediction in float64"
    f8 = lambda o: o.astype('f8')
    def conv(k, x, stride=1): return np.einsum('nhwckl,klco->nhwo', windows(x, ps[k]['w'].shape[0], stride, 0.), f8(ps[k]['w']), optimize=True)
    def norm(k, x):
        mean,var = (f8(st[f'{k}/~/{o}_ema']['average']) for o in ('mean','var'))
        return (x-mean)/np.sqrt(var+1e-5)*f8(ps[k]['scale']) + f8(ps[k]['offset'])
    relu,net = lambda x: np.maximum(x, 0), f"res_net{50 if bottleneck else 18}/~"
    x = windows(relu(norm(f'{net}/initial_batchnorm', conv(f'{net}/initial_conv', x, 2))), 3, 2, -np.inf).max((-1,-2))
    for g,n in enumerate(layers):
        for b in range(n):
            p,stride = f'{net}/block_group_{g}/~/block_{b}/~', 2 if g and not b else 1
            short = x if b else norm(f'{p}/shortcut_batchnorm', conv(f'{p}/shortcut_conv', x, stride))
            strides = (1,stride,1) if bottleneck else (stride,1)
            for i,s in enumerate(strides):
                x = norm(f'{p}/batchnorm_{i}', conv(f'{p}/conv_{i}', x, s))
                if i<len(strides)-1: x = relu(x)
            x = relu(x+short)
    res = [x.mean((1,2))]
    for h in ('projector','predictor'):
        y = relu(norm(f'{h}/batch_norm', res[-1]@f8(ps[f'{h}/linear']['w']) + f8(ps[f'{h}/linear']['b'])))
        res.append(y@f8(ps[f'{h}/linear_1']['w']))
    return res

def state_of(on, ta, **kw): return {**dict(online_params=on[0], target_params=ta[0], online_state=on[1], target_state=ta[1], opt_state=None), **kw}
def write(f, st, protocol=2, **kw): f.write_bytes(pickle.dumps(dict(experiment_state=st, step=7, rng=np.array([0,5],'u4'), **kw), protocol=protocol)); return f

shapes = [dict(layers=(2,1,1,1), channels=(4,8,8,12), stem=8, bottleneck=True), dict(layers=(1,2,1,1), channels=(8,8,16,16), stem=8, bottleneck=False), dict(layers=(1,1,1,2), channels=(4,4,8,8), stem=16, bottleneck=True, n_in=1)]

@pytest.mark.parametrize('size', [64,65,97])
@pytest.mark.parametrize('kw', shapes, ids=['bottleneck','basic','wide-stem-grey'])
def test_deepmind_features_are_those_of_haiku(kw, size, tmp_path):
    on,ta = draw(**kw, seed=1),draw(**kw, seed=2); m = from_deepmind(write(tmp_path/'p.pkl', state_of(on, ta)))
    x = np.random.default_rng(0).normal(size=(2,size,size,kw.get('n_in',3))); t = torch.tensor(x, dtype=torch.float32).permute(0,3,1,2)
    y,z,q = haiku_forward(*on, x, kw['layers'], kw['bottleneck'])
    with torch.no_grad():
        for got,want in ((m.embed(t),y),(m.project(t),z),(m(t,t)[:,0],q),(m.targets(t,t)[:,0], haiku_forward(*ta, x, kw['layers'], kw['bottleneck'])[1])):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4*np.abs(want).max())
    assert not m.training and not any(p.requires_grad for p in m.target.parameters())

def test_deepmind_resnet50_takes_the_weights_of_timms_and_differs_only_in_padding():
    ours,usual = timm.create_model('haiku_resnet', num_classes=0),timm.create_model('resnet50', num_classes=0)
    usual.load_state_dict(stir(ours).state_dict()); usual.eval()
    x = torch.randn(1,3,65,65)
    with torch.no_grad(): torch.testing.assert_close(ours(x), usual(x)); assert (ours(x[...,:64,:64])-usual(x[...,:64,:64])).norm()>.01*ours(x).norm()

@pytest.fixture
def ckpt(tmp_path):
    kw = shapes[0]; return write(tmp_path/'p.pkl', state_of(draw(**kw, seed=1), draw(**kw, seed=2)))

def test_what_came_from_deepmind_is_a_source_for_everything(ckpt, tmp_path):
    m = from_deepmind(ckpt); x = torch.rand(2,3,64,64); f = save_body(m, tmp_path/'b')
    with torch.no_grad():
        body,meta = load_body(f); assert torch.equal(pool_features(body(x)), m.embed(x)) and meta['arch']=='haiku_resnet'
        assert torch.equal(to_timm(m).eval()(x), m.embed(x))
    dls = image_dls(noise(12,64), n_val=4, bs=4, y=[i%2 for i in range(12)])
    c = hush(byol_vision_learner(dls, f, n_out=2, loss_func=CrossEntropyLossFlat())); c.fine_tune(1)
    learn = byol_learn(image_dls(noise(12,64), n_val=4, bs=4), m); learn.fit(1, 1e-3)
    with pytest.raises(ValueError, match='save_body'): to_hub(m, f"local-dir:{tmp_path/'hub'}")
    assert not (tmp_path/'hub').exists()

class FlatMapping(dict):
    def __reduce__(self): return FlatMapping,(dict(self),)

@pytest.mark.parametrize('protocol', [2,4,5])
def test_deepmind_pickles_with_haikus_and_dills_names(protocol, tmp_path, monkeypatch):
    "Written under the names that haiku, dill and jax give, none of which is imported to read them"
    kw = shapes[0]; on,ta = draw(**kw, seed=1),draw(**kw, seed=2)
    names = {'haiku._src.data_structures':dict(FlatMapping=FlatMapping), 'jax._src.array':dict(_reconstruct_array=lambda *a: None),
             'dill._dill':dict(_create_namedtuple=lambda *a: None, _create_array=lambda *a: None), 'optax._src.base':dict(EmptyState=namedtuple('EmptyState', []))}
    for mod,objs in names.items():
        for i in range(mod.count('.')+1): monkeypatch.setitem(sys.modules, '.'.join(mod.split('.')[:i+1]), types.ModuleType(mod.rsplit('.', mod.count('.')-i)[0]))
        for k,o in objs.items(): o.__module__,o.__qualname__,o.__name__ = mod,k,k; setattr(sys.modules[mod], k, o)
    class As:
        def __init__(self, f, *args): self.r = (f,args)
        def __reduce__(self): return self.r
    dill,jax = names['dill._dill'],names['jax._src.array']['_reconstruct_array']
    array = lambda a: As(dill['_create_array'], *a.__reduce__()[:2], a.__reduce__()[2], None)
    jaxed = lambda a: As(jax, *a.__reduce__(), dict(weak_type=False))
    flat = lambda o, f: FlatMapping({k:FlatMapping({n:f(a) for n,a in d.items()}) for k,d in o.items()})
    class State(dict): # a namedtuple whose class dill makes when it is read
        def __reduce__(self): return As(dill['_create_namedtuple'], '_ByolExperimentState', tuple(self), 'byol.byol_experiment'),tuple(self.values())
    class Pickler(pickle._Pickler): # the class itself comes from a call
        def save_reduce(self, func, args, *rest, **kw):
            if isinstance(func, As): self.save(func); self.save(args); self.write(pickle.REDUCE)
            else: super().save_reduce(func, args, *rest, **kw)
    st = State(state_of(*((flat(p,f),flat(s,f)) for (p,s),f in ((on,array),(ta,jaxed))), opt_state=(names['optax._src.base']['EmptyState'](),)))
    with (tmp_path/'p.pkl').open('wb') as f: Pickler(f, protocol).dump(dict(experiment_state=st, step=7))
    for mod in names: monkeypatch.delitem(sys.modules, mod)
    got,want = from_deepmind(tmp_path/'p.pkl'),from_deepmind(write(tmp_path/'q.pkl', state_of(on, ta)))
    assert same_sd(got.state_dict(), want.state_dict())

class Evil:
    def __init__(self, f, *args): self.r = (f,args)
    def __reduce__(self): return self.r

@pytest.mark.parametrize('o,name', [
    (Evil(os.system, 'touch {}'), 'posix.system|nt.system'), (Evil(eval, 'open("{}","w")'), 'builtin'), (Evil(exec, 'open("{}","w")'), 'builtin'), (Evil(getattr, os, 'system'), 'getattr'),
    (Path('x'), 'pathlib'), (torch.zeros(2), 'torch'), (np.array([Path('x')], dtype=object), "pathlib|'O"), (np.array([None,1], dtype=object), "'O"), (np.array(['a']), "'U")], ids=lambda o: type(o).__name__)
def test_a_pickle_may_name_arrays_and_nothing_else(o, name, tmp_path):
    f,made = tmp_path/'p.pkl',tmp_path/'made'
    if isinstance(o, Evil): o = Evil(o.r[0], *(str(a).format(made) if isinstance(a, str) else 1 for a in o.r[1]))
    for protocol in (2,4):
        f.write_bytes(pickle.dumps(dict(experiment_state=o), protocol=protocol))
        with pytest.raises(ValueError, match=name): read_data_pickle(f)
        with pytest.raises(ValueError, match='nothing in it was run'): from_deepmind(f)
    assert not made.exists()

@pytest.mark.parametrize('raw', [b'', b'nonsense', b'cos\nsystem\n(S"true"\ntR.', b'\x80\x02}b.', b'\x80\x02cnumpy\nndarray\nq\x00}b.', b'\x80\x04Pspam\n.', b'\x80\x02\x82\x01.', b'\x80\x02]q\x00(K\x01e.'])
def test_broken_and_foreign_pickles_are_refused(raw, tmp_path):
    (tmp_path/'p.pkl').write_bytes(raw)
    with pytest.raises(ValueError, match='p.pkl'): from_deepmind(tmp_path/'p.pkl')

def test_a_truncated_or_damaged_checkpoint_is_refused_or_has_other_numbers(ckpt):
    b,r = ckpt.read_bytes(),random.Random(0)
    for i in range(10):
        ckpt.write_bytes(b[:len(b)*i//10])
        with pytest.raises(ValueError, match='p.pkl'): from_deepmind(ckpt)
    keys = from_deepmind(Path(write(ckpt, pickle.loads(b)['experiment_state']))).state_dict().keys()
    for i in range(60):
        c = bytearray(b); c[r.randrange(len(b))] ^= r.randrange(1, 256); ckpt.write_bytes(c)
        try: m = from_deepmind(ckpt)
        except ValueError: continue
        assert m.state_dict().keys()==keys

@pytest.mark.parametrize('change,msg', [
    (lambda p,s: p.pop('res_net50/~/block_group_3/~/block_0/~/conv_2'), 'missing, first body.model.layer4.0.conv3.weight'),
    (lambda p,s: s.pop('projector/batch_norm/~/var_ema'), 'missing, first projector.1.running_var'),
    (lambda p,s: p.pop('projector/linear'), 'lacks 1 .*projector.0.weight'),
    (lambda p,s: p.update({'res_net50/~/final_batchnorm':{}}), 'final_batchnorm'),
    (lambda p,s: p['projector/linear'].update(g=np.zeros(1)), 'projector/linear/g'),
    (lambda p,s: p['predictor/linear'].update(b=np.zeros(3,'f4')), r'\(3,\) instead of \(16,\)'),
    (lambda p,s: p['projector/linear'].update(b=3), 'no array'),
    (lambda p,s: s.update({'projector/batch_norm/~/var_ema':dict(hidden=np.zeros(1))}), 'average')])
def test_what_does_not_fit_is_named(change, msg, tmp_path):
    kw = shapes[0]; on,ta = draw(**kw, seed=1),draw(**kw, seed=2); change(*on)
    with pytest.raises(ValueError, match=msg): from_deepmind(write(tmp_path/'p.pkl', state_of(on, ta)))

def test_other_checkpoints_of_deepmind_are_named(tmp_path):
    with pytest.raises(ValueError, match='online_params'): from_deepmind(write(tmp_path/'p.pkl', dict(backbone_params={}, backbone_state={})))
    with pytest.raises(FileNotFoundError): from_deepmind(tmp_path/'q.pkl')
    with pytest.raises(ValueError, match='from_deepmind'): BYOL('haiku_resnet', pretrained=True, **tiny)

# --- the Hub

@pytest.mark.parametrize('arch,kw', [('resnet18',{}), ('resnet18',dict(n_in=1,stats=((.1,),(.2,)))), ('vit_tiny_patch16_224',dict(img_size=32,n_in=4)), ('mobilenetv3_small_100',dict(stats=([.1]*3,[.2]*3)))])
def test_a_folder_brings_back_body_statistics_and_channels(arch, kw, tmp_path):
    m = stir(BYOL(arch, **quick, **kw)); name = to_hub(m, f"local-dir:{tmp_path/'m'}"); n = kw.get('n_in',3); x = torch.rand(2,n,32,32)
    assert sorted(o.name for o in (tmp_path/'m').iterdir())==['config.json','model.safetensors']
    t = timm.create_model(name, pretrained=True, num_classes=0).eval() # without us
    with torch.no_grad(): torch.testing.assert_close(t.forward_features(x), m.body.model.forward_features(x))
    np.testing.assert_allclose((t.pretrained_cfg['mean'],t.pretrained_cfg['std']), m.stats, rtol=1e-6)
    assert t.pretrained_cfg['input_size'][0]==n
    back = from_hub(name, **quick); assert same_sd(back.body.state_dict(), m.body.state_dict()) and back.spec.arch==arch and back.spec.n_in==n and not back.training
    np.testing.assert_allclose(back.stats, m.stats, rtol=1e-6); assert same_sd(back.target['body'].state_dict(), m.body.state_dict())
    assert save_body(back, tmp_path/'b').exists() and load_body(tmp_path/'b')[1]['arch']==arch # without the folder
    cfg = json.loads((tmp_path/'m/config.json').read_text()); assert not {'license','tag','hf_hub_id','url'}&set(cfg['pretrained_cfg'])

@pytest.mark.parametrize('arch,kw', [('test_vit3',dict(global_pool='avg')), ('resnet18',dict(global_pool='max')), ('test_vit',{}), ('resnet18',{})])
def test_the_kind_of_pooling_comes_back(arch, kw, tmp_path):
    "timm's own transformers pool by attention, average or a token, and have other weights for each"
    m = stir(BYOL(arch, **quick, **kw)).eval(); back = from_hub(to_hub(m, f"local-dir:{tmp_path/'m'}"), **quick); x = torch.rand(2,3,160,160)
    with torch.no_grad(): torch.testing.assert_close(back.embed(x), m.embed(x))
    assert same_sd(load_body(save_body(back, tmp_path/'b'))[0].state_dict(), m.body.state_dict())

def test_what_timm_publishes_its_own_weights_with_is_not_passed_on(tmp_path):
    to_hub(BYOL('resnet18.a1_in1k', **quick), f"local-dir:{tmp_path/'m'}"); cfg = json.loads((tmp_path/'m/config.json').read_text())
    assert cfg['architecture']=='resnet18' and 'a1_in1k' not in json.dumps(cfg) and 'apache' not in json.dumps(cfg)

class Api:
    "What `timm` calls of `huggingface_hub.HfApi`"
    calls = []
    def __init__(self, **kw): pass
    def create_repo(self, repo_id, **kw): self.calls.append(kw); return types.SimpleNamespace(repo_id=repo_id)
    def file_exists(self, **kw): return False
    def upload_folder(self, repo_id, folder_path, **kw): self.calls.append(dict(kw, repo_id=repo_id, files={o.name:o.read_bytes() for o in Path(folder_path).iterdir()}))

def test_a_push_uploads_what_a_folder_holds_and_a_card(tmp_path, monkeypatch):
    import timm.models._hub as hub
    monkeypatch.setattr(hub, 'HfApi', Api); Api.calls.clear(); m = stir(BYOL('resnet18', n_in=1, **quick))
    assert to_hub(m, 'hf-hub:me/mine', license='mit', private=True, commit_message='hello')=='hf-hub:me/mine'
    made,up = Api.calls; assert made['private'] and up['repo_id']=='me/mine' and up['commit_message']=='hello'
    assert set(up['files'])=={'README.md','config.json','model.safetensors'}
    card = up['files']['README.md'].decode(); assert 'license: mit' in card and "timm.create_model('hf-hub:me/mine'" in card and 'apache' not in card
    assert 'features = net(x) #' in card
    to_hub(m, f"local-dir:{tmp_path/'m'}"); assert all((tmp_path/'m'/k).read_bytes()==up['files'][k] for k in ('config.json','model.safetensors'))

def test_a_card_says_what_gives_the_representation(monkeypatch):
    import timm.models._hub as hub
    monkeypatch.setattr(hub, 'HfApi', Api); Api.calls.clear()
    with pytest.warns(UserWarning, match='forward_features'): to_hub(stir(BYOL('mobilenetv3_small_050', **quick)), 'hf-hub:me/mine')
    assert 'features = net.forward_features(x).mean((2, 3)) #' in Api.calls[1]['files']['README.md'].decode()

@pytest.mark.parametrize('make,exc', [(lambda: BYOL('resnet18', small_stem=True, **quick), ValueError), (lambda: BYOL(resnet18, **quick), TypeError), (small_byol, TypeError), (lambda: BYOL('haiku_resnet', **tiny), ValueError)], ids=['small_stem','torchvision','own','haiku'])
def test_what_timm_could_not_rebuild_is_not_shared(make, exc, tmp_path):
    with pytest.raises(exc, match='save_body'): to_hub(make(), f"local-dir:{tmp_path/'m'}")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', ['resnet18','me/mine','hf-hub:','local-dir:'])
def test_a_name_needs_its_kind(name):
    for f in (from_hub, lambda n: to_hub(small_byol(), n)):
        with pytest.raises(ValueError, match='hf-hub:user/model'): f(name)

def test_damaged_folders_are_refused(tmp_path):
    name = to_hub(BYOL('resnet18', **quick), f"local-dir:{tmp_path/'m'}"); f = tmp_path/'m/model.safetensors'; b = f.read_bytes()
    for cut in (0, 4, len(b)//2):
        f.write_bytes(b[:cut])
        with pytest.raises(ValueError, match='cannot be loaded'): from_hub(name)
    save_file({'conv1.weight':torch.zeros(64,3,7,7)}, f)
    with pytest.raises(ValueError, match='Missing key'): from_hub(name)
    (tmp_path/'m/config.json').write_text('{')
    with pytest.raises(ValueError, match='cannot be loaded'): from_hub(name)
    with pytest.raises(TypeError, match='private'): to_hub(BYOL('resnet18', **quick), name, private=True)

# --- torch

class Learner_(nn.Module):
    "The names of byol-pytorch's learner, with a target that differs"
    def __init__(self, net, target): super().__init__(); self.net = net; self.online_encoder,self.target_encoder = (nn.ModuleDict(dict(net=o, projector=nn.Linear(512,8))) for o in (net,target))

def net18(**kw): return stir(torchvision.models.resnet18(**kw))
def features(net, x):
    with torch.no_grad(): return nn.Sequential(*list(net.children())[:-1])(x).flatten(1)
def named(p, net): return {f'{p}{k}':v for k,v in net.state_dict().items()}
def seq(net, *more): return nn.Sequential(*list(net.children())[:-2], *more)
heads = {f'{p}.{k}':torch.zeros(2) for p in ('projector','momentum_projector','predictor','classifier','projection_head.layers') for k in ('0.weight','3.bias')}

files = dict(byol_pytorch=lambda a,b: Learner_(a, b).state_dict(),
    lightly=lambda a,b: {**named('backbone.', seq(a)), **named('backbone_momentum.', seq(b)), **heads},
    solo_learn=lambda a,b: dict(epoch=3, state_dict={**named('backbone.', a), **named('momentum_backbone.', b), **heads}, optimizer_states=[{}]),
    self_supervised=lambda a,b: dict(model={**named('encoder.', seq(a, AdaptiveConcatPool2d(), nn.Flatten())), **heads}, opt=dict(state=[], hypers=[dict(lr=1.)])),
    ddp=lambda a,b: {**named('module.student.backbone.', a), **named('module.teacher.backbone.', b)}, bare=lambda a,b: a.state_dict())

@pytest.mark.parametrize('kind,arch', [*((k,'resnet18') for k in files), *((k,resnet18) for k in ('solo_learn','lightly')), *((k,'own') for k in ('byol_pytorch','self_supervised'))], ids=lambda o: getattr(o,'__name__',o)+'_'*callable(o))
def test_from_torch_finds_the_bodies_of_every_library(kind, arch, tmp_path):
    a,b,x = net18(),net18(),torch.rand(2,3,64,64); torch.save(files[kind](a, b), tmp_path/'f.pt'); own = arch=='own'
    if own and kind in ('lightly','self_supervised'): arch,kw = seq(resnet18()),{}
    else: arch,kw = (resnet18(),dict(layer='avgpool')) if own else (arch,{})
    m = from_torch(tmp_path/'f.pt', arch, **quick, **kw); has = kind not in ('self_supervised','bare'); assert not m.training
    with torch.no_grad(): torch.testing.assert_close(m.embed(x), features(a, x)); torch.testing.assert_close(m.embed(x, target=True), features(b if has else a, x))
    if own: return
    if has:
        m = from_torch(tmp_path/'f.pt', arch, target=True, **quick)
        with torch.no_grad(): torch.testing.assert_close(m.embed(x), features(b, x)); torch.testing.assert_close(m.embed(x, target=True), features(b, x))
    else:
        with pytest.raises(ValueError, match='prefix'): from_torch(tmp_path/'f.pt', arch, target=True, **quick)

def test_from_torch_reads_safetensors_half_precision_other_archs_and_what_we_train(tmp_path):
    x = torch.rand(2,3,64,64); save_file({k:v.half() if v.is_floating_point() else v for k,v in net18().state_dict().items()}, tmp_path/'f.safetensors')
    assert from_torch(tmp_path/'f.safetensors', 'resnet18', **quick).body.model.conv1.weight.dtype==torch.float32
    t = stir(timm.create_model('convnext_atto', num_classes=7)); m = from_torch({'backbone.'+k:v for k,v in t.state_dict().items()}, 'convnext_atto', **quick)
    with torch.no_grad(): torch.testing.assert_close(m.body(x), t.forward_features(x))
    v = stir(xresnet18()); m = from_torch(named('m.', v), xresnet18, **quick)
    with torch.no_grad(): torch.testing.assert_close(m.body(x), nn.Sequential(*list(v.children())[:-4])(x))
    ours = stir(BYOL('resnet18', small_stem=True, n_in=1, **quick)); m = from_torch(ours.state_dict(), 'resnet18', n_in=1, small_stem=True, **quick)
    assert same_sd(m.body.state_dict(), ours.body.state_dict()) and same_sd(m.target['body'].state_dict(), ours.target['body'].state_dict())

@pytest.mark.parametrize('change,msg', [
    (lambda s: s.pop('layer3.1.bn2.weight'), 'missing, first model.layer3.1.bn2.weight'), (lambda s: s.update(extra=torch.zeros(1)), '1 unexpected, first extra'),
    (lambda s: s.update(conv1=s.pop('conv1.weight')), 'missing, first model.conv1.weight; 1 unexpected, first conv1'), (lambda s: s.update({'conv1.weight':torch.zeros(64,1,7,7)}), r'\(64, 1, 7, 7\) instead of'),
    (lambda s: s.clear(), 'no weight by the name'), (lambda s: [s.update({'x.'+k:s.pop(k)+1}) for k in list(s)] and s.update(named('y.', net18())), "several.*'x.', 'y.'")])
def test_from_torch_names_what_does_not_fit(change, msg):
    sd = dict(net18().state_dict()); change(sd)
    with pytest.raises(ValueError, match=msg): from_torch(sd, 'resnet18', **quick)

def test_from_torch_takes_the_prefix_that_is_asked_for():
    a,b,x = net18(),net18(),torch.rand(2,3,64,64); sd = {**named('x.', a), **named('y.z.', b)}
    for p,net in (('x',a),('y.z.',b)):
        with torch.no_grad(): torch.testing.assert_close(from_torch(sd, 'resnet18', prefix=p, **quick).embed(x), features(net, x))
    with pytest.raises(ValueError, match="'x.', 'y.z.'"): from_torch(sd, 'resnet18', prefix='y', **quick)
    with pytest.raises(ValueError, match='target=True'): from_torch(named('target.', a), 'resnet18', **quick)

def test_from_torch_does_not_run_what_is_in_a_file(tmp_path):
    f,made = tmp_path/'f.pt',tmp_path/'made'
    torch.save(dict(state_dict=net18().state_dict(), hparams=Evil(os.system, f'touch {made}')), f)
    with pytest.raises(ValueError, match='could run code.*weights.pth'): from_torch(f, 'resnet18', **quick)
    assert not made.exists()
    for raw in (b'', b'nonsense', b'PK\3\4'):
        f.write_bytes(raw)
        with pytest.raises(ValueError, match='f.pt'): from_torch(f, 'resnet18', **quick)
    torch.save(torch.zeros(1), f)
    with pytest.raises(ValueError, match='a state dict is needed'): from_torch(f, 'resnet18', **quick)
    with pytest.raises(FileNotFoundError): from_torch(tmp_path/'g.pt', 'resnet18', **quick)

def test_the_pad_of_solo_learns_cifar_stem_is_another():
    "Why the docs say to pass solo-learn's own network"
    net = net18(); net.conv1,net.maxpool,net.fc = nn.Conv2d(3,64,3,1,2,bias=False),nn.Identity(),nn.Identity(); x = torch.rand(2,3,32,32)
    ours,m = from_torch(named('backbone.', net), 'resnet18', small_stem=True, **quick),from_torch(named('backbone.', net), deepcopy(net), **quick)
    with torch.no_grad(): torch.testing.assert_close(m.embed(x), net(x)); assert (ours.embed(x)-net(x)).norm()>.01*net(x).norm()
