"""Synthetic pairs on disk: SEM images, SAXS frames, and the table that ``nanodist pack --pairs`` takes.

``sem/NAME.tif`` (8 bits, calibrated as ImageJ does), ``saxs/SAMPLE.tif`` (int32 counts, with a header as a Dectris
detector writes it: geometry, no mask but negative sentinels), ``pairs.csv`` (a row for each SEM image, with cells
left empty where nothing is meant), ``truth/SAMPLE.json`` (everything that was drawn) and ``settings.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import track
from hpc.seeding import generator
from hpc.tables import csv_of
from nanodist.scattering.geometry import Geometry
from nanodist.shards.parallel import results
from nanodist.synth.copolymers import (
    MORPHOLOGIES,
    PERIODS_NM,
    Order,
    Specimen,
    draw_specimen,
    make_field,
    measure_order,
)
from nanodist.synth.field_scattering import PolarPattern, rotated, scatter, sharp
from nanodist.synth.saxs_frame import Beamline, draw_beamline, expose, q_max_inv_nm
from nanodist.synth.sem import SemConditions, SemSettings, box_periods, edge_distance, render_sem, sem_conditions

LEAST_FIELDS = 64
# An orientation that is felt less than this is none: what the fields then show is chance.
LEAST_ORDER = 0.1
TRUTH = ("morphology", "period_nm", "centre_distance_nm", "orientation_deg", "order_parameter", "area_fraction")
COLUMNS = ("saxs", "sem", "sample", *TRUTH)


@dataclass(frozen=True)
class PairSettings:
    """What a set of pairs is made of.

    Attributes:
        samples: specimens.
        images: SEM images of each, of fields of their own.
        fields: periodic fields of each whose scattering is averaged.
        sem: size of the SEM images.
        morphologies: that take turns.
        periods_nm: lowest and highest period.

    Raises:
        UserError: an impossible value.
    """

    samples: int = 72
    images: int = 1
    fields: int = LEAST_FIELDS
    sem: SemSettings = SemSettings()
    morphologies: tuple[str, ...] = MORPHOLOGIES
    periods_nm: tuple[float, float] = PERIODS_NM

    def __post_init__(self) -> None:
        if not (1 <= self.samples <= 99_999 and 1 <= self.images <= 99):
            raise UserError(f"give 1 to 99999 samples of 1 to 99 images each, not {self.samples} of {self.images}")
        if self.fields < LEAST_FIELDS:
            raise UserError(f"give {LEAST_FIELDS} fields or more, not {self.fields}: the beam sees many")
        if not (64 <= self.sem.size_px <= 4096 and self.sem.pixel_size_nm > 0):
            raise UserError(
                f"give SEM images of 64 to 4096 px and a positive pixel size, not {self.sem.size_px} px of "
                f"{self.sem.pixel_size_nm:g} nm"
            )
        low, high = self.periods_nm
        if low < 5 * self.sem.pixel_size_nm or 4 * high > self.sem.field_nm:
            raise UserError(
                f"an image of {self.sem.size_px} px of {self.sem.pixel_size_nm:g} nm shows periods of "
                f"{5 * self.sem.pixel_size_nm:g} to {self.sem.field_nm / 4:g} nm, not {low:g} to {high:g}: change "
                "--size, --pixel-size-nm or --periods-nm"
            )
        draw_specimen(0, 0, self.morphologies, self.periods_nm)


@dataclass(frozen=True)
class Pair:
    """One sample: its frame, its images, and what is true of them."""

    specimen: Specimen
    order: Order
    frame: npt.NDArray[np.int32]
    line: Beamline
    images: list[npt.NDArray[np.uint8]]
    conditions: list[SemConditions]
    seen: list[dict[str, float]]

    def truth(self) -> dict[str, Any]:
        """The columns :data:`TRUTH` of ``pairs.csv``."""
        oriented = self.specimen.orientation_deg if self.order.parameter >= LEAST_ORDER else None
        return {
            "morphology": self.specimen.morphology,
            "period_nm": self.specimen.period_nm,
            "centre_distance_nm": self.specimen.centre_distance_nm,
            "orientation_deg": oriented,
            "order_parameter": self.order.parameter if oriented is not None else 0.0,
            "area_fraction": self.specimen.area_fraction,
        }


def film_pattern(
    specimen: Specimen, seed: int, index: int, fields: int, q_max: float, bins: int = 320
) -> tuple[PolarPattern, Order, float]:
    """The pattern of specimen ``index``, as it lies; the order of its fields; the length of their unit in nm."""
    made = [make_field(specimen, generator(seed, "pair", index, "field", number)) for number in range(fields)]
    order = measure_order(made, specimen.fold)
    unit_nm = specimen.period_nm * order.wave
    oriented = specimen.orientation_deg is not None
    pattern = scatter(
        made,
        specimen.area_fraction,
        unit_nm,
        q_max_inv_nm=q_max,
        fold=specimen.fold,
        oriented=oriented,
        interface_nm=specimen.interface_nm,
        bins=bins,
    )
    if not oriented:
        order = replace(order, parameter=0.0)
    return rotated(pattern, specimen.orientation_deg or 0.0), order, unit_nm


def make_pair(seed: int, index: int, settings: PairSettings) -> Pair:
    """Sample ``index`` of a set: a pure function of the arguments, whatever was made before or elsewhere."""
    specimen = draw_specimen(seed, index, settings.morphologies, settings.periods_nm)
    line = draw_beamline(generator(seed, "pair", index, "beamline"))
    pattern, order, unit_nm = film_pattern(specimen, seed, index, settings.fields, 1.02 * q_max_inv_nm(line))
    frame = expose(pattern, line, generator(seed, "pair", index, "counts"))
    images, conditions, seen = [], [], []
    for number in range(settings.images):
        rng = generator(seed, "pair", index, "sem", number)
        field = make_field(specimen, rng, box_periods(specimen, unit_nm, settings.sem))
        _, level = sharp(field, specimen.area_fraction, 2)
        angle = specimen.orientation_deg if specimen.orientation_deg is not None else float(rng.uniform(0, 360))
        distance = edge_distance(field, level, unit_nm, angle + field.turned_deg, settings.sem, rng)
        conditions.append(sem_conditions(rng))
        images.append(render_sem(distance, specimen.interface_nm, conditions[-1], settings.sem, rng))
        seen.append(
            {
                "orientation_deg": angle + field.turned_deg,
                "period_nm": specimen.period_nm * field.stretched,
                "area_fraction": float((distance > 0).mean()),
            }
        )
    return Pair(specimen, order, frame, line, images, conditions, seen)


def name_of(index: int) -> str:
    """``film-00012``: the name of a sample."""
    return f"film-{index:05d}"


def detector_header(geometry: Geometry) -> str:
    """The text header that Dectris detectors write, with the geometry; Beam_xy counts from the first pixel's corner."""
    row, column = geometry.beam_centre_px
    height, width = geometry.pixel_size_mm
    lines = [
        "Detector: PILATUS 200K, synthetic",
        f"Pixel_size {width * 1e-3:.6e} m x {height * 1e-3:.6e} m",
        "Exposure_time 1.0 s",
        "Count_cutoff 1000000 counts",
        f"Wavelength {geometry.wavelength_nm * 10:.8f} A",
        f"Detector_distance {geometry.distance_mm * 1e-3:.8f} m",
        f"Beam_xy ({column + 0.5:.5f}, {row + 0.5:.5f}) pixels",
    ]
    return "".join(f"# {line}\r\n" for line in lines)


