"""What follows where the processes of a Slurm job did not all end well: it is started again, a bounded number of times.

``python -m launch.after FOLDER JOB CODE`` runs in the batch script behind ``srun``, since Slurm requeues by itself only
for a node's death. A process that was killed, hung or crashed left no result, and progress lies in the run directory,
so the same job goes on. Final is what a process marked as such (wrong input), and the last of :data:`MOST_FAILURES`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc.end_note import VARIABLE
from hpc.preemption import EXIT_CODE

MOST_FAILURES = 20
LOG_BEGIN = "NANODIST_LOG_BEGIN"
_SLURM_SAYS = re.compile(r"^(srun|slurmstepd)[^ ]*: ")
_NOTED_LINES = 40


def final_mark(folder: Path, job: str) -> Path:
    """The file that says, with a sentence, that starting the job again helps nothing."""
    return folder / f"{job}.final"


def main(argv: Sequence[str]) -> int:
    """Requeue the job that this batch script is of, or let it end with a result that says why."""
    folder, job, code = Path(argv[0]), argv[1], int(argv[2])
    environ = os.environ
    _write_note(folder, job, code, environ)
    mark, failures = final_mark(folder, job), folder / f"{job}.failures"
    if mark.exists():
        return _end(folder, job, mark.read_text(), environ)
    if code != EXIT_CODE:
        with open(failures, "a", encoding="utf-8") as file:
            file.write(f"restart={environ.get('SLURM_RESTART_COUNT', '0')} exit={code}\n")
    count = len(failures.read_text().splitlines()) if failures.exists() else 0
    if count > MOST_FAILURES:
        return _end(folder, job, f"failed {count} times, the last time with exit code {code}; submit it again", environ)
    print(f"launch: the job ended with {code}; requeueing it (failure {count} of {MOST_FAILURES})", file=sys.stderr)
    for left in folder.glob(f"{job}_*_result.pkl"):
        left.unlink()  # of the processes that went down with another one
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return _end(folder, job, f"ended with exit code {code} and cannot be requeued ({error})", environ)
    return 0


def _write_note(folder: Path, job: str, code: int, environ: Mapping[str, str]) -> None:
    """For the next start's ``run.json``: see :mod:`hpc.end_note`."""
    lines = [f"restarts={environ.get('SLURM_RESTART_COUNT') or 0}", f"exit={code}", "ended=no", "reason="]
    try:
        with open(folder / f"{job}_0_log.err", "rb") as file:
            file.seek(int(environ.get(LOG_BEGIN) or 0))
            said = file.read().decode("utf-8", "replace").splitlines()
        lines += [line for line in said if _SLURM_SAYS.match(line)][-_NOTED_LINES:]
        Path(environ[VARIABLE]).write_text("\n".join([*lines, ""]), encoding="utf-8")
    except (OSError, KeyError) as error:
        print(f"launch: no note of this end for the next start ({error})", file=sys.stderr)


def _end(folder: Path, job: str, why: str, environ: Mapping[str, str]) -> int:
    """Give a result to each process that has none, so that who waits for the job learns of its end."""
    from submitit.core.utils import cloudpickle_dump, temporary_save_path

    print(f"launch: the job {why}", file=sys.stderr)
    for rank in range(int(environ.get("SLURM_NTASKS") or 1)):
        path = folder / f"{job}_{rank}_result.pkl"
        if not path.exists():
            with temporary_save_path(path) as temporary:
                cloudpickle_dump(("error", f"RuntimeError: the job {why}"), temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
