"""What a pipeline runs between its trainings and its fan-outs: an export with the fan-out's plan, and the page."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from pathlib import Path
from typing import Any

from launch.jobs import MOST_RESTARTS, USER_CODE, give_up
from launch.snapshot import changed


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a pipeline as it stands.

    Attributes:
        name: of the step, such as ``pretrain 3f2a90c1d7e4``.
        state: done, queued, missing or failed.
        reason: why it failed.
        jobs: numbers in the queue.
    """

    name: str
    state: str
    reason: str = ""
    jobs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a pipeline in a job.

    Args:
        definition: of the pipeline, as :class:`launch.pipeline.Pipeline` takes it.
        name: ``export`` or ``page``.
        encoder: fingerprint of the pretraining that is exported.
        restarts: how often it may be put back into the queue.
    """

    definition: dict[str, Any]
    name: str
    encoder: str = ""
    restarts: int = MOST_RESTARTS

    def __call__(self) -> str:
        """Do it; it may have been done, wholly or in part, by an earlier start.

        Raises:
            RuntimeError: it cannot be done, and starting it again would not help.
        """
        from hpc.errors import UserError
        from launch.pipeline import Pipeline

        for sentence in changed():
            print(f"launch: warning: {sentence}", file=sys.stderr)
        try:
            pipeline = Pipeline(**self.definition)
            if self.name == "export":
                return str(pipeline.export_encoder(self.encoder))
            return str(pipeline.write_page())
        except UserError as error:
            give_up(f"{self.name}: {error}")
        except Exception:
            # What breaks here breaks again.
            traceback.print_exc()
            give_up(f"{self.name}: {traceback.format_exc().strip().splitlines()[-1]}")

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """What submitit puts into the queue when it is preempted: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


def export(run_dir: Path, to: Path, options: dict[str, Any]) -> None:
    """``nanodist export`` of a finished run, unless that was done before.

    Raises:
        RuntimeError: it failed; the reason stands on standard error.
    """
    from nanodist.cli import main

    if to.is_dir():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    line = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code = main(["export", str(run_dir), "--to", str(to), *line])
    if code != 0:
        what = "the input is wrong" if code == USER_CODE else "it failed"
        raise RuntimeError(f"nanodist export {run_dir}: {what} (exit code {code})")
