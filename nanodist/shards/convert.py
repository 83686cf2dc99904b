"""One micrograph to the encoded tiles of a store: what the workers of ``pack`` do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc.errors import UserError
from nanodist.decoding.codec import ENCODINGS, encode, suffix_of
from nanodist.micrographs import Micrograph, NotAMicrograph, count_micrographs, read_micrograph
from nanodist.micrographs.burned_in import find_bars, free_rectangle, paint_over
from nanodist.micrographs.pixel_size import COARSEST_NM, FINEST_NM
from nanodist.micrographs.resample import resample
from nanodist.shards.calibration import Given
from nanodist.shards.masks import MASK_ENCODING, describe, main_class, read_mask
from nanodist.shards.near import MODES, perceptual_hash
from nanodist.shards.quality import fault_of, span_of
from nanodist.shards.tiles import ROWS, tile_starts, to_depth

BARS = ("keep", "cut", "mask")
# How much larger than asked for a micrograph's pixels may be: interpolation makes pixels and no details.
COARSEST_SCALE = 2.0


@dataclass(frozen=True)
class PackOptions:
    """How micrographs become samples; stored in the manifest.

    Attributes:
        tile: side of the square tiles in pixels, or ``None`` to keep every micrograph whole.
        overlap: pixels that neighbouring tiles share at least.
        depth: bits a pixel in the store, 8 or 16.
        normalise: ``auto`` (what has the depth already stays untouched) or ``always``.
        encoding: ``tif`` (zstd over a predictor), ``raw``, ``png``, or ``jpg``, which alone loses something.
        pixel_size_nm: bring every micrograph to pixels of this size; ``None`` leaves each its own.
        bars: ``keep``, ``cut`` off or ``mask`` (paint over) scale bars and information bars that are burned in.
        empty_tiles: ``drop`` or ``keep`` tiles that show nothing (:mod:`nanodist.shards.quality`).
        near_duplicates: ``group`` (they share a group), ``drop`` (the first stays) or ``keep`` (nothing is compared).
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
    pixel_size_nm: float | None = None
    bars: str = "keep"
    empty_tiles: str = "drop"
    near_duplicates: str = "group"
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
        for name, known in (("bars", BARS), ("empty_tiles", ("drop", "keep")), ("near_duplicates", MODES)):
            if getattr(self, name) not in known:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is '{getattr(self, name)}'; it must be one of {', '.join(known)}")
        if self.pixel_size_nm is not None and not FINEST_NM <= self.pixel_size_nm <= COARSEST_NM:
            raise UserError(
                f"--pixel-size-nm is {self.pixel_size_nm}; it must be a length in nm, from {FINEST_NM:g} to "
                f"{COARSEST_NM:g}"
            )
        if not self.shard_mb > 0:
            raise UserError(f"--shard-mb is {self.shard_mb}; it must be more than 0")


