"""One submission of a pipeline: each step that is missing, after the steps that it waits for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch import queue
from launch.jobs import RecipeJob
from launch.queue import How
from launch.records import Job, append_lines
from launch.resources import SlurmResources
from launch.stages import Stage, Step
from launch.submit import submit, wait

if TYPE_CHECKING:
    from launch.pipeline import Pipeline

ALONE = {"nodes": 1, "tasks_per_node": 1}  # an export, a page and a job of a sweep are one process


class Submission:
    """What is submitted by one call of :meth:`launch.pipeline.Pipeline.submit`; arguments as there.

    Args:
        pipeline: of whose steps.
        definition: that jobs take it from.
        cluster, resources, max_parallel: see there.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        definition: dict[str, Any],
        cluster: str,
        resources: SlurmResources,
        max_parallel: int,
    ) -> None:
        self._pipeline, self._definition = pipeline, definition
        self._cluster, self._resources, self._parallel = cluster, resources, max_parallel
        self._known = pipeline.submitted()
        self._made: list[Step] = []
        self._last: list[str] = []  # numbers that the page waits for

    def run(self, jobs: Sequence[Job]) -> Sequence[Step]:
        """Submit the steps of all pretrainings and the page; what was submitted or done."""
        for job in jobs:
            self._encoder(job)
        self._page()
        return self._made

    def _encoder(self, job: Job) -> None:
        name, pipeline = job.fingerprint, self._pipeline
        trained = pipeline.trained(name)[0]
        training = "" if trained else self._training(job)
        if not trained and not self._later() and not pipeline.trained(name)[0]:
            return  # it failed, here and now; the step says why
        definition = self._definition
        exported = trained and pipeline.exported(name)
        if not exported:
            waits = [f"afterok:{training}"] if training else []
            number = self._step(f"export {name}", Stage(definition, "export", name), definition["export"], waits, ALONE)
            if not self._later() and not pipeline.exported(name):
                return
        for key in pipeline.sweep_names():
            if exported or not self._later():
                self._sweep_now(key, name)
            else:
                self._sweep_later(key, name, number)

    def _later(self) -> bool:
        return self._cluster == "slurm"

    def _training(self, job: Job) -> str:
        command, recipe, *overrides = job.arguments
        task = RecipeJob(recipe, tuple(overrides), command=command)
        return self._step(f"pretrain {job.fingerprint}", task, self._definition["pretrain"], [], {})

    def _step(
        self, name: str, task: Any, section: Mapping[str, Any], waits: Sequence[str], least: Mapping[str, Any]
    ) -> str:
        """The number of the job that does a step: the one that has it already, or a new one."""
        line, cluster = self._known.get(name), self._cluster
        if line is not None and line["cluster"] == cluster and queue.is_in_queue(cluster, line["id"]):
            self._last.append(line["id"])
            return str(line["id"])
        resources = self._with(section, least, name)
        place = self._pipeline.home / "jobs"
        handle = submit(task, resources, cluster, place, f"{self._pipeline.name}-{name.split()[0]}", waits)
        number = str(handle.job_id)
        size = {"gpus": resources.gpus_per_node * resources.nodes, "nodes": resources.nodes}
        size["cpus"] = resources.cpus_per_task * resources.tasks() * resources.nodes
        line = {"step": name, "id": number, "cluster": cluster, **size, "time": time.time()}
        append_lines(self._pipeline.home / "steps.jsonl", [line])
        queue.forget()
        failure = None if self._later() else wait(handle)
        state = "queued" if self._later() else "failed" if failure else "done"
        self._made.append(Step(name, state, failure or "", (number,)))
        self._last.append(number)
        return number

    def _with(self, section: Mapping[str, Any], least: Mapping[str, Any], where: str) -> SlurmResources:
        return self._resources.changed({**least, **(section.get("resources") or {})}, f"pipeline: {where}: resources")

    def _how(self, key: str) -> How:
        section = self._definition["sweeps"][key]
        numbers = {name: int(section[name]) for name in ("pack", "side_by_side") if name in section}
        parallel = int(section.get("max_parallel", self._parallel))
        return How(self._cluster, self._with(section, ALONE, f"sweeps.{key}"), parallel, **numbers)

    def _sweep_now(self, key: str, encoder: str) -> None:
        """The encoder is there: an ordinary sweep, of which only what is missing is run."""
        sweep, how = self._pipeline.sweep(key, encoder), self._how(key)
        handles = sweep.submit(how.cluster, how.resources, how.max_parallel, how.pack, how.side_by_side)
        if self._cluster == "local":
            for handle in handles:
                wait(handle)
        names = {job.fingerprint for job in sweep.jobs()}
        lines = sweep.folder.allocations()
        self._last += [
            line["id"]
            for line in lines
            if names & set(line["fingerprints"]) and self._later() and queue.is_in_queue(line["cluster"], line["id"])
        ]
        if handles or self._cluster == "debug":
            numbers = tuple(str(handle.job_id) for handle in handles)
            self._made.append(Step(f"{key} {encoder}", "queued" if self._later() else "done", "", numbers))

    def _sweep_later(self, key: str, encoder: str, export: str) -> None:
        """The encoder is on its way: allocations of a list that its export writes."""
        sweep, how = self._pipeline.sweep(key, encoder), self._how(key)
        folder = sweep.folder
        there = [line for line in folder.allocations() if line.get("part") == encoder]
        waiting = [line["id"] for line in there if queue.is_in_queue(line["cluster"], line["id"])]
        if waiting:
            self._last += waiting
            return
        folder.make()
        count = sweep.helper_count()
        helpers = queue.submit_chunks(folder, "helpers", encoder, count, how, [f"afterok:{export}"])
        waits = [f"afterok:{number}" for number in [*helpers, export]]
        jobs = queue.submit_chunks(folder, "jobs", encoder, len(sweep.points), how, waits)
        self._last += [*helpers, *jobs]
        self._made.append(Step(f"{key} {encoder}", "queued", "", (*helpers, *jobs)))

    def _page(self) -> None:
        """The page comes after everything, whatever became of it."""
        if not self._later():
            self._pipeline.write_page()
            return
        if not self._last:  # all is done
            if not self._pipeline.page.is_file():
                self._pipeline.write_page()
            return
        line = self._known.get("page")
        if line is not None and not self._made and queue.is_in_queue(line["cluster"], line["id"]):
            return
        if line is not None and queue.is_in_queue(line["cluster"], line["id"]):
            queue.withdraw(line["id"])
        # An array is one job to wait for, not a thousand.
        waits = [f"afterany:{number}" for number in dict.fromkeys(number.partition("_")[0] for number in self._last)]
        self._step("page", Stage(self._definition, "page"), self._definition["report"], waits, ALONE)
