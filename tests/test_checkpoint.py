"Runs that are stopped and go on: bit by bit the same; damaged files are refused"
from conftest import *
from fastbyol.checkpoint import checkpoints, load_state, save_state
import io, signal, subprocess, sys, time
from contextlib import redirect_stdout
from timm.optim import Lars
from fastai.callback.training import GradientAccumulation
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastbyol import device as precision_module
from fastbyol.checkpoint import _chance

class Stop(Callback):
    "Stops at once after `epoch` epochs, or after `batch` batches of the next one"
    order = CheckpointCallback.order+1
    def __init__(self, epoch, batch=0): self.at = epoch,batch
    def after_epoch(self):
        if self.at==(self.epoch+1,0): raise KeyboardInterrupt
    def after_batch(self):
        if self.training and self.at==(self.epoch,self.iter+1): raise KeyboardInterrupt

class Draws(Callback):
    "Random views would not do: every source of chance has a part in the pixels here"
    order = 11 # before `BYOLCallback`
    def before_batch(self): self.learn.xb = (self.xb[0]*(.8+.05*(random.random()+np.random.rand()+torch.rand(1).item())),)

def dls_of(n=40, bs=8, **kw): return image_dls(noise(n), bs=bs, **{**dict(shuffle=True), **kw})

def make(dls=None, seed=1, cbs=None, **kw):
    set_seed(seed); return byol_learn((dls or dls_of)(), cbs=[Draws(),*L(cbs)], **kw)

def one_cycle(l, n=4): l.fit_one_cycle(n, 1e-2)
def flat(l, n=4): l.fit(n, 1e-2)

def resume(learn, path, **kw):
    with redirect_stdout(io.StringIO()): return learn.resume(path, **kw)

def same_opt(a, b):
    a,b = (list(map(str, (o.state_dict()['state'], o.hypers))) for o in (a.opt,b.opt))
    return a==b

def same_run(a, b, opt=True):
    "Are weights, optimiser, curves and what comes next of both learners the same, bit by bit?"
    assert same_sd(sd_of(a), sd_of(b)); assert not opt or same_opt(a, b)
    ra,rb = a.recorder,b.recorder
    assert [o.item() for o in ra.losses]==[o.item() for o in rb.losses] and str(ra.values)==str(rb.values) and (ra.lrs,ra.iters)==(rb.lrs,rb.iters)
    assert a.byol.taus==b.byol.taus and getattr(ra, 'hps', None)==getattr(rb, 'hps', None) and a.train_iter==b.train_iter
    return True

def stopped(tmp, fit=one_cycle, at=(2,0), make=make, every_batches=None, **kw):
    "A run that was stopped; its folder"
    learn = make(cbs=[CheckpointCallback(tmp/'c', every_batches=every_batches), Stop(*at), *L(kw.pop('cbs', None))], **kw)
    with pytest.raises(KeyboardInterrupt): fit(learn)
    return tmp/'c'

def whole_and_resumed(tmp, fit=one_cycle, at=(2,0), every_batches=None, cbs=lambda: [], make=make, **kw):
    "The run that nobody stops; and one that was stopped and gone on with by a new learner, which had other random numbers"
    whole = make(cbs=cbs(), **kw); fit(whole); after = str(_chance(whole.dls))
    folder = stopped(tmp, fit, at, make, every_batches, cbs=cbs(), **kw)
    again = resume(make(seed=99, cbs=cbs(), **kw), folder); fit(again)
    assert str(_chance(again.dls))==after # the random numbers, too, are where they would have been
    return whole,again

opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=ranger, lars=partial(OptimWrapper, opt=Lars), adamw=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('fit', [one_cycle, flat, lambda l: l.fit_flat_cos(4, 1e-2)], ids=['one_cycle','flat','flat_cos'])
@pytest.mark.parametrize('opt', opts)
def test_a_resumed_run_is_the_same(tmp_path, opt, fit):
    assert same_run(*whole_and_resumed(tmp_path, fit, opt_func=opts[opt]))

@pytest.mark.parametrize('epoch', [1,3])
def test_after_any_epoch(tmp_path, epoch): assert same_run(*whole_and_resumed(tmp_path, at=(epoch,0)))

