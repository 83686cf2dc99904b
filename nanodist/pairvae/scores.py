"""How what was made of an unseen item is scored against the truth, and medians with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanodist.pairvae.baselines import distance
from nanodist.pairvae.describe import (
    Morphology,
    Scattering,
    apart,
    describe_image,
    describe_pattern,
    image_spectrum,
)
from nanodist.pairvae.physics import CropScattering, mismatch
from nanodist.scattering.azimuthal import azimuthal
from nanodist.scattering.pattern import Pattern
from nanodist.synth.copolymers import HEXAGONAL

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ORIENTED = 0.3
_RESAMPLED = 2000


@dataclass(frozen=True)
class Truth:
    """What an item is.

    Attributes:
        key, specimen: of the item.
        pattern: as measured.
        scattering: of the pattern.
        period_nm: 2 pi / q*; by its synthesis where that is known.
        orientation_deg: NaN where no direction is favoured.
        hexagonal: whether directions repeat every 60 degrees.
        area_fraction: of the bright phase, by its synthesis or its micrograph.
        crops: (n, P, P) of the micrograph.
        morphology: of each crop.
    """

    key: str
    specimen: str
    pattern: Pattern
    scattering: Scattering
    period_nm: float
    orientation_deg: float
    hexagonal: bool
    area_fraction: float
    crops: F32
    morphology: tuple[Morphology, ...]

    @property
    def s2(self) -> F64:
        """Mean two-point correlation of the crops."""
        return np.asarray(np.nanmean([m.s2 for m in self.morphology], 0))

    @property
    def chord_nm(self) -> float:
        """Mean chord of the crops."""
        return float(np.nanmean([m.chord_nm for m in self.morphology]))


def truth_of(
    key: str, specimen: str, pattern: Pattern, crops: F32, pixel_size_nm: float, known: Mapping[str, Any]
) -> Truth:
    """The truth of an item; what its synthesis does not say is measured."""
    scattering = describe_pattern(pattern)
    morphology = tuple(describe_image(crop, pixel_size_nm) for crop in crops)
    hexagonal = known.get("morphology") in HEXAGONAL
    if known:
        oriented = known["orientation_deg"] is not None and known["order_parameter"] > ORIENTED
        orientation = float(known["orientation_deg"]) if oriented else math.nan
    else:
        orientation = scattering.orientation_deg if scattering.anisotropy > ORIENTED else math.nan
    area = float(known["area_fraction"]) if known else float(np.nanmean([m.area_fraction for m in morphology]))
    period = float(known["period_nm"]) if known else scattering.period_nm
    return Truth(key, specimen, pattern, scattering, period, orientation, hexagonal, area, crops, morphology)


def scattering_scores(made: Scattering, truth: Truth) -> dict[str, float]:
    """Errors of period, width, orientation and anisotropy."""
    direction, modulo = (made.hexagonal_deg, 60.0) if truth.hexagonal else (made.orientation_deg, 180.0)
    strength = (
        (made.six_fold, truth.scattering.six_fold)
        if truth.hexagonal
        else (made.anisotropy, truth.scattering.anisotropy)
    )
    found = {
        "period_error": abs(made.period_nm / truth.period_nm - 1),
        "q_star_error": abs(made.q_star_inv_nm / truth.scattering.q_star_inv_nm - 1),
        "width_error": abs(made.width_inv_nm / truth.scattering.width_inv_nm - 1),
        "orientation_error_deg": apart(direction, truth.orientation_deg, modulo),
        "anisotropy_error": abs(strength[0] - strength[1]),
        "period_nm": made.period_nm,
    }
    # No peak at all is as wrong as a period can be, not an item less.
    for name in ("period_error", "q_star_error"):
        if math.isnan(found[name]):
            found[name] = 1.0
    if truth.hexagonal:
        found["centre_distance_error"] = found["period_error"]
        found["centre_distance_nm"] = 2 * made.period_nm / math.sqrt(3)
    return found


def sem_scores(images: F32, truth: Truth, crops: CropScattering) -> dict[str, float]:
    """Scores of images (n, P, P) made for an item: of their mean spectrum, mean S2 and mean chord."""
    pixel = crops.pixel_size_nm
    found = scattering_scores(describe_pattern(image_spectrum(list(images), pixel)), truth)
    parts = [describe_image(image, pixel) for image in images]
    s2 = np.nanmean([part.s2 for part in parts], 0)
    found["s2_error"] = float(np.abs(s2 - truth.s2).mean())
    found["chord_error"] = abs(float(np.nanmean([part.chord_nm for part in parts])) / truth.chord_nm - 1)
    found["area_error"] = abs(float(np.nanmean([part.area_fraction for part in parts])) - truth.area_fraction)
    found["scattering_mismatch"] = consistency(images, truth.pattern, crops)
    return found


def consistency(images: F32, pattern: Pattern, crops: CropScattering) -> float:
    """How far the mean scattering of images (n, P, P) is from a pattern: the physics term; 0 is the same."""
    spectra = crops.spectrum(torch.from_numpy(np.ascontiguousarray(images))[:, None].double())
    intensity = torch.from_numpy(pattern.intensity).double()[None]
    mask = torch.from_numpy(pattern.mask)[None]
    target, known = crops.target(intensity, mask, pattern.grid, torch.eye(2, dtype=torch.float64)[None])
    return float(mismatch(crops.compared(spectra.mean(0, keepdim=True)), target, known))


def over_both(pattern: Pattern, intensity: F32) -> tuple[Pattern, Pattern]:
    """A pattern, and another's ``intensity`` (S, S; NaN where nothing is known), both over what both know."""
    mask = pattern.mask & np.isfinite(intensity)
    planes = (np.where(mask, plane, 0).astype(np.float32) for plane in (pattern.intensity, intensity))
    first, second = (Pattern(plane, None, mask, pattern.grid, "reduced") for plane in planes)
    return first, second


def saxs_scores(intensity: F32, truth: Truth, reference: float, scale: float) -> dict[str, float]:
    """Scores of an expected pattern (S, S), NaN where it says nothing, made for an item.

    ``saxs_mae`` is the paper's mean absolute error, of asinh(I / I0) over ``scale`` (the largest in the training part).
    ``iq_error`` is the mean of |ln I - ln I_true| over q, after the best common factor: exposures differ.
    """
    given, made = over_both(truth.pattern, intensity)
    found = scattering_scores(describe_pattern(made), truth)
    found["saxs_mae"] = distance(given, made, reference) / scale
    true, own = azimuthal(given)[1], azimuthal(made)[1]
    good = (true > 0) & (own > 0)
    logs = np.log(own[good] / true[good])
    found["iq_error"] = float(np.abs(logs - np.median(logs)).mean()) if good.any() else math.nan
    return found


def median_with_interval(
    values: Sequence[float], specimens: Sequence[str], seed: int = 0
) -> tuple[float, float, float]:
    """Median, and the 2.5 and 97.5 percentiles of medians over specimens drawn again; NaN are left out."""
    v = np.asarray(values, np.float64)
    good = np.isfinite(v)
    if not good.any():
        return math.nan, math.nan, math.nan
    v, names = v[good], np.asarray(specimens)[good]
    groups = [v[names == name] for name in sorted(set(names.tolist()))]
    padded = np.full((len(groups), max(map(len, groups))), np.nan)
    for row, group in enumerate(groups):
        padded[row, : len(group)] = group
    drawn = np.random.default_rng(seed).integers(0, len(groups), (_RESAMPLED, len(groups)))
    medians = np.nanmedian(padded[drawn].reshape(_RESAMPLED, -1), 1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(v)), float(low), float(high)
