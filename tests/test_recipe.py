"Recipes: which numbers are chosen, that what you say wins, and that each has its source"
from conftest import *
import pickle

# --- DeepMind's numbers

@pytest.mark.parametrize('epochs,lr,wd,tau', [(40,.45,1e-6,.97), (100,.45,1e-6,.99), (300,.3,1e-6,.99), (1000,.2,1.5e-6,.996)])
def test_deepminds_presets_at_their_batch(epochs, lr, wd, tau):
    r = recipe(epochs, 4096, 1_281_167)
    assert (r.preset,r.opt,r.base_lr,r.wd,r.tau,r.warmup)==('imagenet','lars',lr,wd,tau,10.)
    assert (r.mom,r.eta,r.tau_end)==(.9,1e-3,1.) and r.lr==pytest.approx(lr*16)
    assert f'DeepMind, {epochs} epochs'==r.sources['base_lr']==r.sources['tau']

@pytest.mark.parametrize('a,b', [(40,100),(100,300),(300,1000)])
def test_between_the_presets_numbers_are_those_of_the_logarithm(a, b):
    epochs = round((a*b)**.5); low,r,high = (recipe(e, 256) for e in (a,epochs,b))
    part = math.log(epochs/a)/math.log(b/a)
    for k in ('base_lr','wd'): assert r[k]==pytest.approx(low[k]+part*(high[k]-low[k]))
    assert 1-r.tau==pytest.approx((1-low.tau)**(1-part)*(1-high.tau)**part) and 'ours' in r.sources['tau']

@pytest.mark.parametrize('epochs,nearest', [(1,40), (39,40), (5000,1000)])
def test_outside_the_nearest_preset_is_taken(epochs, nearest):
    a,b = recipe(epochs, 256),recipe(nearest, 256)
    assert (a.base_lr,a.wd,a.tau)==(b.base_lr,b.wd,b.tau) and 'nearest' in a.sources['tau']

def test_imagenette_is_deepminds_setup():
    r = recipe(1000, 256, 9469, 128)
    assert (r.preset,r.base_lr,r.lr,r.wd,r.tau,r.warmup,r.eta)==('imagenette',2.,2.,1e-6,.996,10.,1e-3)

# --- presets

@pytest.mark.parametrize('n,size,want', [
    (None,224,'imagenet'), (100_000,64,'imagenet'), (99_999,64,'imagenette'), (4_999,64,'small_data'),
    (50_000,32,'cifar'), (None,40,'cifar')])
def test_the_preset_follows_from_images_and_size(n, size, want): assert recipe(100, 64, n, size).preset==want

def test_a_run_of_few_steps_takes_the_preset_for_few_steps():
    assert [recipe(e, 256, 9469, 128).preset for e in (55,56)]==['small_data','imagenette']
    assert recipe(20, 64, 9469, 128, effective_bs=256).preset=='small_data'

@pytest.mark.parametrize('preset', ['vit','warm_start'])
def test_a_rate_for_another_optimiser_is_refused(preset):
    with pytest.raises(ValueError, match=f"'{preset}' is made for 'adam'.*not one for 'lars'.*base_lr"):
        recipe(100, 64, preset=preset, opt='lars')
    for rate in ('base_lr','lr'): assert recipe(100, 256, preset=preset, opt='lars', **{rate:.3}).lr==.3

@pytest.mark.parametrize('bs,effective_bs,processes', [(64,None,1), (64,256,1), (32,256,4), (256,4096,16)])
def test_the_rate_goes_with_the_images_of_a_step(bs, effective_bs, processes):
    r = recipe(100, bs, effective_bs=effective_bs, processes=processes)
    assert r.effective_bs==(effective_bs or bs*processes)==r.accumulate*bs*processes
    assert r.lr==pytest.approx(r.base_lr*r.effective_bs/256)

def test_steps_are_those_of_accumulated_batches(): assert recipe(10, 64, 1000, effective_bs=256).steps==10*15//4

def test_small_images_have_the_small_stem_and_no_blur():
    r = recipe(1000, 256, 50_000, 32)
    assert (r.small_stem,r.blur,r.base_lr,r.eta,r.trust_clip,r.wd,r.tau)==(True,False,1.,.02,True,1e-5,.99)

def test_published_weights_are_kept_by_a_slow_body_and_a_slow_target():
    r = recipe(10, 64, 1400, 32, pretrained=True)
    assert (r.preset,r.opt,r.lr,r.body_lr_mult,r.tau)==('warm_start','adam',1e-3,.2,.99)
    assert r.splitter is byol_splitter and r.opt_func.keywords['lr_mults']==(.2,1.,1.)
    own = recipe(10, 64, 1400, preset='warm_start', pretrained=False); assert (own.body_lr_mult,own.tau)==(.2,.99) # loaded by hand
    assert recipe(10, 64, pretrained=True, body_lr_mult=1.).splitter is trainable_params

