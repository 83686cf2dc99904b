"""A fine-tuned segmentation, and weights in fp16, in a process without nanodist."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from hpc.errors import UserError
from nanodist.downstream.finetune.recipe import DecoderConfig
from nanodist.downstream.segment.model import Segmenter
from nanodist.downstream.segment.predict import LoadedSegmenter
from nanodist.encoders import EncoderSpec, create_trunk, load_encoder
from nanodist.export.folder import export
from nanodist.export.precision import TOLERANCES, require_half
from nanodist.export.segmentation import Tile, export_segmentation
from tests.nanodist.test_export_formats import IMAGE, PLAIN, trained

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("onnxscript", reason="no extra 'export'")
SCORES = [
    {"metric": "dice", "class": 255, "n_train": 4, "n_test": 6, "mean": 0.351, "low": 0.329, "high": 0.369},
    {"metric": "dice", "class": 7, "n_train": 4, "n_test": 6, "mean": None, "low": None, "high": None},
]


def loaded() -> LoadedSegmenter:
    spec = EncoderSpec("test_resnet", 32, 0.5, 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Segmenter(create_trunk("test_resnet", 0), 3, spec, DecoderConfig(width=16), True).eval()
    return LoadedSegmenter(model, (0, 128, 255), 44, 32, 5, Path("nowhere"))


def test_a_segmentation_gives_the_probabilities_of_predict(tmp_path):
    source = loaded()
    card = {"license": "CC-BY-4.0", "scores": SCORES, "pixel_size_nm": [0.5, 0.8]}
    parity = export_segmentation(source, tmp_path / "e", ("torch-export", "onnx"), "wires", card)
    assert [row["format"] for row in parity["formats"]] == ["onnx", "torch-export"]
    # A tile, smaller than a tile, and larger: padding, cutting and blending are those of the card's code.
    assert all([shape[:2] for shape in row["images"]] == [[44, 44], [23, 51], [93, 66]] for row in parity["formats"])
    assert all(0 < row["relative_difference"] <= 1e-5 for row in parity["formats"])
    facts = json.loads((tmp_path / "e" / "onnx" / "model.json").read_text())
    assert facts["classes"] == [0, 128, 255] and (facts["tile_px"], facts["overlap_px"]) == (44, 22)
    assert facts["pixel_size_nm"] == [0.5, 0.8] and facts["input"]["shape"] == ["batch", 1, 44, 44]
    session = onnxruntime.InferenceSession(str(tmp_path / "e" / "onnx" / "model.onnx"))
    images = np.random.default_rng(0).random((3, 1, 44, 44)).astype(np.float32)
    (found,) = session.run(["probabilities"], {"images": images})
    with torch.inference_mode():
        wanted = Tile(source, torch.float32)(torch.from_numpy(images)).numpy()
    assert found == pytest.approx(wanted, abs=1e-5) and found.sum(1) == pytest.approx(1, abs=1e-5)
    assert np.ptp(wanted) > 0.05
    text = (tmp_path / "e" / "README.md").read_text()
    assert "def segment(pixels)" in text and "| dice | 255 | 4 | 6 | 0.351 | 0.329 to 0.369 |" in text
    assert "pixel size of 0.5 to 0.8 nm" in text and "origin and licence were not stated" in text


def test_what_a_segmentation_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="exported as onnx or torch-export, not as timm: its decoder"):
        export_segmentation(loaded(), tmp_path / "e", ("timm",), "wires", {})
    broken = loaded()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="is not finite"):
        export_segmentation(broken, tmp_path / "e", ("onnx",), "wires", {})
    assert list(tmp_path.iterdir()) == []


def test_fp16_is_half_as_large_and_within_its_own_tolerance(tmp_path):
    source = trained(PLAIN)
    report = export(source, tmp_path / "half", {"name": "half"}, ["timm", "onnx", "torch-export"], "fp16")
    assert report["precision"] == "fp16" and report["tolerance"] == TOLERANCES["fp16"]
    # Above what float32 would give: rounding is there, and in the graphs also in what they compute.
    assert all(1e-5 < row["relative_difference"] < TOLERANCES["fp16"] for row in report["formats"])
    held, whole = load_file(tmp_path / "half" / "model.safetensors"), source.trunk.state_dict()
    assert all(torch.equal(held[key], value.to(held[key].dtype)) for key, value in whole.items())
    assert {value.dtype for value in held.values() if value.is_floating_point()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "onnx" / "model.json").read_text())["precision"] == "fp16"
    assert "rounded to fp16" in (tmp_path / "half" / "README.md").read_text()
    wanted = source.embed([IMAGE])
    assert np.abs(load_encoder(tmp_path / "half").embed([IMAGE]) - wanted).max() < 2e-2 * np.abs(wanted).max()


def test_weights_beyond_fp16_are_refused():
    with pytest.raises(UserError, match=r"weight a of x is too large for fp16 \(65504\)"):
        require_half({"a": torch.tensor([1.0, -7e4])}, "x")