@dataclass(frozen=True)
class Tile:
    """An encoded tile: ending of its key, image bytes, hash of its pixels, exact sums, and its JSON.

    ``mask`` is the part of the micrograph's mask that belongs to it, and ``label`` the class that fills most of that.
    """

    ending: str
    image: bytes
    height: int
    width: int
    pixel_hash: str
    total: int
    total_of_squares: int
    facts: dict[str, Any]
    mask: bytes | None = None
    label: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A tile that shows nothing: ending of its key, and why."""

    ending: str
    reason: str


@dataclass(frozen=True)
class Converted:
    """What became of one micrograph: its tiles, or the reason why it was set aside (``bad``: the file is broken).

    The tiles are cut and encoded one by one as they are asked for, once. ``near`` is its perceptual hash.
    """

    tiles: Iterable[Tile | Dropped]
    reason: str | None = None
    bad: bool = False
    near: str | None = None


def count_pages(path: Path) -> int | str:
    """How many micrographs a file holds, or why it cannot be read."""
    try:
        return count_micrographs(path)
    except NotAMicrograph:
        return 1  # so that convert() comes to it and sets it aside: nothing is wrong with the file
    except UserError as error:
        return str(error)


def convert(
    path: Path, page: int, options: PackOptions, given: Given | None = None, mask: Path | None = None
) -> Converted:
    """Read, scale, cut and encode micrograph number ``page`` of a file, whose pixel size ``given`` replaces.

    Where there is a ``mask``, a file of class or instance numbers of the same size, its tiles go with the micrograph's.
    """
    try:
        micrograph = read_micrograph(path, page)
        classes = read_mask(mask, page, micrograph.pixels.shape) if mask else None
    except UserError as error:
        return Converted([], str(error), bad=not isinstance(error, NotAMicrograph))
    if given:
        micrograph = replace(
            micrograph,
            pixel_size_nm=(given.y_nm, given.x_nm),
            pixel_size_source=given.source,
            pixel_size_uncertainty=given.uncertainty,
        )
    try:
        prepared = _prepared(micrograph, classes, options)
    except ValueError as error:
        return Converted([], str(error))
    height, width = prepared.pixels.shape
    if options.tile is not None and min(height, width) < options.tile:
        return Converted([], f"smaller than the tile of {options.tile} px")
    try:
        pixels, scaling = to_depth(prepared.pixels, options.depth, options.normalise == "always")
    except ValueError:
        return Converted([], "without contrast: every pixel has the same value")
    prepared = replace(prepared, pixels=pixels, facts={**prepared.facts, "scaling": scaling})
    near = perceptual_hash(pixels) if options.near_duplicates != "keep" else None
    return Converted(_tiles(prepared, options, near), near=near)


@dataclass(frozen=True)
class _Prepared:
    """Pixels (H, W) to cut into tiles, the mask (H, W) that goes with them, and what their JSON says."""

    pixels: npt.NDArray[Any]
    mask: npt.NDArray[Any] | None
    facts: dict[str, Any]
    ending: str


def _prepared(micrograph: Micrograph, mask: npt.NDArray[Any] | None, options: PackOptions) -> _Prepared:
    """Without the bars that are burned in, and at the pixel size that is asked for.

    Raises:
        ValueError: why the micrograph is set aside.
    """
    pixels, size_nm = micrograph.pixels, micrograph.pixel_size_nm
    facts: dict[str, Any] = {}
    if options.bars != "keep":
        bars = find_bars(pixels)
        facts["bars"] = [asdict(bar) for bar in bars]
        if bars and options.bars == "cut":
            y, x, height, width = free_rectangle((pixels.shape[0], pixels.shape[1]), bars)
            pixels = pixels[y : y + height, x : x + width]
            mask = mask if mask is None else mask[y : y + height, x : x + width]
            facts["cut_to_px"] = {"y": y, "x": x, "height": height, "width": width}
        elif bars:
            pixels = paint_over(pixels, bars)
    if options.pixel_size_nm is not None:
        if size_nm is None:
            raise ValueError(f"its pixel size is unknown, so that it cannot be brought to {options.pixel_size_nm:g} nm")
        if max(size_nm) > COARSEST_SCALE * options.pixel_size_nm:
            raise ValueError(
                f"its pixels are more than {COARSEST_SCALE:g} times as large as {options.pixel_size_nm:g} nm: there "
                "would be nothing in the tiles that small"
            )
        if min(pixels.shape[i] * size_nm[i] for i in (0, 1)) < options.pixel_size_nm:
            raise ValueError(f"it is smaller than one pixel of {options.pixel_size_nm:g} nm")
        facts["resampled_from_nm"] = list(size_nm)
        if mask is not None:
            mask = resample(mask, size_nm, options.pixel_size_nm, nearest=True)
        pixels = resample(pixels, size_nm, options.pixel_size_nm)
        size_nm = (options.pixel_size_nm, options.pixel_size_nm)
    pages = int(micrograph.metadata.get("pages", 1))
    facts = {
        "micrograph_px": list(pixels.shape),
        "pixel_size_nm": list(size_nm) if size_nm else None,
        "pixel_size_source": micrograph.pixel_size_source,
        "pixel_size_uncertainty": micrograph.pixel_size_uncertainty,
        **facts,
        "file": {"dtype": str(micrograph.pixels.dtype), **micrograph.metadata},
        "encoding": suffix_of(options.encoding, options.depth),
    }
    ending = f"--p{micrograph.metadata['page']:0{len(str(pages - 1))}d}" if pages > 1 else ""
    return _Prepared(pixels, mask, facts, ending)


def _boxes(height: int, width: int, options: PackOptions) -> list[tuple[int, int, int, int]]:
    """(y, x, height, width) of every tile."""
    tile = options.tile
    if tile is None:
        return [(0, 0, height, width)]
    rows, columns = (tile_starts(length, tile, options.overlap) for length in (height, width))
    return [(y, x, tile, tile) for y in rows for x in columns]


def _tiles(prepared: _Prepared, options: PackOptions, near: str | None) -> Iterator[Tile | Dropped]:
    pixels, ending = prepared.pixels, prepared.ending
    span = span_of(pixels) if options.empty_tiles == "drop" else 0.0
    for y, x, height, width in _boxes(pixels.shape[0], pixels.shape[1], options):
        part = np.ascontiguousarray(pixels[y : y + height, x : x + width])
        own = ending if part.shape == pixels.shape else f"{ending or '-'}-y{y:05d}x{x:05d}"
        fault = fault_of(part, span) if options.empty_tiles == "drop" else None
        if fault is not None:
            yield Dropped(own, fault)
            continue
        classes = prepared.mask
        if classes is not None:
            classes = np.ascontiguousarray(classes[y : y + height, x : x + width])
        facts = {"position_px": {"y": y, "x": x, "height": height, "width": width}, **prepared.facts}
        if near is not None:
            facts["perceptual_hash"] = near
        yield _tile(part, classes, own, facts, options)


def _tile(
    part: npt.NDArray[Any], classes: npt.NDArray[Any] | None, ending: str, facts: dict[str, Any], options: PackOptions
) -> Tile:
    pixel_hash = xxhash.xxh3_128(f"{part.dtype}{part.shape}".encode())
    pixel_hash.update(part.data)
    if classes is not None:
        pixel_hash.update(classes.data)  # the same pixels under another mask are another sample
        facts = {**facts, "mask": describe(classes)}
    total, total_of_squares = _sums(part)
    return Tile(
        ending=ending,
        image=encode(part, options.encoding),
        height=part.shape[0],
        width=part.shape[1],
        pixel_hash=pixel_hash.hexdigest(),
        total=total,
        total_of_squares=total_of_squares,
        facts=facts,
        mask=None if classes is None else encode(classes, MASK_ENCODING),
        label=None if classes is None else main_class(classes),
    )


def _sums(pixels: Any) -> tuple[int, int]:
    """Exact sums of the pixels and of their squares, rows at a time: 64-bit copies of a whole map would not fit."""
    total = total_of_squares = 0
    for row in range(0, pixels.shape[0], ROWS):
        wide = pixels[row : row + ROWS].astype(np.uint64)
        total += int(wide.sum())
        total_of_squares += int(np.vdot(wide, wide))
    return total, total_of_squares
