"""Which files are masks, of which specimen, and what their pixels mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from scipy import ndimage

from hpc.errors import UserError
from nanodist.micrographs import count_micrographs, is_named_like_one, read_micrograph
from nanodist.micrographs.tiff import TIFF_MAGIC

MEANINGS = ("auto", "mask", "labels", "layers")
INSTANCES = ".instances.tif"
UNION = ".mask.png"
_SIDECARS = (".json", ".csv", ".yaml", ".yml", ".md", ".parquet", ".zip", ".roi")
_MOST_LABELS = 65535


@dataclass(frozen=True)
class Source:
    """A file to measure: its path, the specimen it is of, and its name in tables."""

    path: Path
    specimen: str
    name: str


@dataclass(frozen=True)
class Skipped:
    """A file that was not measured: why, and whether that is an error (it was named, or looks like an image)."""

    path: Path
    reason: str
    error: bool


def gather(given: Sequence[Path], names: Mapping[Path, str]) -> tuple[list[Source], list[Skipped]]:
    """Masks of the files and folders given; each folder is a specimen, loose files together are one.

    Specimens have the ``names`` of their folders, or the folders' paths.

    Of a folder that ``nanodist synth`` made the truth is taken, and where a micrograph has both a file of instances and
    a mask of all of them, the instances.

    Raises:
        UserError: one does not exist.
    """
    sources: list[Source] = []
    skipped: list[Skipped] = []
    for path in given:
        if not path.exists():
            raise UserError(f"{path} does not exist; give mask files, or folders of masks")
        if not path.is_dir():
            sources.append(Source(path, "files", path.name))
            continue
        root = path / "truth" if (path / "truth").is_dir() and (path / "settings.json").is_file() else path
        for file in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")):
            name = file.relative_to(root).as_posix()
            if file.name.endswith(UNION) and file.with_name(file.name[: -len(UNION)] + INSTANCES).exists():
                continue
            if is_named_like_one(file):
                sources.append(Source(file, names.get(path, str(path)), name))
            elif not file.name.lower().endswith(_SIDECARS):
                skipped.append(Skipped(file, "its name is not that of an image", False))
    return sources, skipped


def read_mask(
    path: Path, meaning: str = "auto", value: int | None = None, pixel_size_nm: float | None = None
) -> tuple[npt.NDArray[Any], float | None]:
    """A mask as :func:`nanodist.morphology.measure` takes it, and its pixel size in nm where the file says one.

    Args:
        path: an image file; a TIFF of several pages of 0 and one other value holds a layer for each object.
        meaning: ``mask`` (all that is not 0 is material), ``labels`` (each number an object), ``layers``, or ``auto``:
            layers where there are pages, a mask where there is one value beside 0, and labels where every number is
            one connected piece.
        value: take the pixels of this value (a class of a segmentation) as the mask, which may be none.
        pixel_size_nm: take this for its pixel size, whatever the file says.

    Raises:
        UserError: unreadable, no mask, or one whose meaning is not clear.
    """
    if meaning not in MEANINGS:
        raise UserError(f"no meaning {meaning!r} of pixels; there are {', '.join(MEANINGS)}")
    pages = count_micrographs(path)
    if pages > 1 and meaning in ("auto", "layers") and value is None:
        return _layers(path, pages, pixel_size_nm)
    if pages > 1:
        raise UserError(f"{path} has {pages} pages; give one image, or --as layers where each page is an object")
    micrograph = read_micrograph(path)
    size = pixel_size_nm or _square(micrograph.pixel_size_nm, path)
    pixels = micrograph.pixels
    if pixels.dtype.kind == "f":
        if not np.array_equal(pixels, np.rint(pixels)):
            raise UserError(f"{path} holds fractions: give a mask of whole numbers, 0 for the background")
        pixels = pixels.astype(np.int64)
    if value is not None:
        return pixels == value, size
    return _meant(pixels, meaning, path), size


def _meant(pixels: npt.NDArray[Any], meaning: str, path: Path) -> npt.NDArray[Any]:
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0:
        raise UserError(f"{path} holds negative values: give a mask, 0 for the background")
    if meaning in ("mask", "layers"):
        return pixels > 0
    if high > _MOST_LABELS * 16:
        raise UserError(f"{path} holds values up to {high}: it is no mask and no image of labels")
    if meaning == "labels":
        return pixels.astype(np.int32)
    # A block of rows at a time, since bincount makes 64 bits of what it counts.
    counts = np.zeros(high + 1, np.int64)
    for top in range(0, len(pixels), 512):
        counts += np.bincount(pixels[top : top + 512].ravel().astype(np.int64), minlength=high + 1)
    values = np.flatnonzero(counts)
    if len(values) <= 2 and (values[0] == 0 or len(values) == 1):
        return pixels > 0
    labels = pixels.astype(np.int32)
    if values[0] != 0:
        raise UserError(
            f"{path} has no pixel of value 0, so that it is a micrograph and no mask, or has no background: say --as"
            " labels or --class VALUE"
        )
    split = next(_in_pieces(labels, counts), None)
    if split is not None:
        raise UserError(
            f"{path} holds {_some(values)}, and {split[0]} is in {split[1]} pieces: say --as labels where each"
            " number is an object, --class VALUE for one class of a segmentation, or --as mask for all that is not 0; a"
            " micrograph has to be segmented first"
        )
    return labels


def _in_pieces(labels: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None and counts[number]:
            _, pieces = ndimage.label(labels[box] == number, np.ones((3, 3)))
            if pieces > 1:
                yield number, pieces


def values_in(path: Path) -> str:
    """The values of an image file in words."""
    return _some(np.unique(read_micrograph(path).pixels))


def _layers(path: Path, pages: int, pixel_size_nm: float | None) -> tuple[npt.NDArray[np.bool_], float | None]:
    first = read_micrograph(path, 0)
    height, width = first.pixels.shape
    if pages * height * width > 2**32:
        raise UserError(f"{path} has {pages} layers of {height} x {width} pixels, more than are read: give labels")
    layers = np.zeros((pages, height, width), bool)
    with _opened_once(path, pages) as tif:
        for number in range(pages):
            pixels = _page(path, number, tif)
            if pixels.shape != (height, width) or len(np.unique(pixels)) > 2:
                raise UserError(
                    f"{path}, page {number}: a layer holds one object as 0 and one other value, all of one size"
                )
            layers[number] = pixels > 0
    return layers, pixel_size_nm or _square(first.pixel_size_nm, path)


@contextmanager
def _opened_once(path: Path, pages: int) -> Iterator[tifffile.TiffFile | None]:
    """A TIFF whose pages are its layers; ``None`` for other stacks, such as MRC, gzip or many layers in one page.

    Those are read layer by layer, which opens the file anew for each: minutes for some hundred layers.
    """
    with open(path, "rb") as file:
        is_tiff = file.read(4) in TIFF_MAGIC
    if not is_tiff:
        yield None
        return
    with tifffile.TiffFile(path) as tif:
        yield tif if len(tif.pages) == pages else None


def _page(path: Path, number: int, tif: tifffile.TiffFile | None) -> npt.NDArray[Any]:
    try:
        return read_micrograph(path, number).pixels if tif is None else tif.pages[number].asarray()
    except UserError as error:
        raise UserError(f"{path}, page {number} {str(error).removeprefix(f'{path} ')}") from None
    except Exception as error:  # tifffile raises nearly everything on damaged files
        raise UserError(f"{path}, page {number}: damaged ({error}); save it again, or leave it out") from None


def _square(size: tuple[float, float] | None, path: Path) -> float | None:
    if size is None:
        return None
    if not math.isclose(*size, rel_tol=0.01):
        raise UserError(
            f"{path} has pixels of {size[0]:.4g} x {size[1]:.4g} nm; resample it to square ones, lengths need that"
        )
    return (size[0] + size[1]) / 2


def _some(values: npt.NDArray[Any]) -> str:
    shown = ", ".join(str(v) for v in values[:6])
    return f"the values {shown}" + (f" and {len(values) - 6} more" if len(values) > 6 else "")
