"Pictures in order and unnormalised; neighbours, pairs, outliers and picks against scikit-learn and plain loops, in bounded memory"
from conftest import *
from fastbyol.data import load_square
from fastbyol.explore import EmbeddedImages, ImageTable, embed_images, find_duplicates, find_outliers, plot_embeddings, show_neighbours, suggest_labels
from matplotlib.offsetbox import AnnotationBbox
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch.utils.data import TensorDataset, DataLoader as TorchDL
from test_evaluate import dl_of
import fastbyol.explore as explore
import pickle

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

@pytest.fixture
def model(): return small_byol()

def images_of(n=30, d=6, classes=3, seed=0, **kw):
    "`n` embedded images in `classes` clusters, some nearer to each other than others"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%classes
    f = torch.randn(classes,d,generator=g)[y] + .3*torch.randn(n,d,generator=g) + 1
    return EmbeddedImages(f, **{**dict(labels=y, vocab=list('abcdefgh')[:classes], images=noise(n, seed=seed)), **kw})

def files_in(path, n=12, size=20, folders=2):
    for i,o in enumerate(noise(n, size)):
        f = path/f'{"abc"[i%folders]}'/f'{i:02}.png'; f.parent.mkdir(exist_ok=True)
        PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(f)
    return find_images(path)

def pictures(emb, idxs):
    "The pictures `idxs`, none left out"
    ims = list(emb.pictures(idxs)); assert len(ims)==len(idxs)
    return ims

def titles(fig): return [ax.get_title() for ax in fig.axes]
def shown(ax): return ax.images[0].get_array()
def all_tools(source, dl=None, **kw):
    return [plot_embeddings(source, dl, thumbs=2, **kw), show_neighbours(source, dl, **kw), find_duplicates(source, dl, threshold=.5, pixels=.1, **kw).show(),
            find_outliers(source, dl, **kw).show(), suggest_labels(source, dl, n=3, **kw).show()]

# --- images, their names and their pictures

def test_names_are_files_in_the_loaders_order(model, tmp_path):
    files = files_in(tmp_path)
    for memory in (True,False):
        dls = unlabelled_dls(tmp_path, 16, bs=4, valid_pct=.25, in_memory=memory, num_workers=0, device=cpu)
        for dl in (dls.train,dls.valid):
            emb = embed_images(model, dl)
            assert emb.items==list(dl.dataset.items) and set(emb.items)<=set(files) and emb.labels is None
            for i,im in enumerate(pictures(emb, range(len(emb)))): assert torch.equal(im, load_square(emb.items[i], 3, 20).float()/255)
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.25, seed=0, item_tfms=Resize(16), bs=4, num_workers=0, device=cpu, batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    emb = embed_images(model, dls.train)
    assert emb.items==list(dls.train.items) and emb.vocab==['a','b'] and [emb.label(i) for i in range(len(emb))]==[f.parent.name for f in emb.items]
    for f,im in zip(emb.items, pictures(emb, range(len(emb)))): # neither normalised nor augmented
        torch.testing.assert_close(im, image2tensor(PILImage.create(f).resize((16,16))).float()/255, atol=.1, rtol=0)

def test_names_of_a_data_frame_are_its_row_labels(model, tmp_path):
    df = pd.DataFrame(dict(name=files_in(tmp_path), label=list('xyz')*4), index=[f'row{i}' for i in range(12)])
    dls = ImageDataLoaders.from_df(df, path='/', valid_pct=.5, seed=0, item_tfms=Resize(16), bs=2, num_workers=0, device=cpu)
    emb = embed_images(model, dls.train)
    assert [emb.label(i) for i in range(6)]==df.loc[emb.items, 'label'].tolist()

def test_items_without_names_are_numbered(model):
    for dl in (dl_of(noise(9)), dl_of(noise(9), [0]*9), TorchDL(TensorDataset(noise(9)), 4), TorchDL(list(noise(9)), 4)):
        assert embed_images(model, dl).items==list(range(9))

def test_names_of_torchvision_folders(model, tmp_path):
    import torchvision as tv
    files = files_in(tmp_path)
    ds = tv.datasets.ImageFolder(tmp_path, tv.transforms.ToTensor())
    emb = embed_images(model, TorchDL(ds, 5, shuffle=True))
    assert emb.items==[str(f) for f in files]
    assert torch.equal(next(emb.pictures([7])), load_square(files[7], 3, 20).float()/255)

