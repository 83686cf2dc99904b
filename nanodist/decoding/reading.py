"""Bytes of shards: from files at random places, or in blocks of a MiB and more that are read once and kept."""

from __future__ import annotations

import bisect
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from nanodist.decoding.codec import RAW_SUFFIXES, decode_into, raw_header

I64 = npt.NDArray[np.int64]
BLOCK_BYTES = 1 << 20
_OPEN_FILES = 256


@dataclass
class Traffic:
    """What was read: calls to the file system, the bytes that they gave, and the bytes of samples among them."""

    reads: int = 0
    bytes_read: int = 0
    bytes_used: int = 0
    smallest_read: int = 0

    def count(self, length: int) -> None:
        """One read of ``length`` bytes."""
        if length < self.smallest_read or not self.reads:
            self.smallest_read = length
        self.reads += 1
        self.bytes_read += length


class Reader(Protocol):
    """Where the bytes of shards come from."""

    traffic: Traffic

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """Up to ``size`` bytes, fewer only at the end of the shard; valid until this thread reads again.

        Raises:
            OSError: the shard is gone or cannot be read.
        """
        ...

    def close(self) -> None:
        """Let go of files; they open again when they are read."""
        ...


class FileReader:
    """Shard files, read at offsets by many threads; without ``os.preadv`` (Windows) they take turns."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.traffic = paths, Traffic()
        self.parts = [self]
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """See :meth:`Reader.read`."""
        buffer = self._buffer(size)
        file = self._files.get(shard) or self._file(shard)
        got = file.read_into(buffer, offset)
        self.traffic.count(got)
        self.traffic.bytes_used += got
        return buffer if got == size else buffer[:got]

    def read_beside(self, shard: int, offset: int, head: bytearray, body: memoryview) -> bool:
        """Fill ``head`` and then ``body`` by one call; whether that worked."""
        if not hasattr(os, "preadv"):
            return False
        got = os.preadv((self._files.get(shard) or self._file(shard)).fileno(), [head, body], offset)
        self.traffic.count(got)
        self.traffic.bytes_used += got
        return got == len(head) + len(body)

    def read_new(self, shard: int, offset: int, size: int) -> memoryview:
        """:meth:`read` into memory of its own, which stays valid; not counted as used."""
        buffer = memoryview(bytearray(size))
        got = self._file(shard).read_into(buffer, offset)
        self.traffic.count(got)
        return buffer[:got]

    def spec(self) -> dict[str, Any]:
        """For another process to read the same."""
        return {"kind": "files", "paths": [os.path.abspath(path) for path in self.paths]}

    def close(self) -> None:
        """See :meth:`Reader.close`."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _buffer(self, size: int) -> memoryview:
        # One that stays in the processor's cache: the bytes are hashed and decoded from it at once.
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None or len(found) < size:
            found = self._local.buffer = memoryview(bytearray(max(size, 1 << 16)))
        return found if len(found) == size else found[:size]

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _File(self.paths[shard])
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)  # closes once no thread reads from it
            return file


class _File:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset`` on; gives how many bytes there were."""
        done = self._read_once(buffer, offset)
        while 0 < done < len(buffer):
            part = self._read_once(buffer[done:], offset + done)
            if not part:
                break
            done += part
        return done

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def _read_once(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class JoinedReader:
    """Several readers, whose shards are counted on from each other's."""

    def __init__(self, parts: Sequence[tuple[int, Any]]) -> None:
        counts = [count for count, _ in parts]
        self._readers = [reader for _, reader in parts]
        self.parts = self._readers
        self._starts = [sum(counts[:k]) for k in range(len(counts))]

    @property
    def traffic(self) -> Traffic:
        """Of all readers together."""
        every = [reader.traffic for reader in self._readers]
        return Traffic(
            sum(t.reads for t in every),
            sum(t.bytes_read for t in every),
            sum(t.bytes_used for t in every),
            min((t.smallest_read for t in every if t.reads), default=0),
        )

    def _find(self, shard: int) -> tuple[Any, int]:
        which = bisect.bisect_right(self._starts, shard) - 1
        return self._readers[which], shard - self._starts[which]

    def refresh(self, shard: int, offset: int) -> None:
        """Forget what came damaged."""
        reader, own = self._find(shard)
        if hasattr(reader, "refresh"):
            reader.refresh(own, offset)

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """See :meth:`Reader.read`."""
        reader, own = self._find(shard)
        part: memoryview = reader.read(own, offset, size)
        return part

    def read_new(self, shard: int, offset: int, size: int) -> memoryview:
        """See :meth:`FileReader.read_new`."""
        reader, own = self._find(shard)
        part: memoryview = reader.read_new(own, offset, size)
        return part

    def close(self) -> None:
        """See :meth:`Reader.close`."""
        for reader in self._readers:
            reader.close()


