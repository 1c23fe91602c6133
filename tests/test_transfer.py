"The body out of pretraining and into fastai, timm and files: lock-step with fastai's own learners"
from conftest import *
from fastbyol.core import eval_mode, find_normalize, normalize_stats
from safetensors.torch import save_file, load_file
import fastbyol.transfer, json, timm

quick = dict(hidden_size=16, projection_size=8)

class Own(nn.Module):
    "A network of one's own, read at `pool`"
    def __init__(self, n_in=3): super().__init__(); self.conv,self.bn,self.pool,self.head = nn.Conv2d(n_in,12,3,2),nn.BatchNorm2d(12),nn.AdaptiveAvgPool2d(1),nn.Linear(12,3)
    def forward(self, x): return self.head(self.pool(F.relu(self.bn(self.conv(x)))).flatten(1))

def class_dls(size=64, n_in=3, n=12, bs=4, **kw): return image_dls(noise(n,size,n_in), n_val=4, bs=bs, y=[i%2 for i in range(n)], **kw)
clas = dict(n_out=2, loss_func=CrossEntropyLossFlat())

def stir(m):
    "Give every weight and statistic of `m` a value of its own"
    with torch.no_grad(): [o.add_(torch.rand_like(o)*.05) for k,o in m.state_dict(keep_vars=True).items() if o.is_floating_point() and k not in ('mean','std')]
    return m

def pretrained(arch, **kw): return stir(BYOL(arch, **{**quick, **kw})).eval()

def body_of(learn, x):
    with eval_mode(learn.model), torch.no_grad(): return learn.model[0](x)

archs = pytest.mark.parametrize('arch,kw,size', [
    ('resnet18',{},64), ('convnext_atto',{},64), ('mobilenetv3_small_100',{},64), (resnet18,{},64), (xresnet18,{},64), (Own,dict(layer='pool'),32),
    ('resnet18',dict(small_stem=True),32), ('efficientnet_b0',{},64), pytest.param('vit_tiny_patch16_224',{},224), ('vit_tiny_patch16_224',dict(img_size=32),32)],
    ids=lambda o: getattr(o,'__name__',str(o)))

@archs
def test_pretrain_hand_over_fine_tune_and_file(arch, kw, size, tmp_path):
    "The whole way, for every kind of architecture"
    bs = 2 if size==224 else 4
    net = arch() if arch is Own else arch
    learn = byol_learn(image_dls(noise(2*bs,size), n_val=bs, bs=bs), BYOL(net, **quick, **kw)); before = sd_of(learn)
    learn.fit(1, 1e-3); m = learn.model; assert not torch.equal(next(iter(m.body.parameters())), before['body.'+next(iter(m.body.state_dict()))])
    x = m.normalize(noise(2,size,seed=5))
    with eval_mode(m): want,rep = m.body(x).clone(),m.embed(x).clone()
    # into a classifier
    c = hush(learn.to_vision_learner(class_dls(size, bs=bs, n=4+bs), **clas)); torch.testing.assert_close(body_of(c, x), want)
    head = [p.clone() for p in c.model[1].parameters()]; c.fine_tune(1); assert not all(map(torch.equal, head, c.model[1].parameters()))
    assert not torch.equal(body_of(c, x), want) # unfrozen
    with eval_mode(m): assert torch.equal(m.body(x), want) # what was pretrained is as it was
    # into a file and back
    f = save_body(learn, tmp_path/'b'); body,meta = load_body(f); assert meta.spec.n_features==m.n_features and not body.training
    with torch.no_grad(): torch.testing.assert_close(pool_features(body(x), meta.spec.nhwc), rep)
    torch.testing.assert_close(get_embeddings(f, class_dls(size, bs=bs, n=4+bs).valid)[0], get_embeddings(learn, class_dls(size, bs=bs, n=4+bs).valid)[0], rtol=1e-4, atol=1e-5)

vl_archs = pytest.mark.parametrize('arch', ['resnet18','convnext_atto','mobilenetv3_small_100',resnet18,xresnet18], ids=lambda o: getattr(o,'__name__',str(o)))

def both(arch, **kw):
    "Our learner, and fastai's own with the same weights and statistics, frozen"
    m = pretrained(arch); ours = hush(byol_vision_learner(class_dls(), m, **clas, **kw))
    theirs = hush(vision_learner(class_dls(norm=[Normalize.from_stats(*m.stats)]), arch, pretrained=False, normalize=False, **clas, **kw)); theirs.freeze()
    theirs.model.load_state_dict(ours.model.state_dict()) # strict: the same keys
    return ours,theirs

