"""Distance, beam centre and tilt of a detector from the rings of a calibrant of known period."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hpc.errors import UserError
from nanodist.scattering.beam import find_beam, find_distance
from nanodist.scattering.crests import Points, crests, profiles, q_per_pixel, split_of
from nanodist.scattering.frame import Frame
from nanodist.scattering.geometry import Geometry

# Huang et al., J. Appl. Cryst. 26, 180 (1993): 58.380(3) Angstrom.
SILVER_BEHENATE_PERIOD_NM = 5.838
Orders = Literal["odd", "all"]
_LEAST_POINTS = 12


@dataclass(frozen=True)
class Ring:
    """How well a ring lies where the geometry says.

    Attributes:
        order: 1 for the first.
        fitted: whether the geometry was fitted on it.
        sectors: in how many of 36 sectors its place was measured.
        q_inv_nm: 2 pi order / period.
        measured_inv_nm: the mean over sectors of the q at which the ring is seen, with the fitted geometry.
        error: measured / expected - 1.
        spread: the standard deviation over sectors of the same.
    """

    order: int
    fitted: bool
    sectors: int
    q_inv_nm: float
    measured_inv_nm: float
    error: float
    spread: float


@dataclass(frozen=True)
class Calibration:
    """A fitted geometry, its standard errors, and all rings that were seen.

    Attributes:
        geometry: as fitted.
        errors: standard errors of distance_mm, row_px, column_px, rot1_deg, rot2_deg, scaled by the misfit.
        misfit_px: the root mean square of what points are off their rings, in pixels.
        rings: by order, those that the fit did not see included.
        other: where each ring is a pair, the calibration on the other ring of each; this one is of the brighter ones.
    """

    geometry: Geometry
    errors: dict[str, float]
    misfit_px: float
    rings: tuple[Ring, ...]
    other: Calibration | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {
            "geometry": self.geometry.as_dict(),
            "tilt_deg": self.geometry.tilt_deg,
            "errors": self.errors,
            "misfit_px": self.misfit_px,
            "rings": [vars(ring) for ring in self.rings],
            "other": None if self.other is None else self.other.as_dict(),
        }


def calibrate(
    frame: Frame,
    wavelength_nm: float,
    pixel_size_mm: tuple[float, float],
    period_nm: float = SILVER_BEHENATE_PERIOD_NM,
    fit_orders: Orders = "all",
    tilt: bool = True,
    beam_centre_px: tuple[float, float] | None = None,
    distance_mm: float | None = None,
) -> Calibration:
    """Fit the geometry on the rings of a calibrant; the wavelength is held, since rings alone do not tell it.

    The place of each ring in each of 36 sectors is the centre of a Gaussian on an exponential. The geometry minimises
    the differences of these to 2 pi order / period (least squares, soft L1), and places are measured again with it
    until they stay. Where rings are pairs, as of calibrant on both windows of a cell, each ring of the pair has its own
    geometry, from the orders at which the two are told apart.

    Args:
        frame: the pattern of the calibrant.
        wavelength_nm: of the radiation.
        pixel_size_mm: (height, width) of a pixel.
        period_nm: of the calibrant's layers.
        fit_orders: ``odd`` leaves the even rings out of the fit, so that they can check it.
        tilt: fit rot1 and rot2 as well.
        beam_centre_px: (row, column) to begin with; found by default.
        distance_mm: to begin with; found by default.

    Raises:
        UserError: no rings are found, or too few of them to fit on.
    """
    frame.require_measured()
    centre = find_beam(frame) if beam_centre_px is None else beam_centre_px
    if distance_mm is None:
        distance_mm = find_distance(frame, centre, pixel_size_mm, wavelength_nm, period_nm)
    start = Geometry(distance_mm, centre, pixel_size_mm, wavelength_nm, source="calibrant")
    task = _Task(frame, period_nm, fit_orders, tilt)
    first, _ = task.refined(start, None, 0, turns=2)
    split = split_of(profiles(frame, first.geometry, period_nm))
    if split is None:
        return task.refined(first.geometry, None, 0, turns=2)[0]
    both = [task.refined(first.geometry, split, layer, turns=2) for layer in range(2)]
    strength = [float(np.median(points.heights)) for _, points in both]
    brighter = int(strength[1] > strength[0])
    return replace(both[brighter][0], other=both[1 - brighter][0])


@dataclass(frozen=True)
class _Task:
    frame: Frame
    period_nm: float
    fit_orders: Orders
    tilt: bool

    def refined(self, start: Geometry, split: float | None, layer: int, turns: int) -> tuple[Calibration, Points]:
        """Crests and geometry in turn, from a geometry (of pairs: one half way between their two)."""
        geometry, around, misfit = start, start, math.inf
        errors: dict[str, float] = {}
        for turn in range(turns):
            points = self.points(around, split, layer)
            chosen = points.orders % 2 == 1 if self.fit_orders == "odd" else np.ones(len(points.orders), dtype=bool)
            self.check(points[chosen])
            # One ring alone tells no tilt from a centre that is off, and a first guess is too far off for it.
            tilt = self.tilt and (turn > 0 or bool(start.tilt_deg)) and len(np.unique(points.orders[chosen])) > 1
            geometry, errors, misfit = fit(geometry, points[chosen], self.period_nm, tilt)
            before = around
            # Pairs are looked for around their middle.
            side = 0.0 if split is None else (0.5 - layer) * split
            around = replace(geometry, distance_mm=geometry.distance_mm * (1 + side))
            moved = np.hypot(*np.subtract(before.beam_centre_px, around.beam_centre_px))
            if turn > 0 and moved < 2e-3 and abs(before.distance_mm / around.distance_mm - 1) < 2e-6:
                break
        return Calibration(geometry, errors, misfit, _rings(points, geometry, self.period_nm, self.fit_orders)), points

    def points(self, around: Geometry, split: float | None, layer: int) -> Points:
        found = crests(profiles(self.frame, around, self.period_nm), split)
        return found[found.layers == layer]

    def check(self, points: Points) -> None:
        if len(points.orders) < _LEAST_POINTS:
            raise UserError(
                f"{self.frame.name} shows rings of period {self.period_nm:g} nm in {len(points.orders)} places only, "
                f"and {_LEAST_POINTS} are needed: check that it is one, or give beam_centre_px and distance_mm"
            )


def fit(start: Geometry, points: Points, period_nm: float, tilt: bool) -> tuple[Geometry, dict[str, float], float]:
    """The geometry whose rings pass through the points, its standard errors, and the misfit in pixels."""
    from scipy.optimize import least_squares

    expected = 2 * math.pi / period_nm * points.orders
    per_pixel = q_per_pixel(start)
    # Pixels are not known better than this: gains, the shape of the beam.
    sigma = np.hypot(points.sigma_px, 0.05)

    def geometry(values: np.ndarray) -> Geometry:
        turns = (float(values[3]), float(values[4]), 0.0) if tilt else start.rotations_rad
        centre = (float(values[0]), float(values[1]))
        return replace(start, distance_mm=float(math.exp(values[2])), beam_centre_px=centre, rotations_rad=turns)

    def residuals(values: np.ndarray) -> np.ndarray:
        q_y, q_x = geometry(values).q_at(points.rows, points.columns)
        return (np.hypot(q_y, q_x) - expected) / per_pixel / sigma

    first = [*start.beam_centre_px, math.log(start.distance_mm)]
    if tilt:
        first.extend(start.rotations_rad[:2])
    scales = [1.0, 1.0, 1e-3, 1e-2, 1e-2][: len(first)]
    result = least_squares(residuals, first, loss="soft_l1", x_scale=scales, xtol=1e-12, ftol=1e-12, gtol=1e-12)
    fitted = geometry(result.x)
    off = residuals(result.x)
    freedom = max(1, len(off) - len(first))
    scale = max(1.0, float(np.sum(np.minimum(off**2, 9.0))) / freedom)
    deviations = np.sqrt(np.diag(np.linalg.pinv(result.jac.T @ result.jac)) * scale)
    errors = {"row_px": float(deviations[0]), "column_px": float(deviations[1])}
    errors["distance_mm"] = float(deviations[2]) * fitted.distance_mm
    if tilt:
        errors.update(rot1_deg=math.degrees(deviations[3]), rot2_deg=math.degrees(deviations[4]))
    return fitted, errors, float(np.sqrt(np.mean((off * sigma) ** 2)))


def _rings(points: Points, geometry: Geometry, period_nm: float, fit_orders: Orders) -> tuple[Ring, ...]:
    q_y, q_x = geometry.q_at(points.rows, points.columns)
    measured = np.hypot(q_y, q_x)
    rings = []
    for order in np.unique(points.orders):
        here = measured[points.orders == order]
        weights = 1 / np.hypot(points.sigma_px[points.orders == order], 0.05) ** 2
        mean = float(np.average(here, weights=weights))
        expected = 2 * math.pi * int(order) / period_nm
        fitted = fit_orders == "all" or int(order) % 2 == 1
        spread = float(np.std(here / expected))
        rings.append(Ring(int(order), fitted, len(here), expected, mean, mean / expected - 1, spread))
    return tuple(rings)
