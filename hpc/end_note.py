"""How the start before this one ended, as the batch script saw it.

A rank that is killed records nothing itself. ``slurm/restart.sh`` therefore writes what ``srun`` returned, and what
Slurm said, to the file that NANODIST_END_NOTE names; the next start puts it into ``run.json``.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

from hpc.watchdog import EXIT_CODE as HUNG

VARIABLE = "NANODIST_END_NOTE"
_MEMORY = re.compile(r"oom.?kill|out of memory|out_of_memory|exceeded .*memory|memory limit", re.IGNORECASE)
REQUEUED = "requeued by Slurm, as after a node's death"
_MOST_BYTES = 1 << 16


def former_end(environ: Mapping[str, str] = os.environ) -> str | None:
    """A sentence about the end of the start before this one; ``None`` where no note was left."""
    path = environ.get(VARIABLE)
    if not path or not int(environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    try:
        with open(Path(path), "rb") as file:
            lines = file.read(_MOST_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return REQUEUED
    fields = dict(line.split("=", 1) for line in lines[:4] if "=" in line)
    # A start whose node died leaves no note, so that one may be of an earlier start.
    if fields.get("restarts") != str(int(environ.get("SLURM_RESTART_COUNT") or 0) - 1):
        return REQUEUED
    said = [line for line in lines[4:] if line.strip()]
    memory = next((line for line in said if _MEMORY.search(line)), None)
    if memory is not None:
        return f"killed for memory ({memory.strip()}); lower train.micro_batch_size or ask for more --mem"
    return _by_code(fields, said)


def _by_code(fields: Mapping[str, str], said: list[str]) -> str:
    try:
        code = int(fields["exit"])
    except (KeyError, ValueError):
        return "ended without a code"
    if fields.get("reason") == "TimeLimit":
        return "ended at the job's time limit"
    first = f" ({said[0].strip()})" if said else ""
    if code == HUNG or any(line.rstrip().endswith(f"Exited with exit code {HUNG}") for line in said):
        return f"hung: ended by the watchdog, which wrote all stacks{first}"
    if said and said[0].rstrip().endswith(": Killed"):
        # srun returns the highest code, and it ended the other ranks with SIGTERM: 143 is more than 137.
        code = 128 + signal.SIGKILL
    if fields.get("ended") == "yes":
        return f"ended from outside, by a signal to the whole job{first}"
    if code > 128:
        return f"a rank was killed by signal {code - 128}{first}"
    return f"a rank failed with exit code {code}{first}"
