"""What the shape of a frame says about its detector: pixel size, gaps between modules, and when a counter is full."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc.errors import UserError
from hpc.extras import needs


@dataclass(frozen=True)
class Detector:
    """A detector of one frame.

    Attributes:
        name: as people call it.
        pixel_size_mm: (height, width) of a pixel.
        gaps: bool (H, W), True where there is no pixel.
        saturation: the count from which a pixel is full, where all detectors of this kind have the same.
    """

    name: str
    pixel_size_mm: tuple[float, float]
    gaps: np.ndarray
    saturation: float | None


@dataclass(frozen=True)
class _Family:
    name: str
    module: tuple[int, int]
    gap: tuple[int, int]
    pixel_size_mm: float
    saturation: float | None


# Dectris: modules and the gaps between them. A Pilatus counts to 2^20 - 1; an Eiger marks full pixels by the largest
# number of the file's type.
_FAMILIES = (
    _Family("Pilatus", (195, 487), (17, 7), 0.172, 2.0**20 - 1),
    _Family("Eiger", (514, 1030), (37, 10), 0.075, None),
)


def by_shape(shape: tuple[int, int]) -> Detector | None:
    """The detector whose modules and gaps add up to exactly this shape, or None."""
    for family in _FAMILIES:
        counts = []
        for side, module, gap in zip(shape, family.module, family.gap, strict=True):
            modules, rest = divmod(side + gap, module + gap)
            counts.append(modules if rest == 0 else 0)
        if min(counts) > 0:
            size = (family.pixel_size_mm, family.pixel_size_mm)
            name = f"{family.name} of {counts[0]} x {counts[1]} modules"
            return Detector(name, size, _gaps(shape, family), family.saturation)
    return None


def _gaps(shape: tuple[int, int], family: _Family) -> np.ndarray:
    rows, columns = (
        np.arange(side) % (module + gap) >= module
        for side, module, gap in zip(shape, family.module, family.gap, strict=True)
    )
    return rows[:, None] | columns[None, :]


def by_name(name: str, shape: tuple[int, int]) -> Detector:
    """A detector that pyFAI knows.

    Raises:
        UserError: pyFAI does not know it or is not installed, or its frames have another shape.
    """
    needs(Path(name), "the name of a detector", "scattering", "pyFAI")
    from pyFAI.detectors import detector_factory

    try:
        detector = detector_factory(name)
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"pyFAI knows no detector {name!r}: choose one of pyFAI.detectors.ALL_DETECTORS, or leave it out"
        ) from error
    if tuple(detector.max_shape or shape) != tuple(shape):
        raise UserError(
            f"a {name} has frames of {detector.max_shape[0]} x {detector.max_shape[1]} pixels, and this one has "
            f"{shape[0]} x {shape[1]}: name the detector that took it"
        )
    mask = detector.calc_mask()
    gaps = np.zeros(shape, dtype=bool) if mask is None else np.asarray(mask) != 0
    saturation = 2.0**20 - 1 if "pilatus" in name.lower() and "pilatus4" not in name.lower() else None
    return Detector(name, (detector.pixel1 * 1e3, detector.pixel2 * 1e3), gaps, saturation)
