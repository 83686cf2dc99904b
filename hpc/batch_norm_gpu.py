"""BatchNorm by groups in as few passes over a GPU's memory as there can be: one kernel a pass, for all groups at once.

Written in Triton, which torch brings for GPUs. The arithmetic is that of :mod:`hpc.batch_norm`: a sample's moments do
not depend on the others, and groups are merged in float64 by the samples' places, so that the statistics come out equal
to the last bit however the batch is spread. Images may lie in either memory layout; every kernel takes blocks of pixels
by channels of one sample and strides of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc.devices import triton_there

# Numbers that a kernel has in work at once.
_TILE = 4096


def fits(x: Tensor) -> bool:
    """Whether ``x`` (n, C, H, W) is for these kernels."""
    return x.is_cuda and x.dim() == 4 and triton_there()


def one_piece(x: Tensor) -> Tensor:
    """``x`` (n, C, H, W), copied only where it lies in neither memory layout."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


class _Shape:
    """How kernels walk ``x``: blocks of pixels by channels, the inner one of which lies together in memory."""

    def __init__(self, x: Tensor) -> None:
        self.n, self.channels, self.pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
        last = x.is_contiguous(memory_format=torch.channels_last) and self.channels > 1
        most = _power(self.channels if last else self.pixels)
        inner = min(most, 64 if last else 1024)
        outer = min(_power(self.pixels if last else self.channels), max(1, _TILE // inner))
        self.block_p, self.block_c = (outer, inner) if last else (inner, outer)
        stride_p, stride_c = (self.channels, 1) if last else (1, self.pixels)
        self.layout = (self.channels, self.pixels, self.channels * self.pixels, stride_p, stride_c)
        self.blocks = {"P": self.block_p, "C": self.block_c}

    def by_channel(self) -> tuple[int, int]:
        """Programs that go over all pixels of a sample."""
        return self.n, -(-self.channels // self.block_c)

    def by_block(self) -> tuple[int, int, int]:
        """Programs of one block each."""
        return self.n, -(-self.channels // self.block_c), -(-self.pixels // self.block_p)


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def moments(x: Tensor) -> Tensor:
    """Mean and variance (n, 2, C) of each sample of ``x`` over its pixels, in float32 or float64."""
    from hpc import batch_norm_kernels as kernels

    shape = _Shape(x)
    made = torch.empty(shape.n, 2, shape.channels, dtype=_wide(x), device=x.device)
    _launch(kernels.moments, shape.by_channel(), x, made, *shape.layout, **shape.blocks)
    return made


def merged(parts: Tensor, group: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and 1 / sqrt(variance + eps), (groups, C) each, from the moments (N, 2, C) of samples."""
    from hpc import batch_norm_kernels as kernels

    channels, groups = parts.shape[2], len(parts) // group
    made = parts.new_empty(3, groups, channels)
    block_c = min(_power(channels), 32)
    blocks = {"N": min(_power(group), 64), "C": block_c}
    _launch(kernels.merge, (groups, -(-channels // block_c)), parts, made, group, channels, groups, EPS=eps, **blocks)
    return made[0], made[1], made[2]


def normalised(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, chunk: int) -> Tensor:
    """``(x - mean) * scale + bias`` with mean and scale (groups, C) of each ``chunk`` samples, in the type of ``x``."""
    from hpc import batch_norm_kernels as kernels

    shape, y = _Shape(x), torch.empty_like(x)
    _launch(kernels.normalise, shape.by_block(), x, y, mean, scale, bias, chunk, *shape.layout, **shape.blocks)
    return y


def sums(dy: Tensor, x: Tensor, mean: Tensor, chunk: int) -> Tensor:
    """Sums of ``dy`` and of ``dy * (x - mean)`` over the samples of each ``chunk``, (2, groups, C)."""
    from hpc import batch_norm_kernels as kernels

    shape = _Shape(x)
    made = torch.empty(2, shape.n, shape.channels, dtype=_wide(x), device=x.device)
    _launch(kernels.sums, shape.by_channel(), dy, x, mean, made, chunk, shape.n, *shape.layout, **shape.blocks)
    return made.view(2, -1, chunk, shape.channels).sum(2)


def combined(dy: Tensor, x: Tensor, mean: Tensor, factors: tuple[Tensor, Tensor, Tensor], chunk: int) -> Tensor:
    """``dy * scale + (x - mean) * slope + shift`` with ``factors`` (groups, C) of each ``chunk`` samples."""
    from hpc import batch_norm_kernels as kernels

    shape, dx = _Shape(x), torch.empty_like(x)
    given = (dy, x, dx, mean, *factors, chunk)
    _launch(kernels.combine, shape.by_block(), *given, *shape.layout, **shape.blocks)
    return dx


def like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the memory layout of ``x``."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **fixed: float) -> None:
    kernel[grid](*arguments, **fixed)
