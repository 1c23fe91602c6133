"Monitors: they leave training alone to the bit, say the truth, and call a collapse a collapse"
from conftest import *
from fastbyol.core import eval_mode, fixed_rng, to_unit
from fastbyol.monitor import alignment, effective_rank, feature_std, uniformity
from fastai.callback.training import GradientAccumulation
from fastai.callback.tracker import SaveModelCallback

def classes(n=48, n_c=3, size=16, seed=0):
    "Noise images, brighter in another third for each class, and their labels"
    y = [i%n_c for i in range(n)]
    x = noise(n, size, seed=seed)*.3
    for i,c in enumerate(y): x[i,:,c*size//n_c:(c+1)*size//n_c] += .7
    return x.clamp(0,1),y

def labelled(n=48, n_val=16, seed=0, shuffle=False, **kw):
    x,y = classes(n, seed=seed)
    return image_dls(x, n_val, y=y, shuffle=shuffle, **kw)

_x,_y = classes()
def nth_image(i): return TensorImage(_x[i])
def nth_class(i): return TensorCategory(_y[i])

class Crash(Callback):
    def after_batch(self): raise KeyboardInterrupt

# --- all of them

def run(cbs, epochs=3, **kw):
    set_seed(0)
    learn = byol_learn(labelled(shuffle=True), views=tuple(byol_views(16)), cbs=cbs, **kw)
    learn.fit_one_cycle(epochs, 3e-3)
    return learn,(random.random(), np.random.rand(), torch.rand(1).item())

def test_training_is_the_same_to_the_bit_with_and_without_monitors():
    plain,rng = run([])
    for cbs in ([KNNCallback(labelled(seed=1))], [OnlineProbe(n_out=3)], [HealthMonitor(16)], [KNNCallback(labelled(seed=1), max_items=20), OnlineProbe(n_out=3), HealthMonitor(16)]):
        learn,rng2 = run(cbs)
        assert same_sd(sd_of(plain), sd_of(learn)) and rng==rng2
        assert [o[:2] for o in learn.recorder.values]==[o[:2] for o in plain.recorder.values]

def test_columns_come_and_go():
    learn = byol_learn(labelled(), cbs=[HealthMonitor(16), OnlineProbe(n_out=3), KNNCallback(labelled(seed=1))])
    for _ in range(2):
        learn.fit(2, 1e-3)
        assert sorted(learn.recorder.metric_names[3:-1])==['knn','probe','rank','std'] and len(learn.metrics)==0
        assert all(len(o)==6 and None not in o for o in learn.recorder.values)
        last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
        for nm in ('knn','probe'): assert last[nm]==getattr(learn, nm).history[nm].iloc[-1]
        for nm in ('std','rank'): assert last[nm]==learn.health.history[nm].iloc[-1]

def test_columns_are_not_doubled_after_an_interrupt():
    learn = byol_learn(labelled(), cbs=[HealthMonitor(16), OnlineProbe(n_out=3), KNNCallback(labelled(seed=1))], metrics=[])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=Crash())
    learn.fit(1, 1e-3)
    assert len(learn.recorder.metric_names)==3+4+1 and len(learn.metrics)==0
    assert not learn.model.projector._forward_pre_hooks

def test_own_metrics_stay():
    def mean_pred(pred, targ): return pred.mean()
    learn = byol_learn(labelled(), cbs=KNNCallback(labelled(seed=1)), metrics=mean_pred)
    learn.fit(1, 1e-3)
    assert learn.recorder.metric_names[3:5]==['mean_pred','knn'] and learn.metrics.attrgot('name')==['mean_pred']

def test_monitors_are_off_in_lr_find_and_get_preds():
    learn = byol_learn(labelled(), cbs=[HealthMonitor(16), OnlineProbe(n_out=3), KNNCallback(labelled(seed=1))])
    learn.fit(1, 1e-3)
    before = [o.history for o in (learn.knn,learn.probe,learn.health)]
    learn.lr_find(num_it=30, show_plot=False)
    learn.get_preds()
    assert len(learn.validate())==1+4 and len(learn.metrics)==0
    for a,b in zip(before, (learn.knn,learn.probe,learn.health)): pd.testing.assert_frame_equal(a, b.history)

