"""Exports: what timm loads in a process without nanodist gives the features of the encoder."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from hpc.checkpoint.files import write
from hpc.errors import UserError
from nanodist import cli
from nanodist.cli.export import scores_of
from nanodist.encoders import Encoder, EncoderSpec, create_trunk, load_encoder, random_encoder
from nanodist.export import weights
from nanodist.export.card import facts, without_paths
from nanodist.export.weights import export_timm

SPEC = EncoderSpec("test_resnet", image_size=64, mean=0.4, std=0.2)
IMAGE = np.random.default_rng(0).integers(0, 65536, (80, 72)).astype(np.uint16)
SPECS = {
    "plain": SPEC,
    "own exposure, two stages, scaled, eight turns": EncoderSpec(
        "test_resnet", 64, 0.4, 0.2, "image", looks=[(0.75, 64, 8), (0.5, 0, 2)], pooling="last_two"
    ),
    "transformer at another size than its default": EncoderSpec(
        "test_vit", 64, 0.5, 0.25, looks=[(1.0, 64, 1)], trunk_options={"img_size": 64}
    ),
    "transformer of any size": EncoderSpec(
        "test_vit", 64, 0.5, 0.25, looks=[(1.0, 64, 1)], trunk_options={"dynamic_img_size": True}
    ),
}
FOREIGN = """
import pathlib
import sys

class NoNanodist:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nanodist", "hpc", "launch"):
            raise ImportError(name + " must not be needed")

sys.meta_path.insert(0, NoNanodist())
try:
    import nanodist
except ImportError:
    print("blocked")
import os
import numpy
for folder in sys.argv[2:]:
    os.chdir(pathlib.Path(folder).parent)
    code = pathlib.Path(folder, "README.md").read_text().split("```python\\n")[1].split("```")[0]
    scope = {}
    exec(compile(code, "card", "exec"), scope)
    numpy.save("features.npy", scope["embed"](numpy.load(sys.argv[1])).numpy())
    classifier = scope["timm"].create_model("local-dir:" + folder, pretrained=True, num_classes=3)
    assert classifier(scope["torch"].zeros(1, 1, 64, 64)).shape == (1, 3)
