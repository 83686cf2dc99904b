"""Which pixels measured something, and why the others did not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.detectors import Detector
from nanodist.scattering.pattern import Kind
from nanodist.scattering.raw import Raw

# Neighbours with this many counts have a neighbour without any once in 1e9 pixels: exp(-20) = 2e-9.
_DEAD_NEIGHBOURS = 20.0
# A hot pixel has this many times the counts of the third brightest pixel around it, and this many more; the beam's own
# spot, which air scattering and the optics widen, lights its neighbours.
_HOT_TIMES, _HOT_MORE = 8.0, 100.0
# Noise does not repeat bit by bit in so many pixels of reduced data.
_REPEATS = 32
_PATCH = 9


def decided_kind(raw: Raw) -> Kind:
    """``counts`` for whole numbers that are not negative (but for -1, -2, ... as markers), else ``reduced``."""
    if raw.kind is not None:
        return raw.kind
    if raw.values.dtype.kind in "iub":
        return "counts"
    values = raw.values[np.isfinite(raw.values)]
    whole = bool((values == np.rint(values)).all())
    markers = len(np.unique(values[values < 0])) <= 4
    return "counts" if whole and markers and (values > 0).any() else "reduced"


def reasons(
    raw: Raw, kind: Kind, detector: Detector | None, masked: np.ndarray | None, saturation: float | None
) -> dict[str, np.ndarray]:
    """For each rule the pixels that it masks, bool (H, W); rules may overlap.

    Args:
        raw: the file.
        kind: counts, of which negative ones are markers, or reduced data, of which negative ones are data.
        detector: for its gaps, and when its counters are full.
        masked: pixels that the user's mask leaves out.
        saturation: the count from which a pixel is full, over what file and detector say.
    """
    values = raw.values
    found = {"not finite": ~np.isfinite(values)} if values.dtype.kind == "f" else {}
    if raw.measured is not None:
        found["the file's mask"] = ~raw.measured
    if masked is not None:
        found["the given mask"] = masked
    if detector is not None:
        found["gaps"] = detector.gaps
    sentinel = np.zeros(values.shape, dtype=bool)
    for value in raw.sentinels:
        sentinel |= values == value
    if kind == "counts":
        sentinel |= values < 0
        found["overflow"] = _overflow(values, raw, detector, saturation)
    else:
        sentinel |= _repeated(values)
        if raw.sigma is not None:
            # A pixel of a subtracted pattern that counted nothing has sigma 0 as well, but another intensity.
            found["no sigma"] = ~(raw.sigma >= 0) | ~np.isfinite(raw.sigma) | ((raw.sigma == 0) & (values == 0))
    found["sentinels"] = sentinel
    if kind == "counts":
        out = np.logical_or.reduce(list(found.values()))
        found["dead"], found["hot"] = _dead_and_hot(values, out)
    return found


def _overflow(values: np.ndarray, raw: Raw, detector: Detector | None, saturation: float | None) -> np.ndarray:
    """Full pixels: from the cut-off that is given, stated or the detector's, and the largest number of the type."""
    limits = (saturation, raw.saturation, detector.saturation if detector else None)
    limit = next((value for value in limits if value), np.inf)
    full: np.ndarray = values >= limit
    if values.dtype.kind in "iu":
        # Unsigned frames of Eigers mark gaps by 2^n - 1 and bad pixels by 2^n - 2.
        last = np.iinfo(values.dtype).max
        full = full | (values >= (last - 1 if values.dtype.kind == "u" and last > 255 else last))
    return full


def _repeated(values: np.ndarray) -> np.ndarray:
    """Markers in reduced data: a negative whole number in many pixels, or a patch of zeros.

    Zeros that stand alone are data: a pixel that counted nothing.
    """
    from scipy.ndimage import label

    marked = np.zeros(values.shape, dtype=bool)
    if values.dtype.kind == "f":
        negative = values[np.isfinite(values) & (values < 0)]
        numbers, counts = np.unique(negative[negative == np.rint(negative)], return_counts=True)
        for number in numbers[counts >= _REPEATS]:
            marked |= values == number
    zero = values == 0
    patches, _ = label(zero)
    sizes = np.bincount(patches.ravel())
    sizes[0] = 0
    return marked | (sizes[patches] >= _PATCH)


def _dead_and_hot(values: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels without a count amid many counts, and single pixels far above all around them."""
    counts = np.pad(np.where(out, 0, values).astype(np.float32), 1)
    inner = counts[1:-1, 1:-1]
    columns = counts[:-2] + counts[1:-1] + counts[2:]
    around = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] - inner
    dead, hot = np.zeros_like(out), np.zeros_like(out)
    # Few pixels come into question: neighbours of median 20 sum up to 80 or more.
    for found, place in (
        (dead, np.nonzero(~out & (inner == 0) & (around >= 4 * _DEAD_NEIGHBOURS))),
        (hot, np.nonzero(~out & (inner > _HOT_MORE))),
    ):
        rows, lines = place
        ring = np.stack([counts[rows + i, lines + j] for i in range(3) for j in range(3) if (i, j) != (1, 1)])
        ring.sort(axis=0)
        here = inner[place]
        if found is dead:
            found[place] = (ring[3] + ring[4]) / 2 >= _DEAD_NEIGHBOURS
        else:
            found[place] = (here > _HOT_TIMES * ring[5]) & (here > ring[5] + _HOT_MORE)
    return dead, hot


def check_polarity(masked: np.ndarray, raw: Raw, path: Path) -> None:
    """Refuse a mask that is upside down: one that keeps the pixels whose values are markers, and leaves out the rest.

    Raises:
        UserError: so it is.
    """
    marked = raw.values < 0 if raw.values.dtype.kind == "i" else ~np.isfinite(raw.values)
    if marked.sum() >= _REPEATS and masked[marked].mean() < 0.05 and masked[~marked].mean() > 0.5:
        raise UserError(
            f"{path} masks {masked.mean():.0%} of the pixels and keeps the gaps of the detector: it seems to mark what "
            "was measured; say so (mask_marks=measured)"
        )


def counted(found: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many pixels each rule masks."""
    return {name: int(pixels.sum()) for name, pixels in found.items() if pixels.any()}