@pytest.mark.parametrize('at', [(0,1),(0,3),(2,2),(3,3)])
def test_within_an_epoch(tmp_path, at): assert same_run(*whole_and_resumed(tmp_path, at=at, every_batches=1))

def test_stopped_twice(tmp_path):
    whole = make(); one_cycle(whole); f = stopped(tmp_path, at=(1,2), every_batches=1)
    for at in ((1,3),(3,0)):
        learn = resume(make(seed=at[1]+7, cbs=[CheckpointCallback(f, every_batches=1),Stop(*at)]), f)
        with pytest.raises(KeyboardInterrupt): one_cycle(learn)
    again = resume(make(seed=5), f); one_cycle(again); assert same_run(whole, again)

@pytest.mark.parametrize('n_acc,at', [(24,(1,0)),(24,(2,2)),(16,(1,3))])
def test_gradients_that_are_accumulated_go_on(tmp_path, n_acc, at):
    assert same_run(*whole_and_resumed(tmp_path, at=at, every_batches=1, cbs=lambda: GradientAccumulation(n_acc)))

@pytest.mark.parametrize('views', [None,(same,mirror)])
def test_random_views_and_momentum_off(tmp_path, views):
    assert same_run(*whole_and_resumed(tmp_path, views=views, size=16 if views is None else None))

class Jitter(ItemTransform):
    "Random numbers in the workers"
    def encodes(self, x): return tuple(o*(.9+.1*torch.rand(1).item()*random.random()) for o in x)

@pytest.mark.parametrize('at', [(1,0),(1,2)])
@pytest.mark.parametrize('workers', [0,2])
def test_worker_processes(tmp_path, workers, at):
    def mk(**kw):
        x = noise(40); dl = lambda x,**k: TfmdDL([(TensorImage(o),) for o in x], bs=8, num_workers=workers, after_item=Jitter, device=cpu, **k)
        return make(lambda: DataLoaders(dl(x[8:], shuffle=True, drop_last=True), dl(x[:8]), device=cpu), **kw)
    assert same_run(*whole_and_resumed(tmp_path, lambda l: one_cycle(l,2), at, every_batches=1, make=mk))

@pytest.mark.parametrize('in_memory', ['auto','disk'])
def test_images_in_memory(tmp_path, in_memory):
    for i,o in enumerate(noise(30, 20)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/f'{i}.png')
    mk = lambda **kw: make(lambda: unlabelled_dls(tmp_path, 16, bs=8, device=cpu, in_memory=in_memory), **kw)
    assert same_run(*whole_and_resumed(tmp_path, at=(1,2), every_batches=1, make=mk))

def test_torch_data_loaders(tmp_path):
    def mk(**kw):
        x = noise(40); g = torch.Generator().manual_seed(kw.get('seed', 1))
        dl = lambda x,**k: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8, **k)
        return make(lambda: DataLoaders(dl(x[8:], shuffle=True, generator=g), dl(x[:8])), **kw)
    assert same_run(*whole_and_resumed(tmp_path, make=mk))

class Scaled(Callback):
    "The scaler of mixed precision, as `MixedPrecision` keeps it"
    order = 10
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=4., growth_interval=3); self.learn.scaler.scale(tensor(1.))
    def after_step(self): self.learn.scaler._found_inf_per_device(self.opt); self.learn.scaler._growth_tracker += 1; self.learn.scales.append(self.learn.scaler.get_scale()); self.learn.scaler._scale *= 1.5
    def after_fit(self): self.learn.last,self.learn.scaler = self.learn.scaler.state_dict(),None
def test_the_scaler_goes_on(tmp_path):
    def mk(**kw): l = make(**kw); l.scales = []; return l
    whole,again = whole_and_resumed(tmp_path, cbs=Scaled, make=mk)
    assert again.last==whole.last and again.scales==whole.scales[-len(again.scales):] and len(again.scales)==8

@pytest.mark.parametrize('asked,then', [('auto','bf16'),('fp32','fp32')]) # what you ask for wins
def test_a_measured_precision_goes_on(tmp_path, monkeypatch, asked, then):
    def learner(found, precision):
        monkeypatch.setattr(precision_module, 'quickest', lambda secs: found)
        return make(cbs=CheckpointCallback(tmp_path/'c')).set_precision(precision)
    learn = learner('bf16', 'auto'); flat(learn, 1)
    again = resume(learner('channels_last', asked), tmp_path/'c')
    assert learn.precision=='bf16' and again.precision==then and [o.amp_mode for o in again.cbs.filter(risinstance(MixedPrecision))]==[AMPMode.BF16][:then=='bf16']
    flat(again, 2)

