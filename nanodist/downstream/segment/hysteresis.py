"""Two thresholds in place of one: what is likely enough by itself, and what is fainter and hangs together with it.

J. Canny, *A computational approach to edge detection*, PAMI 1986, section VIII. A thin wire of little contrast is found
in pieces, since here and there its probability falls below that of the ground; a lower threshold everywhere would take
patches of noise for wires as well.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
_ROWS = 512


def faint_classes(likely: F32, low: float) -> U8:
    """Of probabilities (classes, rows, W) the likeliest class but 0 where all but 0 have ``low`` together, else 0."""
    return np.where(1.0 - likely[0] >= low, likely[1:].argmax(0) + 1, 0).astype(np.uint8)


def joined(classes: U8, faint: U8) -> U8:
    """``faint`` (H, W) where it is connected (8 neighbours) to a pixel that ``classes`` (H, W) has, else 0.

    Both are classes, 0 the background; ``faint`` is above 0 wherever ``classes`` is.
    """
    label, count = ndimage.label(faint, np.ones((3, 3)), output=np.int32)
    keep = np.zeros(count + 1, bool)
    result = np.empty_like(faint)
    blocks = [slice(top, top + _ROWS) for top in range(0, len(faint), _ROWS)]
    for rows in blocks:
        keep[label[rows][classes[rows] > 0]] = True
    for rows in blocks:
        result[rows] = np.where(keep[label[rows]], faint[rows], 0)
    return result
