"""Shards copied together from pieces, each by one rank, and a record of those that are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from hpc import atomic
from nanodist.shards.manifest import ShardEntry
from nanodist.shards.merge import ShardPlan
from nanodist.shards.pieces import data_path, json_bytes
from nanodist.shards.tar import BLOCK, member, padded, write_shard

_BLOCK_BYTES = 4 * 2**20


def assemble(plan: ShardPlan, pieces: Path, shards: Path, records: Path) -> None:
    """Write one shard into the folder ``shards``, then its record, then free the pieces that nobody else needs.

    Raises:
        OSError: the disk is full.
    """
    entry = write_shard(shards / plan.file, plan.samples, _blocks(plan, pieces))
    # The name must be on the disk before the record that vouches for it.
    atomic.sync_directory(shards)
    atomic.write_json(_record(records, plan), {"digest": plan.digest, **asdict(entry)})
    for digest in plan.frees:
        data_path(pieces, digest).unlink(missing_ok=True)


def whole_shard(plan: ShardPlan, shards: Path, records: Path) -> ShardEntry | None:
    """The entry of a shard that was written before, or ``None`` where it has to be written."""
    try:
        values = json.loads(_record(records, plan).read_bytes())
        if values.pop("digest") != plan.digest:
            return None
        entry = ShardEntry(**values)
        return entry if (shards / plan.file).stat().st_size == entry.bytes else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _record(records: Path, plan: ShardPlan) -> Path:
    return records / f"{plan.file}.json"


def _blocks(plan: ShardPlan, pieces: Path) -> Iterator[bytes]:
    for run in plan.runs:
        with open(data_path(pieces, run.piece), "rb") as file:
            file.seek(run.start)
            if run.group is not None:
                yield _regrouped(_exactly(file, run.length), run.json_bytes, run.group)
                continue
            left = run.length
            while left > 0:
                block = _exactly(file, min(left, _BLOCK_BYTES))
                yield block
                left -= len(block)


def _exactly(file: BinaryIO, length: int) -> bytes:
    block = file.read(length)
    if len(block) < length:
        raise EOFError(f"{file.name} became shorter while it was read")
    return block


def _regrouped(members: bytes, length: int, group: str) -> bytes:
    """The members of one sample, whose JSON, the last one and ``length`` bytes long, names ``group``."""
    start = len(members) - padded(length)
    facts = json.loads(members[start : start + length])
    return members[: start - BLOCK] + member(f"{facts['key']}.json", json_bytes({**facts, "group": group}))
