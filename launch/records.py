"""What is known of each job of a sweep: one small file a job, written by who runs it, readable at any time.

A sweep's folder holds ``jobs.jsonl`` (what was ever submitted; ``jobs-P.jsonl`` where part P of it was written by
another), ``helpers.jsonl`` (what several jobs need, such as the features of an encoder), ``allocations.jsonl`` (which
jobs went to the queue together, and under which number), and for a job with fingerprint F ``records/F.json``,
``logs/F.log`` and ``runs/F``. Nothing is locked: each file has one writer at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hpc import atomic

BEAT_S = 15.0
STALE_S = 120.0
SAME_FAILURES = 2
MOST_TRIES = 5
FINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """One member of a sweep.

    Attributes:
        fingerprint: identity of its recipe and inputs.
        point: what the sweep set for it.
        arguments: the command line after ``nanodist``.
        needs: fingerprints of the helpers that have to be done before it.
        then: a second command line that follows in the same process, unless the folder of its ``--out`` is there.
    """

    fingerprint: str
    point: dict[str, Any]
    arguments: list[str]
    needs: list[str] = field(default_factory=list)
    then: list[str] = field(default_factory=list)


_OF_A_JOB = tuple(one.name for one in fields(Job))


@dataclass(frozen=True)
class Record:
    """How far a job came.

    Attributes:
        state: queued, running, stopped (preempted, to go on), done, failed or cancelled.
        failures: of each try that failed, why.
        allocation, host: where it ran last.
        began, ended: of the last try, in seconds since 1970.
        seconds: of all tries together; of them ``training_s`` in the command itself.
    """

    state: str = "queued"
    failures: list[str] = field(default_factory=list)
    allocation: str = ""
    host: str = ""
    began: float = 0.0
    ended: float = 0.0
    seconds: float = 0.0
    training_s: float = 0.0
    starts: int = 0

    @property
    def final(self) -> bool:
        """Whether nothing more will be done by itself."""
        return self.state in FINAL

    def anew(self) -> Record:
        """A new submission is a new chance; what it cost so far still counts."""
        return Record(seconds=self.seconds, training_s=self.training_s, starts=self.starts)

    def begun(self, allocation: str, host: str) -> Record:
        """A try begins now."""
        return replace(
            self, state="running", allocation=allocation, host=host, began=time.time(), starts=self.starts + 1
        )

    def finished(self, state: str, seconds: float, training_s: float, failure: str = "") -> Record:
        """The try ended now; a failure that came before, or one too many, is final."""
        failures = [*self.failures, *([failure] if failure else [])]
        again = failures.count(failure) < SAME_FAILURES and len(failures) < MOST_TRIES
        if state == "failed" and again:
            state = "queued"
        now, total = time.time(), self.seconds + seconds
        training = self.training_s + training_s
        return replace(self, state=state, failures=failures, ended=now, seconds=total, training_s=training)


class SweepFolder:
    """The files of one sweep."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self.path.name

    def make(self) -> None:
        """Make what is missing; the folder of pickles is for its owner alone."""
        for name in ("records", "logs", "runs"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        (self.path / "submitit").mkdir(mode=0o700, exist_ok=True)

    def run_dir(self, fingerprint: str) -> Path:
        """Where a job's run lives."""
        return self.path / "runs" / fingerprint

    def log(self, fingerprint: str) -> Path:
        """What a job said, in all its tries."""
        return self.path / "logs" / f"{fingerprint}.log"

    def _record_path(self, fingerprint: str) -> Path:
        return self.path / "records" / f"{fingerprint}.json"

    def record(self, fingerprint: str) -> Record:
        """What is known of a job; a fresh record where nothing is."""
        try:
            return Record(**json.loads(self._record_path(fingerprint).read_text()))
        except (OSError, ValueError, TypeError):
            return Record()

    def write(self, fingerprint: str, record: Record) -> None:
        """Write a record whole."""
        atomic.write_json(self._record_path(fingerprint), asdict(record))

    def beat(self, fingerprint: str) -> None:
        """The job is alive: the time of its record is now."""
        with contextlib.suppress(OSError):
            os.utime(self._record_path(fingerprint))

    def silent_s(self, fingerprint: str) -> float:
        """Seconds since a record was last written or touched."""
        try:
            return time.time() - self._record_path(fingerprint).stat().st_mtime
        except OSError:
            return 0.0

    def cancel_mark(self, fingerprint: str) -> Path:
        """The file whose presence tells who runs a job to end it."""
        return self.path / "records" / f"{fingerprint}.cancel"

    def jobs(self, part: str | None = None) -> dict[str, Job]:
        """All jobs that were ever submitted (or those of one part), by fingerprint, in their order."""
        return self._listed("jobs", part)

    def helpers(self, part: str | None = None) -> dict[str, Job]:
        """What jobs need, by fingerprint: they run as jobs do, and have no row in the table."""
        return self._listed("helpers", part)

    def job(self, fingerprint: str) -> Job:
        """A job or a helper.

        Raises:
            KeyError: there is none of that fingerprint.
        """
        return {**self.helpers(), **self.jobs()}[fingerprint]

    def _listed(self, name: str, part: str | None) -> dict[str, Job]:
        own = self.path / f"{name}.jsonl"
        paths = [own, *sorted(self.path.glob(f"{name}-*.jsonl"))] if part is None else [self._part(name, part)]
        # What a later version says beside is none of ours.
        lines = ({n: line[n] for n in _OF_A_JOB if n in line} for path in paths for line in read_lines(path))
        return {line["fingerprint"]: Job(**line) for line in lines}

    def _part(self, name: str, part: str) -> Path:
        return self.path / (f"{name}-{part}.jsonl" if part else f"{name}.jsonl")

    def add_jobs(self, jobs: Iterable[Job]) -> None:
        """Remember jobs that are new."""
        self._add("jobs", jobs, self.jobs())

    def add_helpers(self, helpers: Iterable[Job]) -> None:
        """Remember helpers that are new."""
        self._add("helpers", helpers, self.helpers())

    def _add(self, name: str, jobs: Iterable[Job], known: dict[str, Job]) -> None:
        append_lines(self._part(name, ""), [asdict(job) for job in jobs if job.fingerprint not in known])

    def write_part(self, part: str, jobs: Iterable[Job], helpers: Iterable[Job]) -> None:
        """Write a part whole; only one process may be the writer of a part."""
        for name, members in (("helpers", helpers), ("jobs", jobs)):
            text = "".join(json.dumps(asdict(job)) + "\n" for job in members)
            atomic.write_text(self._part(name, part), text)

    def allocations(self) -> list[dict[str, Any]]:
        """``id``, ``cluster``, ``fingerprints`` and more of each, in the order of submission.

        Of one that was submitted before its jobs were known, these are looked up, and none before they are known.
        """
        found = read_lines(self.path / "allocations.jsonl")
        parts: dict[tuple[str, str], list[str]] = {}
        for line in found:
            if "slice" in line:
                key = (line["list"], line["part"])
                if key not in parts:
                    parts[key] = [*self._listed(*key)]
                begin, end = line["slice"]
                line["fingerprints"] = parts[key][begin:end]
        return found

    def add_allocation(self, number: str, cluster: str, **what: Any) -> None:
        """Remember what went to the queue together: ``fingerprints``, or ``list``, ``part`` and ``slice``."""
        append_lines(self.path / "allocations.jsonl", [{"id": number, "cluster": cluster, **what, "time": time.time()}])

    def last_words(self, fingerprint: str, count: int = 5) -> list[str]:
        """The last lines of a job's log that say something."""
        try:
            with open(self.log(fingerprint), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []
        return [line.strip() for line in lines if line.strip()][-count:]


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add JSON objects to a file, one a line."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; none where there is no file, and none of a torn line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
