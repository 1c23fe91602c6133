"Runs that are stopped and resume: bit for bit the same; files that were cut short are refused"
from conftest import *
from fastbyol.checkpoint import checkpoints, load_state, lock_folder
import hashlib, io, signal, socket, subprocess, sys, time
from contextlib import redirect_stdout
from functools import cache
from timm.optim import Lars
from fastai.callback.training import GradientAccumulation

class Stop(Callback):
    "Stops at once after `epoch` epochs, or after `batch` batches of the next one"
    order = CheckpointCallback.order+1
    def __init__(self, epoch, batch=0): self.at = epoch,batch
    def after_epoch(self):
        if self.at==(self.epoch+1,0): raise KeyboardInterrupt
    def after_batch(self):
        if self.training and self.at==(self.epoch,self.iter+1): raise KeyboardInterrupt

def draw(): return random.random()+np.random.rand()+torch.rand(1).item()

class Draws(Callback):
    "Random views would not do: every source of chance has a part in the pixels here"
    order = 11 # before `BYOLCallback`
    def before_batch(self): self.learn.xb = (self.xb[0]*(.8+.05*draw()),)

def dls_of(n=40, bs=8): return image_dls(noise(n), bs=bs, shuffle=True)

def make(dls=None, seed=1, cbs=None, **kw):
    set_seed(seed)
    return byol_learn((dls or dls_of)(), cbs=[Draws(),*L(cbs)], **kw)

def one_cycle(learn, n=3): learn.fit_one_cycle(n, 1e-2)
def flat(learn, n=3): learn.fit(n, 1e-2)
def flat_cos(learn): learn.fit_flat_cos(3, 1e-2)
def byol(learn): learn.fit_byol(3, 1e-2)

def resume(learn, path, **kw):
    with redirect_stdout(io.StringIO()): return learn.resume(path, **kw)

def curves(learn):
    rec = learn.recorder
    losses,values = [float(o) for o in rec.losses],[list(o) for o in rec.values]
    return losses,values,rec.lrs,rec.iters,getattr(rec, 'hps', None),learn.train_iter

def opt_state(learn): return str((learn.opt.state_dict()['state'], learn.opt.hypers))

def same_run(a, b, opt=True):
    "Are weights, optimiser, curves and τ of both learners the same, bit for bit?"
    assert same_sd(sd_of(a), sd_of(b))
    assert curves(a)==curves(b) and a.byol.taus==b.byol.taus
    return not opt or opt_state(a)==opt_state(b)

def interrupted(learn, fit):
    with pytest.raises(KeyboardInterrupt): fit(learn)

def stopped(tmp, fit=one_cycle, at=(2,0), make=make, cbs=None, **kw):
    "The folder of a run that was stopped"
    checkpoint = CheckpointCallback(tmp/'c', every_batches=1 if at[1] else None)
    interrupted(make(cbs=[checkpoint, Stop(*at), *L(cbs)], **kw), fit)
    return tmp/'c'

def whole_and_resumed(tmp, fit=one_cycle, at=(2,0), cbs=lambda: [], make=make, whole=None, **kw):
    "A run that is never stopped; and one that was, resumed by a learner with other random numbers"
    if whole is None: fit(whole := make(cbs=cbs(), **kw))
    folder = stopped(tmp, fit, at, make, cbs=cbs(), **kw)
    fit(again := resume(make(seed=99, cbs=cbs(), **kw), folder))
    return whole,again

@cache
def the_whole_run():
    one_cycle(learn := make())
    return learn,draw()

@pytest.fixture
def whole(): return the_whole_run()[0]

opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=ranger, lars=partial(OptimWrapper, opt=Lars),
            adamw=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('opt', opts)
def test_a_resumed_run_is_the_same_with_every_optimiser(tmp_path, opt):
    assert same_run(*whole_and_resumed(tmp_path, opt_func=opts[opt]))

@pytest.mark.parametrize('fit', [flat,flat_cos,byol])
def test_a_resumed_run_is_the_same_with_every_schedule(tmp_path, fit):
    assert same_run(*whole_and_resumed(tmp_path, fit))

