"Everything a user needs: `from fastai.vision.all import *` and then `from fastbyol.all import *`"
from .heads import *
from .body import *
from .fused import *
from .views import *
from .model import *
from .data import *
from .callback import *
from .precision import *
from .recipe import *
from .learner import *
from .transfer import *
from .interop import *
from .evaluate import *
from .explore import *
from .monitor import *
from .distributed import *
from .checkpoint import *
