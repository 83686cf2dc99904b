"""What happens to each view: numbers drawn by (seed, epoch, sample, view) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import key, uniforms
from nanodist.views.config import ViewsConfig

Array = npt.NDArray[np.float64]
_DRAWS = 28
_NOISE_KEY = 14


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of n views; arrays are (n,) where nothing else is said.

    ``matrix`` (n, 2, 3) maps pixel centres of the view to pixel centres (x, y) of the tile.
    """

    level: npt.NDArray[np.int64]  # how often a tile is halved before it is sampled, so that nothing aliases
    matrix: npt.NDArray[np.float64]
    inverted: Array  # 1 or 0
    brightness_factor: Array
    contrast: Array
    brightness: Array
    gamma: Array
    gradient: npt.NDArray[np.float64]  # (n, 2): rise from the middle to the right and to the lower edge
    blur_sigma_px: Array  # 0 where there is no blur
    solarized: Array  # 1 or 0
    noise_std: Array  # 0 where there is no noise
    noise_key: npt.NDArray[np.int64]  # 31 bits, the counter's key
    erased: npt.NDArray[np.int64]  # (n, 3): upper and left edge and side in view pixels; side 0 where nothing is erased
    pixel_size_nm: npt.NDArray[np.float64]  # (n, 2): (y, x) of the view, which the crop's scale decides; nan: unknown


def draw(
    config: ViewsConfig,
    seed: int,
    epochs: Sequence[int],
    keys: Sequence[str],
    view: int,
    height: int,
    width: int,
    pixel_size_nm: npt.ArrayLike | None = None,
    step: int = 0,
) -> ViewParameters:
    """Parameters of view ``view`` of the samples ``keys`` in ``epochs``, for tiles of ``height`` x ``width`` pixels.

    A pure function of its arguments, sample by sample, so it does not matter which rank draws, or in which batch.

    Args:
        config: what a view may look like.
        seed: of the run.
        epochs: the epoch of each sample.
        keys: the sample ids.
        view: number of the view.
        height: of the tiles in pixels.
        width: of the tiles in pixels.
        pixel_size_nm: (n, 2), the (y, x) of each tile in nm; nan, or ``None`` for all, where it is unknown.
        step: number of the global batch, which keys the draws in place of the samples with ``drawn_for`` batch.

    Raises:
        UserError: ``crop_nm`` is set and the pixel size of a sample is unknown; names the sample.
    """
    u = uniforms([key(seed, "view", int(e), k, view) for e, k in zip(epochs, keys, strict=True)], _DRAWS)
    zoom = _zooms(config, seed, epochs, keys)
    if config.drawn_for == "batch":
        own = u[:, _NOISE_KEY].copy()
        u[:] = uniforms([key(seed, "batch", step, view)], _DRAWS)
        u[:, _NOISE_KEY] = own
    tile_nm = np.full((len(keys), 2), np.nan) if pixel_size_nm is None else np.asarray(pixel_size_nm, np.float64)
    pixel = _pixel(config, keys, tile_nm)
    sides = _sides(config, u, zoom, height, width, pixel)
    sides_px = sides / pixel
    on = u[:, 6] < config.intensity_probability
    blurred = u[:, 10] < config.of_view("blur_probability", view)
    noisy = u[:, 12] < config.noise_probability
    return ViewParameters(
        level=np.maximum(np.round(np.log2(np.sqrt(sides_px.prod(1)) / config.size_px)), 0).astype(np.int64),
        matrix=_matrices(config, sides, pixel, u, height, width),
        inverted=(u[:, 21] < config.invert_probability).astype(np.float64),
        brightness_factor=np.where(on, 1 + config.brightness_factor * (2 * u[:, 24] - 1), 1.0),
        contrast=np.where(on, 1 + config.contrast * (2 * u[:, 7] - 1), 1.0),
        brightness=np.where(on, config.brightness * (2 * u[:, 8] - 1), 0.0),
        gamma=np.where(on, (1 + config.gamma) ** (2 * u[:, 9] - 1), 1.0),
        gradient=config.background_gradient * u[:, 15, None] * _direction(u[:, 16]),
        blur_sigma_px=np.where(blurred, _between(config.blur_sigma_px, u[:, 11]), 0.0),
        solarized=(u[:, 22] < config.of_view("solarize_probability", view)).astype(np.float64),
        noise_std=np.where(noisy, _between(config.noise_std, u[:, 13]), 0.0),
        noise_key=(u[:, _NOISE_KEY] * 2**31).astype(np.int64),
        erased=_squares(config, u[:, 17:21]),
        pixel_size_nm=_effective(config, sides, tile_nm),
    )


