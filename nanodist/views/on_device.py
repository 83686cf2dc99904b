"""Apply drawn parameters to a batch of tiles on its device, through kornia's functional operators.

What is computed is what :mod:`nanodist.views.on_cpu` computes tile by tile; the tests hold the two together.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views.config import ViewsConfig
from nanodist.views.noise import unit_noise
from nanodist.views.parameters import ViewParameters

# Pixels that are in work at once. What is in between takes about ten times their memory, so that the whole needs
# little more than its result.
_CHUNK = {"cpu": 2**19, "cuda": 2**24}


def apply(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig, out: Tensor) -> Tensor:
    """Views (n, 1, size_px, size_px) float32 in [0, 1] of ``tiles`` (n, H, W) uint8 or uint16, written to ``out``.

    kornia's own random classes ignore a generator that is handed to them, so the numbers come from
    :func:`nanodist.views.parameters.draw` and only its functional operators are used.
    """
    full_scale = 255.0 if tiles.dtype == torch.uint8 else 65535.0
    largest = max(config.size_px**2, tiles.shape[-2] * tiles.shape[-1])
    most = max(1, _CHUNK.get(tiles.device.type, 2**22) // largest)
    for start in range(0, len(tiles), most):
        part = slice(start, start + most)
        grey = (tiles[part].to(torch.float32) / full_scale).unsqueeze(1)
        out[part] = _views(grey, _part(parameters, part), config)
    return out


def _part(parameters: ViewParameters, part: slice) -> ViewParameters:
    fields = dataclasses.fields(parameters)
    return ViewParameters(**{field.name: getattr(parameters, field.name)[part] for field in fields})


def _views(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    device = tiles.device
    views = _warp(tiles, parameters, config)
    column = {
        name: torch.from_numpy(getattr(parameters, name)).to(device, torch.float32).view(-1, 1, 1, 1)
        for name in ("inverted", "brightness_factor", "contrast", "brightness", "gamma", "solarized", "noise_std")
    }
    keys = torch.from_numpy(parameters.noise_key).to(device)
    if config.exposure == "image":
        views = expose(views)
    if parameters.inverted.any():
        views = views + column["inverted"] * (1 - 2 * views)
    if config.noise_stage == "linear":
        views = _add_noise(_blur(views, parameters, config), column["noise_std"], keys, config)
    views = views * column["brightness_factor"]
    mean = views.mean(dim=(-2, -1), keepdim=True)
    views = ((views - mean) * column["contrast"] + mean + column["brightness"]).clamp_(0, 1)
    views = views.clamp_min(1e-6) ** column["gamma"]
    if parameters.gradient.any():
        views = views + _planes(torch.from_numpy(parameters.gradient).to(device, torch.float32), config.size_px)
    if config.noise_stage == "last":
        views = _blur(views, parameters, config)
    if parameters.solarized.any():
        views = views - column["solarized"] * (2 * views - 1).clamp_min(0)
    if config.noise_stage == "last":
        views = _add_noise(views, column["noise_std"], keys, config)
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
    chosen = np.flatnonzero(parameters.erased[:, 2])
    if len(chosen) == 0:
        return
    index = torch.from_numpy(chosen).to(views.device)
    top, left, side = torch.from_numpy(parameters.erased[chosen]).to(views.device).view(-1, 3, 1).unbind(1)
    place = torch.arange(views.shape[-1], device=views.device)
    down, along = ((place >= first) & (place < first + side) for first in (top, left))
    some = views[index]
    inside = (down[:, :, None] & along[:, None, :])[:, None]
    views.index_copy_(0, index, torch.where(inside, some.mean((1, 2, 3), keepdim=True), some))


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
    halved = 2**level
    tiles = tiles if level == 0 else torch.nn.functional.avg_pool2d(tiles, halved)
    height, width = tiles.shape[-2:]
    # From centres of the tile's pixels to those of the halved tile's, there from -1 at the first to 1 at the last.
    # In float64: kornia's warp_affine inverts and scales in float32, which moves pixels by 1e-4 of their size.
    matrices = matrices / halved
    matrices[..., 2] += 0.5 / halved - 0.5
    matrices *= 2 / np.array([width - 1, height - 1])[:, None]
    matrices[..., 2] -= 1
    places = np.arange(config.size_px)
    along, down = (
        torch.from_numpy(places * matrices[..., 0, None]).to(tiles.device, torch.float32),
        torch.from_numpy(places * matrices[..., 1, None] + matrices[..., 2, None]).to(tiles.device, torch.float32),
    )
    grid = (along[:, :, None] + down[..., None]).permute(0, 2, 3, 1)
    return torch.nn.functional.grid_sample(tiles, grid, "bilinear", "reflection", align_corners=True)


def _blur(views: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    from kornia.filters import get_gaussian_kernel1d

    chosen = np.flatnonzero(parameters.blur_sigma_px > 0)
    if len(chosen) == 0:
        return views
    index = torch.from_numpy(chosen).to(views.device)
    sigma = torch.from_numpy(parameters.blur_sigma_px[chosen]).to(views.device)
    # One kernel size for all, or the result would depend on which samples share a batch. Tap by tap, since a
    # convolution sums in an order that depends on the number of samples, unless it is in float64, which is slow.
    weights = get_gaussian_kernel1d(2 * config.blur_reach() + 1, sigma[:, None]).to(views.dtype)
    blurred = views[index]
    for axis in (-1, -2):
        blurred = _filtered(blurred, weights, axis)
    return views.index_copy(0, index, blurred)


def _filtered(views: Tensor, weights: Tensor, axis: int) -> Tensor:
    """``views`` (n, 1, H, W) with the windows ``weights`` (n, 2 reach + 1) along an axis, mirrored at the edges."""
    reach, size = weights.shape[1] // 2, views.shape[axis]
    edges = (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach)
    padded = torch.nn.functional.pad(views, edges, mode="reflect")
    taps = weights.view(len(views), 1, 1, 1, -1).unbind(-1)
    made = padded.narrow(axis, 0, size) * taps[0]
    for number, tap in enumerate(taps[1:], start=1):
        made.addcmul_(padded.narrow(axis, number, size), tap)
    return made


def _add_noise(views: Tensor, std: Tensor, keys: Tensor, config: ViewsConfig) -> Tensor:
    # Variance a + b * intensity: read-out noise and, for its share, counting statistics.
    if not std.any():
        return views
    share = config.noise_signal_share
    spread = std * (1 - share + share * views.clamp_min(0)).sqrt()
    return views + spread * unit_noise(keys, views.shape[-2], views.shape[-1])
