"`BYOL` in lock-step with closed forms, timm's EMA and torch's own tools"
from conftest import *
from fastbyol.core import eval_mode
from fastbyol.body import BodySpec
from fastbyol.model import Encoder, WSLinear, batch_norms
from timm.layers import StdConv2d
from timm.utils import ModelEmaV3
import pickle, timm

def pair(n=4): return noise(n),noise(n, seed=1)
def online(m): return nn.ModuleDict(dict(body=m.body, projector=m.projector))
def shake(m, by=.1):
    "Move the weights of `m`"
    with torch.no_grad(): [p.add_(torch.randn_like(p)*by) for p in m.parameters()]
copies = pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])

# --- heads

kinds = dict(batch=nn.BatchNorm1d, group=nn.GroupNorm, layer=nn.LayerNorm)
@pytest.mark.parametrize('norm,kind', [*kinds.items(), (None,nn.Identity)])
def test_layers_are_linear_norm_relu_linear_without_bias(norm, kind):
    a,n,r,b = mlp_head(12, 32, 5, norm)
    assert isinstance(n, kind) and isinstance(r, nn.ReLU) and isinstance(a, WSLinear)==(norm=='group')
    assert (a.in_features,a.out_features,b.in_features,b.out_features)==(12,32,32,5)
    assert a.bias is not None and b.bias is None

def test_batch_norm_head_is_its_formula():
    h = mlp_head(6, 8, 3).double().train()
    x = torch.randn(10, 6, dtype=torch.float64)
    a = x@h[0].weight.T + h[0].bias
    a = (a-a.mean(0))/(a.var(0, unbiased=False)+1e-5).sqrt()
    torch.testing.assert_close(h(x), a.clamp(min=0)@h[3].weight.T)

