"""Two stores of one collection: groups to train on, and groups that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpc.errors import UserError
from hpc.seeding import permutation


@dataclass(frozen=True)
class Part:
    """Which part of the groups goes into a store.

    Attributes:
        name: ``"train"`` or ``"test"``; both together are everything, and share no group.
        test_share: share of each label's groups that are for testing, at least one, and never all.
        seed: of the choice.
    """

    name: Literal["train", "test"]
    test_share: float = 0.3
    seed: int = 0


def held_out(labels: Sequence[str | None], groups: Sequence[str], part: Part) -> set[str]:
    """The groups that are for testing: of each label, a keyed choice among its groups.

    A group of several labels counts for the first of them by name. The choice depends on names alone, not on order.

    Raises:
        UserError: a share outside (0, 1), or a label with a single group, which cannot be on both sides.
    """
    if not 0 < part.test_share < 1:
        raise UserError(f"the share of test groups is {part.test_share}; it must lie between 0 and 1")
    label_of: dict[str, str] = {}
    for label, group in zip(labels, groups, strict=True):
        label_of[group] = min(label_of.get(group, label or ""), label or "")
    test: set[str] = set()
    for label in sorted(set(label_of.values())):
        names = sorted(group for group, its in label_of.items() if its == label)
        if len(names) == 1:
            what = f"label '{label}'" if label else "the collection"
            raise UserError(f"{what} has the single group '{names[0]}', which cannot be on both sides of a split")
        count = min(max(1, round(part.test_share * len(names))), len(names) - 1)
        test.update(names[i] for i in permutation(len(names), part.seed, "split", label)[:count])
    return test