def test_a_learner_with_monitors_is_exported_without_their_images(tmp_path):
    dls = Datasets(range(48), [[nth_image],[nth_class]], splits=[range(32),range(32,48)]).dataloaders(bs=8, num_workers=0, device=cpu)
    learn = byol_learn(dls, cbs=[HealthMonitor(16), OnlineProbe(n_out=3), KNNCallback(labelled(seed=1))], path=tmp_path)
    learn.fit(1, 1e-3)
    learn.export('l.pkl')
    new = load_learner(tmp_path/'l.pkl')
    assert new.knn.pair is None and len(new.knn.history)==2 and new.probe.head is not None and len(new.health.history)==2
    new.dls = dls; new.opt = None
    with pytest.raises(ValueError, match='exported'): hush(new).fit(1, 1e-3)

@pytest.mark.parametrize('mk', [lambda: KNNCallback(labelled(seed=1)), lambda: OnlineProbe(n_out=3), lambda: HealthMonitor(16)])
def test_histories_go_on_after_load_state_dict(mk):
    learn = byol_learn(labelled(), cbs=mk())
    cb = learn.cbs[-1] if isinstance(learn.cbs[-1], (KNNCallback,OnlineProbe,HealthMonitor)) else first(o for o in learn.cbs if isinstance(o, (KNNCallback,OnlineProbe,HealthMonitor)))
    learn.fit(2, 1e-3)
    state = cb.state_dict()
    torch.save(state, buf:=io.BytesIO()); buf.seek(0) # plain enough for a checkpoint
    other = byol_learn(labelled(), cbs=mk()); cb2 = getattr(other, cb.name)
    cb2.load_state_dict(torch.load(buf, weights_only=True))
    pd.testing.assert_frame_equal(cb.history, cb2.history)
    other.fit(4, 1e-3, start_epoch=2)
    assert cb2.history.epoch.tolist()[-2:]==[3,4] and cb2.history.epoch.is_unique and len(cb2.history)==len(cb.history)+2
    other.fit(1, 1e-3)
    assert len(cb2.history)==len(cb.history)-1 # a new run, a new history

# --- nearest neighbours

def test_knn_column_is_knn_accuracy():
    dls = labelled(60, 30, seed=1)
    for kw in ({}, dict(k=3, temperature=.5), dict(target=True)):
        learn = byol_learn(cbs=KNNCallback(dls, **kw), tau=.5); learn.fit(2, 1e-2)
        assert learn.knn.history.knn.iloc[-1]==knn_accuracy(learn, dls.train, dls.valid, **kw)
        assert learn.knn.history.epoch.tolist()==[0,1,2]

def test_knn_before_training_is_that_of_random_weights():
    dls = labelled(seed=1); learn = byol_learn(cbs=KNNCallback(dls)); start = knn_accuracy(learn, *dls.loaders)
    learn.fit(1, .1)
    assert learn.knn.history.knn[0]==start
    learn = byol_learn(cbs=KNNCallback(dls, start=False)); learn.fit(1, .1)
    assert learn.knn.history.epoch.tolist()==[1]

def test_knn_every_and_last_epoch():
    learn = byol_learn(cbs=KNNCallback(labelled(seed=1), every=3)); learn.fit(5, 1e-3)
    assert learn.knn.history.epoch.tolist()==[0,3,5]
    col = [o[-1] for o in learn.recorder.values]
    assert [math.isnan(o) for o in col]==[True,True,False,True,False]

def test_knn_max_items_is_one_fixed_draw():
    dls = labelled(200, 100, seed=1); accs = []
    for seed in (0,0,1):
        learn = byol_learn(cbs=(cb:=KNNCallback(dls, max_items=20, seed=seed))); learn.fit(1, 1e-3)
        accs.append(cb.history.knn.tolist())
    assert accs[0]==accs[1] and len({a*20 for a in accs[0]}-{round(a*20, 4) for a in accs[0]})<=2
    cb.before_fit(); assert [len(get_embeddings(learn, o)[0]) for o in cb._dls]==[20,20]

def test_knn_takes_a_pair_of_torch_loaders():
    x,y = classes(); ds = [(a,torch.tensor(b)) for a,b in zip(x,y)]
    pair = [torch.utils.data.DataLoader(ds[i::2], batch_size=7, shuffle=True) for i in (0,1)]
    learn = byol_learn(cbs=KNNCallback(pair, k=5, max_items=15)); learn.fit(1, 1e-3)
    assert 0<learn.knn.history.knn.iloc[-1]<=1

def test_knn_can_keep_the_best(tmp_path):
    learn = byol_learn(labelled(), cbs=[KNNCallback(labelled(seed=1)), SaveModelCallback(monitor='knn', fname='best')], path=tmp_path)
    learn.fit(2, 1e-3)
    assert (tmp_path/'models'/'best.pth').exists() and learn.save_model.best==learn.knn.history.knn[1:].max()