@pytest.mark.parametrize('at', [(1,0),(0,1),(0,3),(1,2)])
def test_a_run_resumes_within_an_epoch(tmp_path, whole, at):
    assert same_run(*whole_and_resumed(tmp_path, at=at, whole=whole))
    assert draw()==the_whole_run()[1] # the random numbers, too, are where they would have been

def test_a_run_can_be_stopped_twice(tmp_path, whole):
    folder = stopped(tmp_path, at=(1,2))
    for at in ((1,3),(2,0)):
        cbs = [CheckpointCallback(folder, every_batches=1),Stop(*at)]
        interrupted(resume(make(seed=at[1]+7, cbs=cbs), folder), one_cycle)
    one_cycle(again := resume(make(seed=5), folder))
    assert same_run(whole, again)

@pytest.mark.parametrize('n_acc,at', [(24,(1,0)),(16,(1,3))])
def test_accumulated_gradients_are_kept(tmp_path, n_acc, at):
    assert same_run(*whole_and_resumed(tmp_path, at=at, cbs=lambda: GradientAccumulation(n_acc)))

def test_random_views_are_the_same(tmp_path):
    assert same_run(*whole_and_resumed(tmp_path, views=None, size=16))

class Jitter(ItemTransform):
    "Random numbers in the workers"
    def encodes(self, x): return tuple(o*(.9+.03*draw()) for o in x)

@pytest.mark.parametrize('workers', [0,2])
def test_worker_processes_draw_the_same(tmp_path, workers):
    def dls():
        items = [(TensorImage(o),) for o in noise(40)]
        kw = dict(bs=8, num_workers=workers, after_item=Jitter, device=cpu)
        return DataLoaders(TfmdDL(items[8:], shuffle=True, **kw), TfmdDL(items[:8], **kw), device=cpu)
    assert same_run(*whole_and_resumed(tmp_path, partial(one_cycle, n=2), (1,2), dls=dls))

def photos(folder):
    folder.mkdir()
    for i,o in enumerate(noise(30, 20)): PILImage.create(np.uint8(o.permute(1,2,0)*255)).save(folder/f'{i}.png')

@pytest.mark.parametrize('in_memory', ['auto','disk'])
def test_photos_that_moved_are_the_same_run(tmp_path, in_memory):
    def run(folder, **kw):
        return make(lambda: unlabelled_dls(tmp_path/folder, 16, bs=8, device=cpu, in_memory=in_memory), **kw)
    photos(tmp_path/'here')
    one_cycle(whole := run('here'))
    folder = stopped(tmp_path, at=(1,2), make=partial(run, 'here'))
    (tmp_path/'here').rename(tmp_path/'there')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        one_cycle(again := resume(run('there', seed=9), folder))
    assert same_run(whole, again)

def test_data_loaders_of_torch_keep_their_order(tmp_path):
    def run(seed=1, **kw):
        def dl(x, **k): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8, **k)
        g,x = torch.Generator().manual_seed(seed),noise(40)
        return make(lambda: DataLoaders(dl(x[8:], shuffle=True, generator=g), dl(x[:8])), seed, **kw)
    assert same_run(*whole_and_resumed(tmp_path, make=run))

class Scaled(Callback):
    "A scaler as `MixedPrecision` keeps it"
    order = 10
    def __init__(self): self.scales = []
    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=4., growth_interval=3)
        self.learn.scaler.scale(tensor(1.))
    def after_step(self):
        self.scales.append(self.learn.scaler.get_scale())
        self.learn.scaler._scale *= 1.5
    def after_fit(self): self.learn.scaler = None

def test_the_scaler_resumes(tmp_path):
    a,b = whole_and_resumed(tmp_path, cbs=Scaled)
    assert b.scaled.scales==a.scaled.scales[8:] and len(b.scaled.scales)==4

def test_another_precision_is_told(tmp_path):
    learn = make(cbs=CheckpointCallback(tmp_path/'c'))
    learn.precision = 'bf16'
    flat(learn, 1)
    again = resume(make(), tmp_path/'c')
    again.precision = 'fp32'
    with pytest.warns(UserWarning, match=r'precision=bf16 \(now fp32\).*not bit for bit'): flat(again, 1)

