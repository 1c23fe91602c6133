"Embeddings in order and normalised once; nearest neighbours against scikit-learn, in bounded memory"
from conftest import *
from fastbyol.core import PlainTable, eval_mode
from fastbyol.transfer import Encoder
from fastbyol.evaluate import LabelEfficiency, item_names, label_tensor
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset, DataLoader as TorchDL

stats = [.4]*3,[.2]*3

def dl_of(x, y=None, norm=None, **kw):
    items = [(TensorImage(o),) if y is None else (TensorImage(o),TensorCategory(y[i])) for i,o in enumerate(x)]
    return TfmdDL(items, **{**dict(bs=8, num_workers=0, after_batch=norm, device=cpu), **kw})

def pil(x): return PILImage.create((x.permute(1,2,0)*255).byte().numpy().copy())

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

@pytest.mark.cuda
def test_a_learner_in_bfloat16_embeds_in_it_on_a_gpu(model):
    dls,seen = image_dls(noise(32)),[]
    for dl in dls.loaders: dl.device = torch.device('cuda')
    learn = byol_learn(dls, model)
    learn.set_precision('bf16')
    learn.model.body[0].register_forward_hook(lambda m,x,y: seen.append((y.dtype,len(y))))
    feats,_ = get_embeddings(learn, dls.train)
    assert seen==[(torch.bfloat16,8)]*3 and feats.dtype==torch.float32 and feats.device.type=='cpu'

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

def test_memory_is_bounded_by_a_chunk_and_neither_bank_nor_queries_are_copied():
    bank,q,y = torch.randn(60_000,256),torch.randn(40,256),torch.randint(0,10,(60_000,)) # the bank: 59 MiB
    assert max(peak_mib(lambda: knn_predict(bank, y, q)), peak_mib(lambda: knn_predict(q, y[:40], bank)))<50
    bank,q = bank[:20_000,:32].contiguous(),torch.randn(4000,32) # all similarities together: 305 MiB
    assert peak_mib(lambda: knn_predict(bank, y[:20_000], q))<110<peak_mib(lambda: (q@bank.T).topk(20))