def read_rows(
    rows: npt.NDArray[np.int64], suffixes: Sequence[str], files: Reader, out: npt.NDArray[Any], places: Sequence[int]
) -> list[tuple[int, str]]:
    """Read, check and decode samples.

    Args:
        rows: (n, 5) shard, offset, size, xxh3 (its 64 bits as a signed number) and place of the ending in ``suffixes``.
        suffixes: endings of members.
        files: where bytes come from.
        out: (m, H, W) uint8 or uint16.
        places: (n,) where in ``out`` each sample goes.

    Returns:
        (place, what is wrong) of every sample that is damaged or gone; ``out`` is undefined there.
    """
    faults = []
    head = raw_header(*out.shape[1:], 8 * out.dtype.itemsize)
    direct = files if isinstance(files, FileReader) and out.flags.c_contiguous else None
    raw_size = len(head) + out[:1].nbytes
    for place, (shard, offset, size, xxh3, suffix) in zip(places, rows.tolist(), strict=True):
        try:
            straight = size == raw_size and suffixes[suffix] in RAW_SUFFIXES
            if direct and straight and _read_raw(direct, shard, offset, xxh3, head, out[place]):
                continue
            # What is not sound is read again, as any other: that finds out what is wrong.
            data = files.read(shard, offset, size)
            found = xxhash.xxh3_64_intdigest(data)
            if found != xxh3 & 0xFFFFFFFFFFFFFFFF and hasattr(files, "refresh"):  # it may have come damaged
                files.refresh(shard, offset)
                data = files.read(shard, offset, size)
                found = xxhash.xxh3_64_intdigest(data)
            if len(data) != size:
                faults.append((place, "the shard is truncated"))
            elif found != xxh3 & 0xFFFFFFFFFFFFFFFF:
                faults.append((place, f"its bytes have xxh3 {found:016x} and not {xxh3 & 0xFFFFFFFFFFFFFFFF:016x}"))
            else:
                decode_into(data, suffixes[suffix], out[place])
        except FileNotFoundError:
            faults.append((place, "the shard is missing"))
        except OSError as error:
            faults.append((place, f"the shard cannot be read ({error.strerror or error})"))
        except ValueError as error:
            faults.append((place, str(error)))
    return faults


def _read_raw(files: FileReader, shard: int, offset: int, xxh3: int, head: bytes, out: npt.NDArray[Any]) -> bool:
    """Pixels straight from the file into a batch, which saves the copy that costs more than all else; whether sound."""
    found, body = bytearray(len(head)), memoryview(out).cast("B")  # type: ignore[arg-type]
    if not files.read_beside(shard, offset, found, body) or found != head:
        return False
    digest = xxhash.xxh3_64(found)
    digest.update(body)
    return digest.intdigest() == xxh3 & 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Blocks:
    """Runs of samples that lie side by side in a shard, each of :data:`BLOCK_BYTES` or more (or a whole shard).

    Attributes:
        first: (blocks + 1,) number of each block's first sample, and of all samples.
        shard: (blocks,) where it lies.
        start: (blocks,) its first byte.
        length: (blocks,) bytes from there to the end of its last image.
    """

    first: I64
    shard: I64
    start: I64
    length: I64


def find_blocks(columns: dict[str, npt.NDArray[Any]]) -> Blocks | None:
    """The blocks of a store with these ``columns`` of its index; ``None`` where samples do not lie in their order."""
    shard, offset, size = (columns[name].astype(np.int64) for name in ("shard", "offset", "size"))
    if not len(shard):
        return None
    end = offset + size
    same = shard[1:] == shard[:-1]
    if (shard[1:] < shard[:-1]).any() or (offset[1:][same] < end[:-1][same]).any():
        return None
    first = np.flatnonzero(np.append(True, ~same))  # of each shard
    last = np.append(first[1:], len(shard)) - 1
    inverse = np.repeat(np.arange(len(first)), last - first + 1)
    place = offset - offset[first][inverse]
    # A cut may come as much as one sample (with its JSON) too late, or too early.
    strides = (offset[1:] - offset[:-1])[same]
    step = BLOCK_BYTES + int(strides.max(initial=0))
    count = np.maximum(1, (end[last] - offset[first]) // step)
    within = np.minimum(place // step, count[inverse] - 1)
    begins = np.append(True, (within[1:] != within[:-1]) | ~same)
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(shard)) - 1
    return Blocks(np.append(starts, len(shard)), shard[starts], offset[starts], end[ends] - offset[starts])


class BlockReader:
    """Reads whole blocks, each once, and keeps those that were used last, in ``capacity`` bytes."""

    def __init__(self, files: Any, blocks: Blocks, capacity: int) -> None:
        self.inner, self._capacity = files, capacity
        self._places = list(zip(blocks.shard.tolist(), blocks.start.tolist(), strict=True))
        self._lengths = blocks.length.tolist()
        self._kept: OrderedDict[int, memoryview] = OrderedDict()
        self._bytes = self._used = 0
        self._lock = threading.Lock()

    @property
    def traffic(self) -> Traffic:
        """Of the files; what was used is counted here."""
        return replace(self.inner.traffic, bytes_used=self._used)

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """See :meth:`Reader.read`."""
        number = bisect.bisect_right(self._places, (shard, offset)) - 1
        begin = offset - self._places[number][1]
        with self._lock:
            block = self._kept.get(number)
            if block is None:
                block = self._load(number)
            else:
                self._kept.move_to_end(number)
        part = block[begin : begin + size]
        self._used += len(part)
        return part

    def refresh(self, shard: int, offset: int) -> None:
        """Read the block around ``offset`` anew, which came damaged."""
        number = bisect.bisect_right(self._places, (shard, offset)) - 1
        with self._lock:
            dropped = self._kept.pop(number, None)
            self._bytes -= len(dropped) if dropped is not None else 0
        if hasattr(self.inner, "refresh"):
            self.inner.refresh(shard, offset)

    def _load(self, number: int) -> memoryview:
        shard, start = self._places[number]
        block: memoryview = self.inner.read_new(shard, start, self._lengths[number])
        self._kept[number] = block
        self._bytes += len(block)
        while self._bytes > self._capacity and len(self._kept) > 1:
            self._bytes -= len(self._kept.popitem(last=False)[1])
        return block

    def close(self) -> None:
        """See :meth:`Reader.close`."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0
        self.inner.close()
