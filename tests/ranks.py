"""A pool of real gloo processes for the ranks of tests; spawned seldom, since importing torch is slow."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# DeepSpeed keeps the groups of every engine, and each has three threads of gloo that poll: 600 took half a core.
_MOST_THREADS = 150


def _worker(rank: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        function, world_size, rendezvous, arguments = task
        try:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
            answer = (True, function(rank, world_size, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        results.put((rank, *answer, _threads()))


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) if tasks.is_dir() else 0


class RankPool:
    """``run(world_size, function, *arguments)`` calls ``function(rank, world_size, *arguments)`` on each rank."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(self._most)]
        self._processes = [
            context.Process(target=_worker, args=(rank, queue, self._results), daemon=True)
            for rank, queue in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned, in rank order; a failure on any rank fails the test with its traceback."""
        with tempfile.TemporaryDirectory() as folder:
            for queue in self._tasks[:world_size]:
                queue.put((function, world_size, str(Path(folder) / "rendezvous"), arguments))
            answers = sorted((self._results.get(timeout=180) for _ in range(world_size)), key=lambda a: a[0])
        if max(threads for *_, threads in answers) > _MOST_THREADS:
            self.close()
            self._start()
        for rank, good, answer, _ in answers:
            assert good, f"rank {rank}:\n{answer}"
        return [answer for _, _, answer, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for queue in self._tasks:
            queue.put(None)
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
