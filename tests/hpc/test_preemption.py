import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from hpc.preemption import REASONS, TIME_LIMIT, Preemption, agree, deadline_from_environment, seconds

ROOT = Path(__file__).parents[2]


@pytest.fixture
def preemption():
    with Preemption() as watched:
        yield watched


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


def ignore(*_):
    """A handler that was there before."""


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_signal_is_a_reason_and_does_nothing_else(preemption, name):
    assert preemption.reason is None
    send(name)
    assert preemption.reason == name


def test_the_first_reason_stays(preemption):
    for name in ("SIGUSR2", "SIGTERM", "SIGUSR2", "SIGTERM", "SIGINT"):
        send(name)
    assert preemption.reason == "SIGUSR2"


def test_a_second_control_c_interrupts(preemption):
    send("SIGINT")
    with pytest.raises(KeyboardInterrupt):
        send("SIGINT")


def test_a_control_c_after_a_signal_does_no_harm(preemption):
    """Launchers pass a Ctrl-C on and send SIGTERM besides, in any order."""
    send("SIGTERM")
    send("SIGINT")
    assert preemption.reason == "SIGTERM"


def test_old_handlers_are_replaced_and_come_back():
    before = {number: signal.signal(number, ignore) for number in (signal.SIGUSR2, signal.SIGTERM)}
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        watched = Preemption()
        watched.install()
        send("SIGUSR2")
        watched.uninstall()
        assert watched.reason == "SIGUSR2"
        assert signal.getsignal(signal.SIGUSR2) is signal.getsignal(signal.SIGTERM) is ignore
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_time_limit_is_a_reason_once_the_margin_begins():
    now = time.time()
    assert Preemption(now + 100, margin_s=50).reason is None
    assert Preemption(now + 100, margin_s=101).reason == TIME_LIMIT
    assert Preemption(None).reason is None


def test_a_signal_says_more_than_the_time_limit():
    with Preemption(time.time(), margin_s=0) as watched:
        send("SIGTERM")
        assert watched.reason == "SIGTERM"


SAVING = """
import os, signal, sys, time
from pathlib import Path
from hpc import atomic
from hpc.preemption import EXIT_CODE, Preemption
target = Path(sys.argv[1])
with Preemption() as preemption:
    print("ready", flush=True)
    while preemption.reason is None:
        time.sleep(0.01)
    print("saving", flush=True)
    with atomic.directory(target) as folder:
        with open(folder / "a", "wb") as file:
            for _ in range(20):
                file.write(os.urandom(1 << 16))
                file.flush()
                time.sleep(0.02)
sys.exit(EXIT_CODE)
"""


def test_signals_during_a_save_do_no_harm(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path / "checkpoint")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "saving\n"
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.03)
    assert process.wait(timeout=60) == 75
    process.stdout.close()
    assert (tmp_path / "checkpoint" / "a").stat().st_size == 20 << 16
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_ignored_signal_does_not_change_the_exit_code_while_python_goes_down():
    """srun sends SIGTERM to the ranks that are left; module globals go after Python took its handlers away."""
    script = """
import os, signal, sys
from hpc.preemption import Preemption
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 15)
preemption = Preemption()
preemption.install()
if sys.argv[1] == "ignore":
    preemption.ignore()
last = Last()
sys.exit(75)
"""
    codes = [
        subprocess.run([sys.executable, "-c", script, way], cwd=ROOT, timeout=60).returncode
        for way in ("ignore", "keep")
    ]
    assert codes == [75, -signal.SIGTERM]


def test_a_forked_child_can_still_be_ended(preemption):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        time.sleep(20)
        os._exit(0)
    os.read(reader, 1)  # a signal amid the fork is dropped by Python
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert preemption.reason is None


def agreed(rank, world_size, reasons):
    return agree(reasons[rank], dist.group.WORLD, "cpu")


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        ([None, None, None], None),
        *(([None, reason, None], reason) for reason in REASONS),
        ([None, "SIGUSR2", "SIGTERM"], "SIGUSR2"),
        (["time limit", "SIGUSR2", "SIGTERM"], "time limit"),
        ([None, None, "SIGUSR2"], "SIGUSR2"),
    ],
)
def test_all_ranks_learn_the_reason_of_the_lowest_that_has_one(ranks, reasons, expected):
    assert ranks.run(3, agreed, reasons) == [expected] * 3


def signalled(rank, world_size):
    with Preemption() as watched:
        if rank == 1:
            send("SIGUSR2")
        return agree(watched.reason, dist.group.WORLD, "cpu")


def test_a_signal_to_one_rank_stops_all(ranks):
    assert ranks.run(2, signalled) == ["SIGUSR2", "SIGUSR2"]


def test_one_process_agrees_with_itself():
    assert agree("SIGTERM", None, "cpu") == "SIGTERM" and agree(None, None, "cpu") is None


def test_the_deadline_that_slurm_tells():
    assert deadline_from_environment({}) is None
    assert deadline_from_environment({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert deadline_from_environment({"SLURM_JOB_END_TIME": "0", "SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize(("answer", "left"), [("1-00:00:30", 86430), ("2:05", 125), ("UNLIMITED", None), ("", None)])
def test_where_slurm_tells_nothing_it_is_asked_once_a_job(tmp_path, answer, left):
    program = tmp_path / "squeue"
    program.write_text(f'#!/bin/sh\n[ "$3" = 7 ] && echo "{answer}"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    found = deadline_from_environment(environ)
    if left is None:
        assert found is None
    else:
        assert found is not None and abs(found - time.time() - left) < 5
    assert deadline_from_environment({**environ, "SLURM_PROCID": "3"}) is None
    # A member of an array, of which one has the number of the array as its own, asks for itself alone.
    program.write_text('#!/bin/sh\n[ "$3" = 7_4 ] && echo 1:00\n')
    member = deadline_from_environment({**environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"})
    assert member is not None and abs(member - time.time() - 60) < 5


def test_a_container_without_squeue_has_no_deadline(tmp_path):
    assert deadline_from_environment({"PATH": str(tmp_path), "SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize(("text", "expected"), [("9", 9), ("1:00:00", 3600), ("INVALID", None), ("1-", None)])
def test_slurms_durations(text, expected):
    assert seconds(text) == expected
