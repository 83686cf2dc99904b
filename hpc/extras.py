"""What an installation may lack, and what to do about it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hpc.errors import UserError


def needs(path: Path, what: str, extra: str, *modules: str) -> None:
    """Refuse a file whose libraries are not there.

    Args:
        path: the file.
        what: it is, such as ``an MRC file``.
        extra: of nanodist that brings the libraries.
        *modules: that read it.

    Raises:
        UserError: one of ``modules`` cannot be imported.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"{path} is {what}, and {' and '.join(missing)} to read it is not installed: pip install "
            f"'nanodist[{extra}]'"
        )
