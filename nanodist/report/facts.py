"""What a run is, in a dozen short facts, and what a row of its list of starts says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from nanodist.report.collect import Run
from nanodist.report.markup import number
from nanodist.report.words import OBJECTIVES, spent

START_COLUMNS = (
    "began (UTC)",
    "ended (UTC)",
    "first step",
    "last step",
    "end",
    "ranks",
    "launcher",
    "hosts",
    "Slurm job",
)
TASKS = ("classification", "segmentation")


def facts(run: Run) -> dict[str, Any]:
    """Label -> value (``None`` where the run does not say) for the table at the head of a report."""
    last = run.metrics.rows[-1] if run.metrics.rows else {}
    first_start = run.starts[0] if run.starts else {}
    last_start = run.starts[-1] if run.starts else {}
    versions = last_start.get("versions")
    weights, labels = run.value("encoder.weights"), run.value("data.labels_per_class")
    labels = "all" if labels == 0 else labels
    return {
        "Task": {"pretrain": None, "pairvae": "PairVAE"}.get(run.kind, run.kind),
        "Stage": run.value("what.stage"),
        "Model": run.value("model.preset"),
        "Objective": objective(run),
        "Trunk": run.value("encoder.trunk"),
        "Starting encoder": _source(run),
        "Weights at the start": {"given": "pretrained"}.get(str(weights), weights) if run.kind in TASKS else None,
        "Labelled images": labels if run.kind == "segmentation" else None,
        "Labels per class": labels if run.kind == "classification" else None,
        "Tuned layers": run.value("train.tuned_layers"),
        "View size (px)": run.value("views.size_px"),
        "Steps": steps(run),
        "Global batch": run.value("train.global_batch_size"),
        "Samples seen": last.get("samples_seen"),
        "Epochs": epochs(run),
        "Store": run.value("data.store"),
        "Store's hash": store_hash(run),
        "Precision": run.value("train.precision"),
        "Seed": run.value("seed"),
        "Fingerprint": run.info.get("fingerprint"),
        "Started (UTC)": _time(first_start.get("began") or run.info.get("created")),
        "Hosts": hosts(run),
        "Ranks": ranks(run),
        "Starts": len(run.starts) or None,
        "Time in training": time_in_training(run),
        "Source revision": _revision(last_start.get("git_commit")),
        "nanodist": versions.get("nanodist") if isinstance(versions, Mapping) else None,
    }


def objective(run: Run) -> str | None:
    """The name of the objective, or ``None``."""
    found = run.value("objective.name")
    return None if found is None else OBJECTIVES.get(str(found), str(found))


def steps(run: Run) -> str | None:
    """``"1 200 of 3 000"``: the last logged step, and the planned ones where the recipe says."""
    done = run.metrics.rows[-1]["step"] if run.metrics.rows else None
    planned = run.value("train.steps")
    if planned is None:
        return None if done is None else number(done)
    return f"{number(done or 0)} of {number(planned)}"


def epochs(run: Run) -> str | None:
    """``"12 of 100"``; the planned ones only where they set the length of the run."""
    done = run.metrics.rows[-1].get("epoch") if run.metrics.rows else None
    planned = run.value("train.epochs") if run.value("train.steps") is None else None
    if planned is None:
        return None if done is None else number(done)
    return f"{number(done or 0)} of {number(planned)}"


def store_hash(run: Run) -> Any:
    """The first sixteen digits of the hash of the store's manifest."""
    found = run.value("what.inputs.store")
    return None if found is None else str(found)[:16]


def _source(run: Run) -> str | None:
    """The folder or name that a fine-tuning, or a warm start, began with."""
    found = run.value("encoder.source", "init_from", "model.encoder")
    return None if found in (None, "") else str(found).rstrip("/").rpartition("/")[2]


def ranks(run: Run) -> str | None:
    """How many ranks the starts had, in their order where that changed."""
    found = [start.get("topology") for start in run.starts]
    counts = [one.get("world_size") for one in found if isinstance(one, Mapping)]
    told = [str(count) for count, _ in itertools.groupby(count for count in counts if count is not None)]
    return ", then ".join(told[:6]) + (", …" if len(told) > 6 else "") if told else None


def hosts(run: Run) -> str | None:
    """The names of the hosts of all starts, six at most."""
    names: list[str] = []
    for start in run.starts:
        found = start.get("hosts") or []
        names += [found] if isinstance(found, str) else [str(host) for host in found]
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 6} more" if len(unique) > 6 else ""
    return ", ".join(unique[:6]) + more if unique else None


def time_in_training(run: Run) -> str | None:
    """The sum over logged steps of samples by images a second: hours that gave progress, without restarts."""
    total = 0.0
    for before, after in itertools.pairwise(run.metrics.rows):
        rate, seen, earlier = (
            _number(v) for v in (after.get("images_per_s"), after.get("samples_seen"), before.get("samples_seen"))
        )
        if rate and seen is not None and earlier is not None:
            total += max(0.0, seen - earlier) / rate
    return spent(total) if total else None


def start_row(start: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of :data:`START_COLUMNS` for one entry of ``starts`` in ``run.json``; a dash where it says nothing."""
    topology = start.get("topology")
    found = start.get("hosts") or []
    names = [found] if isinstance(found, str) else [str(host) for host in found]
    job, again = start.get("slurm_job_id"), start.get("slurm_restart_count")
    return (
        _time(start.get("began")) or "–",
        _time(start.get("ended")) or "–",
        number(start.get("first_step")),
        number(start.get("last_step")),
        str(start.get("reason") or "still running, or killed"),
        number(topology.get("world_size")) if isinstance(topology, Mapping) else "–",
        number(start.get("launcher")),
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "–",
        "–" if job is None else f"{job}, restart {again}" if again else str(job),
    )


def _time(value: Any) -> str | None:
    """ISO 8601 in UTC, shortened to ``2026-01-31 12:00``."""
    return None if value is None else str(value).replace("T", " ")[:16]


def _revision(commit: Any) -> str | None:
    """Twelve digits of a commit, and whether the tree was edited."""
    return None if not commit else str(commit)[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value >= 0 else None
