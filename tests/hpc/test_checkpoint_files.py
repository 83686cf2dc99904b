import json

import pytest
import torch

from hpc.checkpoint import files
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


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(folder, name, damage):
    broken = folder / "step-00000030" / name
    data = bytearray(broken.read_bytes())
    if damage == "remove":
        broken.unlink()
    elif damage == "truncate":
        broken.write_bytes(data[:-5])
    else:
        data[len(data) // 2] ^= 0x10
        broken.write_bytes(data)
    problem = files.fault(folder / "step-00000030")
    assert problem is not None and name in problem
    assert files.latest_checkpoint(folder).name == "step-00000020"
    # Saving the same step again replaces what is broken.
    files.write(folder, 30, _tensors(31.0), {}, keep=2)
    assert float(files.read_tensors(files.latest_checkpoint(folder) / "model.safetensors")["w"][0, 0]) == 31


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
    assert files.latest_checkpoint(folder).name == "step-00000020"
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

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        files.write(folder, 40, _tensors(1.0), {}, keep=2)
    assert files.latest_checkpoint(folder).name == "step-00000030"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000020", "step-00000030"]
