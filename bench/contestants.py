"""The libraries that are compared, each as its own documentation writes it

A contestant makes a model of the same body, torchvision's ResNet-18, with a projector and predictor of 1024 and 256, and has

- `times(v1, v2, n)`: seconds of each of `n` optimiser steps on two views that are given;
- `train(files, size, bs, epochs, tick, workers)`: its documented pipeline from image files, with its own views and settings. `tick(n)` is
  called after each step with the number of images, and raises `Stop` when it is enough. Returns the body and the statistics that its
  images are normalised with.

Each imports its library when it is made, so that the memory of one does not hold another's. `@contestant(name)` adds another. One whose library is missing is left out, and said so. solo-learn is not here: the release that pip finds, 1.0.2, insists on
torch 1.9.1 and cannot be installed beside the others.
"""
import copy, time
from functools import partial

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.models import resnet18

hidden, projected, lr = 1024, 256, .06
imagenet_stats = [.485, .456, .406], [.229, .224, .225]

class Stop(Exception): "Enough"

registry = {}
def contestant(name, **kw):
    "Add a class to the registry, made with `kw`"
    def add(cls):
        registry[name] = partial(cls, **kw)
        return cls
    return add

def available(names):
    "Those of `names` whose library is there; says which are not"
    res = []
    for nm in names:
        if nm not in registry: raise SystemExit(f"There is no contestant {nm!r}: there are {', '.join(registry)}")
        try: registry[nm](); res.append(nm)
        except ImportError as e: print(f"{nm} is left out: {e} (`pip install -e .[bench]`)")
    return res

def body():
    "torchvision's ResNet-18 without its classifier, to (bs, 512)"
    return nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())

def mlp(n_in): return nn.Sequential(nn.Linear(n_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, projected, bias=False))

class Loop:
    "Those that bring parts, for a loop of one's own: `step(v1, v2)` is that loop's inside"
    def times(self, v1, v2, n):
        res = []
        for _ in range(n):
            start = time.perf_counter(); self.step(v1, v2); res.append(time.perf_counter()-start)
        return res

@contestant('plain torch', each=False)
@contestant('plain torch, view by view', each=True)
@contestant('plain torch, view by view, channels last', each=True, channels_last=True)
@contestant('plain torch, view by view, channels last, bfloat16', each=True, channels_last=True, bf16=True)
class Plain(Loop):
    "The floor: no library, both views in one pass unless `each`, the target updated by foreach operations"
    def __init__(self, each=False, channels_last=False, bf16=False):
        self.each, self.bf16 = each, bf16
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.online = nn.ModuleList([body(), mlp(512), mlp(projected)]).to(memory_format=self.format)
        self.target = copy.deepcopy(self.online[:2]).requires_grad_(False)
        self.opt = torch.optim.SGD(self.online.parameters(), lr, momentum=.9)
    def step(self, v1, v2):
        def run(ms, *xs):
            for m in ms: xs = [m(x) for x in xs]
            return xs
        xs = [o.contiguous(memory_format=self.format) for o in ((v1, v2) if self.each else (torch.cat([v1, v2]),))]
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16):
            with torch.no_grad(): zs = run(self.target, *xs)
            ps = run(self.online, *xs)
        p1, p2 = ps if self.each else ps[0].chunk(2)
        z1, z2 = zs if self.each else zs[0].chunk(2)
        loss = 4-2*F.cosine_similarity(p1.float(), z2.float()).mean()-2*F.cosine_similarity(p2.float(), z1.float()).mean()
        loss.backward(); self.opt.step(); self.opt.zero_grad()
        with torch.no_grad(): torch._foreach_lerp_(list(self.target.parameters()), list(self.online[:2].parameters()), 1-.996)

@contestant('random weights')
class Untrained:
    "What the body is worth before it has seen an image"
    def train(self, files, size, bs, epochs, tick, workers=0): return body(), imagenet_stats

