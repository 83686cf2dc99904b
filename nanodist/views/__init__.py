"""Two seeded views of every sample, made on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanodist.views.apply import apply
from nanodist.views.config import ViewsConfig
from nanodist.views.parameters import ViewParameters, draw

__all__ = ["ViewParameters", "ViewsConfig", "apply", "draw", "make_view"]


@torch.no_grad()
def make_view(
    tiles: Tensor, config: ViewsConfig, seed: int, epochs: Sequence[int], keys: Sequence[str], view: int
) -> Tensor:
    """One view (n, 1, size_px, size_px) in [0, 1] of each of ``tiles`` (n, H, W), uint8 or uint16.

    Args:
        tiles: on the device where the views are wanted.
        config: what a view may look like.
        seed: of the run.
        epochs: the epoch of each sample; the same sample looks different in the next one.
        keys: the sample ids.
        view: number of the view.
    """
    height, width = tiles.shape[-2:]
    drawn = draw(config, seed, epochs, keys, view, height, width)
    full_scale = 255.0 if tiles.dtype == torch.uint8 else 65535.0
    return apply((tiles.to(torch.float32) / full_scale).unsqueeze(1), drawn, config)
