"`FusedView` against kornia's generators, torchvision's and kornia's arithmetic, image by image"
import math
import pytest
import torch
import torchvision.transforms.functional as TV
from copy import deepcopy
from kornia.augmentation import AugmentationSequential, RandomErasing
from kornia.filters import gaussian_blur2d
from fastbyol.all import *
from fastai.vision.all import *
from conftest import hush, image_dls, noise

still = dict(scale=(1.,1.), ratio=(1.,1.), flip_p=0., jitter=(0.,)*4, jitter_p=1., gray_p=0.)
def only(size=32, **kw): return FusedView(size, **{**still, **kw})
def col(x): return x[:,None,None,None]

@pytest.mark.parametrize('h,w', [(32,32), (40,56), (20,90), (9,9), (300,7)])
def test_crops_are_those_of_torchvision(h, w):
    torch.manual_seed(0)
    x,v = torch.rand(12,3,h,w),FusedView(32, flip_p=.5, jitter_p=0., gray_p=0.)
    y,p = v(x),v._params
    for a,b,src,flip in zip(x, y, p['src'], p['flip']):
        (x0,y0),(x1,y1) = src[0].int().tolist(),src[2].int().tolist()
        r = TV.resized_crop(a, y0, x0, y1-y0+1, x1-x0+1, [32,32], TV.InterpolationMode.BICUBIC, antialias=True).clamp(0,1)
        torch.testing.assert_close(b, r.flip(-1) if flip else r, atol=2e-5, rtol=0)
    assert 0<p['flip'].sum()<12

