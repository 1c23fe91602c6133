"Pictures in order and unnormalised; neighbours, pairs, outliers and picks against scikit-learn and plain loops"
from conftest import *
from fastbyol.data import load_square
from fastbyol.explore import (EmbeddedImages, ImageTable, embed_images, find_duplicates, find_outliers, plot_embeddings,
    show_neighbours, suggest_labels)
from matplotlib.cbook import is_math_text
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
    return EmbeddedImages(f, **{**dict(labels=y, vocab=list('abcdefgh')[:classes], images=dl_of(noise(n, seed=seed))), **kw})

def files_in(path, n=12, size=20, folders=2):
    for i,o in enumerate(noise(n, size)):
        f = path/f'{"abc"[i%folders]}'/f'{i:02}.png'
        f.parent.mkdir(exist_ok=True)
        PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(f)
    return find_images(path)

def pictures(emb, idxs):
    "The pictures `idxs`, none left out"
    ims = list(emb.pictures(idxs))
    assert len(ims)==len(idxs)
    return ims

def original(emb, i): return emb.images.dataset[i][0]
def titles(fig): return [ax.get_title() for ax in fig.axes]
def shown(ax): return ax.images[0].get_array()
def hwc(x): return x.permute(1,2,0)
def legend(ax): return [t.get_text() for t in ax.get_legend().get_texts()]
def all_tools(source, dl=None, **kw):
    "The numbers of the images that each tool finds; everything is drawn"
    plot_embeddings(source, dl, method='pca', thumbs=2, **kw)
    show_neighbours(source, dl, n=2, k=2, **kw)
    pairs = find_duplicates(source, dl, threshold=.5, pixels=.1, **kw)
    odd,picks = find_outliers(source, dl, n=3, **kw),suggest_labels(source, dl, n=3, **kw)
    for t in (pairs,odd,picks): t.show(2)
    return [t['index'].tolist() for t in (pairs,odd,picks)]

# --- images, their names and their pictures

@pytest.mark.parametrize('in_memory', [True,False])
def test_items_are_files_in_the_order_of_the_loader(model, tmp_path, in_memory):
    files = files_in(tmp_path)
    dls = unlabelled_dls(tmp_path, 16, bs=4, valid_pct=.25, in_memory=in_memory, num_workers=0, device=cpu)
    for dl in (dls.train,dls.valid):
        emb = embed_images(model, dl)
        assert emb.items==list(dl.dataset.items) and set(emb.items)<=set(files) and emb.labels is None
        for f,im in zip(emb.items, pictures(emb, range(len(emb)))):
            assert torch.equal(im, load_square(f, 3, 20).float()/255)

def test_pictures_of_a_labelled_loader_are_neither_normalised_nor_augmented(model, tmp_path):
    files_in(tmp_path)
    tfms = [*aug_transforms(), Normalize.from_stats(*imagenet_stats)]
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.25, seed=0, item_tfms=Resize(16), bs=4, num_workers=0,
                                       device=cpu, batch_tfms=tfms)
    emb = embed_images(model, dls.train)
    assert emb.items==list(dls.train.items) and emb.vocab==['a','b']
    assert [emb.label(i) for i in range(len(emb))]==[f.parent.name for f in emb.items]
    for f,im in zip(emb.items, pictures(emb, range(len(emb)))):
        want = image2tensor(PILImage.create(f).resize((16,16))).float()/255
        torch.testing.assert_close(im, want, atol=.1, rtol=0)

def test_items_of_a_data_frame_are_its_row_labels(model, tmp_path):
    df = pd.DataFrame(dict(name=files_in(tmp_path), label=list('xyz')*4), index=[f'row{i}' for i in range(12)])
    dls = ImageDataLoaders.from_df(df, path='/', valid_pct=.5, item_tfms=Resize(16), bs=2, num_workers=0, device=cpu)
    emb = embed_images(model, dls.train)
    assert [emb.label(i) for i in range(6)]==df.loc[emb.items, 'label'].tolist()

def test_items_without_names_are_numbered(model):
    tensors,tuples = TorchDL(list(noise(9)), 4),TorchDL(TensorDataset(noise(9)), 4)
    for dl in (dl_of(noise(9)), dl_of(noise(9), [0]*9), tuples, tensors):
        assert embed_images(model, dl).items==list(range(9))

