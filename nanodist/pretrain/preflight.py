"""Says before a run what would stop it later: the recipe against the data, the ranks, the disk, memory and time.

:func:`forecast` needs no ranks and is what ``nanodist doctor --recipe`` prints in front of the queue;
:func:`preflight` runs on all ranks at the start of a run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import hpc
import nanodist
from hpc import world_sizes
from hpc.checkpoint.retention import step_of
from hpc.collectives import Group, every
from hpc.environment import bf16_instructions
from hpc.errors import UserError
from hpc.preemption import deadline_from_environment
from hpc.preflight import (
    Exchange,
    Finding,
    agreement,
    all_reduce,
    errors,
    merged,
    shared_folder,
    size_text,
    storage,
)
from hpc.preflight_limits import end, fits, memory_of
from hpc.preflight_network import interface
from hpc.run_dir import RunDir, package_versions, read_metrics
from hpc.topology import Topology
from nanodist.pretrain.preflight_needs import Disk, Memory, Size, disk, memory, model_size
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.pretrain.seats import legal_world_sizes
from nanodist.shards.windows import Tiles

# How a run's memory is predicted: (recipe, size of the model, ranks, micro-batches). To be replaced by a planner.
Predictor = Callable[[PretrainRecipe, Size, int, int], Memory]


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a run; ``None`` where the recipe cannot run at all."""

    findings: list[Finding]
    size: Size | None = None
    memory: Memory | None = None
    disk: Disk | None = None
    steps_left: int = 0


def forecast(
    recipe: PretrainRecipe,
    store: Tiles | None,
    world_size: int,
    path: Path | None = None,
    seconds_left: float | None = None,
    images_per_s: float | None = None,
    predict: Predictor = memory,
) -> Forecast:
    """Everything that the recipe and the data tell, for ``world_size`` ranks.

    Args:
        recipe: what is to run.
        store: its data; ``None`` where it cannot be opened here, which the caller has said.
        world_size: ranks.
        path: the run directory, which need not exist.
        seconds_left: until the job ends; ``None``: no limit is known.
        images_per_s: of all ranks; ``None`` takes what an earlier start on as many ranks has logged.
        predict: of memory.
    """
    findings: list[Finding] = []
    if store is not None:
        findings += [*_samples(recipe, store), *_sizes(recipe, store)]
    ranks = _ranks(recipe, world_size)
    findings += ranks
    try:
        size = model_size(recipe)
    except UserError as error:
        return Forecast([*findings, Finding("error", str(error))])
    steps = recipe.train.total_steps(len(store)) if store is not None else recipe.train.steps or 0
    done = _steps_done(path)
    room = disk(recipe, size, max(steps, recipe.checkpoint.every_steps))
    findings.append(
        Finding(
            "ok",
            f"{recipe.encoder.trunk}: {size.parameters / 1e6:.1f} M weights with the projector; "
            f"{size_text(room.checkpoint)} a checkpoint; {steps} steps, {done} done",
        )
    )
    if size.unknown:
        findings.append(Finding("warning", f"activations cannot be counted ({size.unknown}); memory is more than told"))
    if path is not None:
        there = _bytes_in(path / "checkpoints")
        findings += storage(path, min(room.checkpoint, room.most), max(room.most - there, room.checkpoint), room.files)
    if steps:
        speed = images_per_s or _logged_speed(path, world_size)
        margin = recipe.guard.margin_s
        findings += end(max(steps - done, 0), recipe.train.global_batch_size, seconds_left, margin, speed)
    if errors(ranks):
        return Forecast(findings, size, None, room, steps - done)
    training = legal_world_sizes(recipe, world_size)[-1]
    need = predict(recipe, size, training, recipe.train.micro_batches(training))
    return Forecast(findings, size, need, room, steps - done)


def _samples(recipe: PretrainRecipe, store: Tiles) -> list[Finding]:
    batch, have = recipe.train.global_batch_size, len(store)
    where = f"{store.path} has {have} samples in {store.shard_count} shard{'s' if store.shard_count != 1 else ''}"
    if have < batch:
        return [Finding("error", f"{where}, fewer than train.global_batch_size={batch}; lower it")]
    if recipe.data.positives == "group" and have == len(store.group_names):
        what = "data.positives=group pairs tiles of one micrograph, and each has one tile only"
        return [Finding("error", f"{where}; {what}: pack with --tile, or use positives=image")]
    return [Finding("ok", f"{where}: {have / batch:.1f} batches of {batch} an epoch")]


