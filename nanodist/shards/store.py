"""A packed store, read at random places: no scan of the tars, every sample checked against its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc.errors import UserError
from nanodist.decoding.reading import I64, Blocks, FileReader, find_blocks, read_rows
from nanodist.shards.index import Samples, open_index
from nanodist.shards.manifest import Manifest, load_manifest

_MAX_TILE_PIXELS = 2**29


class SampleError(UserError):
    """A sample that cannot be read as it was packed: ``shard`` (file name), ``key`` and ``fault`` say what is wrong."""

    def __init__(self, shard: Path, key: str, fault: str) -> None:
        super().__init__(f"{shard}, sample {key}: {fault}; restore the shard or pack again")
        self.path, self.shard, self.key, self.fault = shard, shard.name, key, fault

    def __reduce__(self) -> tuple[type[SampleError], tuple[Path, str, str]]:
        return SampleError, (self.path, self.key, self.fault)


class Store:
    """Samples of a store by number; safe to share between threads, cheap to send to another process.

    Attributes:
        path: folder of the store.
        manifest: what the store is made of.
        manifest_hash: hex hash of the manifest's content, the identity of the data.
        samples: the :class:`Sample` of every number.
        files: where bytes come from.
    """

    def __init__(self, path: Path, manifest: Manifest, samples: Samples, shards: Path | None = None) -> None:
        self.path, self.manifest, self.samples = path, manifest, samples
        self.manifest_hash = manifest.content_hash
        self.folder = shards or path
        self._opened: tuple[Callable[..., Store], tuple[Any, ...]] | None = None
        self.files: Any = FileReader([self.folder / shard.file for shard in manifest.shards])

    @classmethod
    def open(cls, path: str | os.PathLike[str], pinned: str = "", shards: Path | None = None) -> Store:
        """Open the store in the folder ``path``; shards are only looked at for their presence and length.

        Args:
            path: the folder, or an address that :mod:`nanodist.shards.remote` reads (``https://``, ``s3://``).
            pinned: hash of the manifest that a run began with, where the store may have grown since.
            shards: where copies of its shards lie, if not in ``path``.

        Raises:
            UserError: missing, empty or no store, another schema version, a missing or truncated shard, a damaged
                index.
        """
        if "://" in str(path):
            from nanodist.shards.remote import open_remote

            return open_remote(str(path), pinned)
        folder = Path(path)
        manifest = load_manifest(folder, pinned)
        for shard in manifest.shards:
            _check_length((shards or folder) / shard.file, shard.bytes)
        return cls(folder, manifest, load_index(folder, manifest), shards)

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        if self._opened is not None:
            return self._opened
        return type(self).open, (self.path, self.manifest_hash, None if self.folder == self.path else self.folder)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> list[str | None]:
        """The label of every sample."""
        return self.samples.column("label")

    @property
    def groups(self) -> list[str]:
        """The group (micrograph) of every sample; no split may part one."""
        return self.samples.column("group")

    @property
    def group_codes(self) -> npt.NDArray[Any]:
        """(samples,) whole numbers, the same for samples of one group."""
        codes: npt.NDArray[Any] = self.samples.columns["group"]
        return codes

    @property
    def group_names(self) -> list[str]:
        """The groups that there are, each once."""
        table = self.samples.table("group")
        return [table[code] for code in np.unique(self.group_codes).tolist()]

    @property
    def keys(self) -> Sequence[str]:
        """The key of every sample."""
        return self.samples.keys

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels: uint8 or uint16."""
        return np.dtype(np.uint16 if self.manifest.depth == 16 else np.uint8)

    @property
    def pixel_size_nm(self) -> npt.NDArray[np.float64]:
        """(samples, 2) nanometres a pixel as (y, x), NaN where unknown."""
        sizes: npt.NDArray[np.float64] = self.samples.columns["pixel_size_nm"]
        return sizes

    @cached_property
    def blocks(self) -> Blocks | None:
        """Runs of samples that are read at once; ``None`` where they do not lie in their order."""
        return find_blocks(self.samples.columns)

    @property
    def tile_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) that there are, each once."""
        c = self.samples.columns
        if len(self) and all(c[name].min() == c[name].max() for name in ("height", "width")):
            return [(int(c["height"][0]), int(c["width"][0]))]
        both = np.unique(c["height"].astype(np.int64) << 32 | c["width"])
        return [(int(value) >> 32, int(value) & 0xFFFFFFFF) for value in both]

    @property
    def statistics(self) -> dict[str, Any]:
        """Of the manifest: pixel ``mean`` and ``std`` among others."""
        return self.manifest.statistics

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        return len(self.manifest.shards)

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def costs_decoding(self) -> bool:
        """Whether decoding takes much longer than reading, so that processes of their own pay."""
        return not set(self.samples.table("suffix")) <= {"pgm", "npy"}

    def subset(self, numbers: I64) -> Store:
        """The samples ``numbers`` alone, in that order; its identity is over the store's and the numbers."""
        part = Store(
            self.path, self.manifest, self.samples.take(numbers), None if self.folder == self.path else self.folder
        )
        digest = hashlib.sha256(self.manifest_hash.encode() + np.ascontiguousarray(numbers, np.int64).tobytes())
        part.manifest_hash, part.files = digest.hexdigest(), self.files
        part._opened = (_subset_of, (self, np.asarray(numbers)))
        return part

    def read_bytes(self, i: int) -> bytes:
        """The encoded bytes of sample ``i``, checked against its hash.

        Raises:
            SampleError: shard gone or shorter, or bytes changed; names shard and sample.
        """
        shard, offset, size, xxh3, _ = self.rows(np.asarray([i]))[0].tolist()
        try:
            data = bytes(self.files.read(shard, offset, size))
        except OSError as error:
            raise self.error(i, f"the shard cannot be read ({error.strerror or error})") from None
        if xxhash.xxh3_64_intdigest(data) != xxh3 & 0xFFFFFFFFFFFFFFFF:
            raise self.error(i, "its bytes are damaged (their xxh3 differs)")
        return data

    def read(self, i: int) -> npt.NDArray[Any]:
        """The pixels of sample ``i``: (H, W) uint8 or uint16, checked against its hash.

        Raises:
            SampleError: shard gone or shorter, bytes changed, or no image of the promised size; names shard and sample.
        """
        height, width = (int(self.samples.columns[name][i]) for name in ("height", "width"))
        tile = np.empty((1, height, width), self.dtype)
        for _, fault in read_rows(self.rows(np.asarray([i])), self.suffixes, self.files, tile, [0]):
            raise self.error(i, fault)
        return tile[0]

    @property
    def suffixes(self) -> list[str]:
        """Endings of the members, as :meth:`rows` counts them."""
        return self.samples.table("suffix")

    def rows(self, numbers: I64) -> I64:
        """Where the samples ``numbers`` lie, as :func:`nanodist.decoding.reading.read_rows` takes it."""
        c = self.samples.columns
        rows = np.empty((len(numbers), 5), np.int64)
        for k, name in enumerate(("shard", "offset", "size", "xxh3", "suffix")):
            column = c[name][numbers]
            rows[:, k] = column.view(np.int64) if name == "xxh3" else column
        return rows

    def range_of(self, i: int) -> tuple[int, int]:
        """First and last but one number of the samples that may stand in for sample ``i``: those of its store."""
        return 0, len(self)

    def examples_of_sizes(self) -> tuple[str, str]:
        """The first sample, and the first of another size, in words."""
        c = self.samples.columns
        differs = (c["height"] != c["height"][0]) | (c["width"] != c["width"][0])
        numbers = (0, int(np.argmax(differs)))
        a, b = (f"{self.keys[i]} is {c['height'][i]} x {c['width'][i]}" for i in numbers)
        return a, b

    def error(self, i: int, fault: str) -> SampleError:
        """What to raise about sample ``i``."""
        shard = self.manifest.shards[int(self.samples.columns["shard"][i])]
        return SampleError(self.folder / shard.file, self.keys[i], fault)

    def close(self) -> None:
        """Close the shard files; they open again when they are read."""
        self.files.close()