def test_weight_standardisation_is_that_of_timm():
    lin = WSLinear(24, 7)
    conv = StdConv2d(24, 7, 1, bias=True, eps=1e-6)
    conv.load_state_dict(dict(weight=lin.weight.detach()[...,None,None], bias=lin.bias.detach()))
    x = torch.randn(5, 24)
    torch.testing.assert_close(lin(x), conv(x[...,None,None])[...,0,0], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('hidden,groups', [(4096,16), (64,8), (24,2), (7,1)])
def test_groups_are_16_or_as_many_as_leave_each_8_channels(hidden, groups):
    assert mlp_head(4, hidden, 2, 'group')[1].num_groups==groups

@pytest.mark.parametrize('norm', ['group','layer',None])
def test_one_image_trains_without_batch_norm(norm):
    assert mlp_head(8, 64, 4, norm).train()(torch.randn(1,8)).isfinite().all()

def test_a_narrow_group_head_still_tells_images_apart():
    y = mlp_head(8, 16, 4, 'group')(torch.randn(5,8))
    assert (y[1:]-y[:1]).abs().max()>1e-3

@pytest.mark.parametrize('kw', [dict(norm='instance'), dict(n_out=0), dict(hidden_size=1.5), dict(n_in=-1)])
def test_wrong_arguments_are_named(kw):
    (name,value), = kw.items()
    with pytest.raises(ValueError, match=f'{name}.*{value}'): mlp_head(**{**dict(n_in=4), **kw})

# --- the loss

def np_loss(q, z):
    "Equation 2 of the paper with both terms, in float64"
    q,z = (o.double().numpy() for o in (q,z))
    q,z = (o/np.linalg.norm(o, axis=-1, keepdims=True) for o in (q,z))
    return ((q[:,0]-z[:,0])**2).sum(-1) + ((q[:,1]-z[:,1])**2).sum(-1)

@pytest.mark.parametrize('shape', [(1,2,3), (64,2,16)])
@pytest.mark.parametrize('scale', [1e-3, 1e3])
def test_loss_is_its_closed_form(shape, scale):
    q,z = torch.randn(shape)*scale,torch.randn(shape)
    want = np_loss(q, z)
    np.testing.assert_allclose(byol_loss(q,z).item(), want.mean(), rtol=1e-5)
    np.testing.assert_allclose(BYOLLoss('none')(q,z).numpy(), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(BYOLLoss('sum')(q,z).item(), want.sum(), rtol=1e-5)

def test_loss_sums_the_two_terms_and_pairs_view_with_other_view():
    q = torch.zeros(1,2,2); z = q.clone()
    q[:,0,0],z[:,0,0],q[:,1,0],z[:,1,1] = 1.,1.,1.,1. # q1 agrees with z2; q2 is orthogonal to z1
    assert byol_loss(q,z).item()==2.

def test_loss_gradient_is_finite_at_zero():
    q = torch.zeros(4,2,8, requires_grad=True)
    byol_loss(q, torch.randn(4,2,8)).backward()
    assert q.grad.isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_is_computed_in_float32(dtype):
    q,z = ((torch.randn(8,2,4096)*50).to(dtype) for _ in range(2)) # squares that float16 cannot hold
    loss = byol_loss(q, z)
    assert loss.dtype==torch.float32
    np.testing.assert_allclose(loss.item(), np_loss(q, z).mean(), rtol=1e-4)

@pytest.mark.parametrize('q,z', [((4,16),(4,16)), ((4,2,16),(4,2,8)), ((4,3,16),(4,3,16))])
def test_wrong_shapes_are_named(q, z):
    with pytest.raises(ValueError, match=r'\(bs,2,n\)'): byol_loss(torch.randn(q), torch.randn(z))

def test_float64_stays_float64():
    m = small_byol().double(); v = [o.double() for o in pair()]
    loss = byol_loss(m(*v), m.targets(*v))
    assert loss.dtype==torch.float64
    np.testing.assert_allclose(loss.item(), np_loss(m(*v).detach(), m.targets(*v)).mean(), rtol=1e-6)

# --- the target

@pytest.mark.parametrize('tau', [0., .9, 1.])
def test_target_follows_timms_ema_over_many_steps(tau):
    m = small_byol().train()
    ema,start = ModelEmaV3(online(m), decay=tau, exclude_buffers=True),deepcopy(m.target.state_dict())
    opt = torch.optim.SGD(trainable_params(m), .5)
    for i in range(8):
        v = noise(4, seed=i),noise(4, seed=99+i)
        byol_loss(m(*v), m.targets(*v)).backward(); opt.step(); opt.zero_grad()
        m.update_target(tau); ema.update(online(m))
    got,want = m.target.state_dict(),ema.module.state_dict()
    for k,p in m.target.named_parameters(): torch.testing.assert_close(p, want[k], rtol=1e-5, atol=1e-6)
    assert not torch.equal(got['body.1.running_mean'], start['body.1.running_mean']) # it moves by itself

def test_update_with_tau_1_freezes_and_0_copies_bit_for_bit():
    m = small_byol(); shake(m.body)
    old = [p.clone() for p in m.target.parameters()]
    m.update_target(1.); assert all(map(torch.equal, m.target.parameters(), old))
    m.update_target(0.); assert all(map(torch.equal, m.target.parameters(), online(m).parameters()))

def test_update_leaves_statistics_to_the_target():
    m = small_byol().train(); m(*pair()) # moves the online statistics
    before = [b.clone() for b in m.target.buffers()]
    m.update_target(0.)
    assert all(map(torch.equal, m.target.buffers(), before))
    assert not torch.equal(m.body[1].running_mean, m.target['body'][1].running_mean)

@pytest.mark.parametrize('tau', [-.1, 1.1, float('nan')])
def test_tau_outside_its_range_is_an_error(tau):
    for f in (small_byol().update_target, lambda t: BYOLCallback(tau=t), lambda t: BYOLCallback(tau_end=t)):
        with pytest.raises(ValueError, match='weight kept on the target'): f(tau)

def test_forward_and_targets_are_ordered_for_the_loss():
    m = small_byol().eval(); v1,v2 = pair(3)
    shake(m.target) # so that online and target differ
    with torch.no_grad():
        q1,q2 = (m.predictor(m.projector(m.body(v).mean((2,3)))) for v in (v1,v2))
        z1,z2 = (m.target['projector'](m.target['body'](v).mean((2,3))) for v in (v1,v2))
        torch.testing.assert_close(m(v1,v2), torch.stack([q1,q2],1))
        torch.testing.assert_close(m.targets(v1,v2), torch.stack([z2,z1],1))

def test_batch_norm_sees_each_view_by_itself():
    m = small_byol().train(); v1,v2 = noise(6),noise(6,seed=1)*.2
    alone = torch.stack([m(v1,v1)[:,0], m(v2,v2)[:,0]], 1)
    torch.testing.assert_close(m(v1,v2), alone)

def test_no_gradient_reaches_the_target_and_no_optimiser_holds_it():
    m = small_byol(); v = pair()
    byol_loss(m(*v), m.targets(*v)).backward()
    assert all(p.grad is None and not p.requires_grad for p in m.target.parameters())
    assert all(p.grad is not None for n,p in m.named_parameters() if not n.startswith('target'))
    assert not {id(p) for p in trainable_params(m)} & {id(p) for p in m.target.parameters()}

def test_weights_keep_the_order_that_optimisers_in_checkpoints_know():
    names = [n.split('.')[0] for n,_ in small_byol().named_parameters()]
    assert list(dict.fromkeys(names))==['predictor','body','projector','target']

def test_simsiam_has_no_target_and_stops_the_gradient():
    m = small_byol(momentum=False).eval(); v1,v2 = pair()
    assert m.target is None and not m.momentum and not any('target' in k for k in m.state_dict())
    t = m.targets(v1,v2); assert not t.requires_grad
    torch.testing.assert_close(t, torch.stack([m.project(v2),m.project(v1)],1).detach())
    before = sd_of(m); m.update_target(.5); assert same_sd(sd_of(m), before)

def test_target_starts_as_a_copy_that_shares_nothing():
    m = small_byol()
    on,ta = list(online(m).parameters()),list(m.target.parameters())
    assert all(map(torch.equal, on, ta)) and not {p.data_ptr() for p in on} & {p.data_ptr() for p in ta}

def test_building_and_looking_leave_batch_norm_alone():
    assert all(b.num_batches_tracked==0 and b.running_mean.abs().sum()==0 for b in batch_norms(small_byol()))

def test_sync_batch_norm_converts_online_and_target_alike():
    m = nn.SyncBatchNorm.convert_sync_batchnorm(small_byol())
    for net in (online(m), m.target): assert [type(o) for o in batch_norms(net)]==[nn.SyncBatchNorm]*2
    shake(m.body); m.update_target(0.)
    assert all(map(torch.equal, m.target.parameters(), online(m).parameters()))

@copies
@pytest.mark.parametrize('kw', [{}, dict(layer=3)], ids=['body','layer'])
def test_a_copy_is_whole_and_its_own(copy, kw):
    m = small_byol(**kw).eval(); c = copy(m); x = noise(2)
    assert same_sd(sd_of(c), sd_of(m))
    for target in (False,True): assert torch.equal(c.embed(x, target), m.embed(x, target))
    before = m.embed(x); shake(c)
    assert torch.equal(m.embed(x), before)
    c.update_target(0.); assert all(map(torch.equal, c.target.parameters(), online(c).parameters()))

def test_stats_normalise_and_travel_with_the_state():
    m,x = small_byol(stats=((.1,.2,.3),(.4,.5,.6))),torch.rand(2,3,4,4)
    want = (x-torch.tensor([.1,.2,.3]).view(3,1,1))/torch.tensor([.4,.5,.6]).view(3,1,1)
    torch.testing.assert_close(m.normalize(x), want)
    o = small_byol(); o.load_state_dict(m.state_dict()); assert o.stats==m.stats

def test_one_view_is_an_error_that_says_what_to_add():
    with pytest.raises(TypeError, match='BYOLCallback'): small_byol()(noise(2))

class Never(nn.Module):
    def forward(self, x): raise AssertionError('the body was run')

@pytest.mark.parametrize('kw', [dict(hidden_size=0), dict(projection_size=-1), dict(norm='x')])
def test_wrong_sizes_are_named_before_the_body_is_built(kw):
    with pytest.raises(ValueError, match=list(kw)[0]): BYOL(Never(), **kw)

# --- batch norms, and the target's start

def test_statistics_move_with_each_pass_and_not_with_the_update():
    m = small_byol().train()
    stats = lambda: {k:v.clone() for k,v in m.target.state_dict().items() if 'running' in k}
    before = stats(); m.targets(*pair()); after = stats(); m.update_target(.5)
    assert not any(torch.equal(v, before[k]) for k,v in after.items()) and same_sd(stats(), after)

@pytest.mark.parametrize('momentum', [True,False])
def test_published_weights_keep_the_statistics_of_their_batch_norms(momentum):
    m = small_byol(freeze_bn=True, momentum=momentum).train()
    bodies = [m.body, *([m.target['body']] if momentum else [])]
    assert not any(o.training for body in bodies for o in batch_norms(body))
    assert all(o.training for o in batch_norms(m.projector)) and m.body.training
    before = deepcopy(m.body.state_dict()); m(noise(4), noise(4)); m.targets(noise(4), noise(4))
    assert all(torch.equal(v, before[k]) for k,v in m.body.state_dict().items())
    assert all(p.requires_grad for p in m.body.parameters()) # weight and bias of the norms learn
    with eval_mode(m): pass
    assert not any(o.training for body in bodies for o in batch_norms(body))

@pytest.mark.parametrize('kw,frozen', [(dict(pretrained=True),True), (dict(pretrained=True,freeze_bn=False),False), ({},False)])
def test_pretrained_says_whether_statistics_are_kept(kw, frozen, monkeypatch):
    monkeypatch.setattr(BodySpec, 'build', lambda self, pretrained, build=BodySpec.build: build(self))
    m = BYOL('test_resnet', hidden_size=8, projection_size=4, **kw).train(); assert {o.training for o in batch_norms(m.body)}=={not frozen}

@copies
def test_the_target_travels_with_copies_and_the_state(copy):
    m = small_byol().train(); v = pair(); m(*v); m.targets(*v); m.update_target(.9)
    c,o = copy(m),small_byol().train(); o.load_state_dict(m.state_dict())
    outs = []
    for one in (m,c,o): outs.append((one(*v), one.targets(*v))); one.update_target(.9)
    for one,(q,z) in zip((c,o), outs[1:]):
        assert torch.equal(q, outs[0][0]) and torch.equal(z, outs[0][1]) and same_sd(sd_of(one), sd_of(m))

def test_weights_are_drawn_again_and_what_cannot_be_is_named():
    m = small_byol(); reset_weights(m.target)
    on,ta = list(online(m).parameters()),list(m.target.parameters())
    assert all(not torch.equal(a, b) and not b.requires_grad for a,b in zip(on, ta) if a.ndim>1)
    m.own = nn.Parameter(torch.ones(3,5))
    with pytest.raises(ValueError, match='draw own again.*reset_parameters'): reset_weights(m)

# --- a teacher in the target's place

def stats_of(a, b): return (a,)*3,(b,)*3
def teacher_enc(net=None, view_size=None):
    "A frozen network with its own statistics"
    spec = BodySpec(net or conv_body(width=6)); return Encoder(spec.build(), spec, stats_of(.2,.5), view_size).eval()
def pupil(teacher=None, **kw): return small_byol(teacher=teacher or teacher_enc(), stats=stats_of(.4,.3), **kw)

def test_targets_are_the_teachers_features_of_the_other_view_by_its_own_statistics():
    enc = teacher_enc(); m = pupil(enc).train(); x1,x2 = pair()
    got = m.targets(m.normalize(x1), m.normalize(x2))
    with torch.no_grad(): want = torch.stack([enc((o-.2)/.5) for o in (x2,x1)], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not got.requires_grad

def test_the_predictor_maps_to_the_teachers_width():
    m = pupil()
    assert m(*pair()).shape==m.targets(*pair()).shape==(4,2,12) and m.projection_size==12
    assert m.target is None and not m.momentum

def test_the_teacher_sees_views_at_its_own_size():
    m = pupil(teacher_enc(view_size=8)); sizes = []
    m.teacher.body.register_forward_pre_hook(lambda o,x: sizes.append(x[0].shape[-1]))
    m.targets(*pair()); assert set(sizes)=={8}

class Only28(nn.Sequential):
    def forward(self, x): assert x.shape[-1]==28; return super().forward(x)

@pytest.mark.parametrize('net,size', [(lambda: Only28(nn.Flatten(), nn.Linear(3*28*28,5)),28), (conv_body,None)])
def test_a_module_that_takes_one_size_only_gets_it(net, size):
    m = pupil(net())
    assert m.teacher.view_size==size and m.targets(*pair()).isfinite().all()

def test_a_learner_is_a_teacher():
    t = small_byol(); m = pupil(byol_learn(model=t))
    assert torch.equal(m.teacher.body[0].weight, t.body[0].weight)

def test_a_plain_module_is_a_teacher_and_stays_as_it_is():
    net = conv_body(width=6); m = pupil(net)
    assert m.teacher.stats==BYOL(conv_body(), hidden_size=8).stats
    assert all(p.requires_grad for p in net.parameters()) and net.training
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in m.teacher.parameters()}

def test_another_byol_is_a_teacher_by_its_body_and_statistics():
    t = small_byol(stats=stats_of(.1,.7)); t.view_size = 12
    m = pupil(t); assert m.teacher.stats==t.stats and m.teacher.view_size==12 and m.projection_size==t.n_features

def test_the_teacher_is_not_trained_saved_or_moved():
    m = pupil(); before = sd_of(m.teacher)
    learn = byol_learn(model=m); learn.fit(1, .1); m.train(); m.update_target(.5)
    assert same_sd(sd_of(m.teacher), before) and not any(o.training for o in m.teacher.modules())
    assert not any('teacher' in k for k in m.state_dict()) and not any(p.requires_grad for p in m.teacher.parameters())
    held = {id(p) for p in learn.opt.all_params().itemgot(0)}
    assert not held & {id(p) for p in m.teacher.parameters()} and {id(p) for p in trainable_params(m)}==held

@cpu_only('gives the model tensors of the CPU')
def test_a_pupil_resumes_with_the_same_teacher(tmp_path):
    enc = teacher_enc(); a,b = (byol_learn(model=pupil(enc), path=tmp_path) for _ in range(2))
    a.fit(1, .01); a.save('a'); b.load('a'); v = pair()
    for m in (a.model,b.model): m.eval()
    assert torch.equal(a.model(*v), b.model(*v)) and torch.equal(a.model.targets(*v), b.model.targets(*v))

@copies
def test_the_teacher_travels_with_copies_and_to_other_types(copy):
    m = pupil().eval(); c = copy(m); v = pair()
    assert torch.equal(c.targets(*v), m.targets(*v)) and c.teacher is not m.teacher
    assert {p.dtype for p in c.double().teacher.parameters()}=={torch.float64} and m.targets(*v).dtype==torch.float32

def test_the_teacher_keeps_its_weights_frozen_under_autocast():
    m = pupil()
    with torch.autocast('cpu', torch.bfloat16): byol_loss(m(*pair()), m.targets(*pair())).backward()
    assert not any(p.requires_grad for p in m.teacher.parameters()) and m.body[0].weight.grad is not None

def test_a_pupil_learns_what_its_teacher_sees():
    m = pupil(norm=None, bn=False); learn = byol_learn(model=m, views=(same,same))
    first_ = learn.validate()[0]; learn.fit(6, 1e-2)
    assert learn.validate()[0]<.3*first_

def test_a_body_file_is_a_teacher(tmp_path):
    t = BYOL('test_resnet', hidden_size=8, stats=stats_of(.1,.7)).eval(); t.view_size = 32
    m = pupil(save_body(t, tmp_path/'t'))
    assert (m.teacher.view_size,m.projection_size)==(32,96) and m.teacher.stats==t.stats

def test_a_timm_name_is_a_teacher(tmp_path, monkeypatch):
    create,file = timm.create_model,tmp_path/'w.pth'
    torch.save(create('test_resnet').state_dict(), file)
    monkeypatch.setattr(timm, 'create_model', partial(create, pretrained_cfg_overlay=dict(file=str(file)))) # no download
    m = pupil('test_resnet')
    assert m.teacher.view_size==160 and m.teacher.stats==stats_of(.5,.5)
    assert torch.equal(m.teacher.body.model.conv1[0].weight, torch.load(file)['conv1.0.weight'])

def test_a_teacher_of_other_channels_is_named():
    with pytest.raises(ValueError, match='teacher takes images of 3 channels, the body 1'):
        BYOL(conv_body(1), n_in=1, teacher=teacher_enc(), hidden_size=8)

def test_byol_learner_takes_a_teacher():
    learn = byol_learner(image_dls(noise(16,32)), conv_body(), teacher=teacher_enc(), hidden_size=8)
    assert learn.model.teacher is not None and learn.model.projection_size==12
