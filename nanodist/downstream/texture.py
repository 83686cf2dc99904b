"""Hand-made texture features: the baseline that a pretrained encoder has to beat.

Four families, all of them insensitive to rotation by 90 degrees or nearly so, none of them trained: local binary
patterns at several radii, grey-level co-occurrence at several distances, the radial power spectrum, and brightness.
Counts enter as square roots (the Hellinger map), since a linear classifier on square roots compares histograms
better than one on raw frequencies.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

VERSION = 1  # part of the name of a feature cache: raise it with any change of the figures
LBP_RADII = (1, 2, 3, 5, 8, 12)
GLCM_DISTANCES = (1, 2, 4, 8, 16)
GLCM_LEVELS = 16
SPECTRUM_BINS = 32
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
MIN_SIDE = 64  # the widest patterns fit, and the spectrum has coefficients in most rings

F32 = npt.NDArray[np.float32]


def texture_features(images: Iterable[npt.NDArray[np.generic]]) -> F32:
    """Texture features of (H, W) uint8 or uint16 images, as (n, d) float32; ``d`` does not depend on the size."""
    rows = [texture_of(image) for image in images]
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def texture_of(image: npt.NDArray[np.generic]) -> F32:
    """Texture features of one (H, W) uint8 or uint16 image, as (d,) float32.

    Images with a side below ``MIN_SIDE`` pixels are continued by reflection, so that the widest neighbourhood fits.
    """
    raw = image.astype(np.float32) / (65535.0 if image.dtype == np.uint16 else 255.0)
    missing = [max(0, MIN_SIDE - side) for side in raw.shape]
    if any(missing):
        raw = np.pad(raw, [(m // 2, m - m // 2) for m in missing], mode="symmetric")
    scaled = _robust(raw)
    parts = [brightness(raw), radial_spectrum(scaled)]
    parts += [local_binary_patterns(scaled, radius) for radius in LBP_RADII]
    parts.append(co_occurrence(np.minimum((scaled * GLCM_LEVELS).astype(np.uint8), GLCM_LEVELS - 1), GLCM_LEVELS))
    return np.concatenate(parts).astype(np.float32)


def _robust(raw: F32) -> F32:
    """Grey values between the 0.5 % and the 99.5 % percentile stretched to [0, 1]: gain and offset do not matter."""
    low, high = np.percentile(raw[::2, ::2], (0.5, 99.5))
    return np.clip((raw - low) / max(float(high - low), 1e-6), 0.0, 1.0).astype(np.float32)


def brightness(raw: F32) -> F32:
    """Mean, standard deviation, skewness, excess kurtosis and percentiles of grey values in [0, 1]."""
    values = raw.ravel()
    mean, std = float(values.mean()), float(values.std())
    centred = (values - mean) / max(std, 1e-6)
    squared = centred * centred
    moments = [mean, std, float((squared * centred).mean()), float((squared * squared).mean()) - 3.0]
    return np.asarray([*moments, *np.percentile(values[::4], PERCENTILES)], np.float32)


def radial_spectrum(scaled: F32) -> F32:
    """Natural log of the mean power in rings of spatial frequency, from the lowest to the Nyquist frequency.

    The mean is taken off and a Hann window applied first. Rings are spaced evenly in the square root of the frequency
    (finer at low frequencies); a ring without a coefficient is interpolated.
    """
    rings, counts, window = _rings(*scaled.shape)
    spectrum = np.fft.rfft2((scaled - scaled.mean()) * window)
    power = ((spectrum.real**2 + spectrum.imag**2) / scaled.size).ravel()
    sums = np.bincount(rings, weights=power, minlength=SPECTRUM_BINS + 1)[:SPECTRUM_BINS]
    filled = counts[:SPECTRUM_BINS] > 0
    levels = np.log(sums[filled] / counts[:SPECTRUM_BINS][filled] + 1e-8)
    places = np.arange(SPECTRUM_BINS)
    return np.interp(places, places[filled], levels).astype(np.float32)


@lru_cache(maxsize=8)
def _rings(height: int, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F32]:
    """Ring number of each coefficient of ``rfft2``, coefficients per ring, and the Hann window (H, W)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    rings = np.minimum(np.sqrt(frequency / 0.5) * SPECTRUM_BINS, SPECTRUM_BINS).astype(np.int64).ravel()
    rings[0] = SPECTRUM_BINS  # the mean is no texture
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1]).astype(np.float32)
    return rings, np.bincount(rings, minlength=SPECTRUM_BINS + 1), window


