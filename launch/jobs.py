"""Picklable callables that submitit runs in a job.

A job does what the command line does, so what runs in a fan-out can be repeated by hand. Inside the job the topology
comes from submitit's and Slurm's variables; progress lives in the run directory, so a job may be started any number
of times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any


@dataclasses.dataclass(frozen=True)
class PretrainJob:
    """``nanodist pretrain RECIPE key=value ...`` as a job.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file that the nodes can read.
        overrides: dotted overrides, ``key=value``.
    """

    recipe: str
    overrides: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command line after ``nanodist``."""
        return ["pretrain", self.recipe, *self.overrides]

    def __call__(self) -> str:
        """Run to the end, continuing what an earlier start left in the run directory.

        Returns:
            What was run, as a line.

        Raises:
            RuntimeError: the command ended with another exit code than 0; its reason stands in the job's log.
        """
        from nanodist.cli import main

        line = " ".join(["nanodist", *self.arguments()])
        code = main(self.arguments())
        if code != 0:
            raise RuntimeError(f"'{line}' ended with exit code {code}")
        return line

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """What submitit puts into the queue when the job is preempted: the same job, which resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


def check(job: PretrainJob) -> int:
    """Exit code of reading the job's recipe here: a misspelled key is found before the queue, not behind it."""
    from nanodist.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        return main([*job.arguments(), "--print-recipe"])