def test_items_of_torchvision_folders_are_files(model, tmp_path):
    import torchvision as tv
    files = files_in(tmp_path)
    ds = tv.datasets.ImageFolder(tmp_path, tv.transforms.ToTensor())
    emb = embed_images(model, TorchDL(ds, 5, shuffle=True))
    assert emb.items==[str(f) for f in files]
    assert torch.equal(next(emb.pictures([7])), load_square(files[7], 3, 20).float()/255)

@pytest.mark.parametrize('norm', [None, imagenet_stats])
def test_pictures_are_in_order_and_unnormalised_whatever_the_loader_does(model, norm):
    x = noise(29)
    norm = norm and [Normalize.from_stats(*norm, cuda=False)]
    for dl in (dl_of(x, norm=norm, shuffle=True, drop_last=True), TorchDL(TensorDataset(x), 8, shuffle=True)):
        emb = embed_images(model, dl)
        for i,im in zip([28,0,13,13], pictures(emb, torch.tensor([28,0,13,13]))): torch.testing.assert_close(im, x[i])

@pytest.mark.parametrize('n_in', [1,2,4])
def test_any_number_of_channels_is_drawn(n_in):
    x = noise(12, n_in=n_in)
    all_tools(small_byol(n_in=n_in), dl_of(x, [0,1]*6))
    a = shown(show_neighbours(x.flatten(1), dl_of(x), queries=[4]).axes[0])
    want = x[4][:3] if n_in>=3 else x[4][:1].expand(3,-1,-1)
    np.testing.assert_allclose(a, hwc(want), atol=1e-6)

def test_pictures_come_from_loaders_and_files(tmp_path):
    files,f = files_in(tmp_path),torch.randn(12,4)
    x = torch.stack([load_square(o, 3, 20) for o in files])
    for images in (None, dl_of(x/255), TorchDL(TensorDataset(x), 4)):
        emb = EmbeddedImages(f, items=files, images=images)
        torch.testing.assert_close(next(emb.pictures([5])), x[5]/255)

def test_features_need_no_pictures_until_they_are_drawn():
    emb = embed_images(np.random.default_rng(0).normal(size=(40,5)))
    plot_embeddings(emb, method='pca')
    assert len(find_duplicates(emb, pixels=None, threshold=-1.))==40*39//2
    for t in (find_outliers(emb, n=3), suggest_labels(emb, n=3)):
        assert list(t['item'])==list(t['index'])
        with pytest.raises(ValueError, match='no pictures'): t.show()
    with pytest.raises(ValueError, match='no pictures'): find_duplicates(emb, threshold=0.)

def test_labels_that_are_no_classes_are_ignored():
    f = torch.randn(4,3)
    for y in (torch.rand(4), torch.zeros(4,2), torch.zeros(4,8,8,dtype=torch.long), None):
        assert EmbeddedImages(f, y).labels is None
    for y in ([3,1,1,0], np.array([3,1,1,0]), torch.tensor([3,1,1,0], dtype=torch.uint8)):
        assert EmbeddedImages(f, y).labels.tolist()==[3,1,1,0]

@pytest.mark.parametrize('kind', ['learner','byol','loaded','features'])
def test_every_tool_takes_every_source(model, kind, tmp_path):
    dl = dl_of(noise(12), [0,1]*6)
    source = features = get_embeddings(model, dl)[0]
    if kind=='learner': source = byol_learn(model=model)
    elif kind=='loaded': source = load_body(save_body(model, tmp_path/'b'), arch=conv_body())
    elif kind=='byol': source = model
    torch.testing.assert_close(embed_images(source, dl).features, features)
    assert all_tools(source, dl)==all_tools(EmbeddedImages(features, images=dl))

def test_the_target_may_embed_the_images(model):
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in model.target.parameters()]
    features = embed_images(model, dl_of(noise(12)), target=True).features
    assert torch.equal(features, get_embeddings(model, dl_of(noise(12)), target=True)[0])
    assert not torch.allclose(features, embed_images(model, dl_of(noise(12))).features)

