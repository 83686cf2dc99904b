"""``manifest.json`` of a pair store: its grid, its reference, its items, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from nanodist.scattering.pattern import QGrid
from nanodist.shards.manifest import FORMAT as MICROGRAPHS
from nanodist.shards.manifest import NAME, ShardEntry, read_values
from nanodist.shards.tar import MAX_KEY, shard_name

FORMAT = "nanodist-pairs"
SCHEMA = 1
_MAX_SIDE = 2**14


@dataclass(frozen=True)
class Member:
    """Where a member's bytes stand: offset and size in bytes in the item's shard, and their xxh3 (16 hex digits)."""

    offset: int
    size: int
    xxh3: str


@dataclass(frozen=True)
class Item:
    """One pair, or one half of a pair.

    Attributes:
        key: unique; of letters, digits, ``_`` and ``-``.
        sample: the specimen.
        shard: number of its shard.
        saxs: ``KEY.saxs.npy``, or None where there is no pattern.
        sem: ``KEY.sem.png``, or None where there is no micrograph.
        json: ``KEY.json``.
        height, width, pixel_size_nm: of the micrograph (pixel size as (y, x)); None where there is none.
    """

    key: str
    sample: str
    shard: int
    saxs: Member | None
    sem: Member | None
    json: Member
    height: int | None
    width: int | None
    pixel_size_nm: tuple[float, float] | None


@dataclass(frozen=True)
class PairManifest:
    """What ``manifest.json`` of a pair store says.

    Attributes:
        grid: of all patterns.
        kind: of all patterns, ``counts`` or ``reduced``.
        reference: I0 of asinh(I / I0): the median over the patterns of the median of what each measured.
        shards: in the order in which ``Item.shard`` counts them.
        items: one after the other, those of one specimen together.
        options: how it was packed.
        dropped: what is not in it, and why: ``{"source", "reason"}``.
        provenance: versions; no part of the content hash.
    """

    grid: QGrid
    kind: str
    reference: float
    shards: list[ShardEntry]
    items: list[Item]
    options: dict[str, Any]
    dropped: list[dict[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over all but the provenance: two stores of the same hash hold the same pairs, byte for byte."""
        content = {name: value for name, value in asdict(self).items() if name != "provenance"}
        canonical = json.dumps({"schema": SCHEMA, **content}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``manifest.json``."""
        return {"format": FORMAT, "schema": SCHEMA, "content_hash": self.content_hash, **asdict(self)}


def is_pair_store(store: Path) -> bool:
    """Whether the folder ``store`` has a manifest that says that it holds pairs."""
    try:
        with open(store / NAME, "rb") as file:
            return f'"{FORMAT}"' in file.read(200).decode(errors="replace")
    except OSError:
        return False


def load_pair_manifest(store: Path) -> PairManifest:
    """Read and check the manifest of the pair store ``store``.

    Raises:
        UserError: no folder, no manifest, one of micrographs, another schema, damaged, or changed since it was written.
    """
    path = store / NAME
    make = f"make one with 'nanodist pack --pairs pairs.csv --out {store}'"
    if not store.exists():
        raise UserError(f"pair store {store} does not exist: {make}")
    if not path.is_file():
        raise UserError(f"{store} has no {NAME}, so it is no pair store: {make}")
    values = read_values(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found == MICROGRAPHS:
        raise UserError(f"{store} is a store of micrographs and holds no pairs: {make}")
    if found != FORMAT:
        raise UserError(f"{path} is no manifest of a pair store: {make}")
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema version {values.get('schema')!r} and this nanodist reads version {SCHEMA}: use the "
            "nanodist that wrote it, or pack again"
        )
    try:
        manifest = _parsed(values)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): restore it or pack again") from None
    if values.get("content_hash") != manifest.content_hash:
        raise UserError(f"{path} was changed after it was written (its content hash differs): restore it or pack again")
    return manifest


def _parsed(values: dict[str, Any]) -> PairManifest:
    shards = [ShardEntry(**entry) for entry in values["shards"]]
    # Names are ours alone, so that none leads out of the folder.
    if [shard.file for shard in shards] != [shard_name(number) for number in range(len(shards))]:
        raise ValueError("its shards have other names than nanodist gives")
    grid = QGrid(int(values["grid"]["size"]), float(values["grid"]["q_max_inv_nm"]))
    if grid.size > _MAX_SIDE or not float(values["reference"]) > 0:
        raise ValueError(f"a grid of {grid.size} pixels and the reference {values['reference']}")
    items = [_item(entry, shards) for entry in values["items"]]
    rest = {name: values[name] for name in ("kind", "reference", "options", "dropped", "provenance")}
    return PairManifest(grid=grid, shards=shards, items=items, **rest)


def _item(entry: dict[str, Any], shards: list[ShardEntry]) -> Item:
    members = {name: Member(**entry[name]) if entry[name] else None for name in ("saxs", "sem", "json")}
    size = entry["pixel_size_nm"]
    item = Item(**{**entry, **members, "pixel_size_nm": (size[0], size[1]) if size else None})
    if not 0 <= item.shard < len(shards):
        raise ValueError(f"item {item.key} lies in a shard that is not there")
    length = shards[item.shard].bytes
    for member in members.values():
        if member and not 0 <= member.offset <= member.offset + member.size <= length:
            raise ValueError(f"item {item.key} lies outside its shard")
    if item.json is None or len(item.key) > MAX_KEY or (item.sem is None) != (item.pixel_size_nm is None):
        raise ValueError(f"item {item.key} is not whole")
    return item
