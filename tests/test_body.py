"Bodies: every kind of architecture with a known width, looked at without being touched"
from conftest import *
from concurrent.futures import ThreadPoolExecutor
from fastbyol.core import eval_mode
from fastbyol.body import BodySpec, LayerBody, layer_outputs
from fastai.vision.learner import create_vision_model, create_timm_model
import pickle, timm, torchvision

timm_archs = ['test_resnet', 'test_convnext', 'test_efficientnet', 'mobilenetv3_small_050']

@pytest.mark.parametrize('arch,n', [(resnet18,512), *zip(timm_archs, (96,64,256,288))])
def test_width_and_keys_are_those_of_vision_learner(arch, n):
    spec = BodySpec(arch)
    body = spec.build().eval()
    if isinstance(arch, str): theirs = create_timm_model(arch, 5, pretrained=False)[0][0]
    else: theirs = create_vision_model(arch, 5, pretrained=False)[0]
    assert {k:v.shape for k,v in body.state_dict().items()}=={k:v.shape for k,v in theirs.state_dict().items()}
    with torch.no_grad(): y = pool_features(body(torch.rand(2,3,64,64)), spec.nhwc)
    assert y.shape==(2,spec.n_features)==(2,n)

@pytest.mark.parametrize('n_in', [1,4])
@pytest.mark.parametrize('arch', [resnet18,'test_resnet'])
def test_any_number_of_channels(arch, n_in):
    spec = BodySpec(arch, n_in=n_in)
    spec.build()
    assert len(spec.stats[0])==len(spec.stats[1])==n_in

def test_probe_leaves_statistics_modes_and_random_numbers_alone():
    m = conv_body().train(); m[0].eval()
    before,modes,state = sd_of(m),[o.training for o in m.modules()],torch.get_rng_state()
    spec = BodySpec(m)
    spec.build()
    spec.check_size(m, 48)
    assert same_sd(sd_of(m), before) and [o.training for o in m.modules()]==modes
    assert torch.equal(torch.get_rng_state(), state)

def test_eval_mode_puts_modes_back_after_an_error():
    m = conv_body().train(); m[1].eval()
    with pytest.raises(KeyError), eval_mode(m):
        assert not any(o.training for o in m.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [o.training for o in m]==[True,False,True,True,True] and torch.is_grad_enabled()

def test_pool_features_averages_positions():
    y = torch.randn(3,5,4,6)
    torch.testing.assert_close(pool_features(y), torch.stack([o.flatten(1).mean(1) for o in y]))
    torch.testing.assert_close(pool_features(y.permute(0,2,3,1), nhwc=True), pool_features(y))
    torch.testing.assert_close(pool_features(y.flatten(2).transpose(1,2)), pool_features(y))

@pytest.mark.parametrize('y,got', [(torch.randn(3),r'\(3,\)'), ((1,2),'tuple')])
def test_what_cannot_be_pooled_is_named(y, got):
    with pytest.raises(ValueError, match=f'got {got}: choose another `layer`'): pool_features(y)

# --- the output of a layer

def test_layer_is_read_by_name_or_index():
    net,x = torchvision.models.resnet18(num_classes=4).eval(),torch.rand(2,3,64,64)
    with torch.no_grad():
        want = nn.Sequential(*list(net.children())[:-1], nn.Flatten())(x)
        for layer in ('avgpool',-2,8): torch.testing.assert_close(pool_features(LayerBody(net, layer)(x)), want)
    assert not any(m._forward_hooks for m in net.modules())

def test_what_follows_a_layer_in_place_does_not_change_its_output():
    net,x = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(inplace=True), nn.Flatten()),torch.rand(2,3,8,8)
    assert torch.equal(LayerBody(net, 0)(x), net[0](x)) and net[0](x).min()<0

class Blocks(nn.Module):
    "A layer in a list, one that runs twice, a choice by the data: what tracing with `torch.fx` would get wrong"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.act = nn.Conv2d(3,4,1),nn.Linear(4,4),nn.ReLU(inplace=True)
        self.layers = [self.a,self.act]
    def forward(self, x):
        for o in self.layers: x = o(x)
        x = x.mean((2,3))
        if x.sum()>0: x = self.act(self.b(x))
        return x.add_(1)

