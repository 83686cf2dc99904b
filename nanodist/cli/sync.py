"""``nanodist sync``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

LONGEST_WAIT_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run directories, or folders of them.")
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="Send the last start of a run that recorded no end as well: it was killed, and nobody will resume it.",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        const=60.0,
        type=_seconds,
        metavar="SECONDS",
        help="Look again every so many seconds (60 unless given; longer while nothing comes or the server is away).",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= LONGEST_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text} s is not between 1 and {LONGEST_WAIT_S:.0f}")
    return value


def run(args: argparse.Namespace) -> int:
    """Give what runs recorded offline to W&B's server; 1 where it did not take all."""
    if args.watch is None:
        _, failed = _round(args)
        return int(failed)
    wait = args.watch
    try:
        while True:
            sent, failed = _round(args)
            wait = args.watch if sent and not failed else min(2 * wait, LONGEST_WAIT_S)
            time.sleep(wait)
    except KeyboardInterrupt:
        return 0


def _round(args: argparse.Namespace) -> tuple[int, bool]:
    """Send what there is; how many records the server took, and whether one was refused."""
    from hpc.wandb_sync import find_offline, send

    runs = find_offline(args.runs, args.unfinished)
    sent, busy, failed = 0, 0, False
    for offline in runs:
        problem = send(offline)
        busy += len(offline.busy)
        if problem is None:
            sent += len(offline.files)
        else:
            failed = True
            print(f"{offline.run}: {problem}", file=sys.stderr)
    if sent or failed or args.watch is None:
        rest = f"; {busy} of starts that still run are sent when they end" if busy else ""
        print(f"{len(runs)} offline runs: {sent} records sent{rest}")
    return sent, failed
