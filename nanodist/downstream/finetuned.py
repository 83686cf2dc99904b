"""Finished fine-tunings as rows of a probe's table: supervised from scratch, or pretrained and fine-tuned.

A fine-tuning draws splits and labels as the probe does, so that its predictions stand for the same test samples from
the same labels, and are resampled with them. What it was trained on is held against the probe's draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from nanodist.downstream.features import Dataset, FeatureSet
from nanodist.downstream.finetune.data import PROTOCOL_SEED
from nanodist.downstream.finished_runs import Finished, find_runs, name_of, read_run
from nanodist.downstream.labels import Budget
from nanodist.downstream.probe import Draw, Outcome, Plan, Protocol
from nanodist.downstream.scores import FINETUNED, Scored

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Place = tuple[int, int, int]  # split, encoder seed, label draw


def finetuned_rows(paths: Iterable[Path], dataset: Dataset, plans: Sequence[Plan], protocol: Protocol) -> list[Scored]:
    """What the fine-tunings under ``paths`` (run directories, or folders of sweeps) answered.

    Raises:
        UserError: one is no finished classification, its test or labels are not among those of the probe, or
            replicates are missing.
    """
    if protocol.seed != PROTOCOL_SEED:
        raise UserError(f"--finetuned: fine-tunings draw splits and labels by seed {PROTOCOL_SEED}; leave --seed out")
    runs = [read_run(path) for path in find_runs(paths)]
    other = [run.path for run in runs if run.kind != "classification"]
    if other:
        raise UserError(f"--finetuned {other[0]}: it is a segmentation, which is not probed; see 'nanodist compare'")
    settings = dict.fromkeys(run.setting({}) for run in runs)
    several = len({encoder for encoder, weights, *_ in settings if weights != "random"}) > 1
    found = []
    for setting in settings:
        name = name_of(setting, several and setting[1] != "random")
        source = FeatureSet(name, "scratch" if setting[1] == "random" else "finetuned", 0, np.zeros((0, 0), np.float32))
        mine = [run for run in runs if run.setting({}) == setting]
        for budget in dict.fromkeys(run.budget for run in mine):
            placed = _placed([run for run in mine if run.budget == budget], name)
            for (split, seed, draw), run in placed.items():
                plan, drawn = _plan_of(run, plans, split, draw, budget)
                outcome = _outcome(run, dataset, plan, drawn)
                found.append(
                    Scored(replace(source, seed=seed), plan, outcome, False if setting[1] == "random" else None)
                )
    return found


def _placed(runs: Sequence[Finished], name: str) -> dict[Place, Finished]:
    """Split, encoder seed and label draw of the runs of one setting and budget, which fill a grid.

    The seed of a run is its encoder seed where all draws have the same ones, else a part of its draw. With all labels
    a draw only says which of them choose the step, and counts as such a seed.
    """
    of_draw: dict[int, set[int]] = {}
    for run in runs:
        of_draw.setdefault(run.replicate[1], set()).add(run.replicate[0])
    crossed = len({frozenset(seeds) for seeds in of_draw.values()}) == 1
    replicates = sorted({run.replicate for run in runs})
    found: dict[Place, Finished] = {}
    for run in runs:
        seed, draw = run.replicate
        at = (run.split, seed if crossed else 0, draw)
        if run.budget == "all":
            at = (run.split, replicates.index(run.replicate), 0)
        if at in found:
            raise UserError(f"--finetuned: {found[at].path} and {run.path} are the same replicate: give one of them")
        found[at] = run
    cells = 1
    for axis in zip(*found, strict=True):
        cells *= len(set(axis))
    if cells != len(found):
        raise UserError(
            f"--finetuned: of '{name}' with {runs[0].budget} labels a class, {len(found)} of {cells} combinations of "
            "split, draw and seed are done: run the rest, or leave some out"
        )
    return found


def _plan_of(run: Finished, plans: Sequence[Plan], split: int, draw: int, budget: Budget) -> tuple[Plan, Draw]:
    """The probe's split and draw that the run was of."""
    plan = next((p for p in plans if p.split.seed == split), None)
    if plan is None:
        known = f"0 to {len(plans) - 1}" if len(plans) > 1 else "0 alone"
        raise UserError(f"--finetuned {run.path}: it is of split {split}, and the probe has {known}; see --splits")
    drawn = next((d for d in plan.draws if (d.budget, d.seed) == (budget, draw)), None)
    if drawn is None:
        raise UserError(
            f"--finetuned {run.path}: it has {budget} labels a class of draw {draw}, which the probe has not; see "
            "--labels-per-class and --seeds"
        )
    used = int(run.what["n_train"]) + int(run.what.get("n_validation", 0))
    if used != len(drawn.samples):
        raise UserError(
            f"--finetuned {run.path}: it was trained on {used} labels, where the probe draws {len(drawn.samples)}: it "
            "is of another store"
        )
    return plan, drawn


def _outcome(run: Finished, dataset: Dataset, plan: Plan, draw: Draw) -> Outcome:
    """Its answers on the probe's test samples, in their order."""
    targets, test = dataset.targets, plan.split.test
    classes = {name: number for number, name in enumerate(targets.classes)}
    labels = {unit.key: unit.label for unit in run.units}
    wanted = {dataset.keys[i]: targets.classes[targets.y[i]] for i in test.tolist()}
    if labels != wanted:
        raise UserError(
            f"--finetuned {run.path}: it was tested on {len(labels)} samples, which are not the {len(wanted)} of the "
            f"probe's split {plan.split.seed}: give the same stores, and as --test-share its data.test_share"
        )
    said = dict(zip(labels, run.said, strict=True))
    try:
        predicted = np.asarray([classes[said[key][0]] for key in wanted], np.int64)
    except KeyError as error:
        raise UserError(f"--finetuned {run.path}: it names another class ({error})") from None
    confidence = np.asarray([said[key][1] for key in wanted], np.float64)
    return Outcome(FINETUNED, draw, predicted, (str(run.what["tuned"]), None), None, confidence)
