"""The libraries that only microscopes' own formats need, and what to do where they are not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hpc.errors import UserError


def needs(path: Path, what: str, *modules: str) -> None:
    """Refuse a file whose libraries are not there.

    Raises:
        UserError: one of ``modules`` cannot be imported.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"{path} is {what}, and {' and '.join(missing)} to read it is not installed: pip install 'nanodist[io]'"
        )