@vl_archs
def test_vision_learner_is_fastais_own(arch):
    ours,theirs = both(arch)
    assert list(ours.model.state_dict())==list(theirs.model.state_dict()) and str(ours.model)==str(theirs.model) and ours.splitter is theirs.splitter
    shapes = lambda l: [[p.shape for p in g] for g in l.opt.param_lists]
    assert shapes(ours)==shapes(theirs) and ours.opt.frozen_idx==theirs.opt.frozen_idx>0
    assert [p.requires_grad for p in ours.model.parameters()]==[p.requires_grad for p in theirs.model.parameters()]
    x = torch.randn(2,3,64,64)
    with eval_mode(ours.model), eval_mode(theirs.model): assert torch.equal(ours.model(x), theirs.model(x))
    for a,b in zip(ours.get_preds(), theirs.get_preds()): torch.testing.assert_close(a, b) # the data is normalised alike

@pytest.mark.parametrize('arch', ['mobilenetv3_small_100',resnet18], ids=['timm','torchvision'])
def test_fine_tune_is_fastais_own_to_the_last_weight(arch):
    ends = []
    for learn in both(arch): set_seed(4); learn.fine_tune(1, 1e-3); ends.append(sd_of(learn))
    for k in ends[0]: torch.testing.assert_close(ends[0][k], ends[1][k], rtol=1e-4, atol=1e-5, msg=lambda s: f'{k}: {s}')

@pytest.mark.parametrize('kw', [dict(lin_ftrs=[16], ps=.1), dict(concat_pool=False), dict(bn_final=True), dict(y_range=(0,1)), dict(opt_func=SGD), dict(metrics=accuracy, wd=.1, lr=.5), dict(custom_head=nn.Sequential(AdaptiveConcatPool2d(), nn.Flatten(), nn.Linear(1024,2)))], ids=lambda o: next(iter(o)))
def test_vision_learner_takes_fastais_arguments(kw):
    ours,theirs = both('resnet18', **kw); assert str(ours.model)==str(theirs.model) and (ours.wd,ours.lr,ours.opt_func,len(ours.metrics))==(theirs.wd,theirs.lr,theirs.opt_func,len(theirs.metrics))

@pytest.mark.parametrize('source', ['learner','byol','path','str','loaded'])
def test_every_kind_of_source_gives_the_same(source, tmp_path):
    m = pretrained('resnet18', stats=([.1]*3,[.2]*3)); f = save_body(m, tmp_path/'b')
    src = dict(learner=lambda: byol_learn(image_dls(noise(16,64)), m), byol=lambda: m, path=lambda: f, str=lambda: str(f), loaded=lambda: load_body(f))[source]()
    c = byol_vision_learner(class_dls(), src, **clas); x = torch.randn(2,3,64,64)
    with torch.no_grad(): assert torch.equal(body_of(c, x), m.body(x))
    np.testing.assert_allclose(normalize_stats(find_normalize(c.dls)), ([.1]*3,[.2]*3), rtol=1e-6)

def test_normalize_is_added_once_kept_if_there_and_left_out_if_asked():
    m = pretrained('resnet18', stats=([.1]*3,[.2]*3)); count = lambda d: sum(isinstance(o, Normalize) for o in d.train.after_batch.fs)
    d = class_dls(); byol_vision_learner(d, m, **clas); byol_vision_learner(d, m, **clas); assert count(d)==1
    d = class_dls(); byol_vision_learner(d, m, normalize=False, **clas); assert count(d)==0
    d = class_dls(norm=[Normalize.from_stats([.5]*3,[.5]*3,cuda=False)])
    with pytest.warns(UserWarning, match='pretrained with'): byol_vision_learner(d, m, **clas)
    assert count(d)==1 and normalize_stats(find_normalize(d))[0]==(.5,)*3
    d = class_dls(norm=[Normalize.from_stats([.1]*3,[.2]*3,cuda=False)])
    with warnings.catch_warnings(): warnings.filterwarnings('error', message='.*pretrained with'); byol_vision_learner(d, m, **clas)