def clock(tick=None):
    "A callback that tells `tick` of each optimiser step, and when it ended"
    from fastai.vision.all import Callback, CancelFitException
    class Clock(Callback):
        order = 100
        def __init__(self): self.ends = []
        def after_batch(self):
            if not self.training: return
            self.ends.append(time.perf_counter())
            try:
                if tick: tick(len(self.xb[0]))
            except Stop: raise CancelFitException()
    return Clock()

def sgd(momentum=.9):
    "As the floor has it, for a `Learner`"
    from fastai.vision.all import OptimWrapper
    return partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=momentum))

def one_batch_dls(v, n):
    "`n` batches as large as `v`"
    from fastai.vision.all import DataLoaders, IntToFloatTensor
    from fastbyol.data import InMemoryDL
    images = torch.zeros(len(v), *v.shape[1:], dtype=torch.uint8)
    rows = torch.arange(len(v)).repeat(n)
    dl = InMemoryDL(list(range(len(rows))), images, rows, bs=len(v), after_batch=[IntToFloatTensor()])
    return DataLoaders(dl, InMemoryDL([], images, rows[:0], bs=len(v)))

@contestant('fastbyol')
@contestant('fastbyol, fp32', precision='fp32')
@contestant('fastbyol, channels_last', precision='channels_last')
@contestant('fastbyol, bf16', precision='bf16')
@contestant('fastbyol, optimiser of lightly', as_lightly=True)
class FastBYOL:
    "`as_lightly`: trained with the optimiser of lightly's example in place of a recipe, to compare memory without Adam's two averages"
    def __init__(self, precision='auto', as_lightly=False, **kw):
        import fastbyol.all
        self.lib, self.as_lightly, self.kw = fastbyol.all, as_lightly, dict(precision=precision, hidden_size=hidden, projection_size=projected, **kw)
    def make(self, v1, v2, n):
        views = tuple(lambda x, v=v: v[:len(x)] for v in (v1, v2))
        self.learn = self.lib.byol_learner(one_batch_dls(v1, n+1), body(), views=views, lr=lr, opt_func=sgd(), **self.kw)
    def times(self, v1, v2, n):
        if not hasattr(self, 'learn'): self.make(v1, v2, n)
        learn, cb = self.learn, clock()
        with learn.no_bar(), learn.no_logging(), learn.added_cbs(cb): learn.fit(1)
        return [b-a for a, b in zip(cb.ends, cb.ends[1:])]
    def train(self, files, size, bs, epochs, tick, workers=0, views=None, **other):
        "With the recipe for this many epochs, as its README does, or with `other` numbers in it"
        dls = self.lib.unlabelled_dls(files, size, bs, valid_pct=0)
        how = dict(lr=lr, opt_func=sgd(0.)) if self.as_lightly else dict(recipe=self.lib.recipe(epochs, bs, **other))
        learn = self.lib.byol_learner(dls, body(), views=views, **how, **self.kw)
        self.precision = learn.precision
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=clock(tick)) if self.as_lightly else learn.fit_byol(cbs=clock(tick))
        return learn.model.body, learn.model.stats

