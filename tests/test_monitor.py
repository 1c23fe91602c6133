"Monitors: they leave training alone to the bit, say the truth, and call a collapse a collapse"
from conftest import *
from fastbyol.core import eval_mode, fixed_rng, to_unit
from fastbyol.monitor import effective_rank, feature_std
from fastai.callback.training import GradientAccumulation
from fastai.callback.tracker import SaveModelCallback
from torch.utils._python_dispatch import TorchDispatchMode

def classes(n=48, n_c=3, size=16, seed=0):
    "Noise images, brighter in another third for each class, and their labels"
    y = [i%n_c for i in range(n)]
    x = noise(n, size, seed=seed)*.3
    for i,c in enumerate(y): x[i,:,c*size//n_c:(c+1)*size//n_c] += .7
    return x.clamp(0,1),y

def labelled(n=48, n_val=16, seed=0, shuffle=False, **kw):
    x,y = classes(n, seed=seed)
    return image_dls(x, n_val, y=y, shuffle=shuffle, **kw)

def relabelled(y, n_val=16):
    "The images of `classes` with other labels"
    items = [(TensorImage(x), o) for x,o in zip(classes()[0], y)]
    return DataLoaders(*[TfmdDL(o, bs=8, num_workers=0, device=cpu) for o in (items[:-n_val], items[-n_val:])], device=cpu)

def knn(**kw): return KNNCallback(labelled(seed=1), **kw)
def probe(**kw): return OnlineProbe(n_out=3, **kw)
def health(n=16, **limits):
    "A `HealthMonitor` with other limits"
    cb = HealthMonitor(n)
    cb.limits = {**cb.limits, **limits}
    return cb
def monitors(): return [health(), probe(), knn()]

_x,_y = classes()
def nth_image(i): return TensorImage(_x[i])
def nth_class(i): return TensorCategory(_y[i])
def saveable_dls():
    "Data that can be exported"
    dsets = Datasets(range(48), [[nth_image],[nth_class]], splits=[range(32),range(32,48)])
    return dsets.dataloaders(bs=8, num_workers=0, device=cpu)

class Crash(Callback):
    def after_batch(self): raise KeyboardInterrupt

# --- all of them

def run(cbs):
    set_seed(0)
    learn = byol_learn(labelled(shuffle=True), views=tuple(byol_views(16)), cbs=cbs)
    learn.fit_one_cycle(2, 3e-3)
    return learn,(random.random(), np.random.rand(), torch.rand(1).item())

def test_training_is_the_same_to_the_bit_with_and_without_monitors():
    plain,rng = run([])
    learn,rng2 = run([knn(max_items=20), probe(), health()])
    assert same_sd(sd_of(plain), sd_of(learn)) and rng==rng2
    assert [o[:2] for o in learn.recorder.values]==[o[:2] for o in plain.recorder.values]

def test_columns_come_and_go():
    learn = byol_learn(labelled(), cbs=monitors())
    for _ in range(2):
        learn.fit(2, 1e-3)
        assert sorted(learn.recorder.metric_names[3:-1])==['knn','probe','rank','std'] and len(learn.metrics)==0
        last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
        for cb in (learn.knn,learn.probe,learn.health):
            for col in cb.columns: assert last[col]==cb.history[col].iloc[-1]

def test_columns_and_hooks_are_not_doubled_after_an_interrupt():
    learn = byol_learn(labelled(), cbs=monitors())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=Crash())
    learn.fit(1, 1e-3)
    assert len(learn.recorder.metric_names)==3+4+1 and len(learn.metrics)==0
    assert not learn.model.keeps_features

def test_own_metrics_stay():
    def mean_pred(pred, targ): return pred.mean()
    learn = byol_learn(labelled(), cbs=knn(), metrics=mean_pred)
    learn.fit(1, 1e-3)
    assert learn.recorder.metric_names[3:5]==['mean_pred','knn'] and learn.metrics.attrgot('name')==['mean_pred']

# --- every callback in every entry point

