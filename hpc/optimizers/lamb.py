"""LAMB: layer-wise adaptive moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hpc.optimizers.trust import TrustRatioOptimizer


class LAMB(TrustRatioOptimizer):
    """Adam whose update is scaled a parameter (You et al. 2020, *Large Batch Optimization for Deep Learning*, alg. 2).

    ``r = m / (sqrt(v) + eps) + weight_decay * w`` with both averages bias-corrected, ``w -= lr * |w| / |r| * r`` with
    norms over the whole parameter. The averages are of gradients: the learning rate comes after them. The ratio is 1
    where a norm is 0 and in groups with ``"adapt": False``; it is not clamped, and gradients are not normalised first.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; collective under ZeRO 1 and 2. ``closure`` is not used."""
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if p.grad is not None:
                self.state[p]["step"] += 1
        pieces = self._pieces(group)
        updates = self._moments(group, pieces.gradients, pieces.holders, pieces.of)
        torch._foreach_add_(updates, pieces.weights, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, self._ratios(group, pieces, updates))
        if pieces.owners:
            torch._foreach_add_(pieces.weights, updates, alpha=-group["lr"])

    def _moments(
        self,
        group: dict[str, Any],
        gradients: list[Tensor],
        holders: list[Tensor],
        of: Callable[[Callable[[Tensor], Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """The averages move on; bias-corrected ``m / (sqrt(v) + eps)`` of each piece."""
        if not gradients:
            return []
        first, second = group["betas"]
        m, v = of(lambda p: self.state[p]["exp_avg"]), of(lambda p: self.state[p]["exp_avg_sq"])
        torch._foreach_lerp_(m, gradients, 1 - first)
        torch._foreach_mul_(v, second)
        torch._foreach_addcmul_(v, gradients, gradients, value=1 - second)
        counts = {id(p): float(self.state[p]["step"]) for p in holders}
        steps = [counts[id(p)] for p in holders]
        below = torch._foreach_div(v, [1 - second**t for t in steps])
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, group["eps"])
        above = torch._foreach_div(m, [1 - first**t for t in steps])
        torch._foreach_div_(above, below)
        return list(above)
