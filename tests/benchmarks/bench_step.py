"""A whole training step of SimCLR (loader, views, engine) against the bare trunk on tensors that are ready.

``python -m tests.benchmarks.bench_step [--quick] [--profile fp32]``. A ResNet-50 at 64 px on one CPU thread and one
rank, on a packed store of 256 px tiles that is made for it, in the CPU setting of the shipped recipes (bf16 and
channels_last) and in float32; on a GPU with ``--device cuda --size-px 224 --batch 256``. A step takes its tiles from
the loader (decoded in the first epoch and kept in memory, as shipped; with ``--cache-mb 0`` read and decoded in every
step), makes two views of each, passes both, takes the loss of the whole batch, reduces the gradient and takes its norm,
steps AdamW and moves the running statistics: :func:`hpc.step.train_step` on what
:class:`nanodist.pretrain.task.PretrainTask` loads. The bare trunk is timm's, with torch's own BatchNorm, in the same
precision and memory layout: forward and backward of a sum over as many ready images, in one pass and without an
optimizer. All ways live in one process and take turns; ratios are of the medians in processor time, which other
processes disturb least, and in wall time beside it (which alone counts on a GPU). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from hpc.batch_norm import make_layout
from hpc.config import build
from hpc.engine import Engine, start
from hpc.optimizers import build_optimizer
from hpc.step import train_step
from hpc.topology import detect
from nanodist.encoders import create_trunk
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import Store
from nanodist.shards.pack import PackOptions, pack
from tests.benchmarks.bench_views import tiles_of

LIMIT, BF16_BAR = 1.10, 1.6
TILE, TRUNK = 256, "resnet50"
# Views, augmentation and optimizer as the shipped recipes for the CPU have them.
VIEWS: dict[str, Any] = {"crop_px": [179, 256], "exposure": "image", "gamma": 0.65, "contrast": 0.0}


def make_store(folder: Path, count: int) -> Path:
    """A packed store of ``count`` tiles of 256 px; returns its folder."""
    (folder / "images").mkdir()
    for number, tile in enumerate(tiles_of(count)):
        Image.fromarray(tile.numpy()).save(folder / "images" / f"m{number:04d}.png")
    pack([folder / "images"], folder / "store", PackOptions(tile=TILE))
    return folder / "store"


class Step:
    """Whole steps of a recipe, one after the other.

    Args:
        store: folder of the tiles.
        batch: samples a step.
        precision: ``fp32`` or ``bf16``.
        workers: threads that read ahead.
        cache_mb: memory for decoded tiles; 0 decodes every tile of every step.
        place: the device, and pixels along an edge of a view.
    """

    def __init__(
        self, store: Path, batch: int, precision: str, workers: int, cache_mb: int, place: tuple[str, int]
    ) -> None:
        values = {
            "data": {"store": str(store), "workers": workers, "cache_mb": cache_mb},
            "views": {**VIEWS, "size_px": place[1]},
            "encoder": {"trunk": TRUNK, "normalise": "image"},
            "projector": {"widths": [512, 128], "last_batch_norm": True},
            "train": {"steps": 1000, "global_batch_size": batch, "precision": precision},
            "engine": {"device": place[0], "threads": 1},
        }
        recipe = build(PretrainRecipe, values)
        topology = detect()
        device = torch.device(place[0], 0) if place[0] == "cuda" else torch.device("cpu")
        layout = make_layout(batch, recipe.bn_group_size(), 0, 1)
        self.task = PretrainTask(recipe, Store.open(store), topology, device, layout, None)
        optimizer = build_optimizer(self.task.module, recipe.optimizer, 1e-4)
        self.engine = Engine(self.task.module, optimizer, recipe.engine, topology, device, batch)
        self.batches = self.task.batches(0)

    def __call__(self) -> None:
        """One step."""
        result = train_step(self.task, self.engine, next(self.batches), 1e-4)
        if not result.taken:
            raise RuntimeError("the step was not taken")


class Bare:
    """Forward and backward of timm's trunk on ``count`` images that are ready.

    Args:
        count: images.
        precision: ``fp32`` or ``bf16`` (autocast).
        channels_last: memory layout of images and weights.
        place: the device, and pixels along an edge of an image.
    """

    def __init__(self, count: int, precision: str, channels_last: bool, place: tuple[str, int]) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device, size = place
        trunk = create_trunk(TRUNK, 0).train()
        self.trunk = trunk.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 1, size, size, generator=generator)
        self.images = images.to(self.device).contiguous(memory_format=layout)
        self.bf16 = precision == "bf16"

    def __call__(self) -> None:
        """One pass there and back."""
        self.trunk.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            features: Tensor = self.trunk(self.images)
        features.float().square().mean().backward()


def interleaved(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each in turn, after one pass for warming up: (processor time, wall time)."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(repeats + 1):
        for name in order:
            begun = time.process_time(), time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                taken[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
        order = order[1:] + order[:1]
    medians = {}
    for name, times in taken.items():
        processor, wall = (statistics.median(column) for column in zip(*times, strict=True))
        medians[name] = (processor, wall)
    return medians


def compare(store: Path, batch: int, repeats: int, options: argparse.Namespace) -> dict[str, Any]:
    """The ratios of whole steps to the bare trunk, and of the trunk's precisions."""
    precisions: list[str] = options.precisions
    place, on_gpu = (options.device, options.size_px), options.device == "cuda"
    ways: dict[str, Callable[[], None]] = {"fp32 plain trunk": Bare(2 * batch, "fp32", False, place)}
    for precision in precisions:
        ways[f"{precision} trunk"] = Bare(2 * batch, precision, True, place)
        ways[f"{precision} step"] = Step(store, batch, precision, options.workers, options.cache_mb, place)
    if "bf16" not in precisions:
        del ways["fp32 plain trunk"]
    medians = interleaved(ways, repeats)
    result: dict[str, Any] = {"batch": batch, "images": 2 * batch, "repeats": repeats, "device": options.device}
    result["size_px"] = options.size_px
    for name, (processor, wall) in medians.items():
        rate = 2 * batch / (wall if on_gpu else processor)
        print(f"{name:18s} {processor:7.3f} s of processor {wall:7.3f} s wall {rate:6.1f} images/s", flush=True)
        result[f"{name.replace(' ', '_')}_images_per_s"] = round(rate, 1)
    for precision in precisions:
        pairs = zip(medians[f"{precision} step"], medians[f"{precision} trunk"], strict=True)
        ratio, wall_ratio = (step / trunk for step, trunk in pairs)
        print(f"{precision}: whole step / bare trunk = {ratio:.3f} (limit {LIMIT}), wall {wall_ratio:.3f}")
        result[f"{precision}_step_ratio"], result[f"{precision}_step_ratio_wall"] = (
            round(ratio, 3),
            round(wall_ratio, 3),
        )
    if "fp32 plain trunk" not in medians:
        return result
    for kind, number in (("trunk", "fp32 plain trunk"), ("trunk_same_layout", "fp32 trunk")):
        if number not in medians:
            continue
        faster = [slow / fast for slow, fast in zip(medians[number], medians["bf16 trunk"], strict=True)]
        print(f"bf16 + channels_last against {number}: {faster[0]:.2f}x (bar {BF16_BAR}), wall {faster[1]:.2f}x")
        result[f"bf16_{kind}"], result[f"bf16_{kind}_wall"] = round(faster[0], 2), round(faster[1], 2)
    return result


