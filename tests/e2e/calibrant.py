"""Calibrants: ``python -m tests.e2e.calibrant [--picture FILE]`` prints how well geometry is found.

Simulated frames (q by pyFAI; gaps, dead, hot, full and marked pixels, beam stop): the geometry that they were made
with against the fitted one, and the masks. Real frames where the data are there: fitted on the odd rings of silver
behenate, where the even ones lie; and how far patterns differ between q and -q. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy.ndimage import binary_dilation

from nanodist.scattering import Frame, Geometry, Given, QGrid, read_frame, regrid
from nanodist.scattering.beam_stop import beam_stop
from nanodist.scattering.calibrant import Calibration, calibrate
from nanodist.scattering.transmission import friedel_ratio
from tests.nanodist.scattering_frames import PERIOD_NM, PIXEL_MM, WAVELENGTH_NM, Simulated, simulated

DATA = Path(os.environ.get("NANODIST_DATA", Path(__file__).resolve().parents[3] / "shared/data")) / "saxs2d"
# What is known to be, or has the ring ratios of, silver behenate.
REAL = {
    "autosaxs_AgBh700_96.9_calib.tif": 0.15418,
    "bioxtas_saxslab.tif": 0.15418,
}
# (row, column) of the beam; in the grazing frames the horizon, the reflected beam and a spot between them.
BEAMS = (
    ("transmission/autosaxs_AgBh700_96.9_calib.tif", (318.5, 587.5)),
    ("transmission/autosaxs_ihs27_sample.tif", (318.5, 587.5)),
    ("transmission/autosaxs_ihs27_buffer.tif", (318.5, 587.5)),
    ("transmission/bioxtas_saxslab.tif", (359.4, 267.4)),
    ("transmission/pysaxs_2018-01-31-OT_0_13459.tif", (903.9, 356.9)),
    ("transmission/sasview_BAM_2D_I.tif", (407.0, 506.0)),
    ("gisaxs/4nm_insitu_00005.tif", (1300.0, 790.0)),
    ("gisaxs/4nm_insitu_00005.tif", (1170.0, 790.0)),
    ("gisaxs/4nm_insitu_00005.tif", (1095.0, 800.0)),
    ("gisaxs/4nm_insitu_00045.tif", (1300.0, 790.0)),
)
CASES: dict[str, dict[str, Any]] = {
    "square, 3 modules": {"rotations_rad": (0.0, 0.0, 0.0)},
    "tilted by 2 degrees": {"rotations_rad": (0.02, -0.03, 0.0)},
    "8 degrees, beam outside": {"rotations_rad": (-0.1, 0.1, 0.0)},
    "beam in a corner": {"foot_px": (580.0, 40.0), "rotations_rad": (0.01, 0.01, 0.0)},
    "far": {"distance_mm": 1200.0, "rotations_rad": (0.01, 0.0, 0.0)},
    "two layers 2 % apart": {"rotations_rad": (0.01, -0.01, 0.0), "second": 1.02},
}


def read_simulated(frame: Simulated, folder: Path) -> Frame:
    """The frame by way of its file and a mask file for the beam stop."""
    tifffile.imwrite(folder / "frame.tif", frame.counts)
    tifffile.imwrite(folder / "stop.tif", frame.beam_stop.astype(np.uint8))
    return read_frame(folder / "frame.tif", Given(mask=folder / "stop.tif"))


def masks(frame: Simulated, read: Frame) -> dict[str, float]:
    """The share of broken pixels that are masked, and how many sound ones are as well."""
    broken = np.logical_or.reduce([*frame.broken.values(), frame.beam_stop])
    found = {kind: float((~read.mask)[where].mean()) for kind, where in frame.broken.items() if where.any()}
    return {**found, "sound pixels masked": int((~read.mask & ~broken).sum())}


def against_truth(frame: Simulated, found: Calibration) -> dict[str, float]:
    """How far a calibration is off: relative distance, pixels, degrees of tilt, and q of the worst pixel."""
    geometry = found.geometry
    q_y, q_x = geometry.q(frame.counts.shape)
    ring = frame.q_inv_nm > 0.3
    off = np.abs(np.hypot(q_y, q_x)[ring] / frame.q_inv_nm[ring] - 1)
    turns = np.degrees(np.subtract(geometry.rotations_rad[:2], frame.rotations_rad[:2]))
    return {
        "distance": geometry.distance_mm / frame.distance_mm - 1,
        "centre_px": math.dist(geometry.beam_centre_px, frame.beam_centre_px),
        "tilt_deg": float(np.abs(turns).max()),
        "worst_q": float(off.max()),
    }


def stop_found(frame: Simulated) -> dict[str, Any]:
    """The share of the beam stop's shadow that is found without a mask file, and how many pixels far beside it."""
    mask = ~np.logical_or.reduce(list(frame.broken.values()))
    geometry = Geometry(
        frame.distance_mm, frame.beam_centre_px, (PIXEL_MM, PIXEL_MM), WAVELENGTH_NM, frame.rotations_rad
    )
    whole = Frame(np.where(mask, frame.counts, 0).astype(np.float32), mask, "counts", "simulated", geometry)
    found = beam_stop(whole)
    beside = found & ~binary_dilation(frame.beam_stop, iterations=4)
    shadow = frame.beam_stop & mask
    return {"share": float(found[shadow].mean()) if shadow.any() else None, "beside": int(beside.sum())}


