"""What the batch scripts do and leave to Slurm: one restart for one end, and none for a cancelled job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.namespaces import until

STANDIN = Path(__file__).with_name("standin.py")
Submit = Callable[..., int]


@pytest.fixture(scope="module")
def submit(cluster: Cluster) -> Submit:
    """Submits slurm/pretrain.sbatch with the stand-in; gives the job id."""
    env = cluster.work / "env.sh"
    env.write_text(f"NANODIST=({sys.executable} {STANDIN})\nNANODIST_MPI=pmi2\nexport NANODIST_MAX_RESTARTS=2\n")
    cluster.environ["NANODIST_ENV"] = str(env)

    def one(behaviour: str, *options: str, tasks: int = 2, script: str = "pretrain") -> int:
        size = ("--nodes=1", f"--ntasks={tasks}", "--cpus-per-task=1", "--mem=300", "--time=10")
        return cluster.sbatch(*size, *options, f"slurm/{script}.sbatch", behaviour, "seed=3")

    return one


@pytest.fixture(scope="module", autouse=True)
def limited(submit: Submit, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Two jobs that run into a time limit of a minute, submitted first as it cannot be shorter: one that saves in time
    at the signal, one whose ranks do not."""
    saves = submit("wait", "--nodelist=node1", "--time=1", "--signal=USR2@10", tasks=1)
    deaf = submit("deaf", "--nodelist=node1", "--time=1", "--signal=USR2@10", tasks=1)
    yield saves, deaf
    cluster.run(["scancel", "--signal=KILL", str(saves), str(deaf)])


def _running(cluster: Cluster, job: int) -> None:
    """Wait until the ranks are there."""
    cluster.wait(job, ["RUNNING"])
    assert until(lambda: "start 0" in cluster.log(cluster.job(job)), 30), "no rank started"


def _starts(log: str) -> list[int]:
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("start ")]


def test_a_signal_to_the_ranks_saves_and_requeues_once(submit: Submit, cluster: Cluster):
    job = submit("wait")
    _running(cluster, job)
    cluster.ask("scancel", "--signal=USR2", str(job))
    cluster.wait_restart(job)
    done = cluster.wait(job)
    log = cluster.log(done)
    assert done["Restarts"] == "1" and _starts(log) == [0, 1]
    assert "rank 0 saves on SIGUSR2" in log and "rank 1 saves on SIGUSR2" in log
    assert "'exit=75'" in log  # the next start was told
    assert "['pretrain', 'wait', 'engine.surplus_ranks=idle', 'seed=3']" in log


def test_a_cancelled_job_stays_cancelled_though_its_ranks_saved(submit: Submit, cluster: Cluster):
    job = submit("wait")
    _running(cluster, job)
    cluster.ask("scancel", str(job))
    done = cluster.wait(job, ["CANCELLED"])
    assert until(lambda: "ended from outside" in cluster.log(done), 10), cluster.log(done)
    assert "rank 0 saves on SIGTERM" in cluster.log(done)
    assert cluster.job(job)["JobState"] == "CANCELLED" and _starts(cluster.log(done)) == [0]


def test_preempted_by_a_higher_partition_it_starts_again_once(submit: Submit, cluster: Cluster):
    job = submit("wait", "--nodelist=node3", "--exclusive")
    _running(cluster, job)
    urgent = cluster.sbatch("-p", "urgent", "-w", "node3", "--exclusive", "-o", "urgent.out", "--wrap", "sleep 1")
    cluster.wait_restart(job)
    cluster.wait(urgent)
    done = cluster.wait(job)
    assert done["Restarts"] == "1" and _starts(cluster.log(done)) == [0, 1]
    assert "saves on SIGTERM" in cluster.log(done)  # in the grace time


def test_a_rank_killed_for_memory_is_requeued_and_the_note_says_so(submit: Submit, cluster: Cluster):
    job = submit("hog")
    cluster.wait_restart(job)
    done = cluster.wait(job)
    note = next(line for line in reversed(cluster.log(done).splitlines()) if line.startswith("note: "))
    assert "'exit=137'" in note and "exceeded memory limit" in note


