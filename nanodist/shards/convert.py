"""One micrograph to the encoded tiles of a store: what the workers of ``pack`` do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hpc.errors import UserError
from nanodist.micrographs import Micrograph, NotAMicrograph, count_micrographs, read_micrograph
from nanodist.shards.calibration import Given
from nanodist.decoding.codec import ENCODINGS, encode, suffix_of
from nanodist.shards.tiles import ROWS, tile_starts, to_depth


@dataclass(frozen=True)
class PackOptions:
    """How micrographs become samples; stored in the manifest.

    Attributes:
        tile: side of the square tiles in pixels, or ``None`` to keep every micrograph whole.
        overlap: pixels that neighbouring tiles share at least.
        depth: bits a pixel in the store, 8 or 16.
        normalise: ``auto`` (what has the depth already stays untouched) or ``always``.
        encoding: ``tif`` (zstd over a predictor), ``raw``, ``png``, or ``jpg``, which alone loses something.
        shard_mb: size of a shard in MiB.
        skip_bad: set unreadable files aside instead of stopping at the first.

    Raises:
        UserError: an impossible value.
    """

    tile: int | None = 256
    overlap: int = 0
    depth: int = 8
    normalise: str = "auto"
    encoding: str = "tif"
    shard_mb: float = 128.0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 8:
            raise UserError(f"--tile is {self.tile}; it must be at least 8 pixels, or 'none'")
        if self.overlap and (self.tile is None or not 0 < self.overlap < self.tile):
            raise UserError(f"--overlap is {self.overlap}; it must be at least 0 and less than --tile")
        if self.depth not in (8, 16):
            raise UserError(f"--depth is {self.depth}; it must be 8 or 16")
        if self.normalise not in ("auto", "always"):
            raise UserError(f"--normalise is '{self.normalise}'; it must be auto or always")
        if self.encoding not in ENCODINGS:
            raise UserError(f"--encoding is '{self.encoding}'; it must be one of {', '.join(ENCODINGS)}")
        if self.encoding == "jpg" and self.depth == 16:
            raise UserError("--encoding is jpg, which holds 8 bits a pixel, and --depth is 16: choose tif, raw or png")
        if not self.shard_mb > 0:
            raise UserError(f"--shard-mb is {self.shard_mb}; it must be more than 0")


@dataclass(frozen=True)
class Tile:
    """An encoded tile: ending of its key, image bytes, hash of its pixels, exact sums, and its JSON."""

    ending: str
    image: bytes
    height: int
    width: int
    pixel_hash: str
    total: int
    total_of_squares: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """What became of one micrograph: its tiles, or the reason why it was set aside (``bad``: the file is broken).

    The tiles are cut and encoded one by one as they are asked for, once.
    """

    tiles: Iterable[Tile]
    reason: str | None = None
    bad: bool = False


def count_pages(path: Path) -> int | str:
    """How many micrographs a file holds, or why it cannot be read."""
    try:
        return count_micrographs(path)
    except NotAMicrograph:
        return 1  # so that convert() comes to it and sets it aside: nothing is wrong with the file
    except UserError as error:
        return str(error)


def convert(path: Path, page: int, options: PackOptions, given: Given | None = None) -> Converted:
    """Read, scale, cut and encode micrograph number ``page`` of a file, whose pixel size ``given`` replaces."""
    try:
        micrograph = read_micrograph(path, page)
    except UserError as error:
        return Converted([], str(error), bad=not isinstance(error, NotAMicrograph))
    if given:
        micrograph = replace(
            micrograph,
            pixel_size_nm=(given.y_nm, given.x_nm),
            pixel_size_source=given.source,
            pixel_size_uncertainty=given.uncertainty,
        )
    height, width = micrograph.pixels.shape
    if options.tile is not None and min(height, width) < options.tile:
        return Converted([], f"smaller than the tile of {options.tile} px")
    try:
        pixels, scaling = to_depth(micrograph.pixels, options.depth, options.normalise == "always")
    except ValueError:
        return Converted([], "without contrast: every pixel has the same value")
    return Converted(_tile(pixels, box, scaling, micrograph, options) for box in _boxes(height, width, options))


def _boxes(height: int, width: int, options: PackOptions) -> list[tuple[int, int, int, int]]:
    """(y, x, height, width) of every tile."""
    tile = options.tile
    if tile is None:
        return [(0, 0, height, width)]
    rows, columns = (tile_starts(length, tile, options.overlap) for length in (height, width))
    return [(y, x, tile, tile) for y in rows for x in columns]


def _tile(
    pixels: Any, box: tuple[int, int, int, int], scaling: dict[str, Any], micrograph: Micrograph, options: PackOptions
) -> Tile:
    y, x, height, width = box
    part = np.ascontiguousarray(pixels[y : y + height, x : x + width])
    whole = part.shape == pixels.shape
    pages = int(micrograph.metadata.get("pages", 1))
    ending = f"--p{micrograph.metadata['page']:0{len(str(pages - 1))}d}" if pages > 1 else ""
    pixel_hash = xxhash.xxh3_128(f"{part.dtype}{part.shape}".encode())
    pixel_hash.update(part.data)
    total, total_of_squares = _sums(part)
    facts = {
        "position_px": {"y": y, "x": x, "height": height, "width": width},
        "micrograph_px": list(pixels.shape),
        "pixel_size_nm": list(micrograph.pixel_size_nm) if micrograph.pixel_size_nm else None,
        "pixel_size_source": micrograph.pixel_size_source,
        "pixel_size_uncertainty": micrograph.pixel_size_uncertainty,
        "scaling": scaling,
        "file": {"dtype": str(micrograph.pixels.dtype), **micrograph.metadata},
        "encoding": suffix_of(options.encoding, options.depth),
    }
    return Tile(
        ending=ending if whole else f"{ending or '-'}-y{y:05d}x{x:05d}",
        image=encode(part, options.encoding),
        height=height,
        width=width,
        pixel_hash=pixel_hash.hexdigest(),
        total=total,
        total_of_squares=total_of_squares,
        facts=facts,
    )


def _sums(pixels: Any) -> tuple[int, int]:
    """Exact sums of the pixels and of their squares, rows at a time: 64-bit copies of a whole map would not fit."""
    total = total_of_squares = 0
    for row in range(0, pixels.shape[0], ROWS):
        wide = pixels[row : row + ROWS].astype(np.uint64)
        total += int(wide.sum())
        total_of_squares += int(np.vdot(wide, wide))
    return total, total_of_squares
