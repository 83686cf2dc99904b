"""nanodist with an observer in it: ``python -m tests.slurm.chaos_rank pretrain ...`` is ``nanodist pretrain ...``.

Each rank appends what it did, when, to ``rank-N.jsonl`` in the folder CHAOS_LOG: its start, the samples of each step
that it finished, and the beginning and end of each checkpoint. Training itself is the untouched code. With
CHAOS_HOG_STEP, rank 1 of the first start takes memory without end at that step; with CHAOS_DISK_S, the disk takes so
many seconds more for each of the two large files of a checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


class Observer:
    """Appends lines; each reaches the file at once and whole."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        folder = Path(os.environ["CHAOS_LOG"])
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank-{self.rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, **values: Any) -> None:
        line = {"restart": self.restart, "time": time.time(), **values}
        os.write(self._file, json.dumps(line).encode() + b"\n")


def _watch_training(observer: Observer) -> None:
    from hpc import loop
    from hpc.checkpoint import files

    step_once, put, write_tensors = loop.train_step, files.put, files.write_tensors
    hog, slow = int(os.environ.get("CHAOS_HOG_STEP") or 0), float(os.environ.get("CHAOS_DISK_S") or 0)

    def train_step(task: Any, engine: Any, batch: Any, *rest: Any) -> Any:
        if hog == batch.step + 1 and observer.rank == 1 and observer.restart == 0:
            _hog()
        result = step_once(task, engine, batch, *rest)
        observer.note(step=batch.step + 1, loss=result.loss, keys=list(batch.keys))
        return result

    def observed_put(checkpoints: Path, step: int, *rest: Any) -> Path:
        observer.note(write="begin", of=step)
        target = put(checkpoints, step, *rest)
        observer.note(write="end", of=step)
        return target

    def slow_disk(*arguments: Any) -> Any:
        time.sleep(slow)
        return write_tensors(*arguments)

    files.write_tensors = slow_disk  # type: ignore[assignment]
    loop.train_step, files.put = train_step, observed_put  # type: ignore[assignment]


def _hog() -> None:
    hoard = []
    while True:
        hoard.append(os.urandom(50_000_000))
        time.sleep(0.05)


def main() -> int:
    """Run the command line of nanodist."""
    observer = Observer()
    observer.note(process=os.getpid(), host=socket.gethostname())
    from nanodist import cli
    from nanodist.cli import pretrain

    run = pretrain._run

    def observed(*arguments: Any) -> int:
        # Only here, when nanodist has its signal handlers and would import torch by itself.
        _watch_training(observer)
        return run(*arguments)

    pretrain._run = observed  # type: ignore[assignment]
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
