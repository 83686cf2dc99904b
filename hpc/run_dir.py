"""The run directory: one folder that says what a run is, how often it started, and what it measured.

``recipe.yaml``, ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``wandb/``, ``export/``, ``report/``, ``pictures/``.
Only rank 0 writes; any process may read at any time.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from hpc import atomic
from hpc.config import changes, parse_yaml
from hpc.errors import UserError

SCHEMA = 1
KILLED = "killed or crashed (no end was recorded)"


class RunDir:
    """The places inside a run directory, and the record of the run's starts in ``run.json``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_path = self.path / "recipe.yaml"
        self.record_path = self.path / "run.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.wandb = self.path / "wandb"
        self.export_dir = self.path / "export"
        self.report = self.path / "report"
        self.pictures = self.path / "pictures"

    @classmethod
    def prepare(
        cls, path: str | Path, recipe_yaml: str, fingerprint: str, what: Mapping[str, Any] | None = None
    ) -> RunDir:
        """Make the run directory, or open the one that is there for a resume. For rank 0 only.

        Args:
            path: the directory; a new one appears whole or not at all.
            recipe_yaml: the full recipe. At a resume it replaces the recorded one, since machine keys may change.
            fingerprint: the identity of the run.
            what: the half of the recipe (and the hashes of its inputs) that the fingerprint is made of. It is kept
                in ``run.json`` so that a later mismatch can name the changed keys.

        Raises:
            UserError: the directory holds a run with another fingerprint, or other files, or cannot be written.
        """
        run = cls(path)
        try:
            if run.record_path.exists():
                run._check_identity(fingerprint, recipe_yaml, what)
                atomic.write_text(run.recipe_path, recipe_yaml)
            else:
                run._create(recipe_yaml, fingerprint, what)
            for folder in (run.checkpoints, run.wandb, run.export_dir, run.report, run.pictures):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and run.path.exists():
                raise UserError(f"run_dir {run.path} exists and holds no run (no run.json); choose another") from None
            raise UserError(f"run_dir {run.path} cannot be written: {error.strerror or error}") from None
        return run

    def _create(self, recipe_yaml: str, fingerprint: str, what: Mapping[str, Any] | None) -> None:
        record = {"schema": SCHEMA, "fingerprint": fingerprint, "created": _now(), "what": what, "starts": []}
        with atomic.directory(self.path) as temporary:
            atomic.write_text(temporary / self.recipe_path.name, recipe_yaml)
            atomic.write_json(temporary / self.record_path.name, record)

    def withdraw(self) -> None:
        """Remove a directory that no start has used, so that another recipe may have its name. For rank 0 only."""
        if self.record()["starts"]:
            return
        folders = [self.checkpoints, self.wandb, self.export_dir, self.report, self.pictures]
        with contextlib.suppress(OSError):
            if {*self.path.iterdir()} != {*folders, self.recipe_path, self.record_path}:
                return  # somebody else's file is in it
            for folder in folders:
                folder.rmdir()
            self.recipe_path.unlink()
            self.record_path.unlink()
            self.path.rmdir()

    def _check_identity(self, fingerprint: str, recipe_yaml: str, what: Mapping[str, Any] | None) -> None:
        record = self.record()
        if record["fingerprint"] == fingerprint:
            return
        if what is not None and record.get("what") is not None:
            changed = changes(record["what"], json.loads(json.dumps(what)))
        else:
            changed = changes(
                parse_yaml(self.recipe_path.read_text(), "recipe.yaml"), parse_yaml(recipe_yaml, "recipe")
            )
        raise UserError(
            f"run_dir {self.path} holds another run (fingerprint {record['fingerprint']}, now {fingerprint}); "
            f"changed: {'; '.join(changed) or 'the inputs'}. Choose another run_dir, or take the changes back to resume"
        )

    def record(self) -> dict[str, Any]:
        """What ``run.json`` holds: ``schema``, ``fingerprint``, ``created``, ``what``, ``starts``.

        Raises:
            UserError: it is missing, no JSON, or of another schema.
        """
        try:
            record = json.loads(self.record_path.read_text())
        except OSError:
            raise UserError(f"{self.path} is not a run directory: it has no run.json") from None
        except ValueError as error:
            raise UserError(f"{self.record_path} is damaged: {error}") from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UserError(f"{self.record_path} has another schema than {SCHEMA}: written by another nanodist?")
        return record

    def begin_start(
        self,
        topology: Mapping[str, Any],
        first_step: int,
        hosts: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
        former_end: str | None = None,
    ) -> int:
        """Record a start of the run, and return its number from 0.

        A start before it that recorded no end was killed; it is marked so, with the last step that it logged.

        Args:
            topology: ``Topology.as_dict()`` of rank 0.
            first_step: the first step that this start will train.
            hosts: host names of the ranks; this host alone if empty.
            versions: versions beside the ones of the installed packages.
            former_end: what is known of how the start before it ended, such as ``"killed for memory (Slurm:
                OUT_OF_MEMORY)"``, used where it recorded no end itself, and before what it recorded where that is only
                how rank 0 fared when another rank was killed.

        Raises:
            UserError: ``run.json`` cannot be read or written.
        """
        record = self.record()
        unended = [start for start in record["starts"] if start["reason"] is None]
        if unended:
            logged = [line["step"] for line in metric_lines(self.metrics_path)]
        for start in unended:
            known = former_end if start is record["starts"][-1] else None
            start["reason"] = known or KILLED
            start["last_step"] = logged[-1] if logged and logged[-1] >= start["first_step"] else None
        _blame(record["starts"], former_end)
        record["starts"].append(
            {
                "began": _now(),
                "ended": None,
                "first_step": first_step,
                "last_step": None,
                "reason": None,
                "launcher": topology.get("launcher"),
                "hosts": sorted(set(hosts)) or [socket.gethostname()],
                "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
                "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT"),
                "topology": dict(topology),
                "versions": {**package_versions(), **(versions or {})},
                "git_commit": git_commit(),
            }
        )
        try:
            atomic.write_json(self.record_path, record)
        except OSError as error:
            raise UserError(f"{self.record_path} cannot be written: {error.strerror or error}") from None
        return len(record["starts"]) - 1

    def end_start(self, last_step: int, reason: str) -> None:
        """Record that the present start ended after ``last_step``, and why.

        A disk that takes no more gives a warning and no error: why the start ended matters more, and the next start
        marks this one.

        Args:
            last_step: optimizer steps done.
            reason: ``"completed"``, ``"preempted: SIGUSR2"``, ``"interrupted"``, ``"failed: ..."``.
        """
        record = self.record()
        record["starts"][-1].update(ended=_now(), last_step=last_step, reason=reason)
        try:
            atomic.write_json(self.record_path, record)
        except OSError as error:
            print(f"warning: {self.record_path} cannot be written ({error.strerror or error})", file=sys.stderr)


