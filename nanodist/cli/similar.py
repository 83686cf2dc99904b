"""``nanodist similar``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Exit codes: 0 all files are read, 1 some are not (report.json names them), 2 your input."
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="Micrographs, or folders of them.")
    parser.add_argument("--encoder", type=Path, required=True, metavar="RUN", help="Run, checkpoint or export folder.")
    parser.add_argument("--store", type=Path, required=True, help="Store that is searched.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the table and the picture.")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="Look-alikes for each (default 12).")
    parser.add_argument(
        "--per-micrograph", type=int, default=1, metavar="N", help="Most tiles of one micrograph (default 1)."
    )


def run(args: argparse.Namespace) -> int:
    """Search, and say what could not be read."""
    from hpc.errors import UserError
    from nanodist.downstream.similar import REPORT, SHEET, find_similar
    from nanodist.encoders import load_encoder
    from nanodist.shards import Store

    if min(args.count, args.per_micrograph) < 1:
        raise UserError("--count and --per-micrograph must be at least 1")
    encoder, store = load_encoder(args.encoder), Store.open(args.store)
    failed = find_similar(encoder, store, args.images, args.out, args.count, args.per_micrograph)
    print(args.out / SHEET)
    if failed:
        print(f"{failed} not read; {args.out / REPORT} says why", file=sys.stderr)
    return int(failed > 0)