@pytest.mark.parametrize('norm', [None, imagenet_stats])
def test_pictures_are_in_order_and_unnormalised_whatever_the_loader_does(model, norm):
    x = noise(29)
    for dl in (dl_of(x, norm=norm and [Normalize.from_stats(*norm,cuda=False)], shuffle=True, drop_last=True), TorchDL(TensorDataset(x), 8, shuffle=True)):
        emb = embed_images(model, dl)
        for i,im in zip([28,0,13,13], pictures(emb, torch.tensor([28,0,13,13]))): torch.testing.assert_close(im, x[i])

@pytest.mark.parametrize('n_in', [1,2,3,4,6])
def test_any_number_of_channels_is_drawn(n_in):
    m = small_byol(n_in=n_in); x = noise(12, n_in=n_in)
    all_tools(m, dl_of(x, [0,1]*6))
    a = shown(show_neighbours(embed_images(m, dl_of(x)), queries=[4]).axes[0])
    want = x[4][:3].permute(1,2,0) if n_in>=3 else x[4][:1].expand(3,-1,-1).permute(1,2,0)
    np.testing.assert_allclose(a, want, atol=1e-6)

def test_pictures_come_from_tensors_functions_and_files(tmp_path):
    files,f = files_in(tmp_path),torch.randn(12,4)
    x = torch.stack([load_square(o, 3, 20) for o in files])
    for images in (x, x.float()/255, list(x), lambda i: x[i], None, TorchDL(TensorDataset(x), 4)):
        torch.testing.assert_close(next(EmbeddedImages(f, items=files, images=images).pictures([5])), x[5]/255)
    torch.testing.assert_close(next(embed_images(f, dl_of(x/255)).pictures([5])), x[5]/255) # features that are there, images of a loader

def test_features_may_be_arrays_and_need_no_pictures():
    emb = embed_images(np.random.default_rng(0).normal(size=(40,5)))
    for t in (find_outliers(emb, n=3), suggest_labels(emb, n=3)):
        assert len(t)==3 and list(t['item'])==list(t['index'])
        with pytest.raises(ValueError, match='no pictures'): t.show()
    plot_embeddings(emb); assert len(find_duplicates(emb, pixels=None, threshold=-1.))==40*39//2
    with pytest.raises(ValueError, match='pixels=None'): find_duplicates(emb)

def test_labels_that_are_no_classes_are_left_out():
    f = torch.randn(4,3)
    for y in (torch.rand(4), torch.zeros(4,2), torch.zeros(4,8,8,dtype=torch.long), None): assert EmbeddedImages(f, y).labels is None
    for y in ([3,1,1,0], np.array([3,1,1,0]), torch.tensor([3,1,1,0], dtype=torch.uint8)): assert EmbeddedImages(f, y).labels.tolist()==[3,1,1,0]
    assert EmbeddedImages(f, [3,1,1,0], vocab=['a']).label(0)==3 and EmbeddedImages(f, [0,0,1,0], vocab=['a','b']).label(2)=='b'

@pytest.mark.parametrize('kind', ['learner','byol','loaded','features','target'])
def test_every_tool_takes_every_source(model, kind, tmp_path):
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in model.target.parameters()]
    dl,kw = dl_of(noise(12), [0,1]*6),{}
    src = dict(learner=lambda: byol_learn(model=model), byol=lambda: model, target=lambda: model, features=lambda: get_embeddings(model, dl)[0],
               loaded=lambda: load_body(save_body(model, tmp_path/'b'), arch=conv_body()))[kind]()
    if kind=='target': kw = dict(target=True)
    all_tools(src, dl, **kw)
    f = get_embeddings(model, dl, target=kind=='target')[0]
    torch.testing.assert_close(embed_images(src, dl, **kw).features, f)
    if kind=='target': assert not torch.allclose(f, get_embeddings(model, dl)[0])
    emb = EmbeddedImages(f, images=dl)
    for t in (find_outliers,suggest_labels): assert t(src, dl, n=5, **kw)['index'].tolist()==t(emb, n=5)['index'].tolist()

