import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
START = """
import ctypes, os, sys, time
from pathlib import Path
from hpc.watchdog import Watchdog
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
"""
# Rank 1 goes astray between two steps, so that the others wait for it in a collective for ever.
COLLECTIVE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
watchdog = Watchdog(1.0, folder / "hangs", rank, slow_limit_s=120.0, grace_s=4.0)

def lost_in_the_data():
    while True:
        time.sleep(0.1)

def step(number):
    if rank == 1 and number == 3:
        lost_in_the_data()
    dist.all_reduce(torch.ones(4))
    watchdog.beat()

try:
    for number in range(100):
        step(number)
finally:
    watchdog.close()  # a rank whose neighbour has ended already gets here with an error of the collective
"""


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, timeout=120):
    err = process.communicate(timeout=timeout)[1]
    return process.returncode, err


def test_a_hang_in_a_collective_ends_all_ranks_with_their_stacks(tmp_path):
    processes = [python(COLLECTIVE, tmp_path, rank) for rank in range(3)]
    ends = [ended(process) for process in processes]
    assert [code for code, _ in ends] == [70, 70, 70], ends
    for rank, (_, err) in enumerate(ends):
        dump = (tmp_path / "hangs" / f"rank-{rank}.txt").read_text()
        assert f"watchdog: rank {rank} on " in dump and "3 steps done" in dump and "in step" in dump
        assert ("lost_in_the_data" in dump) == (rank == 1)
        assert ("all_reduce" in dump) == (rank != 1)
        (line,) = [line for line in err.splitlines() if line.startswith("watchdog: ")]
        assert "exit code 70" in line and f"rank-{rank}.txt" in line


def test_a_rank_with_more_time_dumps_with_the_others(tmp_path):
    """Rank 0 hangs in a save, where the slow limit holds, and the others in the step behind it."""
    saving = (
        "w = Watchdog(1.0, folder, rank, slow_limit_s=600, grace_s=6.0); w.beat()\nwith w.paused(): time.sleep(600)"
    )
    stepping = "w = Watchdog(1.0, folder, rank, grace_s=6.0); w.beat(); time.sleep(600)"
    ends = [ended(process) for process in (python(saving, tmp_path, 0), python(stepping, tmp_path, 1))]
    assert [code for code, _ in ends] == [70, 70]
    assert "another rank found a hang" in (tmp_path / "rank-0.txt").read_text()
    assert "rank 1" in (tmp_path / "hang").read_text()


def test_a_hang_that_keeps_the_gil_is_found(tmp_path):
    code = "w = Watchdog(0.5, folder, rank, slow_limit_s=0.5, grace_s=1.0); w.beat(); ctypes.PyDLL(None).sleep(600)"
    began = time.monotonic()
    assert ended(python(code, tmp_path, 0))[0] == 1
    assert time.monotonic() - began < 60
    assert 'File "<string>"' in (tmp_path / "rank-0.txt").read_text()


def test_where_the_dump_cannot_be_written_the_process_still_ends(tmp_path):
    """A file system that hangs: a pipe that nobody reads from takes the place of the file."""
    code = """
os.mkfifo(folder / "rank-0.txt")
reader = os.open(folder / "rank-0.txt", os.O_RDONLY | os.O_NONBLOCK)
watchdog = Watchdog(0.5, folder, rank, slow_limit_s=0.5, grace_s=1.0)
os.set_blocking(watchdog._file.fileno(), False)
try:
    while True:
        os.write(watchdog._file.fileno(), bytes(4096))
except BlockingIOError:
    os.set_blocking(watchdog._file.fileno(), True)
time.sleep(600)
"""
    code, err = ended(python(code, tmp_path, 0))
    assert code == 70 and "most recent call first" in err


def test_steps_that_come_in_time_leave_nothing_behind(tmp_path):
    watchdog = Watchdog(0.6, tmp_path / "hangs", 0)
    for _ in range(6):
        time.sleep(0.2)
        watchdog.beat()
    watchdog.close()
    watchdog.close()
    time.sleep(0.8)
    assert list((tmp_path / "hangs").iterdir()) == []


def test_the_slow_limit_holds_before_the_first_step_and_in_pauses(tmp_path):
    watchdog = Watchdog(10, tmp_path, 0)
    try:
        assert watchdog.limit() == 40
        watchdog.beat()
        assert watchdog.limit() == 10
        with watchdog.paused():
            assert watchdog.limit() == 40
            with watchdog.paused():
                pass
            assert watchdog.limit() == 40
        assert watchdog.limit() == 10
    finally:
        watchdog.close()


def test_a_long_save_is_no_hang(tmp_path):
    code = """
watchdog = Watchdog(0.5, folder, rank, slow_limit_s=60)
watchdog.beat()
with watchdog.paused():
    time.sleep(1.5)
watchdog.beat()
watchdog.close()
"""
    assert ended(python(code, tmp_path, 0)) == (0, "")


def test_the_mark_of_an_earlier_start_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "hang").write_text("rank 5 found a hang last week")
    code = "w = Watchdog(1.0, folder, rank); w.beat(); time.sleep(0.9); w.beat(); time.sleep(0.9); w.close()"
    assert ended(python(code, tmp_path, 0)) == (0, "")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_be_above_zero(tmp_path, limit):
    with pytest.raises(ValueError, match="limit_s"):
        Watchdog(limit, tmp_path, 0)