def _simulations(folder: Path) -> dict[str, Any]:
    results = {}
    print("simulated               distance   centre   tilt      q of the worst pixel   misfit")
    for name, case in CASES.items():
        frame = simulated(**case)
        read = read_simulated(frame, folder)
        found = calibrate(read, WAVELENGTH_NM, (PIXEL_MM, PIXEL_MM), PERIOD_NM)
        if case.get("second"):
            pair = sorted((found, found.other or found), key=lambda one: one.geometry.distance_mm)
            found = pair[0]
            print(f"    pair: {pair[1].geometry.distance_mm / pair[0].geometry.distance_mm - 1:+.3%} apart")
        row = against_truth(frame, found)
        print(
            f"{name:23s} {row['distance']:+.4%} {row['centre_px']:6.3f} px {row['tilt_deg']:.3f} deg "
            f"{row['worst_q']:10.4%}            {found.misfit_px:.3f} px"
        )
        results[name] = {**row, "masks": masks(frame, read), "beam_stop": stop_found(frame)}
        stop = results[name]["beam_stop"]
        share = "outside" if stop["share"] is None else f"{stop['share']:.1%} found"
        print(f"    beam stop without its mask: {share}, {stop['beside']} pixels far beside it")
        print("    masked: " + ", ".join(f"{kind} {value:g}" for kind, value in results[name]["masks"].items()))
    return results


def _real() -> dict[str, Any]:
    results = {}
    for name, wavelength in REAL.items():
        path = DATA / "transmission" / name
        if not path.exists():
            print(f"{name}: not here")
            continue
        found = calibrate(read_frame(path), wavelength, (PIXEL_MM, PIXEL_MM), PERIOD_NM, "odd")
        layers = [found] if found.other is None else [found, found.other]
        for layer in layers:
            errors = layer.errors
            row, column = layer.geometry.beam_centre_px
            tilt = f"tilt {layer.geometry.tilt_deg:.2f} +- {max(errors['rot1_deg'], errors['rot2_deg']):.2f} deg"
            print(
                f"{name}: {layer.geometry.distance_mm:.2f} +- {errors['distance_mm']:.2f} mm, beam ({row:.2f} +- "
                f"{errors['row_px']:.2f}, {column:.2f} +- {errors['column_px']:.2f}) px, {tilt}, misfit "
                f"{layer.misfit_px:.2f} px"
            )
            for ring in layer.rings:
                use = "fitted   " if ring.fitted else "predicted"
                print(f"    ring {ring.order} {use} in {ring.sectors} sectors: {ring.error:+.3%} +- {ring.spread:.3%}")
        even = [ring.error for ring in found.rings if not ring.fitted]
        results[name] = {"worst_even": max(map(abs, even)), "even": even, "layers": len(layers)}
        for layer in layers[1:]:
            results[name]["worst_even_of_other"] = max(abs(ring.error) for ring in layer.rings if not ring.fitted)
    return results


def _halves() -> dict[str, float]:
    """How far real patterns differ between q and -q around their beam; at grazing incidence, around where it may be."""
    results = {}
    for name, centre in BEAMS:
        path = DATA / name
        if not path.exists():
            continue
        given = Given(None, 700.0, centre, (PIXEL_MM, PIXEL_MM), WAVELENGTH_NM, setup="transmission")
        ratio = friedel_ratio(regrid(read_frame(path, given), QGrid(192, 1.0)))
        key = f"{name} {centre}"
        results[key] = math.nan if ratio is None else ratio
        print(f"I(q) against I(-q), median ratio: {results[key]:.2f}  {key}")
    return results


def _picture(path: Path, folder: Path) -> None:
    """A simulated frame with what is masked in colour, and the fitted rings."""
    from nanodist.scattering.picture import draw

    frame = simulated()
    read = read_simulated(frame, folder)
    found = calibrate(read, WAVELENGTH_NM, (PIXEL_MM, PIXEL_MM), PERIOD_NM)
    draw(path, read, found.geometry, [2 * math.pi * ring.order / PERIOD_NM for ring in found.rings], "simulated")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="Also draw a simulated frame with its mask and fitted rings.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {"simulated": _simulations(Path(folder)), "real": _real(), "halves": _halves()}
        if args.picture:
            _picture(args.picture, Path(folder))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