def test_looking_changes_neither_modes_nor_weights_nor_random_numbers(model):
    model.train(); model.body[1].eval()
    def state(): return torch.get_rng_state(),torch.tensor(np.random.get_state()[1].astype(np.int64)),random.getstate(),[o.training for o in model.modules()]
    dl,before,sd = dl_of(noise(20), [0,1]*10, shuffle=True),state(),sd_of(model)
    all_tools(model, dl); all_tools(model, TorchDL(TensorDataset(noise(20)), 4, shuffle=True))
    after = state()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2:]==after[2:] and same_sd(sd_of(model), sd)

@pytest.mark.parametrize('f,exc,msg', [
    (lambda: EmbeddedImages(torch.randn(3)), ValueError, r'\(n, d\)'), (lambda: EmbeddedImages(torch.randn(0,3)), ValueError, 'at least one'),
    (lambda: EmbeddedImages(torch.tensor([[1.,math.nan],[1,2]])), ValueError, '1 of 2.*diverged'), (lambda: EmbeddedImages(torch.randn(3,2), [0,1]), ValueError, 'as many labels'),
    (lambda: EmbeddedImages(torch.randn(3,2), items=['a']), ValueError, 'as many items'), (lambda: embed_images(small_byol()), TypeError, '`dl` is needed'),
    (lambda: embed_images(images_of(), dl_of(noise(4))), TypeError, 'leave `dl` out'), (lambda: plot_embeddings(images_of(), target=True), TypeError, 'embedded already'),
    (lambda: embed_images(small_byol(), image_dls(noise(16))), TypeError, r'dls\.train'), (lambda: embed_images(torch.randn(3,2), image_dls(noise(16))), TypeError, r'dls\.train'),
    (lambda: find_outliers(small_byol(), dl_of([])), ValueError, 'empty'),
    (lambda: plot_embeddings(images_of(), method='umap'), ValueError, "'tsne' or 'pca'"), (lambda: plot_embeddings(images_of(), max_items=0), ValueError, 'max_items'),
    (lambda: show_neighbours(images_of(), k=0), ValueError, '`k`'), (lambda: show_neighbours(images_of(), queries=[30]), ValueError, 'from 0 to 29, got 30'),
    (lambda: show_neighbours(images_of(), queries=[-1]), ValueError, 'got -1'), (lambda: show_neighbours(images_of(), queries=[.5]), TypeError, 'numbers'),
    (lambda: show_neighbours(images_of(), queries=[]), ValueError, 'empty'),
    (lambda: show_neighbours(images_of(1)), ValueError, '2 images or more'), (lambda: find_outliers(images_of(1)), ValueError, '2 images or more'),
    (lambda: find_duplicates(images_of(), threshold=2.), ValueError, '`threshold`'), (lambda: find_duplicates(images_of(), pixels=2.), ValueError, '`pixels`'),
    (lambda: find_duplicates(images_of(), max_pairs=0), ValueError, 'max_pairs'),
    (lambda: find_outliers(images_of(), k=0), ValueError, '`k`'), (lambda: find_outliers(images_of(), n=0), ValueError, '`n`'),
    (lambda: suggest_labels(images_of(), n=0), ValueError, '`n`'), (lambda: suggest_labels(images_of(), n=31), ValueError, '31 .* only 30'),
    (lambda: suggest_labels(images_of(), n=29, labelled=[3,4]), ValueError, '29 .* only 28'), (lambda: suggest_labels(images_of(), leave_out=1.), ValueError, 'leave_out'),
    (lambda: suggest_labels(images_of(), labelled=[99]), ValueError, 'got 99'), (lambda: pd.DataFrame.__getitem__(find_outliers(images_of()), ['distance']).show(), ValueError, '`index`')])
def test_mistakes_are_named(f, exc, msg):
    with pytest.raises(exc, match=msg): f()

# --- the map

def points(ax): return np.concatenate([c.get_offsets() for c in ax.collections])

def test_pca_is_that_of_scikit_learn_coloured_by_class():
    emb = images_of(30); ax = plot_embeddings(emb, method='pca', thumbs=0)
    want = PCA(2).fit_transform(F.normalize(emb.features).double()); rows = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for c,col in enumerate(ax.collections):
        np.testing.assert_allclose(np.abs(col.get_offsets()), np.abs(want[rows[emb.labels[rows]==c]]), atol=1e-6)
        assert tuple(col.get_facecolor()[0][:3])==plt.get_cmap('tab10')(c)[:3]
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['a','b','c']