def test_a_precision_that_is_not_here_is_told(tmp_path, monkeypatch):
    learn = make(cbs=CheckpointCallback(tmp_path/'c')); learn.precision = 'tf32'; flat(learn, 1)
    monkeypatch.setattr(precision_module, 'quickest', lambda secs: 'fp32')
    with pytest.warns(UserWarning, match='began in tf32, and goes on in fp32.*needs a GPU'): again = resume(make().set_precision('auto'), tmp_path/'c')
    assert again.precision=='fp32'

# --- other callbacks

def test_fastais_trackers_go_on(tmp_path):
    cbs = lambda: [ReduceLROnPlateau(patience=1, min_delta=9., factor=2.), SaveModelCallback(fname=str(tmp_path/'m'))]
    with redirect_stdout(io.StringIO()): a,b = whole_and_resumed(tmp_path, flat, at=(3,0), cbs=cbs)
    assert same_run(a, b, opt=False) and a.opt.hypers[0]['lr']==b.opt.hypers[0]['lr']<1e-2
    assert a.save_model.best==b.save_model.best and a.reduce_lr_on_plateau.wait==b.reduce_lr_on_plateau.wait

class Counter_(Callback):
    "A callback with a state, and a log of what it saw"
    def __init__(self): self.n,self.seen = 0,[]
    def before_fit(self): self.n = 0
    def before_train(self): self.seen.append(('train',self.epoch))
    def before_validate(self): self.seen.append(('valid',self.epoch))
    def before_batch(self): self.seen.append(('batch',self.epoch,self.iter,self.training)); self.n += self.training
    def after_epoch(self): self.seen.append(('done',self.epoch))
    def state_dict(self): return dict(n=self.n, big=np.arange(3), deep=L(Path('a'), (1,2.,None)))
    def load_state_dict(self, st): assert st['big'].tolist()==[0,1,2] and st['deep']==['a',(1,2.,None)]; self.n = st['n']; self.seen.append('load')

@pytest.mark.parametrize('at', [(2,0),(2,2)])
def test_callbacks_with_a_state_get_it_back_and_see_nothing_of_what_is_over(tmp_path, at):
    whole,again = whole_and_resumed(tmp_path, at=at, every_batches=1, cbs=Counter_); a,b = whole.counter_,again.counter_
    assert a.n==b.n==16
    want = a.seen[a.seen.index(('train',2)):]; want = want[:1] + ['load'] + want[1+at[1]:]
    assert b.seen==want

def test_two_callbacks_of_one_class_keep_their_own_states(tmp_path):
    def cbs(): a,b = Counter_(),Counter_(); a.order,b.order = -5,5; a.before_fit = lambda: setattr(a, 'n', 100); return [a,b]
    whole,again = whole_and_resumed(tmp_path, cbs=cbs); n = lambda l: [cb.n for cb in l.cbs.sorted('order') if isinstance(cb, Counter_)]
    assert n(whole)==n(again)==[116,16]

def test_a_state_that_cannot_be_kept_is_named(tmp_path):
    class Odd(Callback):
        def state_dict(self): return dict(f=len)
        def load_state_dict(self, st): pass
    with pytest.raises(TypeError, match='`Odd` holds a builtin'): flat(make(cbs=[CheckpointCallback(tmp_path),Odd()]))

def test_looking_between_resume_and_fit_changes_nothing(tmp_path):
    whole = make(); one_cycle(whole); f = stopped(tmp_path); again = resume(make(seed=9), f)
    again.path = tmp_path; again.validate(); again.get_preds(); again.lr_find(num_it=20, show_plot=False); again.byol.show_views(2); one_cycle(again); assert same_run(whole, again)

def test_resume_loads_the_weights_and_the_curves_at_once(tmp_path):
    f = stopped(tmp_path); st = load_state(checkpoints(f)[0]); again = resume(make(seed=9), f)
    assert same_sd(sd_of(again), st['model']) and len(again.recorder.losses)==8 and len(again.recorder.values)==2 and again.model.view_size==16
    again.recorder.plot_loss(); plt.close('all')

