"""What needs no Slurm: flipped bytes, and a checkpoint that goes on with another number of ranks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from hpc.checkpoint.files import LATEST
from hpc.run_dir import read_metrics
from tests.slurm.chaos_checks import Row
from tests.slurm.chaos_run import nanodist

# What tests/e2e/invariance.py allows; repeated here because it is a promise.
LOSS_LIMIT, UPDATE_LIMIT = 1e-6, 1e-4
SAVED, STEPS = 12, 13
WAYS = tuple((ranks, stage) for ranks in (1, 2, 3) for stage in (0, 1))


def bits(out: Path, seed: int) -> list[Row]:
    """Flip one byte in every file of the newest checkpoint in turn, and continue each time."""
    recipe = ("pretrain", "recipe.yaml", "data.store=store", "train.steps=6", "checkpoint.every_steps=2")
    nanodist(out, *recipe, "run_dir=bits", "checkpoint.keep=3")
    want = _curve(out / "bits")
    newest = out / "bits" / "checkpoints" / "step-00000004"
    draw, rows = random.Random(seed), []
    for name in [*sorted(path.name for path in newest.iterdir()), LATEST]:
        run = out / f"bits-{name}"
        shutil.copytree(out / "bits", run)
        shutil.rmtree(run / "checkpoints" / "step-00000006")
        (run / "checkpoints" / LATEST).write_text("step-00000004\n")
        file = run / "checkpoints" / (name if name == LATEST else f"step-00000004/{name}")
        place = _flip(file, draw)
        said = nanodist(out, *recipe, f"run_dir={run.name}", "checkpoint.keep=3")
        line = next((line for line in said.splitlines() if "continuing from" in line), "nothing was said")
        back = "step-00000004" if name == LATEST else "step-00000002"
        named = str(file.relative_to(out)) in line and line.endswith(f"continuing from {back}")
        good = named and _curve(run) == want
        rows.append(Row(f"byte {place} of {file.parent.name}/{name}: found, named, fallen back", line, good))
    return rows


def _flip(file: Path, draw: random.Random) -> int:
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return place


def _curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]


def elastic(out: Path) -> list[Row]:
    """One step after a checkpoint of 4 ranks with ZeRO 2, on other ranks and stages, against the same step there."""
    recipe = ("pretrain", "recipe.yaml", "data.store=store", f"train.steps={STEPS}", "checkpoint.every_steps=1")
    nanodist(out, *recipe, "run_dir=four", "checkpoint.keep=2", "engine.zero_stage=2", ranks=4)
    (topology,) = [start["topology"] for start in json.loads((out / "four" / "run.json").read_text())["starts"]]
    assert topology["world_size"] == 4
    loss, update = _last_step(out / "four")
    rows = []
    for ranks, stage in WAYS:
        run = out / f"four-{ranks}-{stage}"
        shutil.copytree(out / "four", run)
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
        (run / "checkpoints" / LATEST).write_text(f"step-{SAVED:08d}\n")
        nanodist(out, *recipe, f"run_dir={run.name}", "checkpoint.keep=2", f"engine.zero_stage={stage}", ranks=ranks)
        start = json.loads((run / "run.json").read_text())["starts"][-1]
        assert (start["first_step"], start["topology"]["world_size"]) == (STEPS, ranks)
        got, moved = _last_step(run)
        apart, bent = abs(got - loss) / abs(loss), float((moved - update).norm() / update.norm())
        text = f"loss apart by {apart:.1e}, update by {bent:.1e}"
        good = apart <= LOSS_LIMIT and bent <= UPDATE_LIMIT
        rows.append(Row(f"4 ranks, ZeRO 2 -> {ranks} ranks, ZeRO {stage}: the next step agrees", text, good))
    return rows


def _last_step(run: Path) -> tuple[float, torch.Tensor]:
    """Loss of the last step, and what it changed in all parameters and buffers, as one vector."""
    before, after = (load_file(run / "checkpoints" / f"step-{s:08d}" / "model.safetensors") for s in (SAVED, STEPS))
    names = sorted(name for name, tensor in after.items() if tensor.is_floating_point() and "running_" not in name)
    update = torch.cat([(after[name].double() - before[name].double()).flatten() for name in names])
    return _curve(run)[-1][1], update
