"Embeddings in order and normalised once; nearest neighbours against scikit-learn, in bounded memory"
from conftest import *
from fastbyol.core import eval_mode
import subprocess
from sklearn.neighbors import KNeighborsClassifier

def dl_of(x, y=None, norm=None, **kw):
    items = [(TensorImage(o),) if y is None else (TensorImage(o),TensorCategory(y[i])) for i,o in enumerate(x)]
    return TfmdDL(items, **{**dict(bs=8, num_workers=0, after_batch=norm, device=cpu), **kw})

@pytest.fixture
def model(): return small_byol(stats=([.4]*3,[.2]*3))

def embedded(m, x, target=False):
    with eval_mode(m): return m.embed((x-.4)/.2, target=target)

@pytest.mark.parametrize('norm', [None, imagenet_stats, ([.4]*3,[.2]*3)])
@pytest.mark.parametrize('kw', [{}, dict(shuffle=True, drop_last=True)])
def test_embeddings_are_the_bodys_in_the_items_order_whatever_the_loader_does(model, norm, kw):
    x = noise(29); dl = dl_of(x, list(range(29)), norm and [Normalize.from_stats(*norm,cuda=False)], **kw)
    f,y = get_embeddings(model, dl); assert y.tolist()==list(range(29)) and f.dtype==torch.float32 and type(f) is type(y) is Tensor
    torch.testing.assert_close(f, embedded(model, x), rtol=1e-3, atol=1e-4)

def test_embeddings_of_a_shuffled_torch_loader_are_in_order(model):
    from torch.utils.data import TensorDataset, DataLoader as TorchDL
    x = noise(29); f,_ = get_embeddings(model, TorchDL(TensorDataset(x), 8, shuffle=True)); torch.testing.assert_close(f, embedded(model, x), rtol=1e-3, atol=1e-4)

def test_embeddings_of_plain_torch_loaders(model):
    from torch.utils.data import TensorDataset, DataLoader as TorchDL
    x = noise(29)
    for ds in (TensorDataset(x), TensorDataset(x, torch.arange(29)), list(x)):
        f,y = get_embeddings(model, TorchDL(ds, 8)); torch.testing.assert_close(f, embedded(model, x), rtol=1e-3, atol=1e-4)
        assert y is None or y.tolist()==list(range(29))

def test_embeddings_of_the_target(model):
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in model.target.parameters()]
    x = noise(8); f,_ = get_embeddings(model, dl_of(x), target=True); torch.testing.assert_close(f, embedded(model, x, True)); assert not torch.allclose(f, embedded(model, x))

@pytest.mark.parametrize('source', ['learner','byol','file','loaded'])
def test_every_kind_of_source(model, source, tmp_path):
    save_body(model, tmp_path/'b'); x = noise(8); stir = conv_body()
    src = dict(learner=lambda: byol_learn(model=model), byol=lambda: model, file=lambda: load_body(tmp_path/'b', arch=stir), loaded=lambda: load_body(tmp_path/'b', arch=stir))[source]()
    torch.testing.assert_close(get_embeddings(src, dl_of(x))[0], embedded(model, x), rtol=1e-4, atol=1e-5)

def test_looking_changes_neither_weights_nor_modes_nor_random_numbers(model):
    model.train(); model.body[1].eval(); before,modes,state = sd_of(model),[o.training for o in model.modules()],torch.get_rng_state()
    f,_ = get_embeddings(model, dl_of(noise(20), shuffle=True)); assert not f.requires_grad
    assert same_sd(sd_of(model), before) and [o.training for o in model.modules()]==modes and torch.equal(torch.get_rng_state(), state)

