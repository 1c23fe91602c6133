"`BYOL` in lock-step with closed forms, timm's EMA and torch's own tools"
from conftest import *
from fastbyol.core import eval_mode
from fastbyol.model import batch_norms
from timm.utils import ModelEmaV3
import pickle

def np_loss(q, z):
    "Equation 2 of the paper with both terms, in float64"
    q,z = (o.double().numpy() for o in (q,z))
    q,z = (o/np.linalg.norm(o, axis=-1, keepdims=True) for o in (q,z))
    return ((q[:,0]-z[:,0])**2).sum(-1) + ((q[:,1]-z[:,1])**2).sum(-1)

@pytest.mark.parametrize('shape', [(1,2,3), (7,2,256), (64,2,16)])
@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
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

def test_loss_gradient_is_that_of_its_definition_and_finite_at_zero():
    q,z = torch.randn(4,2,8,requires_grad=True),torch.randn(4,2,8)
    byol_loss(q,z).backward(); g,q.grad = q.grad,None
    u = q/q.norm(dim=-1,keepdim=True)
    ((u-F.normalize(z,dim=-1))**2).sum().div(4).backward()
    torch.testing.assert_close(g, q.grad)
    q0 = torch.zeros(4,2,8,requires_grad=True); byol_loss(q0,z).backward()
    assert q0.grad.isfinite().all()

def test_loss_of_half_precision_is_computed_in_float32():
    q,z = torch.randn(8,2,4096)*50,torch.randn(8,2,4096)*50 # squares that float16 cannot hold
    for dt in (torch.float16,torch.bfloat16):
        l = byol_loss(q.to(dt), z.to(dt)); assert l.dtype==torch.float32
        np.testing.assert_allclose(l.item(), np_loss(q.to(dt), z.to(dt)).mean(), rtol=1e-4)

@pytest.mark.parametrize('q,z', [((4,16),(4,16)), ((4,3,8),(4,3,8)), ((4,2,8),(3,2,8)), ((4,2,8),(4,2,9))])
def test_loss_refuses_other_shapes(q, z):
    with pytest.raises(ValueError, match=r'\(bs,2,n\)'): byol_loss(torch.randn(q), torch.randn(z))

def test_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match='reduction'): BYOLLoss('average')

@pytest.mark.parametrize('tau', [0., .5, .9, .996, 1.])
def test_target_follows_timms_ema_over_many_steps(tau):
    m = small_byol(); online = nn.ModuleDict(dict(body=m.body, projector=m.projector))
    ema = ModelEmaV3(online, decay=tau, exclude_buffers=True)
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1.)
    for i in range(30):
        v1,v2 = noise(4, seed=i),noise(4, seed=99+i)
        byol_loss(m(v1,v2), m.targets(v1,v2)).backward(); opt.step(); opt.zero_grad()
        m.update_target(tau); ema.update(online)
    moved = False
    for (k,p),e,o in zip(m.target.named_parameters(), ema.module.parameters(), online.parameters()):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6, msg=k)
        moved |= not torch.allclose(p, o)
    assert moved==(tau>0)

def test_update_with_tau_1_freezes_and_0_copies_bit_for_bit():
    m = small_byol()
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in m.body.parameters()]
    old = [p.clone() for p in m.target.parameters()]
    m.update_target(1.); assert all(map(torch.equal, m.target.parameters(), old))
    m.update_target(0.); assert all(map(torch.equal, m.target.parameters(), [*m.body.parameters(),*m.projector.parameters()]))

def test_update_leaves_statistics_to_the_target():
    m = small_byol().train(); m(noise(4),noise(4)) # moves the online statistics
    before = [b.clone() for b in m.target.buffers()]
    m.update_target(0.)
    assert all(map(torch.equal, m.target.buffers(), before)) and not torch.equal(m.body[1].running_mean, m.target['body'][1].running_mean)

@pytest.mark.parametrize('tau', [-.1, 1.1, float('nan')])
def test_tau_outside_its_range_is_an_error(tau):
    for f in (small_byol().update_target, lambda t: BYOLCallback(tau=t), lambda t: BYOLCallback(tau_end=t)):
        with pytest.raises(ValueError, match='weight kept on the target'): f(tau)

