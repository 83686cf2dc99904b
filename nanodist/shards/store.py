"""A packed store, read at random places: no scan of the tars, every sample checked against its hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc.errors import UserError
from nanodist.shards.codec import decode_into
from nanodist.shards.index import Samples, open_index
from nanodist.shards.manifest import Manifest, load_manifest
from nanodist.shards.reading import I64, Blocks, FileReader, Reader, find_blocks

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
        self.files: Reader = FileReader([self.folder / shard.file for shard in manifest.shards])

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
        return list(self.samples.table("group"))

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
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def costs_decoding(self) -> bool:
        """Whether decoding takes much longer than reading, so that processes of their own pay."""
        return not set(self.samples.table("suffix")) <= {"pgm", "npy"}

    def read_bytes(self, i: int) -> bytes:
        """The encoded bytes of sample ``i``, checked against its hash.

        Raises:
            SampleError: shard gone or shorter, or bytes changed; names shard and sample.
        """
        c = self.samples.columns
        return bytes(self._checked(i, *(int(c[name][i]) for name in ("shard", "offset", "size", "xxh3")), self.files))

    def read(self, i: int) -> npt.NDArray[Any]:
        """The pixels of sample ``i``: (H, W) uint8 or uint16, checked against its hash.

        Raises:
            SampleError: shard gone or shorter, bytes changed, or no image of the promised size; names shard and sample.
        """
        height, width = (int(self.samples.columns[name][i]) for name in ("height", "width"))
        if height * width > _MAX_TILE_PIXELS:
            raise self._fault(i, f"it claims {height} x {width} pixels")
        tile = np.empty((1, height, width), self.dtype)
        for _, error in self.fill([i], tile):
            raise error
        return tile[0]

    def fill(
        self, numbers: Sequence[int] | I64, out: npt.NDArray[Any], files: Reader | None = None
    ) -> list[tuple[int, SampleError]]:
        """Read the samples ``numbers`` into ``out`` (n, H, W), and say which could not be.

        Args:
            numbers: of the samples.
            out: uint8 or uint16, as the store; what it holds at the places of faults is undefined.
            files: where bytes come from; the store's own files unless given.

        Returns:
            (place in ``numbers``, what is wrong) of every sample that is damaged or gone.
        """
        at = np.asarray(numbers, np.int64)
        c, suffixes = self.samples.columns, self.samples.table("suffix")
        rows = zip(
            at.tolist(), *(c[name][at].tolist() for name in ("shard", "offset", "size", "xxh3", "suffix")), strict=True
        )
        faults: list[tuple[int, SampleError]] = []
        files = files or self.files
        for place, (i, shard, offset, size, xxh3, suffix) in enumerate(rows):
            try:
                decode_into(self._checked(i, shard, offset, size, xxh3, files), suffixes[suffix], out[place])
            except SampleError as error:
                faults.append((place, error))
            except ValueError as error:
                faults.append((place, self._fault(i, str(error))))
        return faults

    def close(self) -> None:
        """Close the shard files; they open again when they are read."""
        self.files.close()

    def _checked(self, i: int, shard: int, offset: int, size: int, xxh3: int, files: Reader) -> memoryview:
        if not 0 <= shard < len(self.manifest.shards) or offset + size > self.manifest.shards[shard].bytes:
            raise self._fault(i, "the index points outside the shard")
        try:
            data = files.read(shard, offset, size)
        except FileNotFoundError:
            raise self._fault(i, "the shard is missing") from None
        except OSError as error:
            raise self._fault(i, f"the shard cannot be read ({error.strerror or error})") from None
        if len(data) != size:
            raise self._fault(i, "the shard is truncated")
        found = xxhash.xxh3_64_intdigest(data)
        if found != xxh3:
            raise self._fault(i, f"its bytes have xxh3 {found:016x} and not {xxh3:016x}")
        return data

    def _fault(self, i: int, fault: str) -> SampleError:
        number = int(self.samples.columns["shard"][i])
        name = self.manifest.shards[number].file if number < len(self.manifest.shards) else f"shard number {number}"
        return SampleError(self.folder / name, self.keys[i], fault)


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
    shards = samples.columns["shard"]
    if len(samples) and int(shards.max()) >= len(manifest.shards):
        raise UserError(f"{path} names a shard that the manifest lacks: pack again")
    return samples
