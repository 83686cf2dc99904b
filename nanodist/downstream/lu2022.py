"""The classification of Lu et al. 2022 as published, and the flaws of its scoring as switches.

S. Lu, B. Montz, T. Emrick and A. Jayaraman, *Digital Discovery* 1 (2022) 816: one softmax layer on frozen features,
Adam at 1e-3, batches of 4, at most 300 epochs, early stopping with a patience of 10 on the loss, the best epoch kept;
20 splits of 80 to 20, the labels of each drawn once. Two flaws lift the scores, and each can be had by itself, in this
protocol and in the sound one:

- ``choice-on-test``: the epoch (or, in the sound protocol, the setting) is chosen on the test samples;
- ``split-by-image``: samples are split and drawn one by one, so that crops or rotated copies of one micrograph are on
  both sides.

Without ``choice-on-test`` a fifth of the drawn labels, by micrograph, stops the training; where no class has a second
labelled micrograph, all 300 epochs are taken. Features are divided by their root mean square over the training samples
(one number), so that the published step size suits any trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import seeding
from hpc.errors import UserError
from nanodist.downstream.labels import Budget, Targets, hold_out, without
from nanodist.downstream.probe import CHOICE_ON_TEST, Draw, Outcome, Plan, Protocol

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SPLIT_BY_IMAGE = "split-by-image"
FLAWS = {
    CHOICE_ON_TEST: "the model is chosen on the test",
    SPLIT_BY_IMAGE: "images of one micrograph are on both sides of a split",
}
BATCH, EPOCHS, PATIENCE, RATE = 4, 300, 10, 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-7
VALIDATION_SHARE = 0.2


def parse_flaws(text: str | None, protocol: str) -> tuple[str, ...]:
    """The flaws named in ``text`` (``None``: all of them for lu2022, else none; ``"none"``: none), in their order.

    Raises:
        UserError: there is no such flaw.
    """
    if text is None:
        return tuple(FLAWS) if protocol == "lu2022" else ()
    named = [] if text == "none" else [part.strip() for part in text.split(",")]
    unknown = [name for name in named if name not in FLAWS]
    if unknown:
        raise UserError(f"--flaws: '{unknown[0]}' does not exist; allowed: {', '.join(FLAWS)} or none")
    return tuple(name for name in FLAWS if name in named)


def by_image(targets: Targets, keys: Sequence[str]) -> Targets:
    """Targets whose every sample is a group of its own, named by ``keys`` (n,), as ``split-by-image`` has it."""
    names, numbers = np.unique(np.asarray(keys, dtype=str), return_inverse=True)
    return Targets(targets.classes, targets.y, tuple(map(str, names)), numbers.astype(np.int64).reshape(-1))


@dataclass
class _Heads:
    """Softmax layers (runs, d + 1, classes) that are trained side by side, with Adam's moments."""

    weights: F32
    first: F32
    second: F32
    steps: I64

    def step(self, x: F32, target: F32, share: F32) -> None:
        """One step on batches x (runs, b, d + 1), one-hot target (runs, b, classes), weight share (runs, b).

        A run whose batch is empty stays as it is, so that no run depends on those beside it.
        """
        there = np.flatnonzero(share.any(axis=1))
        every: Any = slice(None) if len(there) == len(share) else there
        weights, first, second = self.weights[every], self.first[every], self.second[every]
        residual = (_softmax(x[every] @ weights) - target[every]) * share[every][..., None]
        slope = x[every].transpose(0, 2, 1) @ residual
        self.steps[every] += 1
        rate = RATE * np.sqrt(1 - BETAS[1] ** self.steps[every]) / (1 - BETAS[0] ** self.steps[every])
        # In place: these small arrays are passed over some 100 000 times.
        first *= np.float32(BETAS[0])
        first += np.float32(1 - BETAS[0]) * slope
        second *= np.float32(BETAS[1])
        slope *= slope
        slope *= np.float32(1 - BETAS[1])
        second += slope
        root = np.sqrt(second, out=slope)
        root += np.float32(EPSILON)
        moved = np.divide(first, root, out=root)
        moved *= rate.astype(np.float32)[:, None, None]
        weights -= moved
        if every is there:  # copies, not views
            self.weights[every], self.first[every], self.second[every] = weights, first, second

    def keep(self, which: npt.NDArray[np.bool_]) -> None:
        """Go on with some of the runs."""
        self.weights, self.first, self.second = self.weights[which], self.first[which], self.second[which]
        self.steps = self.steps[which]


def _softmax(logits: F32) -> F32:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), np.float32)


