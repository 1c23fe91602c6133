"`byol_learner` and `fit_byol`: what they build and run from the data, the arguments and a recipe"
from conftest import *
from fastbyol.body import BodySpec
from fastai.callback.all import *
from fastbyol.optim import Lars
from fastbyol.learner import ViewSizes

quick = dict(hidden_size=16, projection_size=8)

@cpu_only('bit for bit, which graphs are not')
def test_it_equals_the_learner_by_hand():
    x,r = noise(32,20),[]
    body = conv_body()
    def by_hand(dls): return Learner(dls, BYOL(deepcopy(body), **quick), loss_func=BYOLLoss(), cbs=BYOLCallback())
    for mk in (lambda d: byol_learner(d, deepcopy(body), precision='fp32', **quick), by_hand):
        set_seed(1); learn = hush(mk(image_dls(x))); learn.model.load_state_dict(r[0][0] if r else learn.model.state_dict())
        start = sd_of(learn); set_seed(2); learn.fit(1, 1e-2); r.append((start,sd_of(learn)))
    assert same_sd(r[0][0], r[1][0]) and same_sd(r[0][1], r[1][1])

@pytest.mark.parametrize('n_in', [1,3,4])
def test_channels_are_those_of_the_images(n_in):
    learn = hush(byol_learner(image_dls(noise(24,20,n_in)), conv_body(n_in), **quick)); learn.fit(1, 1e-2); assert learn.model.spec.n_in==n_in

@pytest.mark.parametrize('side,size,want', [(40,None,40), (20,12,12), (8,None,8)])
def test_views_are_of_the_size_of_the_images_or_as_asked(side, size, want):
    learn = hush(byol_learner(image_dls(noise(24,side)), conv_body(), size=size, cbs=[g:=Grab()], **quick)); learn.fit(1, 1e-2)
    assert g.xs[0][0].shape[-2:]==(want,want) and learn.model.view_size==want

@pytest.mark.parametrize('size', [16,30])
def test_views_are_of_the_size_that_unlabelled_dls_was_asked_for(tmp_path, size):
    for i,o in enumerate(noise(12, 40)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/f'{i}.png')
    learn = hush(byol_learner(unlabelled_dls(tmp_path, size, bs=4, device=cpu), conv_body(), cbs=[g:=Grab()], **quick)); learn.fit(1, 1e-2)
    assert g.xs[0][0].shape[-2:]==(size,size) and learn.model.view_size==size

def test_arguments_reach_their_places():
    learn = byol_learner(image_dls(noise(24,20)), 'resnet18', views=(same,mirror), tau=.9, tau_end=.95, norm='layer', small_stem=True, momentum=False,
                         lr=.5, wd=.1, cbs=CSVLogger(), **quick)
    m,cb = learn.model,learn.byol
    assert (cb.tau,cb.tau_end,cb.views,learn.lr,learn.wd)==(.9,.95,(same,mirror),.5,.1) and hasattr(learn,'csv_logger')
    assert m.target is None and m.spec.small_stem and isinstance(m.projector[1], nn.LayerNorm) and m.projection_size==8

def test_model_args_reach_timm():
    learn = byol_learner(image_dls(noise(24,32)), 'vit_tiny_patch16_224', model_args=dict(img_size=32), **quick)
    assert learn.model.body.model.patch_embed.img_size==(32,32)

def test_building_leaves_the_order_of_training_alone():
    orders = []
    for build in (False,True):
        set_seed(3); dls = image_dls(noise(40,20), shuffle=True)
        if build: byol_learner(dls, conv_body(), **quick)
        orders.append([torch.cat([b[0] for b in dls.train]) for _ in range(2)])
    assert torch.equal(orders[0][0], orders[1][0]) and torch.equal(orders[0][1], orders[1][1]) and not torch.equal(*orders[0])

@pytest.mark.parametrize('kw,exc,msg', [
    (dict(arch='resnet_18'), ValueError, 'nearest are .*resnet18'), (dict(arch='vit_tiny_patch16_224'), ValueError, 'size=224|img_size'),
    (dict(norm='x'), ValueError, 'norm'), (dict(tau=2.), ValueError, 'kept'), (dict(views=[same]), TypeError, 'pair'),
    (dict(hiden_size=8), TypeError, 'hiden_size'), (dict(n_in=1), ValueError, 'n_in')])
