"""BatchNorm over a fixed number of samples, whatever a rank holds.

A group is ``bn_group_size`` samples that follow each other in the global batch, of one view. Where a rank holds several
groups, each is normalised by itself; where a group spans ranks, its statistics are merged across them. Results and
gradients are then those of one process. Running statistics move once an optimizer step, by the mean over all groups,
and are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc import batch_norm_gpu
from hpc.collectives import Group, group_size
from hpc.errors import UserError
from hpc.world_sizes import check_world_size

T = TypeVar("T")
# Numbers of a layer's input that are in work at once on the CPU: 2 MiB in float32.
_CACHED = 2**19


class Layout:
    """Where BatchNorm groups lie; shared by all BatchNorm layers of a module.

    Args:
        bn_group_size: rows a group: samples of one view, or of both.
        local_batch_size: rows of one pass through a layer on this rank. Several passes (views) may go through at once,
            one below the other, and stay passes of their own: groups never reach from one into the next.
        world: group of all ranks, for running statistics; ``None`` for one process. Its own, so that these
            collectives never interleave with those of the engine.
        span: group of the ranks that share one BatchNorm group; ``None`` where a rank holds whole groups.

    Attributes:
        counting: only memory is counted (:mod:`hpc.planner`): of what is done piece by piece the first stands for all.
    """

    def __init__(self, bn_group_size: int, local_batch_size: int, world: Group = None, span: Group = None) -> None:
        if max(bn_group_size, local_batch_size) % min(bn_group_size, local_batch_size):
            raise UserError(
                f"bn_group_size {bn_group_size} and the {local_batch_size} samples of a rank do not divide each other"
            )
        if span is None and bn_group_size > local_batch_size:
            raise UserError(f"bn_group_size {bn_group_size} needs more than the {local_batch_size} samples of a rank")
        self.bn_group_size, self.local_batch_size = bn_group_size, local_batch_size
        self.world, self.span = world, span
        self.layers: list[GroupedBatchNorm] = []
        self.counting = False
        self._replaying = False
        self._room = torch.empty(0)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While it is open, what layers see does not count for the running statistics: it was seen before."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def note(self, layer: GroupedBatchNorm, statistics: Tensor) -> None:
        """Keep what a layer saw, (2, C), for the next update."""
        if not self._replaying:
            layer.seen.append(statistics)

    @property
    def chunk(self) -> int:
        """Samples of one group that this rank holds."""
        return min(self.bn_group_size, self.local_batch_size)

    def some(self, parts: list[T]) -> list[T]:
        """All of them, or the first where that stands for all."""
        return parts[:1] if self.counting else parts

    def pieces(self, samples: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """So many samples of each tensor at a time."""
        if self.counting:
            tensors = tuple(tensor[:samples] for tensor in tensors)
        yield from zip(*(tensor.split(samples) for tensor in tensors), strict=True)

    def room(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory in the shape and strides of ``like`` that the next call gives away again; new memory costs more than
        what is computed in it."""
        if self._room.numel() < like.numel() or (self._room.dtype, self._room.device) != (dtype, like.device):
            self._room = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._room.as_strided(like.shape, like.stride())

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks that share this rank's groups, in the batch's order, pass after pass.

        Args:
            rows: (passes * local_batch_size, ...) of this rank.
        """
        if self.span is None:
            return rows
        own = rows.unflatten(0, (-1, self.local_batch_size)).contiguous()
        parts = [torch.empty_like(own) for _ in range(group_size(self.span))]
        dist.all_gather(parts, own, group=self.span)
        return torch.cat(parts, 1).flatten(0, 1)

    def update_running_statistics(self) -> None:
        """Move the running statistics of every layer by what its groups saw since the last call, on all ranks."""
        active = [layer for layer in self.layers if layer.seen]
        if not active:
            return
        pending = torch.cat([torch.stack(layer.seen).mean(0).flatten() for layer in active])
        if self.world is not None:
            dist.all_reduce(pending, group=self.world)
            pending /= group_size(self.world)
        parts = pending.split([2 * layer.num_features for layer in active])
        _move(active, [part.view(2, -1) for part in parts])

    def forget(self) -> None:
        """Drop what was seen since the last update, without moving anything."""
        for layer in self.layers:
            layer.seen.clear()


def make_layout(
    global_batch_size: int, bn_group_size: int, rank: int, world_size: int, micro_batches: int = 1, views: int = 1
) -> Layout:
    """The :class:`Layout` of this rank; collective, since it makes process groups.

    Args:
        global_batch_size: samples a step.
        bn_group_size: samples a group.
        rank, world_size: this rank among all.
        micro_batches: parts of the global batch that all ranks pass over in turn.
        views: rows of one sample that share a group and follow each other; 1 where each view passes by itself.

    Raises:
        UserError: the world size cannot keep the groups; the legal ones are named.
    """
    check_world_size(global_batch_size, bn_group_size, world_size, micro_batches)
    local = global_batch_size // (world_size * micro_batches)
    if world_size == 1:
        return Layout(bn_group_size * views, local * views)
    world, span = dist.new_group(), None
    ranks = bn_group_size // local
    if ranks > 1:
        # Every rank has to take part in making every group.
        for first in range(0, world_size, ranks):
            members = list(range(first, first + ranks))
            made = dist.new_group(members)
            span = made if rank in members else span
    return Layout(bn_group_size * views, local * views, world, span)


class _GroupNormalise(torch.autograd.Function):
    """Normalisation by groups, from moments of each *sample* that are merged in float64 in the batch's order.

    A sample's moments do not depend on which rank holds it, and the merge is the same arithmetic everywhere. So the
    statistics, and with them every activation, come out equal to the last bit on any number of ranks. Merging sums of
    ranks would be off by a rounding, which flips a few ReLUs; gradients were seen to change by 4e-4.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        if batch_norm_gpu.fits(x):
            return _forward_on_gpu(ctx, batch_norm_gpu.one_piece(x), weight, bias, eps, layout)
        # (groups, samples of a group, mean and variance, C)
        moments = layout.gather(_moments(x, layout)).double().unflatten(0, (-1, layout.bn_group_size))
        statistics = moments.mean(1)
        # Chan et al. 1979 for equal counts: no cancellation, as from raw second moments.
        statistics[:, 1] += (moments[:, :, 0] - statistics[:, :1]).square_().mean(1)
        mean, var = statistics.to(weight.dtype).unbind(1)
        y = torch.empty_like(x)
        for out, part, m, v in layout.some(
            list(zip(y.split(layout.chunk), x.split(layout.chunk), mean, var, strict=True))
        ):
            _normalise(part, weight, bias, m, v, eps, out)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt_())
        ctx.layout, ctx.eps, ctx.count = layout, eps, layout.bn_group_size * x[0, 0].numel()
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Any, Any, None, None]:
        # Roundings here differ between topologies, but change gradients in proportion: the ReLUs are decided already.
        x, weight, mean, invstd = ctx.saved_tensors
        layout: Layout = ctx.layout
        if batch_norm_gpu.fits(x):
            return *_backward_on_gpu(ctx, dy, x, weight, mean, invstd), None, None
        parts = list(zip(dy.split(layout.chunk), x.split(layout.chunk), mean, invstd, strict=True))
        # Results of several groups are copied together, which takes longer than writing them where they belong, but
        # for the many steps that bf16 takes there.
        if layout.span is None and (len(parts) == 1 or x.dtype != weight.dtype):
            made = [_backward(*part, weight, ctx.eps, whole=True) for part in parts]
            dx = made[0][0] if len(made) == 1 else torch.cat([m[0] for m in made])
            return dx, sum(m[1] for m in made), sum(m[2] for m in made), None, None
        return *_backward_by_groups(parts, x, weight, ctx), None, None


