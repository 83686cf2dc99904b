"""Parity: what others load from an export gives the features of the run, from image files on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc.errors import UserError
from hpc.seeding import generator
from nanodist.export.graph import accepts, smallest_side
from nanodist.export.loading import TORCHVISION_RGB, loading_code
from nanodist.pixels import Image

if TYPE_CHECKING:
    from nanodist.encoders import Encoder

# Relative to the largest feature. The same weights through other kernels: 1e-7 to 1e-6 was seen; a wrong weight,
# argument or preprocessing gives 1e-3 and more.
TOLERANCE = 1e-5
TIMEOUT_S = 1800
LIBRARIES = {
    "timm": ["timm", "torch"],
    "huggingface": ["transformers", "timm", "torch"],
    "torchvision": ["torchvision", "torch"],
    TORCHVISION_RGB: ["torchvision", "torch"],
    "onnx": ["onnxruntime"],
    "torch-export": ["torch"],
}


def check(encoder: Encoder, folder: Path, formats: list[str], any_size: bool) -> dict[str, Any]:
    """Load each format of ``folder`` in a process that cannot import nanodist, and compare features.

    Args:
        encoder: the source, on the CPU.
        folder: the export, not yet under its final name.
        formats: what is in it.
        any_size: whether the graphs in it take other image sizes than the smallest.

    Returns:
        JSON-able: ``tolerance`` and, a row a format, ``loaded_with`` (versions), ``images`` (height, width, type),
        ``largest_difference`` and ``relative_difference`` (to the largest feature).

    Raises:
        UserError: a format cannot be loaded, or its features are not those of the source.
    """
    names = [name for kind in formats for name in ([kind, TORCHVISION_RGB] if kind == "torchvision" else [kind])]
    images = sample_images(encoder)
    expected = [encoder.embed([image])[0] for image in images]
    with tempfile.TemporaryDirectory(prefix="nanodist-parity-") as scratch:
        tasks = [_task(encoder, folder, name, _write(images, Path(scratch)), any_size) for name in names]
        results = _run(tasks, Path(scratch))
        rows = [_row(task, results[task["name"]], images, expected, Path(scratch)) for task in tasks]
    return {"schema": 1, "tolerance": TOLERANCE, "formats": rows}


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


def _write(images: list[Image], scratch: Path) -> list[str]:
    from PIL import Image as Pil

    files = [scratch / f"image-{i}.png" for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        Pil.fromarray(image).save(file)
    return [str(file) for file in files]


def _task(encoder: Encoder, folder: Path, name: str, files: list[str], any_size: bool) -> dict[str, Any]:
    kind = name
    if name == "huggingface" and importlib.util.find_spec("transformers") is None:
        kind = "timm"  # the same files, by the library that transformers wraps; the report names it
    graph = name in ("onnx", "torch-export")
    return {
        "name": name,
        "code": loading_code(encoder.spec, json.dumps(str(folder.resolve()))[1:-1], kind),
        "images": files if any_size or not graph else files[:1],
        "libraries": LIBRARIES[kind],
    }


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


def _row(
    task: dict[str, Any], result: dict[str, Any], images: list[Image], expected: list[Any], scratch: Path
) -> dict[str, Any]:
    name = task["name"]
    if "error" in result:
        raise UserError(
            f"The {name} export cannot be loaded back without nanodist, so nothing was written: {result['error']}"
        )
    differences = []
    for i in range(len(task["images"])):
        found, wanted = np.load(scratch / f"{name}-{i}.npy"), expected[i]
        if found.shape != wanted.shape:
            raise UserError(f"The {name} export gives {found.shape} features instead of {wanted.shape}: not written.")
        absolute, largest = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
        if not absolute <= TOLERANCE * largest:  # also catches NaN
            raise UserError(
                f"The features of the {name} export differ from the run's by {absolute:.2e} on an image of "
                f"{images[i].shape[1]} x {images[i].shape[0]} px (allowed: {TOLERANCE * largest:.1e}), so nothing was "
                "written."
            )
        differences.append((absolute, absolute / largest if largest else 0.0))
    return {
        "format": name,
        "loaded_with": result["loaded_with"],
        "images": [[*image.shape, str(image.dtype)] for image in images[: len(task["images"])]],
        "largest_difference": max(a for a, _ in differences),
        "relative_difference": max(r for _, r in differences),
    }
