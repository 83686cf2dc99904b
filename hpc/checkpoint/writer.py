"""Writes checkpoints while training goes on: it waits for the copy to memory only.

A thread is enough, since writing, syncing and hashing release Python's lock (see :mod:`hpc.checkpoint.layout`). It is
no daemon: a process that ends for another reason still finishes the checkpoint it began.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc.checkpoint import files
from hpc.checkpoint.retention import Retention

__all__ = ["CheckpointWriter", "Retention"]

Tensors = Mapping[str, Mapping[str, Tensor]]


class CheckpointWriter:
    """Writes the checkpoints of one start of a run; for rank 0 only, and from one thread.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        retention: what stays.
        background: whether :meth:`save` returns while the files are still being written.

    Attributes:
        memory: of the host, kept between saves; free where nothing is in flight.
        written: steps of the newest checkpoint that is whole on the disk; ``None``: this start has written none.
    """

    def __init__(self, checkpoints: Path, retention: Retention, background: bool) -> None:
        self._checkpoints, self._retention, self._background = checkpoints, retention, background
        self._ledger = files.Ledger()
        self.memory = HostCopy()
        self.written: int | None = None
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], score: float | None = None) -> None:
        """Write the state after ``step`` steps, what it holds now; a write that fails is told by :meth:`problem`.

        Waits for an earlier write in flight.

        Args:
            step: optimizer steps done.
            tensors: file stem -> tensors by name; they may change as soon as this returns.
            state: JSON-able rest.
            score: what ranks this checkpoint among the best, lower being better.
        """
        self._join()
        encoded = files.encode_state(step, state, score)
        if not self._background:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what was gathered may still be on its way into memory of the host
            self._write(step, tensors, encoded, None)
            return
        held, ready = self.memory.take(tensors)
        self._thread = threading.Thread(target=self._write, args=(step, held, encoded, ready), name="checkpoint")
        self._thread.start()

    def problem(self) -> str | None:
        """One sentence about a write that failed since the last call, or ``None``; does not wait."""
        said, self._problems = self._problems, []
        return "; ".join(said) or None

    def wait(self) -> str | None:
        """Wait until nothing is in flight; then as :meth:`problem`."""
        self._join()
        return self.problem()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: Tensors, state: bytes, ready: torch.cuda.Event | None) -> None:
        try:
            if ready is not None:
                ready.synchronize()
            target = files.put(self._checkpoints, step, tensors, state, self._ledger)
        except Exception as error:  # whatever it is, training need not die for it, and the last save must say it
            self._problems.append(self._say(step, tensors, error))
            return
        self.written = step
        try:
            files.prune(self._checkpoints, target, self._retention, self._ledger)
        except OSError as error:
            self._problems.append(f"{target.name} is written, but older ones cannot be deleted ({_reason(error)})")

    def _say(self, step: int, tensors: Tensors, error: Exception) -> str:
        size = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
        # A failed move of latest comes after the rename: what is whole stays, and is found.
        what = f"{self._checkpoints / files.step_name(step)} could not be written: {_reason(error)}"
        try:
            free = shutil.disk_usage(self._checkpoints).free
            what += f" (it takes {_megabytes(size)}, {_megabytes(free)} are free on the disk)"
        except OSError:
            pass
        before = _named(self._checkpoints)
        return f"{what}; {f'{before} stays the latest' if before else 'there is no checkpoint yet'}"


class HostCopy:
    """A copy of tensors in host memory, kept between saves, since fresh memory costs more than the copy itself.

    What lies on a GPU is copied into pinned memory in stream order: the host does not wait, and kernels that change
    the tensors later come after the copy.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, length: int, like: Tensor) -> Tensor:
        """Flat memory that is the same at each call with ``name``; :meth:`take` leaves what lies in it where it is."""
        self._rooms[name] = self._fit(self._rooms.get(name), torch.Size([length]), like)
        return self._rooms[name]

    @torch.no_grad()
    def take(self, tensors: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        """The copy, valid until the next call, and the event after which it is complete (``None``: it is already)."""
        copies: dict[str, dict[str, Tensor]] = {}
        rooms = {room.untyped_storage().data_ptr() for room in self._rooms.values()}
        on_gpu = None
        for stem, named in tensors.items():
            copies[stem] = {}
            for name, tensor in named.items():
                if tensor.untyped_storage().data_ptr() in rooms:
                    copies[stem][name] = tensor
                    continue
                held = self._held[stem, name] = self._fit(self._held.get((stem, name)), tensor.shape, tensor)
                held.copy_(tensor, non_blocking=tensor.is_cuda)
                copies[stem][name] = held
                on_gpu = tensor.device if tensor.is_cuda else on_gpu
        if on_gpu is None:
            return copies, None
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(on_gpu))
        return copies, ready

    def _fit(self, held: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
        """``held`` if it has the shape and type already, else new memory."""
        if held is not None and held.shape == shape and held.dtype == like.dtype:
            return held
        try:
            return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        except RuntimeError:  # the system pins no more; the copy then waits
            return torch.empty(shape, dtype=like.dtype)


def _named(checkpoints: Path) -> str:
    try:
        return (checkpoints / files.LATEST).read_text().strip()
    except OSError:
        return ""


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
