"""The kernels of :mod:`hpc.batch_norm_gpu`; imported where they run, since Triton is there only with a GPU's torch.

Shapes: ``x`` (n, C, pixels) with the strides given; ``P`` and ``C`` are the pixels and channels of a block.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl


@triton.jit
def _place(channels, pixels, by_sample, by_pixel, by_channel, sample, c, p):
    """Offsets (P, C) of a block, and which of them exist."""
    there = (p < pixels)[:, None] & (c < channels)[None, :]
    return sample.to(tl.int64) * by_sample + p[:, None] * by_pixel + c[None, :] * by_channel, there


@triton.jit
def moments(x, made, channels, pixels, by_sample, by_pixel, by_channel, P: tl.constexpr, C: tl.constexpr):
    """Mean and variance of each channel of a sample; the second pass finds it in the cache."""
    sample, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    wide = made.dtype.element_ty
    total = tl.zeros((P, C), wide)
    for first in range(0, pixels, P):
        at, there = _place(channels, pixels, by_sample, by_pixel, by_channel, sample, c, first + tl.arange(0, P))
        total += tl.load(x + at, mask=there, other=0.0).to(wide)
    mean = tl.sum(total, 0) / pixels
    square = tl.zeros((P, C), wide)
    for first in range(0, pixels, P):
        at, there = _place(channels, pixels, by_sample, by_pixel, by_channel, sample, c, first + tl.arange(0, P))
        off = tl.where(there, tl.load(x + at, mask=there, other=0.0).to(wide) - mean[None, :], 0.0)
        square += off * off
    out = made + sample * 2 * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + channels, tl.sum(square, 0) / pixels, mask=c < channels)


@triton.jit
def merge(parts, made, group, channels, groups, EPS: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Moments of the samples of a group as one, in float64, by the samples' places (Chan et al. 1979)."""
    which, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    start = parts + which.to(tl.int64) * group * 2 * channels
    total, within = tl.zeros((N, C), tl.float64), tl.zeros((N, C), tl.float64)
    for first in range(0, group, N):
        n = first + tl.arange(0, N)
        there = (n < group)[:, None] & (c < channels)[None, :]
        at = n[:, None] * 2 * channels + c[None, :]
        total += tl.load(start + at, mask=there, other=0.0).to(tl.float64)
        within += tl.load(start + at + channels, mask=there, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / group
    between = tl.zeros((N, C), tl.float64)
    for first in range(0, group, N):
        n = first + tl.arange(0, N)
        there = (n < group)[:, None] & (c < channels)[None, :]
        one = tl.load(start + n[:, None] * 2 * channels + c[None, :], mask=there, other=0.0).to(tl.float64)
        off = tl.where(there, one - mean[None, :], 0.0)
        between += off * off
    var = (tl.sum(within, 0) + tl.sum(between, 0)) / group
    out, inside = made + which * channels + c, c < channels
    tl.store(out, mean, mask=inside)
    tl.store(out + groups * channels, var, mask=inside)
    tl.store(out + 2 * groups * channels, 1.0 / tl.sqrt(var + EPS), mask=inside)


@triton.jit
def normalise(
    x, y, mean, scale, bias, chunk, channels, pixels, by_sample, by_pixel, by_channel, P: tl.constexpr, C: tl.constexpr
):
    """(x - mean) * scale + bias, by the channels of the sample's group."""
    sample, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    at, there = _place(
        channels, pixels, by_sample, by_pixel, by_channel, sample, c, tl.program_id(2) * P + tl.arange(0, P)
    )
    of_group, inside = sample // chunk * channels + c, c < channels
    wide = mean.dtype.element_ty
    m = tl.load(mean + of_group, mask=inside, other=0.0)
    s = tl.load(scale + of_group, mask=inside, other=0.0)
    b = tl.load(bias + c, mask=inside, other=0.0)
    made = (tl.load(x + at, mask=there, other=0.0).to(wide) - m[None, :]) * s[None, :] + b[None, :]
    tl.store(y + at, made, mask=there)


@triton.jit
def sums(
    dy, x, mean, made, chunk, n, channels, pixels, by_sample, by_pixel, by_channel, P: tl.constexpr, C: tl.constexpr
):
    """Sums of dy and of dy * (x - mean) over the pixels of a sample."""
    sample, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    wide = made.dtype.element_ty
    inside = c < channels
    m = tl.load(mean + sample // chunk * channels + c, mask=inside, other=0.0)
    plain, product = tl.zeros((P, C), wide), tl.zeros((P, C), wide)
    for first in range(0, pixels, P):
        at, there = _place(channels, pixels, by_sample, by_pixel, by_channel, sample, c, first + tl.arange(0, P))
        g = tl.load(dy + at, mask=there, other=0.0).to(wide)
        plain += g
        product += g * (tl.load(x + at, mask=there, other=0.0).to(wide) - m[None, :])
    out = made + sample * channels + c
    tl.store(out, tl.sum(plain, 0), mask=inside)
    tl.store(out + n * channels, tl.sum(product, 0), mask=inside)


@triton.jit
def combine(
    dy,
    x,
    dx,
    mean,
    scale,
    slope,
    shift,
    chunk,
    channels,
    pixels,
    by_sample,
    by_pixel,
    by_channel,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """dy * scale + (x - mean) * slope + shift, by the channels of the sample's group."""
    sample, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    at, there = _place(
        channels, pixels, by_sample, by_pixel, by_channel, sample, c, tl.program_id(2) * P + tl.arange(0, P)
    )
    of_group, inside = sample // chunk * channels + c, c < channels
    wide = mean.dtype.element_ty
    m = tl.load(mean + of_group, mask=inside, other=0.0)
    a = tl.load(scale + of_group, mask=inside, other=0.0)
    b = tl.load(slope + of_group, mask=inside, other=0.0)
    d = tl.load(shift + of_group, mask=inside, other=0.0)
    off = tl.load(x + at, mask=there, other=0.0).to(wide) - m[None, :]
    made = tl.load(dy + at, mask=there, other=0.0).to(wide) * a[None, :] + off * b[None, :] + d[None, :]
    tl.store(dx + at, made, mask=there)
