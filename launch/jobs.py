"""Picklable callables that submitit runs in a job.

A job does what the command line does, so what runs in a fan-out can be repeated by hand. Inside the job the topology
comes from submitit's and Slurm's variables; progress lives in the run directory, so a job may be started any number
of times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import subprocess
import sys
import traceback
from typing import Any, ClassVar, NoReturn, Protocol

from hpc import atomic
from hpc.preemption import EXIT_CODE
from launch.after import final_mark
from launch.snapshot import changed

USER_CODE = 2  # what only the user can mend
MOST_RESTARTS = 100
COMMANDS = ("pretrain", "finetune")  # those whose recipe may be printed, and which go on where they were


class Restartable(Protocol):
    """A frozen dataclass that is called again after a restart, of which ``restarts`` are left."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def restarts(self) -> int:
        """How often it may still be put back into the queue."""

    def __call__(self) -> Any:
        """Run, or go on."""


@dataclasses.dataclass(frozen=True)
class RecipeJob:
    """``nanodist COMMAND RECIPE key=value ...`` as a job.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file that the nodes can read.
        overrides: dotted overrides, ``key=value``.
        restarts: how often it may still be put back into the queue after it was preempted.
        command: one of :data:`COMMANDS`.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    restarts: int = MOST_RESTARTS
    command: str = "pretrain"

    def arguments(self) -> list[str]:
        """The command line after ``nanodist``."""
        return [self.command, self.recipe, *self.overrides]

    def __call__(self) -> str:
        """Run to the end, continuing what an earlier start left in the run directory.

        submitit's own handler of SIGUSR2 requeues at once, wherever the training stands, and on rank 0 only. While
        training runs, nanodist's handlers are in its place: all ranks save between two steps and end with exit code
        75, and then rank 0 requeues here.

        Returns:
            What was run, as a line.

        Raises:
            RuntimeError: the command ended with another exit code than 0 and 75; its reason stands in the job's log.
                In a job of Slurm only where starting it again helps nothing, such as for wrong input.
            SystemExit: the job was preempted, and it is in the queue again, or it is another rank of one that is. Or it
                failed in a job of Slurm, where :mod:`launch.after` starts it again.
        """
        from nanodist.cli import main

        line = " ".join(["nanodist", *self.arguments()])
        environment = _environment()
        for sentence in changed():
            print(f"launch: warning: {sentence}", file=sys.stderr)
        try:
            code = main(self.arguments())
        except Exception:
            if environment is None or environment.cluster != "slurm":
                raise
            # No result is left behind, which would tell submitit that the job is over.
            traceback.print_exc()
            raise SystemExit(1) from None
        if code == EXIT_CODE:
            requeue(self, line)
        if code not in (0, USER_CODE) and environment is not None and environment.cluster == "slurm":
            raise SystemExit(code)
        if code != 0:
            give_up(f"'{line}' ended with exit code {code}")
        return line

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """What submitit puts into the queue when the job is preempted: the same job, which resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


def _environment() -> Any:
    """submitit's view of the job that this process is in; ``None`` outside of one."""
    import submitit

    try:
        return submitit.JobEnvironment()
    except RuntimeError:
        return None


def give_up(why: str) -> NoReturn:
    """End for good: mark it, so that the batch script does not start the job again.

    Raises:
        RuntimeError: always.
    """
    environment = _environment()
    if environment is not None and environment.cluster == "slurm":
        atomic.write_text(final_mark(environment.paths.folder, environment.job_id), why)
    raise RuntimeError(why)


def requeue(job: Restartable, line: str) -> NoReturn:
    """Put the job that this process is in back into the queue, as submitit does it; ends the process.

    Rank 0 does it, once, for all. No rank leaves a result behind, which would tell submitit that the job is over, and
    all end with code 0 (the local executor: submitit's code for it), so that no rank takes the step of rank 0 down
    before it is done. Job arrays are requeued by their own id (``123_4``). In a container without Slurm's programs rank
    0 ends with code 75, and the batch script does it.

    Raises:
        RuntimeError: it was requeued as often as it may.
        SystemExit: otherwise.
    """
    from submitit.core.utils import DelayedSubmission, temporary_save_path

    environment = _environment()
    if environment is None or environment.cluster == "debug":
        raise RuntimeError(f"'{line}' was asked to stop and is saved; start it again, it goes on")
    # What would come now is asked already; submitit's handler would requeue a second time.
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if job.restarts <= 0:
        give_up(f"'{line}' was preempted after {MOST_RESTARTS} restarts; submit it again, it goes on")
    if environment.global_rank != 0:
        raise SystemExit(0)
    pickle = environment.paths.submitted_pickle
    delayed = DelayedSubmission.load(pickle)
    again = DelayedSubmission(dataclasses.replace(job, restarts=job.restarts - 1))
    # Time-outs count for nothing here: the restarts are bounded, and each one of them began from a new checkpoint.
    countdown = delayed._timeout_countdown
    again.set_timeout(delayed._timeout_min, countdown)
    with temporary_save_path(pickle) as temporary:
        again.dump(temporary)
    try:
        environment._requeue(countdown)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"launch: saved; the batch script is to requeue the job, since this process cannot ({error})", flush=True)
        raise SystemExit(EXIT_CODE) from None
    raise SystemExit(0)


def check(job: RecipeJob) -> int:
    """Exit code of reading the job's recipe here: a misspelled key is found before the queue, not behind it."""
    from nanodist.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        return main([*job.arguments(), "--print-recipe"])
