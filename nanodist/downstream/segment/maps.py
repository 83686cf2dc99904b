"""The class of every pixel of a view: masks under the geometry that was drawn for their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanodist.views import ViewParameters, ViewsConfig, draw, render


def class_maps(
    masks: Tensor,
    classes: int,
    config: ViewsConfig,
    seed: int,
    epochs: Sequence[int],
    keys: Sequence[str],
    pixel_size_nm: npt.ArrayLike | None = None,
    step: int = 0,
) -> Tensor:
    """Classes (n, S, S) of the pixels of view 0 of samples, whose ``masks`` (n, H, W) are uint8 class numbers.

    Each class is rendered as an image of 0 and 1 by the same code as the views, so that the geometry is theirs; the
    class that covers most of a pixel has it.
    """
    height, width = masks.shape[-2:]
    drawn = _geometry(draw(config, seed, epochs, keys, 0, height, width, pixel_size_nm, step))
    plain = replace(config, exposure="keep", noise_stage="last")
    covers = torch.stack(
        [render((masks == c).to(torch.uint8) * 255, drawn, plain)[:, 0] for c in range(classes)], dim=1
    )
    return covers.argmax(1)


def _geometry(drawn: ViewParameters) -> ViewParameters:
    """Where a view is cut, and nothing of what happens to its grey values."""
    zeros = np.zeros(len(drawn.gamma))
    return replace(
        drawn,
        inverted=zeros,
        brightness_factor=zeros + 1,
        contrast=zeros + 1,
        brightness=zeros,
        gamma=zeros + 1,
        gradient=np.zeros_like(drawn.gradient),
        blur_sigma_px=zeros,
        solarized=zeros,
        noise_std=zeros,
        erased=np.zeros_like(drawn.erased),
    )
