"""How good frozen features are for classification with few labels: linear probe and kNN, as functions of arrays.

For each split by micrograph and each budget of labels per class:

1. Settings (feature transform with ``C`` of the logistic regression, or with ``k`` of the neighbours) are chosen on
   validation micrographs held out from the *training* micrographs, in several rounds with new validation micrographs
   and a new draw of labels each; the setting with the best mean balanced accuracy wins, the more regularised one in a
   tie. All labels of the validation micrographs are used for this choice, at every budget: a choice on so many labels
   is not free, and the number is reported.
2. The validation micrographs return to the training ones, labels are drawn from all of these, and the classifier is
   fitted with the chosen setting.
3. The test micrographs are predicted once.

Mean, variance and principal axes of the features are those of all training micrographs, labelled or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nanodist.downstream.labels import Budget, Targets, draw_order, first, hold_out, short_classes, without
from nanodist.downstream.linear import SoftmaxRegression
from nanodist.downstream.metrics import balanced_accuracy, confusion_matrix
from nanodist.downstream.neighbours import knn_predict, knn_predict_surely, unit_rows

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Setting = tuple[str, float]

METHODS = ("linear", "knn")
CHOICE_ON_TEST = "choice-on-test"
TRANSFORMS = ("standardised", "whitened")
CS = (0.1, 1.0, 10.0, 100.0, 1000.0)
KS = (1, 3, 5, 9, 15, 25)
WHITENING_FLOOR = 0.1
CLIP = 8.0
TUNING_TOLERANCE = 2e-4  # settings differ by factors of ten; their scores are settled long before the weights


@dataclass(frozen=True)
class Protocol:
    """What a probe does beside the features.

    Attributes:
        budgets: labels per class, ascending, and ``"all"``.
        seeds: number of label draws per budget.
        rounds: validation rounds a setting is chosen by.
        validation_share: share of the training micrographs of each class that a round holds out.
        cap: let a class that cannot fill a budget give what it has, in place of leaving the budget blank.
        seed: first word of every key.
        name: ``sound``, or ``lu2022`` (see :mod:`nanodist.downstream.lu2022`).
        flaws: what is done wrong on purpose, to see what it adds; ``choice-on-test`` chooses settings on the test.
    """

    budgets: tuple[Budget, ...]
    seeds: int = 5
    rounds: int = 3
    validation_share: float = 0.25
    cap: bool = False
    seed: int = 0
    name: str = "sound"
    flaws: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Sample numbers on the two sides of a split by micrograph; ``seed`` is its number."""

    seed: int
    train: I64
    test: I64


@dataclass(frozen=True)
class Draw:
    """Labels of one budget and seed: sample numbers, and the classes that could not fill the budget."""

    budget: Budget
    seed: int
    samples: I64
    short: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """Predictions of one method at one budget and draw.

    Attributes:
        predicted: (m,) classes of ``split.test``, or ``None`` where the budget was left blank.
        setting: transform, and C or k; of a fine-tuning what of the trunk was tuned, and nothing.
        validation_score: mean balanced accuracy of the setting in the validation rounds.
        confidence: (m,) probability of each predicted class; of neighbours the share of their votes.
    """

    method: str
    draw: Draw
    predicted: I64 | None
    setting: tuple[str, float | None] | None = None
    validation_score: float | None = None
    confidence: F64 | None = None


@dataclass(frozen=True)
class Round:
    """One validation round: held-out samples, and the order in which the rest give their labels."""

    validation: I64
    orders: list[I64]


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn for a split; the same for all encoders, so that they are compared on equal labels."""

    split: Split
    draws: list[Draw]
    rounds: list[Round]
    validation_samples: int = field(default=0)


def split_within(targets: Targets, share: float, seed: int, number: int) -> Split:
    """Split the micrographs of one set, ``share`` of each class's going to the test."""
    every = np.arange(len(targets.y))
    test = hold_out(targets, every, share, seed, "probe-test", number)
    return Split(number, without(every, test), test)


def leave_one_group_out(targets: Targets) -> list[Split]:
    """A split for each micrograph (or specimen), which is the test by itself, in the order of their names."""
    every = np.arange(len(targets.y))
    tests = (np.flatnonzero(targets.groups == group) for group in np.unique(targets.groups))
    return [Split(number, without(every, test), test) for number, test in enumerate(tests)]