def ours(tmp_path):
    "A maker of each callback of ours, by name"
    from fastbyol import device, optim
    res = dict(knn=knn, probe=probe, health=health, all=monitors,
               checkpoint=lambda: CheckpointCallback(tmp_path/'run'), schedule=lambda: optim.LRSchedule(1e-3))
    return dict(res, precision=lambda: device.DeviceMixedPrecision('bf16'))

def entries(tmp_path):
    "What a user calls on a `Learner`, by name"
    return dict(validate=lambda o: o.validate(), get_preds=lambda o: o.get_preds(), summary=lambda o: o.summary(),
                lr_find=lambda o: o.lr_find(num_it=6, show_plot=False), show_results=lambda o: o.show_results(max_n=2),
                export=lambda o: o.export(tmp_path/'l.pkl'))

def outcomes(cbs, tmp_path):
    "What each entry point does before, between and after fits, and whether histories grew only while training"
    learn,res = byol_learn(saveable_dls(), cbs=cbs, path=tmp_path),{}
    for when in ('before','between','after'):
        for entry,f in entries(tmp_path).items():
            try: res[when,entry] = f(learn) and None
            except Exception as e: res[when,entry] = f'{type(e).__name__}: {e}'
        for cb in (getattr(learn, o, None) for o in ('knn','probe','health')):
            if cb is not None: assert (len(cb.history)>0)==(when!='before')
        if when!='after': learn.fit(1, 1e-3)
    plt.close('all')
    return res

@pytest.fixture(scope='module')
def plain(tmp_path_factory): return outcomes([], tmp_path_factory.mktemp('plain'))

def test_every_entry_point_works_with_our_main_callback(plain):
    assert {k for k,v in plain.items() if v}<={(when,'show_results') for when in ('before','between','after')}

names = 'knn probe health all checkpoint schedule precision'.split()
@pytest.mark.parametrize('name', names)
def test_every_callback_in_every_entry_point_before_between_and_after_fits(name, plain, tmp_path):
    assert outcomes(ours(tmp_path)[name](), tmp_path)==plain

def test_looking_at_unlabelled_images_with_a_probe():
    learn = byol_learn(cbs=probe())
    learn.summary(); learn.validate(); learn.get_preds()

def test_reports_before_the_first_fit():
    learn = byol_learn(labelled(), cbs=monitors())
    assert learn.health.report()=='Not measured yet.' and not learn.health.collapsed and not len(learn.health.advice)
    assert not len(learn.knn.history) and not len(learn.probe.history)
    with pytest.raises(ValueError, match='train first'): learn.plot_curves()

def test_looking_between_fits_keeps_the_histories():
    learn = byol_learn(labelled(), cbs=monitors())
    learn.fit(1, 1e-3)
    before = [o.history for o in (learn.knn,learn.probe,learn.health)]
    learn.lr_find(num_it=8, show_plot=False); learn.get_preds(); learn.validate(); learn.summary()
    for a,b in zip(before, (learn.knn,learn.probe,learn.health)): pd.testing.assert_frame_equal(a, b.history)

def test_a_learner_with_monitors_is_exported_without_their_images(tmp_path):
    learn = byol_learn(dls := saveable_dls(), cbs=monitors(), path=tmp_path)
    learn.fit(1, 1e-3)
    learn.export('l.pkl')
    new = load_learner(tmp_path/'l.pkl')
    assert new.knn.pair is None and len(new.knn.history)==2 and new.probe.head is not None and len(new.health.history)==2
    new.dls = dls; new.opt = None
    with pytest.raises(ValueError, match='exported'): hush(new).fit(1, 1e-3)

@pytest.mark.parametrize('make', [knn,probe,health])
def test_histories_resume_after_load_state_dict(make):
    learn = byol_learn(labelled(), cbs=(cb := make()))
    learn.fit(2, 1e-3)
    torch.save(cb.state_dict(), file := io.BytesIO()); file.seek(0)
    other = byol_learn(labelled(), cbs=(cb2 := make()))
    cb2.load_state_dict(torch.load(file, weights_only=True)) # plain enough for a checkpoint
    pd.testing.assert_frame_equal(cb.history, cb2.history)
    other.fit(4, 1e-3, start_epoch=2)
    assert cb2.history.epoch.tolist()[-2:]==[3,4] and cb2.history.epoch.is_unique and len(cb2.history)==len(cb.history)+2
    other.fit(1, 1e-3)
    assert len(cb2.history)==len(cb.history)-1 # a new run, a new history

