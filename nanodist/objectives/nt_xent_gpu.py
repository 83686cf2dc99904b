"""Sums of NT-Xent on a GPU, where no similarity ever reaches the memory: as in FlashAttention (Dao et al. 2022).

The tensor cores make twice the products that symmetry asks for faster than memory could take half of the results, so
each rank goes over all columns for its own share of the rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hpc.collectives import Group, group_rank, group_size
from hpc.devices import triton_there
from nanodist.objectives.exchange import sum_over_ranks
from nanodist.objectives.tiles import Form

# Rows and columns of a block, and the warps that work on it: the largest that fits is taken.
_SHAPES = ((64, 64, 4), (64, 32, 4))
# Programs that keep a GPU busy: where there are fewer blocks of rows, the columns are parted as well. A function of the
# batch alone, so that sums are taken in one order on any number of ranks and on any GPU.
_PROGRAMS = 512


def fits(z: Tensor) -> bool:
    """Whether views (2N, d) are for these kernels: float32 or bf16, on a GPU with room for a block of them."""
    if not z.is_cuda or z.dtype not in (torch.float32, torch.bfloat16) or not triton_there():
        return False
    return torch.cuda.get_device_capability(z.device) >= (8, 0) and _shape(z) is not None


def _shape(z: Tensor) -> tuple[int, int, int] | None:
    """The largest of the shapes for which a GPU's shared memory has room."""
    room = torch.cuda.get_device_properties(z.device).shared_memory_per_block_optin if z.is_cuda else 2**20
    return next((shape for shape in _SHAPES if _bytes(shape, z) <= room), None)


def _bytes(shape: tuple[int, int, int], z: Tensor) -> int:
    """What Triton takes: the rows and three blocks of columns in flight, and float32 split into parts of TF32."""
    rows, columns, _ = shape
    parts = rows + columns if z.dtype == torch.float32 else 0
    return _width(z) * (z.element_size() * (rows + 3 * columns) + 4 * parts) + 4096


def _width(z: Tensor) -> int:
    return max(16, 1 << (z.shape[1] - 1).bit_length())


class SumsOnGPU:
    """Sums over the negatives of each view, and products with their weights; all exponents are of 2.

    Products of float32 are three of TF32 each, which gives float32's digits on tensor cores.

    Args:
        z: all views (2N, d), contiguous.
        kin: (N,) integers; views of samples with equal numbers are not held against each other. ``None``: all differ.
        form: which pairs of views are held against each other.
        group: the rows are shared out over its ranks.
    """

    def __init__(self, z: Tensor, kin: Tensor | None, form: Form, group: Group) -> None:
        total = len(z)
        rows, columns, warps = _shape(z) or _SHAPES[-1]
        each = torch.arange(total // 2, device=z.device)
        numbers = each if kin is None else torch.unique(kin, return_inverse=True)[1]
        self.z, self.kin, self.group = z, numbers.int().repeat(2), group
        share = -(-total // group_size(group))
        parts = max(1, _PROGRAMS // -(-total // 64))
        self.columns = -(-total // (64 * parts)) * 64
        self.parts = -(-total // self.columns)
        self.first = min(total, group_rank(group) * share)
        self.last = min(total, self.first + share)
        self.fixed: dict[str, Any] = {
            "CROSS": form == "cross_view",
            "PRECISION": "tf32x3" if z.dtype == torch.float32 else "tf32",
            "M": rows,
            "N": columns,
            "D": _width(z),
            "num_warps": warps,
        }

    def log2(self) -> Tensor:
        """log2 of the sum over the negatives of each view (2N,); minus infinity where there is none."""
        from nanodist.objectives import nt_xent_kernels as kernels

        made = self.z.new_zeros(self.parts, len(self.z), dtype=torch.float32)
        self._launch(kernels.log2_sums, made)
        return sum_over_ranks(self._joined(made), self.group)

    def _joined(self, parts: Tensor) -> Tensor:
        """log2 of the sum (2N,) of the rows of this rank, by that of each part of the columns."""
        if len(parts) == 1:
            return parts[0]
        whole = torch.logsumexp(parts * math.log(2), 0).div_(math.log(2))
        whole[: self.first] = 0
        whole[self.last :] = 0
        return whole

    def gradient(self, log2_sums: Tensor) -> Tensor:
        """Sum over the negatives of each view of weight times view, (2N, d), by ``log2_sums`` (2N,) of all terms."""
        from nanodist.objectives import nt_xent_kernels as kernels

        made = self.z.new_zeros(self.parts, *self.z.shape, dtype=torch.float32)
        self._launch(kernels.gradient, log2_sums.contiguous(), made)
        return sum_over_ranks(made.sum(0), self.group)

    def _launch(self, kernel: Any, *tensors: Tensor) -> None:
        grid = (max(1, -(-(self.last - self.first) // self.fixed["M"])), self.parts)
        kernel[grid](self.z, self.kin, *tensors, self.first, self.last, *self.z.shape, self.columns, **self.fixed)
