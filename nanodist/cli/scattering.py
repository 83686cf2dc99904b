"""``nanodist scattering inspect|calibrate|integrate``: what patterns are, their geometry, and their I(q)."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.errors import UserError

if TYPE_CHECKING:
    from nanodist.scattering import Frame, Given
    from nanodist.scattering.calibrant import Calibration

_WAYS = ("inspect", "calibrate", "integrate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; the first one says which of its three ways is taken."""
    parser.epilog = (
        "inspect FILE...: kind, size, geometry, corrections and masked pixels; with --out, a picture of each. "
        "calibrate FILE --wavelength-nm L --out DIR: geometry from silver behenate or another lamellar calibrant, as a "
        "PONI file. integrate FILE... --poni FILE --out DIR: I(q) as text and NXcanSAS, which SasView opens."
    )
    add = parser.add_argument
    add("way", choices=_WAYS, help="What to do.")
    add("files", nargs="+", type=Path, metavar="FILE", help="TIFF, EDF, CBF, MAR, HDF5, NXcanSAS, 2D text, ...")
    add("--out", type=Path, help="Folder for what is written.")
    geometry = parser.add_argument_group("geometry, over what the files state")
    geometry.add_argument("--poni", type=Path, help="Geometry as a PONI file of pyFAI.")
    geometry.add_argument("--distance-mm", type=float, help="From the sample to the detector, along the beam.")
    geometry.add_argument(
        "--beam-centre-px", type=float, nargs=2, metavar=("ROW", "COLUMN"), help="From the centre of the first pixel."
    )
    geometry.add_argument("--pixel-size-mm", type=float, nargs="+", metavar="SIZE", help="Side, or height and width.")
    geometry.add_argument("--wavelength-nm", type=float, help="Of the radiation; 0.15418 for copper K-alpha.")
    pixels = parser.add_argument_group("pixels")
    pixels.add_argument("--mask", type=Path, help="A file of the same size; what is not 0 is left out.")
    pixels.add_argument("--mask-marks", choices=("masked", "measured"), default="masked", help="What is not 0 is ...")
    pixels.add_argument("--find-beam-stop", action="store_true", help="Mask the shadow of the beam stop and its arm.")
    pixels.add_argument("--sigma", type=Path, help="A file with the standard deviation of reduced data.")
    pixels.add_argument("--detector", help="A detector that pyFAI knows, for its pixel size and gaps.")
    pixels.add_argument("--saturation", type=float, help="The count from which a pixel is full.")
    pixels.add_argument("--kind", choices=("counts", "reduced"), help="What the numbers are (default: found out).")
    pixels.add_argument("--setup", choices=("transmission", "grazing"), help="How it was measured.")
    pixels.add_argument("--frame", type=int, help="Which frame of files with several.")
    pixels.add_argument("--dataset", help="Where the numbers are in HDF5 files with several.")
    add("--period-nm", type=float, default=5.838, help="calibrate: of the calibrant (default: 5.838, silver behenate).")
    add("--fit-orders", choices=("all", "odd"), default="all", help="calibrate: odd keeps the even rings as a check.")
    add("--no-tilt", action="store_true", help="calibrate: the detector stands square to the beam.")
    add("--bins", type=int, default=500, help="integrate: rings between the smallest and largest q (default: 500).")


def run(args: argparse.Namespace) -> int:
    """Take one of the three ways; 1 where some of several files failed."""
    if args.way != "inspect" and args.out is None:
        raise UserError(f"nanodist scattering {args.way} needs --out FOLDER for what it writes")
    given = _given(args)
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {args.out}: {error.strerror}; choose another folder") from error
    if args.way == "calibrate":
        return _calibrate(args, given)
    failed = 0
    names: set[str] = set()
    for path in args.files:
        try:
            _inspect(path, given, args.out) if args.way == "inspect" else _integrate(path, given, args, names)
        except UserError as error:
            if len(args.files) == 1:
                raise
            failed += 1
            print(f"nanodist scattering: {error}", file=sys.stderr)
    return 2 if failed == len(args.files) else min(failed, 1)


def _given(args: argparse.Namespace) -> Given:
    from nanodist.scattering import Given

    size = args.pixel_size_mm
    if size is not None and len(size) > 2:
        raise UserError(f"--pixel-size-mm takes one side, or height and width, not {len(size)} numbers")
    return Given(
        poni=args.poni,
        distance_mm=args.distance_mm if args.way != "calibrate" else None,
        beam_centre_px=tuple(args.beam_centre_px) if args.beam_centre_px and args.way != "calibrate" else None,
        pixel_size_mm=(size[0], size[-1]) if size and args.way != "calibrate" else None,
        wavelength_nm=args.wavelength_nm if args.way != "calibrate" else None,
        mask=args.mask,
        mask_marks=args.mask_marks,
        beam_stop="find" if args.find_beam_stop else "kept",
        sigma=args.sigma,
        kind=args.kind,
        setup=args.setup,
        detector=args.detector,
        saturation=args.saturation,
        frame=args.frame,
        dataset=args.dataset,
    )


def _inspect(path: Path, given: Given, out: Path | None) -> None:
    from nanodist.scattering import read_frame

    frame = read_frame(path, given)
    print(describe(frame))
    if out is not None:
        from nanodist.scattering.picture import draw

        draw(out / f"{path.name}.png", frame, title=path.name)


