import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpc.checkpoint import layout

TENSORS = {
    "half": torch.randn(5, 3).half(),
    "brain": torch.randn(7).bfloat16(),
    "wide": torch.randn(2, 2, dtype=torch.float64),
    "single/ä": torch.randn(4, 3, 2),
    "count": torch.tensor(7),
    "byte": torch.arange(5, dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
}


def test_safetensors_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    facts = layout.write_tensors(path, TENSORS)
    read = load_file(path)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert facts == layout.file_facts(path) and facts.size == path.stat().st_size


def test_float32_is_byte_for_byte_what_safetensors_writes(tmp_path):
    named = {f"layer.{i}": torch.randn(3, i + 1) for i in range(12)}
    layout.write_tensors(tmp_path / "ours", named)
    save_file(named, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_each_tensor_is_aligned(tmp_path):
    layout.write_tensors(tmp_path / "a", TENSORS)
    data = (tmp_path / "a").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0


def test_larger_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "PIECE", 64)
    tensor = torch.randn(1001)
    layout.write_tensors(tmp_path / "a", {"x": tensor})
    with safe_open(tmp_path / "a", "pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor)


def test_a_type_that_cannot_be_held_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"'z' has type torch\.complex64"):
        layout.write_tensors(tmp_path / "a", {"z": torch.zeros(2, dtype=torch.complex64)})
