"""A data set of synthetic micrographs on disk: images by class, and everything that is true of them.

``images/CLASS/NAME.tif`` (16 bits, calibrated as ImageJ does), ``truth/CLASS/NAME.instances.tif`` (a page for each
wire or particle, so pixels where they cross belong to both), ``truth/CLASS/NAME.mask.png`` (all of them),
``truth/CLASS/NAME.json``, ``meta.csv`` (a row for each micrograph), ``wires.csv`` or ``objects.csv`` (a row for each
wire or particle) and ``settings.json``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import track
from nanodist.shards.parallel import results
from nanodist.synth.micrograph import Micrograph, Settings, make
from nanodist.synth.particles import SHAPES, make_particles
from nanodist.synth.viruses import VIRUSES, make_viruses
from nanodist.synth.wires import MORPHOLOGIES

# What can be made, and of which classes.
KINDS: dict[str, tuple[str, ...]] = {"wires": (*MORPHOLOGIES,), "particles": (*SHAPES,), "viruses": (*VIRUSES,)}

Job = tuple[str, int]
Rows = tuple[dict[str, Any], list[dict[str, Any]]]


def name_of(morphology: str, index: int) -> str:
    """``network-00012``: the name of a micrograph, without suffix."""
    return f"{morphology}-{index:05d}"


def write_image(path: Path, image: npt.NDArray[np.uint16], pixel_size_nm: float) -> None:
    """A 16-bit TIFF whose resolution tags and ImageJ description say the pixel size in nm."""
    per_nm = 1.0 / pixel_size_nm
    tifffile.imwrite(path, image, imagej=True, resolution=(per_nm, per_nm), metadata={"unit": "nm", "axes": "YX"})


def write_instances(path: Path, instances: npt.NDArray[np.bool_], pixel_size_nm: float) -> None:
    """Masks (n, height, width) as pages of 0 and 255, deflated; read them with :func:`read_instances`."""
    pages = instances.astype(np.uint8) * 255
    per_cm = 1e7 / pixel_size_nm
    options: dict[str, Any] = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(path, pages, photometric="minisblack", compression="zlib", **options)


def read_instances(path: Path) -> npt.NDArray[np.bool_]:
    """The masks of a micrograph's wires, (n, height, width).

    Raises:
        UserError: the file is absent or is no TIFF of masks.
    """
    try:
        pages = tifffile.imread(path)
    except (OSError, ValueError, tifffile.TiffFileError) as error:
        raise UserError(f"{path} cannot be read as a TIFF of instance masks: {error}") from error
    return np.atleast_3d(pages if pages.ndim == 3 else pages[None]) > 0


def _make(kind: str, seed: int, label: str, index: int, settings: Settings) -> Micrograph:
    if kind == "wires":
        return make(seed, label, index, settings)
    return (make_particles if kind == "particles" else make_viruses)(seed, label, index, settings)


def _write_one(root: Path, kind: str, seed: int, settings: Settings, job: Job) -> Rows:
    """Make and write one micrograph below ``root``; its rows of ``meta.csv`` and of the table of things."""
    morphology, index = job
    made, name = _make(kind, seed, morphology, index, settings), name_of(morphology, index)
    truth = root / "truth" / morphology
    write_image(root / "images" / morphology / f"{name}.tif", made.image, settings.pixel_size_nm)
    write_instances(truth / f"{name}.instances.tif", made.instances, settings.pixel_size_nm)
    Image.fromarray(made.instances.any(axis=0).astype(np.uint8) * 255).save(truth / f"{name}.mask.png")
    atomic.write_json(truth / f"{name}.json", made.truth)
    return _rows(name, made)


def _rows(name: str, made: Micrograph) -> Rows:
    truth = made.truth
    conditions = truth["conditions"]
    wires = "wires" in truth
    label = truth["morphology"] if wires else truth["label"]
    things = truth["wires"] if wires else truth["objects"]
    meta: dict[str, Any] = {
        "file": f"{label}/{name}.tif",
        "label": label,
        "micrograph": name,
        "pixel_size_nm": truth["pixel_size_nm"],
        "modality": conditions["modality"],
        "wires" if wires else "objects": len(things),
        "coverage": truth["coverage"],
        **{share: truth[share] for share in ("crossing_share", "overlap_share") if share in truth},
        "dose_e_nm2": conditions["camera"]["dose_e_nm2"],
        "voltage_kv": conditions["lens"]["voltage_kv"],
        "defocus_nm": conditions["lens"]["defocus_nm"],
        "seed": truth["seed"],
        "index": truth["index"],
    }
    rows = [{"file": meta["file"], **{k: v for k, v in one.items() if k != "centre_line_nm"}} for one in things]
    return meta, rows


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_dataset(
    out: Path,
    seed: int,
    micrographs: int,
    classes: Sequence[str],
    settings: Settings,
    workers: int = 1,
    kind: str = "wires",
) -> list[dict[str, Any]]:
    """Write ``micrographs`` of each class to the new directory ``out``, whole or not at all; the rows of ``meta.csv``.

    ``kind`` is one of :data:`KINDS`.

    Raises:
        UserError: ``out`` holds something already, a class is unknown or named twice, or a count is below 1.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; there are {', '.join(KINDS)}")
    unknown = [name for name in classes if name not in KINDS[kind]]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise UserError(f"classes must be some of {', '.join(KINDS[kind])}, each once, not {', '.join(classes)!r}")
    if kind == "viruses" and settings.haadf_share > 0:
        raise UserError("negative stain is taken in bright field only: leave --haadf-share out")
    if not 1 <= micrographs <= 99_999 or workers < 1:
        raise UserError(f"give 1 to 99999 micrographs and 1 worker or more, not {micrographs} and {workers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty directory; name another one or remove it")
    jobs = [(name, index) for name in classes for index in range(micrographs)]
    with atomic.directory(out) as root:
        for name in classes:
            (root / "images" / name).mkdir(parents=True)
            (root / "truth" / name).mkdir(parents=True)
        work = partial(_write_one, root, kind, seed, settings)
        rows = list(track(results(work, jobs, workers), len(jobs), "synthesising", "micrographs"))
        meta = [row for row, _ in rows]
        _write_csv(root / "meta.csv", meta)
        table = "wires.csv" if kind == "wires" else "objects.csv"
        _write_csv(root / table, [thing for _, things in rows for thing in things])
        shared = {
            "schema": 1,
            "kind": kind,
            "seed": seed,
            "micrographs": micrographs,
            "classes": list(classes),
            **asdict(settings),
        }
        atomic.write_json(root / "settings.json", shared)
    return meta