@pytest.mark.parametrize('args,match', [((5,),'DataLoaders'), (([1,2,3],),'pair')])
def test_knn_wants_loaders(args, match):
    with pytest.raises(TypeError, match=match): KNNCallback(*args)
@pytest.mark.parametrize('kw', [dict(k=0), dict(every=0), dict(max_items=0), dict(temperature=0)])
def test_knn_refuses_nonsense(kw):
    with pytest.raises((ValueError,TypeError), match=first(kw)): KNNCallback(labelled(), **kw)
def test_knn_wants_labels_before_training():
    learn = byol_learn(cbs=KNNCallback(image_dls(noise(24)))); before = sd_of(learn)
    with pytest.raises(ValueError, match='labels'): learn.fit(1, 1e-3)
    assert same_sd(before, sd_of(learn))
def test_knn_wants_the_same_classes():
    a,b = labelled().train,labelled().valid; a.vocab = b.vocab = CategoryMap(["a","b"]); KNNCallback((a,b)); a.vocab,b.vocab = ['a','b'],['b','a']
    with pytest.raises(ValueError, match='different classes'): KNNCallback((a,b))
def test_knn_wants_validation_images():
    with pytest.raises(ValueError, match='pair'): KNNCallback(DataLoaders(labelled().train))

# --- probe

def test_probe_learns_the_classes_and_reads_images_as_they_are():
    # views without content: the probe can learn nothing from them, and validation on them would be chance
    learn = byol_learn(labelled(96, 48), cbs=OnlineProbe(lr=.05, n_out=3)); learn.fit(8, 1e-3)
    assert learn.probe.history.probe.iloc[-1]>.9
    f,y = get_embeddings(learn, learn.dls.valid)
    with eval_mode(learn.probe.head): acc = (learn.probe.head(f).argmax(1)==y).float().mean().item()
    assert acc==learn.probe.history.valid.iloc[-1]
    blank = byol_learn(labelled(96, 48), cbs=OnlineProbe(lr=.05, n_out=3), views=(torch.zeros_like,same)); blank.fit(3, 1e-3)
    assert blank.probe.history.train.iloc[-1]<.6 # it sees view 1, which is blank

@pytest.mark.parametrize('momentum', [True, False])
def test_probe_sees_the_representations_of_view_1(momentum):
    learn = byol_learn(labelled(), model=small_byol(momentum=momentum), cbs=OnlineProbe(n_out=3), views=(same,torch.zeros_like)); got = []
    probe = learn.probe; step = probe._fit_head
    class Check(Callback):
        order = 11.5 # after the probe has kept the images, before the views are made
        def before_batch(self): self.raw = self.xb[0]
    def keep(f, y): got.append((f.clone(), to_unit(learn.check.raw))); return step(f, y)
    probe._fit_head = keep; learn.add_cb(Check()); learn.fit(1, 1e-9)
    model = learn.model.train()
    for f,x in got:
        with torch.no_grad(): y = model.embed(model.normalize(x))
        torch.testing.assert_close(f, y, rtol=1e-4, atol=1e-5)

def test_no_gradient_of_the_probe_reaches_the_body():
    grads = []
    for lr in (None,1e3):
        set_seed(0); learn = byol_learn(labelled(), cbs=[] if lr is None else OnlineProbe(n_out=3, lr=lr)); class_g = []
        class G(Callback):
            order = 60
            def before_step(self): class_g.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])
        learn.fit(2, 1e-2, cbs=G()); grads.append(class_g)
    assert len(grads[0])==len(grads[1])==8 and all(torch.equal(a,b) for x,y in zip(*grads) for a,b in zip(x,y))

def test_masked_labels_are_not_seen():
    heads = []
    for wrong in (0,1):
        x,y = classes(); y = [c if i%2 else 9 for i,c in enumerate(y)]
        # what the masked images look like is the same; the label they would have is not to be found anywhere
        set_seed(0); dls = image_dls(x, 16, y=y); learn = byol_learn(dls, cbs=OnlineProbe(n_out=3, mask=9)); learn.fit(2, 1e-3)
        heads.append(learn.probe.head.state_dict()); assert learn.probe._train[1]==16 and learn.probe._valid[1]==8
    assert same_sd(*heads)
    # an image whose label is masked leaves the classifier as it is, even where all of a batch are masked
    x,y = classes(); dls = image_dls(x, 16, y=[9]*48); learn = byol_learn(dls, cbs=OnlineProbe(n_out=3, mask=9)); learn.fit(1, 1e-3)
    with fixed_rng(0): want = nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 3))
    assert torch.equal(learn.probe.head[1].weight, want[1].weight) and math.isnan(learn.probe.history.probe[0])

