"""Which micrographs go into a store, with the label and the group that each carries."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc.errors import UserError
from nanodist.shards.calibration import Given, read_calibration
from nanodist.shards.masks import find_masks
from nanodist.shards.parts import Part, held_out
from nanodist.shards.sources import Source, read_values

UNLISTED = ("error", "keep", "skip")
Specs = str | Sequence[str] | None


@dataclass(frozen=True)
class Listed:
    """One file to pack, with what its samples carry, and a pixel size that takes the place of its own.

    With ``mask_label`` the label of each sample is what its part of the ``mask`` shows.
    """

    source: Source
    label: str | None
    group: str
    calibration: Given | None = None
    mask: Path | None = None
    mask_label: bool = False


@dataclass
class Listing:
    """The files to pack in their order, and the ones that a CSV leaves out, as ``{"source", "reason"}``."""

    files: list[Listed]
    dropped: list[dict[str, str]] = field(default_factory=list)


def list_files(
    found: Sequence[Source],
    labels: Specs,
    groups: Specs,
    unlisted: str,
    part: Part | None = None,
    calibration: Path | None = None,
    masks: Sequence[str] = (),
) -> Listing:
    """Give every source its label, group and mask, and keep those of ``part``; masks are no micrographs of their own.

    Args:
        found: all micrographs.
        labels: ``folder``, ``masks`` or ``FILE.csv:COLUMN``, or several of them, of which the first that says something
            about a file counts.
        groups: ``file``, ``folder`` or ``FILE.csv:COLUMN``, or several of them.
        unlisted: ``error``, ``keep`` (no label, a group of its own) or ``skip``.
        part: take only the groups to train on, or only those that are held out; ``None`` takes all.
        calibration: a CSV of pixel sizes that take the place of the files' own.
        masks: where masks are, see :func:`nanodist.shards.masks.find_masks`.

    Raises:
        UserError: tables that do not fit, or nothing left.
    """
    if unlisted not in UNLISTED:
        raise UserError(f"--unlisted is '{unlisted}'; it must be one of {', '.join(UNLISTED)}")
    labels, groups = specs_of(labels), specs_of(groups) or ("file",)
    by_mask = "masks" in labels
    if by_mask and not masks:
        raise UserError("--labels masks needs --masks, which says where they are")
    mask_of = find_masks(masks, found) if masks else {}
    taken = {os.path.realpath(mask) for mask in mask_of.values()}
    found = [source for source in found if os.path.realpath(source.path) not in taken]
    tables = [spec for spec in labels if spec != "masks"]
    label_of = _first_values(tables, found, "labels")
    group_of = _first_values(groups, found, "groups")
    missing = [
        source
        for source, label, group in zip(found, label_of, group_of, strict=True)
        if (tables and label is None and not (by_mask and source.path in mask_of)) or group is None
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
        Listed(source, label, group or source.name, size, mask_of.get(source.path), by_mask and source.path in mask_of)
        for source, label, group, size in zip(found, label_of, group_of, given, strict=True)
        if source.name not in names
    ]
    dropped = [{"source": name, "reason": "not listed in the CSV"} for name in sorted(names)]
    return Listing(files if part is None else of_part(files, part), dropped)


def specs_of(given: Specs) -> tuple[str, ...]:
    """One or several of what says labels or groups, as several."""
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _first_values(specs: Sequence[str], found: Sequence[Source], what: str) -> list[str | None]:
    """For each source what the first of ``specs`` that has a value for it says."""
    columns = [read_values(spec, found, what) for spec in specs]
    return [next((value for value in values if value is not None), None) for values in zip(*columns, strict=True)] or [
        None
    ] * len(found)


def of_part(files: Sequence[Listed], part: Part, group_of: Callable[[str], str] = str) -> list[Listed]:
    """The files of a part, where ``group_of`` says which group a file's own group is part of.

    Raises:
        UserError: a label with a single group.
    """
    groups = [group_of(file.group) for file in files]
    test = held_out([file.label for file in files], groups, part)
    return [file for file, group in zip(files, groups, strict=True) if (group in test) == (part.name == "test")]