def _subset_of(store: Store, numbers: I64) -> Store:
    return store.subset(numbers)


def _check_length(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it or pack again") from None
    if found != expected:
        what = "truncated" if found < expected else "too long"
        raise UserError(f"{path} is {what} ({found} bytes and not {expected}): restore it or pack again")


def load_index(folder: Path, manifest: Manifest) -> Samples:
    """Read and check the index that ``manifest`` names.

    Raises:
        UserError: missing, damaged, or not fitting the manifest.
    """
    path = folder / manifest.index["file"]
    _check_length(path, manifest.index["bytes"])
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != manifest.index["xxh3"]:
        raise UserError(f"{path} is damaged (its hash differs): restore it or pack again")
    try:
        samples = open_index(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or pack again") from None
    if len(samples) != manifest.samples:
        raise UserError(f"{path} has {len(samples)} samples and the manifest {manifest.samples}: pack again")
    c = samples.columns
    if len(samples) and int(c["shard"].max()) >= len(manifest.shards):
        raise UserError(f"{path} names a shard that the manifest lacks: pack again")
    lengths = np.asarray([shard.bytes for shard in manifest.shards], np.int64)
    if len(samples) and (c["offset"] > lengths[c["shard"]] - c["size"]).any():
        raise UserError(f"{path} points outside a shard: pack again")
    if (c["height"].astype(np.int64) * c["width"] > _MAX_TILE_PIXELS).any():
        raise UserError(f"{path} has a sample of more than 2^29 pixels: pack with --tile PX")
    return samples
