"""``manifest.json``: what a store is made of, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc.errors import UserError

SCHEMA = 2
READABLE = (1, 2)  # 1 held the keys of its index as JSON
FORMAT = "nanodist-store"
NAME = "manifest.json"
INDEX_NAME = "index.npz"
_MAX_BYTES = 1 << 30
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ShardEntry:
    """One shard: file name, number of samples, bytes and xxh3 (128 bit) of the file."""

    file: str
    samples: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        shards: in the order in which ``Sample.shard`` counts them.
        index: the index file, as ``{"file", "bytes", "xxh3"}``.
        samples: how many samples in all.
        depth: bits a pixel, 8 or 16.
        statistics: pixel mean and standard deviation (of values divided by the largest of the depth, so in 0 to 1),
            range of pixel sizes, tile sizes, counts of labels and groups.
        options: how it was packed.
        dropped: what is not in it, and why: ``{"source", "reason"}``.
        provenance: versions and names of the sources; no part of the content hash.
        schema: version of this file and of the index.
    """

    shards: list[ShardEntry]
    index: dict[str, Any]
    samples: int
    depth: int
    statistics: dict[str, Any]
    options: dict[str, Any]
    dropped: list[dict[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over all but the provenance: two stores of the same hash hold the same samples, byte for byte."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "provenance"}
        content["shards"] = [vars(shard) for shard in self.shards]  # asdict would copy all of it
        canonical = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``manifest.json``."""
        return {"format": FORMAT, "schema": self.schema, "content_hash": self.content_hash, **asdict(self)}


def kept_name(content_hash: str) -> str:
    """Where a store that grew keeps the manifest of before, for runs that began with it."""
    return f"manifest-{content_hash[:16]}.json"


def read_values(path: Path) -> Any:
    """What the JSON of a manifest holds, of either kind of store.

    Raises:
        UserError: it is damaged, or too large to be one.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path} is larger than 1 GiB: it is no manifest that nanodist wrote")
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or pack again") from None


def load_manifest(store: Path, pinned: str = "") -> Manifest:
    """Read and check the manifest in the folder ``store``.

    Args:
        store: the folder.
        pinned: hash (or its first 16 digits and more) of the manifest to read; empty reads the newest.

    Raises:
        UserError: no folder, no manifest, no JSON, another schema version, unsafe file names, or changed since it was
            written.
    """
    path = store / NAME
    if pinned and (store / kept_name(pinned)).is_file():
        path = store / kept_name(pinned)
    if not store.exists():
        raise UserError(f"store {store} does not exist: make it with 'nanodist pack SRC --out {store}'")
    if not store.is_dir():
        raise UserError(f"store {store} is a file; a store is the folder that 'nanodist pack' writes")
    if not path.is_file():
        what = "is an empty folder" if not any(store.iterdir()) else f"has no {NAME}"
        raise UserError(f"{store} {what}, so it is no store: make one with 'nanodist pack SRC --out STORE'")
    values = read_values(path)
    if isinstance(values, dict) and values.get("format") == "nanodist-pairs":
        raise UserError(
            f"{store} is a store of pairs, which 'nanodist pairvae' trains on: name a store of micrographs here "
            "('nanodist pack SRC --out STORE')"
        )
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of a nanodist store: pack again")
    if values.get("schema") not in READABLE:
        raise UserError(
            f"{path} has schema version {values.get('schema')!r} and this nanodist reads versions "
            f"{' and '.join(map(str, READABLE))}: "
            "use the nanodist that wrote it, or pack again"
        )
    manifest = _parsed(values, path)
    if pinned and not manifest.content_hash.startswith(pinned):
        raise UserError(
            f"{store} does not hold the manifest {pinned} any more, which the run began with (it has "
            f"{manifest.content_hash}): restore {kept_name(pinned)}, or start a new run"
        )
    return manifest


def _parsed(values: dict[str, Any], path: Path) -> Manifest:
    names = [name for name in Manifest.__dataclass_fields__ if name not in values]
    if names:
        raise UserError(f"{path} is damaged (it lacks {', '.join(names)}): restore it or pack again")
    try:
        shards = [ShardEntry(**entry) for entry in values["shards"]]
        fields = {name: values[name] for name in Manifest.__dataclass_fields__ if name != "shards"}
        manifest = Manifest(shards=shards, **fields)
        files = [*(s.file for s in shards), manifest.index["file"]]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or pack again") from None
    for name in files:
        if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
            raise UserError(
                f"{path} names the file {name!r}, which is not a plain name inside the store: do not use it"
            )
    if values.get("content_hash") != manifest.content_hash:
        raise UserError(f"{path} was changed after it was written (its content hash differs): restore it or pack again")
    return manifest