def profile(store: Path, batch: int, precision: str, place: tuple[str, int]) -> None:
    """Print where the operators of one whole step spend their time, beside those of the bare trunk."""
    for name, way in (
        ("step", Step(store, batch, precision, 0, 2048, place)),
        ("trunk", Bare(2 * batch, precision, True, place)),
    ):
        for _ in range(3):
            way()
        with torch.profiler.profile() as found:
            way()
            if place[0] == "cuda":
                torch.cuda.synchronize()
        print(f"{precision} {name}")
        key = f"self_{place[0]}_time_total"
        print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def main() -> None:
    """Print a table, and the ratios as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Fewer images and repeats.")
    parser.add_argument("--batch", type=int, default=64, help="Samples a step; each gives two images.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds.")
    parser.add_argument("--workers", type=int, default=1, help="Threads that read ahead.")
    parser.add_argument(
        "--cache-mb", type=int, default=2048, help="Memory for decoded tiles, as shipped; 0 decodes each anew."
    )
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where all ways run.")
    parser.add_argument("--size-px", type=int, default=64, help="Pixels along an edge of a view.")
    parser.add_argument("--profile", choices=["fp32", "bf16"], help="Only show where the time goes.")
    options = parser.parse_args()
    batch, repeats = (16, 3) if options.quick else (options.batch, options.repeats)
    topology = detect()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), batch)
        recipe = build(PretrainRecipe, {"engine": {"device": options.device, "threads": 1}})
        start(recipe.engine, topology)
        try:
            if options.profile:
                profile(store, batch, options.profile, (options.device, options.size_px))
                return
            result = compare(store, batch, repeats, options)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
