"""Which checkpoints stay: the last few, one every so many steps, and the best."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Retention:
    """What stays when a new checkpoint is written.

    Attributes:
        last: how many of the newest; at least the new one stays.
        every_steps: checkpoints at multiples of this many steps stay for good; 0: none do for that reason.
        best: how many of those with the lowest score stay.
    """

    last: int = 2
    every_steps: int = 0
    best: int = 0


def step_of(folder: Path) -> int | None:
    """``1200`` for ``.../step-00001200``; ``None`` for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def surplus(
    folders: Iterable[Path],
    newest: Path,
    retention: Retention,
    whole: Callable[[Path], bool],
    score: Callable[[Path], float | None],
) -> list[Path]:
    """The checkpoints older than ``newest`` that need not stay; those after it are never among them.

    A broken checkpoint takes nobody's place: with ``last=2``, two whole ones stay.

    Args:
        folders: checkpoints, in any order; other names are passed over.
        newest: the one that was just written, known to be whole.
        retention: the rule.
        whole: whether a checkpoint's hashes agree; asked only where the answer matters, as it reads all files.
        score: what a checkpoint was ranked by, lower being better; ``None``: it has no rank.
    """
    present = step_of(newest)
    found = {step: folder for folder in folders if (step := step_of(folder)) is not None}
    steps = sorted((step for step in found if present is None or step <= present), reverse=True)
    kept = {newest}
    for step in steps:
        if len(kept) >= retention.last:
            break
        if found[step] not in kept and whole(found[step]):
            kept.add(found[step])
    if retention.every_steps > 0:
        kept |= {found[step] for step in steps if step % retention.every_steps == 0}
    if retention.best > 0:
        kept |= best_of([found[step] for step in steps], retention.best, whole, score)
    return [found[step] for step in steps if found[step] not in kept]


def best_of(
    folders: list[Path], count: int, whole: Callable[[Path], bool], score: Callable[[Path], float | None]
) -> set[Path]:
    """Of ``folders``, from new to old, the ``count`` whole ones of the lowest score; the newer of two equal ones."""
    scores = {folder: value for folder in folders if (value := score(folder)) is not None}
    chosen: set[Path] = set()
    for folder in sorted(scores, key=lambda folder: scores[folder]):
        if len(chosen) == count:
            break
        if whole(folder):
            chosen.add(folder)
    return chosen