def test_forward_and_targets_are_ordered_for_the_loss():
    m = small_byol().eval(); v1,v2 = noise(3),noise(3,seed=1)
    with torch.no_grad():
        [p.add_(torch.randn_like(p)*.1) for p in m.target.parameters()] # so that online and target differ
        q1,q2 = (m.predictor(m.projector(m.body(v).mean((2,3)))) for v in (v1,v2))
        z1,z2 = (m.target['projector'](m.target['body'](v).mean((2,3))) for v in (v1,v2))
        torch.testing.assert_close(m(v1,v2), torch.stack([q1,q2],1))
        torch.testing.assert_close(m.targets(v1,v2), torch.stack([z2,z1],1))

def test_batch_norm_sees_each_view_by_itself():
    m = small_byol().train(); v1,v2 = noise(6),noise(6,seed=1)*.2
    alone = torch.stack([m(v1,v1)[:,0], m(v2,v2)[:,0]], 1)
    torch.testing.assert_close(m(v1,v2), alone)

def test_no_gradient_reaches_the_target_and_no_optimiser_holds_it():
    m = small_byol(); v1,v2 = noise(4),noise(4,seed=1)
    t = m.targets(v1,v2); assert not t.requires_grad
    byol_loss(m(v1,v2), t).backward()
    assert all(p.grad is None and not p.requires_grad for p in m.target.parameters())
    assert all(p.grad is not None for n,p in m.named_parameters() if not n.startswith('target'))
    ids = {id(p) for p in trainable_params(m)}
    assert not ids & {id(p) for p in m.target.parameters()} and len(ids)==len([*m.body.parameters(),*m.projector.parameters(),*m.predictor.parameters()])

def test_simsiam_has_no_target_and_stops_the_gradient():
    m = small_byol(momentum=False); v1,v2 = noise(4),noise(4,seed=1)
    assert m.target is None and not m.momentum and not any('target' in k for k in m.state_dict())
    m.eval(); t = m.targets(v1,v2); assert not t.requires_grad
    torch.testing.assert_close(t, torch.stack([m.project(v2),m.project(v1)],1).detach())
    before = sd_of(m); m.update_target(.5); assert same_sd(sd_of(m), before)

def test_target_starts_as_a_copy_that_shares_nothing():
    m = small_byol()
    on,ta = [*m.body.parameters(),*m.projector.parameters()],[*m.target.parameters()]
    assert all(map(torch.equal, on, ta)) and not {p.data_ptr() for p in on} & {p.data_ptr() for p in ta}

def test_building_and_looking_leave_batch_norm_alone():
    m = small_byol().train()
    assert all(b.num_batches_tracked==0 and b.running_mean.abs().sum()==0 for b in m.modules() if isinstance(b, nn.modules.batchnorm._BatchNorm))