def describe(frame: Frame) -> str:
    """What a pattern is, in a few lines."""
    facts = dict(frame.metadata)
    lines = [f"{frame.name}: {frame.shape[0]} x {frame.shape[1]} {frame.kind}, {facts.pop('format', 'unknown format')}"]
    lines.append(f"  measured    {frame.mask.mean():.1%}")
    if frame.masked:
        lines.append("  masked      " + ", ".join(f"{name} {count}" for name, count in frame.masked.items()))
    if frame.mask.any():
        values = frame.intensity[frame.mask]
        lines.append(f"  intensity   {values.min():g} to {values.max():g}, mean {values.mean():g}")
    if frame.kind == "reduced":
        lines.append(f"  sigma       {'stated' if frame.sigma is not None else 'not stated'}")
    if frame.geometry is not None:
        geometry = frame.geometry
        row, column = geometry.beam_centre_px
        height, width = geometry.pixel_size_mm
        lines.append(
            f"  geometry    {geometry.distance_mm:g} mm, beam ({row:.2f}, {column:.2f}) px, pixel {height:g} x "
            f"{width:g} mm, {geometry.wavelength_nm:g} nm, tilt {geometry.tilt_deg:.2f} deg; from {geometry.source}"
        )
    if frame.geometry is not None or frame.q_planes is not None:
        import numpy as np

        modulus = np.hypot(*frame.q())
        lines.append(f"  q           {modulus.min():.4g} to {modulus.max():.4g} 1/nm")
    else:
        lines.append("  geometry    unknown")
    lines.append(f"  setup       {frame.setup}")
    lines.append("  corrections " + ", ".join(f"{name} {state}" for name, state in frame.corrections.items()))
    if facts:
        lines.append("  header      " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    return "\n".join(lines)


def _calibrate(args: argparse.Namespace, given: Given) -> int:
    from hpc.atomic import write_json
    from nanodist.scattering import read_frame
    from nanodist.scattering.calibrant import calibrate
    from nanodist.scattering.detectors import by_name, by_shape
    from nanodist.scattering.picture import draw
    from nanodist.scattering.poni import write_poni

    if len(args.files) != 1:
        raise UserError(f"calibrate takes one file, not {len(args.files)}: choose the pattern of the calibrant")
    path = args.files[0]
    if args.wavelength_nm is None:
        raise UserError("calibrate needs --wavelength-nm: rings alone do not tell it from the distance")
    frame = read_frame(path, given)
    detector = by_name(args.detector, frame.shape) if args.detector else by_shape(frame.shape)
    size = args.pixel_size_mm or (detector.pixel_size_mm if detector else None)
    if size is None:
        raise UserError(f"the pixel size of {path} is not known: give --pixel-size-mm or --detector")
    found = calibrate(
        frame,
        args.wavelength_nm,
        (size[0], size[-1]),
        args.period_nm,
        args.fit_orders,
        not args.no_tilt,
        tuple(args.beam_centre_px) if args.beam_centre_px else None,
        args.distance_mm,
    )
    print(summary(found))
    stem = args.out / path.stem
    write_poni(stem.with_name(f"{path.stem}.poni"), found.geometry)
    write_json(stem.with_name(f"{path.stem}.json"), found.as_dict())
    rings = [2 * math.pi * ring.order / args.period_nm for ring in found.rings]
    draw(stem.with_name(f"{path.stem}.png"), frame, found.geometry, rings, path.name)
    return 0


def summary(found: Calibration) -> str:
    """A calibration as lines of text; of pairs of rings, the fainter ones behind."""
    geometry, errors = found.geometry, found.errors
    row, column = geometry.beam_centre_px
    lines = [
        f"distance {geometry.distance_mm:.3f} +- {errors['distance_mm']:.3f} mm, beam at row {row:.3f} +- "
        f"{errors['row_px']:.3f}, column {column:.3f} +- {errors['column_px']:.3f}, tilt {geometry.tilt_deg:.3f} deg, "
        f"misfit {found.misfit_px:.3f} pixels"
    ]
    for ring in found.rings:
        use = "fitted" if ring.fitted else "predicted"
        lines.append(
            f"  ring {ring.order:2d} {use:9s} q {ring.measured_inv_nm:.4f} of {ring.q_inv_nm:.4f} 1/nm "
            f"({ring.error:+.3%}), {ring.sectors} sectors"
        )
    if found.other is not None:
        lines.append("each ring is a pair (two layers of calibrant); the fainter ones:")
        lines.append(summary(found.other))
    return "\n".join(lines)


def _integrate(path: Path, given: Given, args: argparse.Namespace, names: set[str]) -> None:
    from nanodist.scattering import read_frame
    from nanodist.scattering.curve import integrate, write_curve
    from nanodist.scattering.nxcansas import write_nxcansas_curve
    from nanodist.scattering.picture import draw_curves

    if args.bins < 2:
        raise UserError(f"--bins is {args.bins}: at least 2 rings are needed")
    if path.stem in names:
        raise UserError(f"{path} would overwrite the curve of another {path.stem}: integrate it into another folder")
    names.add(path.stem)
    frame: Any = read_frame(path, given)
    curve = integrate(frame, args.bins)
    write_curve(args.out / f"{path.stem}.txt", curve)
    write_nxcansas_curve(args.out / f"{path.stem}.h5", curve)
    draw_curves(args.out / f"{path.stem}.png", [(path.name, curve)])
    print(f"{path}: {len(curve.q_inv_nm)} points from {curve.q_inv_nm[0]:.4g} to {curve.q_inv_nm[-1]:.4g} 1/nm")
