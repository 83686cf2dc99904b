"""What ``nanodist probe`` leaves: scores.json, scores.csv, summary.csv, embedding.npz, and its table as text."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from hpc import atomic

if TYPE_CHECKING:
    from nanodist.downstream.features import Dataset
    from nanodist.downstream.probe import Plan, Protocol
    from nanodist.downstream.scores import Scored

LEAVE_ONE_OUT = "leave-one-group-out"
NOTES = (
    "Settings are chosen on all labels of validation micrographs taken from the training ones (validation_samples); "
    "these labels are used at every budget beside the labels drawn.",
    "Intervals are bootstraps over test micrographs within classes (one draw for all splits, which test the same ones "
    "again), encoder seeds, label draws and splits that overlap. A class with one test micrograph adds no spread.",
    "macro_f1, accuracy and calibration_error are means over splits, seeds and draws (folds are put together first), "
    "on the same resamples; intervals of the calibration error are moved down by the excess that resampling adds.",
    "Feature means, variances and principal axes are those of all training images, labelled or not.",
    "parameter: C of the logistic regression (features scaled to a mean square length of 1), or k of the neighbours.",
)


def write(
    args: argparse.Namespace, dataset: Dataset, plans: Sequence[Plan], protocol: Protocol, scored: Sequence[Scored]
) -> str:
    """Write scores.json, scores.csv, summary.csv and embedding.npz; the table as text."""
    import numpy as np

    from nanodist.downstream import lu2022, scores
    from nanodist.downstream.features import write_npz

    targets, folds = dataset.targets, args.split == LEAVE_ONE_OUT
    tested = np.unique(np.concatenate([plan.split.test for plan in plans]))
    comparison = scores.Comparison(scored, targets, protocol, args.resamples, args.level)
    summary = comparison.summary()
    rows = [scores.tidy_row(one, targets) for one in scored]
    document = {
        "schema": 1,
        "store": {"name": dataset.parts[0].store.path.name, "manifest_hash": dataset.parts[0].store.manifest_hash},
        "test_store": {"name": dataset.test_store.path.name, "manifest_hash": dataset.test_store.manifest_hash},
        "transductive": _any(row["transductive"] for row in summary),
        "chance": 1.0 / len(np.unique(targets.y[tested])),
        "classes": list(targets.classes),
        "samples": len(targets.y),
        "unlabelled_samples_left_out": dataset.unlabelled,
        "micrographs": len(targets.group_names),
        "level": args.level,
        "protocol": {
            **dataclasses.asdict(protocol),
            "split": args.split,
            "test_share": None if folds else args.test_share,
            "splits": len(plans),
        },
        "notes": list(NOTES) if protocol.name == "sound" and not protocol.flaws else [lu2022.__doc__],
        "versions": _versions(),
        "summary": summary,
        "differences": comparison.differences(),
        "splits": list(scores.split_rows(plans, targets)),
        "folds": scores.fold_rows(scored, targets) if folds else [],
        "draws": list(scores.draw_rows(plans, targets)),
        "confusion": scores.confusions(scored, targets),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    test, first = tested if folds else plans[0].split.test, scored[0].source
    write_npz(
        args.out / "embedding.npz",
        features=first.features[test],
        labels=np.asarray(targets.classes)[targets.y[test]],
        groups=np.asarray(targets.group_names)[targets.groups[test]],
        keys=np.asarray(dataset.keys)[test],
        **_thumbnails(dataset, test),
    )
    atomic.write_text(args.out / "scores.csv", scores.to_csv(rows))
    atomic.write_text(args.out / "summary.csv", scores.summary_csv(summary))
    atomic.write_text(args.out / "scores.json", scores.to_json(document))
    return _text(document, summary, args)


def _thumbnails(dataset: Dataset, test: Any) -> dict[str, Any]:
    """Small pictures of the test samples, or of evenly spaced ones of many, for maps of the embedding."""
    import numpy as np

    from nanodist.downstream.thumbnails import MOST, thumbnails

    places = [(part.store, index) for part in dataset.parts for index in part.indices]
    rows = np.unique(np.linspace(0, len(test) - 1, min(MOST, len(test))).astype(np.int64))
    pictures = thumbnails([store.read(index) for store, index in (places[test[row]] for row in rows)])
    return {"thumbnail_rows": rows, "thumbnails": pictures}


def _text(document: dict[str, Any], summary: list[dict[str, Any]], args: argparse.Namespace) -> str:
    from nanodist.downstream.scores import sizes, table

    used = [split["validation_samples"] for split in document["splits"]]
    lines = [
        *_warnings(document["protocol"]["flaws"]),
        f"balanced accuracy on unseen micrographs, {100 * args.level:g} % intervals, over labels per class "
        f"(chance {document['chance']:.2f}):",
        table(summary),
        *sizes(summary),
    ]
    if document["protocol"]["rounds"] and not document["protocol"]["flaws"]:
        chosen = f"{min(used)} to {max(used)} labelled samples of training micrographs a split"
        lines.append(f"settings were chosen on {chosen}, in {document['protocol']['rounds']} rounds")
    lines += _fold_lines(document["folds"])
    flags = {row["transductive"] for row in summary}
    lines += ["* pretraining saw the test micrographs, without labels"] if True in flags else []
    lines += ["? not known whether pretraining saw the test micrographs"] if None in flags else []
    reasons = {row["labels_per_class"]: row["reason"] for row in summary if row["reason"]}
    lines += [f"{budget} labels: {reason}" for budget, reason in reasons.items()]
    return "\n".join([*lines, f"{args.out / 'scores.json'}"])


def _warnings(flaws: Sequence[str]) -> list[str]:
    """A line that says what is done wrong on purpose, where something is."""
    from nanodist.downstream.lu2022 import FLAWS

    return [f"not to be trusted: {'; '.join(FLAWS[name] for name in flaws)}"] if flaws else []


def _fold_lines(folds: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each fold: what was left out, and the share of it that a linear probe on all labels has right."""
    lines: dict[str, str] = {}
    for row in folds:
        if row["method"] == "linear" and row["labels_per_class"] == "all":
            what = f"{', '.join(row['groups'])} ({', '.join(row['classes'])}, {row['test_samples']} samples)"
            lines[what] = f"{lines.get(what, '')}{',' if what in lines else ''} {row['encoder']} {row['right']:.2f}"
    head = "left out in turn, and the share of it that is right (linear, all labels):"
    return [head, *(f"  {what}:{said}" for what, said in lines.items())] if lines else []


def _any(flags: Iterable[bool | None]) -> bool | None:
    """True where one is, else ``None`` (not known) where one is."""
    every = set(flags)
    return True if True in every else None if None in every else False


def _versions() -> dict[str, str]:
    names = ("nanodist", "numpy", "scipy", "torch", "timm")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            from nanodist._version import __version__

            found[name] = __version__ if name == "nanodist" else "unknown"
    return found
