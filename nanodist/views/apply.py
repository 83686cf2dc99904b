"""Apply drawn parameters to a batch of tiles on its device, through kornia's functional operators."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from nanodist.views.config import ViewsConfig
from nanodist.views.noise import unit_noise
from nanodist.views.parameters import ViewParameters


def apply(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """Views (n, 1, size_px, size_px) float32 in [0, 1] of ``tiles`` (n, 1, H, W) float32 in [0, 1], reduced already.

    kornia's own random classes ignore a generator that is handed to them, so the numbers come from
    :func:`nanodist.views.parameters.draw` and only its functional operators are used.
    """
    device = tiles.device
    views = _warp(tiles, torch.from_numpy(parameters.matrix), config)
    column = {
        name: torch.from_numpy(getattr(parameters, name)).to(device, torch.float32).view(-1, 1, 1, 1)
        for name in ("contrast", "brightness", "gamma", "noise_std")
    }
    if config.exposure == "image":
        views = expose(views)
    mean = views.mean(dim=(-2, -1), keepdim=True)
    views = ((views - mean) * column["contrast"] + mean + column["brightness"]).clamp_(0, 1)
    views = views.clamp_min(1e-6) ** column["gamma"]
    if parameters.gradient.any():
        views = views + _planes(torch.from_numpy(parameters.gradient).to(device, torch.float32), config.size_px)
    views = _blur(views, parameters, config)
    if parameters.noise_std.any():
        views = _add_noise(views, column["noise_std"], torch.from_numpy(parameters.noise_key).to(device), config)
    _erase(views, parameters)
    return views.clamp_(0, 1)


def expose(images: Tensor) -> Tensor:
    """``images`` (n, 1, H, W) with mean 1/2 and standard deviation 1/6 each, so that +-3 deviations fill [0, 1]."""
    mean = images.mean(dim=(-2, -1), keepdim=True)
    std = images.std(dim=(-2, -1), keepdim=True, correction=0)
    return (images - mean) / (6 * (std + 1e-3)) + 0.5


def _planes(gradient: Tensor, size: int) -> Tensor:
    edge = torch.linspace(-1, 1, size, device=gradient.device)
    return (gradient[:, :1, None] * edge + gradient[:, 1:, None] * edge[:, None]).unsqueeze(1)


def _erase(views: Tensor, parameters: ViewParameters) -> None:
    for i in np.flatnonzero(parameters.erased[:, 2]):
        top, left, side = (int(v) for v in parameters.erased[i])
        views[i, :, top : top + side, left : left + side] = views[i].mean()


def _warp(tiles: Tensor, matrix: Tensor, config: ViewsConfig) -> Tensor:
    from kornia.geometry.transform import warp_affine

    # Bilinear sampling of a crop that shrinks would alias; so it is drawn finer and averaged.
    finer = max(1, math.ceil(config.crop_px[1] / config.size_px / config.reduce - 0.25))
    size = config.size_px * finer
    # From centres of fine pixels to centres of view pixels, then to the tile.
    scale = matrix.new_tensor([[1 / finer, 0, 0.5 / finer - 0.5], [0, 1 / finer, 0.5 / finer - 0.5], [0, 0, 1]])
    bottom = matrix.new_tensor([[[0.0, 0.0, 1.0]]]).expand(len(matrix), 1, 3)
    r = config.reduce
    to_reduced = matrix.new_tensor([[1 / r, 0, 0.5 / r - 0.5], [0, 1 / r, 0.5 / r - 0.5], [0, 0, 1]])
    to_tile = to_reduced @ torch.cat([matrix, bottom], 1) @ scale
    # kornia wants the way from the source to the result; inverted in float64 so that no pixel shifts.
    forward = torch.linalg.inv(to_tile)[:, :2].to(tiles.device, torch.float32)
    views = warp_affine(tiles, forward, (size, size), "bilinear", "reflection", align_corners=True)
    return views if finer == 1 else torch.nn.functional.avg_pool2d(views, finer)


def _blur(views: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    from kornia.filters import gaussian_blur2d

    chosen = np.flatnonzero(parameters.blur_sigma_px > 0)
    if len(chosen) == 0:
        return views
    index = torch.from_numpy(chosen).to(views.device)
    sigma = torch.from_numpy(parameters.blur_sigma_px[chosen]).to(views.device, torch.float32)
    # One kernel size for all, or the result would depend on which samples share a batch.
    reach = min(math.ceil(3 * config.blur_sigma_px[1]), config.size_px // 2 - 1)
    blurred = gaussian_blur2d(views[index], 2 * reach + 1, torch.stack([sigma, sigma], 1), "reflect")
    return views.index_copy(0, index, blurred)


def _add_noise(views: Tensor, std: Tensor, keys: Tensor, config: ViewsConfig) -> Tensor:
    # Variance a + b * intensity: read-out noise and, for its share, counting statistics.
    share = config.noise_signal_share
    spread = std * (1 - share + share * views).sqrt()
    return views + spread * unit_noise(keys, views.shape[-2], views.shape[-1])
