"""The writing thread: what it holds, what it says, and what a full disk or a kill leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hpc.checkpoint import files
from hpc.checkpoint.retention import Retention
from hpc.checkpoint.writer import CheckpointWriter, HostCopy
from tests.hpc.small_disk import fill, small_disk

ROOT = Path(__file__).resolve().parent.parent.parent


def _tensors(value, size=6):
    return {"model": {"w": torch.full((size,), float(value))}, "optimizer": {"exp_avg/w": torch.ones(size)}}


def _value(folder):
    return float(files.read_tensors(folder / "model.safetensors")["w"][0])


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the event is set."""
    event, put = threading.Event(), files.put

    def waiting(*arguments):
        assert event.wait(20)
        return put(*arguments)

    monkeypatch.setattr(files, "put", waiting)
    yield event
    event.set()


@pytest.mark.parametrize("background", [True, False])
def test_a_saved_state_is_whole_and_the_rule_holds(tmp_path, background):
    writer = CheckpointWriter(tmp_path, Retention(2, 0, 1), background)
    for step, score in [(10, 0.1), (20, 0.4), (30, 0.3), (40, 0.2)]:
        writer.save(step, _tensors(step), {"task": {"at": step}}, score)
    assert writer.wait() is None
    assert sorted(p.name[-2:] for p in tmp_path.glob("step-*")) == ["10", "30", "40"]
    found, said = files.newest_whole(tmp_path)
    assert _value(found) == 40 and said == [] and files.read_state(found)["task"] == {"at": 40}


def test_training_goes_on_and_changes_nothing_that_is_being_written(tmp_path, gate):
    writer, tensors, state = CheckpointWriter(tmp_path, Retention(2, 0, 0), True), _tensors(1.0), {"task": [1]}
    writer.save(10, tensors, state)
    tensors["model"]["w"].fill_(-1.0)
    state["task"].append(2)
    assert writer.problem() is None and not list(tmp_path.iterdir())
    gate.set()
    assert writer.wait() is None
    assert _value(tmp_path / "step-00000010") == 1.0
    assert files.read_state(tmp_path / "step-00000010")["task"] == [1]


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    writer = CheckpointWriter(tmp_path, Retention(3, 0, 0), True)
    writer.save(10, _tensors(1.0), {})
    second = threading.Thread(target=writer.save, args=(20, _tensors(2.0), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(20)
    assert writer.wait() is None
    # The memory of the copy is used again, and the first file has its own values all the same.
    assert [_value(tmp_path / f"step-000000{step}") for step in (10, 20)] == [1.0, 2.0]


def test_the_copy_keeps_its_memory_and_follows_another_shape():
    copy, first = HostCopy(), _tensors(1.0)
    held, ready = copy.take(first)
    assert ready is None
    pointer = held["model"]["w"].data_ptr()
    assert pointer != first["model"]["w"].data_ptr()
    held, _ = copy.take(_tensors(2.0))
    assert held["model"]["w"].data_ptr() == pointer and float(held["model"]["w"][0]) == 2.0
    held, _ = copy.take(_tensors(3.0, size=9))
    assert held["model"]["w"].shape == (9,)
    assert "optimizer" not in copy.take({"model": {"w": torch.ones(9)}})[0]


def test_what_lies_in_the_copys_own_memory_is_not_copied():
    copy = HostCopy()
    flat = copy.room("moments", 6, torch.ones(1))
    flat.copy_(torch.arange(6.0))
    held, _ = copy.take({"model": {"w": torch.ones(2)}, "optimizer": {"m/w": flat[2:4].view(1, 2)}})
    assert held["optimizer"]["m/w"].data_ptr() == flat[2:].data_ptr() and held["model"]["w"].tolist() == [1.0, 1.0]
    assert copy.room("moments", 6, torch.ones(1)).data_ptr() == flat.data_ptr()
    assert copy.room("moments", 7, torch.ones(1)).shape == (7,)


def test_the_copy_of_gpu_tensors_is_complete_after_its_event():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    copy, x = HostCopy(), torch.ones(1 << 24, device="cuda")
    for value in (1.0, 2.0):
        x.fill_(value)
        held, ready = copy.take({"model": {"x": x}})
        x.fill_(-1.0)  # comes after the copy in the stream
        ready.synchronize()
        assert held["model"]["x"].is_pinned() and torch.equal(held["model"]["x"], torch.full((1 << 24,), value))


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_one_sentence_and_the_last_good_one_stays(tmp_path, background):
    with small_disk(tmp_path / "disk", "2m") as disk:
        checkpoints = disk / "checkpoints"
        checkpoints.mkdir()
        writer = CheckpointWriter(checkpoints, Retention(2, 0, 0), background)
        writer.save(10, _tensors(1.0, 60_000), {})
        assert writer.wait() is None
        ballast = fill(disk, leave=300_000)  # room for the first of the two files
        for step in (20, 30):
            writer.save(step, _tensors(2.0, 60_000), {})
            problem = writer.wait()
            assert problem is not None and "\n" not in problem
            assert f"step-000000{step} could not be written: No space left on device (it takes 0.5 MB" in problem
            assert problem.endswith("step-00000010 stays the latest")
            assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000010"]
            assert files.newest_whole(checkpoints) == (checkpoints / "step-00000010", [])
            assert writer.problem() is None
        ballast.unlink()
        writer.save(40, _tensors(4.0, 60_000), {})
        assert writer.wait() is None and _value(files.latest_checkpoint(checkpoints)) == 4.0


def test_a_disk_full_at_every_byte_never_leaves_a_broken_one(tmp_path):
    """Whatever page of whatever file is the first that finds no room, also that of ``latest``."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        checkpoints = disk / "checkpoints"
        checkpoints.mkdir()
        writer = CheckpointWriter(checkpoints, Retention(1, 0, 0), False)
        writer.save(1, _tensors(1.0, 3000), {})
        assert writer.wait() is None
        outcomes = set()
        for pages in range(14):
            ballast = fill(disk, leave=pages * 4096)
            writer.save(2 + pages, _tensors(2.0, 3000), {})
            problem = writer.wait()
            outcomes.add(problem is None)
            ballast.unlink()
            newest, said = files.newest_whole(checkpoints)
            named = (checkpoints / "latest").read_text().strip()
            assert files.is_whole(checkpoints / named) and newest.name == named
            assert all("is newer" in sentence for sentence in said)
            assert not list(checkpoints.glob(".*"))
        assert outcomes == {True, False}


def test_a_failure_that_nobody_asked_about_is_not_lost(tmp_path):
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", Retention(2, 0, 0), True)
    (tmp_path / "file").write_text("in the way")
    writer.save(10, _tensors(1.0), {})
    writer.save(20, _tensors(1.0), {})
    problem = writer.wait()
    assert problem is not None and "step-00000010" in problem and "step-00000020" in problem
    assert "Not a directory" in problem and "there is no checkpoint yet" in problem
    assert writer.wait() is None


def test_a_fault_of_another_kind_is_said_as_well(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(2, 0, 0), True)
    writer.save(10, {"model": {"z": torch.zeros(2, dtype=torch.complex64)}}, {})
    assert "'z' has type torch.complex64" in (writer.wait() or "")
    with pytest.raises(TypeError):  # at once, where the caller can be seen in the traceback
        writer.save(20, _tensors(1.0), {"task": object()})


CHILD = """
import sys, torch
from pathlib import Path
from hpc.checkpoint.retention import Retention
from hpc.checkpoint.writer import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), Retention(2, 0, 0), True)
tensors = {"model": {f"w{i}": torch.full((1 << 20,), float(i)) for i in range(int(sys.argv[2]))}}
for step in range(20, 10_000, 10):
    writer.save(step, tensors, {})
    if len(sys.argv) > 3:
        sys.exit()