def _zooms(config: ViewsConfig, seed: int, epochs: Sequence[int], keys: Sequence[str]) -> Array:
    """The zoom (n,) that both views of a sample share."""
    if len(config.zooms) == 1:
        return np.full(len(keys), config.zooms[0])
    shared = uniforms([key(seed, "zoom", int(e), k) for e, k in zip(epochs, keys, strict=True)], 1)[:, 0]
    return np.asarray(config.zooms)[np.floor(shared * len(config.zooms)).astype(int)]


def _between(bounds: tuple[float, float], u: Array) -> Array:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _direction(u: Array) -> Array:
    return np.stack([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)], -1)


def _squares(config: ViewsConfig, u: Array) -> npt.NDArray[np.int64]:
    side = np.floor(config.size_px * _between(config.erase_share, u[:, 1]))
    side = np.where(u[:, 0] < config.erase_probability, side, 0.0)
    corner = np.floor(u[:, 2:4] * (config.size_px - side)[:, None])
    return np.concatenate([corner, side[:, None]], 1).astype(np.int64)


def _pixel(config: ViewsConfig, keys: Sequence[str], tile_nm: Array) -> Array:
    """Width and height (n, 2) of a tile's pixel in the unit that the crop's side is given in."""
    if config.crop_nm is None:
        return np.ones((len(keys), 2))
    unknown = np.flatnonzero(~(tile_nm > 0).all(1))
    if len(unknown):
        raise UserError(
            f"sample {keys[int(unknown[0])]} has no pixel_size_nm, which views.crop_nm needs: "
            "give it when packing, or set views.crop_px"
        )
    return tile_nm[:, ::-1]


def _sides(config: ViewsConfig, u: Array, zoom: Array, height: int, width: int, pixel: Array) -> Array:
    """Width and height (n, 2) of the crop before its rotation, in its own unit; neither exceeds the tile."""
    low, high = config.crop_bounds()
    if config.crop_law == "log":
        side = low * (high / low) ** u[:, 0]
    elif config.crop_law == "side":
        side = _between((low, high), u[:, 0])
    else:
        side = np.sqrt(_between((low**2, high**2), u[:, 0]))
    shorter = min(height, width) * pixel.min(1)
    side = (side * shorter if config.crop_share is not None else side) / zoom
    bounds = config.aspect or (1.0, 1.0)
    stretch = np.sqrt(bounds[0] * (bounds[1] / bounds[0]) ** u[:, 23])
    return np.minimum(np.stack([side * stretch, side / stretch], -1), shorter[:, None])


def _effective(config: ViewsConfig, sides: Array, tile_nm: Array) -> Array:
    """The (y, x) pixel size (n, 2) of the views in nm; of oblong pixels, which a rotation mixes, the geometric mean."""
    steps = sides[:, ::-1] / config.size_px
    return steps if config.crop_nm is not None else steps * np.sqrt(tile_nm.prod(1))[:, None]


def _matrices(config: ViewsConfig, sides: Array, pixel: Array, u: Array, height: int, width: int) -> Array:
    cos, sin = _turn(config, u[:, 1])
    halves = np.stack(
        [
            np.abs(cos) * sides[:, 0] + np.abs(sin) * sides[:, 1],
            np.abs(sin) * sides[:, 0] + np.abs(cos) * sides[:, 1],
        ],
        -1,
    ) / (2 * pixel)
    x = width / 2 - 0.5 + _reach(width, halves[:, 0], config) * (2 * u[:, 2] - 1)
    y = height / 2 - 0.5 + _reach(height, halves[:, 1], config) * (2 * u[:, 3] - 1)
    mirror = np.where(config.flip & (u[:, 4] < 0.5), -1.0, 1.0)
    linear = np.stack([np.stack([cos * mirror, -sin], -1), np.stack([sin * mirror, cos], -1)], -2)
    linear = linear * (sides / config.size_px)[:, None, :] / pixel[:, :, None]
    centre = (config.size_px - 1) / 2
    offset = np.stack([x, y], -1) - linear @ np.array([centre, centre])
    return np.concatenate([linear, offset[..., None]], -1)


def _turn(config: ViewsConfig, u: Array) -> tuple[Array, Array]:
    """Cosine and sine of the rotation; those of right angles are exact."""
    if config.rotation == "free":
        return np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)
    quarter = np.floor(4 * u).astype(int) if config.rotation == "right_angles" else np.zeros(len(u), int)
    return np.array([1.0, 0.0, -1.0, 0.0])[quarter], np.array([0.0, 1.0, 0.0, -1.0])[quarter]


def _reach(extent: int, half: Array, config: ViewsConfig) -> Array:
    """How far the crop's centre may lie from the tile's along one axis."""
    room = np.maximum(extent / 2 - half, 0.0)
    return room if config.centre_jitter_px is None else np.minimum(room, config.centre_jitter_px)