def test_mistakes_are_named_at_once(kw, exc, msg):
    "Without a `fit`"
    with pytest.raises(exc, match=msg): byol_learner(image_dls(noise(24,20)), **{**dict(arch=conv_body(), **quick), **kw})

def test_no_training_images_is_an_error():
    with pytest.raises(ValueError, match='empty'): byol_learner(image_dls(noise(8), n_val=8), conv_body(), **quick)

# --- with a recipe

def recipe_learner(r, size=48, body=None, **kw):
    "A small learner with a recipe, which no test trains for long"
    return hush(byol_learner(image_dls(noise(32,size)), body or conv_body(), recipe=r, **{**quick, **kw}))

def test_a_learner_follows_the_recipe():
    r = recipe(4, 8, 24, 16, preset='imagenette', effective_bs=16, pred_lr_mult=10., norm='layer')
    learn = recipe_learner(r, 16)
    assert (learn.lr,learn.wd,learn.byol.tau,learn.byol.tau_end)==(r.lr,r.wd,r.tau,1.)
    assert learn.gradient_accumulation.n_acc==16 and isinstance(learn.model.projector[1], nn.LayerNorm)
    learn.fit_byol(); assert len(learn.byol.taus)==r.steps==6
    assert isinstance(learn.opt.opt, Lars) and learn.opt.lr_mults==[1.,1.,10.]

class AtOnce(Callback):
    "Ends a fit before its first batch"
    def before_train(self): raise CancelFitException

def test_a_run_of_another_length_takes_the_optimiser_of_its_preset():
    learn = recipe_learner(recipe(1, 8, n_items=6000), views=(same,mirror), cbs=AtOnce())
    learn.fit_byol(); opt = learn.opt; assert (learn.recipe.preset,learn.recipe.eta)==('small_data',.02)
    learn.fit_byol(2); assert learn.opt is opt # of the same kind: it keeps what it has learned
    learn.fit_byol(4); assert learn.recipe.preset=='imagenette' and learn.opt is not opt
    assert learn.opt.hypers[0]['lr']==pytest.approx(learn.recipe.lr)

def test_ones_own_optimiser_stays_in_a_run_of_another_length():
    learn = recipe_learner(recipe(4, 8, lr=.1), opt_func=SGD, views=(same,mirror), cbs=AtOnce())
    learn.fit_byol(1000); assert learn.opt_func is SGD and learn.recipe.opt=='SGD' and isinstance(learn.opt, Optimizer)

def test_what_is_passed_besides_wins_and_is_marked_yours():
    learn = recipe_learner(recipe(4, 8), body='resnet18', lr=.3, wd=.2, tau=.5, norm=None, small_stem=True, opt_func=SGD,
                           views=(same,mirror), cbs=GradientAccumulation(24))
    assert (learn.lr,learn.wd,learn.byol.tau,learn.byol.views,learn.opt_func)==(.3,.2,.5,(same,mirror),SGD)
    assert learn.model.spec.small_stem and isinstance(learn.model.projector[1], nn.Identity)
    assert [o.n_acc for o in learn.cbs.filter(risinstance(GradientAccumulation))]==[24]
    r = learn.recipe; assert r.opt=='SGD' and r.accumulate==3 and not {'eta','mom','blur'} & r.keys()
    for k in ('lr','wd','tau','norm','small_stem','opt','views','effective_bs'): assert r.sources[k]=='yours', k

def test_a_rate_passed_besides_takes_the_place_of_a_base_rate():
    assert recipe_learner(recipe(4, 8, base_lr=.1), lr=.3).lr==.3