def test_the_classifier_sees_pixels_normalised_once_in_training_and_validation():
    m = pretrained(Own(), layer='pool', stats=([.1]*3,[.2]*3)); c = hush(byol_vision_learner(class_dls(32), m, **clas)); g,v = Grab(),Grab(valid=True)
    c.fit(1, 0., cbs=[g,v]); x = noise(12,32)
    for got,want in ((g.xs[0][0],x[:4]),(v.xs[0][0],x[8:])): torch.testing.assert_close(got.as_subclass(Tensor), (want-.1)/.2, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('n_in', [1,3,4])
@pytest.mark.parametrize('arch', ['mobilenetv3_small_100',resnet18,Own], ids=['timm','torchvision','own'])
def test_any_number_of_channels(n_in, arch, tmp_path):
    m = pretrained(arch(n_in) if arch is Own else arch, n_in=n_in, **(dict(layer='pool') if arch is Own else {})); x = torch.randn(2,n_in,64,64)
    c = hush(byol_vision_learner(class_dls(n_in=n_in), m, **clas)); torch.testing.assert_close(body_of(c, x), m.body(x).detach()); c.fit(1)
    body,meta = load_body(save_body(m, tmp_path/'b'), arch=Own(n_in) if arch is Own else None); assert torch.equal(body(x), m.body(x)) and len(meta['mean'])==n_in

@pytest.mark.parametrize('f', [byol_vision_learner,byol_unet_learner])
def test_the_signature_promises_only_what_can_be_passed(f):
    import inspect
    assert not {'n_in','pretrained','weights','cut','arch'}&set(inspect.signature(f).parameters)

# --- files

@pytest.fixture
def file(tmp_path): return save_body(stir(BYOL(Own(), layer='pool', **quick)), tmp_path/'body')

@pytest.mark.parametrize('keep', [0, 4, 8, 100, .3, .9, -1])
def test_a_truncated_file_is_refused(file, keep):
    b = file.read_bytes(); file.write_bytes(b[:keep] if isinstance(keep, int) else b[:int(len(b)*keep)])
    with pytest.raises(ValueError, match='cut short'): load_body(file)

@pytest.mark.parametrize('at,byte', [(0,255), (9,0), (60,0)])
def test_a_corrupted_head_is_refused(file, at, byte):
    b = bytearray(file.read_bytes()); b[at] = byte; file.write_bytes(bytes(b))
    with pytest.raises(ValueError): load_body(file)

def rewrite(file, meta=None, sd=None):
    "The file with other metadata or weights, and their checksum"
    from safetensors import safe_open
    from fastbyol.transfer import _digest
    with safe_open(file, 'pt') as f: text,old = f.metadata()['fastbyol'],{k:f.get_tensor(k) for k in f.keys()}
    new,text = sd(old) if sd else old,meta if isinstance(meta, str) else json.dumps({**json.loads(text), **(meta or {})})
    save_file(new, file, metadata=dict(fastbyol=text, sha256=_digest(text, new)))

@pytest.mark.parametrize('sd,msg', [(lambda s: {k:v for k,v in s.items() if 'conv.weight' not in k}, 'missing, first module.conv.weight'),
    (lambda s: {**s,'z':torch.zeros(1)}, 'unexpected, first z'), (lambda s: {**s,'module.conv.bias':torch.zeros(3)}, r'\(3,\) instead of \(12,\)')])
def test_weights_that_do_not_fit_are_named(file, sd, msg):
    rewrite(file, sd=sd)
    with pytest.raises(ValueError, match=msg): load_body(file, arch=Own())

def test_flipped_bytes_are_refused_or_do_no_harm(file):
    whole,sd,r,n = file.read_bytes(),load_body(file)[0].state_dict(),random.Random(0),Counter()
    head = int.from_bytes(whole[:8], 'little')+8
    for i in range(1000): # every other one in the head, which is the smaller part
        b = bytearray(whole); at = r.randrange(head if i%2 else len(b)); b[at] ^= r.randrange(1, 256); file.write_bytes(b)
        try: body,meta = load_body(file)
        except ValueError as e: assert file.name in str(e); n['refused'] += 1
        else: assert same_sd(body.state_dict(), sd) and meta['arch'].endswith(':Own'); n['loaded'] += 1
    assert n['refused']>990, n

@pytest.mark.parametrize('tenth', range(10))
def test_every_tenth_of_a_file_is_refused(file, tenth):
    b = file.read_bytes(); file.write_bytes(b[:len(b)*tenth//10])
    with pytest.raises(ValueError, match='cut short'): load_body(file)

@pytest.mark.parametrize('lost', ['sha256','both'])
def test_a_file_without_checksum_loads_only_if_it_never_had_one(file, lost):
    from safetensors import safe_open
    with safe_open(file, 'pt') as f: text,sd = json.loads(f.metadata()['fastbyol']),{k:f.get_tensor(k) for k in f.keys()}
    if lost=='both': del text['checksum']
    save_file(sd, file, metadata=dict(fastbyol=json.dumps(text)))
    if lost=='both': assert same_sd(load_body(file)[0].state_dict(), sd)
    else:
        with pytest.raises(ValueError, match='damaged'): load_body(file)

def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1'); m = BYOL(Own(), layer='pool', **quick)
    assert save_body(m, tmp_path/'b').name=='b.safetensors' and not list(tmp_path.iterdir())

@pytest.mark.parametrize('meta', ['{}', 'nonsense', '{"format":1}'])
def test_metadata_that_says_nothing_is_refused(file, meta):
    rewrite(file, meta)
    with pytest.raises(ValueError, match='body.safetensors'): load_body(file)

def test_a_newer_format_asks_for_an_update(file):
    rewrite(file, dict(format=99))
    with pytest.raises(ValueError, match='update fastbyol'): load_body(file)

@pytest.mark.parametrize('kind,arch', [('callable','os:system'), ('callable','builtins:eval'), ('module','os:system'), ('module','subprocess:Popen'), ('callable','torchvision.no_such:x')])
def test_a_file_cannot_make_us_run_what_it_names(file, kind, arch):
    rewrite(file, dict(kind=kind, arch=arch))
    with pytest.raises((ValueError,ImportError)): load_body(file)

@pytest.mark.parametrize('exc,msg,f', [
    (FileNotFoundError, 'save_body', lambda d: load_body(d/'nothing')), (ValueError, 'not a readable', lambda d: load_body(d)),
    (TypeError, 'Learner', lambda d: save_body(Own(), d/'x')), (TypeError, 'Learner', lambda d: byol_vision_learner(class_dls(), Own())),
    (TypeError, 'plain numbers', lambda d: save_body(BYOL(Own(),layer='pool',**quick), d/'x', note=torch.zeros(1)))])
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
    with pytest.raises(OSError, match='disk full'): save_body(BYOL(Own(),layer='pool',**quick), file)
    assert file.read_bytes()==old and [o.name for o in file.parent.iterdir()]==[file.name]

def test_the_file_holds_the_body_alone_and_what_rebuilds_it(tmp_path):
    m = pretrained('resnet18', n_in=1, small_stem=True, stats=((.1,),(.2,))); m.view_size = 32
    f = save_body(m, tmp_path/'a.b', epochs=7); assert f.name=='a.b.safetensors' and set(load_file(f))==set(m.body.state_dict())
    meta = load_body(tmp_path/'a.b')[1]
    assert {k:meta[k] for k in ('kind','arch','n_in','small_stem','n_features','view_size','info')}==dict(kind='timm',arch='resnet18',n_in=1,small_stem=True,n_features=512,view_size=32,info=dict(epochs=7))
    np.testing.assert_allclose(meta.spec.stats, ((.1,),(.2,)), rtol=1e-6)

@pytest.mark.parametrize('make,dls,msg', [
    (lambda: pretrained('resnet18', n_in=1), lambda: class_dls(), 'images of 1 channels, the data has 3.*n_in=3'),
    (lambda: BYOL('vit_tiny_patch16_224', **quick), lambda: class_dls(32), 'size=224')])
def test_images_that_do_not_suit_the_body_are_named(make, dls, msg):
    with pytest.raises(ValueError, match=msg): byol_vision_learner(dls(), make(), **clas)

# --- timm and U-Nets

@pytest.mark.parametrize('arch,kw,rep', [('resnet18',{},None), ('resnet18',dict(small_stem=True,n_in=1),None), ('resnet26d',dict(small_stem=True),None), ('vit_tiny_patch16_224',dict(img_size=32),None),
    ('mobilenetv3_small_100',dict(n_in=4),'(2, 3)'), ('convnext_atto',{},'(2, 3)'), ('test_mambaout',{},'(1, 2)')])
def test_to_timm_computes_the_same_or_says_what_does(arch, kw, rep, tmp_path, recwarn):
    m = pretrained(arch, **kw); t = to_timm(m, num_classes=3).eval(); x = torch.randn(2,kw.get('n_in',3),32,32); assert not any('forward_features' in str(o.message) for o in recwarn)
    with torch.no_grad():
        assert t(x).shape==(2,3)
        torch.testing.assert_close(t.forward_features(x), m.body.model.forward_features(x))
        net = to_timm(save_body(m, tmp_path/'b')).eval(); said = [re.search('use `(.*)`$', str(o.message)) for o in recwarn if 'forward_features' in str(o.message)]
        assert [o[1] for o in said]==([f'net.forward_features(x).mean({rep})'] if rep else [])
        torch.testing.assert_close(eval(said[0][1]) if rep else net(x), m.embed(x)) # what it says gives the representation
        if rep: assert net(x).shape!=m.embed(x).shape or not torch.allclose(net(x), m.embed(x), rtol=1e-3, atol=1e-4) # and was worth saying
    assert isinstance(t, type(timm.create_model(arch))) and tuple(t.pretrained_cfg['mean'])==m.stats[0] and t.num_classes==3
    with torch.no_grad(): [p.zero_() for p in t.parameters()]
    assert m.embed(x).abs().sum()>0 # a copy

def test_to_timm_is_for_timm_names():
    with pytest.raises(TypeError, match='source.body'): to_timm(pretrained(resnet18))

def mask_dls(n_in=3, n=12, size=64, norm=None):
    items = [(TensorImage(o),TensorMask((o[0]>.5).long())) for o in noise(n,size,n_in)]
    dl = lambda its: TfmdDL(its, bs=4, num_workers=0, device=cpu, after_batch=norm)
    return DataLoaders(dl(items[:8]), dl(items[8:]), device=cpu)
seg = dict(n_out=2, loss_func=CrossEntropyLossFlat(axis=1))

@pytest.mark.parametrize('arch', [resnet18,xresnet18], ids=['torchvision','fastai'])
def test_unet_learner_is_fastais_own(arch):
    m = pretrained(arch); ours = hush(byol_unet_learner(mask_dls(), m, **seg))
    theirs = hush(unet_learner(mask_dls(norm=[Normalize.from_stats(*m.stats)]), arch, pretrained=False, normalize=False, **seg)); theirs.freeze()
    theirs.model.load_state_dict(ours.model.state_dict())
    shapes = lambda l: [[p.shape for p in g] for g in l.opt.param_lists]
    assert str(ours.model)==str(theirs.model) and shapes(ours)==shapes(theirs) and ours.opt.frozen_idx==theirs.opt.frozen_idx>0
    for a,b in zip(ours.get_preds(), theirs.get_preds()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    x = torch.randn(2,3,64,64); torch.testing.assert_close(body_of(ours, x), m.body(x).detach())

@pytest.mark.parametrize('arch,kw,size', [('resnet18',{},64), ('mobilenetv3_small_100',dict(n_in=4),64), (resnet18,dict(small_stem=True),16), ('resnet18',dict(n_in=1,small_stem=True),16)])
def test_unet_of_every_kind_of_body_fine_tunes(arch, kw, size):
    n_in = kw.get('n_in', 3); learn = byol_learn(image_dls(noise(16,size,n_in)), pretrained(arch, **kw))
    u = hush(learn.to_unet_learner(mask_dls(n_in, size=size), **seg)); x = torch.randn(2,n_in,size,size); m = learn.model.eval()
    got = body_of(u, x); assert got.shape[1]<=m.n_features
    if got.shape[1]==m.n_features: torch.testing.assert_close(got, m.body(x).detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(next(u.model[0].parameters()), next(m.body.parameters())) and not next(u.model[0].parameters()).requires_grad
    u.fine_tune(1); assert u.get_preds()[0].shape==(4,2,size,size)

def test_a_body_on_a_gpu_comes_to_the_cpu_where_the_rest_of_a_unet_is_made():
    "`DynamicUnet` runs on the body's features what it has just made; 'meta' stands for the GPU"
    class Away(nn.Sequential):
        def cpu(self): return self.to_empty(device='cpu')
    m = small_byol(); body = Away(*m.body).to('meta')
    with fastbyol.transfer._as_arch(body, m.spec) as arch: assert {p.device.type for p in arch().parameters()}=={'cpu'} and next(body.parameters()).device.type=='meta'

@pytest.mark.parametrize('make', [byol_vision_learner,byol_unet_learner])
@pytest.mark.parametrize('arch', ['resnet18',resnet18,conv_body()], ids=['timm','torchvision','own'])
def test_the_learner_is_where_its_data_is(make, arch):
    d = mask_dls(); x,y = first(d.train); d.one_batch = lambda: (x,y); d.device = torch.device('meta')
    assert {p.device.type for p in make(d, BYOL(arch, **quick), normalize=False, **seg).model.parameters()}=={'meta'}

def test_a_unet_needs_layers_in_a_row():
    with pytest.raises(TypeError, match='one after the other.*resnet18'): byol_unet_learner(mask_dls(), BYOL('vit_tiny_patch16_224', img_size=64, **quick), **seg)
