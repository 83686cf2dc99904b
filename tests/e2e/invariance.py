"""A run is a function of its recipe: ``python -m tests.e2e.invariance`` checks the contract and prints tables.

A reference on one rank trains 21 steps at the recipe's full learning rate with BatchNorm on and keeps its state at
steps 0, 5, 10 and 20. From each of these states, one step is taken again on 1, 2, 3 and 4 ranks, in 1 and 4
micro-batches, at ZeRO 0, 1 and 2, with 0 and 2 loader workers; sample ids, views, loss, gradient and parameter update
are compared with the reference's own step. BatchNorm goes over the whole batch of 48 where there is one micro-batch,
and over groups of 12 where there are four, so that groups span ranks either way; each has a reference of its own. With
``--device cuda`` the reference stays on the CPU and the rest runs on GPUs, one a rank. Two sabotages, a swapped sample
and BatchNorm per rank, have to be seen by the same comparison. Then whole curves: in fp64 they agree; in fp32, where
training amplifies rounding, they stay within three times of what merely permuting the samples inside the BatchNorm
groups does on one rank.
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
CURVE_LIMIT_FP64, PERMUTATION_FACTOR = 1e-6, 3.0
STATES = (0, 5, 10, 20)
OBJECTIVES = ("simclr", "barlow_twins", "vicreg")
SABOTAGES = ("none", "swapped_sample", "norm_per_rank")
WORLDS, MICRO_BATCHES, STAGES = (1, 2, 3, 4), (1, 4), (0, 1, 2)
# BatchNorm group by number of micro-batches: a group lies inside one micro-step, and suits 3 ranks as well as 4.
GROUPS = {1: 48, 4: 12}
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
    "train": {"steps": 21, "global_batch_size": 48},
    "optimizer": {"name": "sgd", "lr": 0.2, "weight_decay": 1e-4, "warmup_steps": 0},
    "engine": {"device": "cpu", "threads": 1},
}
# Learning rates at which each objective trains at full speed here.
RATES = {"simclr": 0.2, "barlow_twins": 0.05, "vicreg": 0.02}


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
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=1800)
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
    samples, views = _by_place(other)
    expected, pixels = _by_place(reference)
    return {
        "same_samples": samples == expected,
        "views": float(np.abs(views - pixels).max()),
        "loss": abs(float(got["loss"]) - float(want["loss"])) / abs(float(want["loss"])),
        "gradient": relative(joined(got, "gradient."), joined(want, "gradient.")),
        "update": relative(joined(got, "update."), joined(want, "update.")),
        "buffers": relative(joined(got, "buffer."), joined(want, "buffer.")),
    }


def _by_place(folder: Path) -> tuple[list[str], np.ndarray]:
    """Sample ids and views of the global batch, by their places in it."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("samples-*.json"))]
    views = np.concatenate([np.load(path) for path in sorted(folder.glob("views-*.npy"))], axis=1)
    places = np.concatenate([part["places"] for part in parts])
    keys = [key for part in parts for key in part["keys"]]
    order = np.argsort(places)
    assert places[order].tolist() == list(range(len(places)))
    return [keys[i] for i in order], views[:, order]


def holds(row: dict[str, object]) -> bool:
    """Whether a comparison keeps the contract."""
    return bool(row["same_samples"]) and all(float(str(row[name])) <= limit for name, limit in LIMITS.items())


def prepare(folder: Path, channels: tuple[int, ...] | None = None, device: str = "cpu") -> None:
    """The store and the recipe of all runs below ``folder``.

    Args:
        folder: where.
        channels: of the trunk's stages, or its own.
        device: of all runs but the reference.
    """
    if not (folder / "store").exists():
        make_store(folder)
    trunk = {"trunk_options": {"channels": list(channels)}} if channels else {}
    changed = {"encoder": {**RECIPE["encoder"], **trunk}, "engine": {**RECIPE["engine"], "device": device}}
    (folder / "recipe.json").write_text(json.dumps({**RECIPE, **changed}))


def check(
    folder: Path,
    objectives: tuple[str, ...] = OBJECTIVES,
    worlds: tuple[int, ...] = WORLDS,
    stages: tuple[int, ...] = STAGES,
    micro_batches: tuple[int, ...] = MICRO_BATCHES,
    at_one_stage: tuple[str, ...] = (),
    channels: tuple[int, ...] | None = None,
    device: str = "cpu",
) -> list[dict]:
    """Compare single steps below ``folder``; one row a comparison. Objectives ``at_one_stage`` take ZeRO 1 alone."""
    prepare(folder, channels, device)
    groups = [GROUPS[micro] for micro in micro_batches]
    lacking = [o for o in objectives if not all((folder / o / f"groups-{g}" / "losses.json").exists() for g in groups)]
    if lacking:
        launch(1, ["reference", str(folder), ",".join(lacking), ",".join(map(str, groups))])
    names = ",".join(f"{name}:1" if name in at_one_stage else name for name in objectives)
    for world in worlds:
        launch(world, ["steps", str(folder), names, ",".join(map(str, stages)), ",".join(map(str, micro_batches))])
    rows: list[dict] = []
    for objective in objectives:
        for case in sorted((folder / objective).glob("case-*")):
            _, world, micro, stage, workers, sabotage, state = case.name.split("-")
            base = folder / objective / f"groups-{GROUPS[int(micro)]}"
            losses = json.loads((base / "losses.json").read_text())
            rows.append(
                {
                    "objective": objective,
                    "ranks": int(world),
                    "micro": int(micro),
                    "zero": int(stage),
                    "workers": int(workers),
                    "sabotage": sabotage,
                    "step": int(state),
                    "fall": 1 - losses[-1] / losses[0],
                    **compare(base / f"reference-{state}", case),
                }
            )
    return rows


