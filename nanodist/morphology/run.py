"""Measure many masks and write everything that was found: the work of ``nanodist measure``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import Progress
from nanodist._version import __version__
from nanodist.morphology import figures, rois, tables
from nanodist.morphology.files import Skipped, Source, gather, read_mask, values_in
from nanodist.morphology.measure import Measurement, Options, measure
from nanodist.morphology.specimens import compare, summarise
from nanodist.shards.masks import stem_of

Rows = list[dict[str, Any]]

NOTES = (
    "Lengths are in nm where the pixel size is known and in pixels where it is not; the name of a column says which.",
    "contour_length is that of the centre line between the centres of the end caps, tip_to_tip_length that between the"
    " tips (half a width more at each free end). Where the border cuts a wire, both end at the border.",
    "Number means are weighted against the border (Miles-Lantuejoul) and leave out what it cuts; border_weight is the"
    " weight. width_length_mean is over all points of all wires, which needs no such weight.",
    "Volume weights are d^3 for objects (d: equivalent diameter) and width^2 x length for wires.",
    "Intervals are 95 % percentile bootstraps over images: objects of one image are not independent samples.",
    "n counts objects; images counts the images behind a mean.",
)


@dataclass(frozen=True)
class Request:
    """What to write and how to read.

    Args:
        pixel_size_nm: for files that state none; ``override`` takes it for all.
        override: see above.
        meaning: of pixels, see :func:`nanodist.morphology.files.read_mask`.
        value: class of a segmentation to measure.
        overlays: write a picture of each mask.
        rois: write objects for ImageJ and napari.
    """

    pixel_size_nm: float | None = None
    override: bool = False
    meaning: str = "auto"
    value: int | None = None
    overlays: bool = True
    rois: bool = False


@dataclass
class _Found:
    images: Rows
    objects: Rows
    wires: Rows
    widths: list[tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]]
    s2: list[tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]]


def refuse(out: Path, request: Request) -> None:
    """Raise ``UserError`` where ``out`` is used already, or where a request cannot be met."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty directory; name another one or remove it")
    if request.pixel_size_nm is not None and not 0 < request.pixel_size_nm < 1e6:
        raise UserError(f"--pixel-size-nm must be above 0, not {request.pixel_size_nm}")
    if request.override and request.pixel_size_nm is None:
        raise UserError("--override-pixel-size takes the size of --pixel-size-nm for that of the files: give one")
    if request.rois:
        rois.needs_roifile("--rois")


def measure_files(
    given: Sequence[Path],
    out: Path,
    options: Options,
    request: Request,
    names: Mapping[Path, str] | None = None,
    unread: Sequence[Skipped] = (),
) -> tuple[Rows, list[Skipped]]:
    """Measure masks and write tables, summary and figures to the new folder ``out``, whole or not at all.

    Args:
        given: mask files, and folders of them.
        out: a new folder.
        options: of the measurement.
        request: what to write and how to read.
        names: of the specimens in folders of ``given``; their paths, where they have none.
        unread: files that masks could not be made of, for the list of what was skipped.

    Returns:
        The rows of ``images.csv``, and the files that were not measured.

    Raises:
        UserError: a path does not exist, ``out`` is used already, or not one file could be measured.
    """
    refuse(out, request)
    sources, skipped = gather(given, names or {})
    skipped += unread
    if not sources:
        raise UserError(f"{' '.join(map(str, given))}: no image file there; give masks as PNG or TIFF files")
    found = _Found([], [], [], [], [])
    with atomic.directory(out) as root:
        bar = Progress(len(sources), "measuring", "images")
        for source in sources:
            try:
                _one(source, root, options, request, found)
            except UserError as error:
                reason = str(error)
                named = reason if str(source.path) in reason else f"{source.path}: {reason}"
                skipped.append(Skipped(source.path, named, True))
            bar.update()
        bar.close()
        if request.value is not None and found.images and not any(row["coverage"] for row in found.images):
            unreadable = {one.path for one in skipped}
            first = next(source.path for source in sources if source.path not in unreadable)
            which = f"none of the {len(found.images)} files that can be read has such a pixel"
            raise UserError(f"--class {request.value}: {which}; {first} has {values_in(first)}")
        if not found.images:
            more = f" (and {len(skipped) - 1} files more)" if len(skipped) > 1 else ""
            raise UserError(f"nothing could be measured: {next(s for s in skipped if s.error).reason}{more}")
        _write(root, found, skipped, options, request)
    return found.images, skipped