@contestant('lightly')
class Lightly(Loop):
    "The example of https://docs.lightly.ai/self-supervised-learning/examples/byol.html"
    def __init__(self):
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        from lightly.loss import NegativeCosineSimilarity
        self.backbone, self.projection_head, self.prediction_head = body(), BYOLProjectionHead(512, hidden, projected), BYOLPredictionHead(projected, hidden, projected)
        self.backbone_momentum, self.projection_head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)
        for m in (self.backbone_momentum, self.projection_head_momentum): deactivate_requires_grad(m)
        self.criterion, self.momentum = NegativeCosineSimilarity(), .996
        self.opt = torch.optim.SGD([p for m in (self.backbone, self.projection_head, self.prediction_head) for p in m.parameters()], lr=.06)
    def forward(self, x): return self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))
    def forward_momentum(self, x): return self.projection_head_momentum(self.backbone_momentum(x).flatten(1)).detach()
    def step(self, x0, x1):
        from lightly.models.utils import update_momentum
        update_momentum(self.backbone, self.backbone_momentum, m=self.momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=self.momentum)
        p0, z0, p1, z1 = self.forward(x0), self.forward_momentum(x0), self.forward(x1), self.forward_momentum(x1)
        loss = .5*(self.criterion(p0, z1)+self.criterion(p1, z0))
        loss.backward(); self.opt.step(); self.opt.zero_grad()
    @staticmethod
    def views(size):
        "One PIL image to two views"
        from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
        kw = dict(gaussian_blur=0.) if size<=32 else {} # as the example does at 32 pixels
        return BYOLTransform(view_1_transform=BYOLView1Transform(input_size=size, **kw), view_2_transform=BYOLView2Transform(input_size=size, **kw))
    def train(self, files, size, bs, epochs, tick, workers=0):
        from lightly.utils.scheduler import cosine_schedule
        dl = DataLoader(Photos(files, self.views(size)), batch_size=bs, shuffle=True, drop_last=True, num_workers=workers)
        try:
            for epoch in range(epochs):
                self.momentum = cosine_schedule(epoch, epochs, .996, 1)
                for batch in dl: self.step(*batch[0]); tick(bs)
        except Stop: pass # the time is up
        return self.backbone, imagenet_stats

class Photos(Dataset):
    "Image files, decoded each time they are asked for: `(transform(image), 0)`"
    def __init__(self, files, tfm): self.files, self.tfm = list(files), tfm
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        with Image.open(self.files[i]) as im: return self.tfm(im.convert('RGB')), 0

@contestant('byol-pytorch')
class ByolPytorch(Loop):
    "The usage of https://github.com/lucidrains/byol-pytorch, with its own augmentation, drawn once for the whole batch"
    def __init__(self):
        import byol_pytorch
        self.lib = byol_pytorch
    def _make(self, size, **kw):
        # one linear head of simplices by default, which the paper has not
        self.net = resnet18()
        self.learner = self.lib.BYOL(self.net, image_size=size, hidden_layer='avgpool', projection_size=projected, projection_hidden_size=hidden, use_simplicial_embeddings=False, **kw)
        self.opt = torch.optim.Adam(self.learner.parameters(), lr=3e-4)
    def _step(self, images):
        loss = self.learner(images)
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        self.learner.update_moving_average()
    def step(self, v1, v2):
        if not hasattr(self, 'learner'): self._make(v1.shape[-1], augment_fn=lambda x: v1, augment_fn2=lambda x: v2)
        self._step(v1)
    def train(self, files, size, bs, epochs, tick, workers=0):
        self._make(size)
        dl = DataLoader(Photos(files, T.Compose([T.Resize(size), T.CenterCrop(size), T.ToTensor()])), batch_size=bs, shuffle=True, drop_last=True, num_workers=workers)
        try:
            for _ in range(epochs):
                for x, _ in dl: self._step(x); tick(bs)
        except Stop: pass # the time is up
        return nn.Sequential(*list(self.net.children())[:-1], nn.Flatten()), imagenet_stats

@contestant('self_supervised')
class SelfSupervised:
    "The usage of https://github.com/KeremTurgutlu/self_supervised: a fastai `Learner` with its callback"
    def __init__(self):
        from self_supervised.vision import byol
        self.lib = byol
    def times(self, v1, v2, n):
        from fastai.vision.all import Learner, Pipeline
        cb = clock()
        if not hasattr(self, 'learn'):
            pipes = [Pipeline([lambda x, v=v: v], split_idx=0) for v in (v1, v2)]
            self.learn = Learner(one_batch_dls(v1, n+1), self.lib.create_byol_model(body(), hidden, projected), lr=lr, cbs=[self.lib.BYOL(pipes)], loss_func=lambda *o: None, opt_func=sgd())
        with self.learn.no_bar(), self.learn.no_logging(), self.learn.added_cbs(cb): self.learn.fit(1)
        return [b-a for a, b in zip(cb.ends, cb.ends[1:])]
