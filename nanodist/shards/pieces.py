"""Pieces: what a unit of work becomes in the staging folder, ready to be copied into shards.

A piece is two files named by the digest of its unit: ``.bin`` holds the tar members of its samples one after the
other, ``.json`` says what is in it. The record is written last, so that a piece with a record is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from hpc import atomic
from hpc.errors import UserError
from nanodist.decoding.codec import sample_hash
from nanodist.shards.convert import Dropped, PackOptions, Tile, convert, count_pages
from nanodist.shards.listing import Listed
from nanodist.shards.masks import MASK_SUFFIX
from nanodist.shards.tar import member
from nanodist.shards.units import Unit


@dataclass(frozen=True)
class PieceTile:
    """A sample in a piece: number of its file in the unit, key, facts, and its ``length`` bytes from ``start``.

    Its members are the image (``size`` bytes), perhaps a mask, and last the JSON (``json_bytes``). ``label`` is that of
    the listing, or what its mask says.
    """

    file: int
    key: str
    start: int
    length: int
    size: int
    xxh3: str
    height: int
    width: int
    pixel_size_nm: tuple[float, float] | None
    pixel_hash: str
    total: int
    total_of_squares: int
    suffix: str
    json_bytes: int
    label: str | None


_COLUMNS = [column.name for column in fields(PieceTile)]


@dataclass(frozen=True)
class SetAside:
    """A micrograph that gives no sample, or a tile (``key``) that shows nothing.

    Number of its file in the unit, the reason, and whether the file is bad.
    """

    file: int
    reason: str
    bad: bool
    key: str = ""


@dataclass(frozen=True)
class Seen:
    """A micrograph whose tiles follow: number of its file in the unit, and its perceptual hash."""

    file: int
    near: str


Entry = PieceTile | SetAside | Seen


@dataclass(frozen=True)
class Piece:
    """The record of a piece: length of its data, and what became of its micrographs, in order."""

    digest: str
    bytes: int
    entries: list[Entry]


def bad_file(reason: str) -> UserError:
    """The error for a file that cannot be read, where such files are not set aside."""
    return UserError(f"{reason} (--skip-bad sets such files aside and goes on)")


def data_path(folder: Path, digest: str) -> Path:
    """The file with the members of a piece."""
    return folder / f"{digest}.bin"


def has_data(folder: Path, piece: Piece) -> bool:
    """Whether the members of a piece are there in full."""
    try:
        return data_path(folder, piece.digest).stat().st_size == piece.bytes
    except FileNotFoundError:
        return False


def make_piece(unit: Unit, options: PackOptions, folder: Path) -> int:
    """Convert the micrographs of ``unit`` into a piece in ``folder``; gives how many there were.

    One micrograph and one tile are in memory at a time.

    Raises:
        UserError: an unreadable file, unless ``options.skip_bad``.
        OSError: the disk is full.
    """
    entries: list[Entry] = []
    temporary = folder / f".{unit.digest}.{os.getpid()}.tmp"
    micrographs = length = 0
    try:
        with open(temporary, "wb") as file:
            for number, listed in enumerate(unit.files):
                for entry in _converted(number, listed, unit, options, file):
                    entries.append(entry)
                micrographs += 1
            length = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, data_path(folder, unit.digest))
    finally:
        temporary.unlink(missing_ok=True)
    # By rows without names: a million samples are read back at once.
    rows = [list(astuple(entry)) for entry in entries]
    atomic.write_text(folder / f"{unit.digest}.json", json.dumps({"bytes": length, "entries": rows}, allow_nan=False))
    return micrographs


def load_piece(folder: Path, digest: str) -> Piece | None:
    """The record of a piece, or ``None`` where there is none that is whole."""
    try:
        values = json.loads((folder / f"{digest}.json").read_bytes())
        return Piece(digest, values["bytes"], [_entry(row) for row in values["entries"]])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _entry(row: list[Any]) -> Entry:
    kind = {len(fields(other)): other for other in (SetAside, Seen)}.get(len(row))
    if kind is not None:
        return kind(*row)
    at = _COLUMNS.index("pixel_size_nm")
    row[at] = tuple(row[at]) if row[at] else None
    return PieceTile(*row)


def _converted(number: int, listed: Listed, unit: Unit, options: PackOptions, file: BinaryIO) -> Iterator[Entry]:
    path = listed.source.path
    pages = count_pages(path)
    if isinstance(pages, str):
        if unit.slice[0] == 0:
            yield _set_aside(number, listed, pages, True, options)
        return
    i, n = unit.slice
    for page in range(pages * i // n, pages * (i + 1) // n):
        converted = convert(path, page, options, listed.calibration, listed.mask)
        if converted.reason is not None:
            yield _set_aside(number, listed, converted.reason, converted.bad, options)
        if converted.near is not None:
            yield Seen(number, converted.near)
        for tile in converted.tiles:
            if isinstance(tile, Dropped):
                yield SetAside(number, tile.reason, False, listed.source.stem + tile.ending)
            else:
                yield _write(number, listed, tile, file)


def _set_aside(number: int, listed: Listed, reason: str, bad: bool, options: PackOptions) -> SetAside:
    if bad and not options.skip_bad:
        raise bad_file(reason)
    # The path would make the manifest depend on where the files lie.
    if listed.mask is not None:
        reason = reason.replace(str(listed.mask), f"its mask {listed.mask.name}")
    return SetAside(number, reason.replace(str(listed.source.path), "the file"), bad)


def _write(number: int, listed: Listed, tile: Tile, file: BinaryIO) -> PieceTile:
    key = listed.source.stem + tile.ending
    label = tile.label if listed.mask_label else listed.label
    facts = {"key": key, "source": listed.source.name, "label": label, "group": listed.group, **tile.facts}
    text = json_bytes(facts)
    start = file.tell()
    file.write(member(f"{key}.{tile.facts['encoding']}", tile.image))
    if tile.mask is not None:
        file.write(member(f"{key}.{MASK_SUFFIX}", tile.mask))
    file.write(member(f"{key}.json", text))
    size_nm = tile.facts["pixel_size_nm"]
    return PieceTile(
        file=number,
        key=key,
        start=start,
        length=file.tell() - start,
        size=len(tile.image),
        xxh3=sample_hash(tile.image),
        height=tile.height,
        width=tile.width,
        pixel_size_nm=(size_nm[0], size_nm[1]) if size_nm else None,
        pixel_hash=tile.pixel_hash,
        total=tile.total,
        total_of_squares=tile.total_of_squares,
        suffix=tile.facts["encoding"],
        json_bytes=len(text),
        label=label,
    )


def json_bytes(facts: dict[str, Any]) -> bytes:
    """The JSON of a sample as it stands in a shard."""
    return json.dumps(facts, ensure_ascii=False, allow_nan=False).encode()
