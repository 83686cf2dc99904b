"""A loss whose gradient is worked out by hand, together with its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of detached views a and b (n, d): the loss and, where the flag asks for them, its gradients in the loss's precision.
Rule = Callable[[Tensor, Tensor, bool], tuple[Tensor, tuple[Tensor, Tensor] | None]]


def wide(x: Tensor) -> Tensor:
    """``x`` in the precision in which sums are taken: float64 as it is, anything else in float32."""
    return x if x.dtype == torch.float64 else x.float()


class _Given(torch.autograd.Function):
    """Works out the gradient in the forward, where what it shares with the value is still at hand.

    So every collective of an objective is in its forward, and none can interleave with an engine's in the backward.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rule: Rule) -> Tensor:
        loss, ctx.gradients = rule(a.detach(), b.detach(), True)
        ctx.rule = rule
        ctx.save_for_backward(a, b)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        # Scaled in place and given away, as copies would add half to the peak memory; a second backward through a
        # kept graph is rare and pays with the work.
        gradients, ctx.gradients = ctx.gradients or ctx.rule(a.detach(), b.detach(), True)[1], None
        return *(g.mul_(upstream).to(x.dtype) for g, x in zip(gradients, (a, b), strict=True)), None


def differentiable(a: Tensor, b: Tensor, rule: Rule) -> Tensor:
    """The loss that ``rule`` gives for ``a`` and ``b``, with its gradients where autograd asks for them.

    The gradient of the loss itself must be the same on every rank, as it is when each calls ``backward`` on it.
    """
    with torch.autocast(a.device.type, enabled=False):  # precision is chosen by the rule, product by product
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return _Given.apply(a, b, rule)  # type: ignore[no-any-return]
        return rule(a.detach(), b.detach(), False)[0]
