"""Small pictures of samples, for a map of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanodist.pixels import to_unit

SIDE_PX = 40
MOST = 1500


def thumbnails(images: Sequence[npt.NDArray[Any]], side_px: int = SIDE_PX) -> npt.NDArray[np.uint8]:
    """(n, side_px, side_px) of images (H, W), whose middle fills the square; each is stretched by itself."""
    from PIL import Image

    made = np.zeros((len(images), side_px, side_px), np.uint8)
    for place, image in enumerate(images):
        side = min(image.shape)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        grey = to_unit(image[top : top + side, left : left + side])
        small = Image.fromarray(grey).resize((side_px, side_px), Image.Resampling.BOX)
        values = np.asarray(small)
        low, high = np.quantile(values, [0.01, 0.99])
        made[place] = np.clip(255 * (values - low) / max(float(high - low), 1e-6), 0, 255).astype(np.uint8)
    return made
