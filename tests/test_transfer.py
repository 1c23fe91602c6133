"The body out of pretraining and into fastai, timm and files: lock-step with fastai's own learners"
from conftest import *
from fastbyol.core import eval_mode, find_normalize, normalize_stats
from fastbyol.transfer import check_images, timm_features
from safetensors import safe_open
from safetensors.torch import save_file, load_file
import fastbyol.transfer, inspect, json, timm

quick = dict(hidden_size=16, projection_size=8)

class Own(nn.Module):
    "A network of one's own, read at `pool`"
    def __init__(self, n_in=3):
        super().__init__()
        self.conv,self.bn,self.pool = nn.Conv2d(n_in,12,3,2),nn.BatchNorm2d(12),nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12,3)
    def forward(self, x): return self.head(self.pool(F.relu(self.bn(self.conv(x)))).flatten(1))

def class_dls(size=64, n_in=3, n=12, bs=4, **kw):
    return image_dls(noise(n,size,n_in), n_val=4, bs=bs, y=[i%2 for i in range(n)], **kw)
clas = dict(n_out=2, loss_func=CrossEntropyLossFlat())

def stir(m):
    "Give every weight and statistic of `m` a value of its own"
    with torch.no_grad():
        for k,o in m.state_dict(keep_vars=True).items():
            if o.is_floating_point() and k not in ('mean','std'): o.add_(torch.rand_like(o)*.05)
    return m

def pretrained(arch, **kw): return stir(BYOL(arch, **{**quick, **kw})).eval()
def own_byol(**kw): return pretrained(Own(), layer='pool', **kw)

def body_of(learn, x):
    with eval_mode(learn.model): return learn.model[0](x)

def name_of(o): return getattr(o, '__name__', str(o))

archs = pytest.mark.parametrize('arch,kw,size', [
    ('test_resnet',{},64), ('test_convnext',{},64), ('test_efficientnet',{},64), (resnet18,{},64),
    (Own,dict(layer='pool'),32), ('test_resnet',dict(small_stem=True),32), ('test_vit',{},160),
    ('test_vit',dict(img_size=32),32)], ids=name_of)

@archs
def test_pretrain_hand_over_fine_tune_and_file(arch, kw, size, tmp_path):
    "The whole way, for every kind of architecture"
    learn = byol_learn(image_dls(noise(6,size), n_val=2, bs=4), BYOL(arch() if arch is Own else arch, **quick, **kw))
    learn.fit(1, 1e-3)
    m = learn.model; x = m.normalize(noise(2,size,seed=5))
    with eval_mode(m): want,rep = m.body(x).clone(),m.embed(x).clone()
    # into a classifier
    dls = class_dls(size, n=8)
    c = hush(learn.to_vision_learner(dls, **clas)); torch.testing.assert_close(body_of(c, x), want)
    head = [p.clone() for p in c.model[1].parameters()]
    c.fine_tune(1)
    assert not all(map(torch.equal, head, c.model[1].parameters()))
    assert not torch.equal(body_of(c, x), want) # unfrozen
    with eval_mode(m): assert torch.equal(m.body(x), want) # what was pretrained is as it was
    # into a file and back
    body,meta = loaded = load_body(save_body(learn, tmp_path/'b'), arch=Own() if arch is Own else None)
    assert meta.spec.n_features==m.n_features and not body.training
    with torch.no_grad(): torch.testing.assert_close(pool_features(body(x), meta.spec.nhwc), rep)
    a,b = (get_embeddings(o, dls.valid)[0] for o in (loaded,learn)); torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

timm_archs = 'test_resnet','test_convnext','test_efficientnet'
vl_archs = pytest.mark.parametrize('arch', [*timm_archs,resnet18,xresnet18], ids=name_of)

def both(arch, **kw):
    "Our learner, and fastai's own with the same weights and statistics, frozen"
    m = pretrained(arch); ours = hush(byol_vision_learner(class_dls(), m, **clas, **kw))
    dls = class_dls(norm=[Normalize.from_stats(*m.stats)])
    theirs = hush(vision_learner(dls, arch, pretrained=False, normalize=False, **clas, **kw)); theirs.freeze()
    theirs.model.load_state_dict(ours.model.state_dict()) # strict: the same keys
    return ours,theirs