@pytest.mark.parametrize('n', [1,2,3,4,5,8,40])
@pytest.mark.parametrize('method', ['tsne','pca'])
def test_few_points_are_drawn(n, method):
    ax = plot_embeddings(images_of(n), method=method); z = points(ax); assert z.shape==(n,2) and np.isfinite(z).all()

def test_images_that_are_all_the_same_or_have_one_feature_are_drawn():
    for f in (torch.ones(40,5), torch.randn(40,1), torch.zeros(40,5)):
        for method in ('tsne','pca'): assert np.isfinite(points(plot_embeddings(EmbeddedImages(f, images=noise(40)), method=method))).all()

def test_a_map_is_the_same_twice_and_of_a_random_part():
    emb = images_of(80); a,b,c = (points(plot_embeddings(emb, max_items=50, seed=s)) for s in (0,0,1))
    assert a.shape==(50,2) and np.array_equal(a, b) and not np.array_equal(a, c)
    assert '50 of 80' in plot_embeddings(emb, max_items=50).get_title()

def test_pictures_on_the_map_do_not_cover_each_other_and_are_those_of_their_points():
    emb = images_of(60); ax = plot_embeddings(emb, method='pca', thumbs=25)
    ax.figure.canvas.draw()
    boxes = [o for o in ax.artists if isinstance(o, AnnotationBbox)]; ext = [o.patch.get_window_extent() for o in boxes]
    assert 5<len(boxes)<=25 and not any(a.overlaps(b) for i,a in enumerate(ext) for b in ext[:i])
    z = PCA(2).fit_transform(F.normalize(emb.features).double())
    for o in boxes:
        i = int(np.abs(np.abs(z)-np.abs(np.array(o.xy))).sum(1).argmin())
        np.testing.assert_allclose(o.offsetbox.get_data(), emb.images[i].permute(1,2,0), atol=1e-6)
        assert matplotlib.colors.to_hex(o.patch.get_edgecolor())==matplotlib.colors.to_hex(plt.get_cmap('tab10')(emb.labels[i].item()))

def test_without_labels_and_with_many_classes_there_is_no_legend():
    assert plot_embeddings(images_of(labels=None)).get_legend() is None
    emb = EmbeddedImages(torch.randn(60,5), torch.arange(60)%30)
    ax = plot_embeddings(emb); assert ax.get_legend() is None and len({tuple(c.get_facecolor()[0]) for c in ax.collections})==30

def test_one_class_and_given_axes():
    _,ax = plt.subplots(); assert plot_embeddings(images_of(classes=1), ax=ax, title='mine') is ax and ax.get_title()=='mine'

# --- neighbours

@pytest.mark.parametrize('k', [1,5,29,100])
@pytest.mark.parametrize('chunk', [1,7,1000])
def test_neighbours_are_those_of_scikit_learn(k, chunk, monkeypatch):
    monkeypatch.setattr(explore, '_chunk', lambda n: chunk)
    emb = images_of(30); d,i = NearestNeighbors(n_neighbors=min(k,29), metric='cosine', algorithm='brute').fit(emb.features.double()).kneighbors()
    s,j = explore._neighbours(emb.unit, torch.arange(30), k)
    np.testing.assert_allclose(1-s, d, atol=1e-5); assert np.array_equal(i, j)

def test_the_image_is_left_out_and_its_copies_are_not():
    f = torch.randn(10,4); f[7] = f[3]*2; f[8] = f[3]
    fig = show_neighbours(EmbeddedImages(f, images=noise(10)), queries=[3], k=3)
    assert titles(fig)[:3]==['3','1.000','1.000'] and titles(fig)[3]!='1.000'
    x = noise(10); assert {next(i for i in range(10) if np.allclose(shown(ax), x[i].permute(1,2,0))) for ax in fig.axes[1:3]}=={7,8}

def test_frames_tell_whether_the_class_is_the_same():
    emb = images_of(30, classes=3); fig = show_neighbours(emb, queries=[4,9], k=29)
    for r,q in enumerate((4,9)):
        frames = [matplotlib.colors.to_hex(ax.spines['left'].get_edgecolor()) for ax in fig.axes[r*30+1:r*30+30]]
        nbrs = explore._neighbours(emb.unit, torch.tensor([q]), 29)[1][0]
        assert frames==[matplotlib.colors.to_hex('tab:green' if emb.labels[i]==emb.labels[q] else 'tab:red') for i in nbrs]
    assert titles(fig)[0]=='b'
    assert not any(ax.spines['left'].get_visible() for ax in show_neighbours(images_of(labels=None)).axes)