def test_a_fit_that_was_gone_on_with_is_gone_on_with_once(tmp_path):
    again = resume(make(), stopped(tmp_path)); one_cycle(again); n = len(again.cbs); a = sd_of(again); one_cycle(again, 1)
    assert not same_sd(a, sd_of(again)) and len(again.recorder.values)==1 and n==len(make().cbs)

def test_an_interrupt_while_passing_over_leaves_all_callbacks_on(tmp_path):
    whole = make(); one_cycle(whole); f = stopped(tmp_path, at=(2,2), every_batches=1)
    class Fits(Callback):
        n = 0
        def before_fit(self): Fits.n += 1
    again = resume(make(seed=9, cbs=Fits()), f); one_batch = again.one_batch
    def interrupted(i, b):
        if again.epoch==2 and i==1: raise KeyboardInterrupt
        one_batch(i, b)
    again.one_batch = interrupted
    with pytest.raises(KeyboardInterrupt): one_cycle(again)
    assert not again.recorder.run; again.one_batch = one_batch; one_cycle(again); assert same_run(whole, again) and Fits.n==2

def test_a_run_that_is_over_has_nothing_left_to_do(tmp_path):
    whole = make(cbs=CheckpointCallback(tmp_path/'c')); one_cycle(whole)
    again = resume(make(seed=9, cbs=[CheckpointCallback(tmp_path/'c'),(c:=Counter_())]), tmp_path/'c'); before = [o.name for o in checkpoints(tmp_path/'c')]; one_cycle(again)
    assert same_run(whole, again, opt=False) and c.seen==[] and [o.name for o in checkpoints(tmp_path/'c')]==before

