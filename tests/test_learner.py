"`byol_learner`: what it builds from the data and its arguments"
from conftest import *

quick = dict(hidden_size=16, projection_size=8)

def test_it_equals_the_learner_by_hand():
    x,r = noise(32,20),[]
    body = conv_body()
    for mk in (lambda d: byol_learner(d, deepcopy(body), **quick), lambda d: Learner(d, BYOL(deepcopy(body), **quick), loss_func=BYOLLoss(), cbs=BYOLCallback())):
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
