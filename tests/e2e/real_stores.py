"""Pack the public micrographs that docs/results.md is measured on: what is trained on, and what no training sees.

Run: NANODIST_DATA=DIR python -m tests.e2e.real_stores OUT [--virus-seed N]. Of each set whole groups are held out
(movies of nanowires, papers that figures are from, micrographs of viruses, of which N chooses those; of consecutive
sections the last ones, behind a gap). OUT/pretrain holds tiles of all training parts and of two sets without a test;
the gold particles are in no pretraining but that of OUT/transmission: all TEM and STEM sets, less their tests.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc import atomic
from hpc.tables import csv_text
from nanodist.cli import main as nanodist
from nanodist.shards import Store
from nanodist.shards.parts import Part, held_out

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("NANODIST_DATA", ROOT.parent / "shared" / "data"))
Listed = dict[str, str]  # a file below DATA -> its group


def main(out: Path, virus_seed: int) -> None:
    """Make all stores in the new folder ``out``; ``virus_seed`` chooses the micrographs of viruses held out."""
    out.mkdir(parents=True)
    viruses = ["--labels", f"{DATA}/tem_virus/meta.csv:label", "--groups", f"{DATA}/tem_virus/meta.csv:micrograph"]
    for part in ("train", "test"):
        run(DATA / "tem_virus", out / f"virus-{part}", *viruses, "--part", part, "--part-seed", str(virus_seed))
    seen = {f"tem_virus/{sample.source}": sample.group for sample in Store.open(out / "virus-train").samples}
    for name, folder, masks, (train, test) in (
        ("wires", "tem_nanowire_seg", "images=masks", nanowires()),
        ("particles", "em_emps_particles", "images=segmaps", particles()),
        ("membranes", "sstem_membrane", "images=masks", membranes()),
    ):
        # A training batch wants one size; a test image of any size is predicted whole.
        tile = "512" if name == "particles" else "none"
        pack_listed(out, f"{name}-train", DATA / folder, train, "--masks", masks, "--tile", tile)
        pack_listed(out, f"{name}-test", DATA / folder, test, "--masks", masks, "--tile", "none")
        seen |= train
    for folder in ("stem_catalyst_np/images", "sem_nasa_superalloy_seg/images"):
        files = sorted(file for file in (DATA / folder).iterdir() if file.suffix in (".png", ".jpg", ".jpeg"))
        seen |= {file.relative_to(DATA).as_posix(): file.stem for file in files}
    for name, listed in (("pretrain", seen), ("transmission", transmission(seen))):
        pack_listed(out, name, DATA, listed, "--tile", "256", "--bars", "cut", "--exclude", "saxs2d/*")
    gold = DATA / "tem_au_nanoparticle_shape"
    table = f"{gold}/meta.csv"
    run(gold, out / "gold", "--labels", f"{table}:label", "--groups", f"{table}:sample", "--bars", "cut")


def transmission(seen: Listed) -> Listed:
    """All TEM and STEM sets, of which viruses are half: what ``pretrain`` holds of them, and two sets without a test.

    Of catalysts and gold, whose files are large, each fourth. Where tiles of one group count as views of one thing
    (``data.positives``), a movie or a paper is too wide a group: but for the viruses each file is its own.
    """
    catalysts = sorted(file for file in seen if file.startswith("stem_catalyst_np/"))
    gold, sections = (
        sorted(file.relative_to(DATA).as_posix() for file in (DATA / folder).rglob("*.png"))
        for folder in ("tem_au_nanoparticle_shape", "sstem_drosophila_vnc")
    )
    files = {file for file in seen if not file.startswith("sem_")} - {*catalysts}
    files |= {*catalysts[::4], *gold[::4], *sections}
    return {file: seen[file] if file.startswith("tem_virus/") else file for file in files}


def run(source: Path, store: Path, *options: str) -> None:
    """``nanodist pack``.

    Raises:
        SystemExit: it failed.
    """
    if nanodist(["pack", str(source), "--out", str(store), "--workers", "1", *options]):
        raise SystemExit(f"{store} was not packed")


def pack_listed(out: Path, name: str, source: Path, listed: Listed, *options: str) -> None:
    """Pack the files of a list, with their groups."""
    table = out / f"{name}.csv"
    atomic.write_text(table, csv_text(["file", "group"], sorted(listed.items())))
    run(source, out / name, "--groups", f"{table}:group", "--unlisted", "skip", "--skip-bad", *options)


def rows_of(folder: str) -> list[dict[str, str]]:
    """The rows of a set's ``meta.csv``."""
    with open(DATA / folder / "meta.csv", newline="") as file:
        return list(csv.DictReader(file))


def apart(rows: Iterable[tuple[str, str, str]], share: float = 0.3) -> tuple[Listed, Listed]:
    """Files with the unit that a split may not part and the group that a test counts by, as training and test."""
    every = [*rows]
    test = held_out([None] * len(every), [unit for _, unit, _ in every], Part("test", share))
    training = {file: unit for file, unit, _ in every if unit not in test}
    return training, {file: group for file, unit, group in every if unit in test}


def nanowires() -> tuple[Listed, Listed]:
    """Three of five movies are held out; intervals are over the scenes in them, which are clusters of alike frames."""
    folder = "tem_nanowire_seg"
    rows = (
        (f"{folder}/images/{row['name']}.png", row["session_by_eye"], f"{row['session_by_eye']}{row['group']}")
        for row in rows_of(folder)
    )
    return apart(rows, 0.6)


def particles() -> tuple[Listed, Listed]:
    """Whole papers are held out."""
    folder = "em_emps_particles"
    rows = [row for row in rows_of(folder) if row["in_curated"] == "1"]
    return apart((f"{folder}/images/{row['name']}.png", row["doi"], row["doi"]) for row in rows)


def membranes() -> tuple[Listed, Listed]:
    """The first 12 sections of a block of tissue; behind a gap of 2 the rest is the test."""
    folder = "sstem_membrane/images"
    files = sorted(file.name for file in (DATA / folder).iterdir())
    train, test = ({f"{folder}/{name}": Path(name).stem for name in part} for part in (files[:12], files[14:]))
    return train, test


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The folder to write, and the seed of the split of viruses.

    Raises:
        SystemExit: there is no folder, or the data are missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--virus-seed", type=int, default=0, metavar="N")
    options = parser.parse_args(given)
    if not (DATA / "tem_virus").is_dir():
        raise SystemExit(f"no real micrographs in {DATA}; NANODIST_DATA names their folder")
    return options


if __name__ == "__main__":
    options = arguments(sys.argv[1:])
    main(options.out, options.virus_seed)
