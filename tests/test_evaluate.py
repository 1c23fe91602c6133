"Embeddings in order and normalised once; nearest neighbours against scikit-learn, in bounded memory"
from conftest import *
from fastbyol.core import eval_mode
from fastbyol.transfer import Encoder
import subprocess
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset, DataLoader as TorchDL

stats = [.4]*3,[.2]*3

def dl_of(x, y=None, norm=None, **kw):
    items = [(TensorImage(o),) if y is None else (TensorImage(o),TensorCategory(y[i])) for i,o in enumerate(x)]
    return TfmdDL(items, **{**dict(bs=8, num_workers=0, after_batch=norm, device=cpu), **kw})

def pil(x): return PILImage.create((x.permute(1,2,0)*255).byte().numpy().copy())
def write_images(path, x):
    path.mkdir(exist_ok=True)
    for i,o in enumerate(x): pil(o).save(path/f'{i}.png')
    return path

@pytest.fixture
def model(): return small_byol(stats=stats)

def embedded(m, x, target=False):
    with eval_mode(m): return m.embed((x-.4)/.2, target=target)

close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)

# --- embeddings

@pytest.mark.parametrize('norm', [None, imagenet_stats, stats])
@pytest.mark.parametrize('kw', [{}, dict(shuffle=True, drop_last=True)])
def test_embeddings_are_the_bodys_in_the_items_order_whatever_the_loader_does(model, norm, kw):
    x = noise(29)
    f,y = get_embeddings(model, dl_of(x, list(range(29)), norm and [Normalize.from_stats(*norm, cuda=False)], **kw))
    assert y.tolist()==list(range(29)) and f.dtype==torch.float32 and type(f) is type(y) is Tensor
    close(f, embedded(model, x))

class OddOnes(torch.utils.data.Dataset):
    "What has a length and items, as plain torch likes it"
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],i

torch_loaders = dict(plain=lambda x: TorchDL(TensorDataset(x), 8), shuffled=lambda x: TorchDL(OddOnes(x), 8, shuffle=True),
    list=lambda x: TorchDL(list(x), 8),
    sampler=lambda x: TorchDL(OddOnes(x), batch_sampler=BatchSampler(RandomSampler(OddOnes(x)), 8, True)))
@pytest.mark.parametrize('kind', torch_loaders)
def test_embeddings_of_torch_loaders_are_in_order(model, kind):
    x = noise(29); f,y = get_embeddings(model, torch_loaders[kind](x))
    close(f, embedded(model, x)); assert y is None or y.tolist()==list(range(29))

def test_embeddings_of_the_target(model):
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in model.target.parameters()]
    x = noise(8); f,_ = get_embeddings(model, dl_of(x), target=True)
    close(f, embedded(model, x, True)); assert not torch.allclose(f, embedded(model, x))

@pytest.mark.parametrize('source', ['learner','byol','file','loaded','encoder'])
def test_every_kind_of_source(model, source, tmp_path):
    file = save_body(model, tmp_path/'b'); x = noise(8); net = conv_body()
    src = dict(learner=lambda: byol_learn(model=model), byol=lambda: model, file=lambda: load_body(file, arch=net),
               loaded=lambda: load_body(file, arch=net), encoder=lambda: as_encoder(model))[source]()
    close(get_embeddings(src, dl_of(x))[0], embedded(model, x))

def test_looking_changes_neither_weights_nor_modes_nor_random_numbers(model):
    model.train(); model.body[1].eval(); before,modes = sd_of(model),[o.training for o in model.modules()]
    state = torch.get_rng_state()
    f,_ = get_embeddings(model, dl_of(noise(20), shuffle=True)); assert not f.requires_grad
    assert same_sd(sd_of(model), before) and [o.training for o in model.modules()]==modes
    assert torch.equal(torch.get_rng_state(), state)