def _blame(starts: list[dict[str, Any]], former_end: str | None) -> None:
    """Put what killed another rank before the error that rank 0 then ran into."""
    last: dict[str, Any] = starts[-1] if starts else {"reason": None}
    if former_end is None or not (last["reason"] or "").startswith("failed") or former_end.startswith("a rank failed"):
        return
    # The one before this may have been killed before it recorded anything: the note is of it, and not of ``last``.
    number = int(last["slurm_restart_count"] or 0) + 1
    here = (os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT"))
    if here == (last["slurm_job_id"], str(number)):
        last["reason"] = f"{former_end}; rank 0 {last['reason']}"


def futile_starts(record: Mapping[str, Any], first_step: int | None = None) -> int:
    """How many starts at the end of the list failed or were killed without one checkpointed step of progress.

    A start progressed if the next one began at a later step. One that completed ends the count as well. Those that
    were preempted or interrupted from outside neither count nor end it, unless they progressed.

    Args:
        record: what :meth:`RunDir.record` gave.
        first_step: the step that a start which is not in the list yet will begin with. Without it, the last start of
            the list is the present one, which is not counted.
    """
    starts = record["starts"]
    begins = [start["first_step"] for start in starts] + ([] if first_step is None else [first_step])
    count = 0
    for start, next_begin in zip(reversed(starts[: len(begins) - 1]), reversed(begins[1:]), strict=True):
        reason = start["reason"] or KILLED
        if next_begin > start["first_step"] or reason.startswith("completed"):
            break
        count += not reason.startswith(("preempted", "interrupted"))
    return count


class MetricsWriter:
    """Appends one JSON object a line to ``metrics.jsonl``; what is there is never changed.

    A disk that takes no more does not end a run: the lines wait in memory, each next one tries again, and one warning
    is given.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: FileIO | None = None
        self._waiting = bytearray()
        self._warned = self._opened = False
        self._send()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append ``values`` (text, numbers, 0-d tensors); NaN and infinity become null and are named in ``nonfinite``.

        The line reaches the operating system before this returns (if the disk takes it), so a killed process loses
        none.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        nonfinite = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
        plain.update(dict.fromkeys(nonfinite))
        if nonfinite:
            plain["nonfinite"] = nonfinite
        self._waiting += json.dumps(plain, allow_nan=False).encode() + b"\n"
        self._send()

    def close(self) -> None:
        """Write what waits, say what cannot be written, and close the file."""
        self._send()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            print(f"warning: the last {lines} lines for {self._path} are lost", file=sys.stderr)
            self._waiting.clear()
        self._close()

    def _send(self) -> None:
        try:
            if self._file is None:
                self._open()
            while self._waiting and self._file is not None:
                # A full disk may take a part of a line; the rest follows as soon as there is room.
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            # Opened anew at the next try, as the handle may be what is broken (a file server that came back).
            self._close()
            self._warn(error)

    def _open(self) -> None:
        self._file = open(self._path, "ab+", buffering=0)  # noqa: SIM115  closed by close()
        if not self._opened and self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                # A killed start tore its last line; what comes now must not be glued to it.
                self._waiting[:0] = b"\n"
        self._opened = True

    def _close(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:  # a quota of a network disk is told only here
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            why = error.strerror or error
            print(
                f"warning: {self._path} cannot be written ({why}); training goes on, and its lines are kept in memory "
                "until they can be",
                file=sys.stderr,
            )
        self._warned = True


def _plain(value: Any) -> Any:
    """0-d arrays and tensors as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """What the surviving history of a run logged, one dictionary a step, with growing ``step``.

    A step that comes again after a resume counts once: from there on, what the dead start had logged is left out.
    Two lines in a row of the same step (of training and of an evaluation) are one. A line torn by a kill is left out.
    A missing file gives an empty list.
    """
    history: list[dict[str, Any]] = []
    for line in metric_lines(path):
        if history and history[-1]["step"] == line["step"]:
            history[-1] = _joined(history[-1], line)
            continue
        while history and history[-1]["step"] >= line["step"]:
            history.pop()
        history.append(line)
    return history


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both lines of one step; where they overlap, the later holds."""
    joined = {**first, **second}
    nonfinite = [name for name in first.get("nonfinite", []) if name not in second] + second.get("nonfinite", [])
    joined.pop("nonfinite", None)
    return {**joined, "nonfinite": nonfinite} if nonfinite else joined


def metric_lines(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines that carry a step, those of dead starts as well, in the order in which they were written."""
    try:
        text = Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def package_versions() -> dict[str, str | None]:
    """The versions that a result may depend on; ``None`` for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("nanodist", "torch", "deepspeed", "timm", "kornia", "numba", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit() -> str | None:
    """The commit of this code if it runs from a checkout (``-dirty`` if edited since), else ``None``; never fails."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installation inside somebody's repository is no checkout
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