def plan_split(targets: Targets, split: Split, protocol: Protocol) -> Plan:
    """Draw the labels and the validation rounds of a split."""
    draws = []
    for seed in range(protocol.seeds):
        orders = draw_order(targets, split.train, protocol.seed, split.seed, seed)
        for budget in protocol.budgets:
            if budget != "all" or seed == 0:
                short = short_classes(targets, orders, budget)
                draws.append(Draw(budget, seed, first(orders, budget), short))
    if CHOICE_ON_TEST in protocol.flaws:
        # The labels that are drawn, judged by the test itself.
        drawn = [draw_order(targets, split.train, protocol.seed, split.seed, seed) for seed in range(protocol.seeds)]
        return Plan(split, draws, [Round(split.test, orders) for orders in drawn], len(split.test))
    rounds = []
    for number in range(protocol.rounds):
        words = (split.seed, number)
        held = hold_out(targets, split.train, protocol.validation_share, protocol.seed, "probe-validation", *words)
        rest = without(split.train, held)
        if len(np.unique(targets.y[held])) < 2:
            continue  # it would choose what always answers its only class
        rounds.append(Round(held, draw_order(targets, rest, protocol.seed, "validation", *words)))
    used = np.unique(np.concatenate([r.validation for r in rounds])) if rounds else np.zeros(0, np.int64)
    return Plan(split, draws, rounds, len(used))


def feature_spaces(features: npt.NDArray[np.floating], train: I64) -> dict[str, F64]:
    """Each of ``TRANSFORMS`` of ``features`` (n, d), as (n, r) with r = min(d, number of training samples - 1).

    Standardised: every feature at mean 0 and variance 1 over ``train``, clipped at ``CLIP`` standard deviations.
    Whitened: the same, then principal components divided by their standard deviation, damped where that is below
    ``WHITENING_FLOOR`` of the mean variance. Both are scaled so that training rows have a mean square length of 1 and
    a value of ``C`` means the same for all encoders, and rotated to the principal axes of the training samples, which
    leaves out only what no training sample has a part in: the classifiers' answers do not change.
    """
    rows = np.asarray(features, np.float64)
    mean, spread = rows[train].mean(axis=0), rows[train].std(axis=0)
    alive = spread > 1e-7 * max(float(spread.max()), 1e-30)
    if not alive.any():  # a collapsed encoder gives all images one vector: its score is chance, not an error
        return {name: np.zeros((len(rows), 1)) for name in TRANSFORMS}
    rows = np.clip((rows[:, alive] - mean[alive]) / spread[alive], -CLIP, CLIP)
    centred = rows[train] - rows[train].mean(axis=0)
    axes, variances = _principal_axes(centred)
    coordinates = (rows - rows[train].mean(axis=0)) @ axes
    damped = np.sqrt(variances + WHITENING_FLOOR * variances.mean())
    return {"standardised": _unit_scale(coordinates, train), "whitened": _unit_scale(coordinates / damped, train)}


def _principal_axes(centred: F64) -> tuple[F64, F64]:
    n, d = centred.shape
    values, vectors = np.linalg.eigh(centred @ centred.T if n < d else centred.T @ centred)
    keep = values > max(float(values[-1]), 1e-300) * 1e-10
    values, vectors = values[keep], vectors[:, keep]
    return (centred.T @ vectors / np.sqrt(values) if n < d else vectors), values / n


def _unit_scale(rows: F64, train: I64) -> F64:
    return rows / np.sqrt(max(float((rows[train] ** 2).sum(axis=1).mean()), 1e-30))


