"""Offline W&B records of runs, given to the server from a machine that reaches it.

Each start of an offline run leaves a folder ``wandb/offline-run-DATE-ID`` in the run directory, all under one id.
:func:`send` hands those that are done to ``wandb sync``, in the order in which they began.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import UserError
from hpc.run_dir import RunDir
from hpc.tracking import has_api_key


@dataclass(frozen=True)
class Offline:
    """What a run has for the server.

    Attributes:
        run: its directory.
        run_id: W&B's id of it.
        files: records of starts that have ended and were not sent, the oldest first.
        busy: records of a start that still runs; they are sent when it has ended.
    """

    run: Path
    run_id: str
    files: tuple[Path, ...]
    busy: tuple[Path, ...]


def find_offline(places: Sequence[Path], unfinished: bool = False) -> list[Offline]:
    """The runs in ``places`` (run directories, or folders of them at any depth) that were recorded offline.

    Args:
        places: where to look.
        unfinished: take the last record of a run without a recorded end as well, which was killed for good.

    Raises:
        UserError: a place does not exist, or holds no run.
    """
    found = []
    for place in places:
        runs = list(_runs(place))
        if not runs:
            what = "holds no run (no run.json)" if place.is_dir() else "does not exist"
            raise UserError(f"{place} {what}; give run directories, or a folder of them")
        found += [offline for run in runs if (offline := _offline(run, unfinished)) is not None]
    return found


def _runs(place: Path) -> Iterator[Path]:
    if (place / "run.json").is_file():
        yield place
        return
    for folder, names, files in os.walk(place):
        if "run.json" in files:
            names.clear()  # there is no run in a run
            yield Path(folder)
        names.sort()


def _offline(path: Path, unfinished: bool) -> Offline | None:
    run = RunDir(path)
    try:
        run_id = (run.wandb / "run_id").read_text().strip()
    except OSError:
        return None
    records = sorted(run.wandb.glob("offline-run-*/run-*.wandb"), key=_began)
    fresh = [record for record in records if not _synced(record)]
    starts = run.record()["starts"]
    alive = (
        not unfinished
        and bool(starts)
        and starts[-1]["reason"] is None
        and bool(records)
        and fresh[-1:] == records[-1:]
    )
    return Offline(path, run_id, tuple(fresh[:-1] if alive else fresh), tuple(fresh[-1:] if alive else ()))


def _began(record: Path) -> tuple[str, int]:
    """Folders of one second are told apart by a number at the end."""
    _, _, rest = record.parent.name.partition("offline-run-")
    stamp, _, tail = rest.partition("-")
    number = tail.rpartition("-")[2]
    return stamp, int(number) if number.isdigit() and "-" in tail else 0


def send(offline: Offline) -> str | None:
    """Hand a run's records to the server; one sentence about what went wrong, or ``None``.

    Raises:
        UserError: nobody is logged in to W&B, or it is not installed.
    """
    if not has_api_key():
        raise UserError("no W&B API key: run 'wandb login', or set WANDB_API_KEY, and try again")
    if not offline.files:
        return None
    # With an id, wandb sends them one after the other in the order in which they began.
    command = [sys.executable, "-m", "wandb", "sync", "--id", offline.run_id, *map(str, offline.files)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "online"})
    # wandb has an exit code for few of its failures; a mark is what it leaves where the server took all.
    left = [record for record in offline.files if not _synced(record)]
    if left:
        return f"{left[0].parent.name} was not taken by the server: {_reason(done.stdout + done.stderr)}"
    return None


def _synced(record: Path) -> bool:
    return record.with_name(f"{record.name}.synced").exists()


def _reason(text: str) -> str:
    lines = [line.removeprefix("wandb:").strip() for line in text.splitlines()]
    told = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "denied", "panic"))]
    return (told or [line for line in lines if line] or ["wandb said nothing"])[-1][:300]
