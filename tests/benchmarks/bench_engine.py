"""DeepSpeed behind :class:`hpc.engine.Engine` against plain torch DDP: one training step of a ResNet-50 at 64 px.

All variants live in the same processes and take turns step by step, so that a busy machine slows all of them alike.
Forward, backward, reduction, gradient norm and optimizer step are timed, on the same inputs with the same loss and the
same fused AdamW. DDP keeps its defaults.

    python -m tests.benchmarks.bench_engine
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

LIMITS = {0: 1.15, 1: 1.25, 2: 1.25}


def _model(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, in_chans=1, num_classes=0)


def _loss(embeddings: Tensor, samples: int) -> Tensor:
    return embeddings.square().sum() / (samples * embeddings.shape[1])


def _ddp(args: argparse.Namespace, world_size: int, images: Tensor) -> Callable[[], None]:
    module = nn.parallel.DistributedDataParallel(_model(args.model).to(args.device))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        # DDP averages over ranks.
        loss = _loss(module(images), len(images))
        loss.backward()
        if args.norm:
            nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _engine(args: argparse.Namespace, world_size: int, rank: int, images: Tensor, stage: int) -> Callable[[], None]:
    from hpc.engine import Engine, EngineConfig
    from hpc.optimizers import OptimizerConfig, build_optimizer
    from hpc.topology import Topology

    module = _model(args.model)
    topology = Topology(rank, world_size, rank, world_size, 0, 1, "localhost", "bench", "127.0.0.1", 1)
    topology.export()
    config = EngineConfig(zero_stage=stage, device=args.device)  # type: ignore[arg-type]
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    module = module.to(device)
    optimizer = build_optimizer(module, OptimizerConfig(name="adamw", weight_decay=0.05), 1e-4)
    engine = Engine(module, optimizer, config, topology, device, len(images) * world_size)

    def step() -> None:
        engine.backward(_loss(engine.forward(images), len(images) * world_size))
        if args.norm:
            engine.gradient_norm()
        engine.step(1e-4)

    return step


def _rank(rank: int, world_size: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(args.threads)
    os.environ["DS_ACCELERATOR"] = args.device
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    images = torch.randn(args.batch, 1, args.size, args.size, generator=torch.Generator().manual_seed(rank))
    images = images.to(args.device)
    steps = {"ddp": _ddp(args, world_size, images)}
    for stage in args.stages:
        steps[f"zero{stage}"] = _engine(args, world_size, rank, images, stage)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(args.warmup + args.repeats):
        for name in order:
            dist.barrier()
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name]()
            if on_gpu:
                torch.cuda.synchronize()
            dist.barrier()
            if number >= args.warmup:
                taken[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    if rank == 0:
        Path(folder, "taken.json").write_text(json.dumps(taken))
    dist.destroy_process_group()


def measure(world_size: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each timed step of each variant, as rank 0 of ``world_size`` saw them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, args, folder), nprocs=world_size)
        return json.loads(Path(folder, "taken.json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    """Print a table, and one JSON object with the ratios last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="Timed steps of each variant.")
    parser.add_argument("--warmup", type=int, default=2, help="Steps before them.")
    parser.add_argument("--batch", type=int, default=16, help="Images a rank.")
    parser.add_argument("--size", type=int, default=64, help="Pixels along an edge.")
    parser.add_argument("--model", default="resnet50", help="timm's name of the trunk.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="Numbers of ranks.")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2], help="ZeRO stages.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="A GPU a rank, or threads.")
    parser.add_argument("--norm", action="store_true", help="All variants take the global gradient norm as well.")
    args = parser.parse_args()
    result: dict[str, object] = {}
    for world_size in args.ranks:
        taken = measure(world_size, args)
        base = statistics.median(taken["ddp"])
        for name, seconds in taken.items():
            median = statistics.median(seconds)
            limit = "" if name == "ddp" else f"  (limit {LIMITS[int(name[-1])]})"
            print(f"{world_size} ranks  {name:6s} {median * 1e3:8.1f} ms  {median / base:5.2f}x{limit}", flush=True)
            if name != "ddp":
                result[f"ranks{world_size}_{name}"] = round(median / base, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
