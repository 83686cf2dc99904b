"""``nanodist pairvae generate``: SEM images of patterns, and patterns of SEM images, with a table of descriptors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.errors import UserError
from hpc.tables import csv_of
from nanodist.micrographs.read import read_micrograph
from nanodist.pairvae.describe import describe_image, describe_pattern, image_spectrum, row_of
from nanodist.pairvae.figures import write_curves
from nanodist.pairvae.images import check_large_enough, prepared, tiling
from nanodist.pairvae.load import Trained, load
from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.reference import Known, Look, read_reference
from nanodist.pairvae.scores import consistency
from nanodist.scattering.azimuthal import azimuthal
from nanodist.scattering.pattern import Pattern
from nanodist.scattering.read import Given, read_frame
from nanodist.scattering.regrid import regrid
from nanodist.scattering.write import write_pattern

TABLE_FILE = "descriptors.csv"
_BEFORE = (
    "; this run is of before: it draws from the prior, and knows only latents and reconstructions of its training; "
    "give its training command again, which trains nothing and writes the rest"
)


@dataclass(frozen=True)
class Wanted:
    """What is to be made.

    Attributes:
        given: what the files are.
        draws: images of each pattern; ``None``: as the recipe says.
        seed: of the draws.
        poni: geometry of frames that state none.
        pixel_size_nm: of images that state none.
        draws_from: what draws begin with; ``None``: as the recipe says.
    """

    given: Literal["saxs", "sem"]
    draws: int | None = None
    seed: int = 0
    poni: Path | None = None
    pixel_size_nm: float | None = None
    draws_from: Literal["field", "prior"] | None = None


def generate(run_dir: Path, files: Sequence[Path], out: Path, wanted: Wanted) -> str:
    """Make the other member of each file, in a new folder ``out`` with ``descriptors.csv``.

    A file that cannot be read has its reason in the column ``problem`` and no picture.

    Returns:
        What was done, as one line.

    Raises:
        UserError: the run or the folder does not suit, or no file could be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already; give a new folder")
    trained, known = load(run_dir).drawing(wanted.draws_from), read_reference(run_dir)[wanted.given]
    make: Callable[..., dict[str, Any]] = _sem_of if wanted.given == "saxs" else _saxs_of
    rows: list[dict[str, Any]] = []
    with atomic.directory(out) as folder:
        for number, path in enumerate(files):
            name = f"{number + 1:0{len(str(len(files)))}d}-{path.stem}"
            try:
                rows.append({"file": str(path), "name": name, **make(trained, known, path, folder / name, wanted)})
            except UserError as error:
                rows.append({"file": str(path), "name": name, "problem": str(error)})
        failed = [row["problem"] for row in rows if "problem" in row]
        if len(failed) == len(rows):
            raise UserError(failed[0] + (f" (and {len(failed) - 1} more files)" if len(failed) > 1 else ""))
        atomic.write_text(folder / TABLE_FILE, _csv(rows))
    strange = sum(bool(row.get("out_of_distribution")) for row in rows)
    return (
        f"{len(rows) - len(failed)} of {len(rows)} files; {strange} unlike the training part"
        + (f"; {len(failed)} could not be read, see 'problem'" if failed else "")
        + ("" if known.whole else _BEFORE)
        + f"; {out / TABLE_FILE}"
    )


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    told = ({k: f"{value:.6g}" if isinstance(value, float) else value for k, value in row.items()} for row in rows)
    return csv_of(told, names)


def _write_image(path: Path, image: npt.NDArray[np.floating], pixel_size_nm: float) -> None:
    """A float TIFF with its pixel size."""
    import tifffile

    buffer, per_cm = io.BytesIO(), 1e7 / pixel_size_nm
    tifffile.imwrite(
        buffer,
        np.asarray(image, np.float32),
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        compression="zlib",
        metadata=None,
    )
    atomic.write_bytes(path, buffer.getvalue())


