"""TIFF of 8, 16 and 32 bits through tifffile; every page, slice, frame and channel is a micrograph of its own."""

from __future__ import annotations

import gzip
import io
import logging
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.micrographs.micrograph import (
    MAX_MAPPED_PIXELS,
    Micrograph,
    NotAMicrograph,
    check_size,
    checked_pixels,
    collapse_channels,
)
from nanodist.micrographs.pixel_size import NM_PER_INCH, UNKNOWN, Calibration, from_dpi, from_unit, no_length
from nanodist.micrographs.tiff_tags import read_maker

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GZIP_MAGIC = b"\x1f\x8b"
# Unpacked in memory; larger ones are to be unpacked by their owner.
_MAX_UNPACKED = 2**30

# tifffile logs about files that it then reads well; without this handler the log lands on standard error.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def count_tiff(path: Path) -> int:
    """How many micrographs a TIFF holds.

    One more where its list of pages breaks off, so that who reads them all comes to one that cannot be read.

    Raises:
        UserError: damaged or truncated.
    """
    with _opened(path) as tif:
        return sum(_planes(series) for series in _series(tif)) + _breaks_off(tif)


def read_tiff(path: Path, page: int = 0) -> Micrograph:
    """Micrograph number ``page`` of a TIFF, counted over all series and their leading axes.

    Raises:
        UserError: damaged, truncated, a colour picture, no such page, NaN or infinite pixels, too large.
    """
    with _opened(path) as tif:
        every = _series(tif)
        total, left = sum(_planes(series) for series in every), page
        if page == total and _breaks_off(tif):
            raise ValueError(f"the list of its pages breaks off after {total} micrographs, and what follows is lost")
        if page >= total:
            raise UserError(f"{path} has {total} micrographs, so there is no number {page}")
        number = 0
        while left >= _planes(every[number]):
            left -= _planes(every[number])
            number += 1
        series = every[number]
        maker = read_maker(tif, series.keyframe, number, path)
        raw, first = _plane(tif, series, left, path)
        pixels, changes = _gray(raw, first, path)
        size_nm, source = maker.calibration or _pixel_size(tif, first, path)
        pixels = checked_pixels(pixels, path)
    metadata = {"format": "TIFF", "page": page, "pages": total, **maker.facts, **changes}
    return Micrograph(pixels, size_nm, source, metadata, maker.uncertainty)


@contextmanager
def _opened(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF and turn whatever a damaged one makes tifffile raise into one sentence."""
    try:
        with tifffile.TiffFile(_unpacked(path)) as tif:
            yield tif
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: cut it into parts first") from None
    except Exception as error:  # tifffile raises nearly everything on damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is a damaged or truncated TIFF file ({text}): copy or write it again") from None


def _unpacked(path: Path) -> Path | io.BytesIO:
    """The file, or in memory what it holds where it is compressed as a whole by gzip.

    Raises:
        UserError: not a TIFF, more than is unpacked, or damaged.
    """
    with open(path, "rb") as file:
        if file.read(2) != GZIP_MAGIC:
            return path
    try:
        with gzip.open(path) as packed:
            data = packed.read(_MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged or truncated gzip file ({error}): copy or write it again") from None
    if len(data) > _MAX_UNPACKED:
        raise UserError(f"{path} unpacks to more than {_MAX_UNPACKED} bytes: unpack it yourself if you trust it")
    if not data.startswith(TIFF_MAGIC):
        raise UserError(f"{path} is gzip, but what it holds is no TIFF file: unpack it first")
    return io.BytesIO(data)


def _series(tif: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """The full-resolution series: thumbnails and masks are no micrographs."""
    kept = [s for s in tif.series if not s.keyframe.is_reduced and not s.keyframe.is_mask]
    if not kept:
        raise ValueError("no image in it")
    return kept


def _breaks_off(tif: tifffile.TiffFile) -> bool:
    """Whether the last page names a next one that is not there; tifffile takes it for the last, silently."""
    try:
        file, layout, last = tif.filehandle, tif.tiff, tif.pages[-1].offset
    except Exception:  # the last page cannot be read, which is said when it is asked for
        return False
    file.seek(last)
    (tags,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    file.seek(last + layout.tagnosize + tags * layout.tagsize)
    following = file.read(layout.offsetsize)
    if len(following) < layout.offsetsize:
        return True
    (offset,) = struct.unpack(layout.offsetformat, following)
    # Some writers lead back to an earlier page.
    return bool(offset) and (offset >= file.size or offset not in [page.offset for page in tif.pages])


def _planes(series: tifffile.TiffPageSeries) -> int:
    plane = math.prod(series.keyframe.shape)
    return math.prod(series.shape) // plane if plane else 1


def _plane(
    tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, k: int, path: Path
) -> tuple[npt.NDArray[Any], tifffile.TiffPage]:
    """Plane ``k`` of a series as the page's own shape, read without the rest of the stack where that can be."""
    keyframe = series.keyframe
    planes = _planes(series)
    mapped = _mapped(tif, series, k, path) if keyframe.samplesperpixel == 1 else None
    if mapped is not None:
        return mapped, keyframe
    check_size(keyframe.imagelength, keyframe.imagewidth, path)
    if len(series.pages) == planes and series.pages[k] is not None:
        page = series.pages[k]
        _check_extent(tif, page)
        return _decoded(page, path), keyframe
    # One page stands for a whole stack of raw pixels (ImageJ writes stacks so).
    shape = (planes, *keyframe.shape)
    check_size(planes, math.prod(keyframe.shape), path)
    return series.asarray().reshape(shape)[k], keyframe


def _mapped(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, k: int, path: Path) -> npt.NDArray[Any] | None:
    """Plane ``k`` left in the file, where it lies there as it is: uncompressed and in one piece.

    Raises:
        UserError: larger than anything that is read, even so.
    """
    keyframe = series.keyframe
    page = series.pages[k] if len(series.pages) == _planes(series) else None
    start = None
    if page is not None and keyframe.is_memmappable and page.is_contiguous:
        start = page.dataoffsets[0]
    elif series.dataoffset is not None and len(series.pages) == 1:
        start = series.dataoffset + k * keyframe.nbytes
    if start is None or keyframe.dtype is None or not tif.filehandle.is_file:
        return None
    shape = (keyframe.imagelength, keyframe.imagewidth)
    check_size(*shape, path, MAX_MAPPED_PIXELS)
    dtype = np.dtype(keyframe.dtype).newbyteorder(tif.byteorder)
    length = math.prod(shape) * dtype.itemsize
    if length != keyframe.nbytes or start + length > tif.filehandle.size or sum(keyframe.databytecounts) < length:
        check_size(*shape, path)
        raise ValueError("pixels are missing")
    return np.memmap(path, dtype, "r", start, shape)


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


def _pixel_size(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> Calibration:
    x, y = (_ratio(page, name) for name in ("XResolution", "YResolution"))
    imagej = tif.imagej_metadata or {}
    unit = str(imagej.get("unit", ""))
    if unit and unit.lower() not in ("pixel", "pixels", "inch"):
        if not (x and y and x > 0 and y > 0):
            return None, "unknown: the ImageJ calibration has a unit and no scale"
        why = no_length(unit)
        if why:
            raise NotAMicrograph(f"{path} is {why}, no micrograph (ImageJ calibration)")
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
