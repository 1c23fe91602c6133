"Everything a user needs: `from fastai.vision.all import *` and then `from fastbyol.all import *`"
from importlib import import_module as _import_module

from . import core as _core  # first: it silences a warning of torch about fastai and kornia
from .body import pool_features, reset_weights, small_stem_
from .views import FusedView, blur_kernel, byol_views
from .model import BYOL, BYOLLoss, byol_loss, mlp_head
from .data import few_labels, find_images, labelled_dls, open_image, split_files, unlabelled_dls
from .callback import BYOLCallback, target_decay
from .optim import LRSchedule, adamw, byol_splitter, lars, warmup_cosine
from .recipe import Recipe, presets, recipe
from .learner import byol_learner
from .transfer import (as_encoder, byol_unet_learner, byol_vision_learner, load_body, published_encoder,
    random_encoder, save_body, to_timm)
from .evaluate import (LabelEfficiency, LinearEval, get_embeddings, knn_accuracy, knn_predict,
    label_efficiency, linear_eval, linear_view)
from .monitor import HealthMonitor, KNNCallback, OnlineProbe
from .checkpoint import CheckpointCallback
from . import device as _device, distributed as _distributed  # for what they add to `Learner`

__all__ = [o for o in globals() if not o.startswith('_')]

_renamed = dict(labelled_loaders='labelled_dls', published_body='published_encoder',
    fresh_body='random_encoder', as_body='as_encoder', Precision='fastbyol.device.DeviceMixedPrecision',
    ByolLars='fastbyol.optim.Lars', cached_images='labelled_dls` or `unlabelled_dls',
    check_precision='learn.set_precision', CacheError='OSError', predictor_splitter='byol_splitter',
    Clip='torch.nn.Hardtanh(0, 1)', clear_cache='rm -r ~/.cache/fastbyol')
_rooms = ('core body views model data callback optim recipe device learner transfer evaluate monitor '
    'checkpoint distributed explore interop').split()

def __getattr__(name):
    "Say where a name has gone that was here before"
    if name in _renamed: raise AttributeError(f"`{name}` is now `{_renamed[name]}`")
    if not name.startswith('_'):
        for room in _rooms:
            if name in _import_module(f'fastbyol.{room}').__all__:
                raise AttributeError(f"`{name}` is in `fastbyol.{room}`: import it from there")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