# --- nothing waits for the device

class NoReading(TorchDispatchMode):
    "Fails where a value is read back from a tensor"
    ops = '_local_scalar_dense is_nonzero equal nonzero masked_select'.split()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split('.')[0] not in self.ops, func
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('mask', [None, 2])
def test_monitors_read_nothing_from_the_device_within_an_epoch(mask):
    class Watch(Callback):
        "The events of the monitors between the first batch and the last, as `Learner` calls them"
        order,run_valid = -99,False
        def before_batch(self):
            if self.iter<1: return
            for cb in (self.learn.health,self.learn.probe,self.learn.knn):
                for event in ('before_batch','after_batch','before_step','after_step','after_pred','after_loss'):
                    f = getattr(type(cb), event, None)
                    if f and f is not getattr(Callback, event, None): setattr(cb, event, partial(quiet, f, cb))
    def quiet(f, cb):
        with NoReading(): f(cb)
    learn = byol_learn(labelled(), cbs=[health(), OnlineProbe(n_out=3, mask=mask), knn(), Watch()])
    learn.fit(2, 1e-3)
    assert 'before_batch' in vars(learn.probe) and len(learn.probe.history)==2

# --- labels

@pytest.mark.parametrize('y', [TensorMultiCategory([1.,0.,1.]), tensor(39.5), tensor(.5)])
@pytest.mark.parametrize('make', [lambda dls: OnlineProbe(n_out=3), KNNCallback])
def test_labels_that_are_no_classes_are_refused_before_training(make, y):
    dls = relabelled([y]*48)
    learn = byol_learn(dls, cbs=make(dls)); before = sd_of(learn)
    with pytest.raises(ValueError, match='one class per image'): learn.fit(1, 1e-3)
    assert same_sd(before, sd_of(learn))

def test_a_class_beyond_the_last_is_named_before_training():
    learn = byol_learn(relabelled([tensor(o) for o in range(39,87)]), cbs=probe()); before = sd_of(learn)
    with pytest.raises(ValueError, match='outside of the 3 classes'): learn.fit(1, 1e-3)
    assert same_sd(before, sd_of(learn))

def test_a_class_beyond_the_last_is_named_after_the_epoch():
    learn = byol_learn(relabelled([tensor(o) for o in [0,1]*12+[9]*24]), cbs=probe())
    with pytest.raises(ValueError, match='outside of the 3 classes'): learn.fit(1, 1e-3)

@pytest.mark.parametrize('make', [lambda: OnlineProbe(), lambda: OnlineProbe(n_out=3), lambda: KNNCallback(image_dls(noise(24)))])
def test_labels_are_needed(make):
    learn = byol_learn(cbs=make()); before = sd_of(learn)
    with pytest.raises(ValueError, match='needs labels'): learn.fit(1, 1e-3)
    assert same_sd(before, sd_of(learn))

# --- nearest neighbours

@pytest.mark.parametrize('kw', [{}, dict(k=3), dict(target=True)])
def test_knn_column_is_knn_accuracy(kw):
    dls = labelled(60, 30, seed=1)
    learn = byol_learn(cbs=KNNCallback(dls, **kw), tau=.5); learn.fit(1, 1e-2)
    assert learn.knn.history.knn.iloc[-1]==knn_accuracy(learn, dls.train, dls.valid, **kw)
    assert learn.knn.history.epoch.tolist()==[0,1]

def test_knn_before_training_is_that_of_random_weights():
    dls = labelled(seed=1); learn = byol_learn(cbs=KNNCallback(dls)); start = knn_accuracy(learn, *dls.loaders)
    learn.fit(1, .1)
    assert learn.knn.history.knn[0]==start

