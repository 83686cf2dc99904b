"""Runs the jobs of one allocation: one after the other, or some side by side, each in a process of its own.

The process that submitit starts imports what all jobs need, once, and forks for each: a job begins at once, and may
crash or be killed without its neighbours. Signals come to this process, which hands them on; a job then saves at its
step boundary, and the allocation goes back into the queue with what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hpc.preemption import EXIT_CODE
from launch.jobs import MOST_RESTARTS, USER_CODE, give_up, requeue
from launch.records import BEAT_S, FINAL, Job, Record, SweepFolder
from launch.snapshot import changed

_POLL_S = 0.1
# What tells a process its place in a job of several; each job of a sweep is a process alone.
_PLACES = ("SLURM", "SUBMITIT", "PMI", "OMPI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "NANODIST_EXPORTED")
_EAGER = ("torch", "numpy", "timm", "kornia", "deepspeed", "nanodist.downstream.finetune.run", "nanodist.pretrain.run")


@dataclass(frozen=True)
class Allocation:
    """The jobs that share an allocation, as submitit's callable.

    Args:
        folder: of the sweep.
        fingerprints: of the jobs.
        side_by_side: how many run at once; they share cores and GPUs evenly.
        restarts: how often it may still be put back into the queue after it was preempted.
        required: it fails where a job of it does, so that what depends on it is not started.
    """

    folder: str
    fingerprints: tuple[str, ...]
    side_by_side: int = 1
    restarts: int = MOST_RESTARTS
    required: bool = False

    def names(self) -> Sequence[str]:
        """Fingerprints of the jobs."""
        return self.fingerprints

    def __call__(self) -> dict[str, str]:
        """Run what is not final yet; the state of each job.

        Raises:
            SystemExit: preempted; it is in the queue again.
            RuntimeError: a job failed, and all are ``required``.
        """
        for sentence in changed():
            print(f"launch: warning: {sentence}", file=sys.stderr)
        names = self.names()
        worker = _Worker(SweepFolder(self.folder), self.side_by_side)
        if worker.run(names):
            requeue(self, f"{len(names)} jobs of {self.folder}")
        states = {name: worker.folder.record(name).state for name in names}
        bad = [name for name, state in states.items() if state != "done"]
        if self.required and bad:
            failures = worker.folder.record(bad[0]).failures
            give_up(f"{bad[0]} is {states[bad[0]]}: {failures[-1] if failures else 'no reason is known'}")
        return states

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """What submitit puts into the queue when it is preempted: the same, since the records say what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


@dataclass(frozen=True)
class Chunk(Allocation):
    """An allocation that was submitted before its jobs were known.

    Args:
        listed: ``jobs`` or ``helpers`` of the folder.
        part: of these, written by a job that this one waits for.
        slice: begin and end in the part.
    """

    listed: str = "jobs"
    part: str = ""
    slice: tuple[int, int] = (0, 0)

    def names(self) -> Sequence[str]:
        """Fingerprints of the jobs, known by now."""
        folder = SweepFolder(self.folder)
        members = folder.jobs(self.part) if self.listed == "jobs" else folder.helpers(self.part)
        return [*members][self.slice[0] : self.slice[1]]


@dataclass
class _Running:
    fingerprint: str
    slot: int
    record: Record
    log_begin: int
    cancelled: bool = False


