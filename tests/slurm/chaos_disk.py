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


def disk(cluster: Cluster, out: Path, to_the_end: bool = True) -> list[Row]:
    """Two ranks of one node train into a tmpfs of that node, full at a save, and again when they are preempted.

    Args:
        cluster: where.
        out: the folder of :func:`tests.slurm.chaos_run.prepare`.
        to_the_end: whether it is also full at the last save, and at the start after that.
    """
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
    # Full before the second save, free before the third, and full again when a signal comes.
    run.wait_step(0, EVERY_STEPS + 5)
    run.wait_for(lambda: _latest(run) == EVERY_STEPS, "the first checkpoint")
    _fill(filler)
    run.wait_step(0, 2 * EVERY_STEPS + 5)
    # Slurm hands a job's output over when it gets to it.
    run.wait_for(lambda: _said(run), "a sentence on the checkpoint")
    rows = [Row("training goes on, with one sentence", _said(run)[0], len(_said(run)) == 1)]
    rows.append(Row("latest stays at the last good one", f"step {_latest(run)}", _latest(run) == EVERY_STEPS))
    cluster.ask("scancel", "--signal=USR2", str(run.job))
    run.wait_for(lambda: run.restarts() == 1, "the requeue", every_s=0.5)
    run.wait_for(lambda: len(_said(run)) > 1, "a second sentence", timeout_s=30)
    rows.append(Row("preempted, it says that it could not save, and is requeued", _said(run)[-1], len(_said(run)) == 2))
    rows.append(_whole(run, EVERY_STEPS, 1))
    filler.unlink()
    cluster.wait_restart(run.job)
    if to_the_end:
        run.wait_step(1, 3 * EVERY_STEPS + 5)
        run.wait_for(lambda: _latest(run) == 3 * EVERY_STEPS, "the checkpoint after the disk had room")
        _fill(filler)
        run.wait_for(lambda: run.restarts() == 2, "the requeue after the last save", every_s=0.5)
        run.wait_for(lambda: len(_said(run)) > 2, "a third sentence", timeout_s=30)
        rows += [Row("the last save has to succeed", _said(run)[-1], len(_said(run)) == 3), _whole(run, 60, 2)]
        cluster.wait_restart(run.job, 2)
        done = cluster.wait(run.job, ["FAILED"], timeout_s=120)
        wrong = [line for line in cluster.log(done).splitlines() if "pretrain: error: " in line] or ["nothing"]
        room = "free some" in wrong[-1] or "No space left" in wrong[-1]
        rows.append(Row("a start without room ends with exit 2", wrong[-1], room and done["ExitCode"] == "2:0"))
        filler.unlink()
        run.train(*size)
    else:
        cluster.wait(run.job, timeout_s=300)
    starts = run.record()["starts"]
    text = f"first steps {[start['first_step'] for start in starts]}; {starts[-1]['reason']}"
    rows.append(Row("it goes on once there is room", text, starts[-1]["reason"] == "completed"))
    return rows


def _said(run: Run) -> list[str]:
    """What the job said of checkpoints that could not be written."""
    log = run.cluster.log(run.cluster.job(run.job))
    return [line for line in log.splitlines() if "could not be written" in line]


def _whole(run: Run, step: int, count: int) -> Row:
    last = latest_checkpoint(run.path / "checkpoints").name
    faults = [fault(path) for path in (run.path / "checkpoints").glob("step-*")]
    text = f"{last}, {faults.count(None)} whole of {len(faults)}"
    return Row("the last good checkpoint stays", text, last.endswith(f"{step:08d}") and faults == [None] * count)


def _fill(filler: Path) -> None:
    """Write until the disk takes no more."""
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def _latest(run: Run) -> int:
    path = run.path / "checkpoints" / "latest"  # written beside the training: it may come later than the next steps
    return int(path.read_text().strip()[5:]) if path.exists() else 0
