"""Views of tiles, on the device that the tiles are on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views import on_cpu, on_device
from nanodist.views.config import ViewsConfig
from nanodist.views.parameters import ViewParameters, draw


def render(tiles: Tensor, parameters: ViewParameters, config: ViewsConfig, out: Tensor | None = None) -> Tensor:
    """Views (n, 1, size_px, size_px) float32 in [0, 1] of ``tiles`` (n, H, W) uint8 or uint16, as ``parameters`` say.

    Tile by tile on the CPU, in batch through kornia elsewhere: two ways to the same pixels (to 1e-4), of which the
    device alone decides. Beyond the result, memory is needed for a few views on the CPU, for a few MiB elsewhere.

    Args:
        tiles: on the device where the views are wanted.
        parameters: of each tile, by :func:`draw`.
        config: what they were drawn from.
        out: where to write the views; made where ``None``.
    """
    if out is None:
        out = torch.empty(len(tiles), 1, config.size_px, config.size_px, device=tiles.device)
    way = on_cpu if tiles.device.type == "cpu" else on_device
    return way.apply(tiles, parameters, config, out)


@torch.no_grad()
def make_view(
    tiles: Tensor,
    config: ViewsConfig,
    seed: int,
    epochs: Sequence[int],
    keys: Sequence[str],
    view: int,
    pixel_size_nm: npt.ArrayLike | None = None,
    out: Tensor | None = None,
    step: int = 0,
) -> Tensor:
    """One view (n, 1, size_px, size_px) in [0, 1] of each of ``tiles`` (n, H, W), uint8 or uint16.

    Args:
        tiles: on the device where the views are wanted.
        config: what a view may look like.
        seed: of the run.
        epochs: the epoch of each sample; the same sample looks different in the next one.
        keys: the sample ids.
        view: number of the view.
        pixel_size_nm: (n, 2), the (y, x) of each tile in nm, nan where unknown; needed for ``crop_nm`` alone.
        out: where to write the views; made where ``None``.
        step: number of the global batch, for ``drawn_for`` batch.

    Raises:
        UserError: ``crop_nm`` is set and the pixel size of a sample is unknown.
    """
    height, width = tiles.shape[-2:]
    drawn = draw(config, seed, epochs, keys, view, height, width, pixel_size_nm, step)
    return render(tiles, drawn, config, out)


def make_views(
    first: Tensor,
    second: Tensor,
    config: ViewsConfig,
    seed: int,
    epochs: Sequence[int],
    keys: Sequence[str],
    pixel_size_nm: npt.ArrayLike | None = None,
    step: int = 0,
) -> Tensor:
    """Both views (2, n, 1, size_px, size_px) in [0, 1], of ``first`` and ``second`` (n, H, W); see :func:`make_view`.

    Written where they stay, so that no copy of them is ever made.
    """
    out = torch.empty(2, len(first), 1, config.size_px, config.size_px, device=first.device)
    for number, tiles in enumerate((first, second)):
        make_view(tiles, config, seed, epochs, keys, number, pixel_size_nm, out[number], step)
    return out
