"""``nanodist report``: one HTML page about runs, or about sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nanodist report``."""
    parser.add_argument(
        "runs",
        metavar="RUN|SWEEP",
        nargs="+",
        type=Path,
        help="Run directory (several are compared), or the folder of a sweep or pipeline.",
    )
    parser.add_argument(
        "--probe",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="Folders that 'nanodist probe --out' wrote (default: RUN/probe where it exists).",
    )
    parser.add_argument(
        "--measured",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="Folders that 'nanodist measure --out' wrote (default: RUN/measured where it exists).",
    )
    parser.add_argument("--out", metavar="FILE.html", required=True, type=Path, help="The HTML file to write.")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from nanodist.report.page import write_report

    print(write_report(args.runs, args.out, args.probe, args.measured))
    return 0