def test_mask_by_name():
    dls = labelled(); dls.vocab = ['a','b','unknown']
    learn = byol_learn(dls, cbs=OnlineProbe(mask='unknown')); learn.fit(1, 1e-3)
    assert learn.probe.head[1].out_features==3 and learn.probe._train[1]==sum(i%3<2 for i in range(32))
    with pytest.raises(ValueError, match='nobody'): byol_learn(dls, cbs=OnlineProbe(mask='nobody')).fit(1, 1e-3)

def test_probe_without_validation_shows_training():
    learn = byol_learn(labelled(n_val=0), cbs=OnlineProbe(n_out=3)); learn.fit(1, 1e-3)
    h = learn.probe.history
    assert h.probe[0]==h.train[0] and math.isnan(h.valid[0]) and learn.recorder.values[0][-1]==h.train[0]

def test_probe_under_accumulation_steps_every_batch():
    from fastai.callback.training import GradientAccumulation
    learn = byol_learn(labelled(), cbs=[OnlineProbe(n_out=3), GradientAccumulation(32)]); learn.fit(1, 1e-3)
    assert first(learn.probe.opt_probe.state.values())['step']==4

def test_probe_wants_labels_and_a_byol_callback():
    with pytest.raises(ValueError, match='labels'): byol_learn(cbs=OnlineProbe()).fit(1, 1e-3)
    with pytest.raises(ValueError, match='labels'): byol_learn(cbs=OnlineProbe(n_out=3)).fit(1, 1e-3)
    for cb in (OnlineProbe(n_out=3),HealthMonitor(16)):
        learn = hush(Learner(labelled(), small_byol(), loss_func=BYOLLoss(), cbs=cb))
        with pytest.raises(ValueError, match='BYOLCallback'): learn.fit(1, 1e-3)
    with pytest.raises((ValueError,TypeError)): OnlineProbe(n_out=0)
    with pytest.raises(ValueError, match='lr'): OnlineProbe(lr=0)

# --- health

def test_measures_of_known_clouds():
    f = torch.randn(4000,32, generator=torch.Generator().manual_seed(0))
    assert abs(feature_std(f)-1)<.01 and 31<effective_rank(f)<=32
    u = F.normalize(f, dim=1); cov = torch.linalg.eigvalsh(torch.cov(u.T.double())); p = cov/cov.sum() # another way to the same number
    assert abs(effective_rank(f)-math.exp(-(p*p.log()).sum()))<1e-6
    assert effective_rank(f[:1].expand(50,-1))==feature_std(f[:1].expand(50,-1))==uniformity(f[:1].expand(50,-1))==0
    line = torch.cat([f[:1].expand(50,-1), f[1:2].expand(50,-1)])
    assert abs(effective_rank(line)-1)<1e-6
    assert abs(alignment(f, f))<1e-6 and abs(alignment(f, -f)-4)<1e-5
    two = torch.tensor([[1.,0.],[0.,1.]]); assert abs(uniformity(two)+4)<1e-5

def test_health_measures_the_model_it_is_given():
    learn = byol_learn(labelled(64, 32), cbs=HealthMonitor(32), tau=.5); learn.fit(2, 1e-2)
    r,m = learn.health.history.iloc[-1],learn.model
    with eval_mode(m):
        x = torch.stack([o[0] for o in learn.dls.valid.dataset]); v1,v2 = m.normalize(x),m.normalize(mirror(x))
        z,zt = m.project(v1),m.target['projector'](m.embed(v2, target=True))
        agree = F.cosine_similarity(m.predictor(z), zt).mean().item()
        d = sum((a-b).pow(2).sum() for a,b in zip([*m.body.parameters(),*m.projector.parameters()], m.target.parameters()))**.5
        n = sum(a.pow(2).sum() for a in [*m.body.parameters(),*m.projector.parameters()])**.5
        want = dict(std=feature_std(z), rank=effective_rank(z), rep_std=feature_std(m.embed(v1)), alignment=alignment(z, m.project(v2)), uniformity=uniformity(z), agreement=agree, target_distance=(d/n).item())
    for k,v in want.items(): assert abs(r[k]-v)<1e-4, k
    assert r.grad_norm>0 and r.loss>0 and math.isnan(learn.health.history.grad_norm[0]) and learn.health.history.epoch.tolist()==[0,1,2]

def test_health_draws_from_training_where_validation_is_small():
    learn = byol_learn(labelled(64, 8), cbs=(cb:=HealthMonitor(32))); cb.before_fit()
    assert cb._dl.n==32 and len(cb._dl.dataset)==56
    own = labelled(40, 20, seed=3).valid; learn = byol_learn(labelled(64, 8), cbs=(cb:=HealthMonitor(16, dl=own))); learn.fit(1, 1e-3)
    assert len(cb.history)==2

