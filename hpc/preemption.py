"""Asked to stop: by a signal, or by the end of the job's time.

Nothing is done where a signal arrives. A handler only sets a flag; between two steps all ranks :func:`agree`, save
together and stop, so that no checkpoint is ever torn by the request to write it.

SIGUSR2 is what ``sbatch --signal=USR2@180`` sends (not SIGUSR1, which NCCL may take for itself), SIGTERM what Slurm,
Kubernetes, torchrun and mpiexec send before they kill, SIGINT is Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a job that only requeues need not import torch
    import torch

    from hpc.collectives import Group

EXIT_CODE = 75  # EX_TEMPFAIL: asked to stop, a new checkpoint is written, start me again
TIME_LIMIT = "time limit"
# In the order of their codes in the collective; the names of signals are those of the module signal.
REASONS = ("SIGUSR2", "SIGTERM", "SIGINT", TIME_LIMIT)
_Handler = Callable[[int, FrameType | None], Any] | int | None
_SQUEUE_TIMEOUT_S = 10.0


class Preemption:
    """Knows whether this process was asked to stop. Signals are seen from :meth:`install` to :meth:`uninstall`.

    Args:
        deadline: when the job will be killed, in seconds since 1970; ``None``: never.
        margin_s: how long before the deadline there is a reason to stop; to be longer than a step and a save.
    """

    def __init__(self, deadline: float | None = None, margin_s: float = 120.0) -> None:
        self.deadline, self.margin_s = deadline, margin_s
        self._signal: str | None = None
        self._old: dict[int, _Handler] = {}
        self._pid = os.getpid()

    def install(self) -> None:
        """Take the place of the handlers that are there, those of submitit too; from the main thread only."""
        self._pid = os.getpid()
        for name in REASONS[:3]:
            number = getattr(signal, name, None)  # Windows has no SIGUSR2
            if number is None:
                continue
            self._old[number] = signal.signal(number, self._note)
            if name != "SIGINT" and hasattr(signal, "siginterrupt"):
                # Writes and waits in C code go on as if nothing had come: not everybody's code retries them.
                signal.siginterrupt(number, False)

    def uninstall(self) -> None:
        """Put the old handlers back; what was noted stays noted."""
        for number, handler in self._old.items():
            # None: it was not set from Python, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    def ignore(self) -> None:
        """Hear nothing any more, to the very end: Python takes its own handlers away before a process is gone."""
        for number in self._old:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Preemption:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    @property
    def reason(self) -> str | None:
        """Why to stop: the first signal that came, or ``"time limit"``; ``None`` where there is no reason."""
        if self._signal is None and self.deadline is not None and time.time() >= self.deadline - self.margin_s:
            return TIME_LIMIT
        return self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child, such as a worker: it has nobody who would look at the flag, so it ends as it would have.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt  # the second Ctrl-C: somebody sits there and does not want to wait
        self._signal = self._signal or signal.Signals(number).name


def agree(reason: str | None, group: Group, device: torch.device | str) -> str | None:
    """The reason of the lowest rank that has one, the same on all ranks of ``group``; collective, of 8 bytes.

    Args:
        reason: one of :data:`REASONS`, or ``None``.
        group: of all ranks; ``None`` for one process.
        device: where the group's collectives run.
    """
    if group is None:
        return reason
    import torch
    import torch.distributed as dist

    size, code = dist.get_world_size(group), 0
    if reason is not None:
        code = (size - dist.get_rank(group)) * len(REASONS) + REASONS.index(reason)
    value = torch.tensor(code, dtype=torch.int64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    code = int(value.item())
    return REASONS[code % len(REASONS)] if code else None


def deadline_from_environment(environ: Mapping[str, str] = os.environ) -> float | None:
    """When Slurm ends this job, in seconds since 1970; ``None`` where that is not known or not limited.

    SLURM_JOB_END_TIME says it (Slurm 23.02 and later, or a batch script that exports it). Otherwise ``squeue`` is
    asked, by the first process of the step alone: a thousand ranks must not ask the controller, and :func:`agree`
    tells the others.
    """
    told = environ.get("SLURM_JOB_END_TIME", "")
    if told:
        return float(told) if told.isdigit() and int(told) > 0 else None
    if "SLURM_JOB_ID" not in environ or environ.get("SLURM_PROCID", "0") != "0":
        return None
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environ:
        # One member of an array has the number of the whole array.
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    answer = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, check=True
        ).stdout
    left = seconds(answer.strip())
    return None if left is None else time.time() + left


def seconds(text: str) -> float | None:
    """Slurm's ``[days-][[hours:]minutes:]seconds`` in seconds; ``None`` for anything else, such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if not match:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
