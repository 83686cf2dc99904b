"""Which micrographs go into a store, with the label and the group that each carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc.errors import UserError
from nanodist.shards.calibration import Given, read_calibration
from nanodist.shards.parts import Part, held_out
from nanodist.shards.sources import Source, read_values

UNLISTED = ("error", "keep", "skip")


@dataclass(frozen=True)
class Listed:
    """One file to pack, with what its samples carry, and a pixel size that takes the place of its own."""

    source: Source
    label: str | None
    group: str
    calibration: Given | None = None


@dataclass
class Listing:
    """The files to pack in their order, and the ones that a CSV leaves out, as ``{"source", "reason"}``."""

    files: list[Listed]
    dropped: list[dict[str, str]] = field(default_factory=list)


def list_files(
    found: Sequence[Source],
    labels: str | None,
    groups: str,
    unlisted: str,
    part: Part | None = None,
    calibration: Path | None = None,
) -> Listing:
    """Give every source its label and group, and keep those of ``part``.

    Args:
        found: all micrographs.
        labels: ``folder`` or ``FILE.csv:COLUMN``.
        groups: ``file``, ``folder`` or ``FILE.csv:COLUMN``.
        unlisted: ``error``, ``keep`` (no label, a group of its own) or ``skip``.
        part: take only the groups to train on, or only those that are held out; ``None`` takes all.
        calibration: a CSV of pixel sizes that take the place of the files' own.

    Raises:
        UserError: tables that do not fit, or nothing left.
    """
    if unlisted not in UNLISTED:
        raise UserError(f"--unlisted is '{unlisted}'; it must be one of {', '.join(UNLISTED)}")
    label_of = read_values(labels, found, "labels") if labels else [None] * len(found)
    group_of = read_values(groups, found, "groups")
    missing = [
        source
        for source, label, group in zip(found, label_of, group_of, strict=True)
        if (labels and label is None) or group is None
    ]
    if missing and unlisted == "error":
        raise UserError(
            f"{len(missing)} of {len(found)} micrographs (such as {missing[0].name}) have no row in the CSV of "
            "--labels or --groups: complete it, leave them out with --exclude, or say --unlisted keep or skip"
        )
    names = {source.name for source in missing} if unlisted == "skip" else set()
    if len(names) == len(found):
        raise UserError(f"none of the {len(found)} micrographs (such as {found[0].name}) is listed in the CSV")
    given = read_calibration(calibration, found) if calibration else [None] * len(found)
    files = [
        Listed(source, label, group or source.name, size)
        for source, label, group, size in zip(found, label_of, group_of, given, strict=True)
        if source.name not in names
    ]
    dropped = [{"source": name, "reason": "not listed in the CSV"} for name in sorted(names)]
    return Listing(_of_part(files, part), dropped)


def _of_part(files: list[Listed], part: Part | None) -> list[Listed]:
    if part is None:
        return files
    test = held_out([file.label for file in files], [file.group for file in files], part)
    return [file for file in files if (file.group in test) == (part.name == "test")]
