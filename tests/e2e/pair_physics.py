"""Whether synthetic pairs scatter as their fields must: ``python -m tests.e2e.pair_physics [--store STORE]``.

Periods of aligned lamellae are measured in real space (two edges a period: 2 over the length of edges in an area) and
not taken from a transform; defects add edges, so those of fingerprints are compared with what is stated. Peak ratios,
Porod's prefactor (in two dimensions I q^3 -> 2 x edge length per area) and the invariant (the mean of I over all q is
f (1 - f)) come from theory. ``--store`` measures every pair of a packed set as well.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpc.seeding import generator
from nanodist.scattering import Frame, Pattern, QGrid, azimuthal, regrid
from nanodist.synth.copolymers import Specimen, make_field, measure_order
from nanodist.synth.field_scattering import PolarPattern, rotated, scatter, sharp
from nanodist.synth.saxs_frame import draw_beamline, expose, q_max_inv_nm

SHARP = {"interface_nm": 0.0, "mosaic_deg": 1.0, "period_spread": 0.005}
GRID = QGrid(192, 0.56)


def specimen(morphology: str, period_nm: float, aligned: bool, **more) -> Specimen:
    """One of a known period, oriented along 25 degrees where it is aligned."""
    fraction = {"lamellae": 0.5, "lying_cylinders": 0.32, "standing_cylinders": 0.25, "dots": 0.15}.get(morphology, 0.4)
    quadratic = 1.0 if morphology in ("standing_cylinders", "dots") else 0.0
    alignment = 0.2 if aligned else 0.0
    made = Specimen(morphology, period_nm, 25.0 if aligned else None, fraction, alignment, 120, quadratic, **SHARP)
    return replace(made, **more)


def film(sample: Specimen, fields: int, q_max: float, seed: int = 0) -> tuple[PolarPattern, float, float]:
    """The pattern as the film lies, edge length per area (1/nm), order."""
    made = [make_field(sample, generator(seed, "physics", sample.morphology, n)) for n in range(fields)]
    order = measure_order(made, sample.fold)
    unit = sample.period_nm * order.wave
    pattern = scatter(
        made,
        sample.area_fraction,
        unit,
        q_max_inv_nm=q_max,
        fold=sample.fold,
        oriented=sample.orientation_deg is not None,
        interface_nm=sample.interface_nm,
        bins=900,
    )
    edges = float(np.mean([edge_length(field, sample.area_fraction, unit) for field in made]))
    return rotated(pattern, sample.orientation_deg or 0.0), edges, order.parameter


def edge_length(field, fraction: float, unit_nm: float) -> float:
    """Length of edges in an area, 1/nm: the total variation of the two phases, drawn 8 times as fine as the field."""
    phases, _ = sharp(field, fraction, 8)
    unit = unit_nm * field.stretched
    steps = [length * unit / count for length, count in zip(field.box.periods, phases.shape, strict=True)]
    slopes = [(np.roll(phases, -1, axis) - np.roll(phases, 1, axis)) / (2 * step) for axis, step in enumerate(steps)]
    return float(np.hypot(*slopes).mean())


def peak(q: np.ndarray, intensity: np.ndarray, low: float, high: float) -> float:
    """The centroid of what stands above half of the highest point between ``low`` and ``high``, over the background."""
    known = np.isfinite(intensity)
    x = np.linspace(low, high, 600)
    y = np.interp(x, q[known], intensity[known])
    floor = np.interp(x, [x[0], x[-1]], [y[0], y[-1]])
    above = y - np.minimum(floor, y)
    top = int(np.argmax(above))
    below = np.flatnonzero(above < above[top] / 2)
    first, last = below[below < top].max(initial=-1) + 1, below[below > top].min(initial=len(x))
    return float(np.average(x[first:last], weights=above[first:last]))


def measured(pattern: PolarPattern, seed: int = 0) -> Pattern:
    """What a detector makes of it, on the grid of training."""
    line = draw_beamline(generator(seed, "physics", "beamline"))
    counts = expose(pattern, line, generator(seed, "physics", "counts"))
    mask = counts >= 0
    frame = Frame(np.where(mask, counts, 0).astype(np.float32), mask, "counts", "simulated", line.geometry)
    return regrid(frame, GRID)


def far(seed: int = 0) -> float:
    """As far as the detector sees, in 1/nm."""
    return 1.02 * q_max_inv_nm(draw_beamline(generator(seed, "physics", "beamline")))


def direction(pattern: Pattern, q_star: float, fold: int) -> tuple[float, float]:
    """Direction (degrees, modulo 360 / fold) and order of the first peak of a pattern on its grid.

    What lies under a gap is taken from the opposite side.
    """
    q_y, q_x = pattern.grid.q()
    values = np.where(pattern.mask, pattern.intensity, pattern.intensity[::-1, ::-1])
    known = pattern.mask | pattern.mask[::-1, ::-1]
    ring = known & (np.abs(np.hypot(q_y, q_x) / q_star - 1) < 0.15)
    angle, weight = np.arctan2(q_y[ring], q_x[ring]), values[ring].astype(np.float64)
    bins = np.floor((angle + np.pi) / (2 * np.pi) * 72).astype(int) % 72
    pixels = np.bincount(bins, minlength=72)
    mean = np.bincount(bins, weight, 72) / np.maximum(pixels, 1)
    middle = np.bincount(bins, angle, 72) / np.maximum(pixels, 1)
    mean = np.where(pixels > 0, mean - mean[pixels > 0].min(), 0)
    total = np.sum(mean * np.exp(1j * fold * middle))
    return float(np.degrees(np.angle(total)) / fold % (360 / fold)), float(np.abs(total) / max(mean.sum(), 1e-12))


def lamellae(fields: int, periods_nm: tuple[float, ...] = (20.0, 36.0, 64.0)) -> list[dict[str, float]]:
    """q* of lamellae against the period that is counted in real space, on the detector and before it."""
    rows = []
    for period in periods_nm:
        for aligned in (True, False):
            pattern, edges, order = film(specimen("lamellae", period, aligned), fields, far())
            near = (0.6 * 2 * np.pi / period, 1.5 * 2 * np.pi / period)
            free = peak(pattern.q_inv_nm, pattern.azimuthal(), *near)
            on_grid = measured(pattern)
            seen = peak(*azimuthal(on_grid)[:2], *near)
            turned, _ = direction(on_grid, seen, 2)
            rows.append(
                {
                    "period_nm": period,
                    "aligned": float(aligned),
                    "real_space_error": free / (np.pi * edges) - 1 if aligned else float("nan"),
                    "q_star_error": free * period / (2 * np.pi) - 1,
                    "detector_error": seen * period / (2 * np.pi) - 1,
                    "order": order,
                    "direction_error_deg": (turned - 25 + 90) % 180 - 90 if aligned else float("nan"),
                }
            )
    return rows


def dots(fields: int, period_nm: float = 36.0) -> dict[str, float]:
    """Peaks of an aligned hexagonal lattice over 1, sqrt(3), 2 and sqrt(7) times the first."""
    sample = specimen("standing_cylinders", period_nm, True, steps=300, mosaic_deg=0.5)
    pattern, _, order = film(sample, fields, 3.2 * 2 * np.pi / period_nm)
    q_star = 2 * np.pi / period_nm
    # Where each peak points, so that neighbours in q do not run into it.
    places = {"1": (1.0, 0.0), "sqrt3": (np.sqrt(3), 30.0), "2": (2.0, 0.0), "sqrt7": (np.sqrt(7), 19.107)}
    found = {}
    for name, (ratio, angle) in places.items():
        q = np.linspace(0.86 * ratio * q_star, 1.14 * ratio * q_star, 400)
        turned = np.radians(25 + angle)
        found[name] = peak(q, pattern.at(q * np.sin(turned), q * np.cos(turned)), q[0] - 1e-9, q[-1] + 1e-9)
    first = found["1"]
    return {
        "q_star_error": first / q_star - 1,
        **{f"{name}_error": found[name] / first / places[name][0] - 1 for name in ("sqrt3", "2", "sqrt7")},
        "order": order,
    }


def porod(morphology: str, fields: int, period_nm: float = 30.0, seed: int = 0) -> dict[str, float]:
    """Slope of I(q) between 3 and 15 q*, its prefactor over theory, and the invariant over theory, of sharp fields."""
    sample = specimen(morphology, period_nm, False, steps=60, period_spread=0.02)
    q_star = 2 * np.pi / period_nm
    pattern, edges, _ = film(sample, fields, 15 * q_star, seed)
    q, intensity = pattern.q_inv_nm, pattern.azimuthal()
    tail = (q > 3 * q_star) & (q < 15 * q_star)
    # Means over 3 q* each: reflections and the shape of dots oscillate about the law.
    bins = ((q[tail] / q_star) // 3).astype(int)
    places = np.array([q[tail][bins == b].mean() for b in np.unique(bins)])
    level = np.array([(intensity * q**3)[tail][bins == b].mean() for b in np.unique(bins)])
    invariant = np.trapezoid(intensity * q, q) / (2 * np.pi) + 2 * edges / (2 * np.pi * q[-1])
    fraction = sample.area_fraction
    return {
        "slope": float(np.polyfit(np.log(places), np.log(level), 1)[0] - 3),
        "prefactor_ratio": float(level.mean() / (2 * edges)),
        "invariant_ratio": float(invariant / (fraction * (1 - fraction))),
    }


def packed(path: Path) -> dict[str, dict[str, float]]:
    """Errors of the period in every pattern and every image of a packed set, in percent, by morphology."""
    from nanodist.shards.pair_store import PairStore

    store = PairStore.open(path)
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for i in range(len(store)):
        truth, pattern, image = store.truth(i), store.pattern(i), store.micrograph(i)
        assert pattern is not None and image is not None
        period = truth["period_nm"]
        q, intensity, _ = azimuthal(pattern)
        near = (0.55 if truth["morphology"] == "spinodal" else 0.7) * 2 * np.pi / period, 1.4 * 2 * np.pi / period
        seen = peak(q, intensity, *near)
        turned = float("nan")
        if truth["orientation_deg"] is not None and truth["order_parameter"] > 0.3:
            fold = 6 if truth["centre_distance_nm"] else 2
            half = 180 / fold
            angle, _ = direction(pattern, seen, fold)
            turned = abs((angle - truth["orientation_deg"] + half) % (2 * half) - half)
        in_image = image_peak(image[0], image[1][0], near) * period / (2 * np.pi) - 1
        errors.setdefault(truth["morphology"], []).append((seen * period / (2 * np.pi) - 1, in_image, turned))
    rows = {}
    for name, its in sorted(errors.items()):
        table = np.array(its)
        known = table[:, 2][np.isfinite(table[:, 2])]
        rows[name] = {
            "items": len(its),
            "saxs_median": float(np.median(np.abs(table[:, 0]))),
            "saxs_worst": float(np.abs(table[:, 0]).max()),
            "sem_median": float(np.median(np.abs(table[:, 1]))),
            "sem_worst": float(np.abs(table[:, 1]).max()),
            "direction_median_deg": float(np.median(known)) if known.size else float("nan"),
            "direction_worst_deg": float(known.max()) if known.size else float("nan"),
        }
    return rows


def image_peak(pixels: np.ndarray, pixel_size_nm: float, near: tuple[float, float]) -> float:
    """q* of an image, from the azimuthal mean of its power spectrum under a Hann window."""
    window = np.hanning(len(pixels))
    values = (pixels - pixels.mean()) * window[:, None] * window[None, :]
    power = np.abs(np.fft.fftshift(np.fft.fft2(values))) ** 2
    step = 2 * np.pi / (len(pixels) * pixel_size_nm)
    axis = (np.arange(len(pixels)) - len(pixels) // 2) * step
    modulus = np.hypot(axis[:, None], axis[None, :])
    rings = (modulus / step).astype(int)
    count = np.bincount(rings.ravel())
    q = np.bincount(rings.ravel(), modulus.ravel()) / count
    return peak(q, np.bincount(rings.ravel(), power.ravel()) / count, *near)


def main() -> None:
    """Print the table; last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fields", type=int, default=64)
    parser.add_argument("--store", type=Path, help="Measure the pairs of this store, too.")
    args = parser.parse_args()
    rows = lamellae(args.fields)
    print("lamellae: q* against the period measured in real space, against the stated one, and on the detector")
    for row in rows:
        print(
            f"  {row['period_nm']:4.0f} nm {'aligned' if row['aligned'] else 'fingerprint':<12} real space "
            f"{row['real_space_error']:+.2%}  stated {row['q_star_error']:+.2%}  detector "
            f"{row['detector_error']:+.2%}  order {row['order']:.2f}  direction {row['direction_error_deg']:+.1f} deg"
        )
    lattice = dots(args.fields)
    print("dots: " + ", ".join(f"{name} {value:+.2%}" for name, value in lattice.items() if name != "order"))
    tails = {name: porod(name, args.fields) for name in ("lamellae", "standing_cylinders", "dots", "spinodal")}
    for name, tail in tails.items():
        print(f"Porod, {name:<18} " + ", ".join(f"{what} {value:.3f}" for what, value in tail.items()))
    result = {"lamellae": rows, "dots": lattice, "porod": tails}
    if args.store:
        result["packed"] = packed(args.store)
        for name, row in result["packed"].items():
            print(f"packed, {name:<18} " + ", ".join(f"{what} {value:.3g}" for what, value in row.items()))
    print(json.dumps(result).replace("NaN", "null"))


if __name__ == "__main__":
    main()
