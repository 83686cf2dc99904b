"""Pretrain, export, fan out, collect, report: one definition, one command, and only what is missing is done.

Everything is handed to Slurm at once. Each step waits for the one before it by a dependency; a fan-out's jobs are not
known before the encoder is (its weights are part of their identity), so their allocations are slices of a list that the
export writes. Nothing watches from a login node.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc import atomic
from hpc.config import read_yaml
from hpc.errors import UserError
from launch import queue
from launch.kinds import kind_of
from launch.records import Job, SweepFolder, read_lines
from launch.resources import SlurmResources
from launch.stages import Step, export
from launch.sweep import Sweep

KEYS = ("name", "folder", "pretrain", "export", "sweeps", "report")
_SHAPES = ("recipe", "overrides", "grid", "zip", "list", "random", "where")
_PRETRAIN = (*_SHAPES, "resources")
_EXPORT = ("format", "license", "data", "resources")
_SWEEP = ("job", *_SHAPES, "pack", "side_by_side", "max_parallel", "resources")
_REPORT = ("resources",)


class Pipeline:
    """Pretrainings, an encoder of each, and the fan-outs over all encoders.

    Args:
        name: of the pipeline, and of its folder.
        pretrain: ``recipe``, ``overrides`` and the parts of a grid (see :class:`launch.Sweep`); each point is a
            pretraining. ``resources`` stand over those of the site.
        sweeps: by name, ``job`` (finetune or probe) and what :class:`launch.Sweep` takes, without the encoder;
            ``pack``, ``side_by_side``, ``max_parallel``, ``resources``.
        export: ``format``, ``license`` and ``data`` of ``nanodist export``; ``resources``.
        report: ``resources``.
        folder: where pipelines live.

    Raises:
        UserError: a key or a value that cannot be.
    """

    def __init__(
        self,
        name: str,
        pretrain: Mapping[str, Any],
        sweeps: Mapping[str, Mapping[str, Any]],
        export: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
        folder: str | Path = "pipelines",
    ) -> None:
        self.name, self.home = name, Path(folder).absolute() / name
        self._pretrain, self._export = dict(pretrain), dict(export or {})
        self._report, self._sweeps = dict(report or {}), {key: dict(value or {}) for key, value in sweeps.items()}
        _check_keys("pretrain", self._pretrain, _PRETRAIN)
        _check_keys("export", self._export, _EXPORT)
        _check_keys("report", self._report, _REPORT)
        for key, value in self._sweeps.items():
            _check_keys(f"sweeps.{key}", value, _SWEEP)
            if value.get("job") not in ("finetune", "probe", "pairvae"):
                raise UserError(
                    f"pipeline: sweeps.{key}.job is {value.get('job')!r}; allowed: finetune, probe, pairvae"
                )
        for key, value in {
            "pretrain": self._pretrain,
            "export": self._export,
            "report": self._report,
            **self._sweeps,
        }.items():
            SlurmResources.from_values(dict(value.get("resources") or {}), f"pipeline: {key}: resources")
        self.pretrainings = Sweep("pretrain", **_shape(self._pretrain), name=name, folder=folder)
        self.pretrainings.folder, self.pretrainings.group = SweepFolder(self.home / "pretrain"), name
        for key in self._sweeps:
            self._sweep(key, "ENCODER", {}).check()

    @classmethod
    def from_yaml(cls, path: str | Path) -> Pipeline:
        """A pipeline from a file whose keys are the arguments of the class; ``name`` is the file's without one.

        Raises:
            UserError: no such file, or a key or value that cannot be.
        """
        values = read_yaml(path, "pipeline")
        _check_keys("", values, KEYS)
        for key in ("pretrain", "sweeps"):
            if not isinstance(values.get(key), dict):
                raise UserError(f"pipeline {path}: key '{key}' is missing, or holds no keys and values")
        return cls(**{"name": Path(path).stem, **values})

    def definition(self) -> dict[str, Any]:
        """Arguments for the same pipeline whose recipes are copies, so that jobs in the queue follow no edits."""
        copies = {key: self._sweep(key, "ENCODER", {}).keep_recipe() for key in self._sweeps}
        sweeps = {key: {**value, "recipe": copies[key]} for key, value in self._sweeps.items()}
        pretrain = {**self._pretrain, "recipe": self.pretrainings.keep_recipe()}
        own = {"export": self._export, "report": self._report, "folder": str(self.home.parent)}
        return {"name": self.name, "pretrain": pretrain, "sweeps": sweeps, **own}

    @property
    def page(self) -> Path:
        """The page that it ends in."""
        return self.home / "report.html"

    def encoder(self, fingerprint: str) -> Path:
        """The export of a pretraining."""
        return self.home / "encoders" / fingerprint

    def sweep_names(self) -> Sequence[str]:
        """Of its sweeps."""
        return [*self._sweeps]

    def kind(self, key: str) -> str:
        """The kind of job of one of its sweeps."""
        return str(self._sweeps[key]["job"])

    def points(self, key: str) -> int:
        """Jobs that one of its sweeps has for each encoder, at most."""
        return len(self._sweep(key, "ENCODER", {}).points)

    def jobs(self, key: str) -> Sequence[Job]:
        """Jobs of one of its sweeps over the encoders that are there; none that an earlier definition had alone."""
        there = [job.fingerprint for job in self.pretrainings.jobs() if self.exported(job.fingerprint)]
        return [job for name in there for job in self.sweep(key, name).jobs()]

    def sweep(self, key: str, fingerprint: str) -> Sweep:
        """One of its sweeps over the encoder of one pretraining."""
        point = next(job.point for job in self.pretrainings.jobs() if job.fingerprint == fingerprint)
        columns = {f"pretrain.{name}": value for name, value in point.items()}
        made = self._sweep(key, str(self.encoder(fingerprint)), {"pretraining": fingerprint, **columns})
        made.group, made.parent = self.name, str(self.pretrainings.folder.run_dir(fingerprint))
        return made

    def _sweep(self, key: str, encoder: str, columns: Mapping[str, Any]) -> Sweep:
        value = self._sweeps[key]
        shape = _shape(value)
        shared = shape.pop("overrides", {})
        if isinstance(shared, Mapping):
            shared = {**shared, "encoder": encoder}
        else:
            name = kind_of(value["job"]).keys.get("encoder", "encoder")
            shared = [*shared, f"{name}={json.dumps(encoder)}"]
        return Sweep(value["job"], **shape, overrides=shared, name=key, folder=self.home / "sweeps", columns=columns)

    def export_encoder(self, fingerprint: str) -> Path:
        """Export a finished pretraining, and write the lists of the fan-out's jobs; what is there stays.

        Raises:
            RuntimeError: the export failed.
            UserError: a fan-out's recipe cannot be.
        """
        to = self.encoder(fingerprint)
        options = {name: value for name, value in self._export.items() if name != "resources"}
        export(self.pretrainings.folder.run_dir(fingerprint), to, options)
        for key in self._sweeps:
            self.sweep(key, fingerprint).plan(fingerprint)
        return to

    def write_page(self) -> Path:
        """Collect all sweeps, and write the page; rows of jobs that are not done are there as well."""
        from launch.pages import pipeline_page

        return pipeline_page(self)

    def trained(self, fingerprint: str) -> tuple[bool, str]:
        """Whether a pretraining is complete, and how its last start ended."""
        try:
            record = json.loads((self.pretrainings.folder.run_dir(fingerprint) / "run.json").read_text())
            reason = str(record["starts"][-1].get("reason"))
        except (OSError, ValueError, KeyError, IndexError):
            return False, ""
        return reason == "completed", reason

    def submitted(self) -> dict[str, dict[str, Any]]:
        """Of each step, the last job that was submitted for it."""
        return {line["step"]: line for line in read_lines(self.home / "steps.jsonl")}

    def steps(self) -> Iterator[Step]:
        """How far it is, step by step."""
        known = self.submitted()
        for job in self.pretrainings.jobs():
            name, (done, reason) = job.fingerprint, self.trained(job.fingerprint)
            yield self._step(f"pretrain {name}", done, known, reason)
            yield self._step(f"export {name}", self.exported(name), known, "")
        yield self._step("page", self.page.is_file(), known, "")

    def _step(self, name: str, done: bool, known: Mapping[str, Any], reason: str) -> Step:
        line = known.get(name)
        if line is not None and queue.is_in_queue(line["cluster"], line["id"]):
            return Step(name, "queued", jobs=(line["id"],))
        if done:
            return Step(name, "done")
        return Step(name, "missing" if line is None else "failed", reason)

    def exported(self, fingerprint: str) -> bool:
        """Whether the encoder of a pretraining is there, with the lists of the fan-out's jobs."""
        lists = [self.home / "sweeps" / key / f"jobs-{fingerprint}.jsonl" for key in self._sweeps]
        return self.encoder(fingerprint).is_dir() and all(path.is_file() for path in lists)

    def preview(self) -> str:
        """What a submission would find, in a few lines."""
        lines = []
        for step in self.steps():
            lines.append(f"{step.name}: {step.state}")
        encoders = [job.fingerprint for job in self.pretrainings.jobs()]
        for key in self._sweeps:
            for name in encoders:
                folder = SweepFolder(self.home / "sweeps" / key)
                done = sum(folder.record(job).state == "done" for job in folder.jobs(name))
                lines.append(f"{key} {name}: {self.points(key)} jobs at most, {done} done")
        return "\n".join(lines)

    def wait(self, every_s: float = 5.0) -> list[str]:
        """Wait for the page; a sentence for each step that failed, and one for each sweep with jobs that did not end.

        Without Slurm all is over already.
        """
        while self.waiting():
            time.sleep(every_s)
            if self._page_ended():
                break
        queue.forget()
        bad = [
            f"{step.name}: {step.reason or step.state}" for step in self.steps() if step.state in ("failed", "missing")
        ]
        for key in self._sweeps:
            folder = SweepFolder(self.home / "sweeps" / key)
            left = [job.fingerprint for job in self.jobs(key) if folder.record(job.fingerprint).state != "done"]
            bad += [f"{key}: {len(left)} jobs are not done, such as {left[0]}"] if left else []
        return bad

    def waiting(self) -> bool:
        """Whether a step is in the queue or runs."""
        return any(step.state == "queued" for step in self.steps())

    def _page_ended(self) -> bool:
        """Whether the last step left its result, which is to be had without asking Slurm."""
        line = self.submitted().get("page")
        return line is not None and (self.home / "jobs" / f"{line['id']}_0_result.pkl").is_file()

    def submit(
        self, cluster: str = "slurm", resources: SlurmResources | None = None, max_parallel: int = 64
    ) -> Sequence[Step]:
        """Do what is missing: at once (local, debug), or by jobs that wait for each other (slurm).

        Args:
            cluster: ``"slurm"``, ``"local"`` (processes of this machine) or ``"debug"`` (this process).
            resources: of the site; those of a step stand over them.
            max_parallel: allocations of a sweep at a time.

        Returns:
            What was submitted or done, step by step; nothing where all is done or in the queue.

        Raises:
            UserError: a recipe that cannot be, a store that is not there, or the cluster takes no job.
        """
        from launch.submission import Submission

        jobs = self.pretrainings.jobs()
        self.home.mkdir(parents=True, exist_ok=True)
        self.pretrainings.folder.make()
        self.pretrainings.folder.add_jobs(jobs)
        definition = self.definition()
        atomic.write_json(self.home / "pipeline.json", _plain(definition))
        return Submission(self, definition, cluster, resources or SlurmResources(), max_parallel).run(jobs)


def _plain(definition: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(definition, default=str))


def _shape(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _SHAPES if name in values}


def _check_keys(where: str, values: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = [key for key in values if key not in allowed]
    if unknown:
        place = f"{where}." if where else ""
        raise UserError(f"pipeline: key '{place}{unknown[0]}' does not exist; allowed: {', '.join(allowed)}")
