"Bodies: every kind of architecture with a known width, looked at without being touched"
from conftest import *
from fastbyol.core import eval_mode
from fastbyol.body import BodySpec, LayerBody
from fastai.vision.learner import create_vision_model, create_timm_model
import timm, torchvision

def digest(m): return {k:v.clone() for k,v in m.state_dict().items()}

@pytest.mark.parametrize('arch,n', [(resnet18,512), (xresnet18,512), ('resnet18',512), ('convnext_atto',320), ('mobilenetv3_small_100',576), ('efficientnet_b0',1280)])
def test_width_and_keys_are_those_of_vision_learner(arch, n):
    spec = BodySpec(arch); body = spec.build()
    theirs = create_timm_model(arch, 5, pretrained=False)[0][0] if isinstance(arch, str) else create_vision_model(arch, 5, pretrained=False)[0]
    assert {k:v.shape for k,v in body.state_dict().items()}=={k:v.shape for k,v in theirs.state_dict().items()}
    with torch.no_grad(): y = pool_features(body.eval()(torch.rand(2,3,64,64)), spec.nhwc)
    assert y.shape==(2,spec.n_features)==(2,n)

@pytest.mark.parametrize('n_in', [1,3,4])
@pytest.mark.parametrize('arch', [resnet18,'resnet18'])
def test_any_number_of_channels(arch, n_in):
    spec = BodySpec(arch, n_in=n_in); body = spec.build().eval()
    assert pool_features(body(torch.rand(2,n_in,64,64))).shape==(2,512) and len(spec.stats[0])==len(spec.stats[1])==n_in

def test_probe_leaves_statistics_modes_and_random_numbers_alone():
    m = conv_body().train(); m[0].eval()
    before,modes = digest(m),[o.training for o in m.modules()]
    state = torch.get_rng_state()
    spec = BodySpec(m); spec.build(); spec.check_size(m, 48)
    assert same_sd(digest(m), before) and [o.training for o in m.modules()]==modes and torch.equal(torch.get_rng_state(), state)

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
    with pytest.raises(ValueError, match='layer'): pool_features(torch.randn(3))

def test_layer_is_read_by_name_or_index_and_survives_deepcopy():
    net = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.rand(2,3,64,64)
    with torch.no_grad():
        want = nn.Sequential(*list(net.children())[:-1], nn.Flatten())(x)
        for layer in ('avgpool',-2,8):
            b = LayerBody(net, layer)
            torch.testing.assert_close(pool_features(b(x)), want)
        c = deepcopy(b)
        for p in c.parameters(): p.zero_()
        torch.testing.assert_close(pool_features(b(x)), want) # the copy runs, and holds, its own layers
        assert c(x).abs().max()==0
    assert not any(m._forward_hooks for m in net.modules())

def test_what_follows_a_layer_in_place_does_not_change_its_output():
    net = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(inplace=True), nn.Flatten()); x = torch.rand(2,3,8,8)
    assert torch.equal(LayerBody(net, 0)(x), net[0](x)) and net[0](x).min()<0

class Last(nn.Module):
    "(bs, n, h, w) as (bs, h, w, n)"
    def forward(self, x): return x.permute(0,2,3,1)
class Only(nn.Module):
    "Takes images of 64 pixels only"
    def forward(self, x): assert x.shape[-1]==64; return x

@pytest.mark.parametrize('make,layer,n,nhwc', [
    (lambda: nn.Sequential(nn.Conv2d(3,16,4,4), Last(), nn.GELU()), 'gelu', 16, True), # 64 px: a map of 16 by 16 by 16
    (lambda: nn.Sequential(nn.Conv2d(3,16,4,4), Last(), nn.GELU()), 'conv', 16, False),
    (lambda: nn.Sequential(Only(), nn.Conv2d(3,8,4,4), Last(), nn.GELU()), 'gelu', 8, True),
    (lambda: nn.Sequential(Only(), nn.Conv2d(3,8,4,4), nn.GELU()), 'gelu', 8, False),
    (lambda: nn.Sequential(nn.Conv2d(3,8,4,4), nn.AdaptiveAvgPool2d(4), nn.GELU()), 'gelu', 8, False),
    (lambda: nn.Sequential(nn.Conv2d(3,8,4,4), nn.AdaptiveAvgPool2d(1), Last(), nn.GELU()), 'gelu', 8, True),
    (lambda: timm.create_model('mambaout_femto'), 'stages', 288, True),
    (lambda: torchvision.models.swin_t(), 'norm', 768, True), (lambda: torchvision.models.swin_t(), 'permute', 768, False)])