class _Worker:
    def __init__(self, folder: SweepFolder, side_by_side: int) -> None:
        self.folder, self._slots = folder, list(range(max(1, side_by_side)))
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._running: dict[int, _Running] = {}
        self._asked, self._told, self._beaten = False, False, 0.0

    def run(self, fingerprints: Sequence[str]) -> bool:
        """Run all that is not final; whether it was asked to stop before the end."""
        waiting = [name for name in fingerprints if not self.folder.record(name).final]
        if waiting:
            _import_all()
        with self._listening():
            while self._running or (waiting and not self._asked):
                while waiting and not self._asked and len(self._running) < len(self._slots):
                    self._start(waiting.pop(0))
                self._hand_on()
                waiting += self._reap()
                if time.monotonic() - self._beaten > BEAT_S:
                    self._beaten = time.monotonic()
                    for job in self._running.values():
                        self.folder.beat(job.fingerprint)
                time.sleep(_POLL_S)
        return bool(waiting) or any(not self.folder.record(name).final for name in fingerprints)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals to this process set a flag; submitit's handler would requeue at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self._asked = True

        old = {number: signal.signal(number, note) for number in (signal.SIGUSR2, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _start(self, fingerprint: str) -> None:
        if self.folder.cancel_mark(fingerprint).exists():
            self.folder.write(fingerprint, self.folder.record(fingerprint).finished("cancelled", 0.0, 0.0))
            return
        slot = min(set(self._slots) - {job.slot for job in self._running.values()})
        allocation = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or str(os.getpid())
        record = self.folder.record(fingerprint).begun(allocation, socket.gethostname())
        self.folder.write(fingerprint, record)
        log = self.folder.log(fingerprint)
        begin = log.stat().st_size if log.exists() else 0
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._be(fingerprint, slot)
        self._running[pid] = _Running(fingerprint, slot, record, begin)

    def _be(self, fingerprint: str, slot: int) -> None:
        """What the forked process does; never returns."""
        code = 1
        try:
            os.setsid()  # signals come from the worker alone, and once
            for number in (signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            log = os.open(self.folder.log(fingerprint), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # What Python writes goes there too, wherever the worker's own output went.
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            self._take_share(slot)
            began = time.monotonic()
            code = _do(self.folder.job(fingerprint))
            print(f"launch: ended with {code} after {time.monotonic() - began:.2f} s", file=sys.stderr)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _take_share(self, slot: int) -> None:
        """The place of a process alone, and the slot's share of cores and GPUs."""
        for name in [name for name in os.environ if name.startswith(_PLACES)]:
            del os.environ[name]
        count = len(self._slots)
        if count == 1:
            return
        mine = self._cores[slot::count] or self._cores[slot % max(1, len(self._cores)) :][:1]
        if mine:
            os.sched_setaffinity(0, mine)
            os.environ["OMP_NUM_THREADS"] = str(len(mine))
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]

    def _hand_on(self) -> None:
        """A wish to stop goes to all jobs once, and a cancellation to the one that is meant."""
        tell, self._told = self._asked and not self._told, self._asked
        for pid, job in self._running.items():
            if not job.cancelled and self.folder.cancel_mark(job.fingerprint).exists():
                job.cancelled = True
                os.kill(pid, signal.SIGTERM)
            elif tell:
                os.kill(pid, signal.SIGUSR2)

    def _reap(self) -> list[str]:
        """Record the ends of jobs; those to be tried again, by fingerprint."""
        again = []
        for pid in list(self._running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            job = self._running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            state = _state(code, job.cancelled, self._asked)
            failure = self._failure(job, code) if state == "failed" else ""
            seconds = time.time() - job.record.began
            record = job.record.finished(state, seconds, self._training_s(job.fingerprint), failure)
            if state == "failed" and code == USER_CODE:
                record = dataclasses.replace(record, state="failed")  # the user's to mend
            self.folder.write(job.fingerprint, record)
            if record.state not in (*FINAL, "stopped"):
                again.append(job.fingerprint)
        return again

    def _failure(self, job: _Running, code: int) -> str:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = [w for w in self.folder.last_words(job.fingerprint, 6) if not w.startswith("launch: ended")]
        return f"{how}: {words[-1]}" if words and code >= 0 else how

    def _training_s(self, fingerprint: str) -> float:
        """Seconds that the command itself took, as its log says; 0 where it was killed."""
        said = [w for w in self.folder.last_words(fingerprint, 3) if w.startswith("launch: ended with ")]
        return float(said[-1].split()[-2]) if said else 0.0


def _state(code: int, cancelled: bool, asked: bool) -> str:
    if cancelled and code != 0:
        return "cancelled"
    if asked and code in (-signal.SIGUSR2, -signal.SIGTERM):
        return "stopped"  # it had not come so far as to listen, or is of a kind that does not
    return {0: "done", EXIT_CODE: "stopped"}.get(code, "failed")


def _do(job: Job) -> int:
    """Run a job's command, and the one that follows; the exit code."""
    from nanodist.cli import main

    code = main(job.arguments)
    made = [Path(text.partition("=")[2]) for text in job.then if text.startswith("--out=")]
    if code != 0 or not job.then or (made and made[0].is_dir()):
        return code
    return main(job.then)


def run_here(folder: SweepFolder, fingerprints: Sequence[str]) -> None:
    """Run jobs in this very process, one after the other, with what they print on its own output."""
    for name in fingerprints:
        record = folder.record(name).begun(str(os.getpid()), socket.gethostname())
        folder.write(name, record)
        began, failure = time.monotonic(), ""
        try:
            code = _do(folder.job(name))
        except Exception as error:
            traceback.print_exc()
            code, failure = 1, f"{type(error).__name__}: {error}"
        seconds, state = time.monotonic() - began, _state(code, False, False)
        record = record.finished(state, seconds, seconds, failure or f"exit code {code}" if state == "failed" else "")
        # Nobody is here to try again.
        folder.write(name, dataclasses.replace(record, state=state))


def _import_all() -> None:
    """Import what takes seconds before the first fork. What is missing is the jobs' to say."""
    import importlib

    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    for name in _EAGER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