def test_embeddings_of_training_data_are_not_augmented(model):
    x = noise(16); ims = [pil(o) for o in x]
    block = DataBlock((ImageBlock,CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: i%2, splitter=IndexSplitter([15]),
                      batch_tfms=aug_transforms(size=16))
    dls = block.dataloaders(range(16), bs=8, num_workers=0, device=cpu)
    f,_ = get_embeddings(model, dls.train)
    torch.testing.assert_close(f, embedded(model, (x[:15]*255).byte().float()/255), rtol=1e-2, atol=1e-2)

def test_embeddings_of_some_of_the_items(model):
    x = noise(29); some = dl_of(x, list(range(29)), n=10)
    f,y = get_embeddings(model, some); assert y.tolist()==list(range(10)); close(f, embedded(model, x[:10]))
    picked = dl_of(x, list(range(29)), n=3, get_idxs=lambda: [7,2,5])
    assert get_embeddings(model, picked)[1].tolist()==[7,2,5] and list(picked.get_idxs())==[7,2,5]

def test_the_loader_inside_a_distributed_one_is_embedded(model):
    from fastai.distributed import DistributedDL
    x = noise(29); norm = [Normalize.from_stats(*stats, cuda=False)]
    f,y = get_embeddings(model, DistributedDL(dl_of(x, list(range(29)), norm, shuffle=True, drop_last=True), 1, 2))
    assert y.tolist()==list(range(29)); close(f, embedded(model, x))

@pytest.mark.parametrize('f,exc,msg', [
    (lambda m: get_embeddings(m, image_dls(noise(16))), TypeError, r'dls\.train'),
    (lambda m: get_embeddings(m, dl_of(noise(4)*255)), ValueError, 'IntToFloatTensor'),
    (lambda m: get_embeddings(m, dl_of([])), ValueError, 'empty'),
    (lambda m: knn_accuracy(m, dl_of(noise(4)), dl_of(noise(4),[0]*4)), ValueError, '`train_dl` has none'),
    (lambda m: knn_accuracy(m, dl_of(noise(4),[0]*4), dl_of(noise(4))), ValueError, '`test_dl` has none')])
def test_mistakes_are_named(model, f, exc, msg):
    with pytest.raises(exc, match=msg): f(model)

# --- several processes

def loaders(path):
    "Loaders of every kind and of awkward sizes, by name"
    from fastai.distributed import DistributedDL
    x = noise(29); y = [i*3 for i in range(29)]; plain = dl_of(x, y, shuffle=True, drop_last=True)
    def files(in_memory):
        return unlabelled_dls(path, 16, bs=4, valid_pct=0, in_memory=in_memory, num_workers=0, device=cpu).train
    return dict(fastai=plain, wrapped=DistributedDL(plain), one=dl_of(x[:1], y[:1]), part=dl_of(x, y, n=7),
                unlabelled=dl_of(x), torch=TorchDL(OddOnes(x), 8, shuffle=True), memory=files(True), files=files(False))

script = '''
import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from test_evaluate import *
import torch.distributed as dist
torch.set_num_threads(1); default_device(use=False); dist.init_process_group('gloo'); rank = dist.get_rank()
set_seed(0); model = small_byol(); path = Path(sys.argv[2]); seen = []
_ = model.body.register_forward_hook(lambda m,i,o: seen.append(len(o)))
res,n_seen = {},{}
set_seed(rank)
for nm,dl in loaders(path/'im').items():
    seen.clear(); state = torch.get_rng_state(); res[nm] = get_embeddings(model, dl, sharded=True); n_seen[nm] = sum(seen)
    assert torch.equal(state, torch.get_rng_state()), nm
seen.clear(); everything = get_embeddings(model, dl_of(noise(29))); assert sum(seen)==29 # not asked to share
x,y = noise(40),[i%3 for i in range(40)]
acc = knn_accuracy(model, dl_of(x[:30], y[:30]), dl_of(x[30:], y[30:]), k=5, sharded=True)
class Bad(OddOnes):
    def __getitem__(self, i):
        if i==28: raise OSError('disk on fire')
        return self.x[i],i
try: get_embeddings(model, TorchDL(Bad(noise(29)), 8), sharded=True); msg = ''
except (OSError,RuntimeError) as e: msg = f'{type(e).__name__}: {e}'
torch.save(dict(res=res, n_seen=n_seen, acc=acc, msg=msg), path/f'{rank}.pth')
dist.barrier(); dist.destroy_process_group() # else a thread of gloo's may abort the process as it ends
'''

@pytest.mark.slow
def test_processes_share_the_images_and_each_gets_all_features_in_order(model, tmp_path):
    images = write_images(tmp_path/'im', noise(9,20)); (tmp_path/'s.py').write_text(script)
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
           tmp_path/'s.py', Path(__file__).parent, tmp_path]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=300); assert res.returncode==0, res.stderr[-3000:]
    ranks = [torch.load(tmp_path/f'{r}.pth') for r in range(2)]
    set_seed(0); model = small_byol(); x,y = noise(40),[i%3 for i in range(40)]
    for nm,dl in loaders(images).items():
        f,labels = get_embeddings(model, dl.dl if nm=='wrapped' else dl)
        for feats,got in (r['res'][nm] for r in ranks):
            close(feats, f, msg=lambda m: f'{nm}: {m}'); assert (labels is got is None) or torch.equal(got, labels)
        shares = [r['n_seen'][nm] for r in ranks]; assert sum(shares)==len(f) and max(shares)-min(shares)<=1, nm
    want = knn_accuracy(model, dl_of(x[:30], y[:30]), dl_of(x[30:], y[30:]), k=5); assert [r['acc'] for r in ranks]==[want]*2
    # one process fails in its share: the other does not wait for it for ever
    first_,second = (r['msg'] for r in ranks)
    assert first_.startswith('RuntimeError: Process 1') and second.startswith('OSError') and 'disk on fire' in first_