class Prober:
    """The probe of one encoder's features on one split; see the module's text for the protocol."""

    def __init__(self, features: npt.NDArray[np.floating], targets: Targets, plan: Plan, protocol: Protocol) -> None:
        self._targets, self._plan, self._protocol = targets, plan, protocol
        self._spaces = feature_spaces(features, plan.split.train)
        self._units = {name: unit_rows(rows) for name, rows in self._spaces.items()}
        # Budgets beyond what there is ask for the same labels again, and those are the dearest.
        self._chosen: dict[tuple[str, bytes], tuple[Setting, float | None]] = {}
        self._predicted: dict[tuple[str, bytes, Setting], tuple[I64, F64]] = {}

    def outcomes(self, methods: Sequence[str] = METHODS) -> Iterator[Outcome]:
        """Every method at every budget and draw."""
        for method in methods:
            chosen: dict[Budget, tuple[Setting, float | None]] = {}
            for draw in self._plan.draws:
                if draw.short and not self._protocol.cap:
                    yield Outcome(method, draw, None)
                    continue
                if draw.budget not in chosen:
                    chosen[draw.budget] = self.choose(method, draw.budget)
                setting, score = chosen[draw.budget]
                key = (method, draw.samples.tobytes(), setting)
                if key not in self._predicted:
                    self._predicted[key] = self._answers(method, draw.samples, setting)
                predicted, confidence = self._predicted[key]
                yield Outcome(method, draw, predicted, setting, score, confidence)

    def _answers(self, method: str, samples: I64, setting: Setting) -> tuple[I64, F64]:
        """Classes of the test samples, and how probable each is."""
        test, (transform, parameter) = self._plan.split.test, setting
        y, classes = self._targets.y[samples], len(self._targets.classes)
        if method != "linear":
            rows = self._units[transform]
            k = min(int(parameter), len(samples))
            return knn_predict_surely(rows[test] @ rows[samples].T, y, classes, k)
        rows = self._spaces[transform]
        return SoftmaxRegression(rows[samples], y, classes).predict_surely(rows[test], parameter)

    def choose(self, method: str, budget: Budget) -> tuple[Setting, float | None]:
        """The best setting for a budget on the validation micrographs, and its mean balanced accuracy there.

        Where fewer than two classes have a micrograph to spare: standardised with C = 1 or k = 1, and ``None``.
        """
        rounds = self._plan.rounds
        if not rounds:
            return (TRANSFORMS[0], 1.0), None
        drawn = [first(r.orders, budget) for r in rounds]
        key = (method, b"|".join(samples.tobytes() for samples in drawn))
        if key not in self._chosen:
            self._chosen[key] = self._choose(method, drawn)
        return self._chosen[key]

    def _choose(self, method: str, drawn: Sequence[I64]) -> tuple[Setting, float]:
        """The best setting for the labels ``drawn`` in each validation round."""
        rounds, fewest = self._plan.rounds, min(len(samples) for samples in drawn)
        parameters: tuple[float, ...] = CS if method == "linear" else tuple(k for k in KS if k <= fewest)
        settings = [(transform, p) for p in parameters for transform in TRANSFORMS]
        if method == "knn":  # more neighbours are the stronger regularisation
            settings.reverse()
        scores = np.zeros(len(settings))
        for tuning, samples in zip(rounds, drawn, strict=True):
            truth = self._targets.y[tuning.validation]
            predicted = self._predict(method, samples, tuning.validation, settings, TUNING_TOLERANCE)
            scores += [balanced_accuracy(confusion_matrix(truth, p, len(self._targets.classes))) for p in predicted]
        best = int(np.argmax(np.round(scores, 9)))
        return settings[best], float(scores[best] / len(rounds))

    def _predict(
        self, method: str, samples: I64, asked: I64, settings: Sequence[Setting], tolerance: float = 1e-5
    ) -> I64:
        """Classes (len(settings), m) of the samples ``asked`` from the labels of ``samples``."""
        y, classes = self._targets.y[samples], len(self._targets.classes)
        out = np.zeros((len(settings), len(asked)), np.int64)
        for transform in sorted({name for name, _ in settings}):
            places = [i for i, (name, _) in enumerate(settings) if name == transform]
            values = [settings[i][1] for i in places]
            if method == "linear":
                rows = self._spaces[transform]
                out[places] = SoftmaxRegression(rows[samples], y, classes, tolerance).predict(rows[asked], values)
            else:
                rows = self._units[transform]
                ks = [min(int(k), len(samples)) for k in values]
                out[places] = knn_predict(rows[asked] @ rows[samples].T, y, classes, ks)
        return out
