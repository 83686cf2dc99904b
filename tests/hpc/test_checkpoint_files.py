import json

import pytest
import torch

from hpc.checkpoint import files, layout
from hpc.checkpoint.files import CheckpointError


def _tensors(value):
    return {"model": {"w": torch.full((3, 2), value)}, "optimizer": {"exp_avg/w": torch.ones(3, 2)}}


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        files.write(tmp_path, step, _tensors(float(step)), {"task": {"a": step}}, keep=2)
    return tmp_path


def test_newest_is_found_and_old_ones_go(folder):
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000020", "step-00000030"]
    newest = files.latest_checkpoint(folder)
    assert newest.name == "step-00000030" and files.read_state(newest)["task"] == {"a": 30}
    assert float(files.read_tensors(newest / "model.safetensors")["w"][0, 0]) == 30
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "index.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty", "folder"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(folder, name, damage):
    broken = folder / "step-00000030" / name
    data = bytearray(broken.read_bytes())
    if damage in ("remove", "folder"):
        broken.unlink()
        if damage == "folder":
            broken.mkdir()
    elif damage == "flip":
        data[len(data) // 2] ^= 0x10
        broken.write_bytes(data)
    else:
        broken.write_bytes(data[:-5] if damage == "truncate" else b"")
    problem = files.fault(folder / "step-00000030")
    assert problem is not None and name in problem
    found, said = files.newest_whole(folder)
    assert found.name == "step-00000020" and len(said) == 1 and f"step-00000030/{name}" in said[0]
    # Saving the same step again replaces what is broken.
    files.write(folder, 30, _tensors(31.0), {}, keep=2)
    newest, said = files.newest_whole(folder)
    assert float(files.read_tensors(newest / "model.safetensors")["w"][0, 0]) == 31 and said == []


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_named(folder, name):
    path = folder / "step-00000030" / name
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        problem = files.fault(path.parent)
        assert problem is not None and f"step-00000030/{name} " in problem, (position, problem)
    path.write_bytes(data)
    assert files.is_whole(path.parent)


def test_a_flipped_bit_in_latest_never_leads_to_nothing_and_is_said(folder):
    pointer = folder / "latest"
    data = pointer.read_bytes()
    for position in range(len(data) - 1):  # a flipped line break at the end is one of the cases of the next test
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            pointer.write_bytes(flipped)
            found, said = files.newest_whole(folder)
            # One such byte makes the name of the checkpoint before.
            older = flipped == b"step-00000020\n"
            assert found.name == ("step-00000020" if older else "step-00000030")
            assert len(said) == 1 and str(pointer) in said[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "names ''"),
        (b"step-0000", "names 'step-0000'"),
        (b"\xff\xfe", "cannot be read"),
        (b"../step-00000030", "which is not there"),
        (b"step-00000030\x0b2", "which is not there"),
    ],
)
def test_a_damaged_latest_is_said_and_the_newest_is_taken(folder, content, problem):
    (folder / "latest").unlink()
    if content is not None:
        (folder / "latest").write_bytes(content)
    found, (said,) = files.newest_whole(folder)
    assert found.name == "step-00000030" and problem in said
    files.write(folder, 40, _tensors(4.0), {}, keep=2)
    assert files.newest_whole(folder) == (folder / "step-00000040", [])


def test_an_index_of_an_older_version_without_its_own_hash_is_read(folder):
    path = folder / "step-00000030" / "index.json"
    index = json.loads(path.read_text())
    del index["xxh3_128"]
    path.write_text(json.dumps(index))
    assert files.is_whole(path.parent)


def test_what_was_written_is_read_back_before_it_counts(folder, monkeypatch):
    def lying(path, tensors):
        facts = layout.write_tensors(path, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return facts

    monkeypatch.setattr(files, "write_tensors", lying)
    with pytest.raises(CheckpointError, match=r"read back .*model\.safetensors does not match its hash"):
        files.write(folder, 40, _tensors(4.0), {}, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000020", "step-00000030"]
    assert files.newest_whole(folder) == (folder / "step-00000030", [])


def test_what_a_killed_writer_left_is_cleaned_and_checkpoints_are_not(folder):
    (folder / ".step-00000040.77.tmp" / "deep").mkdir(parents=True)
    (folder / ".step-00000040.77.tmp" / "model.safetensors").write_bytes(b"half")
    (folder / ".step-00000010.77.old.tmp").mkdir()
    (folder / ".latest.77.tmp").write_text("step")
    (folder / "step-00000030" / "index.json").unlink()
    (folder / ".notes.tmp").write_text("mine")
    assert files.clean(folder) == [".latest.77.tmp", ".step-00000010.77.old.tmp", ".step-00000040.77.tmp"]
    assert sorted(p.name for p in folder.iterdir()) == [".notes.tmp", "latest", "step-00000020", "step-00000030"]
    assert files.clean(folder) == []


def test_none_whole_is_an_error_that_names_the_newest(folder):
    for step in (20, 30):
        (folder / f"step-000000{step}" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000030/model\.safetensors is missing"):
        files.latest_checkpoint(folder)


def test_none_yet(tmp_path):
    assert files.candidates(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        files.latest_checkpoint(tmp_path)


def test_latest_may_point_back_or_nowhere(folder):
    (folder / "latest").write_text("step-00000020\n")
    found, (said,) = files.newest_whole(folder)
    assert found.name == "step-00000020" and "step-00000030 is newer" in said
    (folder / "latest").write_text("step-99999999\n")
    assert files.latest_checkpoint(folder).name == "step-00000030"


def test_another_version_is_refused_with_both(folder):
    path = folder / "step-00000030" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    with pytest.raises(CheckpointError, match="version 9, this nanodist reads 1"):
        files.read_state(path.parent)


def test_a_failed_write_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        files.write(folder, 40, _tensors(1.0), {}, keep=2)
    assert files.latest_checkpoint(folder).name == "step-00000030"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000020", "step-00000030"]
