"""Every export format, loaded back as others load it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpc.errors import UserError
from nanodist import cli
from nanodist.encoders import Encoder, EncoderSpec, load_encoder, random_encoder
from nanodist.export import folder as folder_module
from nanodist.export import graph, loading, parity
from nanodist.export.folder import export, require
from nanodist.export.loading import FORMATS, loading_code
from nanodist.export.twin import TWINS, require_twin

IMAGE = np.random.default_rng(0).integers(0, 65536, (80, 72)).astype(np.uint16)
# All that embedding can do: own exposure, two stages, a crop, turns, both kinds of resizing.
RICH = EncoderSpec("resnet18", 64, 0.4, 0.2, "image", pooling="last_two", looks=[(0.375, 96, 3)])
PLAIN = EncoderSpec("test_resnet", 64, 0.4, 0.2)
# A transformer that takes 64 px and nothing else; the look cuts them out of larger images.
ONE_SIZE = EncoderSpec(
    "vit_tiny_patch16_224", 64, 0.5, 0.25, looks=[(1.0, 64, 1)], trunk_options={"img_size": 64, "depth": 1}
)
ROOT = Path(__file__).resolve().parent.parent.parent
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in folder_module.NEEDS["onnx"]), reason="no extra 'export'"
)


def trained(spec: EncoderSpec, seed: int = 1) -> Encoder:
    """An encoder whose running statistics are not those of a new model."""
    encoder = random_encoder(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(5):
            encoder.trunk.train()(torch.randn(4, 1, 64, 64, generator=generator) * 0.5 + 0.2)
    return Encoder(spec, encoder.trunk, "virus", {"manifest_hash": "abc", "run": "virus", "step": 4})


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One folder with all formats, and the parity report."""
    target = tmp_path_factory.mktemp("formats") / "virus"
    wanted = [f for f in FORMATS if f != "onnx" or not needs_onnx.args[0]]
    return target, export(trained(RICH), target, {"name": "virus"}, wanted)


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> bool:
    assert found.shape == wanted.shape and wanted.std() > 1e-3
    return bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())


@needs_onnx
def test_one_folder_holds_all_formats(everything):
    folder, report = everything
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "config.json",
        "model.safetensors",
        "nanodist.json",
        "onnx/model.json",
        "onnx/model.onnx",
        "parity.json",
        "torch-export/model.json",
        "torch-export/model.pt2",
        "torchvision/model.pth",
        "torchvision/model.safetensors",
        "torchvision/model_rgb.pth",
        "torchvision/model_rgb.safetensors",
    ]
    for name in ("model", "model_rgb"):
        old = torch.load(folder / "torchvision" / f"{name}.pth", weights_only=True)
        new = load_file(folder / "torchvision" / f"{name}.safetensors")
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in new)
    assert json.loads((folder / "parity.json").read_text()) == report
    assert [path.name for path in folder.parent.iterdir()] == ["virus"]


def test_parity_report_names_libraries_images_and_differences(everything):
    rows = {row["format"]: row for row in everything[1]["formats"]}
    assert {"timm", "huggingface", "torchvision", "torchvision-rgb", "torch-export"} <= set(rows)
    for name, row in rows.items():
        assert len(row["images"]) >= 3 and {kind for _, _, kind in row["images"]} == {"uint8", "uint16"}, name
        assert 0 <= row["relative_difference"] <= everything[1]["tolerance"] == 1e-5, name
    assert list(rows["torchvision"]["loaded_with"]) == ["torchvision", "torch"]
    # Another addition order in the stem: exactly zero would mean that the same file was compared twice.
    assert rows["torchvision-rgb"]["largest_difference"] > rows["torchvision"]["largest_difference"]


def test_the_timm_part_is_an_export_for_nanodist(everything):
    assert np.array_equal(load_encoder(everything[0]).embed([IMAGE]), trained(RICH).embed([IMAGE]))


def test_card_has_code_for_each_format_and_the_parity(everything):
    folder, report = everything
    text = (folder / "README.md").read_text()
    for kind in {row["format"] for row in report["formats"]} - {loading.TORCHVISION_RGB}:
        assert f"### {loading.TITLES[kind]}\n" in text and loading_code(RICH, "virus", kind) in text
    for row in report["formats"]:
        assert f"| {row['format']} | " in text
    hub = next(row["loaded_with"] for row in report["formats"] if row["format"] == "huggingface")
    assert ("transformers was not installed" in text) == ("transformers" not in hub)
    assert not re.search(r"\{\w+\}", text.split("## Recipe")[0].replace("{location}", ""))


@pytest.mark.parametrize("looks", [[(0.25, 0, 8), (1.0, 48, 6)], [(0.7, 0, 3), (0.75, 64, 1)], [(0.375, 200, 5)]])
def test_the_traced_module_is_embed_batch(looks):
    encoder = trained(dataclasses.replace(PLAIN, looks=looks, pooling="all"))
    for shape in ((1, 1, 90, 71), (3, 1, 64, 128)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(7))
        found = graph.Graph(encoder, fixed=False)(images)
        assert close(found.numpy(), encoder.embed_batch(images).numpy(), 1e-6), shape