def test_embeddings_of_training_data_are_not_augmented(model):
    x = noise(16); ims = [PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()) for o in x]
    dls = DataBlock((ImageBlock,CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: i%2, splitter=IndexSplitter([15]), batch_tfms=aug_transforms(size=16)).dataloaders(range(16), bs=8, num_workers=0, device=cpu)
    torch.testing.assert_close(get_embeddings(model, dls.train)[0], embedded(model, (x[:15]*255).byte().float()/255), rtol=1e-2, atol=1e-2)

def test_embeddings_that_would_not_line_up_with_their_files_are_refused(model, tmp_path):
    for i,o in enumerate(noise(9,64)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/f'{i}.png')
    f = tmp_path/'4.png'; f.write_bytes(f.read_bytes()[:400])
    dls = unlabelled_dls(tmp_path, 16, bs=4, valid_pct=0, in_memory=False, num_workers=0, device=cpu)
    with pytest.warns(UserWarning, match='4.png'), pytest.raises(ValueError, match='1 of 9.*line up'): get_embeddings(model, dls.train)

@pytest.mark.parametrize('f,exc,msg', [
    (lambda m: get_embeddings(m, image_dls(noise(16))), TypeError, r'dls\.train'),
    (lambda m: get_embeddings(m, dl_of(noise(4)*255)), ValueError, 'IntToFloatTensor'), (lambda m: get_embeddings(conv_body(), dl_of(noise(4))), TypeError, 'save_body'),
    (lambda m: get_embeddings((conv_body(),None), dl_of(noise(4)), target=True), TypeError, 'target'),
    (lambda m: knn_accuracy(m, dl_of(noise(4)), dl_of(noise(4),[0]*4)), ValueError, '`train_dl` has none'), (lambda m: knn_accuracy(m, dl_of(noise(4),[0]*4), dl_of(noise(4))), ValueError, '`test_dl` has none')])
def test_mistakes_are_named(model, f, exc, msg):
    with pytest.raises(exc, match=msg): f(model)

@pytest.mark.parametrize('memory', [None,True,False])
def test_an_empty_loader_is_named(model, tmp_path, memory):
    for i,o in enumerate(noise(9,20)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/f'{i}.png')
    dl = dl_of([]) if memory is None else unlabelled_dls(tmp_path, 16, bs=4, valid_pct=0, in_memory=memory, num_workers=0, device=cpu).valid
    with pytest.raises(ValueError, match='empty'): get_embeddings(model, dl)

class OddOnes(torch.utils.data.Dataset):
    "What has a length and items, as plain torch likes it"
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],i

def test_embeddings_of_part_of_the_items_are_of_that_part(model):
    x = noise(29); some = dl_of(x, list(range(29)), n=10)
    f,y = get_embeddings(model, some); assert y.tolist()==list(range(10)); torch.testing.assert_close(f, embedded(model, x[:10]), rtol=1e-3, atol=1e-4)
    picked = dl_of(x, list(range(29)), n=3, get_idxs=lambda: [7,2,5]); assert get_embeddings(model, picked)[1].tolist()==[7,2,5] and list(picked.get_idxs())==[7,2,5]

def test_the_real_loader_of_a_distributed_one_is_embedded(model):
    from fastai.distributed import DistributedDL
    x = noise(29); dl = DistributedDL(dl_of(x, list(range(29)), [Normalize.from_stats([.4]*3,[.2]*3,cuda=False)], shuffle=True, drop_last=True), 1, 2)
    f,y = get_embeddings(model, dl); assert y.tolist()==list(range(29)); torch.testing.assert_close(f, embedded(model, x), rtol=1e-3, atol=1e-4)

def test_embeddings_of_a_torch_loader_with_a_batch_sampler(model):
    from torch.utils.data import BatchSampler, RandomSampler, DataLoader as TorchDL
    x = noise(29); ds = OddOnes(x); f,y = get_embeddings(model, TorchDL(ds, batch_sampler=BatchSampler(RandomSampler(ds), 8, True)))
    assert y.tolist()==list(range(29)); torch.testing.assert_close(f, embedded(model, x), rtol=1e-3, atol=1e-4)

# --- several processes

def loaders(path):
    "Loaders of every kind and of awkward sizes, by name"
    from fastai.distributed import DistributedDL
    x = noise(29); y = [i*3 for i in range(29)]; plain = dl_of(x, y, shuffle=True, drop_last=True)
    return dict(fastai=plain, wrapped=DistributedDL(plain), one=dl_of(x[:1], y[:1]), part=dl_of(x, y, n=7), unlabelled=dl_of(x), torch=torch.utils.data.DataLoader(OddOnes(x), 8, shuffle=True),
        memory=unlabelled_dls(path, 16, bs=4, valid_pct=0, in_memory=True, device=cpu).train, files=unlabelled_dls(path, 16, bs=4, valid_pct=0, in_memory=False, num_workers=0, device=cpu).train)

