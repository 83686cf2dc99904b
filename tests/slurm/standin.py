"""Stands in for nanodist under the batch scripts: what Slurm and the scripts do, without the time that torch takes.

``standin.py COMMAND BEHAVIOUR ...``; a behaviour of its first start only, but ``exit-N``, which is for ever:
``wait`` for a signal, as nanodist does; ``deaf``: as nanodist in a step that takes too long; ``hog`` memory; ``fail``;
``hang`` until nanodist's watchdog ends it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main(behaviour: str) -> int:
    rank, restarts = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    asked: list[str] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda n, _: asked.append(signal.Signals(n).name))
    note = Path(os.environ.get("NANODIST_END_NOTE", "none"))
    # As of nanodist: the job runs once all ranks heed signals, and no rank ends before all have saved.
    _meet("ready", restarts, rank)
    if rank == 0:
        print(f"start {restarts} tasks={os.environ['SLURM_NTASKS']} arguments={sys.argv[1:]}", flush=True)
        print(f"note: {note.read_text().splitlines() if note.is_file() else None}", flush=True)
    if behaviour.startswith("exit-"):
        # The others are still on their way when the first one fails.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20 * rank)
        return int(behaviour.removeprefix("exit-"))
    if behaviour == "fail" and not restarts:
        return 1
    if behaviour == "hang" and not restarts:
        from hpc.watchdog import Watchdog

        Watchdog(1.0, Path("stacks"), rank, slow_limit_s=1.0)
    hoard = []
    end = time.monotonic() + (0 if restarts else 300)
    while time.monotonic() < end:
        time.sleep(0.1)
        if asked and behaviour != "deaf":
            print(f"rank {rank} saves on {asked[0]}", flush=True)
            _meet("saved", restarts, rank)
            time.sleep(0.3 + 0.3 * rank)  # ranks do not end together
            return 75
        if behaviour == "hog" and rank == 1:
            hoard.append(os.urandom(20_000_000))
    return 0


def _meet(what: str, restarts: int, rank: int) -> None:
    """Wait until every rank of this start is here, but no longer than 10 s: one may have been killed."""
    folder = Path(f"standin-{os.environ['SLURM_JOB_ID']}-{restarts}-{what}")
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).touch()
    end = time.monotonic() + 10
    while len(list(folder.iterdir())) < int(os.environ["SLURM_NTASKS"]) and time.monotonic() < end:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[2]))
