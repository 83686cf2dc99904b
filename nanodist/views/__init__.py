"""Two seeded views of every sample, made on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanodist.views.apply import apply
from nanodist.views.config import ViewsConfig
from nanodist.views.parameters import ViewParameters, draw

__all__ = ["ViewParameters", "ViewsConfig", "apply", "draw", "make_views"]


@torch.no_grad()
def make_views(
    tiles: Tensor, config: ViewsConfig, seed: int, epochs: Sequence[int], keys: Sequence[str], count: int = 2
) -> Tensor:
    """``count`` views (count, n, 1, size_px, size_px) in [0, 1] of ``tiles`` (n, H, W), uint8 or uint16.

    Args:
        tiles: on the device where the views are wanted.
        config: what a view may look like.
        seed: of the run.
        epochs: the epoch of each sample; the same sample looks different in the next one.
        keys: the sample ids.
        count: number of views.
    """
    full_scale = 255.0 if tiles.dtype == torch.uint8 else 65535.0
    unit = (tiles.to(torch.float32) / full_scale).unsqueeze(1)
    height, width = tiles.shape[-2:]
    drawn = (draw(config, seed, epochs, keys, view, height, width) for view in range(count))
    return torch.stack([apply(unit, parameters, config) for parameters in drawn])