def test_knn_every_and_last_epoch():
    learn = byol_learn(cbs=knn(every=3)); learn.fit(5, 1e-3)
    assert learn.knn.history.epoch.tolist()==[0,3,5]
    assert [math.isnan(o[-1]) for o in learn.recorder.values]==[True,True,False,True,False]

def test_knn_max_items_is_one_fixed_draw():
    dls = labelled(200, 100, seed=1); accs = []
    for _ in range(2):
        learn = byol_learn(cbs=(cb:=KNNCallback(dls, max_items=20))); learn.fit(1, 1e-3)
        accs.append(cb.history.knn.tolist())
    assert accs[0]==accs[1] and [len(get_embeddings(learn, o)[0]) for o in cb._dls]==[20,20]

def test_knn_takes_a_pair_of_torch_loaders():
    x,y = classes(); ds = [(a,torch.tensor(b)) for a,b in zip(x,y)]
    pair = [torch.utils.data.DataLoader(ds[i::2], batch_size=7, shuffle=True) for i in (0,1)]
    learn = byol_learn(cbs=KNNCallback(pair, k=5, max_items=15)); learn.fit(1, 1e-3)
    assert 0<learn.knn.history.knn.iloc[-1]<=1

def test_trackers_see_the_column(tmp_path):
    learn = byol_learn(labelled(), cbs=[knn(), SaveModelCallback(monitor='knn', fname='best')], path=tmp_path)
    learn.fit(2, 1e-3)
    assert learn.save_model.best==learn.knn.history.knn[1:].max()

@pytest.mark.parametrize('column', ['knn','probe','std'])
def test_a_learning_rate_is_found_beside_trackers_of_the_columns(column, tmp_path):
    learn = byol_learn(labelled(), cbs=[*monitors(), SaveModelCallback(monitor=column), EarlyStoppingCallback(monitor=column)], path=tmp_path)
    learn.lr_find(num_it=8, show_plot=False)
    assert not any(len(o.history) for o in (learn.knn,learn.probe,learn.health)) and len(learn.metrics)==0
    learn.fit(1, 1e-3); assert learn.save_model.best==learn.recorder.values[-1][learn.save_model.idx]

@pytest.mark.parametrize('kw', [dict(k=0), dict(every=0), dict(max_items=0), dict(stop_behind=0)])
def test_knn_refuses_nonsense(kw):
    with pytest.raises(ValueError, match=first(kw)): knn(**kw)
def test_knn_wants_the_same_classes():
    a,b = labelled().train,labelled().valid; a.vocab,b.vocab = ['a','b'],['b','a']
    with pytest.raises(ValueError, match='different classes'): byol_learn(cbs=KNNCallback((a,b))).fit(1, 1e-3)

# --- watched runs

class Spoil(Callback):
    "Makes the body give the same answer to every image from an epoch on"
    order,run_valid = 39,False
    def __init__(self, epoch): self.at = epoch
    def after_train(self):
        if self.epoch+1<self.at: return
        with torch.no_grad(): [p.zero_() for p in self.model.body.parameters()]

def spoilt(at=2, epochs=3, **kw):
    set_seed(0)
    learn = byol_learn(cbs=[KNNCallback(labelled(90, 60, seed=1), k=5, **kw), Spoil(at)])
    start = sd_of(learn.model.body)
    learn.fit(epochs, 1e-9)
    return learn,start

def test_a_body_that_falls_behind_its_start_is_named_once_with_figures(capsys):
    learn,_ = spoilt(); told = capsys.readouterr().out; h = learn.knn.history.knn
    assert told.count('falls behind')==1 and f'{100*h[0]:.1f} % before training' in told
    assert f'{100*h[2]:.1f} % after 2 epochs' in told and h[2]<h[0]-.2

def test_a_body_that_stays_level_is_not_named(capsys):
    spoilt(at=9)
    assert 'falls behind' not in capsys.readouterr().out

