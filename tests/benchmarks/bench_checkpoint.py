"""What a checkpoint costs the training: ours beside torch DCP (sync and async) and DeepSpeed's own save.

``python -m tests.benchmarks.bench_checkpoint [--quick] [--folder DISK]``, or under torchrun for more ranks. ResNet-50
with AdamW: weights, buffers and two moments by name, 0.28 GB. All ways take turns in one process on one disk, which is
synced between them; figures are medians over the rounds. Per way:

``waiting_s``: the call itself, in which no step is trained; ``done_s``: until everything is on the disk;
``step_ratio``: time of the steps trained while it was being written, to that of steps just before;
``lost_s``: all training time that it cost, the waiting and what those steps took longer.
DeepSpeed's save does not sync its files, all others do. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from hpc.checkpoint.elastic import gather, gather_on_main
from hpc.checkpoint.retention import Retention
from hpc.checkpoint.writer import CheckpointWriter
from hpc.engine import Engine, EngineConfig, start
from hpc.topology import detect

Pending = Callable[[], bool]


class Bench:
    """An engine that steps, and the ways of saving it."""

    def __init__(self, trunk: str, batch: int, folder: Path, zero_stage: int) -> None:
        self.topology = detect()
        config = EngineConfig(zero_stage=zero_stage)
        device = start(config, self.topology)
        torch.manual_seed(0)
        module = timm.create_model(trunk, in_chans=1, num_classes=0)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.engine = Engine(module, optimizer, config, self.topology, device, batch * self.topology.world_size)
        self.images = torch.randn(batch, 1, 64, 64, device=device)
        self.folder, self.gloo = folder, dist.new_group(backend="gloo")
        self.writers = {name: self._writer(name) for name in ("ours", "ours_sync")}
        self.stager = DefaultStager(StagingOptions(device.type == "cuda", False, False, device.type == "cuda"))
        self.count = 0

    def _writer(self, name: str) -> CheckpointWriter:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return CheckpointWriter(self.folder / name, Retention(1, 0, 0), background=name == "ours")

    def synchronize(self) -> None:
        """All ranks and the device are here."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier(group=self.gloo)

    def step(self) -> float:
        """Seconds of one training step."""
        self.synchronize()
        began = time.perf_counter()
        loss = self.engine.forward(self.images).square().mean() / self.topology.world_size
        self.engine.backward(loss)
        self.engine.step(1e-6)
        self.synchronize()
        return time.perf_counter() - began

    def anywhere(self, pending: bool) -> bool:
        """Whether it is so on any rank."""
        flag = torch.tensor(float(pending))
        dist.all_reduce(flag, group=self.gloo)
        return bool(flag)

    def ways(self) -> dict[str, Callable[[Path], Pending]]:
        """Name -> save into a folder and return what says whether the write is still in flight."""
        return {
            "ours": lambda _: self._ours("ours"),
            "ours_sync": lambda _: self._ours("ours_sync"),
            "dcp_sync": self._dcp_sync,
            "dcp_async": lambda path: self._dcp_async(path, None),
            "dcp_async_kept_memory": lambda path: self._dcp_async(path, self.stager),
            "deepspeed": self._deepspeed,
        }

    def _ours(self, name: str) -> Pending:
        self.count += 1
        writer = self.writers[name]
        tensors = gather_on_main(self.engine, writer.memory.room if self.topology.is_main else None)
        if not self.topology.is_main:
            return lambda: False
        writer.save(self.count, tensors, {"task": {}})
        return lambda: writer._thread is not None and writer._thread.is_alive()

    def _of_dcp(self) -> dict[str, Any]:
        """What DCP saves: from ZeRO 1 on, each rank its own slices, which is what costs it least."""
        if not self.engine.zero_stage:
            return dict(gather(self.engine))
        zero, rank = self.engine.optimizer, self.topology.rank
        own = [zero.optimizer.state[flat] for flat in zero.single_partition_of_fp32_groups]
        named = {f"{slot}-{rank}-{g}": t for g, state in enumerate(own) for slot, t in state.items() if t.dim()}
        return {"model": self.engine.module.state_dict(), "optimizer": named}

    def _dcp_sync(self, path: Path) -> Pending:
        dcp.save(self._of_dcp(), checkpoint_id=path, process_group=self.gloo)
        return lambda: False

    def _dcp_async(self, path: Path, stager: Any) -> Pending:
        # What DCP does by itself with no stager: new memory at each save.
        answer = dcp.async_save(
            self._of_dcp(), checkpoint_id=path, process_group=self.gloo_of_dcp(), async_stager=stager
        )
        assert isinstance(answer, Future)
        return lambda: not answer.done()

    def gloo_of_dcp(self) -> Any:
        """A group of its own: DCP's thread talks while the training does."""
        if not hasattr(self, "_dcp_group"):
            self._dcp_group = dist.new_group(backend="gloo")
        return self._dcp_group

    def _deepspeed(self, path: Path) -> Pending:
        self.engine.deepspeed.save_checkpoint(str(path))
        return lambda: False


