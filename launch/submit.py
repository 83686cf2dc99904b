"""Hands jobs to submitit, and waits for them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc.end_note import VARIABLE
from hpc.errors import UserError
from launch import snapshot
from launch.after import LOG_BEGIN
from launch.resources import SlurmResources

CLUSTERS = ("slurm", "local", "debug")
_LOG_LINES = 5
_SIGNAL_DELAY_S = 180


def submit(
    function: Callable[[], Any],
    resources: SlurmResources,
    cluster: str,
    folder: str | Path,
    name: str = "nanodist",
    after: Sequence[str] = (),
) -> Any:
    """Submit ``function`` as one job; its logs and pickles go to ``folder``, one file a process.

    Args:
        function: picklable, and callable from the start again.
        resources: what the job asks for.
        cluster: ``"slurm"``; ``"local"`` for processes of this machine; ``"debug"`` for this very process.
        folder: created if it is missing; readable by the nodes.
        name: the job's name in the queue.
        after: conditions of Slurm on other jobs, such as ``afterok:12``; where one cannot come true any more the job is
            taken out of the queue.

    Returns:
        submitit's job.

    Raises:
        UserError: submitit or Slurm is missing, or the cluster cannot give the resources.
    """
    executor = make_executor(resources, cluster, folder, name, after=after)
    try:
        with environment_of(executor):
            return executor.submit(function)
    except Exception as error:
        raise _refused(error, cluster) from None


def make_executor(
    resources: SlurmResources,
    cluster: str,
    folder: str | Path,
    name: str,
    parallel: int | None = None,
    after: Sequence[str] = (),
) -> Any:
    """submitit's executor; arguments and errors as for :func:`submit`. Its jobs run a copy of the present code.

    Args:
        resources, cluster, folder, name, after: see there.
        parallel: members of a job array that may run at a time.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("launch needs submitit: pip install 'nanodist[train]'") from None
    if cluster not in CLUSTERS:
        raise UserError(f"cluster is '{cluster}'; allowed: {', '.join(CLUSTERS)}")
    if cluster != "slurm" and resources.nodes > 1:
        raise UserError(f"cluster '{cluster}' is this machine alone: nodes must be 1, not {resources.nodes}")
    if cluster == "debug" and resources.tasks() > 1:
        raise UserError("cluster 'debug' runs in this process: tasks_per_node must be 1; use 'local' for several")
    Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    code = None if cluster == "debug" else snapshot.freeze(folder)
    parameters = {**resources.submitit_parameters(cluster), **_preemption(resources, cluster, Path(folder), code)}
    if parallel is not None and cluster == "slurm":
        parameters["slurm_array_parallelism"] = parallel
    if after and cluster == "slurm":
        parameters["slurm_dependency"] = ",".join(after)
    python = {} if cluster == "debug" else {f"{cluster}_python": resources.python(cluster)}
    try:
        executor: Any = submitit.AutoExecutor(folder=folder, cluster=cluster, **python)
        executor.update_parameters(**parameters, name=name)
    except Exception as error:
        raise _refused(error, cluster) from None
    # A batch script sets them itself.
    environment = {**resources.environment, **snapshot.environment(code)} if code is not None else {}
    executor.nanodist_environment = environment if cluster == "local" else {}
    return executor


@contextlib.contextmanager
def environment_of(executor: Any) -> Iterator[None]:
    """The variables that a local job takes from the process that submits it."""
    wanted: dict[str, str] = getattr(executor, "nanodist_environment", {})
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _refused(error: Exception, cluster: str) -> Exception:
    """A sentence for the user where the cluster refused; any other error as it is."""
    import submitit

    if isinstance(error, (RuntimeError, OSError, submitit.core.utils.FailedSubmissionError)):
        return UserError(f"the job cannot be submitted to {cluster}: {' '.join(str(error).split())}")
    return error


def _preemption(resources: SlurmResources, cluster: str, folder: Path, code: Path | None) -> dict[str, Any]:
    """What makes a job of Slurm stoppable and requeueable, whatever the cluster's defaults are."""
    if cluster != "slurm" or code is None:
        return {}
    # SIGUSR2 so long before the end of the time, which is longer than a step and a save; shorter in a short job.
    delay = min(_SIGNAL_DELAY_S, 60 * resources.time_min // 4)
    place = shlex.quote(str(folder.absolute()))
    before = [
        "nanodist_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "nanodist_job=${nanodist_job:-$SLURM_JOB_ID}",
        f'export {VARIABLE}={place}/"$nanodist_job.end"',
        f'export {LOG_BEGIN}=$(stat --format=%s {place}/"${{nanodist_job}}_0_log.err" 2> /dev/null || echo 0)',
    ]
    # srun stands before it. A shell that is ended from outside (scancel) does not come so far.
    behind = [
        "nanodist_code=$?",
        f'[ "$nanodist_code" -eq 0 ] || {shlex.quote(sys.executable)} -m launch.after {place} "$nanodist_job" '
        '"$nanodist_code"',
        'exit "$nanodist_code"',
    ]
    return {
        "slurm_signal_delay_s": delay,
        "slurm_additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
        "slurm_setup": [*before, *resources.shell_lines(), *snapshot.shell_lines(code)],
        "slurm_teardown": behind,
    }


def wait(job: Any) -> str | None:
    """Wait for the end of a job; ``None`` if it succeeded, else why not, and what its processes last said."""
    # A debug job would open a debugger on an error in results(), but not in exception().
    error = job.exception()
    if error is None:
        return None
    said = dict.fromkeys(line for rank in range(job.num_tasks) for line in _last_words(job, rank))
    return "\n".join([_reason(str(error)) or type(error).__name__, *said])


def _reason(text: str) -> str:
    """The exception at the end of the trace that submitit's error quotes, or its first line."""
    raised = re.findall(r"^[\w.]*(?:Error|Exit|Exception|Interrupt)\b.*", text, flags=re.MULTILINE)
    return raised[-1] if raised else text.strip().partition("\n")[0]


def _last_words(job: Any, rank: int) -> list[str]:
    """The last lines that a process wrote to standard error before the trace."""
    path = job.paths.folder / f"{job.job_id}_{rank}_log.err"
    if not path.exists():
        return []
    words = path.read_text(errors="replace").partition("Traceback (most recent call last)")[0]
    return [line for line in words.splitlines() if line.strip() and not line.startswith("submitit ")][-_LOG_LINES:]


def announce(job: Any, folder: str | Path) -> None:
    """Say on standard error where the job's logs are."""
    print(f"job {job.job_id}; logs in {Path(folder)}", file=sys.stderr)