def test_the_best_body_is_kept_the_start_included(tmp_path):
    learn,start = spoilt(at=1)
    assert learn.knn.best_epoch==0 and learn.knn.best==learn.knn.history.knn[0]
    best = learn.best_body()
    body,_ = load_body(save_body(best, tmp_path/'best'), arch=conv_body())
    assert same_sd(body.state_dict(), best.body.state_dict())
    assert same_sd(best.body.state_dict(), start) and best.stats==learn.model.stats and not same_sd(sd_of(learn.model.body), start)
    assert knn_accuracy(best, *learn.knn.pair, k=5)==learn.knn.best
    learn.knn.load_best()
    assert same_sd(sd_of(learn.model.body), start)

def test_the_best_body_survives_a_checkpoint():
    learn,start = spoilt(at=1)
    other = byol_learn(cbs=knn()); other.knn.load_state_dict(learn.knn.state_dict())
    assert same_sd(other.best_body().body.state_dict(), start) and other.knn.best_epoch==0

def test_a_run_can_end_after_looks_behind_in_a_row():
    learn,_ = spoilt(at=2, epochs=6, stop_behind=2)
    assert learn.knn.history.epoch.tolist()==[0,1,2,3] and len(learn.metrics)==0

def test_no_body_is_kept_unless_asked():
    learn,_ = spoilt(keep_best=False)
    with pytest.raises(ValueError, match='No best body'): learn.best_body()
    with pytest.raises(ValueError, match='No best body'): byol_learn().best_body()

# --- probe

def test_probe_learns_the_classes_and_reads_images_as_they_are():
    learn = byol_learn(labelled(96, 48), cbs=probe(lr=.05)); learn.fit(8, 1e-3)
    assert learn.probe.history.probe.iloc[-1]>.9
    f,y = get_embeddings(learn, learn.dls.valid)
    with eval_mode(learn.probe.head): acc = (learn.probe.head(f.to(dev)).argmax(1).cpu()==y).float().mean().item()
    assert acc==pytest.approx(learn.probe.history.valid.iloc[-1])

def test_probe_trains_on_view_1():
    blank = byol_learn(labelled(96, 48), cbs=probe(lr=.05), views=(torch.zeros_like,same)); blank.fit(3, 1e-3)
    assert blank.probe.history.train.iloc[-1]<.6

@pytest.mark.parametrize('momentum', [True, False])
def test_probe_sees_the_representations_of_view_1(momentum):
    views = (same,torch.zeros_like)
    learn = byol_learn(labelled(), model=small_byol(momentum=momentum), cbs=probe(), views=views); got = []
    fit_head = learn.probe._fit_head
    class Check(Callback):
        order = 11.5 # after the probe has kept the images, before the views are made
        def before_batch(self): self.raw = self.xb[0]
    def keep(f, y): got.append((f.clone(), to_unit(learn.check.raw))); return fit_head(f, y)
    learn.probe._fit_head = keep; learn.add_cb(Check()); learn.fit(1, 1e-9)
    model = learn.model.train()
    for f,x in got:
        with torch.no_grad(): y = model.embed(model.normalize(x))
        torch.testing.assert_close(f, y, rtol=1e-4, atol=1e-5)

def test_masked_labels_change_nothing():
    heads,x = [],classes()[0]
    for mask in (9,-1):
        y = [c if i%2 else mask for i,c in enumerate(classes()[1])]
        set_seed(0); learn = byol_learn(image_dls(x, 16, y=y), cbs=probe(mask=mask)); learn.fit(2, 1e-3)
        heads.append(learn.probe.head.state_dict())
    f,y = get_embeddings(learn, learn.dls.valid); known = y!=mask
    with eval_mode(learn.probe.head): acc = (learn.probe.head(f.to(dev)).argmax(1).cpu()==y)[known].float().mean()
    assert same_sd(*heads) and known.sum()==8 and learn.probe.history.valid.iloc[-1]==acc
    learn = byol_learn(image_dls(x, 16, y=[9]*48), cbs=probe(mask=9)); learn.fit(1, 1e-3)
    with fixed_rng(0): want = nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 3))
    assert torch.equal(learn.probe.head[1].weight.cpu(), want[1].weight) and math.isnan(learn.probe.history.probe[0])

