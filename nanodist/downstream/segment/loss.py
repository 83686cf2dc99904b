"""Cross entropy and Dice of segmentations, image by image, so that the loss does not couple the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dice_and_cross_entropy(logits: Tensor, classes: Tensor, dice_weight: float) -> Tensor:
    """Loss (n,) of each image: cross entropy over its pixels, plus ``dice_weight`` times 1 - mean soft Dice.

    The Dice coefficient of a class is 2 sum(p t) / (sum(p) + sum(t)) (Milletari et al. 2016, unsquared), over the
    pixels of the image, and its mean goes over the classes that the image shows.

    Args:
        logits: (n, classes, S, S).
        classes: (n, S, S) class numbers.
    """
    entropy = functional.cross_entropy(logits, classes, reduction="none").mean((1, 2))
    if not dice_weight:
        return entropy
    likely = logits.softmax(1)
    truth = functional.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(likely.dtype)
    both, either = (likely * truth).sum((2, 3)), (likely + truth).sum((2, 3))
    shown = (truth.sum((2, 3)) > 0).to(likely.dtype)
    dice = (2 * both / either.clamp_min(1e-6) * shown).sum(1) / shown.sum(1)
    return entropy + dice_weight * (1 - dice)


def mean_iou(predicted: Tensor, classes: Tensor, count: int) -> float:
    """Mean hard IoU over the classes that one image shows or that were predicted in it, (H, W) each."""
    values = []
    for c in range(count):
        a, b = predicted == c, classes == c
        either = int(torch.logical_or(a, b).sum())
        if either:
            values.append(int(torch.logical_and(a, b).sum()) / either)
    return sum(values) / len(values)