def _strangeness(known: Known, look: Look) -> dict[str, Any]:
    """Whether an input is unlike the training part, in what, and by how much."""
    found = known.strangeness(look)
    beyond = [name for name, value in found.items() if not value <= 1]
    parts = {"reconstruction_error" if k == "reconstruction" else f"{k}_distance": value for k, value in found.items()}
    return {"out_of_distribution": bool(beyond), "unlike_in": " ".join(beyond), **parts}


def _sem_of(trained: Trained, known: Known, path: Path, stem: Path, wanted: Wanted) -> dict[str, Any]:
    """Draws of SEM images of a pattern, their mean and spread, and what they show."""
    geometry = trained.geometry
    pattern = regrid(read_frame(path, Given(poni=wanted.poni)), geometry.grid)
    if geometry.kind != "mixed" and pattern.kind != geometry.kind:
        raise UserError(f"{path} holds {pattern.kind} data, and the run was trained on {geometry.kind}")
    images = trained.sem_of(pattern, wanted.draws or trained.recipe.draws, wanted.seed, path.name)
    pixel = geometry.pixel_size_nm
    for number, image in enumerate(images):
        _write_image(stem.with_name(f"{stem.name}-draw-{number + 1:02d}.tif"), image, pixel)
    _write_image(stem.with_name(f"{stem.name}-mean.tif"), images.mean(0), pixel)
    _write_image(stem.with_name(f"{stem.name}-spread.tif"), images.std(0), pixel)
    each = [describe_pattern(image_spectrum([image], pixel)).period_nm for image in images]
    areas = [describe_image(image, pixel).area_fraction for image in images]
    given = {f"given_{name}": value for name, value in row_of(describe_pattern(pattern)).items()}
    return {
        **_strangeness(known, known.look(trained, pattern)),
        **row_of(describe_pattern(image_spectrum(list(images), pixel))),
        "period_spread_nm": float(np.nanstd(each)) if np.isfinite(each).any() else math.nan,
        "area_fraction": float(np.nanmean(areas)),
        "area_fraction_spread": float(np.nanstd(areas)),
        "draws": len(images),
        "scattering_mismatch": consistency(images, pattern, CropScattering(geometry.size_px, pixel)),
        **given,
    }


def _saxs_of(trained: Trained, known: Known, path: Path, stem: Path, wanted: Wanted) -> dict[str, Any]:
    """The expected pattern of a micrograph as float TIFF with its q, I(q) as a plot and as a table, descriptors."""
    geometry = trained.geometry
    micrograph = read_micrograph(path)
    pixel = micrograph.pixel_size_nm or (
        (wanted.pixel_size_nm, wanted.pixel_size_nm) if wanted.pixel_size_nm is not None else None
    )
    if pixel is None:
        raise UserError(f"{path} states no pixel size; give --pixel-size-nm")
    image = prepared(micrograph.pixels, pixel, geometry.pixel_size_nm, trained.recipe.data)
    check_large_enough(image, geometry.size_px, path.name, geometry.pixel_size_nm)
    crops = tiling(image, geometry.size_px)
    made = trained.saxs_of(crops)
    everywhere = np.ones(made.shape, bool)
    pattern = Pattern(made, None, everywhere, geometry.grid, "reduced")
    write_pattern(
        stem.with_name(f"{stem.name}-saxs.tif"), pattern, made_by="nanodist pairvae generate", from_image=path.name
    )
    q, intensity, _ = azimuthal(pattern)
    lines = ["q_inv_nm,intensity", *(f"{a:.6g},{b:.6g}" for a, b in zip(q, intensity, strict=True))]
    atomic.write_text(stem.with_name(f"{stem.name}-iq.csv"), "\n".join(lines) + "\n")
    write_curves(stem.with_name(f"{stem.name}-iq.png"), [{"expected": (q, intensity)}], [stem.name])
    parts = [describe_image(crop, geometry.pixel_size_nm) for crop in crops]
    return {
        **_strangeness(known, known.look(trained, None, crops)),
        **row_of(describe_pattern(pattern)),
        "area_fraction": float(np.nanmean([part.area_fraction for part in parts])),
        "crops": len(crops),
    }
