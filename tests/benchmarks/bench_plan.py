"""What ``nanodist plan`` predicts, against what real training steps allocate and send.

Memory is counted by the allocator: on CUDA its own peak, on the CPU every allocation and release that torch's profiler
sees, from before the model is built. Bytes are counted where ``torch.distributed`` hands tensors to the process group.

    python -m tests.benchmarks.bench_plan
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEVICE = "engine.device=cuda" if torch.cuda.is_available() else "engine.device=cpu"
COMMON = [
    "views.size_px=64",
    "train.bn_group_size=8",
    "train.global_batch_size=64",
    "train.steps=10",
    "engine.device=cpu",
]
SMALL = [
    "views.size_px=32",
    "train.bn_group_size=8",
    "train.global_batch_size=32",
    "train.steps=10",
    "engine.device=cpu",
]
MARK = 1_234_567  # an allocation of no other size tells where the counted step begins and ends


@dataclass(frozen=True)
class Case:
    """A recipe on a number of ranks, in so many micro-batches."""

    name: str
    overrides: tuple[str, ...]
    ranks: int
    micro_batches: int
    stage: int

    def recipe(self) -> Any:
        """The recipe that says so."""
        from nanodist.pretrain.recipe import load_recipe

        recipe = load_recipe("simclr", list(self.overrides))
        micro = recipe.train.global_batch_size // (self.ranks * self.micro_batches)
        how = [f"train.micro_batch_size={micro}", f"engine.zero_stage={self.stage}"]
        return load_recipe("simclr", [*self.overrides, *how])


def cases(quick: bool) -> list[Case]:
    """What is compared."""
    if quick:
        tiny = (
            *SMALL,
            "encoder.trunk_options={channels: [16, 32, 64, 128]}",
        )
        spanning = (*tiny, "train.bn_group_size=16")  # of two ranks, in each micro-step
        return [Case("resnet18 tiny", tiny, 2, m, stage) for stage, m in ((0, 4), (1, 1), (2, 4))] + [
            Case("resnet18 tiny, spanning", spanning, 2, 2, 1),
            Case("resnet18 tiny", tiny, 1, 1, 0),
        ]
    resnet = (*COMMON, "encoder.trunk=resnet18")
    several = {
        "resnet18 64 px": resnet,
        "resnet18, BN over all ranks": (*resnet, "train.bn_group_size=null"),
        "resnet18, Barlow Twins 2048": (*resnet, "objective.name=barlow_twins", "projector.widths=[2048, 2048]"),
    }
    found = [
        Case(name, overrides, 2, m, stage)
        for (name, overrides), stage, m in product(several.items(), (0, 1, 2), (1, 4))
        if m == 1 or name == "resnet18 64 px"
    ]
    vit = (*COMMON, "encoder.trunk=vit_tiny_patch16_224", "encoder.trunk_options={img_size: 64, patch_size: 8}")
    found += [
        Case("resnet18, bf16", (*resnet, "train.precision=bf16"), 2, 1, 0),
        Case("resnet18, SGD", (*resnet, "optimizer.name=sgd"), 2, 1, 1),
        Case("resnet18, one rank", resnet, 1, 1, 0),
        Case("resnet18, one rank", resnet, 1, 4, 0),
        Case("resnet50 64 px", (*COMMON, "encoder.trunk=resnet50"), 2, 4, 2),
        Case("ViT-Ti/8", vit, 2, 1, 1),
        Case("ViT-Ti/8, checkpointing", (*vit, "encoder.checkpointing=true"), 2, 1, 1),
    ]
    return found


def _task(recipe: Any, topology: Any, device: torch.device, world: Any) -> Any:
    """The real task with ready views and no store: what reads and makes them is not what is planned."""
    from hpc.batch_norm import make_layout
    from nanodist.objectives import build_objective
    from nanodist.pretrain.model import build_model
    from nanodist.pretrain.planning import any_spec
    from nanodist.pretrain.task import PretrainTask

    t = recipe.train
    count = t.micro_batches(topology.world_size)
    both = 2 if t.bn_views == "both" else 1

    class Ready(PretrainTask):
        def __init__(self) -> None:
            self.recipe, self.topology, self.device, self.group = recipe, topology, device, world
            self.micro_batches, self.partners = count, None
            self.hurries, self._made = False, None
            self.layout = make_layout(
                t.global_batch_size, recipe.bn_group_size(), topology.rank, topology.world_size, count, views=both
            )
            self.module = build_model(recipe, any_spec(recipe), self.layout)
            self.objective = build_objective(recipe.objective)

        def views(self, batch: Any) -> torch.Tensor:
            local, size = t.global_batch_size // topology.world_size, recipe.views.size_px
            return torch.rand(2, local, 1, size, size, device=device)

    return Ready()


def _patient(wait: Any) -> Any:
    """Let gloo's thread let go of a bucket before the engine does.

    The profiler does not see what other threads release, so that a bucket which gloo drops last would count for ever.
    """

    def wait_and_sleep(bucket: Any) -> None:
        wait(bucket)
        time.sleep(0.02)

    return wait_and_sleep


def _allocated(profile: Any) -> int:
    """Most bytes of the CPU allocator between the two marks, above what there was when the profile began."""
    now, marks, inside = 0, 0, []
    for event in sorted((e for e in profile.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if abs(event.nbytes()) == MARK:
            marks += 1
            continue
        now += event.nbytes()
        if marks == 2:  # made and released: the step begins
            inside.append(now)
    return max(inside)


def count(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Peak memory and bytes handed to collectives in a real training step of this rank."""
    from hpc.planner_ledger import Ledger
    from hpc.topology import Topology

    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    topology = Topology(rank, world_size, rank, world_size, 0, 1, "localhost", "plan", "127.0.0.1", 1)
    topology.export()
    recipe = case.recipe()
    torch.manual_seed(rank)
    cuda = torch.cuda.is_available() and recipe.engine.device != "cpu"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    world = dist.new_group() if world_size > 1 else None
    before = torch.cuda.memory_allocated(device) if cuda else 0
    gc.collect()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    profiler.start()
    step = _stepper(recipe, topology, device, world)
    step()
    with Ledger() as ledger:
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    mark = torch.empty(MARK, dtype=torch.uint8)
    del mark
    step()
    torch.empty(MARK, dtype=torch.uint8)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    profiler.stop()
    assert profiler.profiler is not None
    peak = peak or _allocated(profiler.profiler.kineto_results)
    return {"peak": peak, "sent": ledger.sent}