@needs_onnx
def test_onnx_takes_any_batch_and_size(everything):
    import onnx
    import onnxruntime

    file = everything[0] / "onnx" / "model.onnx"
    proto = onnx.load(file)
    dims = [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 1, "height", "width"]
    assert proto.opset_import[0].version == graph.OPSET == json.loads((file.parent / "model.json").read_text())["opset"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    encoder = trained(RICH)
    for shape in ((1, 1, 64, 64), (3, 1, 101, 67), (2, 1, 48, 200)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(7))
        found = session.run(["features"], {"images": images.numpy()})[0]
        assert close(found, encoder.embed_batch(images).numpy()), shape


def test_program_takes_any_batch_and_size(everything):
    model, encoder = torch.export.load(everything[0] / "torch-export" / "model.pt2").module(), trained(RICH)
    for shape in ((1, 1, 64, 64), (3, 1, 101, 67), (2, 1, 160, 200)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(7))
        assert close(model(images).detach().numpy(), encoder.embed_batch(images).numpy()), shape


@needs_onnx
def test_transformer_of_one_size_cuts_it_out_in_the_graph(tmp_path):
    encoder = trained(ONE_SIZE)
    with pytest.raises(AssertionError):
        encoder.embed([IMAGE[:40]])
    report = export(encoder, tmp_path / "vit", {"name": "vit"}, ["onnx", "torch-export"])
    for row in report["formats"]:
        assert [64, 64, "uint8"] in row["images"] and [128, 64, "uint16"] in row["images"]
    facts = json.loads((tmp_path / "vit" / "onnx" / "model.json").read_text())
    assert "from 64 x 64 px" in facts["sizes"] and facts["sizes"] in (tmp_path / "vit" / "README.md").read_text()
    with pytest.raises(UserError, match="neither a run directory"):
        load_encoder(tmp_path / "vit")


def test_transformers_loads_the_folder(everything):
    pytest.importorskip("transformers", reason="transformers is not installed")
    row = next(row for row in everything[1]["formats"] if row["format"] == "huggingface")
    assert "transformers" in row["loaded_with"]


OLD = """
import sys
import numpy as np
import torch, torchvision
image = np.load(sys.argv[1])
for kind in sys.argv[2:]:
    scope = {}
    exec(open(kind + ".py").read(), scope)
    np.save(kind + ".npy", scope["embed"](image).numpy())
print(torch.__version__)
"""


def test_debians_old_torchvision_loads_both_without_safetensors(everything, tmp_path):
    """torch 1.13 of another Python, by the reader that the guide shows."""
    system = shutil.which("python3", path="/usr/bin:/bin")
    probe = "import importlib.util as u; print(all(map(u.find_spec, ('torch', 'torchvision'))))"
    there = system and subprocess.run([system, "-I", "-c", probe], capture_output=True, text=True, check=False).stdout
    if there != "True\n":
        pytest.skip("no python3-torchvision (Debian 12: apt-get install python3-torchvision)")
    reader = (ROOT / "docs" / "export.md").read_text().split("```python\n")[1].split("```")[0]
    kinds = ("torchvision", loading.TORCHVISION_RGB)
    for kind in kinds:
        code = loading_code(RICH, str(everything[0]), kind)
        assert "from safetensors.torch import load_file\n" in code
        (tmp_path / f"{kind}.py").write_text(code.replace("from safetensors.torch import load_file\n", reader))
    np.save(tmp_path / "image.npy", IMAGE)
    command = [system, "-I", "-c", OLD, "image.npy", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if not done.stdout.startswith("1."):
        pytest.skip(f"torch {done.stdout.strip()} is not old")
    wanted = trained(RICH).embed([IMAGE])[0]
    assert all(close(np.load(tmp_path / f"{kind}.npy"), wanted) for kind in kinds)


def test_the_torchvision_names_are_torchvisions_for_every_twin():
    import torchvision

    for name in TWINS:
        assert hasattr(torchvision.models, name)
    require_twin(random_encoder(EncoderSpec("resnet50", 64, 0.4, 0.2), 0))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (EncoderSpec("resnet10t", 64, 0.4, 0.2), "resnet10t has no twin in torchvision"),
        (EncoderSpec("resnet18", 64, 0.4, 0.2, trunk_options={"channels": [32, 64, 128, 256]}), "channels.*no twin"),
    ],
)
def test_a_trunk_without_twin_is_refused(tmp_path, spec, said):
    with pytest.raises(UserError, match=said):
        export(random_encoder(spec, 0), tmp_path / "x", {"name": "x"}, ["timm", "torchvision"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(
        UserError, match="'keras' does not exist; allowed: timm, huggingface, torchvision, onnx, torch-"
    ):
        require(["timm", "keras"])
    with pytest.raises(UserError, match="names no format"):
        require([])
    assert require(["torch-export", "timm", "timm"]) == ["timm", "torch-export"]


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", str(tmp_path), "--to", str(tmp_path / "x"), "--format", "onnx"]) == 2
    assert "onnxscript: pip install 'nanodist[export]'" in capsys.readouterr().err


def test_an_export_that_needs_nanodist_is_refused():
    job = parity.Job("timm", "import nanodist.encoders\n", "embed", [[np.zeros(3)]])
    with pytest.raises(UserError, match="without nanodist, so nothing was written: ImportError: nanodist"):
        parity.compare([job], [IMAGE])


def test_other_preprocessing_than_the_runs_is_refused(tmp_path, monkeypatch):
    """Right weights, wrong scale of the pixels: only a check from image files on sees it."""
    whole = loading.loading_code
    monkeypatch.setattr(parity, "loading_code", lambda *args: whole(*args).replace("(x - 0.4)", "(x - 0.4001)"))
    with pytest.raises(UserError, match="timm export differ from the run's by"):
        export(trained(PLAIN), tmp_path / "x", {"name": "x"}, ["timm"])
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_other_weights_is_refused(tmp_path, monkeypatch):
    program, other = graph.program, trained(PLAIN, seed=2)
    monkeypatch.setattr(graph, "program", lambda encoder, precision: program(other, precision))
    with pytest.raises(UserError, match="torch-export export differ from the run's by"):
        export(trained(PLAIN), tmp_path / "x", {"name": "x"}, ["torch-export"])
    assert list(tmp_path.iterdir()) == []
