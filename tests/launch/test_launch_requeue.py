import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.end_note import former_end
from hpc.topology import EXPLICIT, MARK, RENDEZVOUS
from launch import SlurmResources
from launch.jobs import RecipeJob, requeue
from launch.submit import submit, wait

submitit = pytest.importorskip("submitit")
ROOT = Path(__file__).parents[2]

# Stands for the command line in the processes of a job: trains until it is asked to stop, three times.
COMMAND = """
import os, sys, time
from pathlib import Path
from hpc.preemption import EXIT_CODE, Preemption
from hpc.end_note import former_end
from hpc.topology import detect

def main(arguments):
    rank, folder = detect().rank, Path(arguments[2].removeprefix("run_dir="))
    starts = folder / f"rank-{rank}"
    with open(starts, "a") as file:
        file.write("start\\n")
    if len(starts.read_text().split()) == 3:
        return 0
    with Preemption() as preemption:
        (folder / f"ready-{rank}").touch()
        while preemption.reason is None:
            time.sleep(0.01)
    (folder / f"ready-{rank}").unlink()
    return EXIT_CODE
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No launcher's variables, and a ``nanodist`` of three starts that jobs import in place of the real one."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "PMI", "SUBMITIT")) or name in (*EXPLICIT, *RENDEZVOUS, MARK):
            monkeypatch.delenv(name)
    package = tmp_path / "stand-in" / "nanodist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{ROOT}")
    # The snapshot would be of the real one.
    monkeypatch.setattr("launch.snapshot.freeze", lambda folder: package.parent)
    monkeypatch.chdir(tmp_path)


def until(condition, timeout_s=90.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_preempted_local_job_starts_again_and_its_ranks_are_not_done_before(tmp_path):
    (tmp_path / "run").mkdir()
    job = submit(RecipeJob("simclr", (f"run_dir={tmp_path / 'run'}",)), SlurmResources(tasks_per_node=2), "local", "l")
    controller = int(job.job_id)
    for start in (1, 2):
        until(lambda: all((tmp_path / "run" / f"ready-{rank}").exists() for rank in (0, 1)))
        assert (tmp_path / "run" / "rank-0").read_text().split() == ["start"] * start
        assert not job.done()
        children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        for child in children:
            # Twice: Slurm signals at its time limit and again when it preempts.
            os.kill(int(child), signal.SIGUSR2)
            os.kill(int(child), signal.SIGUSR2)
        until(lambda: not list((tmp_path / "run").glob("ready-*")))
    assert wait(job) is None
    assert [(tmp_path / "run" / f"rank-{rank}").read_text().split() for rank in (0, 1)] == [["start"] * 3] * 2
    pickled = submitit.core.utils.DelayedSubmission.load(job.paths.submitted_pickle)
    assert pickled.function.restarts == RecipeJob("simclr").restarts - 2


IN_SLURM = """
import sys
from launch.jobs import RecipeJob, requeue
requeue(RecipeJob("simclr", (), int(sys.argv[1])), "nanodist pretrain simclr")
"""


@pytest.mark.parametrize(
    ("rank", "restarts", "scontrol", "code", "asked", "left"),
    [
        (0, 5, "exit 0", 0, True, 4),
        (1, 5, "exit 0", 0, False, 5),
        (0, 0, "exit 0", 1, False, 5),
        (0, 5, "exit 1", 75, True, 4),  # the batch script is to do it
    ],
)
def test_rank_0_of_a_slurm_job_requeues_once_and_bounded(tmp_path, rank, restarts, scontrol, code, asked, left):
    """Element 4 of the job array 123, whose own number is 130."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{scontrol}\n')
    (programs / "scontrol").chmod(0o755)
    pickle = tmp_path / "123_4_submitted.pkl"
    submission = submitit.core.utils.DelayedSubmission(RecipeJob("simclr", (), 5))
    submission.set_timeout(30, 3)
    submission.dump(pickle)
    environ = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "130",
        "SLURM_ARRAY_JOB_ID": "123",
        "SLURM_ARRAY_TASK_ID": "4",
        "SLURM_PROCID": str(rank),
    }
    command = [sys.executable, "-c", IN_SLURM, str(restarts)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "asked").exists() == asked
    if asked:
        assert (tmp_path / "asked").read_text() == "requeue 123_4\n"
    pickled = submitit.core.utils.DelayedSubmission.load(pickle)
    assert pickled.function == RecipeJob("simclr", (), left)
    assert (pickled._timeout_min, pickled._timeout_countdown) == (30, 3)
    assert list(tmp_path.glob("*result*")) == []
    assert (tmp_path / "123_4.final").exists() == (restarts == 0)