def test_a_classifier_goes_on_too(tmp_path):
    x,y = noise(40),torch.arange(40)%2
    def run(epochs, cbs=None, seed=1, f=None):
        set_seed(seed); learn = hush(Learner(image_dls(x, y=y, shuffle=True), nn.Sequential(conv_body(), nn.Flatten(), nn.Dropout(.3), nn.Linear(256,2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs))
        if f: resume(learn, f)
        learn.fit_one_cycle(epochs, 1e-2); return learn
    whole = run(3)
    with pytest.raises(KeyboardInterrupt): run(3, [CheckpointCallback(tmp_path/'c', monitor='accuracy'),Stop(2)])
    again = run(3, f=tmp_path/'c', seed=8); assert same_sd(sd_of(whole), sd_of(again)) and str(whole.recorder.values)==str(again.recorder.values)
    assert (tmp_path/'c'/'best.ckpt').exists()

def test_an_exported_learner_holds_no_checkpoint(tmp_path):
    for i,o in enumerate(noise(30, 20)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/f'{i}.png')
    mk = lambda **kw: make(lambda: unlabelled_dls(tmp_path, 16, bs=8, device=cpu), **kw); f,sizes = stopped(tmp_path, make=mk),[]
    for learn in (mk(), resume(mk(), f)): learn.path = tmp_path; learn.opt = None; learn.export('e.pkl'); sizes.append((tmp_path/'e.pkl').stat().st_size)
    assert sizes[1]-sizes[0]<5000, sizes
    load_learner(tmp_path/'e.pkl')

# --- which files are kept

class Value(Callback):
    "A column of given values, as a monitor that looks at every other epoch makes it"
    order = 45
    def __init__(self, *vals): self.vals,self.name_ = vals,'knn'
    def after_create(self): self.learn.metrics = [*self.learn.metrics, ValueMetric(self.knn)]
    def knn(self): return self.vals[self.epoch]

@pytest.mark.parametrize('keep,every,want', [(1,1,[5]), (3,1,[3,4,5]), (None,1,[1,2,3,4,5]), (9,2,[2,4,5]), (2,10,[5])])
def test_the_last_ones_are_kept(tmp_path, keep, every, want):
    flat(make(cbs=CheckpointCallback(tmp_path/'c', keep=keep, every=every)), 5)
    assert [o.name for o in checkpoints(tmp_path/'c')]==[f'run001_epoch{i:04d}.ckpt' for i in want[::-1]] and len(list((tmp_path/'c').iterdir()))==len(want)

@pytest.mark.parametrize('vals,kw,best', [((.1,.5,.3,.5),{},2), ((None,.2,None,.6),{},4), ((.9,float('nan'),.1,.2),{},1), ((.9,.1,.1,.2),dict(monitor='knn', comp=np.less),2), ((.1,.5,.3,.2),dict(every=4),2)])
def test_the_best_is_kept_besides(tmp_path, vals, kw, best):
    flat(make(cbs=[Value(*vals),CheckpointCallback(tmp_path/'c', keep=1, **kw)])); st = load_state(tmp_path/'c'/'best.ckpt')
    assert st['epoch']==best and load_state(checkpoints(tmp_path/'c')[0])['cbs']['checkpoint']['best']==vals[best-1]
    assert {o.name for o in (tmp_path/'c').iterdir()}=={'best.ckpt','run001_epoch0004.ckpt'}

def test_the_best_goes_on_being_compared(tmp_path):
    mk = lambda **kw: make(**{**kw, 'cbs':[Value(.1,.9,.5,.6),*kw['cbs']]}); f = stopped(tmp_path, make=mk)
    again = resume(mk(seed=2, cbs=[CheckpointCallback(f)]), f); one_cycle(again)
    assert again.checkpoint.best==.9 and load_state(f/'best.ckpt')['epoch']==2
    assert same_sd(sd_of(resume(mk(cbs=[]), f/'best.ckpt')), load_state(f/'best.ckpt')['model'])

def test_an_epoch_without_validation_has_no_best(tmp_path):
    class No(Callback):
        order = -50
        def before_validate(self): raise CancelValidException('none')
    flat(make(cbs=[Value(.1,.2),No(),CheckpointCallback(tmp_path/'c')]), 2); assert not (tmp_path/'c'/'best.ckpt').exists() and len(checkpoints(tmp_path/'c'))==2

def test_a_monitor_that_is_not_there_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match='no column \'knn\''): flat(make(cbs=CheckpointCallback(tmp_path/'c', monitor='knn')))
    assert not (tmp_path/'c').exists()

@pytest.mark.parametrize('kw', [dict(every=0), dict(keep=0), dict(every_batches=0), dict(every=1.5)])
def test_counts_are_checked(tmp_path, kw):
    with pytest.raises(ValueError, match=first(kw)): CheckpointCallback(tmp_path, **kw)

def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    f = stopped(tmp_path); old = [o.read_bytes() for o in checkpoints(f)]; learn = make(cbs=CheckpointCallback(f)); learn.validate(); a = sd_of(learn)
    with pytest.raises(ValueError, match='run001_epoch0002.ckpt'): flat(learn)
    assert same_sd(a, sd_of(learn)) and [o.read_bytes() for o in checkpoints(f)]==old
    flat(make(cbs=CheckpointCallback(f, overwrite=True)), 1); assert [o.name for o in checkpoints(f)]==['run001_epoch0001.ckpt']

def test_a_second_fit_is_newer_than_the_first(tmp_path):
    learn = make(cbs=CheckpointCallback(tmp_path/'c', keep=2)); flat(learn, 3); flat(learn, 1)
    assert [o.name for o in checkpoints(tmp_path/'c')]==['run002_epoch0001.ckpt','run001_epoch0003.ckpt']

def test_what_goes_on_from_an_earlier_one_is_newer_than_what_came_after_it(tmp_path):
    f = stopped(tmp_path, at=(3,0)); early = f/'run001_epoch0001.ckpt'; learn = resume(make(cbs=[CheckpointCallback(f, keep=None),Stop(2)]), early)
    with pytest.raises(KeyboardInterrupt): one_cycle(learn)
    assert checkpoints(f)[0].name=='run002_epoch0002.ckpt' and len(checkpoints(f))==4

def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path/'.run001_epoch0001.ckpt.77.tmp').write_bytes(b'half'); (tmp_path/'.mine.tmp').write_bytes(b'x')
    flat(make(cbs=CheckpointCallback(tmp_path)), 1); assert {o.name for o in tmp_path.iterdir()}=={'run001_epoch0001.ckpt','.mine.tmp'}

def test_lr_find_and_validation_write_nothing(tmp_path):
    learn = make(cbs=CheckpointCallback(tmp_path/'c', every_batches=1)); learn.path = tmp_path; learn.lr_find(num_it=20, show_plot=False); learn.validate(); assert not (tmp_path/'c').exists()