# --- other callbacks

def test_fastais_trackers_resume(tmp_path):
    plateau = partial(ReduceLROnPlateau, patience=1, min_delta=9., factor=2.)
    cbs = lambda: [plateau(), SaveModelCallback(fname=str(tmp_path/'m'))]
    with redirect_stdout(io.StringIO()): a,b = whole_and_resumed(tmp_path, partial(flat, n=4), (3,0), cbs)
    assert same_run(a, b, opt=False) and a.opt.hypers[0]['lr']==b.opt.hypers[0]['lr']<1e-2
    assert a.save_model.best==b.save_model.best
    assert a.reduce_lr_on_plateau.wait==b.reduce_lr_on_plateau.wait

class Counts(Callback):
    "A callback with a state, and a log of what it saw"
    def __init__(self): self.n,self.seen = 0,[]
    def before_fit(self): self.n = 0
    def before_train(self): self.seen.append(('train',self.epoch))
    def before_validate(self): self.seen.append(('valid',self.epoch))
    def before_batch(self):
        self.seen.append(('batch',self.epoch,self.iter,self.training))
        self.n += self.training
    def after_epoch(self): self.seen.append(('done',self.epoch))
    def state_dict(self): return dict(n=self.n, big=np.arange(3), deep=L('a', (1,2.,None)))
    def load_state_dict(self, st):
        assert st['big'].tolist()==[0,1,2] and st['deep']==['a',(1,2.,None)]
        self.n = st['n']
        self.seen.append('load')

@pytest.mark.parametrize('at', [(1,0),(1,2)])
def test_callbacks_get_their_state_back_and_see_nothing_of_what_is_over(tmp_path, at):
    a,b = [o.counts for o in whole_and_resumed(tmp_path, at=at, cbs=Counts)]
    assert a.n==b.n==12
    want = a.seen[a.seen.index(('train',1)):]
    assert b.seen==want[:1] + ['load'] + want[1+at[1]:]

@pytest.mark.parametrize('same', [True,False])
@pytest.mark.parametrize('at', [(1,0),(1,2)])
def test_a_run_with_all_monitors_resumes_with_their_histories(tmp_path, at, same, capsys):
    def data():
        x = noise(32)
        return image_dls(x, y=[i%2 for i in range(32)], shuffle=True)
    def cbs(): return [HealthMonitor(8), OnlineProbe(n_out=2), KNNCallback(image_dls(noise(24), y=[i%2 for i in range(24)]))]
    looks = []
    def watched(learn):
        look = learn.knn._look
        learn.knn._look = lambda epoch: (looks.append(epoch), look(epoch))
        return learn
    flat(whole := make(data, cbs=cbs()))
    checkpoint = CheckpointCallback(tmp_path/'c', every_batches=1, keep=None)
    interrupted(learn := make(data, cbs=[checkpoint, Stop(*at), *cbs()]), flat)
    if same: learn.remove_cbs(learn.cbs.filter(risinstance(Stop)))
    else: learn = make(data, seed=99, cbs=cbs())
    flat(watched(resume(learn, tmp_path/'c')))
    assert same_run(whole, learn) and looks==[2,3]
    for name in ('health','probe','knn'):
        a,b = getattr(whole, name),getattr(learn, name)
        pd.testing.assert_frame_equal(a.history, b.history)
    assert same_sd(whole.probe.head.state_dict(), learn.probe.head.state_dict())

def test_two_callbacks_of_one_class_keep_their_states(tmp_path):
    def cbs():
        a,b = Counts(),Counts()
        a.order,a.before_fit = -5,lambda: setattr(a, 'n', 100)
        return [a,b]
    for learn in whole_and_resumed(tmp_path, cbs=cbs):
        assert [o.n for o in learn.cbs.filter(risinstance(Counts)).sorted('order')]==[112,12]

def test_a_state_that_cannot_be_kept_is_named(tmp_path):
    class Odd(Callback):
        def state_dict(self): return dict(f=len)
        def load_state_dict(self, st): pass
    with pytest.raises(TypeError, match="state.cbs.odd.f holds a builtin"):
        flat(make(cbs=[CheckpointCallback(tmp_path),Odd()]))