def test_a_layer_whose_features_come_last_is_averaged_over_its_positions(make, layer, n, nhwc):
    net = make()
    if isinstance(net, nn.Sequential): net = nn.Sequential(OrderedDict((type(o).__name__[:4].lower(),o) for o in net))
    spec = BodySpec(net, layer=layer); spec.build(); assert (spec.n_features,spec.nhwc,spec.fmt)==(n,nhwc,'map')

def test_the_message_says_at_which_size_the_width_was_found():
    net = nn.Sequential(nn.Conv2d(3,2,3,2,1), nn.Flatten()); spec = BodySpec(net); spec.build()
    with pytest.raises(ValueError, match='512 features at 32 px but 2048 at 64 px'): spec.check_size(net, 32)

def test_hook_is_removed_when_the_body_fails():
    b = LayerBody(conv_body(), 0)
    with pytest.raises(RuntimeError): b(torch.rand(2,5,8,8))
    assert not any(m._forward_hooks for m in b.modules())

@pytest.mark.parametrize('arch', [resnet18, resnet50, xresnet18, 'resnet18', 'resnet26d'])
def test_small_stem_keeps_32_pixels_at_a_stride_of_8(arch):
    kw = dict(small_stem=True)
    body = BodySpec(arch, **kw).build().eval()
    with torch.no_grad(): assert body(torch.rand(1,3,32,32)).shape[-2:]==(4,4)

def test_small_stem_with_a_layer():
    body = BodySpec(torchvision.models.resnet18(), layer='layer4', small_stem=True).build().eval()
    with torch.no_grad(): assert body(torch.rand(1,3,32,32)).shape==(1,512,4,4)

def test_a_vit_of_one_size_is_probed_at_that_size_and_says_which():
    spec = BodySpec('vit_tiny_patch16_224'); body = spec.build()
    assert spec.n_features==192
    with pytest.raises(ValueError, match='size=224'): spec.check_size(body, 128)

def branches(pretrained=False):
    "Children that do not run one after the other, as an auxiliary classifier"
    return nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(16,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))
def test_the_body_of_a_callable_may_be_small_beside_its_classifier():
    def lenet(pretrained): return nn.Sequential(nn.Conv2d(3,6,5,2), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(150,800), nn.ReLU(), nn.Linear(800,10))
    spec = BodySpec(lenet); spec.build(); assert spec.n_features==6

@pytest.mark.parametrize('make,exc,msg', [
    (lambda: BodySpec('resnet_18'), ValueError, 'resnet18'),
    (lambda: BodySpec(3), TypeError, 'timm name'),
    (lambda: BodySpec(resnet18, n_in=0), ValueError, 'n_in'),
    (lambda: BodySpec(resnet18, layer=2), TypeError, 'nn.Module'),
    (lambda: BodySpec(resnet18, img_size=64), TypeError, 'img_size'),
    (lambda: BodySpec(conv_body(), layer='nine').build(), ValueError, "no layer 'nine'"),
    (lambda: BodySpec(conv_body(), layer=9).build(), ValueError, 'no layer 9'),
    (lambda: BodySpec(conv_body(), pretrained=True), TypeError, 'pretrained'),
    (lambda: BodySpec(conv_body()).build(pretrained=True), ValueError, 'load the weights'),
    (lambda: BodySpec(conv_body(1)).build(), ValueError, 'takes images of 1 channels, not of 3: .*`n_in=1`'),
    (lambda: BodySpec('vit_tiny_patch16_224', small_stem=True).build(), ValueError, 'small_stem'),
    (lambda: BodySpec(lambda: 3).build(), ValueError, 'layer='),
    (lambda: BodySpec(torchvision.models.shufflenet_v2_x0_5).build(), ValueError, 'would keep 648 of .*layer='),
    (lambda: BodySpec(branches).build(), ValueError, 'could not be run.*layer='),
])
def test_wrong_bodies_are_named_with_a_remedy(make, exc, msg):
    with pytest.raises(exc, match=msg): make()
