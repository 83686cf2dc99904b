"""Pairs in memory: thresholded waves of known period and orientation, and their expected scattering as counts."""

import numpy as np

from nanodist.scattering.pattern import Pattern, QGrid


def waves(shape, pixel_nm, period_nm, angle_deg, spread_deg, rng):
    """A random field (H, W) of waves with one period whose directions scatter about an angle (y upwards)."""
    y = np.fft.fftfreq(shape[0], pixel_nm)[:, None] * 2 * np.pi
    x = np.fft.rfftfreq(shape[1], pixel_nm)[None, :] * 2 * np.pi
    weight = ring(-y, x, period_nm, angle_deg, spread_deg)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * np.sqrt(weight), s=shape)
    return field / field.std()


def ring(q_y, q_x, period_nm, angle_deg, spread_deg, width=0.06):
    """Scattering of such waves; q_y upwards."""
    q0 = 2 * np.pi / period_nm
    off = np.remainder(np.arctan2(q_y, q_x) - np.deg2rad(angle_deg) + np.pi / 2, np.pi) - np.pi / 2
    return np.exp(-0.5 * ((np.hypot(q_y, q_x) / q0 - 1) / width) ** 2 - 0.5 * (off / np.deg2rad(spread_deg)) ** 2)


class PairsInMemory:
    """A pair store as :class:`nanodist.pairvae.data.Pairs` wants it."""

    reference, manifest_hash = 20.0, "in-memory"

    def __init__(
        self, count, seed=0, size_px=160, pixel_nm=3.0, grid_px=64, spread_deg=20.0, reduced=False, missing=()
    ):
        self.grid, rng = QGrid(grid_px, 0.5), np.random.default_rng(seed)
        self.keys = tuple(f"item{i:03d}" for i in range(count))
        self.samples = tuple(f"film{i // 2:03d}" for i in range(count))
        self.missing, self._items = set(missing), []
        q_y, q_x = self.grid.q()
        modulus = np.hypot(q_y, q_x)
        mask = (modulus > 0.04) & ~((np.abs(q_x) < 0.012) & (q_y < 0))
        for _ in range(count):
            period, angle = 20 * 3 ** rng.uniform(), rng.uniform(0, 180)
            field = waves((size_px, size_px), pixel_nm, period, angle, spread_deg, rng)
            image = np.clip(128 + 60 * np.tanh(2 * field) + rng.normal(0, 12, field.shape), 0, 255).astype(np.uint8)
            expected = 4000 * ring(q_y, q_x, period, angle, spread_deg) + 15
            counts = np.where(mask, rng.poisson(expected), 0).astype(np.float32)
            sigma = np.sqrt(counts + 1).astype(np.float32) if reduced else None
            kind = "reduced" if reduced else "counts"
            pattern = Pattern(counts, sigma, mask, self.grid, kind)
            truth = {
                "morphology": "lamellae",
                "period_nm": period,
                "orientation_deg": angle,
                "order_parameter": 0.8,
                "area_fraction": 0.5,
            }
            self._items.append((pattern, (image, (pixel_nm, pixel_nm)), truth))

    def __len__(self):
        return len(self.keys)

    def pattern(self, i):
        return None if (i, "saxs") in self.missing else self._items[i][0]

    def micrograph(self, i):
        return None if (i, "sem") in self.missing else self._items[i][1]

    def truth(self, i):
        return self._items[i][2]