def test_a_run_with_checkpoints_is_the_run_without(tmp_path):
    a = make(); one_cycle(a); b = make(cbs=CheckpointCallback(tmp_path/'c', every_batches=1)); one_cycle(b); assert same_run(a, b)

# --- what does not fit

def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='missing_ok'): make().resume(tmp_path/'no')
    whole = make(); one_cycle(whole); learn = make(); assert learn.resume(tmp_path/'no', missing_ok=True) is learn; one_cycle(learn); assert same_run(whole, learn)

@pytest.mark.parametrize('kw,msg', [(dict(model=small_byol(bn=False)),'does not fit'), (dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)),'same `opt_func`'),
    (dict(splitter=lambda m: [p for n,p in m.named_parameters() if n.startswith('body')]),'same `splitter`')])
def test_another_learner_is_named(tmp_path, kw, msg):
    f = stopped(tmp_path)
    with pytest.raises(ValueError, match=msg): one_cycle(resume(byol_learn(dls_of(), **kw), f))

def test_another_length_of_the_run_warns(tmp_path):
    f = stopped(tmp_path)
    with pytest.warns(UserWarning, match='4 epochs, this one has 6'): one_cycle(resume(make(), f), 6)

def test_other_data_warns_and_begins_the_epoch_anew(tmp_path):
    f = stopped(tmp_path, at=(1,2), every_batches=1); learn = resume(make(lambda: dls_of(56), cbs=(c:=Counter_())), f)
    with pytest.warns(UserWarning, match='whole of the epoch'): one_cycle(learn)
    assert ('batch',1,0,True) in c.seen and ('train',0) not in c.seen

# --- damaged files

def small_state(): return dict(w=torch.arange(50.), n=[1,(2,None)], s='x')

def test_every_byte_counts(tmp_path):
    f = save_state(small_state(), tmp_path/'a.ckpt'); b = f.read_bytes(); r = random.Random(0)
    for i in range(11):
        f.write_bytes(b[:len(b)*i//10])
        if i==10: assert str(load_state(f))==str(small_state()); continue
        with pytest.raises(ValueError, match='a.ckpt was cut short'): load_state(f)
    for _ in range(200):
        c = bytearray(b); c[r.randrange(len(b))] ^= r.randrange(1,256); f.write_bytes(c)
        with pytest.raises(ValueError, match='a.ckpt'): load_state(f)
    f.write_bytes(b+b'x')
    with pytest.raises(ValueError, match='a.ckpt'): load_state(f)

def test_a_real_checkpoint_is_refused_or_exact(tmp_path):
    good = stopped(tmp_path); f = checkpoints(good)[0]; b = f.read_bytes(); r = random.Random(1)
    for i in range(10):
        f.write_bytes(b[:len(b)*i//10])
        with pytest.warns(UserWarning, match='going on from run001_epoch0001.ckpt'): learn = resume(make(seed=9), good)
        assert same_sd(sd_of(learn), load_state(good/'run001_epoch0001.ckpt')['model'])
    for _ in range(1000):
        c = bytearray(b); c[r.randrange(len(b))] ^= r.randrange(1,256); f.write_bytes(c)
        with pytest.raises(ValueError, match=f.name): make_once().resume(f)
def make_once():
    if not hasattr(make_once, 'learn'): make_once.learn = make()
    return make_once.learn

@pytest.mark.parametrize('junk', [b'', b'hello', os.urandom(5000)])
def test_a_foreign_file_is_refused_by_name(tmp_path, junk):
    f = stopped(tmp_path); (f/'run009_epoch0001.ckpt').write_bytes(junk); (f/'notes.ckpt').write_bytes(junk)
    with pytest.warns(UserWarning, match='run009_epoch0001.ckpt was cut short, or is no checkpoint'): resume(make(), f)
    with pytest.raises(ValueError, match='notes.ckpt'): make().resume(f/'notes.ckpt')
    for o in checkpoints(f): o.write_bytes(junk)
    with pytest.raises(ValueError, match='No checkpoint in'): make().resume(f, missing_ok=True)

def test_another_state_or_a_newer_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match='not a file of'): make().resume(save_state(small_state(), tmp_path/'a'))
    st = load_state(checkpoints(stopped(tmp_path))[0])
    with pytest.raises(ValueError, match='update fastbyol'): make().resume(save_state({**st,'format':99}, tmp_path/'b'))

def test_no_code_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'evil'),))
    with pytest.raises(ValueError, match='cannot read it'): load_state(save_state(dict(a=Evil()), tmp_path/'a'))
    assert not (tmp_path/'evil').exists()

