"""The scattering of an SEM image, and how far it is from a given pattern.

The brightness of secondary electrons is not electron density: only the shape of |FFT|^2 is compared, with a fitted
scale and a flat background. A crop sees its own few domains through its own window, so the given pattern is smeared by
that window, and only 4 pi / L < q < pi / (2 p) is compared, L being the side of the crop and p its pixel: below there
is the window, above there is the pixel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nanodist.objectives.elbo import masked_mean
from nanodist.pairvae.polar import folded, sampled, turned
from nanodist.scattering.pattern import QGrid

_FLOOR = 0.1
# Half the main lobe of a Hann window's power spectrum, in half steps of the FFT.
_REACH = 4


class CropScattering:
    """|FFT|^2 of crops of one size.

    Args:
        size_px: side P of a crop.
        pixel_size_nm: p.

    Attributes:
        step_inv_nm: 2 pi / L.
        vectors: (m, 2) vectors (q_x, q_y upwards) of half of the q that are compared; the other half is the same.
        places: (m,) their places in a flattened, centred (P, P) spectrum.
    """

    def __init__(self, size_px: int, pixel_size_nm: float) -> None:
        self.size_px, self.pixel_size_nm = size_px, pixel_size_nm
        length = size_px * pixel_size_nm
        self.step_inv_nm = 2 * math.pi / length
        self.middle = float(size_px // 2)
        axis = (torch.arange(size_px, dtype=torch.float64) - self.middle) * self.step_inv_nm
        y, x = torch.meshgrid(-axis, axis, indexing="ij")
        q = torch.hypot(x, y)
        low, high = 4 * math.pi / length, math.pi / (2 * pixel_size_nm)
        kept = (q > low) & (q < high) & ((y > 0) | ((y == 0) & (x > 0)))
        self.places = torch.nonzero(kept.flatten())[:, 0]
        self.vectors = torch.stack([x.flatten(), y.flatten()], 1)[self.places]
        self.range_inv_nm = (low, high)

    def spectrum(self, images: Tensor) -> Tensor:
        """|FFT|^2 (n, P, P) of ``images`` (n, 1, P, P) under a Hann window, without their plane; q = 0 in the middle.

        Divided by the sum of the squared window, so that white noise gives its variance.
        """
        window = _hann(self.size_px, images.dtype, images.device)
        flat = detrended(images[:, 0]) * window
        power = torch.fft.fft2(flat).abs().square() / window.square().sum()
        return torch.fft.fftshift(power, dim=(-2, -1))

    def compared(self, spectra: Tensor) -> Tensor:
        """Values (n, m) of smoothed ``spectra`` (n, P, P) at :attr:`vectors`; a single crop's spectrum is speckled."""
        return smoothed(spectra).flatten(1)[:, self.places.to(spectra.device)]

    def target(self, intensity: Tensor, mask: Tensor, grid: QGrid, turns: Tensor) -> tuple[Tensor, Tensor]:
        """What the spectrum of a crop has to look like: ``intensity`` (n, S, S) turned, smeared and smoothed.

        Returns:
            (n, m) values in the unit of the pattern, and (n, m) whether enough of each was measured.
        """
        # Twice as fine as the FFT of the crop, so that its window can be sampled.
        half, side = self.step_inv_nm / 2, 2 * (self.size_px // 2) + 1
        axis = (torch.arange(side, dtype=torch.float64, device=intensity.device) - side // 2) * half
        y, x = torch.meshgrid(-axis, axis, indexing="ij")
        vectors = turned(torch.stack([x.flatten(), y.flatten()], 1), turns.double())
        values, share = folded(intensity, mask, (grid.size - 1) / 2, grid.q_step_inv_nm, vectors)
        planes = torch.stack([values * share, share], 1).unflatten(2, (side, side))
        spread = _spread(planes)
        mean, there = spread[:, :1] / spread[:, 1:].clamp_min(1e-3), spread[:, 1:]
        own = self.vectors.to(intensity.device).expand(len(intensity), -1, 2)
        at = sampled(torch.cat([mean, there], 1), float(side // 2), half, own)
        # The fine grid reaches as far as half the FFT does, which is where the comparison ends.
        return at[:, 0], at[:, 1] > 0.5


def detrended(images: Tensor) -> Tensor:
    """``images`` (n, H, W) without their least-squares plane."""
    height, width = images.shape[-2:]
    y = torch.linspace(-1, 1, height, dtype=images.dtype, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, dtype=images.dtype, device=images.device)[None, :]
    flat = images - images.mean((-2, -1), keepdim=True)
    for slope in (y.expand(height, width), x.expand(height, width)):
        share = (flat * slope).sum((-2, -1), keepdim=True) / slope.square().sum()
        flat = flat - share * slope
    return flat


def _hann(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    line = torch.hann_window(size, periodic=True, dtype=dtype, device=device)
    return line[:, None] * line[None, :]


def smoothed(spectra: Tensor) -> Tensor:
    """``spectra`` (n, P, P), each over its neighbours with weights 1-2-1 along both axes."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=spectra.dtype, device=spectra.device)
    kernel = (line[:, None] * line[None, :])[None, None]
    padded = functional.pad(spectra[:, None], (1, 1, 1, 1), mode="circular")
    return functional.conv2d(padded, kernel)[:, 0]


def _spread(planes: Tensor) -> Tensor:
    """``planes`` (n, c, H, W), at half steps of the FFT, under the crop's window and the smoothing of spectra."""
    half = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64) / 2
    # Transform of a Hann window: sinc with its two neighbours at half the weight.
    amplitude = torch.sinc(half) + 0.5 * torch.sinc(half - 1) + 0.5 * torch.sinc(half + 1)
    window = amplitude.square()
    line = torch.zeros(2 * _REACH + 5, dtype=torch.float64)
    for shift, weight in ((0, 0.25), (2, 0.5), (4, 0.25)):
        line[shift : shift + len(window)] += weight * window
    line = (line / line.sum()).to(planes)
    reach, channels = len(line) // 2, planes.shape[1]
    for shape, pad in (((1, -1), (reach, reach, 0, 0)), ((-1, 1), (0, 0, reach, reach))):
        kernel = line.view(1, 1, *shape).expand(channels, 1, *[len(line) if s == -1 else 1 for s in shape])
        planes = functional.conv2d(functional.pad(planes, pad), kernel, groups=channels)
    return planes


def mismatch(spectrum: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared relative difference (n,) of a * ``spectrum`` + b and ``target``, a and b >= 0 being fitted.

    Args:
        spectrum, target: (n, m), what is and what should be.
        mask: (n, m).

    Differences are relative to the target plus a tenth of its mean: a bright ring is not all that counts, nor is noise.
    """
    good = mask.to(target.dtype)
    scale = target + _FLOOR * masked_mean(target, mask)[:, None].clamp_min(1e-12)
    with torch.no_grad():
        a, b = _fit(spectrum / scale, 1 / scale, target / scale, good)
    # a and b are where the sum is least, so that its gradient by the spectrum needs none through them.
    return masked_mean(((a * spectrum + b - target) / scale).square(), mask)


def _fit(p: Tensor, one: Tensor, t: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of a * p + b * one = t over the last axis, a and b not negative; (n, 1) each."""

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y * good).sum(1, keepdim=True)

    pp, po, oo, pt, ot = dot(p, p), dot(p, one), dot(one, one), dot(p, t), dot(one, t)
    determinant = (pp * oo - po * po).clamp_min(1e-20)
    a, b = (pt * oo - ot * po) / determinant, (ot * pp - pt * po) / determinant
    alone_a, alone_b = pt / pp.clamp_min(1e-20), ot / oo.clamp_min(1e-20)
    a, b = torch.where(b < 0, alone_a, a), b.clamp_min(0.0)
    return a.clamp_min(0.0), torch.where(a < 0, alone_b, b)