def test_small_batches_accumulate():
    r = recipe(100, 64, 9469, preset='small_batch'); assert (r.accumulate,r.cbs[0].n_acc,r.lr)==(4,256,2.)
def test_a_large_batch_needs_no_accumulation():
    assert recipe(100, 512, 9469, preset='small_batch').effective_bs==512

def test_adam_has_its_own_numbers():
    r = recipe(100, 256, opt='adam'); assert r.opt_func.func is adamw and r.base_lr<.01 and 'eta' not in r.values
    v = recipe(300, 4096, preset='vit')
    assert (v.opt,v.lr,v.wd,v.warmup,v.tau)==('adam',pytest.approx(2.4e-3),.1,40.,.99)

@pytest.mark.parametrize('steps,tau', [(10,.5), (150,.5), (1000,.9), (4000,.975), (24_999,.996), (100_000,.996)])
def test_the_target_averages_over_a_hundredth_of_a_short_run_at_most(steps, tau):
    r = recipe(steps, 100, 100, 64, preset='imagenette'); assert r.tau==pytest.approx(tau, abs=1e-6)
    assert r.replace(tau=.999).tau==.999

def test_a_preset_that_is_a_variant_says_the_difference_only():
    for name,base in (('small_batch','imagenette'), ('cifar','small_data')):
        assert presets[base].items()<presets[name].items()

# --- sources, and what you say

kinds = [{}, dict(n_items=9469, size=128), dict(size=32), dict(opt='adam', pretrained=True), *[dict(preset=o) for o in presets]]
@pytest.mark.parametrize('kw', kinds)
def test_every_number_has_a_source_and_is_printed(kw):
    r = recipe(57, 64, **kw); assert r.values.keys()==r.sources.keys() and all(r.sources.values())
    lines = repr(r).split('\n'); assert len(lines)==len(r.values)
    assert all(l.startswith(k) and l.endswith(r.sources[k]) for l,k in zip(lines, r.values))

def test_what_you_say_wins_and_is_marked_yours():
    own = dict(base_lr=.7, wd=.01, tau=.5, tau_end=.9, warmup=3., mom=.8, eta=.01, norm='group', small_stem=True, blur=False,
               body_lr_mult=.3, pred_lr_mult=10., opt='lars', pretrained=True)
    r = recipe(100, 256, **own)
    for k,v in own.items(): assert r[k]==v and r.sources[k].startswith('yours'), k
    assert recipe(100, 64, lr=.123).lr==.123 and recipe(100, 64, norm=None).sources['norm']=='yours'

@pytest.mark.parametrize('kw,msg', [
    (dict(epochs=0), '`epochs`.*1 or more'), (dict(epochs=2.5), '`epochs`'), (dict(bs=1), '2 or more'), (dict(bs=0), '`bs`'),
    (dict(bs=101), 'only 100: use bs=50'), (dict(effective_bs=128), 'only 100'), (dict(n_items=0), '`n_items`'),
    (dict(bs=2, n_items=1), 'only 1: pass more images'),
    (dict(effective_bs=0), '`effective_bs`'), (dict(processes=0), '`processes`'), (dict(size=7), 'at least 8'),
    (dict(effective_bs=50), 'multiple of.*use 32'), (dict(tau=1.1), r'kept on the target, is in \[0,1\]'),
    (dict(tau_end=-.1), 'tau_end'), (dict(opt='sgd'), "'lars', 'adam'"), (dict(preset='nette'), 'imagenette'),
    (dict(lr=0.), '`lr`'), (dict(lr=math.nan), '`lr`'), (dict(lr=1., base_lr=1.), 'Give `lr`, or `base_lr`'),
    (dict(wd=-1.), '`wd`'), (dict(mom=1.), '`mom`'), (dict(warmup=11.), '`warmup`'), (dict(norm='instance'), 'norm'),
    (dict(pred_lr_mult=0.), 'pred_lr_mult')])
def test_nonsense_is_refused_with_the_remedy(kw, msg):
    with pytest.raises(ValueError, match=msg): recipe(**{**dict(epochs=10, bs=32, n_items=100, size=64), **kw})

def test_a_recipe_can_be_read_changed_and_pickled():
    r = recipe(100, 256, 9469); assert r.lr==r['lr']==dict(**r)['lr']==r.get('lr')
    assert repr(pickle.loads(pickle.dumps(r)))==repr(deepcopy(r))==repr(r)
    assert r.replace(epochs=1000).tau==.996 and r.epochs==100
    with pytest.raises(AttributeError): r.learning_rate
    with pytest.raises(TypeError, match='taus'): r.replace(taus=1)

def test_the_picture_shows_both_schedules():
    ax = recipe(100, 256, 9469, 128).show_schedule()
    lrs,taus = (o.lines[0].get_ydata() for o in ax.figure.axes)
    assert lrs[0]==0 and max(lrs)==pytest.approx(2., rel=1e-2) and lrs[-1]==pytest.approx(0, abs=1e-9)
    assert taus[0]==pytest.approx(1-100/3600) and taus[-1]==1.; plt.close('all')
