"""Apply drawn parameters tile by tile: what is in work stays in the processor's cache, and nothing else is kept.

What is computed is what :mod:`nanodist.views.on_device` computes in batch through kornia; the tests hold the two
together. As each view is made by itself, no other sample of the batch can change a bit of it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from nanodist.views.blur import Blur, Scratch, reach
from nanodist.views.config import ViewsConfig
from nanodist.views.crops import Crops
from nanodist.views.noise import NoiseWords, hashed
from nanodist.views.parameters import ViewParameters


# Without the records of autograd each of the many small steps costs less; ``out`` itself stays an ordinary tensor.
@torch.inference_mode()
def apply(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig, out: Tensor) -> Tensor:
    """Views (n, 1, size_px, size_px) float32 in [0, 1] of ``tiles`` (n, H, W) uint8 or uint16, written to ``out``."""
    # All steps work in the same memory, as what fits into the cache takes half the time.
    scratch = Scratch(config.size_px, reach(config))
    maker = _Maker(parameters, config, 255 if tiles.dtype == torch.uint8 else 65535, scratch)
    crops = Crops(parameters, config.size_px, tiles.shape[-2], tiles.shape[-1], scratch.images)
    for i, (tile, view) in enumerate(zip(tiles, out[:, 0], strict=True)):
        maker.make(i, crops.sample(tile, i), view)
    return out


class _Maker:
    """Makes views one after the other, from crops in counts up to ``full_scale``."""

    def __init__(self, parameters: ViewParameters, config: ViewsConfig, full_scale: int, scratch: Scratch) -> None:
        size = config.size_px
        self.config, self.full_scale = config, full_scale
        # Plain numbers: those of arrays are slow one by one.
        self.each = {field.name: getattr(parameters, field.name).tolist() for field in dataclasses.fields(parameters)}
        self.noise_key = hashed(parameters.noise_key)
        self.edge = torch.linspace(-1, 1, size)
        self.blur = Blur(size, reach(config), parameters.blur_sigma_px, scratch)
        self.words = NoiseWords(size, scratch.both)
        self.number = torch.zeros(())

    def make(self, i: int, crop: Tensor, view: Tensor) -> None:
        """Write to ``view`` (size_px, size_px) what becomes of ``crop`` i, which is overwritten."""
        each, linear = self.each, self.config.noise_stage == "linear"
        # What is left to do to every pixel alike: crop * scale + shift.
        scale, shift = 1 / self.full_scale, 0.0
        if self.config.exposure == "image":
            crop -= _mean(crop)
            scale, shift = scale / (6 * (_rms(crop) * scale + 1e-3)), 0.5
        if each["inverted"][i]:
            scale, shift = -scale, 1 - shift
        blurred = bool(each["blur_sigma_px"][i])
        # What is blurred is first made where the blur takes it from.
        first = self.blur.source if blurred else view
        if linear:
            self._scaled(crop, scale, shift, first)
            if blurred:
                self.blur.into(view, i)
            self._noise(view, i)
            self._grey(i, view, 1.0, 0.0, view)
        else:
            self._grey(i, crop, scale, shift, first)
            if blurred:
                self.blur.into(view, i)
        if each["solarized"][i]:
            view -= (2 * view).sub_(1).clamp_min_(0)
        if not linear:
            self._noise(view, i)
        top, left, side = each["erased"][i]
        if side:
            view[top : top + side, left : left + side] = _mean(view)
        view.clamp_(0, 1)

    def _grey(self, i: int, crop: Tensor, scale: float, shift: float, view: Tensor) -> None:
        """Brightness, contrast, gamma and the plane of the background, of ``crop * scale + shift``."""
        factor, contrast = self.each["brightness_factor"][i], self.each["contrast"][i]
        scale, shift = scale * factor, shift * factor
        if contrast != 1:
            mean = _mean(crop) * scale + shift
            scale, shift = scale * contrast, shift * contrast + mean * (1 - contrast)
        self._scaled(crop, scale, shift + self.each["brightness"][i], view)
        view.clamp_(1e-6, 1)
        gamma = self.each["gamma"][i]
        if gamma != 1:
            # A quarter of the time of pow, and two thirds of that of log and exp.
            view.log2_().mul_(gamma).exp2_()
        right, down = self.each["gradient"][i]
        if right or down:
            view += self.edge * right
            view += (self.edge * down)[:, None]

    def _noise(self, view: Tensor, i: int) -> None:
        std, share = self.each["noise_std"][i], self.config.noise_signal_share
        if not std:
            return
        noise = self.words.sums(self.noise_key[i])
        if not share:
            view.add_(noise, alpha=std * self.words.scale)
            return
        grey = torch.clamp_min(view, 0, out=self.words.free())
        view.addcmul_(noise, self._scaled(grey, share, 1 - share, grey).sqrt_(), value=std * self.words.scale)

    def _scaled(self, view: Tensor, scale: float, shift: float, out: Tensor) -> Tensor:
        """``view * scale + shift`` in one pass."""
        return torch.add(self.number.fill_(shift), view, alpha=scale, out=out)


def _mean(view: Tensor) -> float:
    # Row by row, so that the number of threads does not change the order of the sum.
    return float(view.sum(1).sum()) / view.numel()


def _rms(view: Tensor) -> float:
    flat = view.reshape(-1)
    return math.sqrt(float(torch.dot(flat, flat)) / len(flat))