def same_groups(a, b):
    "The same parameter groups, frozen alike"
    shapes = [[[p.shape for p in g] for g in l.opt.param_lists] for l in (a,b)]
    return shapes[0]==shapes[1] and a.opt.frozen_idx==b.opt.frozen_idx>0

@vl_archs
def test_vision_learner_is_fastais_own(arch):
    ours,theirs = both(arch)
    assert str(ours.model)==str(theirs.model) and ours.splitter is theirs.splitter and same_groups(ours, theirs)
    assert [p.requires_grad for p in ours.model.parameters()]==[p.requires_grad for p in theirs.model.parameters()]
    for a,b in zip(ours.get_preds(), theirs.get_preds()): torch.testing.assert_close(a, b) # the data is normalised alike

@pytest.mark.parametrize('arch', ['test_resnet','test_efficientnet'])
def test_fine_tune_is_fastais_own_to_the_last_weight(arch):
    ends = []
    for learn in both(arch): set_seed(4); learn.fine_tune(1, 1e-3); ends.append(sd_of(learn))
    for k in ends[0]: torch.testing.assert_close(ends[0][k], ends[1][k], rtol=1e-4, atol=1e-5, msg=lambda s: f'{k}: {s}')

pooled_head = nn.Sequential(AdaptiveConcatPool2d(), nn.Flatten(), nn.Linear(192,2))
@pytest.mark.parametrize('kw', [dict(lin_ftrs=[16], ps=.1), dict(concat_pool=False), dict(bn_final=True),
    dict(y_range=(0,1)), dict(opt_func=SGD), dict(metrics=accuracy, wd=.1, lr=.5), dict(custom_head=pooled_head)], ids=lambda o: next(iter(o)))
def test_vision_learner_takes_fastais_arguments(kw):
    ours,theirs = both('test_resnet', **kw)
    facts = lambda l: (str(l.model), l.wd, l.lr, l.opt_func, len(l.metrics))
    assert facts(ours)==facts(theirs)

@pytest.mark.parametrize('make', [lambda m,f: byol_learn(image_dls(noise(16,64)), m), lambda m,f: m, lambda m,f: f,
    lambda m,f: str(f), lambda m,f: str(f.with_suffix('')), lambda m,f: load_body(f), lambda m,f: as_encoder(m)],
    ids=['learner','byol','path','str','no ending','loaded','encoder'])
def test_every_kind_of_source_gives_the_same(make, tmp_path):
    m = pretrained('test_resnet', stats=([.1]*3,[.2]*3)); m.view_size = 48
    enc,x = as_encoder(make(m, save_body(m, tmp_path/'b'))),torch.randn(2,3,64,64)
    with torch.no_grad(): assert torch.equal(enc(x), m.embed(x)) and torch.equal(enc.normalize(x), m.normalize(x))
    assert enc.stats==m.stats and enc.view_size==48

def test_the_target_is_an_encoder_too():
    m = own_byol(); stir(m.target); x = torch.randn(2,3,32,32)
    assert torch.equal(as_encoder(m, target=True)(x), m.embed(x, target=True))
    with pytest.raises(TypeError, match='body file'): as_encoder(as_encoder(m), target=True)

def test_normalize_is_added_once_kept_if_there_and_left_out_if_asked():
    m = own_byol(stats=([.1]*3,[.2]*3))
    def norms(d, **kw):
        byol_vision_learner(d, m, **clas, **kw)
        return [normalize_stats(o)[0][0] for o in d.train.after_batch.fs if isinstance(o, Normalize)]
    d = class_dls(); assert np.allclose([norms(d),norms(d)], .1)
    assert norms(class_dls(), normalize=False)==[]
    stats = lambda *o: [Normalize.from_stats(*([v]*3 for v in o), cuda=False)]
    with pytest.warns(UserWarning, match='pretrained with'): assert norms(class_dls(norm=stats(.5,.5)))==[.5]
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*pretrained with')
        norms(class_dls(norm=stats(.1,.2)))

