"""Pixels on a common scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError

Image = npt.NDArray[Any]


def to_unit(image: Image) -> npt.NDArray[np.float32]:
    """uint8 or uint16 pixels as float32 in [0, 1]."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    if image.dtype == np.uint16:
        return image.astype(np.float32) / np.float32(65535)
    raise UserError(f"an image to embed must be uint8 or uint16, not {image.dtype}")
