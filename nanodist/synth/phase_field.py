"""Periodic order-parameter fields of films that phase-separate: block copolymers and spinodal mixtures.

Block copolymers follow the Swift-Hohenberg equation (Swift, Hohenberg, Phys. Rev. A 15, 319, 1977),

    d psi / dt = [eps - (1 + del^2)^2 - beta a(theta)] psi + g psi^2 - psi^3,

which has the stripes, dots, dislocations, disclinations and grain boundaries of their films: g = 0 gives stripes, a
large g a hexagonal lattice, g between them both side by side. The mean of psi stays 0, as the composition of a melt
stays what it is. Its wavelength is 2 pi. The term beta a(theta), with
a = sin^2(fold theta / 2), damps waves whose direction theta is not that of the box's x axis, as shear or a guiding
pattern does. Mixtures follow Cahn and Hilliard (J. Chem. Phys. 28, 258, 1958), stopped while they coarsen.

Fields are kept at `POINTS` points a period, which holds three harmonics; edges are drawn later, at any resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft

Field = npt.NDArray[np.float32]
POINTS = 8
_EPS = 0.3
_SEED_AMPLITUDE = 0.3
# Rounding breaks the symmetry that the transform of real numbers has, and where the equation is unstable the broken
# part, which the inverse transform does not see, would grow for ever.
_MEND_EVERY = 20
_CUT = 3.2


@dataclass(frozen=True)
class Box:
    """A periodic box: lengths (y, x) in periods, and points (y, x)."""

    periods: tuple[float, float]
    points: tuple[int, int]

    def waves(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Wave vectors (k_y, k_x) of :func:`scipy.fft.rfft2`, in units of 2 pi / period."""
        y = np.fft.fftfreq(self.points[0], 1 / self.points[0]) / self.periods[0]
        x = np.fft.rfftfreq(self.points[1], 1 / self.points[1]) / self.periods[1]
        shape = (len(y), len(x))
        return np.broadcast_to(y[:, None], shape), np.broadcast_to(x[None, :], shape)


def stripe_box(periods: int) -> Box:
    """A square box that holds a whole number of stripes along x."""
    return Box((float(periods), float(periods)), (POINTS * periods,) * 2)


def dot_box(periods: int) -> Box:
    """A nearly square box that a hexagonal lattice fits, with a first peak along x (``periods`` is even)."""
    rows = round(periods * np.sqrt(3) / 2)
    return Box((2 * rows / np.sqrt(3), float(periods)), (POINTS * periods,) * 2)


def spinodal_box(periods: int) -> Box:
    """A square box for a mixture that coarsens until ``periods`` of about twice the fastest wave fit."""
    return Box((2.0 * periods, 2.0 * periods), (POINTS * periods,) * 2)


@dataclass(frozen=True)
class Copolymer:
    """Parameters of the Swift-Hohenberg equation.

    Attributes:
        quadratic: g; a number, or its two values (lowest, highest) between which it varies smoothly over the film.
        alignment: beta.
        fold: 2 for stripes, 6 for dots.
        steps: of time 1 each, from noise; the more, the fewer defects.
    """

    quadratic: float | tuple[float, float]
    alignment: float
    fold: int
    steps: int


def copolymer(rng: np.random.Generator, box: Box, film: Copolymer) -> Field:
    """A field (y, x) of the Swift-Hohenberg equation, by exponential time differencing of first order."""
    ky, kx = box.waves()
    k2 = ky**2 + kx**2
    turned = np.sin(film.fold / 2 * np.arctan2(ky, kx)) ** 2
    rate = _EPS - (1 - k2) ** 2 - film.alignment * turned * np.minimum(k2, 1.0)
    g: float | Field
    if isinstance(film.quadratic, tuple):
        low, high = film.quadratic
        g = (low + (high - low) * _smooth_share(rng, box, 3.0)).astype(np.float32)
    else:
        g = np.float32(film.quadratic)
    start = (_SEED_AMPLITUDE * rng.standard_normal(box.points)).astype(np.float32)
    return _evolve(start, rate, film.steps, lambda psi: psi * psi * (g - psi), (k2 > 0) & (k2 <= _CUT**2))


def spinodal(rng: np.random.Generator, box: Box, composition: float, steps: int) -> Field:
    """A field (y, x) of the Cahn-Hilliard equation around ``composition`` (-1 to 1; 0 is half and half).

    The wave of fastest growth has the period 1 of the box; structures then coarsen, so the period has to be measured.
    """
    ky, kx = box.waves()
    k2 = ky**2 + kx**2
    # In units of the fastest wave: d psi / dt = -4 k^2 (psi^3 - psi + k^2 psi / 2), whose linear rate is 1 at k = 1.
    # Half of 4 k^2 psi goes from one side to the other, so that the explicit part stays bounded.
    start = (composition + 0.1 * rng.standard_normal(box.points)).astype(np.float32)
    psi, dt = start, 0.1
    implicit = (1 / (1 + dt * (4 * k2 * 2.0 + 2 * k2**2))).astype(np.float32)
    wave = (4 * k2 * dt).astype(np.float32)
    for step in range(steps):
        if step % _MEND_EVERY == 0:
            hat = fft.rfft2(psi)
        hat = (hat + wave * (3.0 * hat - fft.rfft2(psi * psi * psi))) * implicit
        psi = fft.irfft2(hat, s=box.points)
    return np.asarray(psi, np.float32)


def _evolve(
    psi: Field,
    rate: npt.NDArray[np.float64],
    steps: int,
    force: Callable[[Field], Field],
    kept: npt.NDArray[np.bool_],
) -> Field:
    """``steps`` of time 1 of d psi / dt = rate psi + force(psi); waves that are not ``kept`` die at once."""
    grown = np.where(kept, np.exp(rate), 0.0).astype(np.float32)
    near_zero = np.abs(rate) < 1e-6
    pushed = np.where(kept, np.where(near_zero, 1.0, np.expm1(rate) / np.where(near_zero, 1.0, rate)), 0.0)
    pushed = pushed.astype(np.float32)
    hat = fft.rfft2(psi)
    for step in range(steps):
        if step % _MEND_EVERY == 0:
            hat = fft.rfft2(psi)
        hat = grown * hat + pushed * fft.rfft2(force(psi))
        psi = fft.irfft2(hat, s=psi.shape)
    return psi


def _smooth_share(rng: np.random.Generator, box: Box, periods: float) -> npt.NDArray[np.float64]:
    """A smooth random field (y, x) of ranks, 0 to 1, that varies over ``periods`` and more."""
    ky, kx = box.waves()
    hat = fft.rfft2(rng.standard_normal(box.points)) * np.exp(-0.5 * (ky**2 + kx**2) * (2 * periods) ** 2)
    hat[0, 0] = 0
    rough = fft.irfft2(hat, s=box.points)
    return np.asarray(0.5 * (1 + np.tanh(1.5 * rough / rough.std())), np.float64)
