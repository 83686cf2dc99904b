"""A fine-tuned classifier runs in a process without nanodist and gives the probabilities of nanodist predict."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from hpc.errors import UserError
from nanodist.downstream.finetune.load import Loaded
from nanodist.downstream.finetune.model import Classifier, plain_head
from nanodist.encoders import EncoderSpec, create_trunk
from nanodist.export.classifier import export_classifier

CLASSES = ("sphere", "rod | cube", "disc")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    spec = EncoderSpec("test_resnet", 32, 0.5, 0.2, looks=[(0.75, 40, 8)], pooling="last_two")
    trunk = create_trunk(spec.trunk, 0)
    with torch.inference_mode():
        stages = trunk.eval().forward_intermediates(torch.zeros(1, 1, 32, 32), intermediates_only=True)
    head = plain_head(sum(stage.shape[1] for stage in stages[-2:]), 3)
    torch.nn.init.normal_(head[1].weight, generator=torch.Generator().manual_seed(0))
    model = Classifier(trunk, head, spec, True).eval()
    return Loaded(model, CLASSES, tmp_path_factory.mktemp("run"), (48, 48), None)


def test_both_graphs_give_the_probabilities_of_predict(loaded, tmp_path):
    card = {"license": "CC-BY-4.0", "scores": [
        {"labels_per_class": 8, "n_train": 24, "n_test": 9, "balanced_accuracy": 0.7, "low": 0.6, "high": 0.8}
    ]}  # fmt: skip
    parity = export_classifier(loaded, tmp_path / "e", ("torch-export", "onnx"), "shapes", card)
    assert [row["format"] for row in parity["formats"]] == ["onnx", "torch-export"]
    assert all(row["largest_difference"] < 1e-5 and len(row["images"]) == 4 for row in parity["formats"])
    facts = json.loads((tmp_path / "e" / "onnx" / "model.json").read_text())
    assert facts["classes"] == list(CLASSES) and facts["output"]["name"] == "probabilities"
    images = np.random.default_rng(0).random((2, 1, 60, 52)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "e" / "onnx" / "model.onnx"))
    (found,) = session.run(["probabilities"], {"images": images})
    wanted = loaded.model.looked_at(torch.from_numpy(images))[0].numpy()
    assert found == pytest.approx(wanted, abs=1e-5) and found.sum(1) == pytest.approx(1, abs=1e-5)
    assert np.ptp(wanted) > 0.05
    text = (tmp_path / "e" / "README.md").read_text()
    assert "def predict(pixels)" in text and "| 8 | 24 | 9 | 0.700 | 0.600 to 0.800 |" in text
    assert "rod \\| cube" in text and "origin and licence were not stated" in text and "No licence" not in text


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("symmetries", [1, 8])
def test_graphs_of_several_looks_give_the_probabilities_of_predict(tmp_path, joined, symmetries):
    spec = EncoderSpec("test_resnet", 32, 0.5, 0.2, looks=[(0.75, 40, symmetries), (1.5, 20, symmetries)])
    trunk = create_trunk(spec.trunk, 0)
    head = plain_head(trunk.num_features * (2 if joined else 1), 3)
    torch.nn.init.normal_(head[1].weight, generator=torch.Generator().manual_seed(0))
    made = Loaded(Classifier(trunk, head, spec, True, joined=joined).eval(), CLASSES, tmp_path, (48, 48), None)
    parity = export_classifier(made, tmp_path / "e", ("torch-export", "onnx"), "shapes", {})
    assert all(row["largest_difference"] < 1e-5 for row in parity["formats"])
    images = np.random.default_rng(0).random((2, 1, 48, 48)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "e" / "onnx" / "model.onnx"))
    wanted = made.model.looked_at(torch.from_numpy(images))[0].numpy()
    assert session.run(["probabilities"], {"images": images})[0] == pytest.approx(wanted, abs=1e-5)
    assert (
        np.ptp(wanted) > 0.05 and "reflections, at 2 scales, are inside" in (tmp_path / "e" / "README.md").read_text()
    )


def test_a_format_without_its_head_is_refused(loaded, tmp_path):
    with pytest.raises(UserError, match="exported as onnx or torch-export, not as timm"):
        export_classifier(loaded, tmp_path / "e", ("timm",), "shapes", {})
    assert not (tmp_path / "e").exists()