"""


def _child(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], env=environment)


def test_a_writer_killed_in_the_middle_leaves_the_one_before_whole(tmp_path):
    files.write(tmp_path, 10, _tensors(1.0), {}, keep=2)
    process = _child(tmp_path, 24)
    try:
        deadline = time.monotonic() + 60
        while not (halves := [p for p in tmp_path.glob(".step-*.tmp/*") if p.stat().st_size > 1 << 20]):
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert halves and list(tmp_path.glob(".step-*.tmp"))
    found, said = files.newest_whole(tmp_path)
    assert files.is_whole(found) and found.name == (tmp_path / "latest").read_text().strip() and said == []
    files.clean(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert files.newest_whole(tmp_path) == (found, [])


def test_a_process_that_ends_still_finishes_its_checkpoint(tmp_path):
    assert _child(tmp_path, 8, "once").wait(timeout=60) == 0
    assert files.newest_whole(tmp_path) == (tmp_path / "step-00000020", [])


def test_python_runs_on_while_a_checkpoint_is_written(tmp_path):
    """No part of the writing holds Python's lock for long, as safetensors' own writer once did."""
    tensors = {"model": {"w": torch.zeros(1 << 25)}}  # 134 MB
    writer = CheckpointWriter(tmp_path, Retention(1, 0, 0), True)
    writer.save(10, tensors, {})
    longest, rounds = 0.0, 0
    while writer._thread is not None and writer._thread.is_alive():
        before = time.process_time()
        sum(range(100))
        # Processor time of both threads, so that a busy machine counts for nothing.
        longest, rounds = max(longest, time.process_time() - before), rounds + 1
    assert writer.wait() is None
    assert rounds > 1000 and longest < 0.25  # safetensors 0.4.5 holds it for 0.5 s
