"""What happens to each view: numbers drawn by (seed, epoch, sample, view) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc.seeding import key, uniforms
from nanodist.views.config import ViewsConfig

Array = npt.NDArray[np.float64]
_DRAWS = 24


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of n views; arrays are (n,) where nothing else is said.

    ``matrix`` (n, 2, 3) maps pixel centres of the view to pixel centres (x, y) of the tile.
    """

    level: npt.NDArray[np.int64]  # how often a tile is halved before it is sampled, so that nothing aliases
    matrix: npt.NDArray[np.float64]
    inverted: Array  # 1 or 0
    contrast: Array
    brightness: Array
    gamma: Array
    gradient: npt.NDArray[np.float64]  # (n, 2): rise from the middle to the right and to the lower edge
    blur_sigma_px: Array  # 0 where there is no blur
    noise_std: Array  # 0 where there is no noise
    noise_key: npt.NDArray[np.int64]  # 31 bits, the counter's key
    erased: npt.NDArray[np.int64]  # (n, 3): upper and left edge and side in view pixels; side 0 where nothing is erased


def draw(
    config: ViewsConfig, seed: int, epochs: Sequence[int], keys: Sequence[str], view: int, height: int, width: int
) -> ViewParameters:
    """Parameters of view ``view`` of the samples ``keys`` in ``epochs``, for tiles of ``height`` x ``width`` pixels.

    A pure function of its arguments, sample by sample, so it does not matter which rank draws, or in which batch.
    """
    words = [key(seed, "view", int(e), k, view) for e, k in zip(epochs, keys, strict=True)]
    u = uniforms(words, _DRAWS)
    shared = uniforms([key(seed, "zoom", int(e), k) for e, k in zip(epochs, keys, strict=True)], 1)[:, 0]
    zoom = np.asarray(config.zooms)[np.floor(shared * len(config.zooms)).astype(int)]
    low, high = config.crop_px
    side = np.minimum(low * (high / low) ** u[:, 0] / zoom, min(height, width))
    on = u[:, 6] < config.intensity_probability
    blurred = u[:, 10] < config.blur_probability
    noisy = u[:, 12] < config.noise_probability
    return ViewParameters(
        level=np.maximum(np.round(np.log2(side / config.size_px)), 0).astype(np.int64),
        matrix=_matrices(config, side, u, height, width),
        inverted=(u[:, 21] < config.invert_probability).astype(np.float64),
        contrast=np.where(on, 1 + config.contrast * (2 * u[:, 7] - 1), 1.0),
        brightness=np.where(on, config.brightness * (2 * u[:, 8] - 1), 0.0),
        gamma=np.where(on, (1 + config.gamma) ** (2 * u[:, 9] - 1), 1.0),
        gradient=config.background_gradient * u[:, 15, None] * _direction(u[:, 16]),
        blur_sigma_px=np.where(blurred, _between(config.blur_sigma_px, u[:, 11]), 0.0),
        noise_std=np.where(noisy, _between(config.noise_std, u[:, 13]), 0.0),
        noise_key=(u[:, 14] * 2**31).astype(np.int64),
        erased=_squares(config, u[:, 17:21]),
    )


def _between(bounds: tuple[float, float], u: Array) -> Array:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _direction(u: Array) -> Array:
    return np.stack([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)], -1)


def _squares(config: ViewsConfig, u: Array) -> npt.NDArray[np.int64]:
    side = np.floor(config.size_px * _between(config.erase_share, u[:, 1]))
    side = np.where(u[:, 0] < config.erase_probability, side, 0.0)
    corner = np.floor(u[:, 2:4] * (config.size_px - side)[:, None])
    return np.concatenate([corner, side[:, None]], 1).astype(np.int64)


def _matrices(config: ViewsConfig, side: Array, u: Array, height: int, width: int) -> Array:
    if config.rotation == "free":
        angle = 2 * np.pi * u[:, 1]
    elif config.rotation == "right_angles":
        angle = np.pi / 2 * np.floor(4 * u[:, 1])
    else:
        angle = np.zeros(len(u))
    cos, sin = np.cos(angle), np.sin(angle)
    half = side * (np.abs(cos) + np.abs(sin)) / 2
    x = width / 2 - 0.5 + _reach(width, half, config) * (2 * u[:, 2] - 1)
    y = height / 2 - 0.5 + _reach(height, half, config) * (2 * u[:, 3] - 1)
    step = side / config.size_px
    mirror = np.where(config.flip & (u[:, 4] < 0.5), -1.0, 1.0)
    linear = np.stack([np.stack([cos * mirror, -sin], -1), np.stack([sin * mirror, cos], -1)], -2)
    linear = linear * step[:, None, None]
    centre = (config.size_px - 1) / 2
    offset = np.stack([x, y], -1) - linear @ np.array([centre, centre])
    return np.concatenate([linear, offset[..., None]], -1)


def _reach(extent: int, half: Array, config: ViewsConfig) -> Array:
    """How far the crop's centre may lie from the tile's along one axis."""
    room = np.maximum(extent / 2 - half, 0.0)
    return room if config.centre_jitter_px is None else np.minimum(room, config.centre_jitter_px)