def write_frame(path: Path, counts: npt.NDArray[np.int32], geometry: Geometry) -> None:
    """A frame as TIFF, with its geometry in the header."""
    tifffile.imwrite(
        path, counts, description=detector_header(geometry), compression="zlib", metadata=None, software=False
    )


def write_sem(path: Path, image: npt.NDArray[np.uint8], pixel_size_nm: float) -> None:
    """An 8-bit TIFF whose resolution tags and ImageJ description say the pixel size in nm."""
    per_nm = 1.0 / pixel_size_nm
    tifffile.imwrite(path, image, imagej=True, resolution=(per_nm, per_nm), metadata={"unit": "nm", "axes": "YX"})


def _write_one(root: Path, seed: int, settings: PairSettings, index: int) -> list[dict[str, Any]]:
    made, name = make_pair(seed, index, settings), name_of(index)
    write_frame(root / "saxs" / f"{name}.tif", made.frame, made.line.geometry)
    rows = []
    for number, image in enumerate(made.images):
        own = name if settings.images == 1 else f"{name}-{number:02d}"
        write_sem(root / "sem" / f"{own}.tif", image, settings.sem.pixel_size_nm)
        rows.append({"saxs": f"saxs/{name}.tif", "sem": f"sem/{own}.tif", "sample": name, **made.truth()})
    whole = {
        "schema": 1,
        "seed": seed,
        "index": index,
        **made.truth(),
        "specimen": asdict(made.specimen),
        "wave": made.order.wave,
        "beamline": {**asdict(made.line), "geometry": made.line.geometry.as_dict()},
        "sem": [{**asdict(one), "field": seen} for one, seen in zip(made.conditions, made.seen, strict=True)],
    }
    atomic.write_json(root / "truth" / f"{name}.json", whole)
    return rows


def write_pairs(out: Path, seed: int, settings: PairSettings, workers: int = 1) -> list[dict[str, Any]]:
    """Write a set of pairs to the new directory ``out``, whole or not at all; the rows of ``pairs.csv``.

    ``workers`` processes change the time and no byte.

    Raises:
        UserError: ``out`` holds something already, or ``workers`` is below 1.
    """
    if workers < 1:
        raise UserError(f"give 1 worker or more, not {workers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty directory; name another one or remove it")
    with atomic.directory(out) as root:
        for folder in ("saxs", "sem", "truth"):
            (root / folder).mkdir()
        work = partial(_write_one, root, seed, settings)
        made = results(work, range(settings.samples), workers)
        rows = [row for some in track(made, settings.samples, "synthesising", "samples") for row in some]
        atomic.write_text(root / "pairs.csv", table(rows))
        atomic.write_json(root / "settings.json", {"schema": 1, "kind": "pairs", "seed": seed, **asdict(settings)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """``pairs.csv``: what is unknown or means nothing stays empty."""
    return csv_of(rows, COLUMNS)
