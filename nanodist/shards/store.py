"""A packed store, read at random places: no scan of the tars, every sample checked against its hash."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc.errors import UserError
from nanodist.shards import index
from nanodist.shards.codec import decode, sample_hash
from nanodist.shards.index import Sample, Samples
from nanodist.shards.manifest import Manifest, load_manifest

_OPEN_FILES = 64
_MAX_TILE_PIXELS = 2**29


class SampleError(UserError):
    """A sample that cannot be read as it was packed: ``shard`` (file name), ``key`` and ``fault`` say what is wrong."""

    def __init__(self, shard: Path, key: str, fault: str) -> None:
        super().__init__(f"{shard}, sample {key}: {fault}; restore the shard or pack again")
        self.shard, self.key, self.fault = shard.name, key, fault


class Store:
    """Samples of a store by number; safe to share between threads, cheap to send to another process.

    Attributes:
        path: folder of the store.
        manifest: what the store is made of.
        manifest_hash: hex hash of the manifest's content, the identity of the data.
        samples: the :class:`Sample` of every number.
    """

    def __init__(self, path: Path, manifest: Manifest, samples: Samples) -> None:
        self.path, self.manifest, self.samples = path, manifest, samples
        self.manifest_hash = manifest.content_hash
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store in the folder ``path``; shards are only looked at for their presence and length.

        Raises:
            UserError: missing, empty or no store, another schema version, a missing or truncated shard, a damaged
                index.
        """
        folder = Path(path)
        manifest = load_manifest(folder)
        for shard in manifest.shards:
            _check_length(folder / shard.file, shard.bytes)
        return cls(folder, manifest, load_index(folder, manifest))

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Path]]:
        return Store.open, (self.path,)

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
    def keys(self) -> list[str]:
        """The key of every sample."""
        return self.samples.keys

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels: uint8 or uint16."""
        return np.dtype(np.uint16 if self.manifest.depth == 16 else np.uint8)

    def read_bytes(self, i: int) -> bytes:
        """The encoded bytes of sample ``i``, checked against its hash.

        Raises:
            SampleError: shard gone or shorter, or bytes changed; names shard and sample.
        """
        return self._checked_bytes(self.samples[i])

    def read(self, i: int) -> npt.NDArray[Any]:
        """The pixels of sample ``i``: (H, W) uint8 or uint16, read-only, checked against its hash.

        Raises:
            SampleError: shard gone or shorter, bytes changed, or no image of the promised size; names shard and sample.
        """
        sample = self.samples[i]
        data = self._checked_bytes(sample)
        if sample.height * sample.width > _MAX_TILE_PIXELS:
            raise self._fault(sample, f"it claims {sample.height} x {sample.width} pixels")
        try:
            return decode(data, sample.height, sample.width, self.manifest.depth, sample.suffix)
        except ValueError as error:
            raise self._fault(sample, str(error)) from None

    def close(self) -> None:
        """Close the shard files; they open again when they are read."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _checked_bytes(self, sample: Sample) -> bytes:
        shard = self.manifest.shards[sample.shard]
        if sample.offset + sample.size > shard.bytes:
            raise self._fault(sample, "the index points outside the shard")
        try:
            data = self._file(sample.shard).read(sample.offset, sample.size)
        except FileNotFoundError:
            raise self._fault(sample, "the shard is missing") from None
        except OSError as error:
            raise self._fault(sample, f"the shard cannot be read ({error.strerror})") from None
        if len(data) != sample.size:
            raise self._fault(sample, "the shard is truncated")
        if sample_hash(data) != sample.xxh3:
            raise self._fault(sample, f"its bytes have xxh3 {sample_hash(data)} and not {sample.xxh3}")
        return data

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _File(self.path / self.manifest.shards[shard].file)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)  # closes once no thread reads from it
            self._files.move_to_end(shard)
            return file

    def _fault(self, sample: Sample, fault: str) -> SampleError:
        return SampleError(self.path / self.manifest.shards[sample.shard].file, sample.key, fault)


class _File:
    """A file read at offsets by many threads; without ``os.pread`` (Windows) they take turns."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        parts: list[bytes] = []
        while size > 0:
            part = self._read_once(offset, size)
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_once(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


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
    data = path.read_bytes()
    if xxhash.xxh3_128_hexdigest(data) != manifest.index["xxh3"]:
        raise UserError(f"{path} is damaged (its hash differs): restore it or pack again")
    try:
        samples = index.from_bytes(data)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or pack again") from None
    if len(samples) != manifest.samples:
        raise UserError(f"{path} has {len(samples)} samples and the manifest {manifest.samples}: pack again")
    shards = samples.columns["shard"]
    if len(samples) and int(shards.max()) >= len(manifest.shards):
        raise UserError(f"{path} names a shard that the manifest lacks: pack again")
    return samples