AFTER = """
import sys
from launch.jobs import RecipeJob
from nanodist import cli

def main(arguments):
    if sys.argv[1] == "raise":
        raise OSError("the specimen drifted")
    return int(sys.argv[1])

cli.main = main
RecipeJob("simclr")()
"""


@pytest.fixture
def slurm_job(tmp_path):
    """Environment of rank 0 of job 7, which has two ranks, with a ``scontrol`` that writes down what it is asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (programs / "scontrol").chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_RESTART_COUNT": "1",
        "NANODIST_END_NOTE": str(tmp_path / "7.end"),
        "NANODIST_LOG_BEGIN": "6",
    }


def after(tmp_path, environ, code):
    command = [sys.executable, "-m", "launch.after", str(tmp_path), "7", str(code)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    (tmp_path / "asked").unlink(missing_ok=True)
    return asked, done.stderr


def results(tmp_path):
    return {path.name: submitit.core.utils.pickle_load(path) for path in tmp_path.glob("*_result.pkl")}


@pytest.mark.parametrize(("ends", "code", "final"), [("1", 1, False), ("raise", 1, False), ("2", 1, True)])
def test_in_slurm_only_a_users_mistake_is_final(tmp_path, slurm_job, ends, code, final):
    package = tmp_path / "stand-in" / "nanodist" / "cli.py"
    package.write_text("")
    done = subprocess.run([sys.executable, "-c", AFTER, ends], env=slurm_job, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("drifted" in done.stderr) == (ends == "raise")
    assert ("RuntimeError" in done.stderr) == final
    asked, _ = after(tmp_path, slurm_job, code)
    assert asked == ("" if final else "requeue 7\n")
    assert sorted(results(tmp_path)) == (["7_0_result.pkl", "7_1_result.pkl"] if final else [])
    if final:
        assert "'nanodist pretrain simclr' ended with exit code 2" in results(tmp_path)["7_1_result.pkl"][1]


def test_a_failed_job_is_started_again_a_bounded_number_of_times(tmp_path, slurm_job):
    from launch.after import MOST_FAILURES

    (tmp_path / "7_0_log.err").write_text(
        "srun: an earlier start\n"[:6] + "srun: error: node1: task 1: Killed\nloss 1\n"
    )
    (tmp_path / "7_1_result.pkl").write_bytes(b"of a rank that lost its neighbour")
    assert after(tmp_path, slurm_job, 137)[0] == "requeue 7\n"
    assert results(tmp_path) == {}
    assert former_end({**slurm_job, "SLURM_RESTART_COUNT": "2"}) == (
        "a rank was killed by signal 9 (srun: error: node1: task 1: Killed)"
    )
    (tmp_path / "7.failures").write_text("x\n" * (MOST_FAILURES - 1))
    assert after(tmp_path, slurm_job, 75)[0] == "requeue 7\n"  # a preemption is no failure
    assert after(tmp_path, slurm_job, 70)[0] == "requeue 7\n"
    asked, said = after(tmp_path, slurm_job, 70)
    assert asked == "" and f"failed {MOST_FAILURES + 1} times" in said
    assert {outcome for outcome, _ in results(tmp_path).values()} == {"error"} and len(results(tmp_path)) == 2


def test_outside_of_a_job_nothing_is_requeued():
    with pytest.raises(RuntimeError, match="start it again"):
        requeue(RecipeJob("simclr"), "nanodist pretrain simclr")