def test_the_weights_and_the_curves_are_there_at_once(tmp_path):
    folder = stopped(tmp_path)
    again = resume(make(seed=9), folder)
    assert same_sd(sd_of(again), load_state(checkpoints(folder)[0])['model'])
    assert len(again.recorder.losses)==8 and len(again.recorder.values)==2 and again.model.view_size==16

def test_a_fit_is_resumed_once(tmp_path):
    one_cycle(again := resume(make(), stopped(tmp_path)))
    a = sd_of(again)
    one_cycle(again, 1)
    assert not same_sd(a, sd_of(again)) and len(again.recorder.values)==1

def test_an_interrupt_while_batches_are_loaded_again_changes_nothing(tmp_path, whole):
    again = resume(make(seed=9), stopped(tmp_path, at=(1,2)))
    before_iter,again.dls.train.before_iter = again.dls.train.before_iter,lambda: 1/0
    with pytest.raises(ZeroDivisionError): one_cycle(again)
    again.dls.train.before_iter = before_iter
    again.validate()
    one_cycle(again)
    assert same_run(whole, again)

def test_a_progress_bar_shows_what_is_left(tmp_path, capfd):
    again = resume(make(seed=9, cbs=ProgressCallback()), stopped(tmp_path))
    one_cycle(again)
    assert len(again.recorder.values)==3

# --- a run that is over, more epochs, two fits

def test_a_run_that_is_over_has_nothing_left_to_train(tmp_path, whole, capsys):
    one_cycle(make(cbs=CheckpointCallback(tmp_path/'c')))
    again = resume(make(seed=9, cbs=[CheckpointCallback(tmp_path/'c'),c:=Counts()]), tmp_path/'c')
    one_cycle(again)
    assert same_run(whole, again, opt=False) and c.seen==[]
    assert len(checkpoints(tmp_path/'c'))==3 and 'All 3 epochs are done' in capsys.readouterr().out

def test_more_epochs_than_before_are_trained_and_told(tmp_path):
    one_cycle(make(cbs=CheckpointCallback(tmp_path/'c')))
    again = resume(make(cbs=(c:=Counts())), tmp_path/'c')
    with pytest.warns(UserWarning, match=r'n_epoch=3 \(now 5\)'): one_cycle(again, 5)
    assert [o for o in c.seen if o[0]=='done']==[('done',3),('done',4)] and len(again.recorder.values)==5

def classifier(seed, cbs=None):
    set_seed(seed)
    net = nn.Sequential(conv_body(), nn.Sequential(nn.Flatten(), nn.Dropout(.3), nn.Linear(256,2)))
    dls = image_dls(noise(40), y=torch.arange(40)%2, shuffle=True)
    split = lambda m: [params(m[0]), params(m[1])]
    return hush(Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=split, cbs=cbs))

def fine_tune(learn): learn.fine_tune(2, 1e-2, freeze_epochs=2)

@pytest.mark.parametrize('phase', [1,2])
def test_a_classifier_resumes_in_either_phase_of_fine_tuning(tmp_path, phase, capsys):
    class StopFit(Stop):
        fits = 0
        def before_fit(self): self.fits += 1
        def after_epoch(self):
            if self.fits==phase: super().after_epoch()
    fine_tune(whole := classifier(1))
    interrupted(classifier(1, [CheckpointCallback(tmp_path/'c'),StopFit(1)]), fine_tune)
    fine_tune(again := classifier(8).resume(tmp_path/'c'))
    assert same_sd(sd_of(whole), sd_of(again)) and curves(whole)==curves(again)
    assert ('this one is passed over' in capsys.readouterr().out)==(phase==2)

# --- every entry point of fastai, before, between and after fits

def entry_points(learn):
    return dict(validate=learn.validate, get_preds=learn.get_preds, summary=learn.summary,
                lr_find=lambda: learn.lr_find(num_it=4, show_plot=False), show_views=lambda: learn.byol.show_views(2))