"""


def trained(spec: EncoderSpec = SPEC, name: str = "virus") -> Encoder:
    """An encoder whose weights and running statistics are not those of a new model."""
    encoder = random_encoder(spec, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            encoder.trunk.train()(torch.randn(8, 1, 64, 64, generator=generator) * 0.5 + 0.2)
    seen = {"manifest_hash": "abc123", "run": name, "step": 40, "groups": ["m1", "m2"]}
    return Encoder(spec, encoder.trunk.eval(), name, seen)


def card(**more) -> dict:
    recipe = {
        "seed": 3,
        "run_dir": "/home/somebody/runs/virus",
        "objective": {"name": "barlow_twins"},
        "data": {"store": "/scratch/somebody/virus_dev"},
        "train": {"global_batch_size": 64},
    }
    info = {"fingerprint": "9c01d2aa77be", "starts": [{"git_commit": "0f3c9a"}]}
    return facts("virus", recipe, info, trained().seen, **more)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_timm(trained(), tmp_path_factory.mktemp("export") / "virus", card())


def test_load_encoder_gives_the_encoder_back(exported):
    again, source = load_encoder(exported), trained()
    assert (again.spec, again.name, again.seen) == (source.spec, source.name, source.seen)
    assert again.weights_hash() == source.weights_hash()
    assert np.array_equal(again.embed([IMAGE]), source.embed([IMAGE]))


def test_folder_holds_what_timm_and_the_hub_want(exported):
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "nanodist.json",
    ]
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"] == "test_resnet" and config["num_classes"] == 0 and config["num_features"] > 0
    assert config["model_args"] == {"in_chans": 1}  # transformers passes num_classes itself
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["mean"], cfg["std"]) == ([1, 64, 64], [0.4], [0.2])
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    assert model.pretrained_cfg["input_size"][0] == 1
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.4]
    assert json.loads((exported / "nanodist.json").read_text())["spec"] == json.loads(json.dumps(asdict(SPEC)))


def test_without_pretrained_timm_keeps_random_weights(exported):
    """Why the card warns: if timm ever changes this, the warning should go."""
    loaded = timm.create_model(f"local-dir:{exported}")
    assert not torch.equal(next(loaded.parameters()), next(trained().trunk.parameters()))


def test_the_code_of_the_card_needs_no_nanodist(tmp_path):
    """One process for all specs, as importing torch and timm is what takes the time."""
    encoders = [trained(spec) for spec in SPECS.values()]
    folders = [export_timm(e, tmp_path / str(i) / "virus", card()) for i, e in enumerate(encoders)]
    np.save(tmp_path / "image.npy", IMAGE)
    command = [sys.executable, "-I", "-c", FOREIGN, str(tmp_path / "image.npy"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "blocked\n"
    for name, encoder, folder in zip(SPECS, encoders, folders, strict=True):
        found, expected = np.load(folder.parent / "features.npy"), encoder.embed([IMAGE])[0]
        assert found.shape == expected.shape, name
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name
        assert np.abs(expected).max() > 1e-6 and expected.std() > 0, name


def test_a_taken_target_is_refused_and_left_alone(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_timm(trained(), target, card())
    assert [p.name for p in target.iterdir()] == ["thesis.txt"] and (target / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (export_timm(trained(), tmp_path / "empty", card()) / "config.json").is_file()


def test_another_model_of_the_same_weights_leaves_nothing_behind(tmp_path, monkeypatch):
    wrong = {"in_chans": 1, "act_layer": "gelu"}
    monkeypatch.setattr(weights, "model_args", lambda spec, source: wrong)
    with pytest.raises(UserError, match="differ from the run's"):
        export_timm(trained(), tmp_path / "virus", card())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_weight_leaves_nothing_behind(tmp_path, monkeypatch):
    save = weights.save

    def broken(tensors, path):
        name = next(n for n in tensors if n.endswith("weight") and tensors[n].ndim == 4)
        save({**tensors, name: tensors[name] * 1.001}, path)

    monkeypatch.setattr(weights, "save", broken)
    with pytest.raises(UserError, match="loads another weight"):
        export_timm(trained(), tmp_path / "virus", card())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_leaves_nothing_behind(tmp_path, monkeypatch):
    save = weights.save
    monkeypatch.setattr(weights, "save", lambda tensors, path: save(dict(list(tensors.items())[1:]), path))
    with pytest.raises(UserError, match="cannot load the export"):
        export_timm(trained(), tmp_path / "virus", card())
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    encoder = trained()
    with torch.no_grad():
        next(encoder.trunk.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        export_timm(encoder, tmp_path / "virus", card())
    assert list(tmp_path.iterdir()) == []


def test_a_trunk_that_timm_does_not_know_is_refused(tmp_path):
    encoder = Encoder(EncoderSpec("resnet_of_mine", 64, 0.4, 0.2), create_trunk("test_resnet", 0), "x")
    with pytest.raises(UserError, match="resnet_of_mine"):
        export_timm(encoder, tmp_path / "x", card())


def test_export_leaves_the_encoder_as_it_was(tmp_path):
    encoder = trained()
    before = encoder.weights_hash()
    export_timm(encoder, tmp_path / "virus", card())
    assert encoder.weights_hash() == before


def test_card_says_what_was_trained(exported):
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "timm" and front["license"] == "unknown"
    for fact in ("Barlow Twins", "abc123", "9c01d2aa77be", "0f3c9a", "2560", "pretrained=True"):
        assert fact in text
    assert "No licence was stated" in text and "Not measured" in text
    assert "10.1039/D2DD00066K" in text and "10.1021/jacsau.3c00275" in text
    assert "/home/" not in text and "/scratch/" not in text and "store: virus_dev" in text


def test_card_with_licence_data_and_scores(tmp_path):
    row = {"encoder": "virus", "method": "linear", "labels_per_class": 8, "mean": 0.47, "low": 0.44, "high": 0.5}
    blank = {**row, "labels_per_class": 80, "mean": None, "low": None, "high": None}
    said = card(scores=[row, blank], license_name="CC-BY-4.0", data_note="TEM viruses, CC BY 4.0.")
    text = (export_timm(trained(), tmp_path / "virus", said) / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "cc-by-4.0"
    assert "| virus | linear | 8 | 0.470 | 0.440 to 0.500 |" in text and "| 80 |" not in text
    assert "TEM viruses" in text and "No licence" not in text and "non-commercial" not in text
    assert "pixel size of the training data was not stated" in text


def test_card_says_at_the_top_what_forbids_commercial_use_and_the_pixel_sizes(tmp_path):
    said = card(license_name="CC-BY-NC-4.0", data_note="Crops, non-commercial.", pixel_size_nm=[0.5, 2.0])
    text = (export_timm(trained(), tmp_path / "virus", said) / "README.md").read_text()
    top = text.partition("## ")[0]
    assert "**These weights are for non-commercial use only**: CC-BY-NC-4.0" in top
    assert "**The training data are for non-commercial use only**: Crops" in top and "of 0.5 to 2 nm" in text


def test_card_marks_transductive_scores(tmp_path):
    row = {"encoder": "virus", "method": "linear", "labels_per_class": 8, "mean": 0.5, "low": None, "high": None}
    said = card(scores=[{**row, "transductive": True}, {**row, "encoder": "older", "transductive": None}])
    text = (export_timm(trained(), tmp_path / "virus", said) / "README.md").read_text()
    assert "| virus \\* |" in text and "saw the test micrographs, without" in text
    assert "| older ? |" in text and "not known whether" in text


@pytest.mark.parametrize("stale", [False, True])
def test_scores_of_the_run_unless_stale(tmp_path, stale, capsys):
    (tmp_path / "run").mkdir()
    checkpoint = write(
        tmp_path / "run" / "checkpoints", 40, {"model": {"trunk.weight": torch.ones(2)}}, {"task": {}}, 2
    )
    probe = tmp_path / "run" / "probe" / "scores.json"
    probe.parent.mkdir()
    rows = [("virus", "pretrained"), ("other", "pretrained"), ("texture", "texture")]
    probe.write_text(json.dumps({"summary": [{"encoder": name, "kind": kind} for name, kind in rows]}))
    now = checkpoint.stat().st_mtime
    os.utime(probe, (now, now + (-10 if stale else 10)))
    found = scores_of(tmp_path / "run", "virus")
    assert [row["encoder"] for row in found] == ([] if stale else ["virus", "texture"])
    assert ("older than the checkpoint" in capsys.readouterr().err) == stale


HUGE = (1 << 62).to_bytes(8, "little") + b"{}"
HOSTILE = {
    "a pickle in place of the weights": ("model.safetensors", lambda old: pickle.dumps({"conv1.weight": 1})),
    "a header that claims exabytes": ("model.safetensors", lambda old: HUGE),
    "a weight file that was cut off": ("model.safetensors", lambda old: old[: len(old) // 2]),
    "a trunk that is a folder": ("nanodist.json", lambda old: old.replace(b'"test_resnet"', b'"local-dir:/tmp"')),
    "a trunk from the internet": ("nanodist.json", lambda old: old.replace(b'"test_resnet"', b'"hf-hub:a/b"')),
    "another trunk than the weights": ("nanodist.json", lambda old: old.replace(b'"test_resnet"', b'"test_vit"')),
    "an unknown key": ("nanodist.json", lambda old: old.replace(b'"spec": {', b'"spec": {"hook": "os.system",')),
    "a trunk that loads a file": (
        "nanodist.json",
        lambda old: old.replace(b'"trunk_options": {', b'"trunk_options": {"checkpoint_path": "/tmp/evil.pth"'),
    ),
    "JSON of another shape": ("nanodist.json", lambda old: b'["spec"]'),
    "JSON without end": ("nanodist.json", lambda old: b"[" * 200_000),
    "JSON that fills the memory": ("nanodist.json", lambda old: old + b" " * 2**26),
    "no JSON": ("nanodist.json", lambda old: b"\x80\x04"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_folder_is_refused_with_a_reason(tmp_path, exported, how):
    """What comes from strangers ends in one sentence: nothing is unpickled, fetched or half-loaded."""
    folder = tmp_path / "given"
    shutil.copytree(exported, folder)
    name, change = HOSTILE[how]
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(change(before))
    assert (folder / name).read_bytes() != before
    with pytest.raises(UserError):
        load_encoder(folder)


def test_a_hostile_name_stays_text(tmp_path):
    bad = '<script>"\n---\nlicense: mit\n```'
    text = (export_timm(trained(name=bad), tmp_path / "x", {"name": bad}) / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    assert "<script>" not in text
    compile(re.search(r"```python\n(.*?)```", text, re.S).group(1), "card", "exec")


def test_paths_are_cut():
    given = {"a": "/x/y/z", "b": ["C:\\data\\store", "relative/path"], "c": 3, "d": None}
    assert without_paths(given) == {"a": "z", "b": ["store", "relative/path"], "c": 3, "d": None}


def test_command_line(tmp_path, exported, capsys):
    target = tmp_path / "again"
    assert cli.main(["export", str(exported), "--to", str(target), "--license", "MIT", "--name", "second"]) == 0
    assert str(target) in capsys.readouterr().out
    assert np.array_equal(load_encoder(target).embed([IMAGE]), trained().embed([IMAGE]))
    assert "# second" in (target / "README.md").read_text()
    assert cli.main(["export", str(exported), "--to", str(target)]) == 2
    assert cli.main(["export", str(exported), "--to", str(tmp_path / "n"), "--format", "timm,pickle"]) == 2
    assert "pickle" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nowhere"), "--to", str(tmp_path / "n")]) == 2
    assert not (tmp_path / "n").exists()


def test_export_is_the_same_bytes_again(tmp_path, exported):
    again = export_timm(trained(), tmp_path / "virus", card())
    for file in exported.iterdir():
        assert file.read_bytes() == (again / Path(file).name).read_bytes()
