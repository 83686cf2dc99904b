"""Collectives with exact gradients for losses over the global batch.

The convention: every rank returns the same value of *one* loss, and its backward gives that rank's part of the
gradient; the sum of the parts over the ranks is the gradient. What is right in the backward then depends on who uses
a reduced value: if every rank computes the same thing from it, its gradient is complete already
(:func:`sum_of_shares`); if each rank goes on with rows of its own, the parts must be summed
(:func:`all_reduce_sum`, :func:`gather_rows`).

``group=None`` stands for this process alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

Group = Any  # torch.distributed.ProcessGroup, or None for one process


def group_size(group: Group) -> int:
    """Number of ranks in ``group``."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This process's place in ``group``."""
    return 0 if group is None else dist.get_rank(group)


def _reduced(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _SumOfShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduced(gradient, ctx.group), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(group_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = _reduced(gradient, ctx.group)
        return total.narrow(0, group_rank(ctx.group) * ctx.rows, ctx.rows), None


def sum_of_shares(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks of a value from which every rank goes on computing the *same* thing, such as the loss."""
    return x if group is None else _SumOfShares.apply(x, group)  # type: ignore[no-any-return]


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks of a value that each rank applies to *its own* rows, such as a batch mean."""
    return x if group is None else _AllReduceSum.apply(x, group)  # type: ignore[no-any-return]


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """Rows (n, ...) of every rank as (world_size * n, ...) in rank order; each rank then uses them its own way."""
    return x if group is None else _GatherRows.apply(x, group)  # type: ignore[no-any-return]


def any_rank(flag: bool, group: Group, device: torch.device | str = "cpu") -> bool:
    """Whether ``flag`` is true on at least one rank; all ranks get the same answer."""
    if group is None:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item() > 0)


def every(own: T, world: Group) -> list[T]:
    """``own`` of all ranks, in rank order; collective."""
    if world is None:
        return [own]
    values: list[T] = [own] * group_size(world)
    dist.all_gather_object(values, own, group=world)
    return values
