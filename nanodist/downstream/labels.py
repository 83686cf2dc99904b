"""Which samples are labelled for training, for validation and for the test: no micrograph is on two sides.

Crops of one micrograph look alike, so a split that parts a micrograph measures memory. Everything here is keyed by
seeds and names, never by the machine or by what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hpc import seeding
from hpc.errors import UserError

I64 = npt.NDArray[np.int64]
Budget = int | Literal["all"]


@dataclass(frozen=True)
class Targets:
    """Labels and micrographs of n samples as numbers.

    Attributes:
        classes: names of the classes, sorted; ``y`` (n,) numbers them.
        group_names: names of the groups (micrographs), sorted; ``groups`` (n,) numbers them.
    """

    classes: tuple[str, ...]
    y: I64
    group_names: tuple[str, ...]
    groups: I64

    def groups_of(self, label: int, among: I64) -> I64:
        """Groups with a sample of class ``label`` among the samples ``among``, in ascending order."""
        return np.unique(self.groups[among[self.y[among] == label]])


def encode(labels: Sequence[str], groups: Sequence[str]) -> Targets:
    """Number the classes and groups of n labelled samples."""
    classes, y = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    names, numbers = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return Targets(
        tuple(map(str, classes)), y.astype(np.int64), tuple(map(str, names)), numbers.astype(np.int64).reshape(-1)
    )


def hold_out(targets: Targets, among: I64, share: float, seed: int, purpose: str, *words: int | str) -> I64:
    """The samples of ``among`` whose groups are held out: about ``share`` of the groups of each class.

    Of a class with g groups, ``share`` x g are taken, rounded, at least 1 and at most g - 1; of a class with one group
    none. Classes with fewer groups choose first. Where a group has several classes it counts for each of them, and is
    not taken if a class would keep none.
    """
    classes = range(len(targets.classes))
    having = {c: set(targets.groups_of(c, among).tolist()) for c in classes}
    taken: set[int] = set()
    for c in sorted(classes, key=lambda c: (len(having[c]), c)):
        groups = sorted(having[c])
        wanted = min(max(1, round(share * len(groups))), len(groups) - 1)
        order = seeding.permutation(len(groups), seed, purpose, targets.classes[c], *words)
        for group in (groups[i] for i in order):
            if len(taken & having[c]) >= wanted:
                break
            if group not in taken and all(having[o] - taken - {group} for o in classes if group in having[o]):
                taken.add(group)
    return among[np.isin(targets.groups[among], np.asarray(sorted(taken), np.int64))]


def without(among: I64, removed: I64) -> I64:
    """The samples of ``among`` that are not in ``removed``."""
    return among[~np.isin(among, removed)]


def draw_order(targets: Targets, among: I64, seed: int, *words: int | str) -> list[I64]:
    """For each class its samples of ``among`` in the order in which labels are asked for.

    Micrographs take turns (in a keyed order), so that k labels come from as many micrographs as possible, and the
    first k are part of the first k + 1: budgets are nested.
    """
    orders = []
    for c, name in enumerate(targets.classes):
        mine = among[targets.y[among] == c]
        groups = targets.groups_of(c, among)
        turns = seeding.permutation(len(groups), seed, "probe-turns", name, *words)
        ranked: list[tuple[int, int, int]] = []
        for turn, group in enumerate(groups[turns]):
            samples = mine[targets.groups[mine] == group]
            shuffled = seeding.permutation(len(samples), seed, "probe-draw", name, targets.group_names[group], *words)
            ranked += [(round_, turn, int(i)) for round_, i in enumerate(samples[shuffled])]
        orders.append(np.asarray([i for _, _, i in sorted(ranked)], np.int64))
    return orders


def first(orders: Sequence[I64], budget: Budget) -> I64:
    """The first ``budget`` samples of each class (all that there are, for ``"all"`` or a short class), sorted."""
    chosen = [order if budget == "all" else order[:budget] for order in orders]
    return np.sort(np.concatenate(chosen))


def short_classes(targets: Targets, orders: Sequence[I64], budget: Budget) -> dict[str, int]:
    """Classes that cannot fill ``budget``, with the number of labels that they have."""
    if budget == "all":
        return {}
    return {name: len(order) for name, order in zip(targets.classes, orders, strict=True) if len(order) < budget}


def parse_budgets(text: str) -> list[Budget]:
    """``"1,8,80"`` as ascending numbers, followed by ``"all"``.

    Raises:
        UserError: something is not a whole number above 0.
    """
    budgets: set[int] = set()
    for part in (p.strip() for p in text.split(",")):
        if part == "all":
            continue
        if not part.isdecimal() or int(part) < 1:
            raise UserError(f"--labels-per-class {text!r}: {part!r} is not a whole number above 0; write 1,2,4,8")
        budgets.add(int(part))
    return [*sorted(budgets), "all"]


def check_splittable(targets: Targets, among: I64, what: str) -> None:
    """Refuse labels that cannot be split by micrograph.

    Raises:
        UserError: fewer than two classes, or a class with a single micrograph; names it.
    """
    if len(np.unique(targets.y[among])) < 2:
        raise UserError(f"{what} has one class only ('{targets.classes[targets.y[among][0]]}'); a probe needs two")
    lone = [name for c, name in enumerate(targets.classes) if len(targets.groups_of(c, among)) == 1]
    if lone:
        named = ", ".join(f"'{name}'" for name in lone)
        raise UserError(
            f"{what}: class {named} has one micrograph only, so it cannot be on both sides of a split; add "
            "micrographs, leave the class out, or give --test-store"
        )
