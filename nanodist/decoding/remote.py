"""Shards on other machines (``https://``, ``s3://``): blocks of them come through a bounded folder on this one.

All processes of a machine share the folder: what one has fetched, the others find. Files in it are whole or absent, and
the ones used least recently go first.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc import atomic
from hpc.errors import UserError
from nanodist.decoding.reading import Traffic

TRIES = 5
_FIRST_WAIT_S = 0.5


@dataclass(frozen=True)
class Cache:
    """Where blocks of remote shards are kept, and how many bytes of them."""

    folder: str
    max_bytes: int


def default_cache() -> Cache:
    """``NANODIST_CACHE`` or ``~/.cache/nanodist``, 20 GiB."""
    folder = os.environ.get("NANODIST_CACHE") or str(Path.home() / ".cache" / "nanodist")
    return Cache(folder, 20 << 30)


def fetch(url: str, start: int | None = None, stop: int | None = None, tries: int = TRIES) -> bytes:
    """The bytes of ``url``, or those from ``start`` up to ``stop``; what fails is tried again, after longer waits.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, or gives other than the bytes that were asked for.
        UserError: fsspec, or what it needs for this kind of address, is not installed.
    """
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error} (pip install 'nanodist[remote]')") from None
    for attempt in range(tries):
        try:
            data: bytes = fs.cat_file(path, start=start, end=stop)
            if stop is None or start is None or len(data) == stop - start:
                return data
            raise OSError(f"{len(data)} bytes came and not {stop - start}")
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has errors of its own
            last = error
        if attempt + 1 < tries:
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    raise OSError(f"{url}: {' '.join(str(last).split()) or type(last).__name__}, {tries} times") from None


class RemoteReader:
    """Reads samples of the shards at ``urls``.

    Args:
        urls: of the shards.
        blocks: (shard, first byte, length) of what is fetched at once, in order; what lies in none is fetched alone.
        cache: where it is kept.
    """

    def __init__(self, urls: list[str], blocks: list[tuple[int, int, int]], cache: Cache) -> None:
        self._urls, self._blocks, self._cache = urls, blocks, cache
        self.traffic, self.parts = Traffic(), [self]
        self._lock = threading.Lock()
        self._written = cache.max_bytes  # so that the first fetch looks what is there
        self._folder = Path(cache.folder) / "blocks"

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """See :meth:`nanodist.decoding.reading.Reader.read`."""
        data = self.read_new(shard, offset, size)
        self.traffic.bytes_used += len(data)
        return data

    def read_new(self, shard: int, offset: int, size: int) -> memoryview:
        """:meth:`read`; not counted as used."""
        start, length = self._block(shard, offset, size)
        path = self._path(shard, start, length)
        for _ in range(3):  # another process may remove a block between two looks
            with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
                os.utime(file.fileno())
                file.seek(offset - start)
                return memoryview(file.read(size))
            with self._lock:
                self._fetch(shard, start, length, path)
        raise OSError(f"{path} vanishes again and again: give data.remote_cache_mb more room")

    def refresh(self, shard: int, offset: int) -> None:
        """Forget the block around ``offset``, which came damaged."""
        start, length = self._block(shard, offset, 1)
        self._path(shard, start, length).unlink(missing_ok=True)

    def spec(self) -> dict[str, Any]:
        """For another process to read the same."""
        return {"kind": "remote", "urls": self._urls, "blocks": self._blocks, "cache": asdict(self._cache)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> RemoteReader:
        """What :meth:`spec` told of."""
        return cls(spec["urls"], [(int(a), int(b), int(c)) for a, b, c in spec["blocks"]], Cache(**spec["cache"]))

    def close(self) -> None:
        """Nothing is held open."""

    def _block(self, shard: int, offset: int, size: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._blocks, (shard, offset, 1 << 62)) - 1
        if number >= 0:
            its, start, length = self._blocks[number]
            if its == shard and start <= offset and offset + size <= start + length:
                return start, length
        return offset, size

    def _path(self, shard: int, start: int, length: int) -> Path:
        name = hashlib.blake2b(f"{self._urls[shard]} {start} {length}".encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / name

    def _fetch(self, shard: int, start: int, length: int, path: Path) -> None:
        if path.exists():
            return
        data = fetch(self._urls[shard], start, start + length)
        self.traffic.count(length)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, data)
        self._written += length
        if self._written > self._cache.max_bytes // 20:
            self._written = 0
            _trim(self._folder, self._cache.max_bytes, keep=path)


def _trim(folder: Path, most: int, keep: Path) -> None:
    """Remove the files that were used least recently until at most ``most`` bytes are left."""
    found = []
    for path in folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size


def keep_local(folder: Path, name: str, get: Callable[[], bytes], good: Callable[[bytes], bool]) -> Path:
    """The file ``name`` in ``folder``, fetched by ``get`` unless a ``good`` one is there."""
    path = folder / name
    with contextlib.suppress(FileNotFoundError):
        if good(path.read_bytes()):
            return path
    data = get()
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, data)
    return path
