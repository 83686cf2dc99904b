"""How good a mask is likely to be, by the probabilities that it was made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Pixels that are added to both sides of the ratio, as a share of the micrograph: where a class covers less than this,
# a few doubtful pixels are no bad mask.
SLACK = 0.01


class DicePromise:
    """The Dice that a network's own probabilities promise for its masks, gathered strip by strip.

    Of class c with probabilities p and the mask m that is predicted it is ``(2 sum(p m) + s) / (sum(p) + sum(m) + s)``:
    the expected overlap over the expected sizes, were the probabilities right, with ``s`` 1 % of the pixels. Unlike an
    entropy it does not grow with the length of the outlines alone.

    The background counts as a class: on real figures that made the promise a little truer.

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self._sums = np.zeros((3, classes))
        self._pixels = 0

    def add(self, likely: npt.NDArray[np.floating], classes: npt.NDArray[Any]) -> None:
        """More rows: probabilities (classes, H, W), and the places (H, W) of the classes that are predicted."""
        self._pixels += classes.size
        for place, p in enumerate(likely):
            mask = classes == place
            self._sums[:, place] += (p.sum(dtype=np.float64), p.sum(where=mask, dtype=np.float64), mask.sum())

    def dice(self) -> float:
        """The mean over the classes that are there; 1 where the probabilities are certain."""
        soft, both, hard = self._sums
        slack = SLACK * self._pixels
        each = (2 * both + slack) / (soft + hard + slack)
        return float(each[soft + hard > slack].mean())