def _sizes(recipe: PretrainRecipe, store: Tiles) -> list[Finding]:
    sizes = store.tile_sizes
    if len(sizes) > 1:
        few = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
        what = f"{store.path} has tiles of {len(sizes)} sizes ({few}), which make no batch; pack with --tile PX"
        return [Finding("error", what)]
    height, width = sizes[0]
    if recipe.views.size_px > 2 * min(height, width):
        what = f"views.size_px={recipe.views.size_px} is more than twice the tiles of {height} x {width}"
        return [Finding("warning", f"{what}: they are blown up, at the cost of every pixel")]
    return []


def _ranks(recipe: PretrainRecipe, world_size: int) -> list[Finding]:
    batch, group = recipe.train.global_batch_size, recipe.bn_group_size()
    legal = legal_world_sizes(recipe, world_size)
    if world_size in legal:
        local, parts = batch // world_size, recipe.train.micro_batches(world_size)
        passes = f" in {parts} micro-batches" if parts > 1 else ""
        return [Finding("ok", f"{world_size} ranks: {local} samples each{passes}, BatchNorm over {group}")]
    if legal and recipe.engine.surplus_ranks == "idle":
        idle = world_size - legal[-1]
        return [Finding("warning", f"{world_size} ranks are not legal: {legal[-1]} train and {idle} are idle")]
    try:
        parts = recipe.train.micro_batches(world_size)
        world_sizes.check_world_size(batch, group, world_size, parts)
    except UserError as error:
        return [Finding("error", str(error))]
    raise AssertionError("an illegal world size that nothing refuses")


def _steps_done(path: Path | None) -> int:
    if path is None:
        return 0
    return max((step_of(folder) or 0 for folder in (path / "checkpoints").glob("step-*")), default=0)


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue  # deleted meanwhile
    return total


def _logged_speed(path: Path | None, world_size: int) -> float | None:
    """Median of what the last start has logged, if it ran on as many ranks."""
    if path is None or not (path / "run.json").exists():
        return None
    try:
        run = RunDir(path)
        starts = run.record()["starts"]
        ranks = starts[-1]["topology"].get("world_size") if starts else None
        lines = [line["images_per_s"] for line in read_metrics(run.metrics_path)[-50:] if line.get("images_per_s")]
    except (UserError, KeyError, TypeError):
        return None
    return sorted(lines)[len(lines) // 2] if lines and ranks == world_size else None


@functools.cache
def code_hash() -> str:
    """Of the source that runs: two nodes with the same version may still have different checkouts."""
    digest = hashlib.blake2b(digest_size=6)
    for package in (hpc, nanodist):
        root = Path(next(iter(package.__path__)))
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def preflight(
    recipe: PretrainRecipe,
    store: Tiles,
    topology: Topology,
    path: Path,
    world: Group,
    device: torch.device,
    predict: Predictor = memory,
) -> list[Finding]:
    """All checks at the start of a run; collective, and the same list on all ranks.

    Args:
        recipe: what is to run.
        store: its data.
        topology: this rank.
        path: the run directory, which exists.
        world: group of all ranks; ``None`` for one process.
        device: of this rank.
        predict: of memory.
    """
    seen: Forecast | None = None
    if topology.is_main:
        deadline = deadline_from_environment()
        left = None if deadline is None else deadline - time.time()
        seen = forecast(recipe, store, topology.world_size, path, left, None, predict)
    told = every(seen, world)[0]
    assert told is not None
    own = list(told.findings)
    if told.memory is not None:
        own += fits(told.memory.states, told.memory.activations, *memory_of(device, topology))
    own += slow_precision(recipe, device)
    own += interface(topology, "nccl" if device.type == "cuda" else "gloo")
    own += shared_folder(path, world)
    own += agreement({**package_versions(), "code": code_hash()}, world, topology.host)
    said, exchange = all_reduce(world, device)
    own += said
    if exchange is not None and told.size is not None:
        own += gradients(told.size, exchange, topology.world_size)
    return merged(own, world, topology.host)


def slow_precision(recipe: PretrainRecipe, device: torch.device) -> list[Finding]:
    """A warning where the device has no instructions for the recipe's precision, which is kept all the same."""
    if recipe.train.precision != "bf16":
        return []
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else bf16_instructions()
    if fast:
        return []
    return [
        Finding(
            "warning",
            f"train.precision is bf16, for which this {'GPU' if device.type == 'cuda' else 'CPU'} has no instructions: "
            "the run is what it is elsewhere, and slow; train.precision=fp32 is faster here and another run",
        )
    ]


def gradients(size: Size, exchange: Exchange, world_size: int) -> list[Finding]:
    """How long the gradients of a step take over the network as it was measured."""
    seconds = exchange.seconds(size.parameters * 4, world_size)
    what = f"summing the gradients ({size_text(size.parameters * 4)}) takes about {1e3 * seconds:.0f} ms a step"
    return [Finding("warning" if seconds > 2 else "ok", what)]