def test_queries_are_drawn_reproducibly_and_may_be_a_mask():
    emb = images_of(labels=None); a,b,c = (titles(show_neighbours(emb, seed=s)) for s in (0,0,1)); assert a==b!=c
    mask = torch.zeros(30, dtype=torch.bool); mask[[2,9]] = True
    assert titles(show_neighbours(emb, queries=mask))==titles(show_neighbours(emb, queries=[2,9]))==titles(show_neighbours(emb, queries=mask.numpy()))

# --- duplicates

def brute(emb, t): return {(i,j) for i in range(len(emb)) for j in range(i+1,len(emb)) if F.cosine_similarity(emb.features[i], emb.features[j], 0)>=t}
def pairs(t): return list(zip(t['index'], t['index_2']))

@pytest.mark.parametrize('chunk', [1,7,1000])
def test_pairs_are_those_of_a_loop(chunk, monkeypatch):
    monkeypatch.setattr(explore, '_chunk', lambda n: chunk)
    emb = images_of(40); t = find_duplicates(emb, threshold=.9, pixels=None)
    assert set(pairs(t))==brute(emb, .9) and len(t)==len(set(pairs(t)))>10
    for i,j,s in zip(t['index'], t['index_2'], t['similarity']): assert s==pytest.approx(F.cosine_similarity(emb.features[i], emb.features[j], 0).item(), abs=1e-5)
    assert t['similarity'].is_monotonic_decreasing

@pytest.mark.parametrize('chunk', [3,1000])
def test_too_many_pairs_leave_the_most_similar_and_a_warning(chunk, monkeypatch):
    monkeypatch.setattr(explore, '_chunk', lambda n: chunk)
    emb = images_of(40); all_ = find_duplicates(emb, threshold=.5, pixels=None)
    with pytest.warns(UserWarning, match=f'{len(all_)} of 780 pairs.*collapsed'): t = find_duplicates(emb, threshold=.5, pixels=None, max_pairs=10)
    assert pairs(t)==pairs(all_)[:10]

def test_a_collapsed_body_is_put_right_by_the_pixels():
    x = torch.rand(20,3,16,16); x[11] = x[4]; emb = EmbeddedImages(torch.ones(20,5), images=x)
    assert len(find_duplicates(emb, pixels=None))==190 and pairs(find_duplicates(emb))==[(4,11)]

def test_brightness_and_contrast_do_not_count_and_other_images_do():
    x = torch.rand(6,3,32,32)*.5+.25; x[1],x[2],x[3] = x[0]*.7,(x[0]+.2).clamp(max=1),1-x[0]
    t = find_duplicates(EmbeddedImages(torch.ones(6,2), images=x)); assert set(pairs(t))=={(0,1),(0,2),(1,2)} and (t['pixels']>.95).all()
    assert find_duplicates(EmbeddedImages(torch.ones(6,2), images=x), pixels=-1.)['pixels'].min()<0

def test_blank_images_and_images_of_different_sizes_are_compared():
    x = [torch.zeros(3,9,9), torch.full((3,20,30),.003), torch.rand(3,16,16), torch.rand(3,16,16)]; x.append(F.interpolate(x[2][None], (32,32))[0])
    t = find_duplicates(EmbeddedImages(torch.ones(5,2), images=x)); assert set(pairs(t))=={(0,1),(2,4)}; t.show()

def test_dropping_every_second_of_a_pair_leaves_no_pair():
    f = torch.randn(8,4).repeat(5,1); emb = EmbeddedImages(f, images=noise(8).repeat(5,1,1,1)); t = find_duplicates(emb); assert len(t)==8*10
    assert set(range(40))-set(t['index_2'])==set(range(8))

def test_an_empty_table_can_be_shown(capsys):
    t = find_duplicates(images_of(), threshold=1.); assert len(t)==0 and t.show() is None and 'empty' in capsys.readouterr().out
    assert list(t)==['index','item','label','index_2','item_2','label_2','similarity','pixels']

# --- outliers

