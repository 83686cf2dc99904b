"""Exchanges between ranks for objectives that work out their gradients by hand; nothing here is seen by autograd.

``group=None`` stands for this process alone, as in :mod:`hpc.collectives`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpc.collectives import Group, group_rank, group_size


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Sum of a contiguous ``x`` over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def largest_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Elementwise maximum of a contiguous ``x`` over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def rows_of_all(x: Tensor, out: Tensor, group: Group) -> Tensor:
    """Rows (n, ...) of every rank in rank order, written into a contiguous ``out`` (world_size * n, ...)."""
    if group is None:
        return out.copy_(x)
    dist.all_gather_into_tensor(out, x.to(out.dtype).contiguous(), group=group)
    return out


def _widths(columns: int, group: Group) -> list[int]:
    """Columns of each rank: as even as can be, the first ranks having one more."""
    each, more = divmod(columns, group_size(group))
    return [each + (rank < more) for rank in range(group_size(group))]


def rows_to_columns(x: Tensor, group: Group) -> Tensor:
    """From a rank's rows (n, d), all columns, to all rows (N, d_rank) of that rank's share of the columns."""
    if group is None:
        return x
    widths = _widths(x.shape[1], group)
    own = widths[group_rank(group)]
    sent = torch.cat([part.reshape(-1) for part in x.split(widths, 1)])
    received = sent.new_empty(x.shape[0] * own * len(widths))
    dist.all_to_all_single(
        received, sent, [x.shape[0] * own] * len(widths), [x.shape[0] * w for w in widths], group=group
    )
    return received.view(-1, own)


def columns_to_rows(x: Tensor, columns: int, group: Group) -> Tensor:
    """The way back from :func:`rows_to_columns`: (N, d_rank) to (n, d) with ``columns`` = d."""
    if group is None:
        return x
    widths = _widths(columns, group)
    n = x.shape[0] // len(widths)
    received = x.new_empty(n * columns)
    dist.all_to_all_single(
        received, x.reshape(-1), [n * w for w in widths], [n * x.shape[1]] * len(widths), group=group
    )
    return torch.cat([part.view(n, -1) for part in received.split([n * w for w in widths])], 1)