def _forward_on_gpu(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    parts = layout.gather(batch_norm_gpu.moments(x))
    mean, var, invstd = batch_norm_gpu.merged(parts, layout.bn_group_size, eps)
    ctx.save_for_backward(x, weight, mean, invstd)
    ctx.layout, ctx.count = layout, layout.bn_group_size * x[0, 0].numel()
    ctx.mark_non_differentiable(mean, var)
    return batch_norm_gpu.normalised(x, mean, weight * invstd, bias, layout.chunk), mean, var


def _backward_on_gpu(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    layout: Layout = ctx.layout
    dy = batch_norm_gpu.like(dy, x)
    sums = batch_norm_gpu.sums(dy, x, mean, layout.chunk)
    d_bias, d_weight = sums[0].sum(0), (sums[1] * invstd).sum(0)
    if layout.span is not None:
        dist.all_reduce(sums, group=layout.span)
    scale = weight * invstd
    mean_dy, mean_dyx = sums / ctx.count
    factors = (scale, -scale * invstd.square() * mean_dyx, -scale * mean_dy)
    return batch_norm_gpu.combined(dy, x, mean, factors, layout.chunk), d_weight, d_bias


def _backward_by_groups(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], x: Tensor, weight: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, weight and bias, where groups span ranks or are several."""
    layout: Layout = ctx.layout
    own = [torch.stack(_backward(*part, weight, ctx.eps, whole=False)[1:]) for part in layout.some(parts)]
    sums = torch.stack(own * (len(parts) // len(own)))
    d_weight, d_bias = sums.sum(0)
    if layout.span is not None:
        dist.all_reduce(sums, group=layout.span)
    sums /= ctx.count
    dx = torch.empty_like(x)
    todo = list(zip(parts, dx.split(len(parts[0][1])), sums, strict=True))
    for (dy, part, mean, invstd), out, (mean_dyx, mean_dy) in layout.some(todo):
        scale = weight * invstd
        slope = -scale * invstd * mean_dyx
        shift = -scale * mean_dy - slope * mean
        _combine(dy, scale, part, slope, shift, layout, out)
    return dx, d_weight, d_bias


def _combine(dy: Tensor, scale: Tensor, x: Tensor, slope: Tensor, shift: Tensor, layout: Layout, out: Tensor) -> None:
    """Write ``dy * scale + x * slope + shift``, factors by channel, to ``out``, in the precision of the factors.

    A few samples at a time, as in :func:`_moments`.
    """
    scale, slope, shift = (_like(v[None], x) for v in (scale, slope, shift))
    for a, b, made in layout.pieces(_at_once(x), dy, x, out):
        if made.dtype == scale.dtype:
            torch.addcmul(shift, b, slope, out=made)
            made.addcmul_(a, scale)
        else:
            wide = layout.room(b, scale.dtype).copy_(b)
            made.copy_(wide.mul_(slope).add_(shift).addcmul_(a.to(scale.dtype), scale))


def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, eps: float, *, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's backward of BatchNorm for a group that this rank holds ``whole``; else only weight and bias are right."""
    var = None if whole else invstd.pow(-2) - eps
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None if whole else mean, var, mean, invstd, whole, eps, [whole, True, True]
    )
    return dx, d_weight, d_bias


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor) -> None:
    """Write to ``out`` what ``x`` (n, C, ...) becomes with these statistics (C,)."""
    unused = torch.empty(0, dtype=weight.dtype, device=x.device)
    torch.ops.aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused.clone()
    )


