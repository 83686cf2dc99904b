"""A table of facts with a contact sheet, as ``nanodist inspect`` prints it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from hpc.errors import UserError


def show(rows: Iterable[tuple[str, str]], args: argparse.Namespace, draw: Callable[[Path, int], None]) -> None:
    """Print names and values in two columns, and draw the sheet that ``args.sheet`` names, of ``args.count`` samples.

    Raises:
        UserError: no PNG, or no count.
    """
    table = list(rows)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:<{width}} {value}")
    if args.sheet is not None:
        if args.count < 1 or args.sheet.suffix.lower() != ".png":
            raise UserError("--sheet must name a .png file and --count be at least 1")
        draw(args.sheet, args.count)
        print(f"{'contact sheet':<{width}} {args.sheet}")
