"""``python -m tests.e2e.pretraining_flaws --work FOLDER``: what flaws 1 to 4 of Lu et al. 2022 do to a pretraining.

The micrographs, the network and the sound probes of ``tests.e2e.label_efficiency`` (the same ``--work`` shares them and
its encoders). Encoders are pretrained by SimCLR and by Barlow Twins without a flaw, and with one each:

1. one draw of the views' parameters a batch (``views.drawn_for``);
2. a learning rate that has reached 0 after 1000 of 2600 steps, here the same share (``optimizer.decay_steps``);
3. SimCLR against samples of the other view alone (``objective.form``);
4. Barlow terms divided by D and by D (D - 1), with weight 0.005 (``objective.redundancy_weight``; AdamW does not see a
   factor on the whole loss).

Printed are balanced accuracies over labels per class, and each flawed encoder's paired difference from the encoder
without flaws. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.e2e.label_efficiency import BUDGETS, SOUND, encoders, probe, stores

# Of the recipe in tests.e2e.label_efficiency: columns of an embedding, and steps.
WIDTH, STEPS = 64, 195
BARLOW = "objective.name=barlow_twins"
# The encoder without a flaw comes first, as the others are compared with it.
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "simclr": {
        "simclr": (),
        "1 one draw a batch": ("views.drawn_for=batch",),
        "2 rate 0 after 38 %": (f"optimizer.decay_steps={round(STEPS * 1000 / 2600)}",),
        "3 cross-view alone": ("objective.form=cross_view",),
    },
    "barlow": {
        "barlow": (BARLOW,),
        "4 divided terms": (BARLOW, f"objective.redundancy_weight={0.005 / (WIDTH - 1)}"),
    },
}


def scored(work: Path, family: str, seeds: int) -> dict[str, Any]:
    """The scores of an encoder without flaws and of those with one each."""
    unlabelled, labelled = stores(work)
    runs = {}
    for name, changes in FAMILIES[family].items():
        folder = work / "flawed" / name.replace(" ", "-").replace("%", "percent") if changes else work / "runs"
        runs[name] = encoders(folder, unlabelled, range(seeds), changes)
    return probe(work, runs, labelled, f"pretraining-{family}-{seeds}", *SOUND, "--baselines", "none")


def report(scores: dict[str, Any]) -> None:
    """Print the table of one family: encoders, then differences."""
    budgets = BUDGETS.split(",")
    print("| | " + " | ".join(budgets) + " |\n|" + "---|" * (1 + len(budgets)))
    for rows, name, form in (
        (scores["summary"], "{encoder}", ".2f"),
        (scores["differences"], "{encoder} - {baseline}", "+.3f"),
    ):
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            if row["method"] == "linear":
                cell = f"{row['mean']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"
                lines.setdefault(name.format(**row), {})[str(row["labels_per_class"])] = cell
        for label, cells in lines.items():
            print(f"| {label} | " + " | ".join(cells[b] for b in budgets) + " |")


def main(argv: list[str] | None = None) -> int:
    """Pretrain what is missing, probe, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="Folder that is kept; what is there is not done again."
    )
    parser.add_argument("--seeds", type=int, default=3, help="Encoder seeds of each row (default 3).")
    args = parser.parse_args(argv)
    found = {}
    for family in FAMILIES:
        found[family] = scored(args.work.resolve(), family, args.seeds)
        report(found[family])
    print(json.dumps({name: {key: one[key] for key in ("summary", "differences")} for name, one in found.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