def _stepper(recipe: Any, topology: Any, device: torch.device, world: Any) -> Any:
    from hpc.engine import Engine
    from hpc.optimizers import build_optimizer
    from hpc.preemption import agree
    from hpc.step import train_step

    task = _task(recipe, topology, device, world)
    optimizer = build_optimizer(task.module, recipe.optimizer, 1e-3)
    engine = Engine(
        task.module,
        optimizer,
        recipe.engine,
        topology,
        device,
        recipe.train.global_batch_size,
        0.0,
        task.micro_batches,
    )
    batch = SimpleNamespace(indices=[], keys=[], step=0)

    def step() -> None:
        assert train_step(task, engine, batch, 1e-3).taken
        agree(None, world, device)

    return step


def predict(case: Case) -> Any:
    """What the planner says."""
    from nanodist.pretrain.planning import Planner

    return Planner(case.recipe(), case.ranks).predict(case.micro_batches, case.stage)


def compare(case: Case, predicted: Any, counted: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; ranks differ where partitions do, so the largest counts."""
    from hpc.planner import COLLECTIVES

    peak = max(c["peak"] for c in counted)
    handed: dict[str, list[int]] = {}
    for transfer in predicted.moved:
        handed.setdefault(transfer.collective, [0, 0])[0] += transfer.handed
    for c in counted:
        for name, (_, size) in c["sent"].items():
            handed.setdefault(COLLECTIVES[name], [0, 0])[1] += size
    for pair in handed.values():
        pair[1] = round(pair[1] / len(counted))
    return {
        "name": case.name,
        "ranks": case.ranks,
        "micro_batches": case.micro_batches,
        "zero_stage": case.stage,
        "memory": [predicted.memory.peak, peak],
        "phase": predicted.memory.peak_phase,
        "bytes": handed,
        "memory_error": predicted.memory.peak / peak - 1,
        "bytes_error": max((abs(a / b - 1) if b else float(a > 0) for a, b in handed.values()), default=0.0),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text."""
    head = f"{'recipe':<30} {'ranks':>5} {'micro':>5} {'ZeRO':>4} {'predicted':>10} {'counted MiB':>11} {'error':>7}"
    lines = [f"{head}  bytes a step: predicted / counted"]
    for r in rows:
        a, b = (x / 2**20 for x in r["memory"])
        moved = ", ".join(f"{name} {p} / {c}" for name, (p, c) in sorted(r["bytes"].items()))
        lines.append(
            f"{r['name']:<30} {r['ranks']:>5} {r['micro_batches']:>5} {r['zero_stage']:>4} {a:>10.1f} {b:>11.1f} "
            f"{100 * r['memory_error']:>+6.1f}%  {moved or '-'}"
        )
    return "\n".join(lines)


def _rank(rank: int, world_size: int, folder: str, these: list[Case], results: Any) -> None:
    from hpc.reduction import _Bucket

    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "nccl"
    else:
        _Bucket.wait = _patient(_Bucket.wait)  # type: ignore[method-assign]
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for case in these:
        results.put((case, rank, count(rank, world_size, case)))
    dist.barrier()
    dist.destroy_process_group()


def count_all(these: list[Case]) -> list[list[dict[str, Any]]]:
    """What :func:`count` finds for each case, on processes of its own."""
    found: dict[Case, dict[int, Any]] = {}
    context = mp.get_context("spawn")
    for ranks in sorted({case.ranks for case in these}):
        mine, results = [case for case in these if case.ranks == ranks], context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            spawned = mp.spawn(_rank, (ranks, folder, mine, results), nprocs=ranks, join=False)
            for _ in range(ranks * len(mine)):
                while results.empty():
                    if spawned.join(timeout=0.2):
                        break
                case, rank, made = results.get()
                found.setdefault(case, {})[rank] = made
                print(f"counted {case}, rank {rank}: {made['peak'] / 2**20:.1f} MiB", file=sys.stderr)
            while not spawned.join():
                pass
    return [[found[case][rank] for rank in range(case.ranks)] for case in these]


def compare_all(these: list[Case]) -> list[dict[str, Any]]:
    """The table; predictions come first, so that they see the code that the counting processes are about to load."""
    predicted = [predict(case) for case in these]
    return [compare(*row) for row in zip(these, predicted, count_all(these), strict=True)]


def main() -> None:
    """Count, compare, print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Small models only.")
    options = parser.parse_args()
    # NCCL wants a GPU for each rank.
    most = torch.cuda.device_count() if torch.cuda.is_available() else 2
    these = [case for case in cases(options.quick) if case.ranks <= most]
    rows = compare_all(these)
    print(table(rows))
    memory, moved = (max(abs(r[key]) for r in rows) for key in ("memory_error", "bytes_error"))
    print(f"largest error: memory {100 * memory:.1f} %, bytes {100 * moved:.1f} %")
    print(json.dumps({"benchmark": "plan", "memory_error": memory, "bytes_error": moved, "rows": rows}))


if __name__ == "__main__":
    main()
