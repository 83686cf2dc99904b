"""A pool of real gloo processes for the ranks of tests; spawned once a session, since importing torch is slow."""

from __future__ import annotations

import gc
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_COLLECT_AFTER = 8


def _worker(rank: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    done = 0
    while (task := tasks.get()) is not None:
        function, world_size, rendezvous, arguments = task
        try:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
            results.put((rank, True, function(rank, world_size, *arguments)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            done += 1
            if done % _COLLECT_AFTER == 0:
                # Groups that cycles keep alive keep threads of gloo, whose polling took a core after some hundreds.
                gc.collect()


class RankPool:
    """``run(world_size, function, *arguments)`` calls ``function(rank, world_size, *arguments)`` on each rank."""

    def __init__(self, most: int) -> None:
        context = mp.get_context("spawn")
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(most)]
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
        for rank, good, answer in answers:
            assert good, f"rank {rank}:\n{answer}"
        return [answer for _, _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for queue in self._tasks:
            queue.put(None)
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