def test_batches_of_a_batch_sampler_accumulate():
    sampler = torch.utils.data.BatchSampler(range(32), 8, True)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(noise(32)), batch_sampler=sampler) # without a batch size
    dl.device = cpu
    learn = hush(byol_learner(DataLoaders(dl, dl), conv_body(), recipe=recipe(2, 8, n_items=32, size=16),
                              cbs=GradientAccumulation(16), **quick))
    assert (learn.recipe.effective_bs,learn.recipe.accumulate)==(16,2)
    learn.fit_byol(); assert len(learn.byol.taus)==learn.recipe.steps==4

def test_another_optimiser_at_the_recipes_rate_is_warned_of():
    with pytest.warns(UserWarning, match='pass `lr`'): recipe_learner(recipe(4, 8), opt_func=SGD)

def test_published_weights_take_their_recipe_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(BodySpec, 'build', lambda self, pretrained, build=BodySpec.build: build(self)) # no download
    def make(**kw): return recipe_learner(None, body='test_resnet', pretrained=True, **kw)
    learn = make(); assert learn.recipe.preset=='warm_start' and learn.model.freeze_bn and learn.byol.tau==.99
    learn = make(lr=.1, tau=.5); assert (learn.lr,learn.byol.tau)==(.1,.5) and learn.recipe.body_lr_mult==.2
    assert not hasattr(hush(byol_learner(image_dls(noise(32,48)), 'test_resnet', recipe=False, pretrained=True, **quick)), 'recipe')

def test_a_recipe_for_the_data_at_hand():
    learn = recipe_learner(True, 20); r = learn.recipe
    assert (r.bs,r.n_items,r.size,r.preset)==(8,24,20,'cifar') and {r.sources[k] for k in ('bs','n_items','size')}=={'your data'}
    learn.fit_byol(3); assert learn.recipe.epochs==3 and len(learn.byol.taus)==9==learn.recipe.steps
    assert learn.byol.tau==learn.recipe.tau

@pytest.mark.parametrize('arch,small', [('resnet18',True), ('resnetv2_50',False), (xresnet18,True), (None,False)])
def test_the_small_stem_is_for_resnets(arch, small):
    learn = recipe_learner('cifar', 20, body=arch); assert learn.model.spec.small_stem==learn.recipe.small_stem==small

@pytest.mark.parametrize('blur', [True,False])
def test_views_are_blurred_as_the_recipe_says(blur): assert recipe_learner(recipe(1, 8, blur=blur)).byol.blur==blur

@pytest.mark.parametrize('kw,exc,msg', [
    (lambda: dict(r=recipe(4, 16)), ValueError, r'bs=8.*recipe\(4, 8, effective_bs=16\)'),
    (lambda: dict(r='nette'), ValueError, 'imagenette'), (lambda: dict(r=3), TypeError, 'name of a preset'),
    (lambda: dict(r=recipe(4, 8), tau=2.), ValueError, 'kept'),
    (lambda: dict(r='vit', lr=slice(1e-4,1e-3)), TypeError, 'one number.*fit_byol'),
    (lambda: dict(r=recipe(4, 8, pretrained=True)), ValueError, 'pretrained')])
def test_a_recipe_that_does_not_fit_is_named(kw, exc, msg):
    with pytest.raises(exc, match=msg): recipe_learner(size=16, **kw())

def test_a_learner_with_a_recipe_is_exported(tmp_path):
    from test_callback import folder_dls
    learn = hush(byol_learner(folder_dls(tmp_path/'d'), conv_body(), recipe=recipe(1, 8), path=tmp_path, **quick))
    learn.fit_byol(); learn.export('e.pkl')
    assert repr(load_learner(tmp_path/'e.pkl').recipe)==repr(learn.recipe)

# --- fit_byol

def test_fit_byol_asks_for_what_it_needs():
    learn = byol_learn()
    with pytest.raises(ValueError, match='number of epochs'): learn.fit_byol()
    for kw in (dict(epochs=0), dict(epochs=2, start_epoch=2), dict(epochs=2, warmup=3)):
        with pytest.raises(ValueError): learn.fit_byol(**kw)
    with pytest.raises(TypeError, match='byol_learner'):
        hush(Learner(image_dls(noise(16)), conv_body(), loss_func=noop)).fit_byol(1)