def test_no_target_no_distance():
    learn = byol_learn(labelled(), model=small_byol(momentum=False), cbs=HealthMonitor(16)); learn.fit(1, 1e-3)
    assert 'target_distance' not in learn.health.history and learn.health.plot() is not None

def found(learn): return set(learn.health.advice.finding)

def test_advice_names_what_is_wrong(capsys):
    def go(epochs=2, lr=1e-3, views=(same,mirror), tau=.9, **kw):
        learn = byol_learn(labelled(), model=small_byol(projection_size=256), cbs=HealthMonitor(16, **kw), views=views, tau=tau, tau_end=max(tau,.99)); learn.fit(epochs, lr)
        return learn
    assert 'alike' in found(go(views=(same,same))) and 'no' not in found(go())
    assert 'fixed' in found(go(tau=1.)) and 'fixed' not in found(go())
    assert 'idle' in found(go(lr=1e-12)) and 'frozen' in capsys.readouterr().out
    assert 'gradient' in found(go(6, limits=dict(grad=1e-3))) and 'gradient' not in found(go(6, limits=dict(grad=1e3)))

def test_collapse_is_said_once_and_ends_the_run_where_asked():
    mk = lambda **kw: byol_learn(labelled(), cbs=HealthMonitor(16, limits=dict(rank=99, idle=-2), **kw)) # everything is a collapse
    learn = mk(); learn.fit(3, 1e-3)
    assert learn.health.advice.finding.tolist().count('collapsed')==1 and learn.health.collapsed and learn.epoch==2 and 'rank' in learn.health.report()
    learn = mk(stop=True); learn.fit(3, 1e-3)
    assert learn.epoch==0 and len(learn.metrics)==0
    learn.health.limits['rank'] = 0; learn.fit(1, 1e-3)
    assert not learn.health.collapsed and 'No sign of trouble' in learn.health.report()

@pytest.mark.parametrize('kw', [dict(n_items=0), dict(n_items=4), dict(every=0), dict(grad_every=0), dict(limits=dict(foo=1))])
def test_health_refuses_nonsense(kw):
    with pytest.raises((ValueError,TypeError), match=first(kw)): HealthMonitor(**kw)

def test_pictures():
    learn = byol_learn(labelled(), cbs=[HealthMonitor(16), OnlineProbe(n_out=3), KNNCallback(labelled(seed=1))])
    with pytest.raises(ValueError, match='train first'): learn.health.plot()
    with pytest.raises(ValueError, match='train first'): learn.plot_curves()
    learn.fit(2, 1e-3)
    assert [o.get_ylabel() for o in learn.plot_curves().axes]==['loss','learning rate','tau','accuracy, %','std']
    acc = learn.plot_curves().axes[3]
    np.testing.assert_allclose(acc.lines[0].get_ydata(), 100*learn.knn.history.knn); assert acc.lines[0].get_xdata().tolist()==[0,1,2]
    assert len(learn.health.plot().axes)==8
    plain = byol_learn(); plain.fit(1, 1e-3)
    assert [o.get_ylabel() for o in plain.plot_curves().axes]==['loss','learning rate','tau']
    plt.close('all')

# --- the demo's network, for good and for bad

def health(kind, seed):
    "What `examples/health.py` measures"
    import importlib.util
    spec = importlib.util.spec_from_file_location('health', Path(__file__).parent.parent/'examples'/'health.py')
    m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    return m.run(kind, seed)

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['no predictor','tau=0, high lr'])
@pytest.mark.parametrize('seed', range(5))
def test_forced_collapse_is_called_within_three_epochs(kind, seed):
    h = health(kind, seed)
    assert h.collapsed and h.advice.query("finding=='collapsed'").epoch.min()<=3, h.history

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_the_demo_is_never_called_collapsed(seed):
    h = health('healthy', seed)
    assert len(h.history)==81 and not h.collapsed, h.history

@pytest.mark.parametrize('batches', [1,2,3,4])
def test_loss_and_gradient_are_measured_under_accumulation(batches):
    learn = byol_learn(labelled(), cbs=[HealthMonitor(16, grad_every=2), *([GradientAccumulation(batches*8)] if batches>1 else [])]); learn.fit(2, 1e-3)
    h = learn.health.history[['loss','grad_norm']].iloc[1:]; assert len(h)==2 and h.notna().all().all() and (h>0).all().all() and learn.health._lr>0