def _at_once(x: Tensor) -> int:
    """Samples that are in work at once."""
    return max(1, _CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)


def _moments(x: Tensor, layout: Layout) -> Tensor:
    """Mean and variance (n, 2, C) of each sample of ``x`` (n, C, ...) over its pixels, in float32 or float64.

    On the CPU a few samples at a time and in the same memory, so that what lies between the passes over them stays in
    the cache; no sample's sums depend on how many are taken.
    """
    count, channels = x[0, 0].numel(), x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    moments = torch.empty(len(x), 2, channels, dtype=wide, device=x.device)
    # Of ``x`` in one of its layouts, so that a part of it is one piece of memory.
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    for part, made in layout.pieces(_at_once(x), x, moments):
        room = layout.room(part, wide)
        values = part if part.dtype == wide else room.copy_(part)
        mean = _spatial_sum(values).div_(count)
        made[:, 0] = mean
        # Difference and square in one pass.
        torch.ops.aten.mse_loss.out(values, _like(mean, x).expand_as(values), 0, out=room)
        made[:, 1] = _spatial_sum(room).div_(count)
    return moments


def _spatial_sum(x: Tensor) -> Tensor:
    """(n, C, ...) summed to (n, C)."""
    return x.sum(tuple(range(2, x.dim()))) if x.dim() > 2 else x.clone()


