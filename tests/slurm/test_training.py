"""Real training on the real cluster, disturbed; the long versions of these are ``python -m tests.slurm.chaos``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm import chaos_checks as checks
from tests.slurm import chaos_disk, chaos_submitit
from tests.slurm.chaos_preempt import SIZE, Event
from tests.slurm.chaos_run import ROOT, Run, nanodist, prepare
from tests.slurm.cluster import Cluster

STEPS = "train.steps=50"


@pytest.fixture(scope="module")
def out(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of real micrographs and the batch scripts."""
    if not (data / "tem_virus").is_dir():
        pytest.skip("no tem_virus in the folder of real micrographs")
    folder = tmp_path_factory.mktemp("training")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def reference(cluster: Cluster, out: Path) -> Run:
    """An undisturbed training."""
    run = Run(cluster, out, "undisturbed", STEPS)
    run.train(*SIZE)
    return run


def test_a_training_that_is_killed_for_memory_preempted_and_killed_is_as_if_it_had_not_been(
    cluster: Cluster, out: Path, reference: Run
) -> None:
    run = Run(cluster, out, "disturbed", STEPS)
    run.submit(*SIZE, "--mem=2300", environ={"CHAOS_HOG_STEP": "24"})
    cluster.wait_restart(run.job, 1, timeout_s=180)

    run.wait_step(1, 26)
    cluster.ask("scancel", "--signal=USR2", str(run.job))
    cluster.wait_restart(run.job, 2)

    run.wait_step(2, 44)
    start = run.start(2)
    assert start is not None
    killed = Event(2, "steps", "rank 1", run.kill_rank(start, 1))
    cluster.wait_restart(run.job, 3)
    cluster.wait(run.job)

    memory, preempted, dead, done = [start["reason"] for start in run.record()["starts"]]
    assert memory.startswith("killed for memory (") and "--mem" in memory
    assert (preempted, done) == ("preempted: SIGUSR2", "completed")
    # Rank 0 may have come to see the connection close before it was ended; the cause is named all the same.
    assert dead.startswith("a rank was killed by signal 9 (")
    # Two kills, each back to the checkpoint before it; the preemption cost nothing.
    first_steps = [start["first_step"] for start in run.record()["starts"]]
    assert first_steps[:2] == [1, 21] and first_steps[2] >= 27 and first_steps[3] == 41
    found = checks.strikes(run, [killed])
    rows = [checks.same_curve(run, reference), checks.same_samples(run, reference), checks.whole_checkpoints(run)]
    rows += [checks.bounded_loss(found), *checks.common_states(run.starts())]
    assert not [row for row in rows if not row.kept]
    assert len(run.curve()) == 50


def test_submitit_starts_a_preempted_and_a_killed_training_again(cluster: Cluster, out: Path, reference: Run) -> None:
    run = chaos_submitit.Submitted(cluster, out, "submitted", STEPS)
    rows = chaos_submitit.submitit(run, reference, ("signal", "kill"))
    assert not [row for row in rows if not row.kept], run.said()[-3000:]


def test_a_full_disk_leaves_the_last_good_checkpoint(cluster: Cluster, out: Path) -> None:
    try:
        rows = chaos_disk.disk(cluster, out, to_the_end=False)
    finally:
        cluster.run(["umount", "--lazy", out / "small"], on=chaos_disk.NODE)
    assert not [row for row in rows if not row.kept]


def test_packing_over_two_nodes_gives_the_store_of_one_process(cluster: Cluster, out: Path) -> None:
    env = out / "pack.sh"
    env.write_text(f"NANODIST=({sys.executable} -m nanodist)\nNANODIST_MPI=pmi2\nexport PYTHONPATH={ROOT}\n")
    arguments = ("images", "--labels", "folder", "--tile", "128", "--shard-mb", "1", "--workers", "1")
    size = ("--ntasks=4", "--ntasks-per-node=2", "--nodes=2", "--mem=2000", "--output=pack.out")
    job = cluster.sbatch(
        *size, "slurm/pack.sbatch", *arguments, "--out=four", folder=out, environ={"NANODIST_ENV": str(env)}
    )
    done = cluster.wait(job)
    assert done["NumNodes"] == "2", cluster.log(done)
    nanodist(out, "pack", *arguments, "--out", "one")
    one, four = ({path.name: path.read_bytes() for path in (out / name).iterdir()} for name in ("one", "four"))
    assert len([name for name in one if name.endswith(".tar")]) > 2
    assert one == four
