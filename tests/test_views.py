"Views: what is drawn against the stated probabilities and ranges, and each image its own draw"
from conftest import *
from fastbyol.core import check_unit, fixed_rng, normalize_stats, to_unit
from fastbyol.views import ColorJiggle, make_views, view_pair
import functools, pickle

def ops(view): return {type(m).__name__:m for m in view}

@functools.lru_cache(None)
def params(i, n=4096, side=256, n_in=3):
    "What view `i` draws for `n` images: the parameters of each operation"
    set_seed(1)
    return {k:m.forward_parameters((n,n_in,side,side)) for k,m in ops(byol_views(64, n_in=n_in, fused=False)[i]).items() if k!='Clip'}

def applied(p): return (p['batch_prob']>.5).float()

@pytest.mark.parametrize('view,name,p', [
    *[(i,nm,p) for i in (0,1) for nm,p in (('RandomHorizontalFlip',.5),('ColorJiggle',.8),('RandomGrayscale',.2))],
    (0,'RandomGaussianBlur',1.), (1,'RandomGaussianBlur',.1), (1,'RandomSolarize',.2)])
def test_probabilities_are_those_of_the_paper(view, name, p):
    n,got = 4096,applied(params(view)[name])
    assert len(got)==n
    assert abs(got.mean()-p) <= 4*math.sqrt(p*(1-p)/n) # four standard errors; none where p is 1

def test_view_1_never_solarises(): assert 'RandomSolarize' not in ops(byol_views(64, fused=False)[0])

def uniform(x, lo, hi):
    "Are the numbers `x` as a sample of U(lo,hi)? Range, and Kolmogorov-Smirnov distance at about 1 in 10,000"
    x = x.flatten().sort().values; u = (x-lo)/(hi-lo)
    assert -1e-5<=u[0] and u[-1]<=1+1e-5
    return (u-torch.linspace(0,1,len(u))).abs().max() < 2.2/math.sqrt(len(u))

@pytest.mark.parametrize('key,lo,hi', [('brightness_factor',.6,1.4),('contrast_factor',.6,1.4),('saturation_factor',.8,1.2),('hue_factor',-.1,.1)])
def test_jitter_strengths_are_uniform_in_their_range(key, lo, hi):
    for i in (0,1): assert uniform(params(i)['ColorJiggle'][key], lo, hi)

def test_jitter_order_is_drawn_per_image_from_all_24():
    n = params(0)['ColorJiggle']['order'].unique(dim=0, return_counts=True)[1]
    assert len(n)==24 and n.min()>80 # of about 137

def test_blur_sigma_is_uniform_from_a_tenth_to_2_pixels():
    for i in (0,1): assert uniform(params(i)['RandomGaussianBlur']['sigma'], .1, 2.)

def test_crop_area_is_uniform_and_ratio_log_uniform():
    "Ratios that do not fit are drawn again, so the distributions hold where every ratio fits: below half of the area"
    for i in (0,1):
        src = params(i)['RandomResizedCrop']['src']
        w,h = src[:,1,0]-src[:,0,0]+1,src[:,2,1]-src[:,1,1]+1
        area,ratio = w*h/256**2,w/h
        assert .075<area.min() and area.max()<=1 and .72<ratio.min() and ratio.max()<1.38
        small = area<.5
        assert uniform(area[small], .075, .505) and uniform(ratio[small].log(), math.log(.74), math.log(1.35))

@pytest.mark.parametrize('i', [0,1])
def test_crops_are_distributed_as_torchvisions(i):
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop as TVCrop
    src,im = params(i)['RandomResizedCrop']['src'],torch.empty(3,256,256)
    ours = dict(w=src[:,1,0]-src[:,0,0]+1, h=src[:,2,1]-src[:,1,1]+1, x=src[:,0,0], y=src[:,0,1])
    y,x,h,w = torch.tensor([TVCrop.get_params(im, (.08,1.), (3/4,4/3)) for _ in range(3000)]).T
    theirs = dict(w=w, h=h, x=x, y=y)
    for k in ours: assert ks_2samp(ours[k], theirs[k]).pvalue>1e-4, k

def test_solarise_inverts_above_one_half_and_nothing_else():
    m = ops(byol_views(64, solarize_p=(0.,1.), fused=False)[1])['RandomSolarize']
    x = torch.rand(16,3,8,8); torch.testing.assert_close(m(x), torch.where(x>=.5, 1-x, x))

