"""The process that runs the jobs of an allocation, with a stand-in for what the jobs do."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from hpc.preemption import Preemption
from launch import worker
from launch.queue import cancel
from launch.records import MOST_TRIES, Job, Record, SweepFolder
from launch.worker import Allocation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def stand_in(arguments):
    """Runs in the forked process: does what its first word says, and notes its place."""
    what, place = arguments[0], arguments[1]
    seen = {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "RANK", "CUDA", "OMP"))}
    line = {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)), "environ": seen}
    with open(place, "a") as file:
        file.write(json.dumps(line) + "\n")
    print("the specimen drifted", file=sys.stderr)
    if what == "wait":
        with Preemption() as preemption:
            while preemption.reason is None and len(Path(place).read_text().splitlines()) < 2:
                time.sleep(0.01)
        return 75 if preemption.reason else 0
    if what.startswith("pair-"):
        end = time.monotonic() + 30
        while not Path(place).with_name(what[-1]).exists():
            if time.monotonic() > end:
                return 1
            time.sleep(0.01)
    if what == "sleep":
        time.sleep(0.5)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("low vacuum")
    if what == "once":
        return 0 if len(Path(place).read_text().splitlines()) > 1 else 1
    return int(what) if what.isdigit() else 0


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Makes a sweep's folder of jobs by name -> what they do."""
    from nanodist import cli

    monkeypatch.setattr(worker, "_EAGER", ())
    monkeypatch.setattr(cli, "main", stand_in)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("RANK", "0")
    folder = SweepFolder(tmp_path / "sweeps" / "s")

    def make(**whats):
        folder.make()
        folder.add_jobs([Job(name, {"what": what}, [what, str(tmp_path / name)]) for name, what in whats.items()])
        return folder

    return make


def lines(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_jobs_run_apart_and_no_failure_hides_the_others(sweep, tmp_path):
    folder = sweep(a="0", b="3", c="crash", d="2", e="raise", f="once", g="0")
    states = Allocation(str(folder.path), tuple("abcdefg"))()
    assert states == {"a": "done", "b": "failed", "c": "failed", "d": "failed", "e": "failed", "f": "done", "g": "done"}
    # Twice the same way is final, wrong input at once; what came another way is done.
    assert [folder.record(name).starts for name in "abcdefg"] == [1, 2, 2, 1, 2, 2, 1]
    assert folder.record("b").failures == ["exit code 3: the specimen drifted"] * 2
    assert folder.record("c").failures == ["killed by SIGKILL"] * 2
    assert folder.record("e").failures[0] == "exit code 1: ValueError: low vacuum"
    assert folder.record("f").failures == ["exit code 1: the specimen drifted"]
    assert folder.record("a").allocation == "77" and folder.record("a").seconds > 0
    # Each is a process alone, whatever the worker's place is.
    (place,) = lines(tmp_path, "a")
    assert place["pid"] != os.getpid() and not {"RANK", "SLURM_JOB_ID"} & place["environ"].keys()
    assert os.environ["SLURM_JOB_ID"] == "77"
    # What is final is not run again.
    assert Allocation(str(folder.path), tuple("abcdefg"))() == states
    assert len(lines(tmp_path, "b")) == 2 and len(lines(tmp_path, "a")) == 1


def test_side_by_side_they_share_cores_and_gpus(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    folder = sweep(a="pair-b", b="pair-a", c="pair-d", d="pair-c")
    # Each ends only once its partner has begun.
    assert set(Allocation(str(folder.path), tuple("abcd"), side_by_side=2)().values()) == {"done"}
    first, second = (lines(tmp_path, name)[0] for name in "ab")
    assert all(len(lines(tmp_path, name)) == 1 for name in "abcd")
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(first["cores"]) & set(second["cores"])
    assert {one["environ"]["CUDA_VISIBLE_DEVICES"] for one in (first, second)} == {"4", "6"}
    assert first["environ"]["OMP_NUM_THREADS"] == str(len(first["cores"]))


def later(condition, act):
    def wait():
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_preempted_all_save_and_what_is_left_goes_on(sweep, tmp_path, monkeypatch):
    folder = sweep(a="0", b="wait", c="wait", d="0")
    asked = []
    monkeypatch.setattr(worker, "requeue", lambda job, line: asked.append(job) or sys.exit(0))
    # A file without its line is of a job that may yet be ended before it is counted.
    ready = lambda: all(path.exists() and path.read_text().endswith("\n") for path in (tmp_path / "b", tmp_path / "c"))  # noqa: E731
    thread = later(ready, lambda: [os.kill(os.getpid(), s) for s in (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM)])
    job = Allocation(str(folder.path), tuple("abcd"), side_by_side=2)
    with pytest.raises(SystemExit):
        job()
    thread.join()
    assert asked == [job]
    assert [folder.record(name).state for name in "abcd"] == ["done", "stopped", "stopped", "queued"]
    assert set(job().values()) == {"done"}
    assert [len(lines(tmp_path, name)) for name in "abcd"] == [1, 2, 2, 1]


def test_one_job_is_cancelled_and_its_neighbours_go_on(sweep, tmp_path, monkeypatch):
    folder = sweep(a="wait", b="sleep", c="sleep", d="sleep")
    folder.add_allocation(str(os.getpid()), "local", fingerprints=[*"abcd"])
    monkeypatch.setattr("launch.queue._is_active", lambda line: True)
    thread = later(lambda: (tmp_path / "a").exists(), lambda: cancel(folder, ["a", "d"]))
    states = Allocation(str(folder.path), tuple("abcd"), side_by_side=2)()
    thread.join()
    assert states == {"a": "cancelled", "b": "done", "c": "done", "d": "cancelled"}
    assert not (tmp_path / "d").exists()


def test_a_job_that_fails_in_many_ways_is_given_up():
    record = Record()
    for number in range(MOST_TRIES):
        assert not record.final
        record = record.finished("failed", 1.0, 0.5, f"exit code {number}")
    assert record.state == "failed" and (record.seconds, record.training_s) == (MOST_TRIES, MOST_TRIES / 2)


def test_what_follows_a_command_is_run_once_it_ended_well(sweep, tmp_path):
    folder, jobs = sweep(), []
    for name, what in (("a", "0"), ("b", "2"), ("c", "0")):
        then = ["0", str(tmp_path / f"then-{name}"), f"--out={tmp_path / name}-out"]
        jobs.append(Job(name, {}, [what, str(tmp_path / name)], then=then))
    folder.write_part("x", jobs, [])
    (tmp_path / "c-out").mkdir()  # by a start before
    assert Allocation(str(folder.path), tuple("abc"))() == {"a": "done", "b": "failed", "c": "done"}
    assert [(tmp_path / f"then-{name}").exists() for name in "abc"] == [True, False, False]