def test_looking_changes_neither_modes_nor_weights_nor_random_numbers(model):
    model.train()
    model.body[1].eval()
    def state():
        numpy_state = torch.tensor(np.random.get_state()[1].astype(np.int64))
        return [torch.get_rng_state(), numpy_state], random.getstate(), [o.training for o in model.modules()]
    dls = dl_of(noise(20), [0,1]*10, shuffle=True), TorchDL(TensorDataset(noise(20)), 4, shuffle=True)
    (rng,*before),sd = state(),sd_of(model)
    for dl in dls: all_tools(model, dl)
    rng_after,*after = state()
    assert all(map(torch.equal, rng, rng_after)) and before==after and same_sd(sd_of(model), sd)

@pytest.mark.parametrize('f,exc,msg', [
    (lambda: EmbeddedImages(torch.tensor([[1.,math.nan],[1,2]])), ValueError, 'diverged'),
    (lambda: EmbeddedImages(torch.randn(2,2), ['a','b']), ValueError, "numbers, got 'a'.*vocab"),
    (lambda: embed_images(small_byol()), TypeError, r'dls\.train'),
    (lambda: embed_images(small_byol(), image_dls(noise(16))), TypeError, r'dls\.train'),
    (lambda: plot_embeddings(images_of(), method='umap'), ValueError, "'tsne' or 'pca'"),
    (lambda: show_neighbours(images_of(), queries=[30]), IndexError, 'index 30'),
    (lambda: show_neighbours(images_of(), queries=[.5]), IndexError, 'tensors used as indices'),
    (lambda: suggest_labels(images_of(), n=31), ValueError, '31 .* only 30'),
    (lambda: suggest_labels(images_of(), n=29, labelled=[3,4]), ValueError, '29 .* only 28')])
def test_mistakes_are_named(f, exc, msg):
    with pytest.raises(exc, match=msg): f()

# --- names are data, not markup

odd_names = ['$5_$10_bill', '_background', 'a\nb', '', '猫', r'\frac{', r'x\$y$', '%s {0}', '<b>bold</b>']

@pytest.mark.filterwarnings('ignore:Glyph')
def test_a_legend_has_every_class_whatever_its_name():
    emb = EmbeddedImages(torch.randn(18,4), torch.arange(18)%9, vocab=odd_names, images=dl_of(noise(18)))
    ax = plot_embeddings(emb, thumbs=2, method='pca')
    ax.figure.canvas.draw()
    drawn = legend(ax)
    assert len(drawn)==9 and not any(map(is_math_text, drawn))
    for name,text in zip(odd_names, drawn): assert name.replace('\n', ' ') in text.replace(r'\$', '$')

@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('as_items', [True,False], ids=['files','classes'])
def test_neighbours_are_drawn_whatever_their_names(as_items):
    names = dict(items=odd_names) if as_items else dict(labels=range(9), vocab=odd_names)
    if not as_items: names['labels'] = list(names['labels'])
    fig = show_neighbours(EmbeddedImages(torch.randn(9,4), images=dl_of(noise(9)), **names), queries=range(9), k=1)
    fig.canvas.draw()
    drawn = titles(fig)[::2]
    assert not any(map(is_math_text, drawn)) and drawn[0].replace(r'\$', '$') in ('$5_$10_bill', '…5_$10_bill')

def test_a_picture_that_cannot_be_read_is_drawn_blank(tmp_path):
    files = files_in(tmp_path, 4); files[1].write_bytes(files[1].read_bytes()[:60]); files[2].unlink()
    emb = EmbeddedImages(torch.rand(4, 3), items=files)
    with pytest.warns(UserWarning, match=f'{files[2].name} is drawn blank'): x = pictures(emb, range(4))
    assert [bool((o==1).all()) for o in x]==[False,True,True,False]
    with pytest.warns(UserWarning, match='blank'): plot_embeddings(emb); show_neighbours(emb)

def test_a_table_in_a_notebook_shows_a_dollar_as_a_dollar():
    html = find_outliers(EmbeddedImages(torch.randn(9,4), items=odd_names))._repr_html_()
    assert 'tex2jax_ignore' in html and '&lt;b&gt;bold' in html

# --- the map

def points(ax): return np.concatenate([c.get_offsets() for c in ax.collections])