def local_binary_patterns(scaled: F32, radius: int) -> F32:
    """Square root of the histogram of rotation-invariant 8-bit local binary patterns, (36,).

    Ojala, Pietikainen, Maenpaa, *Multiresolution gray-scale and rotation invariant texture classification*, PAMI 2002.
    For radii above 1 the pixels are means over ``radius`` x ``radius`` boxes, so that wide patterns see no pixel
    noise; neighbours sit on the nearest pixels of the circle.
    """
    smooth = _box_mean(scaled, radius) if radius > 1 else scaled
    height, width = smooth.shape
    centre = smooth[radius : height - radius, radius : width - radius]
    codes = np.zeros(centre.shape, np.uint8)
    diagonal = max(1, round(radius / np.sqrt(2)))
    steps = [(0, radius), (diagonal, diagonal), (radius, 0), (diagonal, -diagonal)]
    for bit, (dy, dx) in enumerate(steps + [(-dy, -dx) for dy, dx in steps]):
        neighbour = smooth[radius + dy : height - radius + dy, radius + dx : width - radius + dx]
        codes |= (neighbour >= centre).view(np.uint8) << bit
    table, kinds = _rotation_classes()
    histogram = np.bincount(table, weights=np.bincount(codes.ravel(), minlength=256), minlength=kinds)
    return np.sqrt(histogram / codes.size).astype(np.float32)


@lru_cache(maxsize=1)
def _rotation_classes() -> tuple[npt.NDArray[np.int64], int]:
    """For each 8-bit code the number of its class under cyclic rotation, and the number of classes (36)."""
    smallest = [min(((code << s) | (code >> (8 - s))) & 255 for s in range(8)) for code in range(256)]
    _, classes = np.unique(smallest, return_inverse=True)
    return classes.astype(np.int64), int(classes.max()) + 1


def _box_mean(image: F32, side: int) -> F32:
    """Mean over ``side`` x ``side`` boxes by running sums, (H - side + 1, W - side + 1)."""
    sums = np.zeros((image.shape[0] + 1, image.shape[1] + 1))
    np.cumsum(image, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    # Rounded so that equal boxes stay equal: the running sums differ in their last bits.
    return np.round(boxes / side**2, 6).astype(np.float32)


def co_occurrence(levels: npt.NDArray[np.uint8], count: int) -> F32:
    """Properties of the grey-level co-occurrence matrix at each of ``GLCM_DISTANCES``.

    Haralick, Shanmugam, Dinstein, *Textural features for image classification*, 1973: contrast, dissimilarity,
    homogeneity, square root of the angular second moment, correlation and entropy of the symmetric, normalised
    matrix; of each the mean and the spread over the four directions.
    """
    distances = [_directions(levels, count, distance) for distance in GLCM_DISTANCES]
    return np.concatenate([part for p in distances for part in (p.mean(0), p.max(0) - p.min(0))]).astype(np.float32)


def _directions(levels: npt.NDArray[np.uint8], count: int, distance: int) -> npt.NDArray[np.float64]:
    """The six properties for the directions 0, 45, 90 and 135 degrees, (4, 6)."""
    diagonal = max(1, round(distance / np.sqrt(2)))
    matrices = []
    for dy, dx in ((0, distance), (diagonal, diagonal), (distance, 0), (diagonal, -diagonal)):
        height, width = levels.shape[0] - dy, levels.shape[1] - abs(dx)
        first = levels[:height, max(0, -dx) : max(0, -dx) + width]
        second = levels[dy : dy + height, max(0, dx) : max(0, dx) + width]
        pairs = first.astype(np.int64) * count + second
        matrix = np.bincount(pairs.ravel(), minlength=count * count).reshape(count, count).astype(np.float64)
        matrices.append((matrix + matrix.T) / (2.0 * pairs.size))
    return glcm_properties(np.stack(matrices))


def glcm_properties(matrices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Contrast, dissimilarity, homogeneity, energy, correlation and entropy of (m, L, L) matrices, as (m, 6)."""
    grey = np.arange(matrices.shape[-1], dtype=np.float64)
    apart = np.abs(grey[:, None] - grey[None, :])
    marginal = matrices.sum(-1)
    mean = marginal @ grey
    variance = marginal @ grey**2 - mean**2
    product = np.einsum("mij,i,j->m", matrices, grey, grey) - mean**2
    flat = variance < 1e-12
    logs = np.log(np.where(matrices > 0, matrices, 1.0))
    return np.stack(
        [
            (matrices * apart**2).sum((-1, -2)),
            (matrices * apart).sum((-1, -2)),
            (matrices / (1.0 + apart**2)).sum((-1, -2)),
            np.sqrt((matrices**2).sum((-1, -2))),
            np.where(flat, 1.0, product / np.where(flat, 1.0, variance)),
            -(matrices * logs).sum((-1, -2)),
        ],
        axis=-1,
    )