def test_the_classifier_sees_pixels_normalised_once_in_training_and_validation():
    c = hush(byol_vision_learner(class_dls(32), own_byol(stats=([.1]*3,[.2]*3)), **clas)); g,v = Grab(),Grab(valid=True)
    c.fit(1, 0., cbs=[g,v]); x = noise(12,32)
    for got,want in ((g.xs[0][0],x[:4]),(v.xs[0][0],x[8:])):
        torch.testing.assert_close(got.as_subclass(Tensor), (want-.1)/.2, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('n_in', [1,4])
@pytest.mark.parametrize('arch', ['test_resnet',Own], ids=name_of)
def test_any_number_of_channels(n_in, arch, tmp_path):
    own = arch is Own
    m = pretrained(Own(n_in) if own else arch, n_in=n_in, **(dict(layer='pool') if own else {}))
    x = torch.randn(2,n_in,64,64)
    c = hush(byol_vision_learner(class_dls(n_in=n_in), m, **clas))
    torch.testing.assert_close(body_of(c, x), m.body(x).detach())
    c.fit(1)
    body,meta = load_body(save_body(m, tmp_path/'b'), arch=Own(n_in) if own else None)
    assert torch.equal(body(x), m.body(x)) and len(meta['mean'])==n_in

@pytest.mark.parametrize('f', [byol_vision_learner,byol_unet_learner])
def test_the_signature_promises_only_what_can_be_passed(f):
    assert not {'n_in','pretrained','weights','cut','arch'}&set(inspect.signature(f).parameters)

# --- files

@pytest.fixture
def file(tmp_path): return save_body(own_byol(), tmp_path/'body')

@pytest.mark.parametrize('keep', [0, 4, 8, 100, .3, .9, -1])
def test_a_truncated_file_is_refused(file, keep):
    b = file.read_bytes()
    file.write_bytes(b[:keep if isinstance(keep, int) else int(len(b)*keep)])
    with pytest.raises(ValueError, match='cut short'): load_body(file)

@pytest.mark.parametrize('at,byte', [(0,255), (9,0), (60,0)])
def test_a_corrupted_head_is_refused(file, at, byte):
    b = bytearray(file.read_bytes()); b[at] = byte; file.write_bytes(bytes(b))
    with pytest.raises(ValueError): load_body(file)

def read(file):
    "Metadata and weights of a file"
    with safe_open(file, 'pt') as f: return f.metadata()['fastbyol'],{k:f.get_tensor(k) for k in f.keys()}

def rewrite(file, meta=None, sd=None):
    "The file with other metadata or weights"
    text,old = read(file)
    new,text = sd(old) if sd else old,meta if isinstance(meta, str) else json.dumps({**json.loads(text), **(meta or {})})
    save_file(new, file, metadata=dict(fastbyol=text))

@pytest.mark.parametrize('sd,msg', [
    (lambda s: {k:v for k,v in s.items() if 'conv.weight' not in k}, 'missing, first module.conv.weight'),
    (lambda s: {**s,'z':torch.zeros(1)}, 'unexpected, first z'),
    (lambda s: {**s,'module.conv.bias':torch.zeros(3)}, r'\(3,\) instead of \(12,\)')])
def test_weights_that_do_not_fit_are_named(file, sd, msg):
    rewrite(file, sd=sd)
    with pytest.raises(ValueError, match=msg): load_body(file, arch=Own())

def test_a_file_with_a_checksum_still_loads(file):
    text,sd = read(file)
    text = json.dumps({**json.loads(text), 'checksum':'sha256'})
    save_file(sd, file, metadata=dict(fastbyol=text, sha256='0'*64))
    assert same_sd(load_body(file, arch=Own())[0].state_dict(), sd)

def test_a_file_by_timms_names_still_loads(tmp_path):
    m,x = pretrained('test_resnet'),torch.randn(2,3,64,64)
    file = save_body(m, tmp_path/'b')
    rewrite(file, dict(for_timm=True), lambda sd: to_timm(m, num_classes=None).state_dict())
    with torch.no_grad(): assert torch.equal(as_encoder(file)(x), m.embed(x))

def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert save_body(own_byol(), tmp_path/'b').name=='b.safetensors' and not list(tmp_path.iterdir())

@pytest.mark.parametrize('meta', ['{}', 'nonsense', '{"format":1}'])
def test_metadata_that_says_nothing_is_refused(file, meta):
    rewrite(file, meta)
    with pytest.raises(ValueError, match='body.safetensors'): load_body(file)

def test_a_newer_format_asks_for_an_update(file):
    rewrite(file, dict(format=99))
    with pytest.raises(ValueError, match='update fastbyol'): load_body(file)

@pytest.mark.parametrize('kind,arch', [('callable','os:system'), ('callable','builtins:eval'), ('module','os:system'),
    ('module','subprocess:Popen'), ('callable','torchvision.no_such:x')])
def test_a_file_cannot_make_us_run_what_it_names(file, kind, arch):
    rewrite(file, dict(kind=kind, arch=arch))
    with pytest.raises((ValueError,ImportError)): load_body(file)

@pytest.mark.parametrize('exc,msg,f', [
    (FileNotFoundError, 'save_body', lambda d: load_body(d/'nothing')),
    (FileNotFoundError, 'no_such_model', lambda d: as_encoder('no_such_model')),
    (ValueError, 'not a readable', lambda d: load_body(d)),
    (TypeError, 'Learner', lambda d: save_body(Own(), d/'x')),
    (TypeError, 'Learner', lambda d: byol_vision_learner(class_dls(), Own())),
    (TypeError, 'JSON', lambda d: save_body(own_byol(), d/'x', note=torch.zeros(1))),
    (ValueError, 'none are published', lambda d: published_encoder(own_byol()))])
def test_wrong_sources_are_named(tmp_path, exc, msg, f):
    with pytest.raises(exc, match=msg): f(tmp_path)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('fails', ['write','rename'])
def test_a_failed_write_leaves_the_old_file_whole(file, monkeypatch, fails):
    T = fastbyol.transfer
    old = file.read_bytes()
    def half(sd, f, **k): Path(f).write_bytes(b'half'); raise OSError('disk full')
    def no(*a): raise OSError('disk full')
    monkeypatch.setattr(T, 'save_file', half) if fails=='write' else monkeypatch.setattr(os, 'replace', no)
    with pytest.raises(OSError, match='disk full'): save_body(own_byol(), file)
    assert file.read_bytes()==old and [o.name for o in file.parent.iterdir()]==[file.name]

def test_the_file_holds_the_body_alone_and_what_rebuilds_it(tmp_path):
    m = pretrained('test_resnet', n_in=1, small_stem=True, stats=((.1,),(.2,))); m.view_size = 32
    f = save_body(m, tmp_path/'a.b', epochs=7)
    assert f.name=='a.b.safetensors' and set(load_file(f))==set(m.body.state_dict())
    meta = load_body(tmp_path/'a.b')[1]
    want = dict(kind='timm', arch='test_resnet', n_in=1, small_stem=True, n_features=96, view_size=32, info=dict(epochs=7))
    assert {k:meta[k] for k in want}==want
    np.testing.assert_allclose(meta.spec.stats, ((.1,),(.2,)), rtol=1e-6)

# --- 16 bits

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_16_bits_halve_the_file_and_hardly_change_embeddings(dtype, tmp_path):
    m = pretrained('test_resnet'); x = torch.randn(8,3,64,64)
    full,half = save_body(m, tmp_path/'a'),save_body(m, tmp_path/'b', dtype=dtype)
    assert half.stat().st_size<.55*full.stat().st_size
    body,meta = load_body(half)
    assert {v.dtype for v in body.state_dict().values()}=={torch.float32,torch.int64}
    with torch.no_grad(): a,b = m.embed(x),pool_features(body(x))
    assert (F.cosine_similarity(a, b)>.9999).all() and (a-b).norm()<.01*a.norm()

def test_16_bits_keep_statistics_as_they_are(tmp_path):
    m = own_byol(); sd = load_file(save_body(m, tmp_path/'a', dtype=torch.float16))
    assert all(torch.equal(sd[k], v) for k,v in m.body.state_dict().items() if 'bn' in k)
    assert sd['module.conv.weight'].dtype==torch.float16

# --- published weights, from a local file

@pytest.fixture
def weights(tmp_path):
    m = timm.create_model('test_resnet'); torch.save(m.state_dict(), tmp_path/'w.pth')
    return m.eval(),dict(pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth'), mean=(.1,.2,.3), std=(.4,.5,.6)))

def test_a_timm_name_is_its_published_weights_with_their_statistics_and_size(weights):
    net,kw = weights; enc = as_encoder('test_resnet', **kw); x = torch.randn(2,3,64,64)
    with torch.no_grad(): assert torch.equal(enc.body(x), net.forward_features(x))
    np.testing.assert_allclose(enc.stats, ((.1,.2,.3),(.4,.5,.6)), rtol=1e-6)
    assert enc.view_size==160 and not enc.body.training

def test_a_byol_starts_from_weights_in_a_local_file_and_keeps_the_file_out_of_its_own(weights, tmp_path):
    net,kw = weights; m = BYOL('test_resnet', pretrained=True, **quick, **kw).eval(); x = torch.randn(2,3,64,64)
    with torch.no_grad(): assert torch.equal(m.body(x), net.forward_features(x))
    np.testing.assert_allclose(m.stats[0], (.1,.2,.3), rtol=1e-6)
    body,meta = load_body(save_body(m, tmp_path/'b'))
    assert meta['kwargs']=={} and same_sd(body.state_dict(), m.body.state_dict())
    again = published_encoder(stir(m)); assert torch.equal(again.body.model.conv1[0].weight, net.conv1[0].weight)
    fresh = random_encoder(m); assert not torch.equal(fresh.body.model.conv1[0].weight, net.conv1[0].weight)
    assert fresh.stats==m.stats and to_timm(m).num_classes==0

def test_published_weights_that_do_not_load_are_named():
    with pytest.raises(ValueError, match='published weights of test_resnet could not be loaded'):
        as_encoder('test_resnet', pretrained_cfg_overlay=dict(file='/no/such/file.pth'))

def test_a_classifier_from_published_weights(weights, monkeypatch):
    enc = as_encoder('test_resnet', **weights[1]); x = torch.randn(2,3,64,64)
    c = byol_vision_learner(class_dls(), enc, **clas); assert torch.equal(body_of(c, x), enc.body(x).detach())

@pytest.mark.parametrize('make,dls,msg', [
    (lambda: pretrained('test_resnet', n_in=1), lambda: class_dls(), 'images of 1 channels, the data has 3.*n_in=3'),
    (lambda: BYOL('vit_tiny_patch16_224', depth=1, **quick), lambda: class_dls(32), 'size=224')])
def test_images_that_do_not_suit_the_body_are_named(make, dls, msg):
    m = make()
    for f in (lambda d: byol_vision_learner(d, m, **clas), lambda d: check_images(d, as_encoder(m))):
        with pytest.raises(ValueError, match=msg): f(dls())

# --- timm and U-Nets

@pytest.mark.parametrize('arch,kw,rep', [('test_resnet',{},None), ('test_resnet',dict(small_stem=True,n_in=1),None),
    ('test_vit',dict(img_size=32),None), ('mobilenetv3_small_050',dict(n_in=4),'(2, 3)'), ('test_convnext',{},'(2, 3)'),
    ('test_mambaout',{},'(1, 2)')])
def test_to_timm_computes_the_same_or_says_what_does(arch, kw, rep, recwarn):
    m = pretrained(arch, **kw); t = to_timm(m, num_classes=3).eval(); x = torch.randn(2,kw.get('n_in',3),32,32)
    assert not any('forward_features' in str(o.message) for o in recwarn)
    with torch.no_grad():
        assert t(x).shape==(2,3)
        torch.testing.assert_close(t.forward_features(x), m.body.model.forward_features(x))
        net = to_timm(m).eval()
        said = [o[1] for o in (re.search('use `(.*)`$', str(w.message)) for w in recwarn) if o]
        assert said==([f'net.forward_features(x).mean({rep})'] if rep else [])
        torch.testing.assert_close(eval(said[0]) if rep else net(x), m.embed(x)) # what it says gives the representation
    assert isinstance(t, type(timm.create_model(arch))) and tuple(t.pretrained_cfg['mean'])==m.stats[0] and t.num_classes==3

def test_timm_reads_a_file_with_the_weights_of_to_timm(tmp_path):
    m,x = pretrained('test_resnet', n_in=1),torch.randn(2,1,64,64)
    save_file(to_timm(m, num_classes=None).state_dict(), tmp_path/'b.safetensors')
    net = timm.create_model('test_resnet', checkpoint_path=tmp_path/'b.safetensors', in_chans=1).eval()
    with torch.no_grad(): assert torch.equal(net.forward_features(x), m.body(x))

def test_to_timm_is_a_copy():
    m = pretrained('test_resnet'); t = to_timm(m, num_classes=3)
    with torch.no_grad(): [p.zero_() for p in t.parameters()]
    assert m.embed(torch.randn(2,3,32,32)).abs().sum()>0

def test_the_way_to_the_representation_is_code():
    m = pretrained('test_convnext')
    assert timm_features(m.spec)=='net.forward_features(x).mean((2, 3))'

def test_to_timm_is_for_timm_names():
    with pytest.raises(TypeError, match='timm names'): to_timm(pretrained(xresnet18))

def mask_dls(n_in=3, n=12, size=64, norm=None):
    items = [(TensorImage(o),TensorMask((o[0]>.5).long())) for o in noise(n,size,n_in)]
    dl = lambda its: TfmdDL(its, bs=4, num_workers=0, device=cpu, after_batch=norm)
    return DataLoaders(dl(items[:8]), dl(items[8:]), device=cpu)
seg = dict(n_out=2, loss_func=CrossEntropyLossFlat(axis=1))

@pytest.mark.parametrize('arch', [resnet18,xresnet18], ids=name_of)
def test_unet_learner_is_fastais_own(arch):
    m = pretrained(arch); ours = hush(byol_unet_learner(mask_dls(), m, **seg))
    dls = mask_dls(norm=[Normalize.from_stats(*m.stats)])
    theirs = hush(unet_learner(dls, arch, pretrained=False, normalize=False, **seg)); theirs.freeze()
    theirs.model.load_state_dict(ours.model.state_dict())
    assert str(ours.model)==str(theirs.model) and same_groups(ours, theirs)
    x = torch.randn(2,3,64,64); torch.testing.assert_close(body_of(ours, x), m.body(x).detach())

@pytest.mark.parametrize('arch,kw,size', [('test_resnet',{},64), ('test_efficientnet',dict(n_in=4),64),
    (resnet18,dict(small_stem=True),16), ('test_resnet',dict(n_in=1,small_stem=True),16)])
def test_unet_of_every_kind_of_body_fine_tunes(arch, kw, size):
    n_in = kw.get('n_in', 3); m = pretrained(arch, **kw)
    u = hush(byol_learn(image_dls(noise(16,size,n_in)), m).to_unet_learner(mask_dls(n_in, size=size), **seg))
    x = torch.randn(2,n_in,size,size); m.eval(); got = body_of(u, x); assert got.shape[1]<=m.n_features
    if got.shape[1]==m.n_features: torch.testing.assert_close(got, m.body(x).detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(next(u.model[0].parameters()), next(m.body.parameters()))
    assert not next(u.model[0].parameters()).requires_grad
    u.fine_tune(1)
    assert u.get_preds()[0].shape==(4,2,size,size)

def test_a_body_on_a_gpu_comes_to_the_cpu_where_the_rest_of_a_unet_is_made():
    "`DynamicUnet` runs on the body's features what it has just made; 'meta' stands for the GPU"
    class Away(nn.Sequential):
        def cpu(self): return self.to_empty(device='cpu')
    m = small_byol(); body = Away(*m.body).to('meta')
    with fastbyol.transfer._as_arch(body, m.spec) as arch: assert {p.device.type for p in arch().parameters()}=={'cpu'}
    assert next(body.parameters()).device.type=='meta'

@pytest.mark.parametrize('make', [byol_vision_learner,byol_unet_learner])
@pytest.mark.parametrize('arch', ['test_resnet',xresnet18,conv_body()], ids=['timm','fastai','own'])
def test_the_learner_is_where_its_data_is(make, arch):
    d = mask_dls(); x,y = first(d.train); d.one_batch = lambda: (x,y); d.device = torch.device('meta')
    learn = make(d, BYOL(arch, **quick), normalize=False, **seg)
    assert {p.device.type for p in learn.model.parameters()}=={'meta'}

def test_a_unet_needs_layers_in_a_row():
    vit = BYOL('test_vit', img_size=64, **quick)
    with pytest.raises(TypeError, match='one after the other.*resnet18'): byol_unet_learner(mask_dls(), vit, **seg)