@pytest.mark.parametrize('layer', ['a','b','act'])
@pytest.mark.parametrize('copy', [same, deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['same','deepcopy','pickle'])
def test_a_layer_of_any_network_gives_its_last_output(layer, copy):
    net,x = Blocks(),torch.rand(2,3,4,4)
    want = dict(a=net.a(x), b=net.b(net.a(x).relu().mean((2,3))), act=net.b(net.a(x).relu().mean((2,3))).relu())[layer]
    torch.testing.assert_close(copy(LayerBody(net, layer))(x), want)

def test_a_copy_runs_its_own_layers():
    body,x = LayerBody(Blocks(), 'b'),torch.rand(2,3,4,4)
    want,c = body(x),deepcopy(body)
    with torch.no_grad(): [p.zero_() for p in c.parameters()]
    assert torch.equal(body(x), want) and c.module.layers[0] is c.module.a

def test_the_network_is_trained_in_place_under_its_own_keys():
    net = Blocks(); body = LayerBody(net, 'b')
    assert list(body.state_dict())==[f'module.{k}' for k in net.state_dict()]
    body(torch.rand(2,3,4,4)).sum().backward()
    assert net.a.weight.grad.abs().sum()>0

@pytest.mark.parametrize('layers', [('b','b'), ('a','b'), ('b','act')])
def test_threads_that_share_a_network_get_the_features_of_their_own_images(layers):
    "8 threads as in a server: with a hook for each call 22 to 118 of 400 had those of another image"
    net = Blocks().eval()
    bodies = [LayerBody(net, o) for o in layers]
    xs = torch.rand(200,1,3,8,8)
    with torch.no_grad():
        want = [[b(x) for b in bodies] for x in xs]
        with ThreadPoolExecutor(8) as ex: got = list(ex.map(lambda x: [b(x) for b in bodies], xs))
    assert all(torch.equal(a, b) for o,p in zip(got, want) for a,b in zip(o, p))
    assert not any(m._forward_hooks for m in net.modules())

def test_threads_that_share_a_network_in_training_look_at_it_in_evaluation_mode():
    "4 threads as in a server: one that ended put the others into training mode"
    m,xs = BYOL('test_resnet', hidden_size=8, projection_size=4),torch.rand(40,2,3,32,32)
    m.train(); before = {k:v.clone() for k,v in m.state_dict().items()}
    def embed(x):
        with eval_mode(m): return m.embed(x)
    want,dl = [embed(x) for x in xs],image_dls(noise(8), 4)
    feats = get_embeddings(m, dl.valid)[0]
    def look(x): return embed(x),get_embeddings(m, dl.valid)[0]
    with ThreadPoolExecutor(4) as ex: got = list(ex.map(look, xs))
    assert all(torch.equal(a, w) and torch.equal(b, feats) for (a,b),w in zip(got, want))
    assert same_sd(before, m.state_dict()) and m.training and m.body.training

def test_contexts_that_end_in_another_order_than_they_began_leave_the_mode_as_it_was():
    m = nn.Sequential(nn.Linear(2,2), nn.Linear(2,2).eval())
    a,b = eval_mode(m),eval_mode(m[0])
    with torch.enable_grad(): # as it is afterwards
        a.__enter__(); b.__enter__(); a.__exit__(None, None, None)
        assert not m[0].training
        b.__exit__(None, None, None)
    assert [o.training for o in (m,*m)]==[True,True,False]

def test_a_body_around_a_body_sees_both_layers():
    inner = LayerBody(Blocks(), 'b'); x = torch.rand(2,3,4,4)
    assert torch.equal(LayerBody(inner, 'module.a')(x), inner.module.a(x))
    assert torch.equal(LayerBody(inner, 'module.b')(x), inner(x))

def test_a_pickle_made_during_a_call_holds_no_trace_of_it():
    class Spy(nn.Module):
        def forward(self, x): copies.append(pickle.dumps(net[0])); return x
    copies,net = [],nn.Sequential(nn.Conv2d(3,4,1), Spy())
    LayerBody(net, 0)(torch.rand(1,3,4,4))
    assert pickle.loads(copies[0])(torch.rand(1,3,4,4)).shape==(1,4,4,4)

def test_hook_is_removed_when_the_body_fails():
    b = LayerBody(conv_body(), 0)
    with pytest.raises(RuntimeError): b(torch.rand(2,5,8,8))
    assert not any(m._forward_hooks for m in b.modules())

def test_a_layer_that_never_runs_is_named():
    net = nn.ModuleDict(dict(a=nn.Conv2d(3,4,3), b=nn.Conv2d(3,4,3))); net.forward = net['a'].forward
    with pytest.raises(ValueError, match="'b' never ran"): LayerBody(net, 'b')(torch.rand(2,3,8,8))

def test_outputs_are_those_of_this_context_only():
    net,x = conv_body(),torch.rand(2,3,8,8)
    with layer_outputs(net) as outer:
        with layer_outputs([net[0]]) as inner: net(x)
    net(2*x)
    assert list(inner)==[net[0]] and list(outer)==list(net) and torch.equal(outer[net[0]], net[0](x))

# --- what is found out by running

class Last(nn.Module):
    "(bs, n, h, w) as (bs, h, w, n)"
    def forward(self, x): return x.permute(0,2,3,1)
class Only(nn.Module):
    "Takes images of 64 pixels only"
    def forward(self, x): assert x.shape[-1]==64; return x

def patches(*layers, n=8): return nn.Sequential(nn.Conv2d(3,n,4,4), *layers, nn.GELU())

@pytest.mark.parametrize('make,layer,n,nhwc', [
    (lambda: patches(Last()), -1, 8, True), (lambda: patches(Last()), 0, 8, False),
    (lambda: nn.Sequential(Only(), *patches(Last())), -1, 8, True),
    (lambda: nn.Sequential(Only(), *patches()), -1, 8, False),
    (lambda: patches(nn.AdaptiveAvgPool2d(4)), -1, 8, False),
    (lambda: patches(nn.AdaptiveAvgPool2d(1), Last()), -1, 8, True),
    (lambda: timm.create_model('test_mambaout'), 'stages', 64, True)])
def test_a_layer_whose_features_come_last_is_averaged_over_its_positions(make, layer, n, nhwc):
    spec = BodySpec(make(), layer=layer)
    spec.build()
    assert (spec.n_features,spec.nhwc,spec.fmt)==(n,nhwc,'map')

def test_a_size_that_changes_the_width_is_refused():
    net = nn.Sequential(nn.Conv2d(3,2,3,2,1), nn.Flatten())
    spec = BodySpec(net); spec.build()
    with pytest.raises(ValueError, match='at 64 px but not at 32 px: .*with `size=32`'): spec.check_size(net, 32)

def test_a_vit_of_one_size_is_probed_at_that_size_and_says_which():
    spec = BodySpec('vit_tiny_patch16_224', depth=1); body = spec.build()
    assert spec.n_features==192
    with pytest.raises(ValueError, match='size=224.*img_size=128'): spec.check_size(body, 128)

@pytest.mark.parametrize('arch,side', [(resnet18,4), (xresnet18,4), ('test_resnet',4), ('resnet10t',4)])
def test_small_stem_keeps_32_pixels_at_a_stride_of_8(arch, side):
    body = BodySpec(arch, small_stem=True).build().eval()
    with torch.no_grad(): assert body(torch.rand(1,3,32,32)).shape[-2:]==(side,side)

def test_small_stem_with_a_layer():
    body = BodySpec(timm.create_model('test_resnet'), layer='layer4', small_stem=True).build().eval()
    with torch.no_grad(): assert body(torch.rand(1,3,32,32)).shape==(1,96,4,4)

def test_the_body_of_a_callable_may_be_small_beside_its_classifier():
    def lenet(pretrained):
        return nn.Sequential(nn.Conv2d(3,6,5,2), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(150,800))
    spec = BodySpec(lenet); spec.build()
    assert spec.n_features==6

# --- where weights come from

@pytest.fixture
def weights(tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path/'w.pth')
    return dict(file=str(tmp_path/'w.pth'), mean=(.1,.2,.3), std=(.4,.5,.6))

def test_published_weights_may_come_from_a_file(weights):
    spec = BodySpec('test_resnet', pretrained_cfg_overlay=weights); body = spec.build(pretrained=True)
    assert torch.equal(body.model.conv1[0].weight, torch.load(weights['file'])['conv1.0.weight'])
    assert spec.stats==((.1,.2,.3),(.4,.5,.6))

def test_random_weights_are_random_although_a_file_is_named(weights):
    body = BodySpec('test_resnet', pretrained_cfg_overlay=weights).build()
    assert not torch.equal(body.model.conv1[0].weight, torch.load(weights['file'])['conv1.0.weight'])

# --- errors

def branches(pretrained=False):
    "Children that do not run one after the other, as an auxiliary classifier"
    return nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(16,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))