def measure(bench: Bench, name: str, save: Callable[[Path], Pending], steps: int) -> dict[str, float]:
    """One save: what was waited, until when it took, and what the steps beside it took."""
    path = bench.folder / f"{name}-once"
    os.sync()
    before = statistics.median(bench.step() for _ in range(steps))
    bench.synchronize()
    began = time.perf_counter()
    pending = save(path)
    bench.synchronize()
    waiting = time.perf_counter() - began
    beside: list[float] = []
    while bench.anywhere(pending()):
        beside.append(bench.step())
    done = time.perf_counter() - began
    for writer in bench.writers.values():
        problem = writer.wait()
        assert problem is None, problem
    bench.synchronize()
    if bench.topology.is_main:
        shutil.rmtree(path, ignore_errors=True)
    stolen = sum(beside) - before * len(beside)
    ratio = statistics.mean(beside) / before if beside else float("nan")
    return {"waiting_s": waiting, "done_s": done, "step_s": before, "step_ratio": ratio, "lost_s": waiting + stolen}


def summary(rounds: list[dict[str, float]]) -> dict[str, float | None]:
    """Median of each figure, and the range of the waiting."""
    figures: dict[str, float | None] = {}
    for name in rounds[0]:
        values = [r[name] for r in rounds if r[name] == r[name]]
        figures[name] = round(statistics.median(values), 4) if values else None
    waits = [r["waiting_s"] for r in rounds]
    return {**figures, "waiting_low_s": round(min(waits), 4), "waiting_high_s": round(max(waits), 4)}


def run(options: argparse.Namespace, folder: Path) -> None:
    """All rounds, then the table and the JSON line."""
    bench = Bench("resnet18" if options.quick else options.trunk, options.batch, folder, options.zero_stage)
    ways = {name: way for name, way in bench.ways().items() if not options.only or name in options.only}
    for _ in range(2):
        bench.step()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    first: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, save in list(ways.items()):
            try:
                result = measure(bench, name, save, options.steps)
            except Exception as error:
                if name.startswith("ours"):
                    raise
                print(f"{name} fails here, and is left out: {type(error).__name__}: {str(error)[:100]}")
                del ways[name], rounds[name]
                continue
            if number == 0:  # memory is taken, modules are imported
                first[name] = round(result["waiting_s"], 4)
            else:
                rounds[name].append(result)
    size = sum(t.numel() * t.element_size() for named in gather(bench.engine).values() for t in named.values())
    if not bench.topology.is_main:
        return
    table = {name: {**summary(results), "first_waiting_s": first[name]} for name, results in rounds.items()}
    for name, row in table.items():
        print(f"{name:24}", "  ".join(f"{key} {value}" for key, value in row.items()))
    facts = {
        "bytes": size,
        "device": str(bench.engine.device),
        "ranks": bench.topology.world_size,
        "zero_stage": options.zero_stage,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "checkpoint", **facts, "ways": table}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and two rounds: does it run?")
    parser.add_argument("--folder", default=None, help="A folder on the disk to write to; default: the temporary one.")
    parser.add_argument("--trunk", default="resnet50", help="timm model.")
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds after one that is not.")
    parser.add_argument("--steps", type=int, default=5, help="Steps before each save, for comparison.")
    parser.add_argument("--batch", type=int, default=4, help="Images of 64 px a rank and step.")
    parser.add_argument("--zero-stage", type=int, default=0, help="Stage of the engine.")
    parser.add_argument("--only", nargs="*", default=[], help="Names of the ways to run.")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 2
    # All ranks of a node share the folder that rank 0's parent names, so that it must not be random there.
    name = f"bench-checkpoint-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}-{os.environ.get('MASTER_PORT', 0)}"
    folder = Path(options.folder or tempfile.gettempdir()) / name
    try:
        run(options, folder)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