@pytest.mark.parametrize('k', [1,5,100])
def test_outliers_are_those_of_scikit_learn(k):
    emb = images_of(30); d = NearestNeighbors(n_neighbors=min(k,29), metric='cosine', algorithm='brute').fit(emb.features.double()).kneighbors()[0].mean(1)
    t = find_outliers(emb, n=7, k=k); assert t['index'].tolist()==np.argsort(-d)[:7].tolist(); np.testing.assert_allclose(t['distance'], np.sort(d)[::-1][:7], atol=1e-5)
    assert len(find_outliers(emb, n=99))==30

def test_strangers_come_first_also_in_a_clump():
    f = torch.randn(200,8)*.2 + torch.tensor([3.]+[0]*7); f[[17,40,90]] = torch.randn(3,8)*.2 - torch.tensor([0,3.]+[0]*6)
    assert set(find_outliers(EmbeddedImages(f), n=3)['index'])=={17,40,90}

# --- what to label next

def farthest_first(f, n, done=(), free=None):
    "As plain as can be, with all distances"
    f = f.double(); u = F.normalize(f,dim=1); u = F.normalize(u-u.mean(0),dim=1); d = 1-u@u.T; taken,picks = list(done),[]
    while len(picks)<n:
        ok = [i for i in (range(len(f)) if free is None else free) if i not in taken]
        i = min(ok, key=lambda i: d[i].mean()) if not taken else max(ok, key=lambda i: d[i][taken].min())
        taken.append(i); picks.append(i)
    return picks

@pytest.mark.parametrize('done', [[], [5], [29,3,3,17]])
def test_picks_are_those_of_a_plain_loop(done):
    emb = images_of(30); t = suggest_labels(emb, n=12, labelled=done, leave_out=0.)
    assert t['index'].tolist()==farthest_first(emb.features, 12, done) and t['pick'].tolist()==list(range(1,13)) and not set(t['index'])&set(done)
    d = t['distance'][0 if done else 1:]; assert d.is_monotonic_decreasing and (d>0).all() and math.isnan(t['distance'][0])==(not done)

def test_labelled_may_come_in_any_form():
    emb = images_of(30); mask = np.zeros(30, bool); mask[[4,20]] = True
    want = suggest_labels(emb, n=5, labelled=[20,4])['index'].tolist()
    for o in (torch.tensor([4,20]), np.array([4,20,4]), {4,20}, L(4,20), mask, torch.tensor(mask), mask.tolist(), pd.Series([4,20])): assert suggest_labels(emb, n=5, labelled=o)['index'].tolist()==want

def test_the_whole_pool_can_be_picked_and_nothing_twice():
    emb = images_of(30); assert sorted(suggest_labels(emb, n=30)['index'])==list(range(30))
    assert sorted(suggest_labels(emb, n=27, labelled=range(3))['index'])==list(range(3,30))
    assert suggest_labels(images_of(1), n=1)['index'].tolist()==[0]

def test_picks_go_on_where_labelling_stopped():
    emb = images_of(60); a = suggest_labels(emb, n=12)['index'].tolist()
    assert suggest_labels(emb, n=6, labelled=a[:6])['index'].tolist()==a[6:]

def test_the_odd_ones_are_left_out_until_nothing_else_is_left():
    f = torch.randn(100,16)*.5 + 2*F.one_hot(torch.arange(100)%4, 16); odd = [9,33,34,71,90]; f[odd] = 5.*F.one_hot(torch.arange(5)+8, 16)
    emb = EmbeddedImages(f); assert set(find_outliers(emb, n=5)['index'])==set(odd)
    assert len(set(suggest_labels(emb, n=10, leave_out=0.)['index'])&set(odd))>=3
    t = suggest_labels(emb, n=20, leave_out=.05); assert not set(t['index'])&set(odd)
    assert t['index'].tolist()==farthest_first(f, 20, free=[i for i in range(100) if i not in odd])
    assert not set(suggest_labels(emb, n=20)['index'])&set(odd)
    assert len(set(suggest_labels(emb, n=97)['index'])&set(odd))==2 # and of the odd ones, the least odd

def test_copies_are_not_picked_while_there_is_anything_else():
    f = torch.randn(12,6).repeat(10,1); t = suggest_labels(EmbeddedImages(f), n=13, leave_out=0.)
    assert len(set((t['index'][:12]%12).tolist()))==12 and t['distance'].iloc[-1]==pytest.approx(0, abs=1e-5)

