"""The camera: counted electrons, scintillator blur, gain, read-out noise, 16 bits.

Electrons arrive as a Poisson process and each is then spread over neighbours, so the noise is blurred like the signal
(W. J. de Ruijter, *Micron* 26 (1995) 247).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A camera.

    Args:
        dose_e_nm2: electrons on each nm^2 where the relative intensity is 1.
        mtf_half: frequency at which the modulation transfer falls to 1/2, in units of Nyquist; 0 is no blur.
        gain: counts an electron.
        offset: counts without an electron.
        read_noise_counts: standard deviation of the Gaussian read-out noise.
    """

    dose_e_nm2: float
    mtf_half: float
    gain: float
    offset: float
    read_noise_counts: float

    def mtf(self, share_of_nyquist: Floats) -> Floats:
        """Modulation transfer ``1 / (1 + (f / f_half)^2)``, 1 at zero frequency so that counts are kept."""
        if self.mtf_half == 0:
            return np.ones_like(share_of_nyquist)
        return 1.0 / (1.0 + (share_of_nyquist / self.mtf_half) ** 2)

    def counts(self, intensity: Floats, pixel_size_nm: float, rng: np.random.Generator) -> Floats:
        """Counts for a relative ``intensity`` (n, n) >= 0, before they are rounded to 16 bits."""
        electrons = rng.poisson(intensity * (self.dose_e_nm2 * pixel_size_nm**2)).astype(np.float64)
        if self.mtf_half:
            rows, columns = intensity.shape
            f = np.hypot(np.fft.fftfreq(rows, 0.5)[:, None], np.fft.rfftfreq(columns, 0.5)[None, :])
            electrons = np.fft.irfft2(np.fft.rfft2(electrons) * self.mtf(f), s=intensity.shape)
        noise = rng.normal(0.0, self.read_noise_counts, intensity.shape) if self.read_noise_counts else 0.0
        return electrons * self.gain + self.offset + noise


def to_uint16(counts: Floats) -> npt.NDArray[np.uint16]:
    """Rounded and clipped to 0 ... 65535, as a camera's converter does."""
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)
