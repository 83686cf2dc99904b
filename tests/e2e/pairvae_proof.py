"""Both presets of PairVAE on synthetic pairs: train, evaluate on unseen specimens, and one table over seeds.

    python -m tests.e2e.pairvae_proof --store STORE --out RUNS [--seeds 0,1,2] [--ranks 2] [--factor 1] [--trunk RUN]
        [--device cuda] [key=value ...]

Runs go on where they were. The schedule is the published one cut down to what two CPU cores can do in minutes; what was
cut stands in :data:`SHORT`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

COMMON = ["data.size_px=96", "data.pixel_size_nm=3.0", "tracking.mode=disabled", "draws=8"]
SHORT = {
    "modern": [
        "model.width=16",
        "solo.epochs=16",
        "solo.draws=1",
        "pair.epochs=60",
        "pair.draws=1",
        "solo.picture_every_epochs=16",
        "pair.picture_every_epochs=20",
    ],
    "lu2023": [
        "model.sem_filters=16",
        "model.sem_kernel=7",
        "model.fixed_crop_from_epoch=4",
        "solo.epochs=30",
        "solo.saxs_epochs=20",
        "pair.epochs=40",
    ],
}
SHOWN = {
    "SAXS to SEM": ["period_error", "orientation_error_deg", "s2_error", "chord_error", "scattering_mismatch"],
    "SEM to SAXS": ["saxs_mae", "iq_error", "q_star_error", "width_error", "orientation_error_deg", "anisotropy_error"],
}


def stretched(settings: list[str], factor: float) -> list[str]:
    """The settings, with ``factor`` times the epochs of both stages."""
    found = []
    for word in settings:
        key, value = word.split("=", 1)
        epochs = key.endswith(("epochs", "from_epoch")) and "picture" not in key
        found.append(f"{key}={round(int(value) * factor)}" if epochs else word)
    return found


def train(preset: str, seed: int, run: Path, options: argparse.Namespace) -> None:
    """Both stages of a preset, to their ends."""
    trunk, ranks = options.trunk, options.ranks
    encoder = [f"model.encoder={trunk}", "model.encoder_weights=given"] if preset == "lu2023" and trunk else []
    if preset == "lu2023" and not trunk:
        encoder = ["model.encoder=timm:resnet18", "model.trunk_options={channels: [16, 32, 64, 128]}"]
    what = [
        preset,
        f"data.store={options.store}",
        f"run_dir={run}",
        f"seed={seed}",
        *COMMON,
        f"engine.device={options.device}",
        *stretched(SHORT[preset], options.factor),
        *encoder,
        *options.settings,
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    subprocess.run([sys.executable, *launcher, "-m", "nanodist", "pairvae", "train", *what], check=True)


def scores(run: Path, store: str) -> dict[tuple[str, str, str], tuple[float, int]]:
    """Medians of an evaluation: (direction, method, score) -> (median, items)."""
    out = run / "evaluation"
    if not (out / "scores.json").is_file():
        command = ["-m", "nanodist", "pairvae", "evaluate", str(run), "--store", store, "--out", str(out)]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((out / "scores.json").read_text())["rows"]
    return {(r["direction"], r["method"], r["score"]): (r["median"], r["items"]) for r in rows}


def table(found: dict[str, list[dict[tuple[str, str, str], tuple[float, int]]]]) -> str:
    """Markdown: means over seeds of medians over items, with the lowest and the highest seed."""
    lines = []
    for direction, names in SHOWN.items():
        lines += ["", f"| {direction} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for preset, runs in found.items():
            for method in dict.fromkeys(key[1] for key in runs[0] if key[0] == direction):
                learned = "VAE" in method
                if not learned and preset != next(iter(found)):
                    continue
                cells = []
                for name in names:
                    values = [run[direction, method, name][0] for run in runs if (direction, method, name) in run]
                    spread = f" ({min(values):.2g} to {max(values):.2g})" if len(values) > 1 and learned else ""
                    cells.append(f"{np.mean(values):.3g}{spread}" if values else "-")
                lines.append(f"| {f'{preset}: ' if learned else ''}{method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", default="modern,lu2023")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--factor", type=float, default=1.0, help="Times the epochs of the short schedule.")
    parser.add_argument("--trunk", default="", help="Of lu2023: a run of nanodist pretrain; empty: random weights.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Of the training.")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="Of the recipe, over the short schedule.")
    options = parser.parse_args()
    found: dict[str, list[dict[tuple[str, str, str], tuple[float, int]]]] = {}
    for seed in (int(word) for word in options.seeds.split(",")):
        for preset in options.presets.split(","):
            run = options.out / f"{preset}-{seed}"
            train(preset, seed, run, options)
            found.setdefault(preset, []).append(scores(run, options.store))
    print(table(found))
    best = {
        preset: [run["SAXS to SEM", "PairVAE", "period_error"][0] for run in runs] for preset, runs in found.items()
    }
    near = next(iter(found.values()))[0]["SAXS to SEM", "nearest neighbour", "period_error"][0]
    print(json.dumps({"period_error": best, "nearest_neighbour": near, "seeds": options.seeds}))


if __name__ == "__main__":
    main()
