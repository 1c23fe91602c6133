"""The views of `byol_views` by kornia's operations, one after the other: the reference of the tests, and of `python -m bench views`"""
import math

import kornia.augmentation as K
import kornia.enhance as KE
import torch
from torch import nn

from fastbyol.all import blur_kernel

jiggles = dict(
    brightness=lambda x, factor: KE.adjust_brightness(x, factor-1),
    contrast=lambda x, k: torch.lerp(x.mean((-2, -1), True), x, k.view(-1, 1, 1, 1).to(x)).clamp(0, 1),
    saturation=KE.adjust_saturation, hue=lambda x, shift: KE.adjust_hue(x, shift*2*math.pi))

class ColorJiggle(K.ColorJiggle):
    "kornia's `ColorJiggle` as DeepMind's release: order per image, contrast about each channel's mean"
    def generate_parameters(self, batch_shape):
        order = torch.rand(batch_shape[0], 4).argsort(1)
        return {**super().generate_parameters(batch_shape), 'order': order}
    def apply_transform(self, input, params, flags, transform=None):
        out = input.clone()
        for step in params['order'].unbind(1): # what each image does first, second, third and last
            for i, (name, operation) in enumerate(jiggles.items()):
                chosen = step==i
                if not getattr(self, name) or not chosen.any(): continue
                out[chosen] = operation(out[chosen], params[f'{name}_factor'][chosen])
        return out

def kornia_view(view):
    "What a `FusedView` does, by kornia's operations; values are clipped, since bicubic resampling overshoots"
    p, ranges, size = view.p, view.ranges, (view.size, view.size)
    crop = K.RandomResizedCrop(size, ranges['scale'], ranges['ratio'], resample='bicubic', cropping_mode='resample')
    strengths = ranges['brightness'][1], ranges['contrast'][1]-1, ranges['saturation'][1]-1, ranges['hue'][1]
    jiggle, gray = ColorJiggle(*strengths, p=p['jitter']), K.RandomGrayscale(p=p['gray'])
    blur = K.RandomGaussianBlur(blur_kernel(view.size), ranges['sigma'], p=p['blur'])
    # kornia's defaults would draw a threshold, and add: the paper inverts what is above one half
    solarize = K.RandomSolarize(thresholds=(.5, .5), additions=(0., 0.), p=p['solarize'])
    others = [o for o in (K.RandomHorizontalFlip(p=p['flip']), jiggle, gray, blur, solarize) if o.p]
    return nn.Sequential(crop, nn.Hardtanh(0, 1), *others, nn.Hardtanh(0, 1))