def test_sync_batch_norm_converts_online_and_target_alike():
    m = nn.SyncBatchNorm.convert_sync_batchnorm(small_byol())
    kinds = lambda k: [type(o) for o in nn.ModuleList(k).modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
    on,ta = kinds([m.body,m.projector]),kinds([m.target['body'],m.target['projector']])
    assert on==ta==[nn.SyncBatchNorm]*2
    with torch.no_grad(): [p.add_(1) for p in m.body.parameters()]
    m.update_target(0.); assert all(map(torch.equal, m.target.parameters(), [*m.body.parameters(),*m.projector.parameters()]))
    assert m.eval().embed(noise(2)).shape==(2,16)

@pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
@pytest.mark.parametrize('kw', [{}, dict(layer=3)], ids=['body','layer'])
def test_a_copy_is_whole_and_its_own(copy, kw):
    m = small_byol(**kw).eval(); c = copy(m); x = noise(2)
    assert same_sd(sd_of(c), sd_of(m)) and torch.equal(c.embed(x), m.embed(x)) and torch.equal(c.embed(x,target=True), m.embed(x,target=True))
    before = m.embed(x)
    with torch.no_grad(): [p.zero_() for p in c.parameters()]
    assert torch.equal(m.embed(x), before) and not torch.equal(c.embed(x), before)
    with torch.no_grad(): [p.fill_(1) for p in c.body.parameters()]
    c.update_target(0.); assert all((p==1).all() for p in c.target['body'].parameters())

def test_stats_normalise_and_travel_with_the_state():
    m,x = small_byol(stats=((.1,.2,.3),(.4,.5,.6))),torch.rand(2,3,4,4)
    want = (x-torch.tensor([.1,.2,.3]).view(3,1,1))/torch.tensor([.4,.5,.6]).view(3,1,1)
    torch.testing.assert_close(m.normalize(x), want)
    o = small_byol(); o.load_state_dict(m.state_dict()); assert o.stats==m.stats
    with pytest.raises(ValueError, match='one per channel'): m.set_stats(((.5,),(.5,)))

def test_one_image_is_an_error_with_batch_norm_only_while_training():
    v = noise(1)
    with pytest.raises(ValueError, match='drop_last'): small_byol().train()(v,v)
    assert small_byol().eval()(v,v).shape==small_byol(bn=False).train()(v,v).shape==(1,2,8)

def test_one_view_is_an_error_that_says_what_to_add():
    with pytest.raises(TypeError, match='BYOLCallback'): small_byol()(noise(2))

@pytest.mark.parametrize('kw,msg', [(dict(hidden_size=0),'hidden_size'), (dict(projection_size=-1),'projection_size'), (dict(norm='x'),'norm')])
def test_wrong_sizes_are_named_before_the_body_is_built(kw, msg):
    class Never(nn.Module):
        def forward(self, x): raise AssertionError('the body was run')
    with pytest.raises(ValueError, match=msg): BYOL(Never(), **kw)

# --- the target's batch norm, its start, and one pass for both views

def bn_buffers(m): return {k:v for k,v in m.state_dict().items() if 'running' in k or 'num_batches' in k}

@pytest.mark.parametrize('how', ['ema','eman'])
@pytest.mark.parametrize('tau', [0., .9, 1.])
def test_averaged_buffers_follow_timms_ema_over_many_steps(how, tau):
    m = small_byol(target_bn=how).train(); online = nn.ModuleDict(dict(body=m.body, projector=m.projector))
    ema,first_ = ModelEmaV3(online, decay=tau),deepcopy(m.target.state_dict())
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], .5)
    for i in range(8):
        v1,v2 = noise(4, seed=i),noise(4, seed=99+i)
        byol_loss(m(v1,v2), m.targets(v1,v2)).backward(); opt.step(); opt.zero_grad()
        m.update_target(tau); ema.update(online)
    got = m.target.state_dict()
    if tau==1: # frozen, counters and all; timm copies counters even then
        assert all(torch.equal(got[k], first_[k]) for k in got if how=='eman' or 'num_batches' not in k)
    else:
        for k,v in ema.module.state_dict().items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6, msg=k)
        assert got['body.1.num_batches_tracked']==16 and not torch.equal(got['body.1.running_mean'], first_['body.1.running_mean'])
    if tau==0: assert same_sd(got, online.state_dict())

@pytest.mark.parametrize('how', ['own','ema','eman'])
def test_what_the_target_normalises_with(how):
    m = small_byol(target_bn=how).train(); x,y = noise(6),noise(6,seed=1)*.3; before = bn_buffers(deepcopy(m.target))
    with torch.no_grad(): m.target['body'][1].running_mean += .1; m.target['body'][1].running_var *= 2
    kept = {k:v.clone() for k,v in bn_buffers(m.target).items()}
    z = m.targets(x,y); alone = m.targets(x[:3],y[:3])
    assert torch.allclose(z[:3], alone, atol=1e-6)==(how=='eman') # only under EMAN an image does not depend on the others
    if how=='eman': torch.testing.assert_close(z, deepcopy(m).eval().targets(x,y))
    else: torch.testing.assert_close(z, small_byol_like(m).train().targets(x,y)) # as with any statistics: those of the batch count
    moved = any(not torch.equal(v, kept[k]) for k,v in bn_buffers(m.target).items() if 'running' in k)
    assert moved==(how=='own')

def small_byol_like(m):
    "A copy whose target has fresh batch norm statistics"
    m = deepcopy(m)
    for o in batch_norms(m.target): o.running_mean.zero_(); o.running_var.fill_(1)
    return m

@pytest.mark.parametrize('how', ['own','ema','eman'])
def test_the_modes_of_batch_norm_follow_train_and_eval(how):
    m = small_byol(target_bn=how)
    for mode in (True,False,True):
        m.train(mode); assert {o.training for o in batch_norms(nn.ModuleList([m.body,m.projector,m.predictor]))}=={mode}
        assert {o.training for o in batch_norms(m.target)}=={mode and how!='eman'} and m.target.training==mode
    wrapped = nn.ModuleList([m]).train(); assert {o.training for o in batch_norms(m.target)}=={how!='eman'} # as inside DDP
    with eval_mode(m): assert not any(o.training for o in m.modules())
    assert {o.training for o in batch_norms(m.target)}=={how!='eman'}
    s = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(m)).train(); assert {o.training for o in batch_norms(s.target)}=={how!='eman'} and {o.momentum for o in batch_norms(s.target)}=={.1 if how=='own' else 0.}

@pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
@pytest.mark.parametrize('kw', [dict(target_bn='eman'), dict(target_bn='ema', target_init='random'), dict(concat=True)])
def test_target_options_travel_with_copies_and_the_state(copy, kw):
    m = small_byol(**kw).train(); v = noise(4),noise(4,seed=1); m(*v); m.targets(*v); m.update_target(.9)
    c = copy(m); o = small_byol(**kw).train(); o.load_state_dict(m.state_dict())
    outs = []
    for one in (m,c,o): outs.append((one(*v), one.targets(*v))); one.update_target(.9)
    for one,(q,z) in zip((c,o), outs[1:]): assert torch.equal(q, outs[0][0]) and torch.equal(z, outs[0][1]) and same_sd(sd_of(one), sd_of(m))

@pytest.mark.parametrize('arch', [lambda: conv_body(), lambda: 'resnet10t', lambda: resnet18], ids=['module','timm','torchvision'])
def test_a_random_target_shares_nothing_with_the_online_network(arch):
    m = BYOL(arch(), hidden_size=16, projection_size=8, target_init='random', small_stem=False)
    on,ta = [*m.body.named_parameters(),*m.projector.named_parameters()],list(m.target.parameters())
    assert len(on)==len(ta) and all(a.shape==b.shape and not b.requires_grad for (_,a),b in zip(on, ta))
    assert all(not torch.equal(a, b) for (_,a),b in zip(on, ta) if a.ndim>1)
    m.update_target(0.); assert all(torch.equal(a, b) for (_,a),b in zip(on, ta))

def test_a_body_that_cannot_be_drawn_anew_is_named():
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3,5))
        def forward(self, x): return x.mean((2,3))@self.w
    BYOL(Own(), hidden_size=8)
    with pytest.raises(ValueError, match='reset_parameters.*w'): BYOL(Own(), hidden_size=8, target_init='random')

@pytest.mark.parametrize('kw', [dict(bn=False), dict(bn=True, momentum=False), dict(bn=True)])
def test_one_pass_for_both_views_shares_their_statistics_and_nothing_else(kw):
    a = small_byol(concat=True, **kw); b = deepcopy(a); b.concat = False; v = noise(6),noise(6,seed=1)*.2
    for m in (a,b): m.eval()
    for f in ('forward','targets'): torch.testing.assert_close(getattr(a,f)(*v), getattr(b,f)(*v))
    a.train(); b.train(); ref = deepcopy(b)
    for f,o in (('forward',v),('targets',v[::-1])):
        torch.testing.assert_close(getattr(a,f)(*v), torch.stack((lambda x: deepcopy(ref).predictor(deepcopy(ref).project(x)) if f=='forward' else
            (ref.target['projector'](ref.target['body'](x).mean((2,3))) if ref.momentum else ref.project(x)))(torch.cat(o)).chunk(2), 1))
        assert torch.allclose(getattr(a,f)(*v), getattr(b,f)(*v), atol=1e-5)==(not kw['bn'])

def test_gradients_of_one_pass_are_those_of_two_without_batch_norm():
    a = small_byol(bn=False, concat=True); b = deepcopy(a); b.concat = False; v = noise(6),noise(6,seed=1)
    for m in (a,b): byol_loss(m(*v), m.targets(*v)).backward()
    for p,q in zip(a.parameters(), b.parameters()):
        if p.requires_grad: torch.testing.assert_close(p.grad, q.grad)

@pytest.mark.parametrize('kw,msg', [(dict(target_bn='EMAN'),'eman'), (dict(target_init='zeros'),'random'), (dict(momentum=False,target_bn='ema'),'has none'),
    (dict(momentum=False,target_init='random'),'has none')])
def test_wrong_target_options_are_named(kw, msg):
    with pytest.raises(ValueError, match=msg): small_byol(**kw)

def test_random_and_pretrained_contradict():
    with pytest.raises(ValueError, match='pretrained'): BYOL('resnet18', pretrained=True, target_init='random', hidden_size=8)
def test_one_pass_needs_views_of_one_size():
    with pytest.raises(ValueError, match='one size'): small_byol(concat=True)(noise(4),noise(4,12))

def test_float64_stays_float64():
    m = small_byol().double(); v = noise(4).double(),noise(4,seed=1).double()
    l = byol_loss(m(*v), m.targets(*v)); assert l.dtype==torch.float64
    np.testing.assert_allclose(l.item(), np_loss(m(*v).detach(), m.targets(*v)).mean(), rtol=1e-6)