def _like(values: Tensor, x: Tensor) -> Tensor:
    """(n, C) shaped to broadcast over ``x`` (n, C, ...)."""
    return values.reshape(*values.shape, *([1] * (x.dim() - 2)))


class GroupedBatchNorm(nn.Module):
    """Drop-in for ``nn.BatchNorm1d`` and ``nn.BatchNorm2d`` with the same parameter and buffer names.

    Args:
        old: the layer to take the place of, with its weights; a timm ``BatchNormAct2d``'s activation is kept.
        layout: where the groups lie.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, old: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.num_features, self.eps = int(old.num_features), float(old.eps)  # type: ignore[arg-type]
        self.momentum = float(old.momentum)  # type: ignore[arg-type]
        weight, bias = old.weight, old.bias
        if weight is None or bias is None:
            raise ValueError("BatchNorm without weight and bias is not supported")
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(old, name))
        self.drop, self.act = getattr(old, "drop", None), getattr(old, "act", None)
        self.layout = layout
        self.seen: list[Tensor] = []
        layout.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (n, C, ...): by its groups in training, by the running statistics in evaluation."""
        if self.training:
            y = self._by_groups(x)
        else:
            y = nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        y = y if self.drop is None else self.drop(y)
        return y if self.act is None else self.act(y)

    def _by_groups(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.layout.local_batch_size:
            raise ValueError(
                f"got {x.shape[0]} samples, which are no whole passes of the {self.layout.local_batch_size} declared"
            )
        y, means, variances = _GroupNormalise.apply(x, self.weight, self.bias, self.eps, self.layout)
        count = self.layout.bn_group_size * x[0, 0].numel()
        seen = torch.stack([means, variances]).mean(1)
        seen[1] *= count / max(count - 1, 1)  # running variances are unbiased, as torch's are
        self.layout.note(self, seen)
        return y  # type: ignore[no-any-return]


def _move(layers: list[GroupedBatchNorm], statistics: list[Tensor]) -> None:
    """Move the running statistics of ``layers`` towards ``statistics`` (2, C: mean, variance) by their momentum.

    All layers of one momentum together, as a GPU waits for the launch of each small call.
    """
    for momentum in dict.fromkeys(layer.momentum for layer in layers):
        same = [(layer, seen) for layer, seen in zip(layers, statistics, strict=True) if layer.momentum == momentum]
        old = [old for layer, _ in same for old in (layer.running_mean, layer.running_var)]
        new = [half.to(layer.running_mean) for layer, seen in same for half in seen.unbind()]
        torch._foreach_lerp_(old, new, momentum)
        torch._foreach_add_([layer.num_batches_tracked for layer, _ in same], 1)
    for layer in layers:
        layer.seen.clear()


def convert(module: nn.Module, layout: Layout) -> nn.Module:
    """Put a :class:`GroupedBatchNorm` in the place of every BatchNorm inside ``module`` and return it."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            setattr(module, name, GroupedBatchNorm(child, layout))
        else:
            convert(child, layout)
    return module