def test_pca_is_that_of_scikit_learn_coloured_by_class():
    emb = images_of(30)
    ax = plot_embeddings(emb, method='pca', thumbs=0)
    want = PCA(2).fit_transform(emb.unit.double())
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for c,col in enumerate(ax.collections):
        np.testing.assert_allclose(np.abs(col.get_offsets()), np.abs(want[rows[emb.labels[rows]==c]]), atol=1e-6)
        assert tuple(col.get_facecolor()[0][:3])==plt.get_cmap('tab10')(c)[:3]
    assert legend(ax)==['a','b','c']

@pytest.mark.parametrize('n,method', [*((n,'tsne') for n in (1,2,3,4,5,8,40)), (1,'pca'), (2,'pca')])
def test_few_points_are_drawn(n, method):
    z = points(plot_embeddings(images_of(n), method=method))
    assert z.shape==(n,2) and np.isfinite(z).all()

@pytest.mark.parametrize('method', ['tsne','pca'])
def test_images_that_are_all_the_same_are_drawn(method):
    for f in (torch.ones(9,5), torch.zeros(9,5)):
        assert np.isfinite(points(plot_embeddings(EmbeddedImages(f, images=dl_of(noise(9))), method=method))).all()

def test_a_map_is_the_same_twice_and_of_a_random_part():
    emb = images_of(50)
    axs = [plot_embeddings(emb, max_items=30, thumbs=0, seed=s) for s in (0,0,1)]
    a,b,c = map(points, axs)
    assert a.shape==(30,2) and np.array_equal(a, b) and not np.array_equal(a, c)
    assert '30 images' in axs[0].get_title()

def test_pictures_on_the_map_do_not_cover_each_other():
    ax = plot_embeddings(images_of(60), method='pca', thumbs=25)
    ax.figure.canvas.draw()
    frames = [o.patch.get_window_extent() for o in ax.artists if isinstance(o, AnnotationBbox)]
    assert 5<len(frames)<=25 and not any(a.overlaps(b) for i,a in enumerate(frames) for b in frames[:i])

def test_pictures_on_the_map_are_those_of_their_points():
    emb = images_of(60)
    ax = plot_embeddings(emb, method='pca', thumbs=25)
    z = PCA(2).fit_transform(emb.unit.double())
    for o in ax.artists:
        i = int(np.abs(np.abs(z)-np.abs(np.array(o.xy))).sum(1).argmin())
        np.testing.assert_allclose(o.offsetbox.get_data(), hwc(original(emb, i)), atol=1e-6)
        assert o.patch.get_edgecolor()[:3]==plt.get_cmap('tab10')(emb.labels[i].item())[:3]

def test_without_labels_there_is_no_legend():
    assert plot_embeddings(images_of(labels=None), method='pca').get_legend() is None

def test_many_classes_have_a_colour_each_and_no_legend():
    ax = plot_embeddings(EmbeddedImages(torch.randn(60,5), torch.arange(60)%30), method='pca')
    assert ax.get_legend() is None and len({tuple(c.get_facecolor()[0]) for c in ax.collections})==30

def test_axes_and_title_may_be_given():
    _,ax = plt.subplots()
    assert plot_embeddings(images_of(classes=1), ax=ax, title='mine', method='pca') is ax and ax.get_title()=='mine'

# --- neighbours

@pytest.mark.parametrize('k', [1,5,100])
def test_neighbours_are_those_of_scikit_learn(k):
    emb = images_of(12)
    fig = show_neighbours(emb, queries=range(3), k=k)
    nn_ = NearestNeighbors(n_neighbors=min(k,11), metric='cosine', algorithm='brute').fit(emb.features.double())
    distances,idxs = nn_.kneighbors()
    rows = np.array(fig.axes).reshape(3, -1)[:,1:]
    np.testing.assert_allclose([[float(ax.get_title()) for ax in row] for row in rows], 1-distances[:3], atol=1e-3)
    for row,nearest in zip(rows, idxs):
        for ax,i in zip(row, nearest): np.testing.assert_allclose(shown(ax), hwc(original(emb, i)), atol=1e-6)

def test_the_query_is_left_out_and_its_copies_are_not():
    f,x = torch.randn(10,4),noise(10)
    f[7],f[8] = f[3]*2,f[3]
    fig = show_neighbours(EmbeddedImages(f, images=dl_of(x)), queries=[3], k=3)
    assert titles(fig)[:3]==['3','1.000','1.000'] and titles(fig)[3]!='1.000'
    assert {next(i for i in range(10) if np.allclose(shown(ax), hwc(x[i]))) for ax in fig.axes[1:3]}=={7,8}

