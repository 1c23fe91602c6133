"Weights of others: in step with a plain numpy ResNet in haiku's padding, timm's loader and the networks themselves"
from conftest import *
from fastbyol.interop import from_deepmind, from_hub, from_torch, to_hub
from copy import deepcopy
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import save_file
import json, pickle, sys, timm, torchvision, types

quick = dict(hidden_size=16, projection_size=8)
tiny = dict(layers=(2,1,1,1), channels=(4,8,8,12), stem=8, **quick)

def stir(m):
    "Change every weight and statistic of `m`"
    with torch.no_grad():
        for k,o in m.state_dict(keep_vars=True).items():
            if not o.is_floating_point() or k in ('mean','std'): continue
            o.mul_(1+.1*torch.randn_like(o))
            if o.ndim==1: o.add_(.05*torch.rand_like(o))
    return m.eval()

# --- DeepMind: a checkpoint drawn at random, and haiku's network written out in numpy

class HaikuNet:
    "haiku's parameters and state of BYOL, drawn at random: {module: {name: array}} in HWIO; and its forward pass"
    def __init__(self, layers, channels, stem, hidden=16, proj=8, n_in=3, seed=0):
        self.rng,self.params,self.state = np.random.default_rng(seed),{},{}
        self.layers = layers
        self.net = net = 'res_net50/~'
        self.conv(f'{net}/initial_conv', 7, n_in, stem)
        self.norm(f'{net}/initial_batchnorm', stem)
        n = stem
        for g,(k,c) in enumerate(zip(layers, channels)):
            for b in range(k):
                p = f'{net}/block_group_{g}/~/block_{b}/~'
                if b==0:
                    self.conv(f'{p}/shortcut_conv', 1, n, c*4)
                    self.norm(f'{p}/shortcut_batchnorm', c*4)
                for i,(size,a,o) in enumerate([(1,n,c),(3,c,c),(1,c,c*4)]):
                    self.conv(f'{p}/conv_{i}', size, a, o)
                    self.norm(f'{p}/batchnorm_{i}', o)
                n = c*4
        for head,i in (('projector',n),('predictor',proj)):
            for k,a,o in (('linear',i,hidden),('linear_1',hidden,proj)):
                self.params[f'{head}/{k}'] = dict(w=self.rng.normal(size=(a,o)).astype('f4'))
            self.params[f'{head}/linear']['b'] = self.rng.normal(size=hidden).astype('f4')
            self.norm(f'{head}/batch_norm', hidden, 2)
        self.params['classifier'] = dict(w=np.zeros((n,10),'f4'), b=np.zeros(10,'f4'))

    def conv(self, k, size, i, o):
        self.params[k] = dict(w=(self.rng.normal(size=(size,size,i,o))/np.sqrt(size*size*i)).astype('f4'))

    def norm(self, k, n, ndim=4):
        shape = (1,)*(ndim-1)+(n,)
        def draw(lo, hi): return self.rng.uniform(lo, hi, shape).astype('f4')
        self.params[k] = {o:draw(.5, 1.5) for o in ('scale','offset')}
        for o in ('mean','var'):
            self.state[f'{k}/~/{o}_ema'] = dict(counter=np.array(7,'i4'), hidden=draw(5, 6), average=draw(.2, 1))

    def run_conv(self, k, x, stride=1):
        w = self.params[k]['w'].astype('f8')
        return np.einsum('nhwckl,klco->nhwo', windows(x, len(w), stride, 0.), w, optimize=True)

    def run_norm(self, k, x):
        mean,var = (self.state[f'{k}/~/{o}_ema']['average'].astype('f8') for o in ('mean','var'))
        return (x-mean)/np.sqrt(var+1e-5)*self.params[k]['scale'] + self.params[k]['offset']

    def block(self, p, x, stride, first_block):
        short = x
        if first_block: short = self.run_norm(f'{p}/shortcut_batchnorm', self.run_conv(f'{p}/shortcut_conv', x, stride))
        for i,s in enumerate([1,stride,1]):
            x = self.run_norm(f'{p}/batchnorm_{i}', self.run_conv(f'{p}/conv_{i}', x, s))
            if i<2: x = relu(x)
        return relu(x+short)

    def __call__(self, x):
        "Representation, projection and prediction in float64"
        x = relu(self.run_norm(f'{self.net}/initial_batchnorm', self.run_conv(f'{self.net}/initial_conv', x, 2)))
        x = windows(x, 3, 2, -np.inf).max((-1,-2))
        for g,n in enumerate(self.layers):
            for b in range(n):
                stride = 2 if g and not b else 1
                x = self.block(f'{self.net}/block_group_{g}/~/block_{b}/~', x, stride, b==0)
        res = [x.mean((1,2))]
        for head in ('projector','predictor'):
            linear = self.params[f'{head}/linear']
            y = relu(self.run_norm(f'{head}/batch_norm', res[-1]@linear['w'].astype('f8') + linear['b']))
            res.append(y@self.params[f'{head}/linear_1']['w'].astype('f8'))
        return res

