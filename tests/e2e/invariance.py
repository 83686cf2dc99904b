"""One rank and two ranks are the same run: ``python -m tests.e2e.invariance`` checks the contract and prints a table.

A reference on one rank trains 20 steps at the recipe's full learning rate with BatchNorm on and keeps its state at
steps 0, 5, 10 and 20. From each of these states, one step is taken again on two ranks, at every ZeRO stage; sample
ids, views, loss, gradient and parameter update are compared with the reference's own step. Two sabotages, a swapped
sample and BatchNorm per rank, have to be seen by the same comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

LIMITS = {"views": 1e-4, "loss": 1e-6, "gradient": 1e-5, "update": 1e-4}
STATES = (0, 5, 10, 20)
OBJECTIVES = ("simclr", "barlow_twins")
SABOTAGES = ("none", "swapped_sample", "norm_per_rank")
RECIPE = {
    "views": {
        "size_px": 48,
        "crop_px": [72, 96],
        "exposure": "image",
        "contrast": 0.1,
        "brightness": 0.05,
        "gamma": 0.1,
        "blur_probability": 0.3,
        "noise_probability": 0.3,
    },
    "encoder": {"trunk": "resnet10t", "normalise": "image"},
    "projector": {"widths": [128, 64]},
    "train": {"steps": 21, "global_batch_size": 32, "bn_group_size": 32},
    "optimizer": {"name": "sgd", "lr": 0.2, "weight_decay": 1e-4, "warmup_steps": 0},
    "engine": {"device": "cpu", "threads": 1},
}


def make_store(path: Path) -> None:
    """Sixty-four synthetic micrographs of 96 px, packed."""
    from nanodist.shards import PackOptions, pack
    from nanodist.synth import MORPHOLOGIES, Settings, write_dataset

    write_dataset(path / "synth", 1, 16, MORPHOLOGIES, Settings(size_px=96))
    pack([path / "synth" / "images"], path / "store", PackOptions(tile=96), labels="folder")


def launch(world_size: int, arguments: list[str]) -> None:
    """Run the worker on ``world_size`` ranks; its output is shown where it fails."""
    here = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-m"]
    if world_size > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size), "-m"]
    command += ["tests.e2e.invariance_worker", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def joined(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """All tensors below ``prefix`` as one vector, by name."""
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors) if name.startswith(prefix)])


def compare(reference: Path, other: Path) -> dict[str, object]:
    """How far one step of ``other`` (all its ranks) is from that of ``reference`` (one rank)."""
    want, got = load_file(reference / "step.safetensors"), load_file(other / "step.safetensors")
    seen = [json.loads(p.read_text()) for p in sorted(other.glob("samples-*.json"))]
    expected = json.loads((reference / "samples-0.json").read_text())
    parts = [np.load(p) for p in sorted(other.glob("views-*.npy"))]
    views = np.concatenate(parts, axis=1)
    return {
        "same_samples": [key for part in seen for key in part] == expected,
        "views": float(np.abs(views - np.load(reference / "views-0.npy")).max()),
        "loss": abs(float(got["loss"]) - float(want["loss"])) / abs(float(want["loss"])),
        "gradient": relative(joined(got, "gradient."), joined(want, "gradient.")),
        "update": relative(joined(got, "update."), joined(want, "update.")),
        "buffers": relative(joined(got, "buffer."), joined(want, "buffer.")),
    }


def holds(row: dict[str, object]) -> bool:
    """Whether a comparison keeps the contract."""
    return bool(row["same_samples"]) and all(float(str(row[name])) <= limit for name, limit in LIMITS.items())


def check(folder: Path, objectives: tuple[str, ...] = OBJECTIVES, stages: tuple[int, ...] = (0, 1, 2)) -> list[dict]:
    """Run everything below ``folder`` and return one row a comparison."""
    if not (folder / "store").exists():
        make_store(folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    names = ",".join(objectives)
    launch(1, ["reference", str(folder), names])
    launch(2, ["steps", str(folder), names, ",".join(map(str, stages))])
    rows: list[dict] = []
    for objective in objectives:
        losses = json.loads((folder / objective / "losses.json").read_text())
        for case in sorted((folder / objective).glob("case-*")):
            _, stage, sabotage, state = case.name.split("-")
            row = compare(folder / objective / f"reference-{state}", case)
            fall = 1 - losses[-1] / losses[0]
            rows.append(
                {
                    "objective": objective,
                    "zero": int(stage),
                    "sabotage": sabotage,
                    "step": int(state),
                    "fall": fall,
                    **row,
                }
            )
    return rows


def main() -> int:
    """Print the table; exit code 1 where the contract does not hold or a sabotage is not seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = check(Path(folder))
    bad = 0
    form = "{:<13} {:<5} {:<15} {:<5} {:<7} {:<8} {:<8} {:<9} {:<8} {}"
    print(form.format("objective", "zero", "sabotage", "step", "ids", *LIMITS, "fall"))
    for r in rows:
        good = (holds(r) == (r["sabotage"] == "none")) and r["fall"] >= 0.2
        bad += not good
        ids = "same" if r["same_samples"] else "differ"
        figures = [f"{r[name]:.1e}" for name in LIMITS]
        fall = f"{r['fall']:.0%}{'' if good else '  <- broken'}"
        print(form.format(r["objective"], r["zero"], r["sabotage"], r["step"], ids, *figures, fall))
    print(json.dumps({"comparisons": len(rows), "broken": bad}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