def curves(folder: Path, objectives: tuple[str, ...] = OBJECTIVES, worlds: tuple[int, ...] = WORLDS) -> list[dict]:
    """Compare 20-step curves with those of one rank, after :func:`prepare`; one row a comparison."""
    names = ",".join(objectives)
    for world in worlds:
        launch(world, ["curves", str(folder), names])
    rows = []
    for objective in objectives:
        for micro in MICRO_BATCHES:
            base = folder / objective / f"groups-{GROUPS[micro]}"
            one = {kind: _curve(base, kind, 1, 1) for kind in ("fp64", "fp32")}
            permuted = max(_apart(_curve(base, f"permuted{n}", 1, 1), one["fp32"]) for n in range(3))
            fall = 1 - one["fp64"][-1] / one["fp64"][0]
            for world in worlds:
                if (world, micro) == (1, 1):
                    continue
                wide, narrow = (_apart(_curve(base, kind, world, micro), one[kind]) for kind in ("fp64", "fp32"))
                good = wide <= CURVE_LIMIT_FP64 and narrow <= PERMUTATION_FACTOR * permuted
                row = {"objective": objective, "ranks": world, "micro": micro, "fp64": wide, "fp32": narrow}
                rows.append({**row, "permuted": permuted, "fall": fall, "good": good and fall >= 0.2})
    return rows


def _curve(folder: Path, kind: str, world: int, micro: int) -> list[float]:
    losses: list[float] = json.loads((folder / f"curve-{kind}-{world}-{micro}.json").read_text())
    return losses


def _apart(one: list[float], other: list[float]) -> float:
    """Largest relative distance of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def _print_steps(rows: list[dict]) -> int:
    """The table of single steps: for each line the worst of the states; returns how many are broken."""
    broken = 0
    form = "{:<13} {:<6} {:<6} {:<5} {:<8} {:<15} {:<7} {:<8} {:<8} {:<9} {:<8} {}"
    print(form.format("objective", "ranks", "micro", "zero", "workers", "sabotage", "ids", *LIMITS, "fall"))
    cases: dict[tuple, list[dict]] = {}
    for r in rows:
        cases.setdefault((r["objective"], r["ranks"], r["micro"], r["zero"], r["workers"], r["sabotage"]), []).append(r)
    for case, members in cases.items():
        good = all((holds(r) == (r["sabotage"] == "none")) and r["fall"] >= 0.2 for r in members)
        broken += not good
        ids = "same" if all(r["same_samples"] for r in members) else "differ"
        figures = [f"{max(r[name] for r in members):.1e}" for name in LIMITS]
        print(form.format(*case, ids, *figures, f"{members[0]['fall']:.0%}{'' if good else '  <- broken'}"))
    return broken


def _print_curves(rows: list[dict]) -> int:
    form = "{:<13} {:<6} {:<6} {:<9} {:<9} {:<16} {}"
    print(form.format("objective", "ranks", "micro", "fp64", "fp32", "fp32, permuted", "fall"))
    for r in rows:
        figures = (f"{r[name]:.1e}" for name in ("fp64", "fp32", "permuted"))
        end = f"{r['fall']:.0%}{'' if r['good'] else '  <- broken'}"
        print(form.format(r["objective"], r["ranks"], r["micro"], *figures, end))
    return sum(not r["good"] for r in rows)


def main() -> int:
    """Print the tables; exit code 1 where the contract does not hold or a sabotage is not seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="Some of: " + ", ".join(OBJECTIVES))
    parser.add_argument("--worlds", default=",".join(map(str, WORLDS)), help="Numbers of ranks; curves need 1, too")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="Of all but the single steps' reference"
    )
    parser.add_argument("--only", choices=("steps", "curves"), help="One of the two parts")
    options = parser.parse_args()
    objectives, worlds = tuple(options.objectives.split(",")), tuple(map(int, options.worlds.split(",")))
    rows: list[dict] = []
    drawn: list[dict] = []
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "curves":
            rows = check(folder, objectives, worlds, device=options.device)
            bad += _print_steps(rows)
        if options.only != "steps":
            prepare(folder, device=options.device)
            drawn = curves(folder, objectives, tuple(sorted({1, *worlds})))
            bad += _print_curves(drawn)
    print(json.dumps({"steps": len(rows), "curves": 2 * len(drawn), "broken": bad}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