def test_frames_tell_whether_the_class_is_the_same():
    emb = images_of(30)
    fig = show_neighbours(emb, queries=[4,9], k=4)
    for r,q in enumerate((4,9)):
        frames = [matplotlib.colors.to_hex(ax.spines['left'].get_edgecolor()) for ax in fig.axes[r*5+1:r*5+5]]
        nearest = (emb.unit @ emb.unit[q]).argsort(descending=True)[1:5]
        want = ['tab:green' if emb.labels[i]==emb.labels[q] else 'tab:red' for i in nearest]
        assert frames==[matplotlib.colors.to_hex(o) for o in want]

def test_without_labels_there_are_no_frames():
    fig = show_neighbours(images_of(labels=None), n=2, k=2)
    assert not any(ax.spines['left'].get_visible() for ax in fig.axes)

def test_queries_are_drawn_reproducibly():
    emb = images_of(labels=None)
    a,b,c = (titles(show_neighbours(emb, n=3, k=1, seed=s)) for s in (0,0,1))
    assert a==b!=c

# --- duplicates

def pairs(t): return list(zip(t['index'], t['index_2']))

def test_pairs_are_those_of_a_loop():
    emb = images_of(40)
    f = emb.features
    cosine = {(i,j): F.cosine_similarity(f[i], f[j], 0).item() for j in range(40) for i in range(j)}
    t = find_duplicates(emb, threshold=.9, pixels=None)
    assert len(t)>10 and sorted(pairs(t))==sorted(p for p,c in cosine.items() if c>=.9)
    np.testing.assert_allclose(t['similarity'], [cosine[p] for p in pairs(t)], atol=1e-5)
    assert t['similarity'].is_monotonic_decreasing

@pytest.mark.parametrize('n_rows', [1,7])
def test_pairs_are_the_same_in_chunks(n_rows):
    unit = images_of(40).unit
    for chunk,whole in zip(explore._similar_pairs(unit, .5, 99, 40*n_rows), explore._similar_pairs(unit, .5, 99)):
        torch.testing.assert_close(chunk, whole)

def test_too_many_pairs_leave_the_most_similar_and_a_warning():
    emb = images_of(40)
    all_pairs = find_duplicates(emb, threshold=.5, pixels=None)
    with pytest.warns(UserWarning, match='10 most similar.*collapsed'):
        t = find_duplicates(emb, threshold=.5, pixels=None, max_pairs=10)
    assert pairs(t)==pairs(all_pairs)[:10]

def test_a_collapsed_body_is_put_right_by_the_pixels():
    x = torch.rand(20,3,16,16)
    x[11] = x[4]
    emb = EmbeddedImages(torch.ones(20,5), images=dl_of(x))
    assert len(find_duplicates(emb, pixels=None))==190 and pairs(find_duplicates(emb))==[(4,11)]

def test_brightness_and_contrast_do_not_count_and_other_images_do():
    x = torch.rand(6,3,32,32)*.5 + .25
    x[1],x[2],x[3] = x[0]*.7,(x[0]+.2).clamp(max=1),1-x[0]
    emb = EmbeddedImages(torch.ones(6,2), images=dl_of(x))
    t = find_duplicates(emb)
    assert set(pairs(t))=={(0,1),(0,2),(1,2)} and (t['pixels']>.95).all()
    assert find_duplicates(emb, pixels=-1.)['pixels'].min()<0

def test_blank_images_and_images_of_different_sizes_are_compared():
    x = [torch.zeros(3,9,9), torch.full((3,20,30),.003), torch.rand(3,16,16), torch.rand(3,16,16)]
    x.append(F.interpolate(x[2][None], (32,32))[0])
    t = find_duplicates(EmbeddedImages(torch.ones(5,2), images=dl_of(x, bs=1)))
    assert set(pairs(t))=={(0,1),(2,4)} and t.show()

def test_dropping_the_second_of_each_pair_leaves_no_pair():
    emb = EmbeddedImages(torch.randn(8,4).repeat(5,1), images=dl_of(noise(8).repeat(5,1,1,1)))
    t = find_duplicates(emb)
    assert len(t)==8*10 and set(range(40))-set(t['index_2'])==set(range(8))

