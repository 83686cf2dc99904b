"""Sweeps and pipelines as a report finds them: the ``result.json`` that ``python -m launch`` leaves beside a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.errors import UserError

RESULT_FILE = "result.json"
_PARTS = {"name": str, "pretrainings": list, "sweeps": list, "cost": list, "reproduce": dict}


def is_sweep(path: Path) -> bool:
    """Whether ``path`` is the folder of a sweep or of a pipeline, collected or not."""
    files = (RESULT_FILE, "sweep.json", "pipeline.json", "jobs.jsonl")
    return not (path / "run.json").is_file() and any((path / name).is_file() for name in files)


def read_sweep(path: Path) -> dict[str, Any]:
    """The ``result.json`` in ``path``.

    Raises:
        UserError: there is none yet, or it is not readable.
    """
    file = path / RESULT_FILE
    if not file.is_file():
        raise UserError(
            f"{path} was not collected yet: run 'python -m launch collect' on its definition, and try again."
        )
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not readable ({error}): collect the sweep again.") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), of) for name, of in _PARTS.items()):
        raise UserError(f"{file} does not hold the result of a sweep: collect the sweep again.")
    return found


def joined(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one; sweeps bear the name of theirs where there is more than one."""
    if len(results) == 1:
        return dict(results[0])
    sweeps = [
        {**sweep, "sweep": sweep["sweep"] if sweep["sweep"] == one["name"] else f"{one['name']}, {sweep['sweep']}"}
        for one in results
        for sweep in one["sweeps"]
    ]
    by_hand = {
        f"{one['name']}, {name}": line
        for one in results
        for name, line in {**(one["reproduce"].get("by_hand") or {})}.items()
    }
    commands = [one["reproduce"]["command"] for one in results if one["reproduce"].get("command")]
    codes = dict.fromkeys(code for one in results for code in one["reproduce"].get("code") or [])
    return {
        "name": " and ".join(str(one["name"]) for one in results),
        "pretrainings": [training for one in results for training in one["pretrainings"]],
        "sweeps": sweeps,
        "cost": [{**row, "part": f"{one['name']}, {row['part']}"} for one in results for row in one["cost"]],
        "reproduce": {"command": "\n".join(commands), "by_hand": by_hand, "code": [*codes]},
    }
