"""Split a table of labelled crops by micrograph: ``python -m tests.benchmarks.split_micrographs META.csv --out DIR``.

Writes ``train.csv`` and ``test.csv`` with the rows of META.csv; every class keeps at least one micrograph on each side.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

from hpc.seeding import permutation


def split(rows: list[dict[str, str]], share: float, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for training and for testing; ``share`` of the micrographs of each class are for testing."""
    micrographs: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["micrograph"] not in micrographs[row["label"]]:
            micrographs[row["label"]].append(row["micrograph"])
    held: set[str] = set()
    for label, names in sorted(micrographs.items()):
        count = min(max(1, round(share * len(names))), len(names) - 1)
        held.update(sorted(names)[i] for i in permutation(len(names), seed, "split", label)[:count])
    return [r for r in rows if r["micrograph"] not in held], [r for r in rows if r["micrograph"] in held]


def main() -> int:
    """Write both tables and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path, help="CSV with the columns file, label, micrograph.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for train.csv and test.csv.")
    parser.add_argument("--share", type=float, default=0.3, help="Share of micrographs that are held out.")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice.")
    options = parser.parse_args()
    with open(options.table, newline="") as file:
        rows = list(csv.DictReader(file))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "test"), split(rows, options.share, options.seed), strict=True):
        with open(options.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(part)
        print(f"{name}: {len(part)} crops of {len({r['micrograph'] for r in part})} micrographs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
