"""A disk that fills up during a save, and has room again later."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hpc.checkpoint.files import fault, latest_checkpoint
from tests.slurm.chaos_checks import Row
from tests.slurm.chaos_run import EVERY_STEPS, Run
from tests.slurm.cluster import Cluster

# Two checkpoints of 58 MB stay while the third is written.
SIZE_MB = 200
NODE = "node1"


def disk(cluster: Cluster, out: Path) -> list[Row]:
    """Two ranks of one node train into a tmpfs of that node, which is full at its second and its last save."""
    node = cluster.machines[NODE]
    (out / "small").mkdir(exist_ok=True)
    mounted = cluster.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", out / "small"], on=NODE)
    assert mounted.returncode == 0, mounted.stderr
    small = Path(f"/proc/{node.pid}/root{out / 'small'}")
    run = Run(cluster, out, "small/run", "train.steps=70")
    run.logs, run.path = out / "small-ranks", small / "run"
    filler = small / "filler"
    size = ("--nodes=1", f"--nodelist={NODE}", "--ntasks-per-node=2", f"--output={out}/small.out")
    run.submit(*size)
    # Full before the second save, free before the third, and full again before the last.
    run.wait_step(0, EVERY_STEPS + 5)
    run.wait_for(lambda: _latest(run) == EVERY_STEPS, "the first checkpoint")
    _fill(filler)
    run.wait_step(0, 2 * EVERY_STEPS + 8)
    full = _latest(run)
    filler.unlink()
    run.wait_step(0, 3 * EVERY_STEPS + 5)
    run.wait_for(lambda: _latest(run) == 3 * EVERY_STEPS, "the checkpoint after the disk had room")
    _fill(filler)
    done = cluster.wait(run.job, ["FAILED"], timeout_s=120)
    log = cluster.log(done).splitlines()
    said = [line for line in log if "could not be written" in line]
    last = latest_checkpoint(run.path / "checkpoints").name
    whole = [fault(path) for path in (run.path / "checkpoints").glob("step-*")]
    rows = [
        Row("training goes on, with one sentence", said[0] if said else "nothing was said", len(said) == 2),
        Row("latest stays at the last good one", f"step {full}", full == EVERY_STEPS),
        Row("the last save has to succeed: exit 2, one sentence", said[-1] if said else "", done["ExitCode"] == "2:0"),
        Row(
            "the last good checkpoint stays", f"{last}, {len(whole)} whole", whole == [None] * 2 and last.endswith("60")
        ),
    ]
    filler.unlink()
    run.train(*size)
    reason = run.record()["starts"][-1]["reason"]
    text = f"from step {run.record()['starts'][-1]['first_step']}, {reason}"
    rows.append(Row("the same command goes on once there is room", text, reason == "completed"))
    return rows


def _fill(filler: Path) -> None:
    """Write until the disk takes no more."""
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def _latest(run: Run) -> int:
    return int((run.path / "checkpoints" / "latest").read_text().strip()[5:])
