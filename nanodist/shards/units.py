"""The micrographs to pack, cut into units of work that any rank or worker can do, in any order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import tifffile

from hpc.errors import UserError
from nanodist._version import __version__
from nanodist.micrographs import companion
from nanodist.shards.convert import PackOptions
from nanodist.shards.listing import Listed

# A unit is lost when a packing is killed, and what a rank may wait for at the end; each costs a sync and two files.
MAX_FILES = 16
MAX_BYTES = 32 * 2**20
_MAX_SLICES = 64
# Raised when what a unit becomes changes, so that no piece of an older nanodist is taken for a new one.
_FORMAT = 3


@dataclass(frozen=True)
class Unit:
    """Consecutive files of the listing, or a slice of one large file's pages.

    Attributes:
        digest: names what comes out: the files (by name, length and time of change), what their samples carry, the
            options of the conversion and the versions of the libraries that do it.
        files: what to convert.
        bytes: how long the files are, or the slice's share of it.
        slice: ``(i, n)``: take pages ``P * i // n`` up to ``P * (i + 1) // n`` of the P that a file has.
    """

    digest: str
    files: tuple[Listed, ...]
    bytes: int
    slice: tuple[int, int] = (0, 1)


def plan_units(files: Sequence[Listed], options: PackOptions) -> list[Unit]:
    """The units of ``files``, in order; they depend on nothing but the files and the options.

    Raises:
        UserError: a file that went away since it was found.
    """
    stats = [_stat(file.source.path) for file in files]
    units: list[Unit] = []
    first, length = 0, 0
    for i, (size, _) in enumerate(stats):
        slices = min(_MAX_SLICES, -(-size // MAX_BYTES))
        if i > first and (i - first == MAX_FILES or length + size > MAX_BYTES):
            units.append(_unit(files[first:i], stats[first:i], options))
            first, length = i, 0
        length += size
        if slices > 1:
            units += [_unit(files[i : i + 1], stats[i : i + 1], options, (k, slices)) for k in range(slices)]
            first, length = i + 1, 0
    if first < len(files):
        units.append(_unit(files[first:], stats[first:], options))
    return units


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _file_facts(file: Listed, stat: tuple[int, int]) -> list[Any]:
    given = list(astuple(file.calibration)) if file.calibration else None
    beside = companion(file.source.path)
    mask = [file.mask.name, *_stat(file.mask), file.mask_label] if file.mask else None
    return [file.source.name, file.source.stem, file.label, file.group, given, *stat, beside, mask]


@cache
def _optional_versions() -> list[str | None]:
    """Of the libraries for microscopes' own formats, without importing them."""
    versions: list[str | None] = []
    for name in ("rosettasciio", "mrcfile", "h5py", "imagecodecs"):
        try:
            versions.append(version(name))
        except PackageNotFoundError:
            versions.append(None)
    return versions


def _unit(
    files: Sequence[Listed],
    stats: Sequence[tuple[int, int]],
    options: PackOptions,
    slice_: tuple[int, int] = (0, 1),
) -> Unit:
    # How large a shard is and what happens to bad files is settled later, from the same pieces.
    converting = {k: v for k, v in asdict(options).items() if k not in ("shard_mb", "skip_bad")}
    if options.near_duplicates != "keep":
        converting["near_duplicates"] = "group"  # what becomes of them is settled later as well
    facts = [
        _FORMAT,
        [__version__, np.__version__, PIL.__version__, tifffile.__version__, *_optional_versions()],
        converting,
        slice_,
        [_file_facts(file, stat) for file, stat in zip(files, stats, strict=True)],
    ]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    return Unit(digest, tuple(files), sum(size for size, _ in stats) // slice_[1], slice_)