@pytest.mark.parametrize('make,exc,msg', [
    (lambda: BodySpec('resnet_18'), ValueError, 'nearest are .*resnet18'),
    (lambda: BodySpec(3).build(), ValueError, 'timm name'),
    (lambda: BodySpec(resnet18, n_in=0), ValueError, 'n_in'),
    (lambda: BodySpec(resnet18, layer=2), TypeError, 'nn.Module'),
    (lambda: BodySpec(resnet18, img_size=64), TypeError, 'img_size'),
    (lambda: BodySpec('test_resnet', num_classes=3).build(), TypeError, 'num_classes'),
    (lambda: BodySpec(conv_body(), layer='nine').build(), ValueError, "no layer 'nine'"),
    (lambda: BodySpec(conv_body(), layer=9).build(), ValueError, 'no layer 9'),
    (lambda: BodySpec(conv_body(), pretrained=True), TypeError, 'pretrained'),
    (lambda: BodySpec(conv_body()).build(pretrained=True), ValueError, 'load the weights'),
    (lambda: BodySpec(conv_body(1)).build(), ValueError, 'Could not run .* on 3 channels: .*`n_in=`'),
    (lambda: BodySpec('test_vit', small_stem=True).build(), ValueError, 'small_stem'),
    (lambda: BodySpec(lambda: 3).build(), ValueError, 'layer='),
    (lambda: BodySpec(torchvision.models.shufflenet_v2_x0_5).build(), ValueError, 'shufflenet.*layer='),
    (lambda: BodySpec(branches).build(), ValueError, 'Could not run branches on 3 channels: .*layer='),
])
def test_wrong_bodies_are_named_with_a_remedy(make, exc, msg):
    with pytest.raises(exc, match=msg): make()

def test_what_torch_and_fastai_found_is_the_cause():
    with pytest.raises(ValueError) as e: BodySpec(conv_body(1)).build()
    assert 'to have 1 channels, but got 3' in str(e.value.__cause__)
    with pytest.raises(ValueError) as e: BodySpec(torchvision.models.shufflenet_v2_x0_5).build()
    assert 'would keep 648 of' in str(e.value.__cause__)
