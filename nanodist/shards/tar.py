"""Standard WebDataset tars whose bytes depend on nothing but their content."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import xxhash

from nanodist.shards.manifest import ShardEntry

BLOCK = 512
MAX_KEY = 90  # the name field of USTAR has 100 bytes, and the longest ending is ".json"


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def padded(length: int) -> int:
    """How many bytes of whole blocks ``length`` bytes take."""
    return length + -length % BLOCK


def member(name: str, data: bytes) -> bytes:
    """A USTAR member with time and owner zero (no PAX headers, which webdataset's own writer adds to each)."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return header + data + bytes(-len(data) % BLOCK)


def write_shard(path: Path, samples: int, blocks: Iterable[bytes]) -> ShardEntry:
    """Write the members in ``blocks`` and the end of a tar to ``path``, which appears once it is whole and synced.

    Raises:
        OSError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, length = xxhash.xxh3_128(), 0
    try:
        with open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
                length += len(block)
            end = bytes(2 * BLOCK + -(length + 2 * BLOCK) % tarfile.RECORDSIZE)
            file.write(end)
            digest.update(end)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return ShardEntry(path.name, samples, length + len(end), digest.hexdigest())
