"""The objective lens: electron wavelength, aberration phase, coherence envelopes, and the image of an exit wave.

Sources: E. J. Kirkland, *Advanced Computing in Electron Microscopy* (2nd ed., 2010), chapters 2, 3 and 5; the envelope
of a finite source after J. Frank, *Optik* 38 (1973) 519. Lengths are in nm, spatial frequencies in 1/nm; defocus is
positive for underfocus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]

PLANCK = 6.62607015e-34  # J s
CHARGE = 1.602176634e-19  # C
ELECTRON_MASS = 9.1093837015e-31  # kg
LIGHT = 2.99792458e8  # m/s


def wavelength_nm(voltage_kv: float) -> float:
    """Relativistic electron wavelength in nm (Kirkland eq. 2.5): 2.508 pm at 200 kV."""
    energy = CHARGE * voltage_kv * 1e3
    momentum = math.sqrt(2 * ELECTRON_MASS * energy * (1 + energy / (2 * ELECTRON_MASS * LIGHT**2)))
    return PLANCK / momentum * 1e9


def interaction_rad_per_v_nm(voltage_kv: float) -> float:
    """Phase that 1 V of inner potential adds over 1 nm (Kirkland eq. 5.6): 7.288 mrad at 200 kV."""
    energy, rest = CHARGE * voltage_kv * 1e3, ELECTRON_MASS * LIGHT**2
    return 2 * math.pi / (wavelength_nm(voltage_kv) * voltage_kv * 1e3) * (rest + energy) / (2 * rest + energy)


@dataclass(frozen=True)
class Lens:
    """An objective lens and its illumination; defocus > 0 is underfocus."""

    voltage_kv: float
    cs_mm: float
    defocus_nm: float
    focal_spread_nm: float = 0.0
    semi_angle_mrad: float = 0.0

    def chi(self, q_inv_nm: Floats) -> Floats:
        """Aberration phase in rad: ``pi lambda q^2 (Cs lambda^2 q^2 / 2 - defocus)`` (Kirkland eq. 3.6)."""
        wave, q2 = wavelength_nm(self.voltage_kv), q_inv_nm**2
        return np.pi * wave * q2 * (0.5 * self.cs_mm * 1e6 * wave**2 * q2 - self.defocus_nm)

    def envelope(self, q_inv_nm: Floats) -> Floats:
        """Damping in [0, 1] by focal spread (temporal) and by the semi-angle of illumination (spatial coherence)."""
        wave = wavelength_nm(self.voltage_kv)
        temporal = 0.5 * (np.pi * wave * self.focal_spread_nm * q_inv_nm**2) ** 2
        slope = self.cs_mm * 1e6 * wave**3 * q_inv_nm**3 - self.defocus_nm * wave * q_inv_nm
        spatial = (np.pi * self.semi_angle_mrad * 1e-3 / wave * slope) ** 2
        return np.exp(-temporal - spatial)

    def phase_contrast(self, q_inv_nm: Floats) -> Floats:
        """What a weak phase object is multiplied with: ``2 sin(chi)`` times the envelope."""
        return 2.0 * np.sin(self.chi(q_inv_nm)) * self.envelope(q_inv_nm)


def frequencies(size_px: int, pixel_size_nm: float) -> Floats:
    """Magnitude of the spatial frequency of each term of a (size, size) FFT, in 1/nm."""
    axis = np.fft.fftfreq(size_px, pixel_size_nm)
    return np.hypot(axis[:, None], axis[None, :])


def image(wave: Complexes, lens: Lens, pixel_size_nm: float) -> Floats:
    """Intensity of the exit wave (n, n) behind the lens: ``|F^-1[F[wave] exp(-i chi) envelope]|^2``.

    The wave is taken as periodic, so the caller computes a margin and cuts it off.
    """
    q = frequencies(wave.shape[0], pixel_size_nm)
    transfer = np.exp(-1j * lens.chi(q)) * lens.envelope(q)
    result = np.fft.ifft2(np.fft.fft2(wave) * transfer)
    return result.real**2 + result.imag**2


def probe_blur(intensity: Floats, fwhm_nm: float, pixel_size_nm: float) -> Floats:
    """An incoherent image: ``intensity`` (n, n) blurred by a Gaussian probe of that full width at half maximum."""
    q = frequencies(intensity.shape[0], pixel_size_nm)
    sigma = fwhm_nm / (2 * math.sqrt(2 * math.log(2)))
    return np.fft.ifft2(np.fft.fft2(intensity) * np.exp(-2 * (np.pi * sigma * q) ** 2)).real