script = '''
import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from test_evaluate import *
import torch.distributed as dist
from fastai.distributed import DistributedDL
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
try: get_embeddings(model, torch.utils.data.DataLoader(Bad(noise(29)), 8), sharded=True); msg = ''
except (OSError,RuntimeError) as e: msg = f'{type(e).__name__}: {e}'
torch.save(dict(res=res, n_seen=n_seen, acc=acc, msg=msg), path/f'{rank}.pth')
dist.barrier(); dist.destroy_process_group() # else a thread of gloo's may abort the process as it ends
'''

@pytest.mark.slow
def test_processes_share_the_images_out_and_each_gets_all_features_in_order(model, tmp_path):
    (tmp_path/'im').mkdir()
    for i,o in enumerate(noise(9,20)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/'im'/f'{i}.png')
    (tmp_path/'s.py').write_text(script)
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', tmp_path/'s.py', Path(__file__).parent, tmp_path]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=300); assert res.returncode==0, res.stderr[-3000:]
    ranks = [torch.load(tmp_path/f'{r}.pth') for r in range(2)]
    set_seed(0); model = small_byol(); x,y = noise(40),[i%3 for i in range(40)]
    for nm,dl in loaders(tmp_path/'im').items():
        if nm=='wrapped': dl = dl.dl
        f,y1 = get_embeddings(model, dl)
        for r in ranks:
            torch.testing.assert_close(r['res'][nm][0], f, msg=lambda m: f'{nm}: {m}'); assert torch.equal(r['res'][nm][1], y1) if y1 is not None else r['res'][nm][1] is None
        shares = [r['n_seen'][nm] for r in ranks]; assert sum(shares)==len(f) and max(shares)-min(shares)<=1, nm
    want = knn_accuracy(model, dl_of(x[:30], y[:30]), dl_of(x[30:], y[30:]), k=5); assert [r['acc'] for r in ranks]==[want]*2
    # one process fails in its share: the other does not wait for it for ever
    assert ranks[0]['msg'].startswith('RuntimeError: Process 1') and ranks[1]['msg'].startswith('OSError') and all('disk on fire' in r['msg'] for r in ranks)

# --- nearest neighbours

def sk(bank, y, q, k, t=.07): return torch.tensor(KNeighborsClassifier(min(k,len(bank)), weights=lambda d: np.exp((1-d)/t), metric='cosine', algorithm='brute').fit(bank.double(), y).predict(q.double()))

@pytest.mark.parametrize('k', [1,3,20,100,300,1000])
@pytest.mark.parametrize('t', [.07,.5])
@pytest.mark.parametrize('classes', [1,2,7,50])
def test_knn_is_that_of_scikit_learn(k, t, classes):
    bank,q,y = torch.randn(300,16)*torch.rand(300,1)*9,torch.randn(80,16),torch.randint(0,classes,(300,))
    assert torch.equal(knn_predict(bank, y, q, k, t), sk(bank, y, q, k, t))

@pytest.fixture(scope='module')
def real():
    "The pixels of scikit-learn's digits: bank, its labels, queries, theirs"
    from sklearn.datasets import load_digits
    d = load_digits(); x,y = torch.tensor(d.data, dtype=torch.float32),torch.tensor(d.target); return x[:1200],y[:1200],x[1200:],y[1200:]

@pytest.mark.parametrize('k', [1,5,20,200,1200])
@pytest.mark.parametrize('t', [.02,.07,.5])
def test_knn_of_real_images_is_that_of_scikit_learn(real, k, t):
    bank,y,q,qy = real; pred = knn_predict(bank, y, q, k, t); want = sk(bank, y, q, k, t)
    assert torch.equal(pred, want) and len(pred.unique())==10 and (k>20 or (pred==qy).float().mean()>.8)

