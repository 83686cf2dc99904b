"""TIFF of 8, 16 and 32 bits through tifffile; every page, slice, frame and channel is a micrograph of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.micrographs.micrograph import Micrograph, check_size, checked_pixels, collapse_channels
from nanodist.micrographs.pixel_size import NM_PER_INCH, UNKNOWN, Calibration, from_dpi, from_unit

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# tifffile logs about files that it then reads well; without this handler the log lands on standard error.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def count_tiff(path: Path) -> int:
    """How many micrographs a TIFF holds.

    Raises:
        UserError: damaged or truncated.
    """
    with _opened(path) as tif:
        return sum(_planes(series) for series in _series(tif))


def read_tiff(path: Path, page: int = 0) -> Micrograph:
    """Micrograph number ``page`` of a TIFF, counted over all series and their leading axes.

    Raises:
        UserError: damaged, truncated, a colour picture, no such page, NaN or infinite pixels, too large.
    """
    with _opened(path) as tif:
        total, left = 0, page
        for series in _series(tif):
            planes = _planes(series)
            total += planes
            if left < planes:
                break
            left -= planes
        else:
            raise UserError(f"{path} has {total} micrographs, so there is no number {page}")
        total = sum(_planes(series) for series in _series(tif))
        raw, first = _plane(tif, series, left, path)
        pixels, changes = _gray(raw, first, path)
        size_nm, source = _pixel_size(tif, first)
    metadata = {"format": "TIFF", "page": page, "pages": total, **changes}
    return Micrograph(checked_pixels(pixels, path), size_nm, source, metadata)


@contextmanager
def _opened(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF and turn whatever a damaged one makes tifffile raise into one sentence."""
    try:
        with tifffile.TiffFile(path) as tif:
            yield tif
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: cut it into parts first") from None
    except Exception as error:  # tifffile raises nearly everything on damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is a damaged or truncated TIFF file ({text}): copy or write it again") from None


def _series(tif: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """The full-resolution series: thumbnails and masks are no micrographs."""
    kept = [s for s in tif.series if not s.keyframe.is_reduced and not s.keyframe.is_mask]
    if not kept:
        raise ValueError("no image in it")
    return kept


def _planes(series: tifffile.TiffPageSeries) -> int:
    plane = math.prod(series.keyframe.shape)
    return math.prod(series.shape) // plane if plane else 1


def _plane(
    tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, k: int, path: Path
) -> tuple[npt.NDArray[Any], tifffile.TiffPage]:
    """Plane ``k`` of a series as the page's own shape, read without the rest of the stack where that can be."""
    keyframe = series.keyframe
    check_size(keyframe.imagelength, keyframe.imagewidth, path)
    planes = _planes(series)
    if len(series.pages) == planes and series.pages[k] is not None:
        page = series.pages[k]
        _check_extent(tif, page)
        return _decoded(page, path), keyframe
    # One page stands for a whole stack of raw pixels (ImageJ writes stacks so).
    shape = (planes, *keyframe.shape)
    if series.dataoffset is None:
        check_size(planes, math.prod(keyframe.shape), path)
        return series.asarray().reshape(shape)[k], keyframe
    dtype = np.dtype(keyframe.dtype).newbyteorder(tif.byteorder)
    stack = np.memmap(path, dtype, "r", series.dataoffset, shape)
    return np.array(stack[k]), keyframe


def _check_extent(tif: tifffile.TiffFile, page: Any) -> None:
    """tifffile fills strips that are missing with zeros, silently."""
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count == 0 or offset + count > tif.filehandle.size:
            raise ValueError("pixels are missing")


def _decoded(page: Any, path: Path) -> npt.NDArray[Any]:
    try:
        return page.asarray()
    except ValueError as error:
        # LZW and the like need imagecodecs, which a plain installation lacks; Pillow brings its own libtiff.
        if "imagecodecs" not in str(error):
            raise
    with Image.open(path) as image:
        image.seek(page.index)
        return np.asarray(image)


def _gray(raw: npt.NDArray[Any], page: tifffile.TiffPage, path: Path) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """The (H, W) pixels of one plane, and what had to be changed for it."""
    changes: dict[str, Any] = {}
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
        colours = np.moveaxis(page.colormap[:, raw], 0, -1)
        gray = collapse_channels(colours, path, alpha=False)
        return (gray // 257).astype(np.uint8), {"palette": True}
    if raw.ndim > 2:
        raw = np.squeeze(raw)
    if raw.ndim == 3:
        channels_last = raw.shape[-1] == page.samplesperpixel
        raw = raw if channels_last else np.moveaxis(raw, 0, -1)
        return collapse_channels(raw, path, alpha=raw.shape[-1] in (2, 4)), changes
    if raw.ndim != 2:
        raw = raw.reshape(page.imagelength, page.imagewidth)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and raw.dtype.kind == "u":
        return np.iinfo(raw.dtype).max - raw, {"inverted": "white was stored as 0"}
    return raw, changes


def _pixel_size(tif: tifffile.TiffFile, page: tifffile.TiffPage) -> Calibration:
    x, y = (_ratio(page, name) for name in ("XResolution", "YResolution"))
    imagej = tif.imagej_metadata or {}
    unit = str(imagej.get("unit", ""))
    if unit and unit.lower() not in ("pixel", "pixels", "inch"):
        if not (x and y and x > 0 and y > 0):
            return None, "unknown: the ImageJ calibration has a unit and no scale"
        return from_unit(1 / y, 1 / x, unit, "ImageJ calibration")
    if x is None or y is None:
        return UNKNOWN
    tag = page.tags.get("ResolutionUnit")
    resolution_unit = int(tag.value) if tag is not None else 2  # TIFF 6.0: inch is the default
    if resolution_unit == 2:
        return from_dpi(y, x, "resolution tag")
    if resolution_unit == 3:
        per_inch = NM_PER_INCH / 1e7
        return from_dpi(y * per_inch, x * per_inch, "resolution tag")
    return None, "unknown: the resolution tag has no unit"


def _ratio(page: tifffile.TiffPage, name: str) -> float | None:
    tag = page.tags.get(name)
    if tag is None:
        return None
    try:
        numerator, denominator = tag.value
        return float(numerator) / float(denominator) if denominator else 0.0
    except (TypeError, ValueError):
        return None
