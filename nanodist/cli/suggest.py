"""``nanodist suggest``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Exit codes: 0 all files are read, 1 some are not (report.json names them), 2 your input."
    parser.add_argument("run", type=Path, metavar="RUN", help="Run directory of nanodist finetune.")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="Unlabelled micrographs, or folders.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the table and the contact sheet.")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="How many to name (default 20).")


def run(args: argparse.Namespace) -> int:
    """Choose, and say what could not be read."""
    from hpc.errors import UserError
    from nanodist.downstream.finetune.load import kind_of, load_classifier
    from nanodist.downstream.finetune.suggest import REPORT, TABLE, suggest

    if args.count < 1:
        raise UserError("--count must be at least 1")
    if kind_of(args.run) == "segmentation":
        from nanodist.downstream.segment.predict import load_segmenter
        from nanodist.downstream.segment.suggest import suggest_masks

        failed = suggest_masks(load_segmenter(args.run), args.images, args.out, args.count)
    else:
        failed = suggest(load_classifier(args.run), args.images, args.out, args.count)
    print(args.out / TABLE)
    if failed:
        print(f"{failed} not read; {args.out / REPORT} says why", file=sys.stderr)
    return int(failed > 0)
