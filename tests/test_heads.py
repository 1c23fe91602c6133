"Projector and predictor: the layers of the paper, and each norm against an independent reference"
from conftest import *
from fastbyol.model import WSLinear
from timm.layers import StdConv2d

@pytest.mark.parametrize('norm,kind', [('batch',nn.BatchNorm1d), ('group',nn.GroupNorm), ('layer',nn.LayerNorm), (None,nn.Identity)])
def test_layers_are_linear_norm_relu_linear_without_bias(norm, kind):
    a,n,r,b = mlp_head(12, 32, 5, norm)
    assert isinstance(n, kind) and isinstance(r, nn.ReLU)
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

def test_only_the_group_head_standardises_weights():
    assert [isinstance(mlp_head(8, 16, 4, o)[0], WSLinear) for o in ('batch','group','layer',None)]==[False,True,False,False]

@pytest.mark.parametrize('hidden,groups', [(4096,16), (64,8), (24,2), (7,1)])
def test_groups_are_16_or_as_many_as_leave_each_8_channels(hidden, groups): assert mlp_head(4, hidden, 2, 'group')[1].num_groups==groups

@pytest.mark.parametrize('norm', ['group','layer',None])
def test_one_image_trains_without_batch_norm(norm): assert mlp_head(8, 64, 4, norm).train()(torch.randn(1,8)).isfinite().all()

def test_a_narrow_group_head_still_tells_images_apart():
    y = mlp_head(8, 16, 4, 'group')(torch.randn(5,8))
    assert (y[1:]-y[:1]).abs().max()>1e-3

@pytest.mark.parametrize('kw', [dict(norm='instance'), dict(n_out=0), dict(hidden_size=1.5), dict(n_in=-1)])
def test_wrong_arguments_are_named(kw):
    with pytest.raises(ValueError, match='norm|n_out|hidden_size|n_in') as e: mlp_head(**{**dict(n_in=4), **kw})
    assert list(kw)[0] in str(e.value) and repr(list(kw.values())[0]) in str(e.value)
