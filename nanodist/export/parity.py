"""Parity: what others load from an export gives the features of the run, from image files on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import generator
from nanodist.export.graph import accepts, smallest_side
from nanodist.export.loading import TORCHVISION_RGB, loading_code
from nanodist.export.precision import TOLERANCES
from nanodist.pixels import Image

if TYPE_CHECKING:
    from nanodist.encoders import Encoder

TIMEOUT_S = 1800
LIBRARIES = {
    "timm": ["timm", "torch"],
    "huggingface": ["transformers", "timm", "torch"],
    "torchvision": ["torchvision", "torch"],
    TORCHVISION_RGB: ["torchvision", "torch"],
    "onnx": ["onnxruntime"],
    "torch-export": ["torch"],
}
Answers = Sequence[npt.NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a recipient does with one format.

    Attributes:
        name: of the row in the report; the part before a space is a key of :data:`LIBRARIES`.
        code: Python of the card.
        function: name that the code defines; it is given the pixels of a file.
        wanted: what the run answers to each image: arrays (several where the function returns several).
        first: place of the first of these images among all that are compared.
    """

    name: str
    code: str
    function: str
    wanted: Sequence[Answers]
    first: int = 0

    def of(self, images: Sequence[T]) -> Sequence[T]:
        """Those that are its own among all images, or their files."""
        return images[self.first : self.first + len(self.wanted)]


def check(
    encoder: Encoder, folder: Path, formats: list[str], any_size: bool, precision: str = "fp32"
) -> dict[str, Any]:
    """Load each format of ``folder`` in a process that cannot import nanodist, and compare features.

    Args:
        encoder: the source, on the CPU.
        folder: the export, not yet under its final name.
        formats: what is in it.
        any_size: whether the graphs in it take other image sizes than the smallest.
        precision: of the export; the source is float32.

    Returns:
        What :func:`compare` returns.

    Raises:
        UserError: a format cannot be loaded, or its features are not those of the source.
    """
    names = [name for kind in formats for name in ([kind, TORCHVISION_RGB] if kind == "torchvision" else [kind])]
    images = sample_images(encoder)
    wanted = [[encoder.embed([image])[0]] for image in images]
    jobs = []
    for name in names:
        kind = name
        if name == "huggingface" and importlib.util.find_spec("transformers") is None:
            kind = "timm"  # the same files, by the library that transformers wraps; the report names it
        code = loading_code(encoder.spec, json.dumps(str(folder.resolve()))[1:-1], kind, precision)
        graph = name in ("onnx", "torch-export")
        jobs.append(Job(name, code, "embed", wanted if any_size or not graph else wanted[:1]))
    return compare(jobs, images, precision)


def compare(
    jobs: Sequence[Job], images: Sequence[Image], precision: str = "fp32", tolerance: float | None = None
) -> dict[str, Any]:
    """Run every job in a process that cannot import nanodist, on image files, and compare what it answers.

    Args:
        jobs: for each format what is run, and what has to come out; fewer answers than images leave the others out.
        images: (H, W) of uint8, uint16 (then PNG files) or float32 (TIFF files).
        precision: a key of :data:`nanodist.export.precision.TOLERANCES`.
        tolerance: another one than that of the precision.

    Returns:
        JSON-able: ``precision``, ``tolerance`` and, a row a format, ``loaded_with`` (versions), ``images`` (height,
        width, type), ``largest_difference`` and ``relative_difference`` (to the largest number of its array).

    Raises:
        UserError: a format cannot be loaded, or its answers are not the wanted ones.
    """
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    with tempfile.TemporaryDirectory(prefix="nanodist-parity-") as scratch:
        files = _write(images, Path(scratch))
        results = _run([_task(job, files) for job in jobs], Path(scratch))
        rows = [_row(job, results[job.name], images, Path(scratch), tolerance) for job in jobs]
    return {"schema": 1, "precision": precision, "tolerance": tolerance, "formats": rows}


def _task(job: Job, files: list[str]) -> dict[str, Any]:
    libraries = LIBRARIES[job.name.split(" ")[0]]
    used = job.of(files)
    return {"name": job.name, "code": job.code, "function": job.function, "images": used, "libraries": libraries}


def sample_images(encoder: Encoder) -> list[Image]:
    """Noise of 8 and 16 bit in sizes that the encoder takes; the first has the smallest legal square.

    Raises:
        UserError: the encoder does not even embed an image of the size of its views.
    """
    side = smallest_side(encoder)
    if not accepts(encoder, side, side):
        raise UserError(f"{encoder.name} cannot embed an image of {side} x {side} px, so there is nothing to compare.")
    draw = generator(0, "export parity")
    shapes = [(side, side), (2 * side, side), (side + 29, side + 13), (side // 2, side)]
    types = (np.uint8, np.uint16, np.uint8, np.uint16)
    return [
        draw.integers(0, np.iinfo(kind).max, shape, endpoint=True).astype(kind)
        for shape, kind in zip(shapes, types, strict=True)
        if shape == (side, side) or accepts(encoder, *shape)
    ]


def _write(images: Sequence[Image], scratch: Path) -> list[str]:
    from PIL import Image as Pil

    endings = ["tif" if image.dtype == np.float32 else "png" for image in images]
    files = [scratch / f"image-{i}.{ending}" for i, ending in enumerate(endings)]
    for image, file in zip(images, files, strict=True):
        Pil.fromarray(image).save(file)
    return [str(file) for file in files]


def _run(tasks: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    job = scratch / "job.json"
    job.write_text(json.dumps({"path": [entry for entry in sys.path if entry], "tasks": tasks}))
    command = [sys.executable, "-I", "-W", "ignore", str(Path(__file__).with_name("foreign.py")), str(job)]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"Loading the export back took over {TIMEOUT_S} s, so it was not written.") from None
    if done.returncode or not (scratch / "results.json").is_file():
        tail = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        raise UserError(f"The export could not be loaded back, so it was not written: {tail}")
    results: dict[str, Any] = json.loads((scratch / "results.json").read_text())
    return results


def _row(job: Job, result: dict[str, Any], images: Sequence[Image], scratch: Path, tolerance: float) -> dict[str, Any]:
    name = job.name
    if "error" in result:
        raise UserError(
            f"The {name} export cannot be loaded back without nanodist, so nothing was written: {result['error']}"
        )
    differences = []
    shown = job.of(images)
    for i, wanted in enumerate(job.wanted):
        with np.load(scratch / f"{name}-{i}.npz", allow_pickle=False) as file:
            found = [file[key] for key in file.files]
        for got, want in zip(found, wanted, strict=True):
            differences.append(_difference(name, got, want, shown[i], tolerance))
    return {
        "format": name,
        "loaded_with": result["loaded_with"],
        "images": [[*image.shape, str(image.dtype)] for image in shown],
        "largest_difference": max(a for a, _ in differences),
        "relative_difference": max(r for _, r in differences),
    }


def _difference(
    name: str, found: npt.NDArray[Any], wanted: npt.NDArray[Any], image: Image, tolerance: float
) -> tuple[float, float]:
    """The largest difference of an answer, and its share of the largest number."""
    if found.shape != wanted.shape:
        raise UserError(f"The {name} export gives {found.shape} numbers instead of {wanted.shape}: not written.")
    absolute, largest = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
    if not absolute <= tolerance * largest:  # also catches NaN
        raise UserError(
            f"The answers of the {name} export differ from the run's by {absolute:.2e} on an image of "
            f"{image.shape[1]} x {image.shape[0]} px (allowed: {tolerance * largest:.1e}), so nothing was written."
        )
    return absolute, absolute / largest if largest else 0.0