@pytest.mark.parametrize('k', [1,20,200])
@pytest.mark.parametrize('t', [.02,.07,.5])
def test_accuracy_of_a_body_is_that_of_scikit_learn(model, k, t):
    from sklearn.datasets import load_digits
    d = load_digits(); x = F.interpolate(torch.tensor(d.images[:400], dtype=torch.float32)[:,None].expand(-1,3,-1,-1)/16, (16,16)); y = d.target[:400].tolist()
    f = embedded(model, x); want = (sk(f[:300], torch.tensor(y[:300]), f[300:], k, t)==torch.tensor(y[300:])).float().mean().item()
    assert knn_accuracy(model, dl_of(x[:300], y[:300]), dl_of(x[300:], y[300:]), k, t)==pytest.approx(want, abs=1e-6) and want>.15

@pytest.mark.parametrize('block', [1,7,64,299,300,5000])
@pytest.mark.parametrize('k', [1,20,300])
def test_the_nearest_are_found_block_by_block(block, k):
    from fastbyol.evaluate import _nearest
    bank,q = torch.randn(300,16)*torch.rand(300,1)*9,F.normalize(torch.randn(80,16)); want = (q.double() @ F.normalize(bank.double()).T).topk(k)
    sim,idx = _nearest(q, bank, bank.norm(dim=1), k, block); o = sim.argsort(1, descending=True)
    assert torch.equal(idx.gather(1,o), want.indices); torch.testing.assert_close(sim.gather(1,o).double(), want.values, rtol=1e-5, atol=1e-6)

def test_features_of_half_precision_and_of_whole_numbers():
    bank,q,y = torch.randn(300,16),torch.randn(80,16),torch.randint(0,7,(300,))
    assert torch.equal(knn_predict(bank.half(), y, q.half()), sk(bank.half().float(), y, q.half().float(), 20))
    b,r = (bank*100).int(),(q*100).int(); assert torch.equal(knn_predict(b, y, r), sk(b, y, r, 20))

@pytest.mark.parametrize('chunk', [1,7,80,1000])
def test_chunks_change_nothing(chunk):
    bank,q,y = torch.randn(300,16),torch.randn(80,16),torch.randint(0,7,(300,)); assert torch.equal(knn_predict(bank,y,q,chunk=chunk), knn_predict(bank,y,q))

def test_the_nearest_neighbour_is_not_skipped():
    bank = torch.randn(200,16); y = torch.arange(200); assert torch.equal(knn_predict(bank, y, bank, k=1), y) and torch.equal(knn_predict(bank, y, bank, k=20, temperature=.001), y)

def test_labels_may_be_any_integers_and_the_bank_smaller_than_k():
    bank = torch.randn(5,8); y = torch.tensor([-7,100,3,100,3]); assert torch.equal(knn_predict(bank, y, bank, k=50, temperature=1e-3), y)

def test_knn_accuracy_is_the_part_that_is_right(model):
    x = noise(40); y = [i%3 for i in range(40)]
    a = knn_accuracy(model, dl_of(x[:30], y[:30], shuffle=True), dl_of(x[30:], y[30:]), k=5)
    f = embedded(model, x); want = (sk(f[:30], torch.tensor(y[:30]), f[30:], 5)==torch.tensor(y[30:])).float().mean().item(); assert a==pytest.approx(want) and isinstance(a, float)

