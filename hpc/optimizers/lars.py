"""LARS: layer-wise adaptive rate scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hpc.optimizers.trust import TrustRatioOptimizer
from hpc.sections import MomentumOrder


class LARS(TrustRatioOptimizer):
    """SGD with momentum whose rate is scaled a parameter (You et al. 2017, *Large Batch Training of Convolutional
    Networks*).

    With ``g`` the gradient plus ``weight_decay * w`` and ``q = trust_coefficient * |w| / |g|``, both norms over the
    whole parameter (the form of the SimCLR and Barlow Twins references; the paper has ``|grad| + decay * |w|`` below):

    - ``"lr_then_momentum"``: ``v = momentum * v + lr * q * g``, ``w -= v``: the paper and SimCLR.
    - ``"momentum_then_lr"``: ``v = momentum * v + q * g``, ``w -= lr * v``: Barlow Twins, and PyTorch's SGD.

    They differ where the learning rate changes. ``q`` is 1 where a norm is 0 and in groups with ``"adapt": False``.
    """

    _coefficient = "trust_coefficient"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        momentum_order: MomentumOrder = "lr_then_momentum",
    ) -> None:
        self._order = momentum_order
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; collective under ZeRO 1 and 2. ``closure`` is not used."""
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        pieces = self._pieces(group)
        updates = list(torch._foreach_add(pieces.gradients, pieces.weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            ratios = self._ratios(group, pieces, updates)
            torch._foreach_mul_(updates, [ratio * group["trust_coefficient"] for ratio in ratios])
        if not pieces.owners:
            return
        buffers = pieces.of(lambda p: self.state[p]["momentum_buffer"])
        inside = self._order == "lr_then_momentum"
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=group["lr"] if inside else 1.0)
        torch._foreach_add_(pieces.weights, buffers, alpha=-1.0 if inside else -group["lr"])