def test_an_empty_table_can_be_shown(capsys):
    t = find_duplicates(images_of(), threshold=1.)
    assert len(t)==0 and t.show() is None and 'empty' in capsys.readouterr().out
    assert list(t)==['index','item','label','index_2','item_2','label_2','similarity','pixels']

# --- outliers

@pytest.mark.parametrize('k', [1,5,100])
def test_outliers_are_those_of_scikit_learn(k):
    emb = images_of(30)
    nn_ = NearestNeighbors(n_neighbors=min(k,29), metric='cosine', algorithm='brute').fit(emb.features.double())
    want = nn_.kneighbors()[0].mean(1)
    t = find_outliers(emb, n=99, k=k)
    np.testing.assert_allclose(t['distance'], want[t['index']], atol=1e-5)
    assert sorted(t['index'])==list(range(30)) and t['distance'].is_monotonic_decreasing

def test_strangers_come_first_also_in_a_clump():
    f = torch.randn(200,8)*.2 + torch.tensor([3.]+[0]*7)
    f[[17,40,90]] = torch.randn(3,8)*.2 - torch.tensor([0,3.]+[0]*6)
    assert set(find_outliers(EmbeddedImages(f), n=3)['index'])=={17,40,90}

# --- what to label next

def farthest_first(f, n, done=(), free=None):
    "As plain as can be, with all distances"
    u = F.normalize(f.double(), dim=1)
    u = F.normalize(u-u.mean(0), dim=1)
    d,taken,picks = 1-u@u.T,list(done),[]
    while len(picks)<n:
        ok = [i for i in ifnone(free, range(len(f))) if i not in taken]
        if taken: i = max(ok, key=lambda i: d[i][taken].min())
        else: i = min(ok, key=lambda i: d[i].mean())
        taken.append(i)
        picks.append(i)
    return picks

@pytest.mark.parametrize('done', [[], [5], [29,3,3,17]])
def test_picks_are_those_of_a_plain_loop(done):
    emb = images_of(30)
    t = suggest_labels(emb, n=12, labelled=done, leave_out=0.)
    assert t['index'].tolist()==farthest_first(emb.features, 12, done) and t['pick'].tolist()==list(range(1,13))
    d = t['distance'][0 if done else 1:]
    assert d.is_monotonic_decreasing and (d>0).all() and math.isnan(t['distance'][0])==(not done)

def test_labelled_may_come_in_any_form():
    emb = images_of(30)
    want = suggest_labels(emb, n=5, labelled=[20,4])['index'].tolist()
    forms = [torch.tensor([4,20]), np.array([4,20,4]), {4,20}, L(4,20), pd.Series([4,20])]
    for o in forms: assert suggest_labels(emb, n=5, labelled=o)['index'].tolist()==want

def test_the_whole_pool_can_be_picked_and_nothing_twice():
    emb = images_of(30)
    assert sorted(suggest_labels(emb, n=30)['index'])==list(range(30))
    assert sorted(suggest_labels(emb, n=27, labelled=range(3))['index'])==list(range(3,30))
    assert suggest_labels(images_of(1), n=1)['index'].tolist()==[0]

def test_picks_resume_where_labelling_stopped():
    emb = images_of(60)
    picks = suggest_labels(emb, n=12)['index'].tolist()
    assert suggest_labels(emb, n=6, labelled=picks[:6])['index'].tolist()==picks[6:]

def pool_with_odd_ones():
    f = torch.randn(100,16)*.5 + 2*F.one_hot(torch.arange(100)%4, 16)
    odd = [9,33,34,71,90]
    f[odd] = 5.*F.one_hot(torch.arange(5)+8, 16)
    return f,odd

def test_the_odd_ones_are_left_out():
    f,odd = pool_with_odd_ones()
    emb = EmbeddedImages(f)
    assert len(set(suggest_labels(emb, n=10, leave_out=0.)['index'])&set(odd))>=3
    picks = suggest_labels(emb, n=20, leave_out=.05)['index'].tolist()
    assert picks==farthest_first(f, 20, free=[i for i in range(100) if i not in odd])

def test_the_least_odd_ones_are_picked_where_nothing_else_is_left():
    f,odd = pool_with_odd_ones()
    assert len(set(suggest_labels(EmbeddedImages(f), n=97)['index'])&set(odd))==2