# --- nearest neighbours

def sk(bank, y, q, k, t=.07):
    clas = KNeighborsClassifier(min(k,len(bank)), weights=lambda d: np.exp((1-d)/t), metric='cosine', algorithm='brute')
    return torch.tensor(clas.fit(bank.double(), y).predict(q.double()))

@pytest.mark.parametrize('k,t,classes', [(1,.07,7), (20,.07,1), (20,.5,2), (100,.07,50), (1000,.5,7)])
def test_knn_is_that_of_scikit_learn(k, t, classes):
    bank,q,y = torch.randn(300,16)*torch.rand(300,1)*9,torch.randn(80,16),torch.randint(0,classes,(300,))
    assert torch.equal(knn_predict(bank, y, q, k, t), sk(bank, y, q, k, t))

@pytest.mark.parametrize('k,t', [(1,.07), (20,.02), (200,.07), (200,.5)])
def test_knn_of_real_images_is_that_of_scikit_learn(k, t):
    d = load_digits(); x,y = torch.tensor(d.data, dtype=torch.float32),torch.tensor(d.target)
    pred = knn_predict(x[:1200], y[:1200], x[1200:], k, t)
    assert torch.equal(pred, sk(x[:1200], y[:1200], x[1200:], k, t)) and (k>20 or (pred==y[1200:]).float().mean()>.8)

def test_accuracy_of_a_body_is_that_of_scikit_learn(model):
    d = load_digits(); y = d.target[:400].tolist()
    x = F.interpolate(torch.tensor(d.images[:400], dtype=torch.float32)[:,None].expand(-1,3,-1,-1)/16, (16,16))
    f = embedded(model, x); want = (sk(f[:300], torch.tensor(y[:300]), f[300:], 20)==torch.tensor(y[300:])).float().mean().item()
    acc = knn_accuracy(model, dl_of(x[:300], y[:300], shuffle=True), dl_of(x[300:], y[300:]))
    assert acc==pytest.approx(want, abs=1e-6) and want>.15

@pytest.mark.parametrize('block,k', [(1,3), (64,20), (64,300), (299,20), (5000,300)])
def test_the_nearest_are_found_block_by_block(block, k):
    from fastbyol.evaluate import _nearest
    bank,q = torch.randn(300,16)*torch.rand(300,1)*9,F.normalize(torch.randn(80,16))
    want = (q.double() @ F.normalize(bank.double()).T).topk(k)
    sims,rows = _nearest(q, bank, k, block); order = sims.argsort(1, descending=True)
    assert torch.equal(rows.gather(1, order), want.indices)
    torch.testing.assert_close(sims.gather(1, order).double(), want.values, rtol=1e-5, atol=1e-6)

def test_features_of_half_precision_and_of_whole_numbers():
    bank,q,y = torch.randn(300,16),torch.randn(80,16),torch.randint(0,7,(300,))
    assert torch.equal(knn_predict(bank.half(), y, q.half()), sk(bank.half().float(), y, q.half().float(), 20))
    b,r = (bank*100).int(),(q*100).int(); assert torch.equal(knn_predict(b, y, r), sk(b, y, r, 20))

