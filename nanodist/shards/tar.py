"""Standard WebDataset tars whose bytes depend on nothing but their content."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from nanodist.shards.manifest import ShardEntry

BLOCK = 512
MAX_KEY = 90  # the name field of USTAR has 100 bytes, and the longest ending is ".json"


@dataclass(frozen=True)
class Place:
    """Where a sample's image was written: number of the shard, offset and length in bytes."""

    shard: int
    offset: int
    size: int


def member(name: str, data: bytes) -> bytes:
    """A USTAR member with time and owner zero (no PAX headers, which webdataset's own writer adds to each)."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return header + data + bytes(-len(data) % BLOCK)


class ShardWriter:
    """Writes ``shard-000000.tar``, ``shard-000001.tar``, ... into ``folder``, each of about ``shard_bytes`` at most.

    A sample is never parted, so that a shard with a single larger sample may be larger. Use as a context manager;
    ``shards`` is whole once it is left.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[ShardEntry] = []
        self._file: BinaryIO | None = None
        self._hash = xxhash.xxh3_128()
        self._length = self._samples = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def add(self, key: str, suffix: str, image: bytes, json_text: bytes) -> Place:
        """Append ``KEY.suffix`` and ``KEY.json``."""
        members = [member(f"{key}.{suffix}", image), member(f"{key}.json", json_text)]
        total = sum(map(len, members))
        if self._samples and self._length + total > self.shard_bytes:
            self.close()
        if self._file is None:
            self._file = open(self.folder / self._name(), "wb")  # noqa: SIM115
        place = Place(len(self.shards), self._length + BLOCK, len(image))
        for data in members:
            self._write(data)
        self._samples += 1
        return place

    def close(self) -> None:
        """End the shard that is being written."""
        if self._file is None:
            return
        end = self._length + 2 * BLOCK
        self._write(bytes(end - self._length + -end % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shards.append(ShardEntry(self._name(), self._samples, self._length, self._hash.hexdigest()))
        self._hash.reset()
        self._length = self._samples = 0

    def _name(self) -> str:
        return f"shard-{len(self.shards):06d}.tar"

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._length += len(data)
