"""Apply drawn parameters to a batch of tiles on its device, through kornia's functional operators."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views.config import ViewsConfig
from nanodist.views.noise import unit_noise
from nanodist.views.parameters import ViewParameters


def apply(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """Views (n, 1, size_px, size_px) float32 in [0, 1] of ``tiles`` (n, 1, H, W) float32 in [0, 1].

    kornia's own random classes ignore a generator that is handed to them, so the numbers come from
    :func:`nanodist.views.parameters.draw` and only its functional operators are used.
    """
    device = tiles.device
    views = _warp(tiles, parameters, config)
    column = {
        name: torch.from_numpy(getattr(parameters, name)).to(device, torch.float32).view(-1, 1, 1, 1)
        for name in ("inverted", "contrast", "brightness", "gamma", "noise_std")
    }
    if config.exposure == "image":
        views = expose(views)
    if parameters.inverted.any():
        views = views + column["inverted"] * (1 - 2 * views)
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


def _warp(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """Crops, sampled from the tile halved as often as its view is coarser, level by level."""
    levels = np.unique(parameters.level)
    if len(levels) == 1:
        return _warp_level(tiles, parameters.matrix, int(levels[0]), config)
    views = tiles.new_empty(len(tiles), 1, config.size_px, config.size_px)
    for level in levels:
        chosen = np.flatnonzero(parameters.level == level)
        index = torch.from_numpy(chosen).to(tiles.device)
        views[index] = _warp_level(tiles[index], parameters.matrix[chosen], int(level), config)
    return views


def _warp_level(tiles: Tensor, matrices: npt.NDArray[np.float64], level: int, config: ViewsConfig) -> Tensor:
    from kornia.geometry.transform import warp_affine

    halved = 2**level
    tiles = tiles if level == 0 else torch.nn.functional.avg_pool2d(tiles, halved)
    # From centres of the tile's pixels to those of the halved tile's.
    to_halved = np.array([[1 / halved, 0, 0.5 / halved - 0.5], [0, 1 / halved, 0.5 / halved - 0.5], [0, 0, 1]])
    bottom = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (len(matrices), 1, 3))
    # kornia wants the way from the source to the result; inverted in float64 so that no pixel shifts.
    forward = np.linalg.inv(to_halved @ np.concatenate([matrices, bottom], 1))[:, :2]
    matrix = torch.from_numpy(forward).to(tiles.device, torch.float32)
    size = (config.size_px, config.size_px)
    return warp_affine(tiles, matrix, size, "bilinear", "reflection", align_corners=True)


def _blur(views: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    from kornia.filters import gaussian_blur2d

    chosen = np.flatnonzero(parameters.blur_sigma_px > 0)
    if len(chosen) == 0:
        return views
    index = torch.from_numpy(chosen).to(views.device)
    sigma = torch.from_numpy(parameters.blur_sigma_px[chosen]).to(views.device)
    # One kernel size for all, or the result would depend on which samples share a batch. In float64, since the
    # convolution sums in an order that depends on the number of samples; rounded to float32 that is gone.
    reach = min(math.ceil(3 * config.blur_sigma_px[1]), config.size_px // 2 - 1)
    sigmas = torch.stack([sigma, sigma], 1)
    blurred = gaussian_blur2d(views[index].double(), 2 * reach + 1, sigmas, "reflect")
    return views.index_copy(0, index, blurred.to(views.dtype))


def _add_noise(views: Tensor, std: Tensor, keys: Tensor, config: ViewsConfig) -> Tensor:
    # Variance a + b * intensity: read-out noise and, for its share, counting statistics.
    share = config.noise_signal_share
    spread = std * (1 - share + share * views).sqrt()
    return views + spread * unit_noise(keys, views.shape[-2], views.shape[-1])