@pytest.mark.parametrize('chunk', [7,1000])
def test_chunks_change_nothing(chunk):
    bank,q,y = torch.randn(300,16),torch.randn(80,16),torch.randint(0,7,(300,))
    assert torch.equal(knn_predict(bank,y,q,chunk=chunk), knn_predict(bank,y,q))

def test_the_nearest_neighbour_is_not_skipped():
    bank = torch.randn(200,16); y = torch.arange(200)
    assert torch.equal(knn_predict(bank, y, bank, k=1), y) and torch.equal(knn_predict(bank, y, bank, temperature=.001), y)

def test_labels_may_be_any_integers_and_the_bank_smaller_than_k():
    bank = torch.randn(5,8); y = torch.tensor([-7,100,3,100,3])
    assert torch.equal(knn_predict(bank, y, bank, k=50, temperature=1e-3), y)

memory_script = '''
import re, sys, torch; from pathlib import Path; from fastbyol.evaluate import knn_predict
torch.set_num_threads(1)
def status(key): return int(re.search(rf'{key}:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
def rise(f): start = status('VmRSS'); f(); return status('VmHWM')-start
g = lambda *s: torch.randn(*s)
bank,q,y = g(60_000,512),g(40,512),torch.randint(0,10,(60_000,)) # the bank: 117 MiB
print(rise(lambda: knn_predict(bank, y, q)), rise(lambda: knn_predict(q, y[:40], bank)), end=' ')
part,q = bank[:20_000,:32].contiguous(),g(4000,32) # all similarities together: 305 MiB
print(rise(lambda: knn_predict(part, y[:20_000], q)), rise(lambda: (q@part.T).topk(20)))
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_memory_is_bounded_by_a_chunk_and_neither_bank_nor_queries_are_copied(tmp_path):
    (tmp_path/'s.py').write_text(memory_script) # a process of its own: the largest size ever is what the system remembers
    res = subprocess.run([sys.executable, tmp_path/'s.py'], capture_output=True, text=True); assert res.returncode==0, res.stderr[-2000:]
    few,many,chunks,plain = map(float, res.stdout.split()); assert max(few,many,chunks)<110 and plain>250, res.stdout

@pytest.mark.parametrize('kw,msg', [
    (dict(k=0),'`k`'), (dict(chunk=0),'`chunk`'), (dict(temperature=0.),'temperature'),
    (dict(labels=torch.zeros(3)),'10 images, 3 labels'), (dict(bank=torch.randn(0,4), labels=torch.zeros(0)),'0 images'),
    (dict(bank=torch.full((10,4), math.inf)),'NaN or inf'), (dict(queries=torch.full((3,4), math.nan)),'NaN or inf')])
def test_knn_mistakes_are_named(kw, msg):
    args = dict(bank=torch.randn(10,4), labels=torch.zeros(10), queries=torch.randn(3,4))
    with pytest.raises(ValueError, match=msg): knn_predict(**{**args, **kw})

# --- labels

def few_dls(n_train, n_c=3, size=16, **kw):
    y = [i%n_c for i in range(n_train+12)]; x = noise(n_train+12, size)*.3
    for i,c in enumerate(y): x[i,:,c*size//3:(c+1)*size//3] += .6
    return image_dls(x.clamp(0,1), 12, y=y, drop_last=False, **kw)

# several classes, an age, a share, a mask, an age in whole numbers as a column
odd_labels = [TensorMultiCategory([1.,0.,1.]), tensor(39.), tensor(.5), torch.zeros(4,4).long(), tensor([39])]
users = dict(knn_accuracy=lambda m, dls: knn_accuracy(m, *dls), linear_eval=linear_eval, label_efficiency=label_efficiency)
@pytest.mark.parametrize('y', odd_labels)
@pytest.mark.parametrize('user', users)
def test_labels_that_are_no_classes_are_refused_before_any_work(user, y):
    x,m,seen = noise(24),small_byol(),[]; m.body.register_forward_hook(lambda *o: seen.append(o))
    def dl(): return TfmdDL([(TensorImage(o),y) for o in x], bs=8, num_workers=0, device=cpu)
    with pytest.raises(ValueError, match=f'`{user}` needs labels, one class per image'): users[user](m, DataLoaders(dl(), dl(), device=cpu))
    assert not seen

def test_loaders_of_different_classes_do_not_vote():
    m,a,b = small_byol(),few_dls(12).train,few_dls(12).valid; a.vocab,b.vocab = ['cat','dog','owl'],['dog','owl','cat']
    with pytest.raises(ValueError, match='different classes'): knn_accuracy(m, a, b)
    b.vocab = a.vocab; assert 0<=knn_accuracy(m, a, b)<=1

# --- linear evaluation

def test_fast_linear_evaluation_is_logistic_regression(model):
    dls = few_dls(60); (f,y),(t,ty) = (get_embeddings(model, o) for o in dls.loaders)
    res = linear_eval(model, dls, fast=True, Cs=(1.,)); mean,std = f.mean(0),f.std(0)+1e-6
    clas = LogisticRegression(C=1., max_iter=5000).fit((f-mean)/std, y)
    assert res.top1==pytest.approx(clas.score((t-mean)/std, ty)) and res.by=='C' and res.ci[0]<=res.top1<=res.ci[1]

def test_linear_evaluation_learns_and_repeats(model):
    dls = few_dls(60); view = partial(torch.mul, 1.)
    a,b = (linear_eval(model, dls, epochs=10, lr=20., view=view, seed=1) for _ in range(2))
    assert a==b and a.top1>.6 and a.chosen in a.valid and a.n==12 and a.top5 is None

def test_heads_that_choose_do_not_see_the_held_out_images():
    from fastbyol.evaluate import _Heads
    heads = _Heads(4, 2, [.1], 10, 'cpu'); x,y,seen = torch.randn(6,4),torch.tensor([0,1,0,1,0,1]),torch.arange(6)<4
    x[4:] *= 100; heads.step(x, y, seen)
    w = torch.zeros(2,4,requires_grad=True); F.cross_entropy(x[:4]@w.T, y[:4]).backward()
    step = -.1*1.9*w.grad # Nesterov's first step
    close(heads.choosers[0].weight.detach(), step); assert not torch.allclose(heads.final[0].weight.detach(), step)

def test_an_error_in_the_middle_leaves_gradients_on(model):
    calls = []
    def broken(x):
        calls.append(1)
        if len(calls)>1: raise KeyError('view')
        return x
    with pytest.raises(KeyError): linear_eval(model, few_dls(24), epochs=2, view=broken)
    assert torch.is_grad_enabled()

def test_a_class_that_was_not_trained_counts_as_wrong(model):
    x = noise(40); y = [i%2 for i in range(30)]
    dls = DataLoaders(dl_of(x[:30], y), dl_of(x[30:], [7]*10)); assert linear_eval(model, dls, fast=True).top1==0

@pytest.mark.parametrize('kw,msg', [(dict(epochs=0),'`epochs`'), (dict(lr=0),'above 0'), (dict(Cs=(0.,)),'above 0'), (dict(size=2),'`size`'),
                                    (dict(epochs=9, lr=1e40, sweep=(1.,)),'diverged')])
def test_linear_mistakes_are_named(model, kw, msg):
    with pytest.raises(ValueError, match=msg): linear_eval(model, few_dls(24), **kw)

# --- few labels

def test_a_draw_that_repeats_is_no_draw():
    m = small_byol(); kw = dict(seeds=3, contestants=('BYOL, linear','pixels, nearest'))
    with pytest.warns(UserWarning, match='fewer different draws.*per_class=4'): res = label_efficiency(m, few_dls(12), per_class=(2,4), **kw)
    assert set(res[res.per_class==4].n)=={1} and set(res[res.per_class==2].n)=={3}
    assert not res.table()[4].str.contains('±').any() and res.table()[2].str.contains('±').all()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning); label_efficiency(m, few_dls(24), per_class=(2,4), **kw)

def test_random_weights_compete_where_they_are_named():
    names = ('random weights, linear','random weights, fine-tuned','BYOL, linear')
    res = label_efficiency(small_byol(), few_dls(12), per_class=(2,), seeds=1, steps=2, contestants=names)
    assert list(res.contestant)==list(names) and res['mean'].between(0,1).all()

def test_labels_are_drawn_from_the_items_of_the_loader():
    dls = few_dls(24); dls.train.get_idxs,dls.train.n = (lambda: [5,4,3,2,1,0]),6
    res = label_efficiency(small_byol(), dls, per_class=(2,), seeds=1, contestants=('pixels, nearest',), steps=1)
    f,y = torch.stack([dls.train.dataset[i][0].flatten() for i in range(6)]),torch.arange(6)%3
    test = torch.stack([o[0].flatten() for o in dls.valid.dataset]); want = knn_predict(f, y, test, k=1)
    assert res['mean'][0]==pytest.approx((want==torch.arange(24,36)%3).float().mean().item())

small_vit = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
def vit_file(tmp_path): return save_body(BYOL('vit_tiny_patch16_224', hidden_size=8, projection_size=8, **small_vit), tmp_path/'vit')

@pytest.mark.parametrize('norm', [None, [Normalize.from_stats(*stats, cuda=False)]])
def test_a_body_of_another_architecture_size_and_statistics_competes(tmp_path, norm):
    file = vit_file(tmp_path); dls = few_dls(18, size=64, norm=norm)
    enc = as_encoder(file); enc.set_stats(([.1]*3,[.9]*3))
    kinds,others = ('BYOL, linear','BYOL, fine-tuned'),{'ViT':enc, 'file':file}
    res = label_efficiency(small_byol(stats=stats), dls, per_class=(2,), seeds=1, steps=2, contestants=kinds, others=others)
    assert list(res.contestant)==[*kinds, *[f'{o}, {kind}' for o in others for kind in ('linear','fine-tuned')]]
    def embed(dl):
        x = torch.stack([o[0] for o in dl.dataset])
        x = F.interpolate(x, (32,32), mode='bicubic', antialias=True).clamp(0,1)
        with eval_mode(enc.body): return enc(enc.normalize(x))
    f,t = map(embed, dls.loaders); mean,std = f.mean(0),f.std(0); y = torch.arange(30)%3
    rows = few_labels(y[:18], y[:18], seed=0, per_class=2)
    clas = LogisticRegression(max_iter=5000).fit(((f-mean)/std)[rows], y[rows])
    assert res[res.contestant=='ViT, linear']['mean'].item()==pytest.approx(clas.score((t-mean)/std, y[18:]))

def test_the_data_is_left_as_it_was(tmp_path):
    dls = few_dls(18, size=64, norm=[Normalize.from_stats(*stats, cuda=False)]); before = list(dls.train.after_batch.fs)
    label_efficiency(small_byol(), dls, per_class=(2,), seeds=1, steps=1, others={'ViT':vit_file(tmp_path)})
    assert list(dls.train.after_batch.fs)==before

@pytest.mark.parametrize('kw,msg', [(dict(seeds=0),'seeds'), (dict(contestants=('magic',)),'Unknown contestant'), (dict(per_class=(500,)),'500 per class')])
def test_label_efficiency_names_mistakes(kw, msg):
    with pytest.raises(ValueError, match=msg): label_efficiency(small_byol(), few_dls(12), **kw)

def test_label_efficiency_says_what_data_it_takes():
    dl = TorchDL([(o,0) for o in noise(8)], batch_size=4)
    with pytest.raises(TypeError, match="fastai's data loaders, got DataLoader"): label_efficiency(small_byol(), DataLoaders(dl, dl))

def test_names_of_contestants_are_drawn_as_they_are():
    names = ['$5_$10_bill','_background','a_b']
    res = LabelEfficiency([dict(contestant=o, per_class=n, mean=.5, sd=.1, n=2) for o in names for n in (1,5)])
    ax = res.plot(); ax.figure.canvas.draw() # matplotlib reads names as it draws
    texts = [o.get_text() for o in ax.get_legend().get_texts()]
    assert len(texts)==3 and texts[0].replace('\\', '')==names[0] and texts[1].endswith('_background') and texts[2]=='a_b'
    assert list(res.table().index)==names; plt.close('all')

@pytest.mark.parametrize('h,w,size', [(256,256,224), (300,260,224), (64,48,96), (32,32,32)])
def test_images_are_tested_on_their_middle(h, w, size):
    from fastbyol.evaluate import _middle
    ramp = torch.linspace(0, 1, w).expand(2,3,h,w); got = _middle(ramp, size)
    assert got.shape==(2,3,size,size) and abs(got.mean()-.5)<.01
    side = max(size, min(round(size*8/7), h, w)); assert (got[0,0,0,-1]-got[0,0,0,0])==pytest.approx(size/(w*side/min(h,w)), abs=.02)
