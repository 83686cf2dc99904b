"""What a sweep or a pipeline came to: the file that the report reads, and the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import atomic
from hpc.config import plain_yaml
from launch import cost
from launch.collect import SCHEMA, document
from launch.cost import Cost
from launch.kinds import kind_of
from launch.records import Job, SweepFolder, read_lines

if TYPE_CHECKING:
    from launch.pipeline import Pipeline

RESULT_FILE = "result.json"


def pipeline_page(pipeline: Pipeline) -> Path:
    """Collect the sweeps of a pipeline into ``result.json``, each into its own table, and write the page."""
    from nanodist.report.sweep_page import write_sweep_page

    trainings = [_training(pipeline, job) for job in pipeline.pretrainings.jobs()]
    sweeps, costs = [], _cost_of_steps(pipeline)
    for key in pipeline.sweep_names():
        folder = SweepFolder(pipeline.home / "sweeps" / key)
        found = document(folder, pipeline.jobs(key), kind_of(pipeline.kind(key)))
        waiting = [job.fingerprint for job in pipeline.pretrainings.jobs() if not pipeline.exported(job.fingerprint)]
        found["not_planned"] = {"encoders": waiting, "jobs_each": pipeline.points(key)} if waiting else {}
        sweeps.append(found)
        costs.append(cost.of_sweep(key, folder))
    result = {
        "schema": SCHEMA,
        "name": pipeline.name,
        "pretrainings": trainings,
        "sweeps": sweeps,
        "cost": [one.row() for one in costs],
        "reproduce": _reproduce(pipeline),
    }
    atomic.write_json(pipeline.home / RESULT_FILE, result)
    return write_sweep_page(result, pipeline.page)


def sweep_page(folder: SweepFolder, found: dict[str, Any]) -> Path:
    """The page of one sweep beside its table, and the file that ``nanodist report`` reads."""
    from nanodist.report.sweep_page import write_sweep_page

    result = {
        "schema": SCHEMA,
        "name": folder.name,
        "pretrainings": [],
        "sweeps": [found],
        "cost": [cost.of_sweep(folder.name, folder).row()],
        "reproduce": {"code": _codes(folder.path / "submitit")},
    }
    atomic.write_json(folder.path / RESULT_FILE, result)
    return write_sweep_page(result, folder.path / "sweep.html")


def _training(pipeline: Pipeline, job: Job) -> dict[str, Any]:
    done, reason = pipeline.trained(job.fingerprint)
    run_dir = pipeline.pretrainings.folder.run_dir(job.fingerprint)
    state = "done" if done else next(step.state for step in pipeline.steps() if step.name.endswith(job.fingerprint))
    told = {"fingerprint": job.fingerprint, "point": job.point, "run_dir": str(run_dir), "state": state}
    return {**told, "reason": "" if done else reason, "exported": pipeline.exported(job.fingerprint)}


def _cost_of_steps(pipeline: Pipeline) -> list[Cost]:
    lines = read_lines(pipeline.home / "steps.jsonl")
    seconds = sum(
        _seconds(pipeline.pretrainings.folder.run_dir(job.fingerprint)) for job in pipeline.pretrainings.jobs()
    )
    found = []
    for name, took in (("pretrain", seconds), ("export", None)):
        one = cost.of_steps(name, [line for line in lines if line["step"].split()[0] == name], took)
        found += [one] if one is not None else []
    return found


def _seconds(run_dir: Path) -> float:
    """What the starts of a run took, by its own record."""
    try:
        starts: Sequence[Mapping[str, Any]] = json.loads((run_dir / "run.json").read_text())["starts"]
        spans = [(start.get("began"), start.get("ended")) for start in starts]
        return sum((_time(end) - _time(begin)).total_seconds() for begin, end in spans if begin and end)
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _time(text: Any) -> datetime:
    return datetime.fromisoformat(str(text).replace("Z", "+00:00"))


def _reproduce(pipeline: Pipeline) -> dict[str, Any]:
    first = next(iter(pipeline.pretrainings.jobs()))
    lines = {"pretraining": shlex.join(["nanodist", *first.arguments])}
    for key in pipeline.sweep_names():
        jobs = [*SweepFolder(pipeline.home / "sweeps" / key).jobs().values()]
        lines |= {key: shlex.join(["nanodist", *jobs[0].arguments])} if jobs else {}
    text = plain_yaml(json.loads((pipeline.home / "pipeline.json").read_text()))
    command = f"python -m launch pipeline {shlex.quote(str(pipeline.home / 'pipeline.json'))}"
    return {"command": command, "definition": text, "by_hand": lines, "code": _codes(pipeline.home / "jobs")}


def _codes(folder: Path) -> list[str]:
    """Hashes of the code that its jobs ran, in the order of submission."""
    return [path.name for path in sorted((folder / "code").glob("*"), key=lambda path: path.stat().st_mtime)]