def test_fit_byol_with_numbers_of_the_moment():
    learn = recipe_learner(recipe(4, 8), 16); learn.fit_byol(2, lr=.5, warmup=1, wd=.1)
    assert learn.recipe.lr==.5 and learn.recipe.sources['lr']==learn.recipe.sources['epochs']=='yours'
    assert learn.opt.hypers[0]['wd']==.1
    np.testing.assert_allclose(learn.recorder.lrs, [.5*warmup_cosine(k, 6, 3) for k in range(6)], rtol=1e-12)

@pytest.mark.parametrize('arch,epochs,warns', [('resnet18',4,True), ('resnet18',700,False), (None,4,False)])
def test_a_run_of_too_few_steps_is_warned_of(arch, epochs, warns):
    "A small network of one's own does learn in few"
    learn = recipe_learner(recipe(epochs, 8), body=arch, views=(same,mirror), cbs=AtOnce())
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); learn.fit_byol()
    found = [str(o.message) for o in said if 'random weights' in str(o.message)]
    assert len(found)==warns and all('12 steps' in o and '34.0 % against 36.2 %' in o for o in found)

# --- views that grow

class Sizes(Callback):
    "Sizes of the views that the model sees, a list for each epoch"
    def before_fit(self): self.seen = {}
    def after_pred(self):
        if self.training: self.seen.setdefault(self.epoch, set()).update(v.shape[-1] for v in self.xb)

def grown(sizes, epochs, folder=None, stop=None):
    set_seed(0); cbs = [log:=Sizes(), *([CheckpointCallback(folder)] if folder else [])]
    learn = hush(byol_learner(image_dls(noise(24,32)), conv_body(), opt_func=lars, cbs=cbs, **quick))
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==stop: raise KeyboardInterrupt
    if folder and stop is None: learn.resume(folder, missing_ok=True)
    try: learn.fit_byol(epochs, lr=.5, sizes=sizes, cbs=Stop())
    except KeyboardInterrupt: pass
    return learn,log.seen

def test_views_grow_by_the_epoch():
    learn,seen = grown((16,24,32), 5); assert seen=={0:{16}, 1:{16}, 2:{24}, 3:{24}, 4:{32}}
    assert learn.byol.size==32 and learn.model.view_size==32 and len(learn.byol.taus)==10

def test_a_resumed_run_has_the_same_sizes_and_weights(tmp_path):
    whole,seen = grown((16,24), 4, tmp_path/'a'); grown((16,24), 4, tmp_path/'b', stop=1)
    resumed,again = grown((16,24), 4, tmp_path/'b')
    assert 3 in again and again.items()<seen.items() and same_sd(sd_of(whole), sd_of(resumed))

def test_a_recipe_may_say_the_sizes():
    r = recipe(2, 8, size=32, preset='small_data', sizes=(16,32))
    learn = hush(byol_learner(image_dls(noise(24,32)), conv_body(), recipe=r, cbs=[log:=Sizes()], hidden_size=16)); learn.fit_byol()
    assert log.seen=={0:{16}, 1:{32}} and r.sources['sizes']=='yours' and '(16, 32)' in repr(r)
    learn.fit_byol(sizes=(24,32)); assert log.seen=={0:{24}, 1:{32}}
    learn.fit_byol(sizes=24); assert log.seen=={0:{24}, 1:{24}}

def test_the_size_is_as_before_after_an_error():
    learn,_ = grown((16,32), 2)
    class Fail(Callback):
        def after_batch(self): raise RuntimeError('no more')
    with pytest.raises(RuntimeError, match='no more'): learn.fit_byol(2, sizes=(16,24), cbs=Fail())
    assert learn.byol.size==32

@pytest.mark.parametrize('sizes,views,msg', [((16,4),None,'at least 8'), ((16,),(same,mirror),'leave out `views`')])
def test_sizes_that_cannot_be_are_refused(sizes, views, msg):
    learn = hush(byol_learner(image_dls(noise(24,32)), conv_body(), views=views, **quick))
    with pytest.raises(ValueError, match=msg): learn.fit_byol(2, sizes=sizes)