def fit_heads(
    rows: npt.NDArray[np.floating],
    y: I64,
    classes: int,
    trains: Sequence[I64],
    watches: Sequence[I64],
    seeds: Sequence[int],
) -> tuple[F32, I64]:
    """Train a softmax layer for each of ``trains``, stopping each on the loss of its ``watches``.

    Args:
        rows: features (n, d).
        y: classes (n,).
        classes: their number.
        trains: sample numbers of each run.
        watches: samples whose loss stops the run; none: the last epoch is taken.
        seeds: of each run's first weights and order.

    Returns:
        Weights (runs, d + 1, classes), the last row being the bias, and the epoch (runs,) that they are of.
    """
    x = np.concatenate([np.asarray(rows, np.float32), np.ones((len(rows), 1), np.float32)], axis=1)
    onehot = np.eye(classes, dtype=np.float32)[y]
    generators = [np.random.default_rng(seed) for seed in seeds]
    limit = np.sqrt(6.0 / (x.shape[1] - 1 + classes))
    start = np.stack([g.uniform(-limit, limit, (x.shape[1], classes)) for g in generators]).astype(np.float32)
    start[:, -1] = 0.0
    heads = _Heads(start.copy(), np.zeros_like(start), np.zeros_like(start), np.zeros(len(start), np.int64))
    best, epochs = start, np.zeros(len(trains), np.int64)
    least, going = np.full(len(trains), np.inf), np.arange(len(trains))
    for epoch in range(1, EPOCHS + 1):
        _epoch(heads, x, onehot, [generators[i].permutation(trains[i]) for i in going.tolist()])
        losses = np.array([_loss(x, onehot, w, watches[i]) for w, i in zip(heads.weights, going.tolist(), strict=True)])
        better = losses < least[going]
        least[going[better]], epochs[going[better]] = losses[better], epoch
        best[going[better]] = heads.weights[better]
        stay = np.array([not len(watches[i]) or epoch - epochs[i] < PATIENCE for i in going.tolist()])
        if not stay.all():
            heads.keep(stay)
            going = going[stay]
        if not len(going):
            break
    unwatched = [place for place, i in enumerate(going.tolist()) if not len(watches[i])]
    best[going[unwatched]], epochs[going[unwatched]] = heads.weights[unwatched], EPOCHS
    return best, epochs


def _epoch(heads: _Heads, x: F32, onehot: F32, orders: Sequence[I64]) -> None:
    """Batches of each run's samples in the order given; a run that has fewer waits."""
    most = max(len(order) for order in orders)
    padded = np.zeros((len(orders), most), np.int64)
    known = np.zeros((len(orders), most), np.float32)
    for row, order in enumerate(orders):
        padded[row, : len(order)], known[row, : len(order)] = order, 1.0
    for at in range(0, most, BATCH):
        batch, share = padded[:, at : at + BATCH], known[:, at : at + BATCH]
        heads.step(x[batch], onehot[batch], share / np.maximum(share.sum(axis=1, keepdims=True), 1.0))


def _loss(x: F32, onehot: F32, weights: F32, watch: I64) -> float:
    """Mean cross entropy of the watched samples; infinite without any."""
    if not len(watch):
        return np.inf
    likely = (_softmax(x[watch] @ weights) * onehot[watch]).sum(axis=1)
    return float(-np.log(np.maximum(likely, 1e-12)).mean())


def outcomes(
    features: npt.NDArray[np.floating], targets: Targets, plans: Sequence[Plan], protocol: Protocol
) -> list[tuple[Plan, Outcome]]:
    """Every budget and draw of every split; all splits of a budget are trained side by side."""
    asked = [(plan, draw) for plan in plans for draw in plan.draws]
    found: list[tuple[Plan, Outcome]] = []
    before: list[bytes] = []
    made: list[tuple[Plan, Outcome]] = []
    for budget in protocol.budgets:
        mine = [(plan, draw) for plan, draw in asked if draw.budget == budget]
        blank = [(plan, draw) for plan, draw in mine if draw.short and not protocol.cap]
        found += [(plan, Outcome("linear", draw, None)) for plan, draw in blank]
        full = [(plan, draw) for plan, draw in mine if not draw.short or protocol.cap]
        # A budget beyond what there is asks for the same labels as the one before it.
        labels = [draw.samples.tobytes() for _, draw in full]
        if full and labels == before:
            made = [(plan, replace(old, draw=draw)) for (plan, draw), (_, old) in zip(full, made, strict=True)]
        else:
            made = _of_budget(features, targets, full, protocol, budget) if full else []
        found, before = found + made, labels
    return found


def _of_budget(
    features: npt.NDArray[np.floating],
    targets: Targets,
    runs: Sequence[tuple[Plan, Draw]],
    protocol: Protocol,
    budget: Budget,
) -> list[tuple[Plan, Outcome]]:
    watches = [_watched(targets, plan, draw, protocol) for plan, draw in runs]
    trains = [draw.samples if CHOICE_ON_TEST in protocol.flaws else without(draw.samples, watch)
              for (_, draw), watch in zip(runs, watches, strict=True)]  # fmt: skip
    # One scale for all splits: a sample of the test cannot be told from its part in it.
    scale = max(float(np.sqrt(np.mean(np.square(features, dtype=np.float64)))), 1e-30)
    rows = np.asarray(features, np.float32) / np.float32(scale)
    seeds = [seeding.key(protocol.seed, "lu2022-head", plan.split.seed, draw.seed, str(budget)) for plan, draw in runs]
    weights, epochs = fit_heads(rows, targets.y, len(targets.classes), trains, watches, seeds)
    found = []
    for (plan, draw), head, epoch in zip(runs, weights, epochs, strict=True):
        logits = rows[plan.split.test] @ head[:-1] + head[-1]
        likely = _softmax(logits).max(axis=1).astype(np.float64)
        found.append((plan, Outcome("linear", draw, logits.argmax(axis=1), ("raw", float(epoch)), None, likely)))
    return found


def _watched(targets: Targets, plan: Plan, draw: Draw, protocol: Protocol) -> I64:
    if CHOICE_ON_TEST in protocol.flaws:
        return plan.split.test
    words = (plan.split.seed, draw.seed, str(draw.budget))
    return hold_out(targets, draw.samples, VALIDATION_SHARE, protocol.seed, "lu2022-validation", *words)