def relu(x): return np.maximum(x, 0)

def windows(x, k, stride, fill):
    "(n,h,w,c) -> (n,h',w',c,k,k), padded SAME: where the number of pixels added is odd, the one more comes after"
    pads = [max((-(-s//stride)-1)*stride + k - s, 0) for s in x.shape[1:3]]
    x = np.pad(x, ((0,0), *((p//2, p-p//2) for p in pads), (0,0)), constant_values=fill)
    return sliding_window_view(x, (k,k), (1,2))[:,::stride,::stride]

def state_of(online, target, **kw):
    return dict(online_params=online.params, target_params=target.params, online_state=online.state,
                target_state=target.state, opt_state=None, **kw)

def write(f, state, protocol=2):
    o = dict(experiment_state=state, step=7, rng=np.array([0,5],'u4'))
    f.write_bytes(pickle.dumps(o, protocol=protocol))
    return f

shapes = dict(usual=dict(layers=(2,1,1,1), channels=(4,8,8,12), stem=8),
    wide_stem_grey=dict(layers=(1,1,1,2), channels=(4,4,8,8), stem=16, n_in=1))

def pair(kind='usual'): return HaikuNet(**shapes[kind], seed=1),HaikuNet(**shapes[kind], seed=2)

def widths(kind='usual'): return dict(**shapes[kind], **quick)

@pytest.fixture
def ckpt(tmp_path): return write(tmp_path/'p.pkl', state_of(*pair()))

kinds = [('usual',64), ('usual',65), ('wide_stem_grey',64)]
@pytest.mark.parametrize('kind,size', kinds)
def test_deepmind_features_are_those_of_haiku(kind, size, tmp_path):
    online,target = pair(kind)
    m = from_deepmind(write(tmp_path/'p.pkl', state_of(online, target)), **widths(kind))
    x = np.random.default_rng(0).normal(size=(2,size,size,shapes[kind].get('n_in',3)))
    t = torch.tensor(x, dtype=torch.float32).permute(0,3,1,2)
    y,z,q = online(x)
    with torch.no_grad(): got = m.embed(t),m.project(t),m(t,t)[:,0],m.targets(t,t)[:,0]
    for a,want in zip(got, (y, z, q, target(x)[1])):
        np.testing.assert_allclose(a, want, rtol=1e-4, atol=1e-4*np.abs(want).max())

def test_a_model_from_deepmind_is_in_evaluation_mode_and_its_target_frozen(ckpt):
    m = from_deepmind(ckpt, **widths())
    assert not m.training and not any(p.requires_grad for p in m.target.parameters())

def test_deepmind_resnet50_takes_the_weights_of_timms_and_differs_only_in_padding():
    ours,usual = (timm.create_model(o, num_classes=0) for o in ('haiku_resnet','resnet50'))
    usual.load_state_dict(stir(ours).state_dict())
    usual.eval()
    x = torch.randn(1,3,65,65)
    even = x[...,:64,:64]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), usual(x))
        assert (ours(even)-usual(even)).norm()>.01*ours(x).norm()

def test_what_came_from_deepmind_can_be_saved_and_given_to_timm(ckpt, tmp_path):
    m,x = from_deepmind(ckpt, **widths()),torch.rand(2,3,64,64)
    body,meta = load_body(save_body(m, tmp_path/'b'))
    assert meta['arch']=='haiku_resnet'
    with torch.no_grad():
        assert torch.equal(pool_features(body(x)), m.embed(x))
        assert torch.equal(to_timm(m).eval()(x), m.embed(x))

def test_what_came_from_deepmind_can_be_fine_tuned_and_pretrained(ckpt):
    m = from_deepmind(ckpt, **widths())
    dls = image_dls(noise(12,64), n_val=4, bs=4, y=[i%2 for i in range(12)])
    hush(byol_vision_learner(dls, m, n_out=2, loss_func=CrossEntropyLossFlat())).fit(1)
    byol_learn(image_dls(noise(12,64), n_val=4, bs=4), m).fit(1, 1e-3)

class FlatMapping(dict):
    def __reduce__(self): return FlatMapping,(dict(self),)

class As:
    "Pickles as a call of `f`"
    def __init__(self, f, *args): self.r = f,args
    def __reduce__(self): return self.r

class State(dict):
    "A namedtuple whose class dill makes when it is read"
    def __reduce__(self):
        make = sys.modules['dill._dill']._create_namedtuple
        return As(make, '_ByolExperimentState', tuple(self), 'byol.byol_experiment'),tuple(self.values())

class Pickler(pickle._Pickler):
    "Writes a class that comes from a call"
    def save_reduce(self, func, args, *rest, **kw):
        if not isinstance(func, As): return super().save_reduce(func, args, *rest, **kw)
        self.save(func)
        self.save(args)
        self.write(pickle.REDUCE)

def fake_modules(monkeypatch):
    "Modules by the names that haiku, dill, jax and optax have in pickles"
    names = {'haiku._src.data_structures':dict(FlatMapping=FlatMapping),
        'jax._src.array':dict(_reconstruct_array=lambda *a: None),
        'dill._dill':dict(_create_namedtuple=lambda *a: None, _create_array=lambda *a: None),
        'optax._src.base':dict(EmptyState=namedtuple('EmptyState', []))}
    for module,objects in names.items():
        parts = module.split('.')
        for i in range(len(parts)):
            name = '.'.join(parts[:i+1])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for k,o in objects.items():
            o.__module__,o.__qualname__,o.__name__ = module,k,k
            setattr(sys.modules[module], k, o)
    return names

@pytest.mark.parametrize('protocol', [2,5])
def test_deepmind_pickles_with_haikus_and_dills_names(protocol, tmp_path, monkeypatch):
    "Written under the names that haiku, dill and jax give, none of which is imported to read them"
    online,target = pair()
    want = from_deepmind(write(tmp_path/'q.pkl', state_of(online, target)), **widths())
    names = fake_modules(monkeypatch)
    def array(a): return As(names['dill._dill']['_create_array'], *a.__reduce__()[:2], a.__reduce__()[2], None)
    def jaxed(a): return As(names['jax._src.array']['_reconstruct_array'], *a.__reduce__(), dict(weak_type=False))
    for net,f in ((online,array),(target,jaxed)):
        for o in ('params','state'):
            flat = {k:FlatMapping({n:f(a) for n,a in d.items()}) for k,d in getattr(net, o).items()}
            setattr(net, o, FlatMapping(flat))
    state = State({**state_of(online, target), 'opt_state':(names['optax._src.base']['EmptyState'](),)})
    with (tmp_path/'p.pkl').open('wb') as f: Pickler(f, protocol).dump(dict(experiment_state=state, step=7))
    for module in names: monkeypatch.delitem(sys.modules, module)
    assert same_sd(from_deepmind(tmp_path/'p.pkl', **widths()).state_dict(), want.state_dict())

@pytest.mark.parametrize('protocol', [2,4])
@pytest.mark.parametrize('o,name', [(As(os.system, 'touch {}'), 'posix.system|nt.system'),
    (As(eval, 'open("{}","w")'), 'builtin'), (As(exec, 'open("{}","w")'), 'builtin'),
    (As(getattr, os, 'system'), 'getattr'), (Path('x'), 'pathlib'), (torch.zeros(2), 'torch'),
    (np.array([Path('x')], dtype=object), "pathlib|'O"),
    (np.array([None,1], dtype=object), "'O"), (np.array(['a']), "'U")], ids=lambda o: type(o).__name__)
def test_a_pickle_may_name_arrays_and_nothing_else(o, name, protocol, tmp_path):
    f,made = tmp_path/'p.pkl',tmp_path/'made'
    if isinstance(o, As): o = As(o.r[0], *(a.format(made) if isinstance(a, str) else 1 for a in o.r[1]))
    f.write_bytes(pickle.dumps(dict(experiment_state=o), protocol=protocol))
    with pytest.raises(ValueError, match=f'nothing in it was run.*({name})'): from_deepmind(f)
    assert not made.exists()

@pytest.mark.parametrize('raw', [b'', b'nonsense', b'cos\nsystem\n(S"true"\ntR.', b'\x80\x02}b.', b'\x80\x04Pspam\n.',
    b'\x80\x02cnumpy\nndarray\nq\x00}b.', b'\x80\x02\x82\x01.', b'\x80\x02]q\x00(K\x01e.'])
def test_broken_and_foreign_pickles_are_refused(raw, tmp_path):
    (tmp_path/'p.pkl').write_bytes(raw)
    with pytest.raises(ValueError, match='p.pkl'): from_deepmind(tmp_path/'p.pkl')

def test_a_truncated_checkpoint_is_refused(ckpt):
    raw = ckpt.read_bytes()
    for i in range(10):
        ckpt.write_bytes(raw[:len(raw)*i//10])
        with pytest.raises(ValueError, match='p.pkl'): from_deepmind(ckpt, **widths())

def test_a_damaged_checkpoint_is_refused_or_has_other_numbers(ckpt):
    raw,rng = ckpt.read_bytes(),random.Random(0)
    keys = from_deepmind(ckpt, **widths()).state_dict().keys()
    for i in range(25):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        ckpt.write_bytes(damaged)
        try: m = from_deepmind(ckpt, **widths())
        except ValueError: continue
        assert m.state_dict().keys()==keys

@pytest.mark.parametrize('change,msg', [
    (lambda p,s: p.pop('res_net50/~/block_group_3/~/block_0/~/conv_2'), 'first body.model.layer4.0.conv3.weight'),
    (lambda p,s: s.pop('projector/batch_norm/~/var_ema'), 'missing, first projector.1.running_var'),
    (lambda p,s: p.pop('projector/linear'), 'projector.0.weight'),
    (lambda p,s: p.update({'res_net50/~/final_batchnorm':dict(scale=np.zeros(1))}), 'final_batchnorm'),
    (lambda p,s: p['projector/linear'].update(g=np.zeros(1)), "'g'"),
    (lambda p,s: p['predictor/linear'].update(b=np.zeros(3,'f4')), r'\(3,\) instead of \(16,\)'),
    (lambda p,s: p['projector/linear'].update(b=3), 'not a checkpoint'),
    (lambda p,s: s.update({'projector/batch_norm/~/var_ema':dict(hidden=np.zeros(1))}), 'average')])
def test_what_does_not_fit_is_named(change, msg, tmp_path):
    online,target = pair()
    change(online.params, online.state)
    with pytest.raises(ValueError, match=msg): from_deepmind(write(tmp_path/'p.pkl', state_of(online, target)), **widths())

def test_other_checkpoints_of_deepmind_are_named(tmp_path):
    f = write(tmp_path/'p.pkl', dict(backbone_params={}, backbone_state={}))
    with pytest.raises(ValueError, match='online_params'): from_deepmind(f)
    with pytest.raises(FileNotFoundError): from_deepmind(tmp_path/'q.pkl')
    with pytest.raises(ValueError, match='from_deepmind'): BYOL('haiku_resnet', pretrained=True, **tiny)

# --- the Hub

@pytest.fixture
def local(tmp_path): return f"local-dir:{tmp_path/'m'}"

@pytest.mark.parametrize('arch,kw', [('resnet18',dict(n_in=1,stats=((.1,),(.2,)))),
    ('vit_tiny_patch16_224',dict(img_size=32,n_in=4)), ('mobilenetv3_small_050',dict(stats=([.1]*3,[.2]*3)))])
def test_a_folder_brings_back_body_statistics_and_channels(arch, kw, local, tmp_path):
    m = stir(BYOL(arch, **quick, **kw))
    back = from_hub(to_hub(m, local), **quick)
    assert sorted(o.name for o in (tmp_path/'m').iterdir())==['README.md','config.json','model.safetensors']
    assert back.spec.arch==arch and back.spec.n_in==kw.get('n_in',3) and not back.training
    for body in (back.body,back.target['body']): assert same_sd(body.state_dict(), m.body.state_dict())
    np.testing.assert_allclose(back.stats, m.stats, rtol=1e-6)

def test_timm_loads_a_folder_without_us(local):
    m,x = stir(BYOL('resnet18', n_in=1, **quick, stats=((.1,),(.2,)))),torch.rand(2,1,32,32)
    net = timm.create_model(to_hub(m, local), pretrained=True, num_classes=0).eval()
    with torch.no_grad(): torch.testing.assert_close(net(x), m.embed(x))
    cfg = net.pretrained_cfg
    assert [*cfg['mean'],*cfg['std'],cfg['input_size'][0]]==pytest.approx([.1,.2,1])

pooled = [('test_vit3',dict(global_pool='avg')), ('test_resnet',dict(global_pool='max')), ('test_vit',{})]
@pytest.mark.parametrize('arch,kw', pooled)
def test_the_kind_of_pooling_comes_back(arch, kw, local):
    "timm's transformers pool by attention, average or a token, and have other weights for each"
    m,x = stir(BYOL(arch, **quick, **kw)),torch.rand(2,3,160,160)
    back = from_hub(to_hub(m, local), **quick)
    with torch.no_grad(): torch.testing.assert_close(back.embed(x), m.embed(x))

def test_what_timm_publishes_its_weights_with_is_not_passed_on(local, tmp_path):
    to_hub(BYOL('test_resnet.r160_in1k', **quick), local)
    text = (tmp_path/'m/config.json').read_text()
    assert json.loads(text)['architecture']=='test_resnet' and 'r160_in1k' not in text and 'apache' not in text

@pytest.fixture(scope='module')
def noted(tmp_path_factory):
    f = tmp_path_factory.mktemp('noted')/'b'
    return save_body(BYOL('test_resnet', **quick), f, knn=.714, epochs=100, command='fastbyol-pretrain\nphotos')

def test_the_card_lists_what_was_noted_in_the_file(noted, local, tmp_path):
    from_hub(to_hub(noted, local, license='mit', info=dict(card='H200', epochs=200)), **quick)
    card = (tmp_path/'m/README.md').read_text()
    assert '\nlicense: mit\n' in card
    made = ['knn: `0.714`', 'epochs: `200`', 'command: `fastbyol-pretrain photos`', 'card: `H200`']
    for line in made: assert f'\n- {line}\n' in card
    assert f"timm.create_model('{local}'" in card and 'features = net.forward_features(x).mean((2, 3)) #' in card

def test_the_card_of_a_model_without_notes_has_no_figures(local, tmp_path):
    to_hub(BYOL('test_resnet', **quick), local)
    assert 'How it was made' not in (tmp_path/'m/README.md').read_text()

def test_a_card_is_renewed_and_a_readme_of_the_user_is_left_alone(noted, tmp_path):
    (tmp_path/'README.md').write_text('my project')
    to_hub(noted, f'local-dir:{tmp_path}')
    assert (tmp_path/'README.md').read_text()=='my project'
    for knn in (1,2): to_hub(noted, f"local-dir:{tmp_path/'m'}", info=dict(knn=knn))
    assert '- knn: `2`' in (tmp_path/'m/README.md').read_text()

class Api:
    "What `timm` calls of `huggingface_hub.HfApi`"
    calls = []
    def __init__(self, **kw): pass
    def create_repo(self, repo_id, **kw):
        self.calls.append(kw)
        return types.SimpleNamespace(repo_id=repo_id)
    def file_exists(self, **kw): return False
    def upload_folder(self, repo_id, folder_path, **kw):
        self.calls.append(dict(kw, repo_id=repo_id, files={o.name:o.read_bytes() for o in Path(folder_path).iterdir()}))

@pytest.fixture
def api(monkeypatch):
    import timm.models._hub as hub
    monkeypatch.setattr(hub, 'HfApi', Api)
    Api.calls.clear()
    return Api.calls

def test_a_push_uploads_what_a_folder_holds(api, noted, local, tmp_path):
    kw = dict(license='mit', private=True, commit_message='hello')
    assert to_hub(noted, 'hf-hub:me/mine', **kw)=='hf-hub:me/mine'
    made,up = api
    assert made['private'] and up['repo_id']=='me/mine' and up['commit_message']=='hello'
    to_hub(noted, local)
    for k in ('config.json','model.safetensors'): assert (tmp_path/'m'/k).read_bytes()==up['files'][k]
    card = up['files']['README.md'].decode()
    assert 'license: mit' in card and "timm.create_model('hf-hub:me/mine'" in card and '- knn: `0.714`' in card

def test_a_card_says_what_gives_the_representation(local, tmp_path):
    m = stir(BYOL('mobilenetv3_small_050', **quick))
    with pytest.warns(UserWarning, match='forward_features'): to_hub(m, local)
    assert 'features = net.forward_features(x).mean((2, 3)) #' in (tmp_path/'m/README.md').read_text()

@pytest.mark.parametrize('make', [lambda: BYOL('test_resnet', small_stem=True, **quick),
    lambda: BYOL(resnet18, **quick), small_byol, lambda: BYOL('haiku_resnet', **tiny)],
    ids=['small_stem','torchvision','own','haiku'])
def test_what_timm_could_not_rebuild_is_not_shared(make, local, tmp_path):
    with pytest.raises(ValueError, match='save_body'): to_hub(make(), local)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', ['resnet18','me/mine','hf-hub:','local-dir:'])
def test_a_name_needs_its_kind(name):
    with pytest.raises(ValueError, match='hf-hub:user/model'): to_hub(small_byol(), name)

def test_a_name_that_timm_does_not_know_is_named():
    with pytest.raises(ValueError, match='could not load me/mine'): from_hub('me/mine')

def test_damaged_folders_are_refused(noted, local, tmp_path):
    name,weights = to_hub(noted, local),tmp_path/'m/model.safetensors'
    raw = weights.read_bytes()
    for cut in (0, 4, len(raw)//2):
        weights.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match='could not load'): from_hub(name)
    save_file({'conv1.weight':torch.zeros(64,3,7,7)}, weights)
    with pytest.raises(ValueError, match='could not load'): from_hub(name)
    (tmp_path/'m/config.json').write_text('{')
    with pytest.raises(ValueError, match='could not load'): from_hub(name)

# --- torch

class PytorchLearner(nn.Module):
    "The names of byol-pytorch's learner, with a target that differs"
    def __init__(self, net, target):
        super().__init__()
        self.net = net
        for k,o in (('online_encoder',net),('target_encoder',target)):
            setattr(self, k, nn.ModuleDict(dict(net=o, projector=nn.Linear(512,8))))

def net18(): return stir(torchvision.models.resnet18())
def named(p, net): return {f'{p}{k}':v for k,v in net.state_dict().items()}
def seq(net, *more): return nn.Sequential(*list(net.children())[:-2], *more)
def features(net, x):
    with torch.no_grad(): return nn.Sequential(*list(net.children())[:-1])(x).flatten(1)

@pytest.fixture(scope='module')
def nets():
    torch.manual_seed(0)
    return net18(),net18()

x32 = torch.rand(2,3,32,32, generator=torch.Generator().manual_seed(0))
head_names = 'projector','momentum_projector','predictor','classifier','projection_head.layers'
heads = {f'{p}.{k}':torch.zeros(2) for p in head_names for k in ('0.weight','3.bias')}

files = dict(byol_pytorch=lambda a,b: PytorchLearner(a, b).state_dict(),
    lightly=lambda a,b: {**named('backbone.', seq(a)), **named('backbone_momentum.', seq(b)), **heads},
    solo_learn=lambda a,b: dict(state_dict={**named('backbone.', a), **named('momentum_backbone.', b), **heads}),
    self_supervised=lambda a,b: dict(model={**named('encoder.', seq(a, AdaptiveConcatPool2d())), **heads}),
    ddp=lambda a,b: {**named('module.student.backbone.', a), **named('module.teacher.backbone.', b)},
    bare=lambda a,b: a.state_dict())
no_target = 'self_supervised','bare'

@pytest.mark.parametrize('kind,arch', [*((k,'resnet18') for k in files), ('solo_learn',resnet18), ('lightly',resnet18)],
    ids=lambda o: getattr(o, '__name__', o))
def test_from_torch_finds_the_bodies_of_every_library(kind, arch, nets, tmp_path):
    torch.save(files[kind](*nets), tmp_path/'f.pt')
    m = from_torch(tmp_path/'f.pt', arch, **quick)
    target = nets[kind not in no_target]
    with torch.no_grad(): online,momentum = m.embed(x32),m.embed(x32, target=True)
    torch.testing.assert_close(online, features(nets[0], x32))
    torch.testing.assert_close(momentum, features(target, x32))
    assert not m.training

def test_from_torch_takes_the_only_body_there_is(nets):
    m = from_torch(named('target.', nets[0]), 'resnet18', **quick)
    with torch.no_grad(): torch.testing.assert_close(m.embed(x32), features(nets[0], x32))

@pytest.mark.parametrize('kind', ['byol_pytorch','self_supervised'])
def test_from_torch_fills_a_network_of_your_own(kind, nets):
    if kind=='byol_pytorch': arch,kw = torchvision.models.resnet18(),dict(layer='avgpool')
    else: arch,kw = seq(torchvision.models.resnet18()),{}
    m = from_torch(files[kind](*nets), arch, **quick, **kw)
    with torch.no_grad(): torch.testing.assert_close(m.embed(x32), features(nets[0], x32))

def test_from_torch_reads_safetensors_of_half_precision(nets, tmp_path):
    f = tmp_path/'f.safetensors'
    save_file({k:v.half() if v.is_floating_point() else v for k,v in nets[0].state_dict().items()}, f)
    assert from_torch(f, 'resnet18', **quick).body.model.conv1.weight.dtype==torch.float32

def test_from_torch_knows_other_architectures():
    net,x = stir(timm.create_model('test_convnext', num_classes=7)),torch.rand(2,3,64,64)
    m = from_torch(named('backbone.', net), 'test_convnext', **quick)
    with torch.no_grad(): torch.testing.assert_close(m.body(x), net.forward_features(x))

def test_from_torch_knows_fastais_networks():
    net = stir(xresnet18())
    m = from_torch(named('m.', net), xresnet18, **quick)
    with torch.no_grad(): torch.testing.assert_close(m.body(x32), nn.Sequential(*list(net.children())[:-4])(x32))

def test_from_torch_reads_our_own_state_dict():
    kw = dict(small_stem=True, n_in=1, **quick)
    ours = stir(BYOL('test_resnet', **kw))
    m = from_torch(ours.state_dict(), 'test_resnet', **kw)
    assert same_sd(m.body.state_dict(), ours.body.state_dict())
    assert same_sd(m.target['body'].state_dict(), ours.target['body'].state_dict())

@pytest.mark.parametrize('change,msg', [
    (lambda s: s.pop('layer3.1.bn2.weight'), 'missing, first model.layer3.1.bn2.weight'),
    (lambda s: s.update(extra=torch.zeros(1)), '1 unexpected, first extra'),
    (lambda s: s.update(conv1=s.pop('conv1.weight')), 'missing, first model.conv1.weight; 1 unexpected, first conv1'),
    (lambda s: s.update({'conv1.weight':torch.zeros(64,1,7,7)}), r'\(64, 1, 7, 7\) instead of'),
    (lambda s: s.clear(), 'missing, first model.conv1.weight'),
    (lambda s: s.update({'x.'+k:v+1 for k,v in s.items()}), "several.*'', 'x.'")])
def test_from_torch_names_what_does_not_fit(change, msg, nets):
    sd = dict(nets[0].state_dict())
    change(sd)
    with pytest.raises(ValueError, match=msg): from_torch(sd, 'resnet18', **quick)

def test_from_torch_does_not_run_what_is_in_a_file(tmp_path):
    f,made = tmp_path/'f.pt',tmp_path/'made'
    torch.save(dict(state_dict={}, hparams=As(os.system, f'touch {made}')), f)
    with pytest.raises(pickle.UnpicklingError): from_torch(f, 'test_resnet', **quick)
    assert not made.exists()

def test_the_pad_of_solo_learns_cifar_stem_is_another(nets):
    "Why the docs say to pass solo-learn's network"
    net = deepcopy(nets[0])
    net.conv1,net.maxpool,net.fc = nn.Conv2d(3,64,3,1,2,bias=False),nn.Identity(),nn.Identity()
    m = from_torch(named('backbone.', net), deepcopy(net), **quick)
    ours = from_torch(named('backbone.', net), 'resnet18', small_stem=True, **quick)
    with torch.no_grad():
        torch.testing.assert_close(m.embed(x32), net(x32))
        assert (ours.embed(x32)-net(x32)).norm()>.01*net(x32).norm()
