"""The kernels of :mod:`nanodist.objectives.nt_xent_gpu`; imported where they run, as Triton comes with a GPU's torch.

A program takes ``M`` views and goes over ``columns`` of all, ``N`` at a time: similarities live and die in registers.
Every sum is taken in the order of the columns, whatever rank has the rows.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl


@triton.jit
def _views(z, at, total, width, D: tl.constexpr):
    """Views (len(at), D), zeros where there are none."""
    d = tl.arange(0, D)
    there = (at < total)[:, None] & (d < width)[None, :]
    return tl.load(z + at[:, None].to(tl.int64) * width + d[None, :], mask=there, other=0.0)


@triton.jit
def _similar(x, y, i, j, kin_of_i, kin, total, CROSS: tl.constexpr, PRECISION: tl.constexpr):
    """Similarities (M, N) of views ``x`` and ``y``, minus infinity where they are not held against each other."""
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    kin_of_j = tl.load(kin + j, mask=j < total, other=-1)
    held = (kin_of_i[:, None] != kin_of_j[None, :]) & (j < total)[None, :]
    if CROSS:
        held = held & ((i < total // 2)[:, None] != (j < total // 2)[None, :])
    return tl.where(held, s, float("-inf"))


@triton.jit
def log2_sums(
    z,
    kin,
    made,
    first,
    last,
    total,
    width,
    columns,
    CROSS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """log2 of the sum over j of 2^s_ij, for the rows from ``first`` to ``last``; minus infinity where there is none."""
    i = first + tl.program_id(0) * M + tl.arange(0, M)
    x = _views(z, i, total, width, D)
    kin_of_i = tl.load(kin + i, mask=i < total, other=-2)
    most, sums = tl.full((M,), -1e30, tl.float32), tl.zeros((M,), tl.float32)
    left = tl.program_id(1) * columns
    for start in range(left, tl.minimum(left + columns, total), N):
        j = start + tl.arange(0, N)
        s = _similar(x, _views(z, j, total, width, D), i, j, kin_of_i, kin, total, CROSS, PRECISION)
        higher = tl.maximum(most, tl.max(s, 1))
        sums = sums * tl.exp2(most - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        most = higher
    out = made + tl.program_id(1).to(tl.int64) * total
    tl.store(out + i, tl.where(sums > 0, most + tl.log2(sums), float("-inf")), mask=i < last)


@triton.jit
def gradient(
    z,
    kin,
    known,
    made,
    first,
    last,
    total,
    width,
    columns,
    CROSS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Sum over j of (2^(s_ij - known_i) + 2^(s_ij - known_j)) z_j, as a pair of views meets both ways."""
    i = first + tl.program_id(0) * M + tl.arange(0, M)
    x = _views(z, i, total, width, D)
    kin_of_i = tl.load(kin + i, mask=i < total, other=-2)
    known_i = tl.load(known + i, mask=i < total, other=0.0)
    sums = tl.zeros((M, D), tl.float32)
    left = tl.program_id(1) * columns
    for start in range(left, tl.minimum(left + columns, total), N):
        j = start + tl.arange(0, N)
        y = _views(z, j, total, width, D)
        s = _similar(x, y, i, j, kin_of_i, kin, total, CROSS, PRECISION)
        known_j = tl.load(known + j, mask=j < total, other=0.0)
        weights = tl.exp2(s - known_i[:, None]) + tl.exp2(s - known_j[None, :])
        sums += tl.dot(weights.to(y.dtype), y, input_precision=PRECISION)
    d = tl.arange(0, D)
    there = (i < last)[:, None] & (d < width)[None, :]
    out = made + tl.program_id(1).to(tl.int64) * total * width
    tl.store(out + i[:, None].to(tl.int64) * width + d[None, :], sums, mask=there)