@pytest.mark.parametrize('entry', ['validate','get_preds','summary','lr_find','show_views'])
def test_looking_before_between_and_after_fits_changes_nothing(tmp_path, whole, entry):
    def look(learn):
        state = torch.get_rng_state()
        learn.path = tmp_path
        learn.create_opt() if learn.opt is None else None
        entry_points(learn)[entry]()
        torch.set_rng_state(state)
    folder = stopped(tmp_path)
    look(again := resume(make(seed=9, cbs=CheckpointCallback(tmp_path/'new')), folder))
    assert not (tmp_path/'new').exists() # looking is no training
    one_cycle(again)
    assert same_run(whole, again)
    look(again)
    flat(again, 1)
    look(again)
    assert len(checkpoints(tmp_path/'new'))==2

def test_an_exported_learner_holds_no_checkpoint(tmp_path):
    folder,sizes = stopped(tmp_path),[]
    photos(tmp_path/'photos')
    dls = lambda: unlabelled_dls(tmp_path/'photos', 16, bs=8, device=cpu)
    for learn in (make(dls), resume(make(dls, cbs=CheckpointCallback(folder)), folder)):
        learn.path = tmp_path
        learn.export('e.pkl')
        sizes.append((tmp_path/'e.pkl').stat().st_size)
    assert sizes[1]-sizes[0]<5000
    load_learner(tmp_path/'e.pkl')

# --- which files are kept

def names(folder): return {o.name for o in folder.iterdir() if o.suffix=='.ckpt'}

@pytest.mark.parametrize('keep,every,want', [(1,1,[5]), (3,1,[5,4,3]), (None,1,[5,4,3,2,1]), (9,2,[5,4,2])])
def test_the_last_ones_are_kept(tmp_path, keep, every, want):
    flat(make(cbs=CheckpointCallback(tmp_path/'c', keep=keep, every=every)), 5)
    files = [f'run001_epoch{i:04d}.ckpt' for i in want]
    assert checkpoints(tmp_path/'c').attrgot('name')==files and names(tmp_path/'c')=={*files}

@pytest.mark.parametrize('kw', [dict(every=0), dict(keep=0), dict(every_batches=0), dict(every=1.5)])
def test_counts_are_checked(tmp_path, kw):
    with pytest.raises(ValueError, match=first(kw)): CheckpointCallback(tmp_path, **kw)

def test_a_number_of_epochs_of_numpy_can_be_read_again(tmp_path):
    flat(make(cbs=CheckpointCallback(tmp_path)), np.int64(1))
    resume(make(), tmp_path)

def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    folder = stopped(tmp_path)
    old = [o.read_bytes() for o in checkpoints(folder)]
    learn = make(cbs=CheckpointCallback(folder))
    with pytest.raises(ValueError, match='run001_epoch0002.ckpt'): flat(learn)
    assert [o.read_bytes() for o in checkpoints(folder)]==old
    flat(make(cbs=CheckpointCallback(folder, overwrite=True)), 1)
    assert names(folder)=={'run001_epoch0001.ckpt'}

def test_a_second_fit_is_newer_than_the_first(tmp_path):
    learn = make(cbs=CheckpointCallback(tmp_path/'c', keep=2))
    flat(learn, 2)
    flat(learn, 1)
    assert checkpoints(tmp_path/'c').attrgot('name')==['run002_epoch0001.ckpt','run001_epoch0002.ckpt']

def test_what_resumes_from_an_earlier_one_is_newer_than_what_came_after_it(tmp_path):
    folder = stopped(tmp_path)
    learn = make(cbs=[CheckpointCallback(folder, keep=None),Stop(2)])
    interrupted(resume(learn, folder/'run001_epoch0001.ckpt'), one_cycle)
    assert checkpoints(folder)[0].name=='run002_epoch0002.ckpt' and len(checkpoints(folder))==3

def test_what_a_killed_run_left_is_removed(tmp_path):
    for name in ('.run001_epoch0001.ckpt.77.tmp','.mine.tmp'): (tmp_path/name).write_bytes(b'half')
    flat(make(cbs=CheckpointCallback(tmp_path)), 1)
    assert [o.name for o in tmp_path.glob('.*.tmp')]==['.mine.tmp']

