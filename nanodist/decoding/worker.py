"""A process that reads and decodes for a loader: ``python -m nanodist.decoding.worker``.

It is started by :mod:`nanodist.shards.workers`, whose memory for batches it shares. On standard input come a line of
JSON (what there is to read) and
then the numbers of slots, each with a table of rows in shared memory; on standard output goes a line of JSON of faults
for each. It ends with its standard input, so that it outlives nobody.
"""

from __future__ import annotations

import json
import mmap
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanodist.decoding.reading import BlockReader, Blocks, FileReader, JoinedReader, read_rows

MOST_FAULTS = 64


class Slots:
    """Shared memory: for each slot the pixels of a batch, and a table (n, 6) of rows and their places."""

    def __init__(self, memory: mmap.mmap, slots: int, shape: Sequence[int], dtype: str) -> None:
        self.memory, self.shape, self.dtype = memory, tuple(shape), np.dtype(dtype)
        self.stride = self.bytes_of(shape, dtype)
        self.slots = slots

    @staticmethod
    def bytes_of(shape: Sequence[int], dtype: str) -> int:
        """Length of one slot, whole pages."""
        pixels = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return -(-(pixels + 8 + shape[0] * 48) // mmap.PAGESIZE) * mmap.PAGESIZE

    def images(self, slot: int) -> npt.NDArray[Any]:
        """The pixels of a slot; the memory stays in use as long as the array does."""
        start = slot * self.stride
        length = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(memoryview(self.memory)[start : start + length], self.dtype).reshape(self.shape)

    def table(self, slot: int) -> npt.NDArray[np.int64]:
        """The (n, 6) table of a slot."""
        start = (slot + 1) * self.stride - self.shape[0] * 48
        return np.frombuffer(self.memory, np.int64, self.shape[0] * 6, start).reshape(-1, 6)


def open_files(spec: dict[str, Any]) -> Any:
    """The reader that ``spec`` tells of, as :func:`nanodist.shards.workers.reader_spec` writes it."""
    parts: list[tuple[int, Any]] = []
    for part in spec["parts"]:
        if part["kind"] == "files":
            parts.append((len(part["paths"]), FileReader([Path(path) for path in part["paths"]])))
        else:
            from nanodist.decoding.remote import RemoteReader

            parts.append((len(part["urls"]), RemoteReader.from_spec(part)))
    files = parts[0][1] if len(parts) == 1 else JoinedReader(parts)
    if spec["blocks"] is None:
        return files
    blocks = Blocks(*(np.asarray(spec["blocks"][name], np.int64) for name in ("first", "shard", "start", "length")))
    return BlockReader(files, blocks, spec["capacity"])


def main() -> None:
    """Serve until the parent closes the pipe."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):  # they are for the parent, which ends this
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    spec = json.loads(source.readline())
    memory = mmap.mmap(spec["memory"], spec["length"])
    slots = Slots(memory, spec["slots"], spec["shape"], spec["dtype"])
    files = open_files(spec)
    sink.write(b"ready\n")
    sink.flush()
    while len(task := source.read(12)) == 12:
        slot, start, stop = (int.from_bytes(task[i : i + 4], "little") for i in (0, 4, 8))
        table = slots.table(slot)[start:stop]
        faults = read_rows(table[:, :5], spec["suffixes"], files, slots.images(slot), table[:, 5].tolist())
        texts = [[place, fault if i < MOST_FAULTS else "damaged"] for i, (place, fault) in enumerate(faults)]
        sink.write(json.dumps(texts).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    main()
