"""Where Weights & Biases shows what: names of ``metrics.jsonl`` become ``SECTION/NAME``, a section of its page each.

Every curve stands over ``step``, which all lines have; ``samples_seen`` and ``epoch`` are there to be chosen as axis,
so that runs of several batch sizes can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEP = "step"
AXES = (STEP, "samples_seen", "epoch")
_OWN = {
    "loss": "train",
    "lr": "optimizer",
    "gradient_norm": "optimizer",
    "trust_ratio_min": "optimizer",
    "trust_ratio_median": "optimizer",
    "trust_ratio_max": "optimizer",
    "images_per_s": "throughput",
    "data_wait_share": "throughput",
    "slowest_rank": "throughput",
    "slowest_rank_ratio": "throughput",
}
# What a task gives: the beginning of a name says its section, and is left away.
_BEGINNINGS = {"term_": "terms", "eval_": "evaluation", "validation_": "validation"}
_OTHER = "measures"


def sectioned(name: str) -> str:
    """W&B's name of a metric: ``lr`` is ``optimizer/lr``, ``validation_iou`` is ``validation/iou``.

    Axes, W&B's own names (``system.cpu``) and names that have a section stay as they are.
    """
    if name in AXES or "/" in name or "." in name:
        return name
    if name in _OWN:
        return f"{_OWN[name]}/{name}"
    for beginning, section in _BEGINNINGS.items():
        if name.startswith(beginning):
            return f"{section}/{name.removeprefix(beginning)}"
    return f"{_OTHER}/{name}"


def renamed(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of ``metrics.jsonl`` as W&B has it."""
    return {sectioned(name): value for name, value in line.items()}


def define_axes(run: Any) -> None:
    """Tell W&B's run what its curves stand over; its own count goes astray over several offline starts."""
    run.define_metric(STEP, hidden=True)
    for name in AXES[1:]:
        run.define_metric(name, step_metric=STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