@pytest.mark.parametrize('size,k', [(224,23),(160,17),(128,13),(96,9),(64,7),(48,5)])
def test_blur_kernel_is_an_odd_tenth_of_the_size(size, k):
    "Measured: how far a white pixel spreads at the largest sigma, over several draws"
    assert blur_kernel(size)==k
    x = torch.zeros(8,1,61,61); x[...,30,30] = 1.
    for v in byol_views(size, n_in=1, blur_p=(1.,1.), sigma=(50.,50.), fused=False):
        lit = ops(v)['RandomGaussianBlur'](x)[:,0].amax(0)>0
        assert (lit.any(0).sum(),lit.any(1).sum())==(k,k)

@pytest.mark.parametrize('size', [16,32])
def test_no_blur_at_32_pixels_and_less(size): assert not any('RandomGaussianBlur' in ops(v) for v in byol_views(size, fused=False))

def test_blur_can_be_asked_for_at_32(): assert all('RandomGaussianBlur' in ops(v) for v in byol_views(32, blur_p=(1.,.1), fused=False))

def test_order_of_operations_is_that_of_the_release():
    names = [o for o in map(lambda m: type(m).__name__, byol_views(64, fused=False)[1]) if o!='Clip']
    assert names==['RandomResizedCrop','RandomHorizontalFlip','ColorJiggle','RandomGrayscale','RandomGaussianBlur','RandomSolarize']

@pytest.mark.parametrize('fused', [True,False])
@pytest.mark.parametrize('size', [32,64])
def test_equal_images_get_different_views(size, fused):
    x = noise(1,48).repeat(32,1,1,1)
    for v in byol_views(size, fused=fused):
        y = v(x); d = (y[:,None]-y[None]).abs().flatten(2).amax(-1)+torch.eye(32)
        assert d.min()>1e-3

@pytest.mark.parametrize('name', ['RandomResizedCrop','ColorJiggle','RandomGaussianBlur','RandomHorizontalFlip','RandomGrayscale','RandomSolarize'])
def test_every_operation_draws_per_image(name):
    m = ops(byol_views(64, fused=False)[1])[name]; assert not m.same_on_batch
    p = m.forward_parameters((512,3,64,64)); assert len(p['batch_prob'])==512
    for k in ('sigma','brightness_factor','hue_factor'):
        if k in p: assert len(p[k].flatten().unique())>100
    if 'src' in p: assert len(p['src'].flatten(1).unique(dim=0))>400

@pytest.mark.parametrize('fused', [True,False])
@pytest.mark.parametrize('n_in', [1,3,4,5])
def test_views_of_any_channels_are_in_the_unit_range(n_in, fused):
    x = (torch.rand(64,n_in,40,56)>.5).float() # black and white: bicubic resampling overshoots
    for v in byol_views(48, n_in=n_in, fused=fused):
        y = v(x); assert y.shape==(64,n_in,48,48) and y.dtype==torch.float32 and 0<=y.min() and y.max()<=1

@pytest.mark.parametrize('n_in', [1,4,5])
def test_other_channels_keep_all_operations_that_suit_them(n_in):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); v = byol_views(64, n_in=n_in, fused=False)[1]
    assert 'RandomGrayscale' not in ops(v) and {'ColorJiggle','RandomGaussianBlur','RandomSolarize','RandomHorizontalFlip'}<=set(ops(v))
    p = params(1, 512, n_in=n_in)['ColorJiggle']; assert uniform(p['brightness_factor'], .6, 1.4)

def jiggle_reference(x, p, i):
    "DeepMind's colour jitter of image `i`, in the order drawn, by the definitions"
    import colorsys
    x = x.double().numpy()
    def bright(x): return np.clip(x+p['brightness_factor'][i].item()-1, 0, 1)
    def contrast(x): m = x.mean((1,2),keepdims=True); return np.clip(m+(x-m)*p['contrast_factor'][i].item(), 0, 1)
    def hsv(x, f):
        out = np.empty_like(x)
        for a,b in np.ndindex(x.shape[1:]): out[:,a,b] = colorsys.hsv_to_rgb(*f(*colorsys.rgb_to_hsv(*x[:,a,b])))
        return out
    def sat(x): return hsv(x, lambda h,s,v: (h, min(max(s*p['saturation_factor'][i].item(),0),1), v))
    def hue(x): return hsv(x, lambda h,s,v: ((h+p['hue_factor'][i].item())%1, s, v))
    for o in p['order'][i].tolist(): x = (bright,contrast,sat,hue)[o](x)
    return torch.tensor(x)

def test_jitter_is_its_definition():
    x = torch.rand(12,3,6,6); m = ColorJiggle(.4,.4,.2,.1); y = m(x)
    for i in range(12): torch.testing.assert_close(y[i].double(), jiggle_reference(x[i], m._params, i), atol=2e-3, rtol=0)

