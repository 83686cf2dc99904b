"""Run directories of strangers: classifiers, segmentations and PairVAEs load whole or are refused in one sentence.

Nothing is unpickled, nothing outside the folder is opened, and no more memory is taken than the weights have.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from hpc.checkpoint.files import encode_state, write
from hpc.config import to_yaml
from hpc.errors import UserError
from nanodist.downstream.finetune.load import load_classifier
from nanodist.downstream.finetune.model import Classifier, plain_head
from nanodist.downstream.finetune.recipe import DecoderConfig
from nanodist.downstream.segment.model import Segmenter
from nanodist.downstream.segment.predict import load_segmenter
from nanodist.encoders import EncoderSpec, create_trunk, load_encoder
from nanodist.pairvae.load import load as load_pairvae
from nanodist.pairvae.recipe import RECIPE_FILE
from tests.nanodist.test_export_pairvae import GEOMETRY, trained

pytest.importorskip("segmentation_models_pytorch")
SPEC = EncoderSpec("test_resnet", 32, 0.5, 0.2)
SECRET = "what nobody may see"
GIGABYTE = 1 << 20  # in the kilobytes that the system counts in
LOADERS: dict[str, Callable[[Path], Any]] = {
    "encoder": load_encoder,
    "classifier": load_classifier,
    "segmentation": load_segmenter,
    "pairvae": load_pairvae,
}


def _save(run: Path, model: torch.nn.Module, task: dict[str, Any]) -> Path:
    write(run / "checkpoints", 5, {"model": model.state_dict()}, {"task": task}, 1)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run directory of each kind, which its loader takes."""
    folder, encoder = tmp_path_factory.mktemp("honest"), asdict(SPEC)
    trunk = create_trunk(SPEC.trunk, 0)
    labelled = {"encoder": encoder, "best": None}
    classifier = Classifier(trunk, plain_head(trunk.num_features, 3), SPEC, True)
    task = {**labelled, "kind": "classification", "classes": ["a", "b", "c"], "tile_px": [32, 32]}
    _save(folder / "classifier", classifier, task)
    decoder = DecoderConfig(width=16)
    task = {**labelled, "kind": "segmentation", "classes": ["0", "255"], "decoder": asdict(decoder)}
    task |= {"crop_px": 44, "size_px": 32, "symmetries": 1}
    _save(folder / "segmentation", Segmenter(create_trunk(SPEC.trunk, 0), 2, SPEC, decoder, True), task)
    encoder_task = {"encoder": encoder, "seen": {}}
    _save(folder / "encoder", torch.nn.ModuleDict({"trunk": create_trunk(SPEC.trunk, 0)}), encoder_task)
    pair = trained("modern")
    task = {"kind": "pairvae", "preset": "modern", "geometry": GEOMETRY.as_dict(), "encoder": None}
    _save(folder / "pairvae" / "pair", pair.model, {**task, "train": ["a"], "store": "s"})
    (folder / "pairvae" / RECIPE_FILE).write_text(to_yaml(pair.recipe))
    for name, load in LOADERS.items():
        assert load(folder / name) is not None
    return {name: folder / name for name in LOADERS}


