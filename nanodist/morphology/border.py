"""What the edge of the image does to sizes, and the weights that undo it.

An object that the border cuts has no size, and a large one is cut more often than a small one. Objects that lie wholly
inside are therefore weighted by the inverse of the share of positions in which they would (R. E. Miles, in *Stochastic
Geometry* (1974); C. Lantuejoul, *Microsc. Acta* 5 (1980); J. Serra, *Image Analysis and Mathematical Morphology*
(1982), ch. VIII): ``W H / ((W - w) (H - h))`` for a bounding box w x h. Cut ones get 0.
"""

from __future__ import annotations


def is_cut(box: tuple[slice, slice], shape: tuple[int, int]) -> bool:
    """Whether a bounding box (rows, columns) touches the border of an image."""
    rows, columns = box
    return rows.start <= 0 or columns.start <= 0 or rows.stop >= shape[0] or columns.stop >= shape[1]


def weight(box: tuple[slice, slice], shape: tuple[int, int]) -> float:
    """Miles-Lantuejoul weight of an object: 0 where the border cuts it, otherwise at least 1."""
    if is_cut(box, shape):
        return 0.0
    # An object counts as whole where a pixel of background is left on every side.
    height, width = box[0].stop - box[0].start + 2, box[1].stop - box[1].start + 2
    free = (shape[0] - height + 1) * (shape[1] - width + 1)
    return shape[0] * shape[1] / max(free, 1)