def test_a_direction_that_all_share_does_not_hide_classes_that_differ_little():
    g = torch.Generator().manual_seed(0); y = torch.arange(200)%10; size = .01*1.3**y[:,None]
    f = size*(F.one_hot(y, 16) + .2*torch.randn(200,16,generator=g)) + torch.tensor([0.]*10+[5.]*6)
    assert len(set(y[suggest_labels(EmbeddedImages(f), n=10, leave_out=.05)['index'].tolist()].tolist()))>=8 # without centring: 4

def test_picks_are_the_same_twice_and_labels_play_no_part():
    a = suggest_labels(images_of(50), n=10); b = suggest_labels(images_of(50, labels=None), n=10)
    assert a['index'].tolist()==b['index'].tolist() and 'label' in a and 'label' not in b

def test_oddness_in_a_part_of_many_is_near_that_in_all(monkeypatch):
    f = torch.randn(600,8)*torch.linspace(.2,2,600)[:,None] + torch.tensor([3.]+[0]*7); u = F.normalize(f,dim=1); exact = explore._oddness(u, 20)
    np.testing.assert_allclose(exact, find_outliers(EmbeddedImages(f), n=600).sort_values('index')['distance'], atol=1e-6)
    monkeypatch.setattr(explore, '_chunk', lambda n: 7)
    part = explore._oddness(u, 20, n_ref=300); assert len(part)==600 and torch.corrcoef(torch.stack([part,exact]))[0,1]>.9

# --- tables

def test_what_is_cut_out_of_a_table_can_be_shown():
    t = find_outliers(images_of(), n=10)
    for o in (t, t.head(3), t[t['distance']>t['distance'].median()], t.sort_values('distance'), t.iloc[2:4], t.query('index>3'), t.copy(), pickle.loads(pickle.dumps(t.head(2)))[:0], t.reset_index(drop=True)):
        assert isinstance(o, ImageTable); fig = o.show(n=4); assert fig is None if not len(o) else sum(bool(a.images) for a in fig.axes)==min(4,len(o))
    rest = t.iloc[3:5].show(); assert titles(rest)[:2]==[f'{o:.3f}' for o in t['distance'][3:5]]

def test_a_table_has_names_and_labels_and_shows_its_own_images():
    items = [Path(f'{i}.png') for i in range(30)]; emb = images_of(items=items)
    t = find_outliers(emb, n=5); assert t['item'].tolist()==[items[i] for i in t['index']] and t['label'].tolist()==[emb.label(i) for i in t['index']]
    for ax,i in zip(t.show().axes, t['index']): np.testing.assert_allclose(shown(ax), emb.images[i].permute(1,2,0), atol=1e-6)
    p = find_duplicates(emb, threshold=.5, pixels=None).head(2); a = shown(p.show().axes[0]); x = emb.images
    np.testing.assert_allclose(a[:,:16], x[p['index'][0]].permute(1,2,0), atol=1e-6); np.testing.assert_allclose(a[:,-16:], x[p['index_2'][0]].permute(1,2,0), atol=1e-6)
    s = suggest_labels(emb, n=3); assert titles(s.show())==['1',*[f"{i}: {d:.3f}" for i,d in zip((2,3), s['distance'][1:])]]

# --- memory

@pytest.mark.parametrize('f', [lambda e: find_duplicates(e, pixels=None), lambda e: find_outliers(e), lambda e: suggest_labels(e, n=20), lambda e: suggest_labels(e, n=20, labelled=range(0,12000,2))])
def test_memory_is_bounded_by_a_chunk(f):
    emb = EmbeddedImages(torch.randn(12000,64)) # all similarities together: 549 MiB
    assert peak_mib(lambda: f(emb))<300

@pytest.mark.slow
def test_fifty_thousand_images_fit_in_memory():
    emb = EmbeddedImages(torch.randn(50_000,512)) # all similarities together: 9.3 GiB; the unit features: 98 MiB
    for f in (lambda: suggest_labels(emb, n=100), lambda: find_outliers(emb), lambda: find_duplicates(emb, pixels=None)): assert peak_mib(f)<800

@pytest.mark.slow
def test_pairs_of_a_collapsed_body_fit_in_memory():
    emb = EmbeddedImages(torch.ones(12_000,8)) # 72 million pairs
    with pytest.warns(UserWarning, match='collapsed'): assert peak_mib(lambda: find_duplicates(emb, pixels=None))<600