def _signed(folder: Path) -> None:
    """Hashes that agree, as a stranger would write them."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name != "index.json" and file.is_file():
            data = file.read_bytes()
            files[file.name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    (folder / "index.json").write_text(json.dumps({"version": 1, "files": files}))


def _task(folder: Path, *path: Any, value: Any) -> None:
    state = json.loads((folder / "state.json").read_bytes())
    place = state["task"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "state.json").write_bytes(encode_state(5, {"task": state["task"]}))


def _weights(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data) and None


def _linked(folder: Path) -> None:
    """Weights that lie elsewhere, where a secret may be."""
    secret = folder.parent.parent / "secret"
    secret.write_text(SECRET)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)


def _pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _text(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text) and None


def _set(*path: Any, value: Any) -> Callable[[Path], None]:
    return lambda folder: _task(folder, *path, value=value)


def _two_joined_looks(folder: Path) -> None:
    _task(folder, "joined", value=True)
    _task(folder, "encoder", "looks", value=[[1.0, 0, 1], [2.0, 0, 1]])


EVERY = {
    "a pickle in place of the weights": _weights(pickle.dumps({"a": 1})),
    "a header that claims exabytes": _weights((1 << 62).to_bytes(8, "little") + b"{}"),
    "a link to another file": _linked,
    "a pipe": _pipe,
    "JSON without end": _text("state.json", b"[" * 200_000),
    "JSON of another shape": _text("state.json", b'{"version": 1, "step": 5, "score": null, "task": [1]}'),
}
TRUNK = {
    "a trunk that loads a file": _set("encoder", "trunk_options", value={"checkpoint_path": "/tmp/evil.pth"}),
    "a trunk from the internet": _set("encoder", "trunk", value="hf-hub:a/b"),
    "a trunk that is a folder": _set("encoder", "trunk", value="local-dir:/tmp"),
    "a trunk of another type": _set("encoder", "trunk", value=["test_resnet"]),
    "gigantic options": _set("encoder", "trunk_options", value={"channels": [10**9] * 4}),
    "options that fill the memory": _set("encoder", "trunk_options", value={"channels": [2**16] * 4}),
    "pixels that are divided by 0": _set("encoder", "std", value=0),
    "a look that fills the memory": _set("encoder", "looks", value=[[1e9, 0, 1]]),
    "an unknown key": _set("encoder", "hook", value="os.system"),
    "another spec": _set("encoder", value=7),
}
OWN: dict[str, dict[str, Callable[[Path], None]]] = {
    "encoder": TRUNK,
    "classifier": {
        **TRUNK,
        "a gigantic tile": _set("tile_px", value=[10**9, 10**9]),
        "a tile of another type": _set("tile_px", value="huge"),
        "joined looks of another type": _set("joined", value=1),
        "joined looks that its head does not take": _two_joined_looks,
        "pooling that its head does not take": _set("encoder", "pooling", value="last_two"),
        "looks that do not pair": _set("encoder", "looks", value=[[1.0, 0, 1], [2.0, 0, 8]]),
        "classes of another type": _set("classes", value=3),
        "classes without end": _set("classes", value=["x"] * 10**6),
    },
    "segmentation": {
        **TRUNK,
        "a decoder that fills the memory": _set("decoder", "width", value=2**24),
        "a decoder of another type": _set("decoder", value="unet"),
        "classes of another type": _set("classes", value=[{}]),
        "classes that no mask holds": _set("classes", value=["0", "70000"]),
        "classes without end": _set("classes", value=["0", float("inf")]),
        "views that no run has": _set("size_px", value=33),
        "views that fill the memory": _set("size_px", value=2**16),
        "gigantic windows": _set("crop_px", value=10**9),
        "symmetries of another type": _set("symmetries", value=[8]),
    },
    "pairvae": {
        "a gigantic grid": _set("geometry", "grid", "size", value=10**6),
        "a gigantic crop": _set("geometry", "size_px", value=10**6),
        "a grid of another type": _set("geometry", "grid", value=[1]),
        "a scale of another type": _set("geometry", "reference", value="1"),
        "a trunk that loads a file": _set("encoder", value={**asdict(SPEC), "trunk_options": {"cache_dir": "/tmp"}}),
        "a training part of another type": _set("train", value=3),
    },
}
CASES = [(kind, how, change) for kind in LOADERS for how, change in {**EVERY, **OWN[kind]}.items()]


@pytest.mark.parametrize(("kind", "how", "change"), CASES, ids=[f"{kind}: {how}" for kind, how, _ in CASES])
def test_a_hostile_run_is_refused_with_a_reason(runs, tmp_path, kind, how, change):
    run = tmp_path / "given"
    shutil.copytree(runs[kind], run)
    (folder,) = run.rglob("step-00000005")
    change(folder)
    _signed(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refused:
        LOADERS[kind](run)
    said = str(refused.value)
    assert len(said) < 600 and "\n" not in said and SECRET not in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE // 2


def test_an_index_that_leaves_its_folder_is_refused(runs, tmp_path):
    run = tmp_path / "given"
    shutil.copytree(runs["classifier"], run)
    (folder,) = run.rglob("step-00000005")
    (run / "secret").write_text(SECRET)
    index = json.loads((folder / "index.json").read_bytes())
    index["files"]["../../secret"] = {
        "bytes": len(SECRET),
        "xxh3_128": xxhash.xxh3_128(SECRET.encode()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps({"version": 1, "files": index["files"]}))
    with pytest.raises(UserError, match="no plain file name"):
        load_classifier(run)


def test_a_recipe_that_fills_the_memory_is_refused(runs, tmp_path):
    run = tmp_path / "given"
    shutil.copytree(runs["pairvae"], run)
    recipe = run / RECIPE_FILE
    text = recipe.read_text()
    recipe.write_text(text + "\n" + " " * 2**21)
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load_pairvae(run)
