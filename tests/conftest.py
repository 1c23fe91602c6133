"Options and fixtures that the tests share"
import matplotlib, os, pytest, warnings
matplotlib.use('Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

from fastai.vision.all import *
from fastbyol.all import *

# FASTBYOL_TEST_DEVICE=cuda python -m pytest: learners and loaders of the tests are on the GPU
dev = torch.device(os.environ.get('FASTBYOL_TEST_DEVICE', 'cpu'))
cpu,cpu_only = torch.device('cpu'),pytest.mark.cpu_only
cpu_files = dict(test_checkpoint='bit for bit, which sums on a GPU are not', test_device='stand-ins for a GPU',
                 test_distributed='processes that share the CPU', test_optim='compares with float64 on the CPU',
                 test_readme='figures of a CPU')

def pytest_configure(config):
    config.addinivalue_line('markers', 'cpu_only(reason): not with FASTBYOL_TEST_DEVICE=cuda')
    if dev.type=='cuda' and not torch.cuda.is_available():
        pytest.exit(f'FASTBYOL_TEST_DEVICE={dev}, and torch finds no CUDA device here', 4)

def pytest_addoption(parser): parser.addoption('--runslow', action='store_true', help='run the tests marked slow, too')

def pytest_collection_modifyitems(config, items):
    left_out = dict(slow=not config.getoption('--runslow'), cuda=not torch.cuda.is_available())
    reasons = dict(slow='slow: needs --runslow', cuda='needs a CUDA GPU')
    for name in filter(left_out.get, left_out):
        for o in items:
            if name in o.keywords: o.add_marker(pytest.mark.skip(reason=reasons[name]))
    for o in items if dev.type!='cpu' else []:
        mark,reason = o.get_closest_marker('cpu_only'),cpu_files.get(o.path.stem)
        if mark: reason = mark.args[0]
        if reason and 'cuda' not in o.keywords: o.add_marker(pytest.mark.skip(reason=f'on the CPU only: {reason}'))

def pytest_pycollect_makeitem(collector, name, obj):
    "Leave out what star imports bring along, such as fastcore's `test_eq`"
    if callable(obj) and getattr(obj, '__module__', None)!=collector.module.__name__: return []

@pytest.fixture(autouse=True)
def fixed_seed():
    "Every test starts from the same random numbers, on one thread, on `dev`, where float32 is float32"
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    default_device(use=dev.type!='cpu')
    set_seed(0)

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Decoded images are kept in a folder of the tests, not in the user's"
    monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path_factory.getbasetemp()/'cache'))

# --- small data and models; tests import them from here

def noise(n=16, size=16, n_in=3, seed=0):
    "Images (n, n_in, size, size) in [0,1], smooth enough to differ in more than noise"
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(n,n_in,4,4,generator=g), (size,size), mode='bilinear').clamp(0,1)

def image_dls(x, n_val=8, bs=8, y=None, norm=None, shuffle=False, drop_last=True, **kw):
    "fastai `DataLoaders` of images `x`, the last `n_val` for validation, with labels `y` or without"
    items = [(TensorImage(o),) if y is None else (TensorImage(o),TensorCategory(y[i])) for i,o in enumerate(x)]
    n = len(items)-n_val
    def dl(its, **k): return TfmdDL(its, bs=bs, num_workers=0, after_batch=norm, device=dev, **kw, **k)
    return DataLoaders(dl(items[:n], shuffle=shuffle, drop_last=drop_last), dl(items[n:]), device=dev)

def conv_body(n_in=3, width=8, bn=True):
    "A body of two convolutions, (bs, n_in, h, w) -> (bs, 2*width, h/4, w/4)"
    norm = [nn.BatchNorm2d(width)] if bn else []
    return nn.Sequential(nn.Conv2d(n_in,width,3,2,1), *norm, nn.Tanh(), nn.Conv2d(width,2*width,3,2,1), nn.Tanh())

def small_byol(bn=True, n_in=3, **kw):
    "A small `BYOL`, with batch norm in body and heads or without"
    kw = {**dict(hidden_size=16, projection_size=8, norm='batch' if bn else None), **kw}
    return BYOL(conv_body(n_in, bn=bn), n_in=n_in, **kw)

def same(x): return x
def mirror(x): return x.flip(-1)

def byol_learn(dls=None, model=None, cbs=None, loss_func=None, views=(same,mirror), tau=.9, **kw):
    "A `Learner` that pretrains a small `BYOL`, silent, with fixed views"
    cb_kw = {k:kw.pop(k) for k in ('size','tau_end','valid_seed','check_every') if k in kw}
    learn = Learner(dls or image_dls(noise(32)), model or small_byol(), loss_func=loss_func or BYOLLoss(),
                    cbs=[BYOLCallback(views=views, tau=tau, **cb_kw), *L(cbs)], **kw)
    return hush(learn)

def hush(learn):
    "No bar and no log"
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def sd_of(m):
    "A copy of everything that a model or learner's model would save"
    return {k:v.cpu().clone() for k,v in getattr(m, 'model', m).state_dict().items()}

def same_sd(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Grab(Callback):
    "Keeps what the model got, on training or validation batches"
    order = 20
    def __init__(self, valid=False): self.valid,self.xs,self.ys,self.losses = valid,[],[],[]
    def before_batch(self):
        if self.training==self.valid: return
        self.xs.append(to_cpu(tuple(self.xb)))
        self.ys.append(to_cpu(tuple(self.yb)))
    def after_loss(self):
        if self.training!=self.valid: self.losses.append(self.loss.item())

class CancelSteps(Callback):
    "Cancels the steps whose `iter` is in `iters`, as an overflow in float16 does"
    order = 10
    def __init__(self, *iters): self.iters = iters
    def before_step(self):
        if self.iter in self.iters: raise CancelStepException()

def peak_mib(f):
    "By how much `f` raises the largest resident size; skips where the system does not tell"
    def read(key): return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pytest.skip('needs /proc/self/clear_refs')
    start = read('VmRSS'); f(); return read('VmHWM')-start
