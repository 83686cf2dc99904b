"""Named recipes that come with nanodist: YAML files here for pretraining, in a folder of its own for another kind."""

from __future__ import annotations

from importlib import resources
from importlib.abc import Traversable
from pathlib import Path

from hpc.errors import UserError


def _folder(kind: str) -> Traversable:
    here = resources.files("nanodist") / "recipes"
    return here if kind == "pretrain" else here / kind


def names(kind: str) -> list[str]:
    """Names of the packaged recipes of a kind of job."""
    return sorted(e.name.removesuffix(".yaml") for e in _folder(kind).iterdir() if e.name.endswith(".yaml"))


def text(kind: str, source: str) -> str:
    """The YAML text of a packaged recipe, or of a file.

    Raises:
        UserError: ``source`` is neither.
    """
    if source in names(kind):
        return (_folder(kind) / f"{source}.yaml").read_text(encoding="utf-8")
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    raise UserError(f"recipe '{source}' is neither a file nor one of: {', '.join(names(kind))}")
