"""Two thresholds in place of one: what is likely enough by itself, and what is fainter and continues it.

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
_CROSS = ndimage.generate_binary_structure(2, 1)
_ROWS = 512


def faint_classes(likely: F32, low: float) -> U8:
    """Of probabilities (classes, rows, W) the likeliest class but 0 where all but 0 have ``low`` together, else 0."""
    return np.where(1.0 - likely[0] >= low, likely[1:].argmax(0) + 1, 0).astype(np.uint8)


def joined(classes: U8, faint: U8) -> U8:
    """``classes`` (H, W), and of ``faint`` (H, W) what hangs together with them and is no rim of theirs.

    Faint pixels count that are connected (8 neighbours) to a pixel of ``classes``. As edges are blurred, every object
    has a rim of them, which would make all wires wider: they are added around those that are no neighbours of
    ``classes``, and in gaps of up to two pixels.

    Both are classes, 0 the background; ``faint`` is above 0 wherever ``classes`` is.
    """
    sure = classes > 0
    found = _connected(sure, faint)
    beyond = found & ~ndimage.binary_dilation(sure, _CROSS)
    more = ndimage.binary_dilation(beyond, _CROSS, iterations=2)
    # Continued beyond the border, which the closing would take for background.
    more |= ndimage.binary_closing(np.pad(sure, 1, mode="edge"), _CROSS)[1:-1, 1:-1]
    return np.where(sure, classes, np.where(more & found, faint, 0)).astype(np.uint8)


def _connected(sure: npt.NDArray[np.bool_], faint: U8) -> npt.NDArray[np.bool_]:
    """(H, W) where ``faint`` is connected to a pixel of ``sure``."""
    label, count = ndimage.label(faint, np.ones((3, 3)), output=np.int32)
    keep = np.zeros(count + 1, bool)
    result = np.empty_like(sure)
    blocks = [slice(top, top + _ROWS) for top in range(0, len(faint), _ROWS)]
    for rows in blocks:
        keep[label[rows][sure[rows]]] = True
    for rows in blocks:
        result[rows] = keep[label[rows]]
    return result