@pytest.mark.parametrize('fails', ['fsync','replace'])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, fails):
    f = save_state(small_state(), tmp_path/'a'); old = f.read_bytes()
    def no(*a): raise OSError('disk full')
    monkeypatch.setattr(os, fails, no)
    with pytest.raises(OSError, match='disk full'): save_state(dict(a=1), f)
    assert f.read_bytes()==old and [o.name for o in tmp_path.iterdir()]==['a']

# --- killed at any moment

script = '''
import sys, os, time, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from conftest import *
import fastbyol.transfer as T
folder,out,workers,slow = Path(sys.argv[2]),sys.argv[3],int(sys.argv[4]),float(sys.argv[5])
if slow: # so that many a kill meets a file that is half written
    import fastbyol.checkpoint as C
    write = C._Hashing.write
    def slowly(self, b): time.sleep(slow); return write(self, b)
    C._Hashing.write = slowly
torch.set_num_threads(1); default_device(use=False); set_seed(0)
class Log(Callback):
    order = 1002
    def after_batch(self):
        if self.training: f = open(out+'.log','a'); f.write(f'{self.epoch} {self.iter} {self.loss.item()!r}\\n'); f.close()
x = noise(72); dl = lambda x,**k: TfmdDL([(TensorImage(o),) for o in x], bs=8, num_workers=workers, device=cpu, **k)
dls = DataLoaders(dl(x[8:], shuffle=True, drop_last=True), dl(x[:8]), device=cpu)
learn = byol_learn(dls, views=None, size=16, cbs=[CheckpointCallback(folder, every_batches=3), Log()], opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
learn.resume(folder, missing_ok=True)
learn.fit_one_cycle(12, 1e-2)
torch.save(dict(model=learn.model.state_dict(), losses=[o.item() for o in learn.recorder.losses]), out)
'''

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0,2])
def test_killed_ten_times_it_ends_with_the_same_weights(tmp_path, workers):
    (tmp_path/'s.py').write_text(script); r,half,done = random.Random(workers),0,[]
    log = lambda nm: tmp_path/f'{nm}.pth.log'
    def start(nm, slow=0.): return subprocess.Popen([sys.executable, tmp_path/'s.py', Path(__file__).parent, tmp_path/nm, tmp_path/f'{nm}.pth', str(workers), str(slow)], stdout=subprocess.DEVNULL)
    steps = lambda: len(log('killed').read_text().splitlines()) if log('killed').exists() else 0
    p = start('whole'); assert p.wait(300)==0
    for _ in range(10):
        p,until = start('killed', slow=.0005),steps()+r.randrange(9) # of 96 steps
        while steps()<until: assert p.poll() is None; time.sleep(.002)
        time.sleep(r.uniform(0, .4)); assert p.poll() is None
        p.send_signal(signal.SIGKILL); p.wait()
        half += len(list((tmp_path/'killed').glob('.*.tmp'))); done.append(first(o.name[7:-5] for o in checkpoints(tmp_path/'killed')))
    p = start('killed'); assert p.wait(300)==0
    print(f'\n{workers} workers: {half} of 10 kills left a half-written file; newest checkpoint after each: {done}')
    a,b = (torch.load(tmp_path/f'{o}.pth') for o in ('whole','killed'))
    assert same_sd(a['model'], b['model']) and a['losses']==b['losses']
    # each step that was taken twice had the same loss both times
    seen = []
    for nm in ('whole','killed'):
        seen.append(defaultdict(set))
        for l in log(nm).read_text().splitlines(): e,i,v = l.split(); seen[-1][e,i].add(v)
    assert seen[0]==seen[1] and len(seen[0])==96

def test_a_number_of_epochs_of_numpy_is_saved_so_that_it_can_be_read(tmp_path):
    learn = byol_learn(image_dls(noise(24)), cbs=CheckpointCallback(tmp_path)); learn.fit(np.int64(1), 1e-3)
    byol_learn(image_dls(noise(24)), cbs=CheckpointCallback(tmp_path/"other")).resume(tmp_path)