@pytest.mark.parametrize('kernel', [3,9,21])
def test_blur_is_that_of_kornia_on_the_images_drawn(kernel):
    x,v = torch.rand(40,3,32,32),only(blur_p=.5, kernel=kernel)
    y,p = v(x),v._params
    on = p['blur']>0
    assert 5<on.sum()<35
    torch.testing.assert_close(y[on], gaussian_blur2d(x[on], kernel, p['sigma'][on,None].expand(-1,2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[~on], x[~on], atol=1e-5, rtol=0)

def test_colours_one_by_one():
    x = noise(30, 32)
    for jitter,ref in {
        (.4,0.,0.,0.):lambda p: x+col(p['brightness_factor']-1),
        (0.,.4,0.,0.):lambda p: (m:=x.mean((2,3), keepdim=True)) + (x-m)*col(p['contrast_factor']),
        (0.,0.,.9,0.):lambda p: (g:=TV.rgb_to_grayscale(x, 3)) + (x-g)*col(p['saturation_factor'])}.items():
        v = only(jitter=jitter); y = v(x)
        torch.testing.assert_close(y, ref(v._params).clamp(0,1), atol=2e-4, rtol=0) # torchvision's grey has four digits
    v = only(gray_p=.5, jitter_p=0.); y = v(x); on = v._params['gray']>0
    assert 5<on.sum()<25
    torch.testing.assert_close(y[on], TV.rgb_to_grayscale(x[on], 3), atol=2e-4, rtol=0)
    torch.testing.assert_close(y[~on], x[~on], atol=1e-5, rtol=0)

def test_hue_turns_about_grey():
    "A third of the circle takes red to green, green to blue; grey and brightness stay"
    v = only(size=8, jitter=(0.,0.,0.,.5))
    x = torch.rand(50,3,8,8)*.2+.4
    y = v(x); f = v._params['hue_factor']
    torch.testing.assert_close(y.mean(1), x.mean(1), atol=1e-5, rtol=0)
    v._params['hue_factor'] = torch.full_like(f, 1/3)
    torch.testing.assert_close(v(x, params=v._params), x.roll(1, 1), atol=1e-5, rtol=0)
    v._params['hue_factor'] = torch.zeros_like(f)
    torch.testing.assert_close(v(x, params=v._params), x, atol=1e-5, rtol=0)

def test_solarise_after_all_else_inverts_what_is_bright():
    x,v = torch.rand(40,3,32,32),only(solarize_p=.5)
    y = v(x); on = v._params['solarize']>0
    assert 5<on.sum()<35
    torch.testing.assert_close(y[on], torch.where(x[on]<.5, x[on], 1-x[on]), atol=1e-4, rtol=0)
    torch.testing.assert_close(y[~on], x[~on], atol=1e-5, rtol=0)

def test_every_parameter_is_drawn_per_image_and_from_the_whole_range():
    v = FusedView(32, blur_p=.3, kernel=5, solarize_p=.2)
    v(torch.rand(1,3,16,16).expand(4000,-1,-1,-1)); p = v._params
    for k,prob in dict(flip=.5, jitter=.8, gray=.2, blur=.3, solarize=.2).items(): assert abs(p[k].mean()-prob)<.04, k
    for k,(lo,hi) in dict(brightness_factor=(.6,1.4), contrast_factor=(.6,1.4), saturation_factor=(.8,1.2), hue_factor=(-.1,.1), sigma=(.1,2.)).items():
        o = p[k]
        assert lo<=o.min()<lo+.05*(hi-lo) and hi-.05*(hi-lo)<o.max()<=hi and len(o.unique())>3900, k
    # the four steps of the jitter come in any order, equally often
    assert len({tuple(o.tolist()) for o in p['order']})==24
    # independent of each other
    stack = torch.stack([p[k] for k in ('flip','jitter','gray','blur','solarize','brightness_factor','contrast_factor','saturation_factor','hue_factor','sigma')])
    assert (stack.corrcoef()-torch.eye(len(stack))).abs().max()<.07

def test_crops_cover_what_they_should():
    v = FusedView(32, scale=(.2,.8)); v(torch.rand(1,3,128,128).expand(2000,-1,-1,-1))
    s = v._params['src']; wh = s[:,2]-s[:,0]+1; area,ratio = wh.prod(1)/128**2,wh[:,0]/wh[:,1]
    assert .19<area.min()<.23 and .75<area.max()<.82 and abs(area.mean()-.5)<.03
    assert .72<ratio.min()<.78 and 1.27<ratio.max()<1.38
    assert s.min()>=0 and s.max()<=127

def test_an_image_does_not_depend_on_its_batch():
    x,v = noise(8, 40),FusedView(32, blur_p=.5, kernel=5, solarize_p=.5)
    y = v(x); p = v._params
    for i in range(8):
        q = {k:(o[i:i+1] if isinstance(o, torch.Tensor) and len(o)==8 else o) for k,o in p.items()}
        q['forward_input_shape'] = torch.tensor([1,*x.shape[1:]])
        torch.testing.assert_close(v(x[i:i+1], params=q), y[i:i+1], atol=1e-5, rtol=0)

def test_the_input_is_left_as_it_was():
    x = torch.rand(4,3,32,32); y = x.clone()
    for kw in (dict(), dict(blur_p=1., kernel=5, solarize_p=1.), dict(stats=imagenet_stats), still): FusedView(32, **kw)(x)
    assert torch.equal(x, y)

def test_normalisation_that_is_folded_in():
    x = noise(20, 40)
    for kw in (dict(), dict(jitter_p=0., gray_p=0.), dict(solarize_p=1.), dict(jitter=(.4,.4,0.,0.), gray_p=0.)):
        torch.manual_seed(0); a = FusedView(32, stats=imagenet_stats, **kw)(x)
        torch.manual_seed(0); b = TV.normalize(FusedView(32, **kw)(x), *imagenet_stats)
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)

@pytest.mark.parametrize('n_in', [1,2,4,7])
def test_other_numbers_of_channels(n_in):
    v1,v2 = byol_views(40, n_in=n_in)
    for v in (v1,v2):
        y = v(torch.rand(5,n_in,50,50))
        assert y.shape==(5,n_in,40,40) and 0<=y.min() and y.max()<=1
    with pytest.raises(ValueError, match='3 channels'): FusedView(32)(torch.rand(2,n_in,32,32))

def test_in_containers_of_kornia_and_with_one_draw_for_all():
    v = FusedView(32, blur_p=.5, kernel=5); x = torch.rand(4,3,40,40)
    seq = AugmentationSequential(v, RandomErasing(p=1.), data_keys=['input'])
    y = seq(x)
    assert torch.equal(seq(x, params=seq._params), y)
    y = FusedView(32, blur_p=.5, kernel=5, same_on_batch=True)(x[:1].expand(4,-1,-1,-1))
    torch.testing.assert_close(y, y[:1].expand_as(y))

def test_draws_go_with_torchs_seed_and_do_not_touch_others():
    v = FusedView(32); x = torch.rand(4,3,40,40)
    torch.manual_seed(3); a = v(x); b = v(x)
    torch.manual_seed(3); assert torch.equal(v(x), a) and not torch.equal(a, b)
    torch.manual_seed(3); assert torch.equal(deepcopy(v)(x), a)

def test_pretrain_with_them():
    dls = image_dls(noise(32, 40), bs=16)
    learn = byol_learner(dls, 'resnet18', hidden_size=32, projection_size=16)
    hush(learn).fit(1)
    assert all(math.isfinite(o) for o in learn.recorder.values[-1])

@pytest.mark.parametrize('kw,msg', [(dict(size=0),'size'), (dict(size=32.),'size'), (dict(flip_p=2),'probability'), (dict(blur_p=1.),'odd'), (dict(blur_p=1., kernel=4),'odd'),
    (dict(blur_p=1., kernel=65),'odd'), (dict(sigma=(0.,1.)),'above 0'), (dict(sigma=(2.,1.)),'above 0'), (dict(jitter=(.4,.4)),'strengths')])
def test_bad_arguments(kw, msg):
    with pytest.raises(ValueError, match=msg): FusedView(**{'size':32, **kw})