def test_the_step_of_masked_labels_is_that_of_the_known_ones():
    cb = OnlineProbe(n_out=3, mask=2); cb._ignore,cb._counts = 2,torch.zeros(3, dtype=torch.long)
    cb.head = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)); cb.opt_probe = torch.optim.SGD(cb.head.parameters(), .1)
    feats,y = torch.randn(8,4),torch.tensor([0,1,2,0,1,2,2,1])
    head = deepcopy(cb.head).train(); loss = F.cross_entropy(head(feats)[y!=2], y[y!=2]); loss.backward()
    cb._fit_head(feats, y)
    torch.testing.assert_close(cb.head[1].weight.grad, head[1].weight.grad)

def test_mask_by_name():
    dls = labelled(); dls.vocab = ['a','b','unknown']
    learn = byol_learn(dls, cbs=OnlineProbe(mask='unknown')); learn.fit(1, 1e-3)
    assert learn.probe.head[1].out_features==3 and learn.probe._ignore==2
    with pytest.raises(ValueError, match='other'): byol_learn(dls, cbs=OnlineProbe(mask='other')).fit(1, 1e-3)

def test_probe_without_validation_shows_training():
    learn = byol_learn(labelled(n_val=0), cbs=probe()); learn.fit(1, 1e-3)
    h = learn.probe.history
    assert h.probe[0]==h.train[0] and math.isnan(h.valid[0]) and learn.recorder.values[0][-1]==h.train[0]

def probed(epochs, state=None, **kw):
    "A probe beside a network that stands still"
    learn = byol_learn(labelled(), cbs=(cb := probe(lr=.1)))
    if state: cb.load_state_dict(deepcopy(state))
    set_seed(0); learn.model.load_state_dict(small_byol().state_dict())
    learn.fit(epochs, 0., **kw)
    return learn

def test_a_new_fit_starts_a_new_classifier():
    learn = probed(1); head = sd_of(learn.probe.head)
    learn.fit(1, 0.)
    torch.testing.assert_close(sd_of(learn.probe.head), head)

def test_a_resumed_fit_goes_on_with_its_classifier():
    half = probed(2).probe.state_dict()
    torch.testing.assert_close(sd_of(probed(4, half, start_epoch=2).probe.head), sd_of(probed(4).probe.head))

def test_probe_under_accumulation_steps_every_batch():
    learn = byol_learn(labelled(), cbs=[probe(), GradientAccumulation(32)]); learn.fit(1, 1e-3)
    assert first(learn.probe.opt_probe.state.values())['step']==4

# --- health

def test_measures_of_known_clouds():
    f = torch.randn(4000,32, generator=torch.Generator().manual_seed(0))
    assert abs(feature_std(f)-1)<.01 and 31<effective_rank(f)<=32
    unit = F.normalize(f, dim=1); spread = torch.linalg.eigvalsh(torch.cov(unit.T.double())); p = spread/spread.sum()
    assert abs(effective_rank(f)-math.exp(-(p*p.log()).sum()))<1e-6 # another way to the same number
    assert effective_rank(f[:1].expand(50,-1))==feature_std(f[:1].expand(50,-1))==0
    assert abs(effective_rank(torch.cat([f[:1].expand(50,-1), f[1:2].expand(50,-1)]))-1)<1e-6

def test_health_measures_the_model_it_is_given():
    learn = byol_learn(labelled(64, 32), cbs=HealthMonitor(32), tau=.5); learn.fit(2, 1e-2)
    row,model = learn.health.history.iloc[-1],learn.model
    with eval_mode(model):
        x = torch.stack([o[0] for o in learn.dls.valid.dataset]).to(dev); v1,v2 = model.normalize(x),model.normalize(mirror(x))
        z,target = model.project(v1),model.target['projector'](model.embed(v2, target=True))
        agreement = F.cosine_similarity(model.predictor(z), target).mean().item()
    for k,v in dict(std=feature_std(z), rank=effective_rank(z), agreement=agreement).items(): assert abs(row[k]-v)<1e-4, k
    assert row.images==32 and row.loss>0 and learn.health.history.epoch.tolist()==[0,1,2]