def test_copies_are_not_picked_while_there_is_anything_else():
    t = suggest_labels(EmbeddedImages(torch.randn(12,6).repeat(10,1)), n=13, leave_out=0.)
    assert len(set((t['index'][:12]%12).tolist()))==12 and t['distance'].iloc[-1]==pytest.approx(0, abs=1e-5)

def test_a_direction_that_all_share_does_not_hide_classes_that_differ_little():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200)%10
    f = .01*1.3**y[:,None]*(F.one_hot(y, 16) + .2*torch.randn(200,16,generator=g)) + torch.tensor([0.]*10+[5.]*6)
    picks = suggest_labels(EmbeddedImages(f), n=10, leave_out=.05)['index'].tolist()
    assert len(set(y[picks].tolist()))>=8 # without subtracting the mean: 4

def test_labels_play_no_part_in_picking():
    a,b = (suggest_labels(images_of(50, **kw), n=10) for kw in ({}, dict(labels=None)))
    assert a['index'].tolist()==b['index'].tolist() and 'label' in a and 'label' not in b

# --- tables

cuts = dict(head=lambda t: t.head(3), mask=lambda t: t[t['distance']>t['distance'].median()], copy=lambda t: t.copy(),
    sort=lambda t: t.sort_values('distance'), iloc=lambda t: t.iloc[2:4], query=lambda t: t.query('index>3'),
    reset=lambda t: t.reset_index(drop=True), pickled=lambda t: pickle.loads(pickle.dumps(t.head(2)))[:0])

@pytest.mark.parametrize('cut', list(cuts.values()), ids=list(cuts))
def test_rows_of_a_table_can_be_shown(cut):
    rows = cut(find_outliers(images_of(), n=10))
    fig = rows.show(n=2)
    assert isinstance(rows, ImageTable) and (fig is None)==(not len(rows))
    if fig: assert titles(fig)[:2]==[f'{o:.3f}' for o in rows['distance'][:2]]

def test_a_table_has_names_and_labels_and_shows_its_images():
    emb = images_of(items=[Path(f'{i}.png') for i in range(30)])
    t = find_outliers(emb, n=5)
    assert t['item'].tolist()==[emb.items[i] for i in t['index']]
    assert t['label'].tolist()==[emb.label(i) for i in t['index']]
    for ax,i in zip(t.show().axes, t['index']): np.testing.assert_allclose(shown(ax), hwc(original(emb, i)), atol=1e-6)

def test_a_pair_is_shown_side_by_side():
    emb = images_of()
    pair = find_duplicates(emb, threshold=.5, pixels=None).head(1)
    for ax,i in zip(pair.show().axes, (pair['index'][0],pair['index_2'][0]), strict=True):
        np.testing.assert_allclose(shown(ax), hwc(original(emb, i)), atol=1e-6)

def test_the_first_pick_has_no_distance_to_show():
    t = suggest_labels(images_of(), n=3)
    assert titles(t.show())==['\u200b', *[f'{d:.3f}' for d in t['distance'][1:]]]

# --- memory

@pytest.mark.parametrize('f', [lambda e: find_duplicates(e, pixels=None),
    lambda e: suggest_labels(e, n=5, labelled=range(0,9000,2))])
def test_memory_is_bounded_by_a_chunk(f):
    emb = EmbeddedImages(torch.randn(9000,16)) # all similarities together: 309 MiB
    assert peak_mib(lambda: f(emb))<150

@pytest.mark.slow
@pytest.mark.parametrize('f', [lambda e: find_duplicates(e, pixels=None), find_outliers,
    lambda e: suggest_labels(e, n=100)])
def test_fifty_thousand_images_fit_in_memory(f):
    emb = EmbeddedImages(torch.randn(50_000,512)) # all similarities together: 9.3 GiB; the unit features: 98 MiB
    assert peak_mib(lambda: f(emb))<800

@pytest.mark.slow
def test_pairs_of_a_collapsed_body_fit_in_memory():
    emb = EmbeddedImages(torch.ones(12_000,8)) # 72 million pairs
    with pytest.warns(UserWarning, match='collapsed'): assert peak_mib(lambda: find_duplicates(emb, pixels=None))<600