@pytest.mark.parametrize('fused', [True,False])
def test_views_pickle_and_copy(fused):
    for f in (deepcopy, lambda v: pickle.loads(pickle.dumps(v))):
        v = byol_views(64, fused=fused)[1]; c = f(v); x = noise(4,40)
        with fixed_rng(3): a = v(x)
        with fixed_rng(3): assert torch.equal(c(x), a)

@pytest.mark.parametrize('fused', [True,False])
def test_views_stay_float32_under_autocast_and_free_of_gradients(fused):
    x = noise(4,40)
    with torch.autocast('cpu', torch.bfloat16):
        seen = []
        vs = make_views((lambda o: (seen.append((torch.is_autocast_enabled('cpu'),torch.is_grad_enabled())), o)[1], byol_views(32, fused=fused)[1]), x)
        assert torch.is_autocast_enabled('cpu')
    assert seen==[(False,False)] and all(v.dtype==torch.float32 for v in vs)

def test_fixed_rng_repeats_and_leaves_all_generators_alone():
    def draw(): return random.random(),np.random.rand(),torch.rand(1).item()
    set_seed(5); a = draw(); b = draw()
    set_seed(5); assert draw()==a
    with fixed_rng(1): c = draw()
    assert draw()==b
    with pytest.raises(KeyError), fixed_rng(1):
        assert draw()==c; raise KeyError
    set_seed(5); draw()
    with fixed_rng(2): assert draw()!=c
    assert draw()==b

@pytest.mark.parametrize('stats', [imagenet_stats, ([.5]*3,[.25]*3)])
def test_to_unit_undoes_normalize(stats):
    n,x = Normalize.from_stats(*stats, cuda=False),torch.rand(4,3,8,8)
    torch.testing.assert_close(to_unit(n(TensorImage(x)), n), x, atol=1e-6, rtol=0)
    u = (x*255).byte(); assert torch.equal(to_unit(u), u.float()/255) and type(to_unit(TensorImage(x))) is Tensor
    np.testing.assert_allclose(normalize_stats(n), stats, rtol=1e-6)

@pytest.mark.parametrize('size', [4, 0, 32.5, '32'])
def test_a_wrong_size_is_an_error(size):
    with pytest.raises(ValueError, match='at least 8'): byol_views(size)

@pytest.mark.parametrize('x,msg', [(torch.rand(3,8,8),'Resize'), (torch.rand(2,3,8,8)*255,'IntToFloatTensor'), (torch.randn(2,3,8,8),'Normalize'), (torch.full((1,3,8,8),float('inf')),'NaN or infinity')])
def test_images_out_of_range_are_an_error_with_the_transform_to_use(x, msg):
    with pytest.raises(ValueError, match=msg): check_unit(x)

@pytest.mark.parametrize('view,exc,msg', [
    (lambda x: x[:2], ValueError, 'number of images'), (lambda x: x[:,:1], ValueError, 'channels'), (lambda x: x.double(), TypeError, 'dtype'),
    (lambda x: x*9-4, ValueError, 'Normalize'), (lambda x: x/0, ValueError, 'NaN'), (lambda x: x.numpy(), TypeError, 'tensor')])
def test_views_that_break_the_contract_are_named(view, exc, msg):
    with pytest.raises(exc, match=msg): make_views((same,view), noise(4), check=True)

@pytest.mark.parametrize('views', [[same], (same,)*3, 3, 'ab', None, (same,None)])
def test_views_must_be_a_pair(views):
    with pytest.raises(TypeError, match='pair of callables'): view_pair(views)

@pytest.mark.parametrize('size', [32,64])
def test_symmetric_views_are_one_pipeline_with_the_mean_probabilities(size):
    a,b = byol_views(size, symmetric=True, fused=False); assert repr(a)==repr(b)
    p = {type(o).__name__:o.p for o in a if hasattr(o, 'p')}
    assert p['RandomSolarize']==pytest.approx(.1) and p.get('RandomGaussianBlur')==(pytest.approx(.55) if size>32 else None)
    a,b = byol_views(size, symmetric=True); assert repr(a)==repr(b)
    assert a._param_generator.p['solarize']==pytest.approx(.1) and a._param_generator.p['blur']==pytest.approx(.55 if size>32 else 0.)

def test_both_kinds_draw_with_the_same_probabilities():
    "Fused or not, the same operations are asked for, as often"
    names = dict(RandomHorizontalFlip='flip', ColorJiggle='jitter', RandomGrayscale='gray', RandomGaussianBlur='blur', RandomSolarize='solarize')
    for f,k in zip(byol_views(64), byol_views(64, fused=False)):
        assert {names[n]:o.p for n,o in ops(k).items() if n in names} == {n:o for n,o in f._param_generator.p.items() if o}