memory_script = '''
import sys; sys.path.insert(0, sys.argv[1])
from test_evaluate import *
torch.set_num_threads(1)
def status(key): return int(re.search(rf'{key}:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
def rise(f): start = status('VmRSS'); f(); return status('VmHWM')-start
g = lambda *s: torch.randn(*s)
bank,q,y = g(100_000,512),g(40,512),torch.randint(0,10,(100_000,)) # the bank: 195 MiB
print(rise(lambda: knn_predict(bank, y, q)), rise(lambda: knn_predict(q, y[:40], bank)), end=' ')
part,q = bank[:20_000,:128].contiguous(),g(8000,128) # all similarities together: 610 MiB
print(rise(lambda: knn_predict(part, y[:20_000], q)), rise(lambda: (q@part.T).topk(20)))
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_memory_is_bounded_by_a_chunk_and_neither_bank_nor_queries_are_copied(tmp_path):
    (tmp_path/'s.py').write_text(memory_script) # a process of its own: the largest size ever is what the system remembers
    res = subprocess.run([sys.executable, tmp_path/'s.py', Path(__file__).parent], capture_output=True, text=True); assert res.returncode==0, res.stderr[-2000:]
    few,many,chunks,plain = map(float, res.stdout.split()); assert max(few,many,chunks)<120 and plain>500, res.stdout

@pytest.mark.parametrize('kw,msg', [(dict(k=0),'`k`'), (dict(k=2.5),'`k`'), (dict(temperature=0.),'temperature'), (dict(queries=torch.randn(3,5)),'same width'), (dict(labels=torch.zeros(3)),'10 images and 3 labels'), (dict(bank=torch.full((10,4),math.inf)),'of the bank'), (dict(queries=torch.full((3,4),math.nan)),'of the queries'), (dict(chunk=0),'`chunk`'), (dict(bank=torch.randn(0,4),labels=torch.zeros(0)),'empty')])
def test_knn_mistakes_are_named(kw, msg):
    with pytest.raises(ValueError, match=msg): knn_predict(**{**dict(bank=torch.randn(10,4), labels=torch.zeros(10), queries=torch.randn(3,4)), **kw})

def few_dls(n_train, n_c=3):
    y = [i%n_c for i in range(n_train+12)]; x = noise(n_train+12)*.3
    for i,c in enumerate(y): x[i,:,c*5:(c+1)*5] += .6
    return image_dls(x.clamp(0,1), 12, y=y, drop_last=False)

def test_a_draw_that_repeats_is_no_draw():
    m = small_byol(); kw = dict(seeds=3, contestants=('BYOL, linear','pixels, nearest'))
    with pytest.warns(UserWarning, match='fewer different draws.*per_class=4'): res = label_efficiency(m, few_dls(12), per_class=(2,4), **kw)
    assert set(res[res.per_class==4].n)=={1} and set(res[res.per_class==2].n)=={3}
    assert not res.table()[4].str.contains('±').any() and res.table()[2].str.contains('±').all(); plt.close(res.plot().figure)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning); label_efficiency(m, few_dls(24), per_class=(2,4), **kw)

def test_random_weights_compete_where_they_are_named():
    m = small_byol(); names = ('random weights, linear','random weights, fine-tuned','BYOL, linear')
    res = label_efficiency(m, few_dls(12), per_class=(2,), seeds=1, steps=2, contestants=names); assert list(res.contestant)==list(names) and res['mean'].between(0,1).all()
    with pytest.raises(ValueError, match='taken'): label_efficiency(m, few_dls(12), others={'random weights':m})

def test_loaders_of_different_classes_do_not_vote():
    m,a,b = small_byol(),few_dls(12).train,few_dls(12).valid; a.vocab,b.vocab = ['cat','dog','owl'],['dog','owl','cat']
    with pytest.raises(ValueError, match='different classes'): knn_accuracy(m, a, b)
    b.vocab = a.vocab; assert 0<=knn_accuracy(m, a, b)<=1

@pytest.mark.parametrize('y', [TensorMultiCategory([1.,0.,1.]), tensor(.5)])
def test_one_class_per_image_is_asked_for(y):
    x = noise(24); dl = lambda: TfmdDL([(TensorImage(o),y) for o in x], bs=8, num_workers=0, device=cpu); dls = DataLoaders(dl(), dl(), device=cpu)
    for f in (lambda: knn_accuracy(small_byol(), *dls), lambda: linear_eval(small_byol(), dls), lambda: label_efficiency(small_byol(), dls, per_class=(1,)),
              lambda: byol_learn(image_dls(x), cbs=KNNCallback(dls)).fit(1)):
        with pytest.raises(ValueError, match='one class per image'): f()

def test_label_efficiency_says_what_data_it_takes():
    dl = torch.utils.data.DataLoader([(o,0) for o in noise(8)], batch_size=4)
    with pytest.raises(TypeError, match="fastai's data loaders, got DataLoader"): label_efficiency(small_byol(), DataLoaders(dl, dl))
    with pytest.raises(ValueError, match='seeds'): label_efficiency(small_byol(), few_dls(12), seeds=0)