def test_a_hang_is_found_by_the_watchdog_and_requeued(submit: Submit, cluster: Cluster):
    job = submit("hang")
    cluster.wait_restart(job)
    log = cluster.log(cluster.wait(job))
    note = next(line for line in reversed(log.splitlines()) if line.startswith("note: "))
    assert "exit code 70" in note and "watchdog: rank 1 on " in log and _starts(log) == [0, 1]
    stacks = sorted((cluster.work / "stacks").glob("rank-*.txt"))
    assert len(stacks) == 2 and all("most recent call first" in path.read_text() for path in stacks)


def test_wrong_input_is_not_tried_again(submit: Submit, cluster: Cluster):
    done = cluster.wait(submit("exit-2"), ["FAILED"])
    assert done["ExitCode"] == "2:0" and done["Restarts"] == "0"
    assert "no restart mends" in cluster.log(done) and "task 1: Terminated" in cluster.log(done)


def test_failures_are_tried_again_a_bounded_number_of_times(submit: Submit, cluster: Cluster):
    job = submit("exit-1")
    for restarts in (1, 2):
        cluster.wait_restart(job, restarts)
    done = cluster.wait(job, ["FAILED"])
    assert _starts(cluster.log(done)) == [0, 1, 2]
    assert "giving up" in cluster.log(done)


def test_pack_has_an_mpi_of_all_tasks(cluster: Cluster, submit: Submit):
    program = cluster.work / "size.py"
    program.write_text("from mpi4py import MPI\nprint('size', MPI.COMM_WORLD.allreduce(1))\n")
    env = cluster.work / "mpi.sh"
    env.write_text(f"NANODIST=({sys.executable} {program})\nNANODIST_MPI=pmi2\n")
    options = ("--ntasks=3", "--ntasks-per-node=1", "--mem=300", f"--export=ALL,NANODIST_ENV={env}")
    done = cluster.wait(cluster.sbatch(*options, "slurm/pack.sbatch", "images"))
    assert cluster.log(done).split() == ["size", "3"] * 3


def test_a_sweep_runs_its_lines_and_starts_only_the_failed_one_again(cluster: Cluster, submit: Submit):
    """The last member has the number of the whole array as its own."""
    (cluster.work / "sweep.txt").write_text(
        "pretrain exit-0 seed=[1,2]\npretrain exit-2 seed=2\npretrain fail seed=3\n"
    )
    size = ("--ntasks=1", "--cpus-per-task=1", "--mem=300", "--time=10", "--output=sweep-%a.out")
    job = cluster.sbatch("--array=1-4%3", *size, "slurm/sweep.sbatch", "sweep.txt")
    members = [cluster.work / f"sweep-{member}.out" for member in (1, 2, 3, 4)]
    ends = ("'seed=[1,2]'", "no restart mends", "requeueing it (restart 1)", "no line 4")
    for output, end in zip(members, ends, strict=True):
        assert until(lambda o=output, e=end: o.exists() and e in o.read_text(), 60), (job, output, end)
    assert until(lambda: cluster.release(f"{job}_3"), 20, every_s=1.0)
    assert until(lambda: _starts(members[2].read_text()) == [0, 1], 60), members[2].read_text()
    assert [_starts(path.read_text()) for path in members] == [[0], [0], [0, 1], []]


def test_the_time_limit_loses_nothing(limited: tuple[int, int], cluster: Cluster):
    saves, deaf = limited
    for job in (saves, deaf):
        cluster.wait_restart(job, timeout_s=150)
        done = cluster.wait(job)
        assert done["Restarts"] == "1" and _starts(cluster.log(done)) == [0, 1]
    assert "saves on SIGUSR2" in cluster.log(cluster.job(saves))
    # Not at the signal, and killed with its batch script at the limit; started again all the same.
    log = cluster.log(cluster.job(deaf))
    assert "DUE TO TIME LIMIT" in log and "'reason=TimeLimit'" in log