def test_a_run_with_checkpoints_is_the_run_without(tmp_path, whole):
    one_cycle(learn := make(cbs=CheckpointCallback(tmp_path/'c', every_batches=1)))
    assert same_run(whole, learn)

# --- two jobs, one folder

def other_process(folder):
    "Another process that holds the folder"
    r,w = os.pipe()
    if pid := os.fork(): return pid,os.read(r, 1)
    with lock_folder(folder):
        os.write(w, b'1')
        time.sleep(60)
    os._exit(0)

def test_a_second_job_is_told_who_has_the_folder_until_that_is_killed(tmp_path):
    pid,_ = other_process(tmp_path/'c')
    learn = make(cbs=CheckpointCallback(tmp_path/'c'))
    with pytest.raises(BlockingIOError, match=f'in use by process {pid} on {socket.gethostname()}'): flat(learn, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    flat(learn, 1)
    assert names(tmp_path/'c')=={'run001_epoch0001.ckpt'}
    with lock_folder(tmp_path/'c'): pass # a fit that is over lets go

def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no(self): raise OSError('no locks available')
    monkeypatch.setattr('fastbyol.checkpoint.FileLock.acquire', no)
    with pytest.warns(UserWarning, match='no locks available'): flat(make(cbs=CheckpointCallback(tmp_path)), 1)

# --- what does not fit

def test_a_missing_checkpoint_is_named_or_begins_a_run(tmp_path):
    learn = make()
    with pytest.raises(FileNotFoundError, match='missing_ok'): learn.resume(tmp_path/'no')
    assert learn.resume(tmp_path/'no', missing_ok=True) is learn

def sgd(params, **kw): return OptimWrapper(params, torch.optim.SGD, **kw)
def body_alone(m): return [p for n,p in m.named_parameters() if n.startswith('body')]

@pytest.mark.parametrize('kw,msg', [
    (dict(model=small_byol(bn=False)), 'does not fit'), (dict(opt_func=sgd), 'same `opt_func`'),
    (dict(splitter=body_alone), 'and `splitter`')])
def test_another_learner_is_named(tmp_path, kw, msg):
    folder = stopped(tmp_path)
    with pytest.raises(ValueError, match=msg): one_cycle(resume(byol_learn(dls_of(), **kw), folder))

def test_other_data_is_told_and_begins_the_epoch_again(tmp_path):
    learn = resume(make(lambda: dls_of(56), cbs=(c:=Counts())), stopped(tmp_path, at=(1,2)))
    with pytest.warns(UserWarning, match=r'n_iter=4 \(now 6\), images=32 \(now 48\)'): one_cycle(learn)
    assert ('batch',1,0,True) in c.seen and ('train',0) not in c.seen

# --- files that cannot be read

def test_a_file_that_was_cut_short_is_named(tmp_path):
    file = checkpoints(stopped(tmp_path))[0]
    whole = file.read_bytes()
    for data in (*(whole[:len(whole)*i//10] for i in range(10)), whole[:-1], os.urandom(5000)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match='run001_epoch0002.ckpt was cut short'): load_state(file)
        with pytest.raises(ValueError, match='run001_epoch0002.ckpt was cut short'): make().resume(tmp_path/'c')

@pytest.mark.parametrize('state', [dict(model={}), dict(format=99), [1]])
def test_another_file_of_torch_is_named(tmp_path, state):
    torch.save(state, tmp_path/'a.pth')
    with pytest.raises(ValueError, match='a.pth .* is no checkpoint'): make().resume(tmp_path/'a.pth')

def test_a_checkpoint_with_a_digest_behind_it_still_resumes(tmp_path, whole):
    folder = stopped(tmp_path, at=(1,2))
    data = checkpoints(folder)[0].read_bytes()
    checkpoints(folder)[0].write_bytes(data + b'fastbyol-state-1' + hashlib.sha256(data).digest())
    torch.save({}, folder/'best.ckpt') # as older versions kept it besides
    one_cycle(again := resume(make(seed=9), folder))
    assert same_run(whole, again)

def test_checkpoints_of_fastbyol_1_still_resume(tmp_path, whole):
    folder = stopped(tmp_path, at=(1,2))
    file = checkpoints(folder)[0]
    state = load_state(file)
    for k in ('images','processes'): state.pop(k)
    state['opt'].pop('frozen')
    torch.save(state, file)
    one_cycle(again := resume(make(seed=9), folder))
    assert same_run(whole, again)

def test_no_code_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    torch.save(dict(format=1, a=Evil()), tmp_path/'a')
    with pytest.raises(ValueError): load_state(tmp_path/'a')
    assert not (tmp_path/'evil').exists()

@pytest.mark.parametrize('fails', ['fsync','replace'])
def test_a_failed_write_leaves_the_old_files_whole(tmp_path, monkeypatch, fails):
    folder = stopped(tmp_path)
    old = [o.read_bytes() for o in checkpoints(folder)]
    def no(*a): raise OSError('disk full')
    monkeypatch.setattr(os, fails, no)
    with pytest.raises(OSError, match='disk full'): flat(resume(make(cbs=CheckpointCallback(folder)), folder))
    assert [o.read_bytes() for o in checkpoints(folder)]==old and not [*folder.glob('.*.tmp')]

# --- killed at any moment

script = '''
import sys, time, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from conftest import *
folder,out,workers,slow = Path(sys.argv[2]),sys.argv[3],int(sys.argv[4]),float(sys.argv[5])
save = torch.save
def slowly(*args): # so that many a kill meets a file that is not whole yet
    save(*args)
    time.sleep(slow)
if slow: torch.save = slowly
torch.set_num_threads(1); default_device(use=False); set_seed(0)
class Log(Callback):
    order = 1002
    def after_batch(self):
        if self.training:
            with open(out+'.log', 'a') as f: f.write(f'{self.epoch} {self.iter} {self.loss.item()!r}\\n')
items = [(TensorImage(o),) for o in noise(72)]
def dl(items, **kw): return TfmdDL(items, bs=8, num_workers=workers, device=cpu, **kw)
dls = DataLoaders(dl(items[8:], shuffle=True, drop_last=True), dl(items[:8]), device=cpu)
learn = byol_learn(dls, views=None, size=16, cbs=[CheckpointCallback(folder, every_batches=3), Log()],
                   opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
learn.resume(folder, missing_ok=True)
learn.fit_one_cycle(12, 1e-2)
save(dict(model=learn.model.state_dict(), losses=[o.item() for o in learn.recorder.losses]), out)
'''

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0,2])
def test_killed_ten_times_it_ends_with_the_same_weights(tmp_path, workers):
    (tmp_path/'s.py').write_text(script)
    r,n_half,done = random.Random(workers),0,[]
    def log(name): return (tmp_path/f'{name}.pth.log').read_text().splitlines()
    def n_steps(): return len(log('killed')) if (tmp_path/'killed.pth.log').exists() else 0
    def start(name, slow=0.):
        args = Path(__file__).parent, tmp_path/name, tmp_path/f'{name}.pth', str(workers), str(slow)
        return subprocess.Popen([sys.executable, tmp_path/'s.py', *args], stdout=subprocess.DEVNULL)
    assert start('whole').wait(300)==0
    for _ in range(10):
        p,until = start('killed', slow=.05),n_steps()+r.randrange(9) # of 96 steps
        while n_steps()<until:
            assert p.poll() is None
            time.sleep(.002)
        time.sleep(r.uniform(0, .4))
        assert p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait()
        n_half += len([*(tmp_path/'killed').glob('.*.tmp')])
        done.append(first(o.name[7:-5] for o in checkpoints(tmp_path/'killed')))
    assert start('killed').wait(300)==0
    print(f'\n{workers} workers: {n_half} of 10 kills left a half-written file; newest checkpoint after each: {done}')
    a,b = (torch.load(tmp_path/f'{o}.pth') for o in ('whole','killed'))
    assert same_sd(a['model'], b['model']) and a['losses']==b['losses']
    # each step that was taken twice had the same loss both times
    assert {*log('whole')}=={*log('killed')} and len(log('whole'))==96