def _one(source: Source, root: Path, options: Options, request: Request, found: _Found) -> None:
    given = request.pixel_size_nm
    mask, size = read_mask(source.path, request.meaning, request.value, given if request.override else None)
    size = given if size is None else size
    measured = measure(mask, size, options)
    of: dict[str, Any] = {"specimen": source.specimen, "image": source.name}
    stem = _stem(source, len(found.images) + 1)
    if request.overlays:
        _save(root / "overlays" / f"{stem}.png", figures.overlay(mask, measured))
    if request.rois:
        _write_rois(root / "rois", stem, mask, measured)
    found.images.append({**of, **measured.image})
    found.objects += [{**of, **row} for row in measured.objects]
    found.wires += [{**of, **row} for row in measured.wires]
    found.widths.append((of, measured.widths))
    found.s2.append((of, measured.s2))


def _stem(source: Source, number: int) -> str:
    """A file name of its own for each image."""
    return f"{number:05d}-" + stem_of(source.name.replace("/", "-"))


def _save(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _write_rois(folder: Path, stem: str, mask: npt.NDArray[Any], measured: Measurement) -> None:
    folder.mkdir(exist_ok=True)
    rois.write_labels(folder / f"{stem}.labels.tif", mask, measured.pixel_size_nm)
    rois.write_shapes(folder / f"{stem}.centre-lines.csv", measured.lines)
    rois.write_imagej(folder / f"{stem}.rois.zip", mask)


def _write(root: Path, found: _Found, skipped: list[Skipped], options: Options, request: Request) -> None:
    specimens = summarise(found.images, options.seed)
    differences = compare(found.images, options.seed)
    written = {
        "images.csv": found.images,
        "objects.csv": found.objects,
        "wires.csv": found.wires,
        "specimens.csv": specimens,
        "comparison.csv": differences,
        "skipped.csv": [{"file": str(s.path), "reason": s.reason, "error": s.error} for s in skipped],
    }
    for name, rows in written.items():
        if rows:
            tables.write_rows(root / name, rows)
    if any(len(columns["wire"]) for _, columns in found.widths):
        tables.write_columns(root / "widths.csv", found.widths)
    tables.write_columns(root / "s2.csv", found.s2)
    if tables.has_parquet():
        tables.to_parquet(root)
    _draw(root, found)
    units = sorted({"px" if image["pixel_size_nm"] is None else "nm" for image in found.images})
    summary = {
        "schema": 1,
        "nanodist": __version__,
        "images": len(found.images),
        "objects": len(found.objects),
        "wires": len(found.wires),
        "units": units,
        "options": asdict(options),
        "request": asdict(request),
        "specimens": specimens,
        "comparison": differences,
        "skipped": written["skipped.csv"],
        "notes": list(NOTES),
    }
    atomic.write_json(root / "summary.json", summary)


def _draw(root: Path, found: _Found) -> None:
    whole = [wire for wire in found.wires if not wire["ends_hidden"]]
    for unit in ("nm", "px"):
        widths: dict[str, list[Any]] = {}
        for of, columns in found.widths:
            if f"width_{unit}" in columns:
                widths.setdefault(of["specimen"], []).append(columns[f"width_{unit}"])
        joined = {specimen: np.concatenate(parts) for specimen, parts in widths.items()}
        picture = figures.histograms(found.objects, whole, joined, unit)
        if picture is not None:
            _save(root / f"histograms_{unit}.png", picture)