@pytest.mark.parametrize('kw,msg', [
    (dict(k=0),'`k`'), (dict(labels=torch.zeros(3)),r'10 images, labels \[3\]'), (dict(bank=torch.randn(0,4), labels=torch.zeros(0)),'0 images'),
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
    assert res.top1==pytest.approx(clas.score((t-mean)/std, ty)) and res.ci[0]<=res.top1<=res.ci[1]

def test_linear_evaluation_learns_and_repeats(model):
    dls = few_dls(60); view = partial(torch.mul, 1.)
    a,b = (linear_eval(model, dls, epochs=10, lr=20., view=view, seed=1) for _ in range(2))
    assert a==b and a.top1>.6 and a.chosen in a.valid and a.n==12 and a.top5 is None

def test_classifiers_that_choose_do_not_see_the_held_out_images(model):
    dls = image_dls(torch.rand(18,3,16,16), 2, y=[i%2 for i in range(18)], drop_last=False) # nothing to generalise
    kw = dict(epochs=200, lr=50., sweep=(1.,), view=partial(torch.mul, 1.), valid_pct=.4)
    res = linear_eval(model, DataLoaders(dls.train, dls.train), **kw)
    assert res.top1>.9 and res.valid[res.chosen]<.7 # what has seen all knows it by heart

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

@pytest.mark.parametrize('kw,msg', [(dict(epochs=0),'`epochs`'), (dict(size=2),'`size`'),
    (dict(epochs=9, lr=1e40, sweep=(1.,)),'diverged')])
def test_linear_mistakes_are_named(model, kw, msg):
    with pytest.raises(ValueError, match=msg): linear_eval(model, few_dls(24), **kw)

# --- few labels

@pytest.mark.parametrize('name', ['BYOL, fine-tuned','from scratch'])
def test_what_is_measured_is_normalised_as_what_is_trained_on(name):
    spreads = {True:set(), False:set()}
    class Look(Callback):
        def before_batch(self): spreads[self.training].add(round(self.x.std().item(), 1))
    label_efficiency(small_byol(), few_dls(24), per_class=2, seeds=1, contestants=(name,), steps=3, cbs=Look())
    assert min(spreads[False])>1 and spreads[False]<=spreads[True]|{min(spreads[True])-.1,max(spreads[True])+.1}

def test_fine_tuning_learns_what_can_be_learned():
    x = torch.rand(80,3,16,16)/4; y = [i%2 for i in range(80)]; x[1::2,0] += .5 # red or not
    dls = DataLoaders(dl_of(x[:40], y[:40]), dl_of(x[40:], y[40:]))
    res = label_efficiency(small_byol(), dls, per_class=8, seeds=1, contestants=('BYOL, fine-tuned','from scratch'), steps=60, lr=1e-2)
    assert (res['mean']>.9).all(), res

def test_a_draw_that_repeats_is_no_draw():
    kw = dict(seeds=3, contestants=('BYOL, linear','pixels, nearest'))
    res = label_efficiency(small_byol(), few_dls(12), per_class=(4,2), **kw)
    assert res[res.contestant=='BYOL, linear'].per_class.tolist()==[2,4] # a curve runs to the right
    assert set(res[res.per_class==4].n)=={1} and set(res[res.per_class==2].n)=={3}
    assert not res.table()[4].str.contains('±').any() and res.table()[2].str.contains('±').all()

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

@pytest.mark.parametrize('kw,msg', [(dict(contestants=('magic',)),'Unknown contestant'), (dict(per_class=(500,)),'500 per class')])
def test_label_efficiency_names_mistakes(kw, msg):
    with pytest.raises(ValueError, match=msg): label_efficiency(small_byol(), few_dls(12), **kw)

@pytest.mark.parametrize('name', ['BYOL','pixels','ImageNet','random weights','from scratch'])
def test_other_bodies_have_names_of_their_own(name):
    with pytest.raises(ValueError, match=f"'{name}'.*another name"):
        label_efficiency(small_byol(), few_dls(4), others={name:small_byol()})

@pytest.mark.parametrize('labels,msg', [(['a','b'],"numbers, got 'a'"), ([[0],[1]],r'2 images, labels \[2, 1\]'),
    (np.eye(2),'one label per image')])
def test_labels_of_the_bank_are_one_number_each(labels, msg):
    with pytest.raises(ValueError, match=msg): knn_predict(torch.eye(2), labels, torch.eye(2))
    with pytest.raises(ValueError, match='numbers, got None'): label_tensor(None)
    for y in ([3,7], np.array([3,7])): assert knn_predict(torch.eye(2), y, torch.eye(2), k=1).tolist()==[3,7]

def collated(*y): return lambda items: (torch.stack(items),*y)
def test_batches_of_no_label_or_of_two_are_told(model):
    dl = lambda *y: torch.utils.data.DataLoader(list(noise(8)), 8, collate_fn=collated(*y))
    feats,y = get_embeddings(model, dl(None)); assert len(feats)==8 and y is None
    for ys,msg in (((None,), 'has none'), ((torch.arange(8),)*2, 'has 2 targets')):
        with pytest.raises(ValueError, match=msg): knn_accuracy(model, dl(*ys), dl(*ys))

@pytest.mark.parametrize('workers', [0,2])
def test_a_file_that_cannot_be_read_is_named(model, tmp_path, workers):
    files = [tmp_path/f'{i}.png' for i in range(4)]
    for f,x in zip(files, noise(4)): pil(x).save(f)
    files[2].write_bytes(files[2].read_bytes()[:60])
    block = DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: f.stem, splitter=lambda o: ([*range(4)],[]))
    dl = block.dataloaders(files, bs=2, num_workers=workers, device=cpu, drop_last=False).train
    assert item_names(dl)==files
    for look in (lambda: get_embeddings(model, dl), lambda: knn_accuracy(model, dl, dl)):
        with pytest.raises(OSError, match=r'2\.png cannot be read.*leave it out'): look()

def test_tables_in_a_notebook_show_a_dollar_as_a_dollar():
    res = LabelEfficiency([dict(contestant='$a$, linear', per_class=1, mean=.5, sd=.1, n=3)])
    for table in (res, res.table(), res.head(1)): assert isinstance(table, PlainTable) and 'tex2jax_ignore' in table._repr_html_()

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