def test_health_draws_from_training_where_validation_is_small():
    learn = byol_learn(labelled(64, 8), cbs=(cb:=HealthMonitor(32))); learn.fit(1, 1e-3)
    assert cb._dl.n==32 and len(cb._dl.dataset)==56

def test_a_rank_is_told_with_the_most_that_the_images_allow():
    learn = byol_learn(labelled(64, 24), model=small_byol(projection_size=256), cbs=HealthMonitor(24)); learn.fit(1, 1e-3)
    assert 'of at most 23 on 24 images' in learn.health.report()
    learn = byol_learn(labelled(64, 24), cbs=HealthMonitor(24)); learn.fit(1, 1e-3)
    assert 'of at most 8 on 24 images' in learn.health.report()

@pytest.mark.parametrize('n', [1,3,15])
def test_few_images_get_no_verdict(n, capsys):
    learn = byol_learn(labelled(), cbs=health(n, rank=99)); learn.fit(1, 1e-3)
    assert not learn.health.collapsed and 'Too few images' in learn.health.report() and 'collapsed ' not in capsys.readouterr().out

def test_collapse_is_said_once_and_ends_the_run_where_asked():
    learn = byol_learn(labelled(), cbs=health(rank=99)); learn.fit(3, 1e-3) # everything is a collapse
    assert learn.health.advice.finding.tolist()==['collapsed'] and learn.health.collapsed and 'rank' in learn.health.report()
    learn.health.stop = True; learn.fit(3, 1e-3)
    assert learn.epoch==0 and len(learn.metrics)==0
    learn.health.limits['rank'] = 0; learn.fit(1, 1e-3)
    assert not learn.health.collapsed

def test_advice_names_the_remedy():
    learn = byol_learn(labelled(), cbs=health(rank=99), tau=.5, tau_end=.5)
    learn.model.predictor = nn.Identity(); learn.fit(1, 1e-3)
    assert 'a predictor, a `tau` near 1' in learn.health.advice.advice[0]

def test_a_run_that_learns_nothing_is_named():
    learn = byol_learn(labelled(), model=small_byol(projection_size=256), cbs=health(rank=0)); learn.fit(2, 1e-12)
    assert learn.health.advice.finding.tolist()==['idle'] and 'learning rate' in learn.health.report()

@pytest.mark.parametrize('kw', [dict(n_items=0), dict(every=0)])
def test_health_refuses_nonsense(kw):
    with pytest.raises(ValueError, match=first(kw)): HealthMonitor(**kw)

def test_pictures():
    learn = byol_learn(labelled(), cbs=monitors()); learn.fit(2, 1e-3)
    axs = {line.get_label():(ax,line) for ax in learn.plot_curves().axes for line in ax.lines}
    assert {*axs}=={'training loss','validation loss','learning rate','tau','knn','probe','std','rank'}
    for a,b in (('training loss','validation loss'),('knn','probe')): assert axs[a][0] is axs[b][0] is not axs['tau'][0]
    drawn = pd.Series(*axs['knn'][1].get_data()[::-1])
    np.testing.assert_allclose(drawn.loc[[0,1,2]], learn.knn.history.knn)
    plain = byol_learn(); plain.fit(1, 1e-3)
    assert len(plain.plot_curves().axes)==3
    plt.close('all')

# --- the demo's network, for good and for bad

def health_of(kind, seed):
    "What `examples/health.py` measures"
    import importlib.util
    spec = importlib.util.spec_from_file_location('health', Path(__file__).parent.parent/'examples'/'health.py')
    m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    return m.run(kind, seed)

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['no predictor','tau=0, high lr'])
@pytest.mark.parametrize('seed', range(5))
def test_forced_collapse_is_called_within_three_epochs(kind, seed):
    h = health_of(kind, seed)
    assert h.collapsed and h.advice.query("finding=='collapsed'").epoch.min()<=3, h.history

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_the_demo_is_never_called_collapsed(seed):
    h = health_of('healthy', seed)
    assert len(h.history)==81 and not h.collapsed, h.history
