"""Fine-tuning: which labels are used, the loss and gradient on several ranks, and a run from a recipe to its scores."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from hpc import batch_norm
from hpc.config import apply_overrides, build
from hpc.errors import UserError
from hpc.topology import Topology
from nanodist.cli import main
from nanodist.downstream import metrics
from nanodist.downstream.finetune.data import Labels, batches
from nanodist.downstream.finetune.load import load_classifier
from nanodist.downstream.finetune.model import learning_rate_scales
from nanodist.downstream.finetune.recipe import FinetuneRecipe, LabelsConfig
from nanodist.downstream.finetune.reference import read_reference, write_reference
from nanodist.downstream.finetune.scores import _bounds
from nanodist.downstream.finetune.suggest import choose, uncertainty
from nanodist.downstream.finetune.task import ClassifyTask, class_weights
from nanodist.downstream.labels import draw_order
from nanodist.downstream.metrics import calibration_error
from nanodist.downstream.probe import split_within
from nanodist.encoders import EncoderSpec, looked_at, random_encoder
from nanodist.export.weights import export_timm
from nanodist.shards import PackOptions, pack
from nanodist.synth import MORPHOLOGIES, Settings, write_dataset
from tests.nanodist.packing import clean_environment

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "encoder.source=timm:test_resnet",
    "encoder.weights=random",
    "train.batch_norm=batch",
    "views={size_px: 32, crop_px: [88, 96], exposure: image}",
    "symmetries=2",
    "engine.device=cpu",
    "engine.threads=1",
    "tracking.mode=disabled",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_dataset(folder / "synth", 1, 10, MORPHOLOGIES, Settings(size_px=96))
    pack([folder / "synth" / "images"], folder / "store", PackOptions(tile=96), labels="folder")
    return folder / "store"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An encoder with weights of its own."""
    folder = tmp_path_factory.mktemp("encoder") / "export"
    spec = EncoderSpec("test_resnet", 32, 0.5, 0.2, normalise="image", looks=[(0.7, 0, 1)])
    export_timm(random_encoder(spec, 3), folder, {})
    return folder


def _recipe(store, *overrides):
    return build(FinetuneRecipe, apply_overrides({}, [*TINY, f"data.store={store}", *overrides]))


def _topology(rank=0, world_size=1):
    return Topology(rank, world_size, rank, world_size, 0, 1, "host", "test", "127.0.0.1", 29500)


def test_no_micrograph_is_in_two_parts_and_labels_are_those_of_the_probe(store):
    labels = Labels(LabelsConfig(store=str(store), labels_per_class=4, validation_from=4, draw_seed=2))
    parts = [set(labels.targets.groups[part].tolist()) for part in (labels.train, labels.validation, labels.test)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    drawn = np.sort(np.concatenate([labels.train, labels.validation]))
    split = split_within(labels.targets, 0.25, 0, 0)
    orders = draw_order(labels.targets, split.train, 0, 0, 2)
    assert drawn.tolist() == sorted(int(i) for order in orders for i in order[:4])
    assert np.bincount(labels.targets.y[drawn]).tolist() == [4] * len(labels.targets.classes)


def test_few_labels_are_all_trained_on(store):
    labels = Labels(LabelsConfig(store=str(store), labels_per_class=2))
    assert len(labels.train) == 2 * len(labels.targets.classes) and not len(labels.validation)


def test_batches_are_the_same_on_any_number_of_ranks(store):
    labels = Labels(LabelsConfig(store=str(store)))
    whole = batches(labels, 5, 12, 0, 1, 1, 3)
    halves = [batches(labels, 5, 12, rank, 2, 1, 3) for rank in range(2)]
    for _ in range(4):
        one, parts = next(whole), [next(half) for half in halves]
        assert one.keys == parts[0].keys + parts[1].keys and one.step == parts[0].step
        assert np.array_equal(one.images, np.concatenate([part.images for part in parts]))


def test_balanced_weights_have_a_mean_of_one(store):
    recipe = _recipe(store, "train.class_weights=balanced")
    labels = Labels(recipe.data)
    labels.train = labels.train[5:]
    weights, y = class_weights(recipe, labels), labels.targets.y[labels.train]
    assert weights[y].mean() == pytest.approx(1.0)
    sums = np.bincount(y, weights[y])
    assert np.allclose(sums, sums[0])


JOINED = ("train.zooms=joined", "views.zooms=[1.0,2.0,3.0]")


def _step(rank, world_size, store, batch_norm_over, precision, *more):
    """Loss, and this rank's part of the gradient of the global batch."""
    overrides = ["train.global_batch_size=12", f"train.precision={precision}", "train.label_smoothing=0.1"]
    if batch_norm_over == "frozen":
        overrides += ["encoder.weights=given", "train.batch_norm=frozen", f"encoder.source={store[1]}"]
    recipe = _recipe(store[0], *overrides, "train.class_weights=balanced", "train.layer_decay=0.5", *more)
    labels = Labels(recipe.data)
    world = dist.new_group() if world_size > 1 else None
    group = 1 if batch_norm_over == "frozen" else 12
    views = len(recipe.sample_views)
    layout = batch_norm.make_layout(12, group, rank, world_size, 1, views)
    task = ClassifyTask(recipe, labels, _topology(rank, world_size), torch.device("cpu"), layout, world)
    task.module.train()
    batch = next(task.batches(0))
    loss = task.loss(task.forward(task.module, task.parts(batch)[0]), batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in task.module.named_parameters()}


@pytest.mark.parametrize(("batch_norm_over", "more"), [("batch", ()), ("frozen", ()), ("batch", JOINED)])
def test_loss_and_gradient_of_two_ranks_are_those_of_one(ranks, store, export, batch_norm_over, more):
    arguments = ((store, export), batch_norm_over, "fp64", *more)
    loss, gradient = _step(0, 1, *arguments)
    parts = ranks.run(2, _step, *arguments)
    assert all(part[0] == pytest.approx(loss, rel=1e-12) for part in parts)
    for name, want in gradient.items():
        got = parts[0][1][name] + parts[1][1][name]
        assert np.linalg.norm(got - want) <= 1e-9 * max(np.linalg.norm(want), 1e-6), name


def _classifier(store, *overrides, group=12):
    recipe = _recipe(store, "train.global_batch_size=12", *overrides)
    views = len(recipe.sample_views)
    layout = batch_norm.make_layout(12, group, 0, 1, 1, views)
    return ClassifyTask(recipe, Labels(recipe.data), _topology(), torch.device("cpu"), layout, None)


def test_joined_zooms_are_one_view_magnified_and_are_predicted_as_they_were_trained(store):
    task = _classifier(store, *JOINED)
    views = task.parts(next(task.batches(0)))[0]
    assert views.shape == (12, 3, 32, 32)
    one = _classifier(store, "views.zooms=[2.0]")
    assert torch.equal(views[:, 1:2], one.parts(next(one.batches(0)))[0])
    model = task.classifier.eval()
    assert model.spec.looks == [(0.3482, 0, 2), (0.6963, 0, 2), (1.0445, 0, 2)]  # 32 px of 91.9, 46 and 30.6
    assert model.head[1].weight.shape[1] == 3 * model.trunk.num_features
    images = torch.rand(2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.nn.init.normal_(model.head[1].weight, generator=torch.Generator().manual_seed(1))
        likely, features = model.looked_at(images)
        rows = []
        for turn in (0, 1):
            seen = [looked_at(images, scale, 0).rot90(turn, (-2, -1)) for scale, _, _ in model.spec.looks]
            rows.append(torch.cat([model.trunk(model.normalised(each)) for each in seen], 1))
        assert torch.allclose(features, torch.stack(rows).mean(0), atol=1e-6)
        wanted = torch.stack([model.head(each).softmax(1) for each in rows]).mean(0)
    assert torch.allclose(likely, wanted, atol=1e-6) and np.ptp(likely.numpy()) > 0.01


def test_a_trunk_of_one_size_is_shown_that_size_at_every_zoom(store):
    """Or says so before anything is trained."""
    fixed = ("encoder.source=timm:vit_tiny_patch16_224", "encoder.trunk_options={img_size: 32, depth: 1}")
    views = "views={size_px: 32, crop_px: [64, 64], centre_jitter_px: 2, zooms: [1.0, 1.3], exposure: image}"
    model = _classifier(store, *fixed, views, group=1).classifier
    assert model.spec.looks == [(0.5, 64, 2), (0.6531, 49, 2)]
    with pytest.raises(UserError, match=r"trunk 'vit_tiny_patch16_224' does not take what a prediction shows it"):
        _classifier(store, *fixed, "views={size_px: 32, crop_px: [64, 64], exposure: image}", group=1)


def test_large_looks_are_made_of_a_few_images_at_a_time(store, monkeypatch):
    model = _classifier(store, "views.zooms=[1.0,2.0]").classifier.eval()
    images = torch.rand(5, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    whole = model.looked_at(images)
    monkeypatch.setattr("nanodist.downstream.finetune.model.AT_ONCE_PX", 2 * 67 * 67)
    seen = []
    monkeypatch.setattr(model, "_looked_at", lambda part, own=model._looked_at: seen.append(len(part)) or own(part))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.looked_at(images), whole, strict=True))
    assert seen == [2, 2, 1]


def test_what_is_trained_at_drawn_zooms_is_predicted_at_each(store):
    model = _classifier(store, "views.zooms=[1.0,2.0]").classifier.eval()
    assert [scale for scale, _, _ in model.spec.looks] == [0.3482, 0.6963] and not model.joined
    images = torch.rand(2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    both, _ = model.looked_at(images)
    each = []
    for look in list(model.spec.looks):
        model.spec = dataclasses.replace(model.spec, looks=[look])
        each.append(model.looked_at(images)[0])
    assert torch.allclose(both, torch.stack(each).mean(0), atol=1e-6) and not torch.allclose(*each, atol=1e-4)


def test_frozen_statistics_stay_and_frozen_blocks_want_no_gradient(store, export):
    overrides = ("encoder.weights=given", "train.batch_norm=frozen", f"encoder.source={export}", "train.tuned_layers=1")
    recipe = _recipe(store, *overrides, "train.layer_decay=0.5")
    layout = batch_norm.make_layout(12, 1, 0, 1)
    task = ClassifyTask(recipe, Labels(recipe.data), _topology(), torch.device("cpu"), layout, None)
    module = task.classifier.train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module(torch.rand(4, 1, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    every = {name for name, _ in module.named_parameters()}
    assert {"head.1.weight", "head.1.bias"} < trained < every
    scales = learning_rate_scales(recipe, module)
    assert scales["head.1.weight"] == 1.0 and {scales[name] for name in trained if name.startswith("trunk")} == {0.5}
    earlier = [scales[name] for name in every - trained]
    assert max(earlier) == 0.25 and min(earlier) < 0.1


def test_calibration_error():
    sure, unsure = np.asarray([[1.0, 0.0]] * 4), np.asarray([[0.5, 0.5]] * 4)
    truth = np.asarray([0, 0, 1, 1])
    assert calibration_error(sure, truth) == pytest.approx(0.5)
    assert calibration_error(unsure, truth) == pytest.approx(0.0)


def test_intervals_are_those_of_samples_that_stand_there_as_often_as_they_were_drawn():
    rng = np.random.default_rng(0)
    likely, truth = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    often = rng.multinomial(40, np.full(40, 1 / 40), 50)
    each = []
    for counts in often:
        p, y = np.repeat(likely, counts, axis=0), np.repeat(truth, counts)
        confusion = metrics.confusion_matrix(y, p.argmax(1), 3)
        loss = -np.log(p[np.arange(len(y)), y]).mean()
        each.append((metrics.macro_f1(confusion), metrics.accuracy(confusion), calibration_error(p, y), loss))
    found = _bounds(likely, truth, often.astype(float))
    names = ("macro_f1", "accuracy", "calibration_error", "log_loss")
    for name, values in zip(names, np.asarray(each).T, strict=True):
        if name == "calibration_error":  # less what resampling adds to it
            values = np.maximum(values - values.mean() + calibration_error(likely, truth), 0.0)
        assert [found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def _command(*arguments, ranks=1):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, "-m", "nanodist", "finetune", *arguments]


def _predicted(run, folder, out):
    """Predict a folder with good and bad files; the table and the report."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(rng.integers(0, 255, (96, 200), np.uint8)).save(folder / "wide.png")
    Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(folder / "photo.png")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "dot.png")
    (folder / "broken.tif").write_bytes(b"II*\0" + bytes(9))
    (folder / "notes.txt").write_text("text")
    code = main(["predict", str(run), str(folder), "--out", str(out), "--threads", "1"])
    return code, list(csv.DictReader((out / "predictions.csv").open())), json.loads((out / "report.json").read_text())


def test_a_run_and_the_same_run_on_two_ranks_and_its_classifier(store, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    common = [
        str(tmp_path / "empty.yaml"),
        *TINY,
        f"data.store={store}",
        "train.steps=12",
        "train.global_batch_size=16",
    ]
    common += ["train.evaluate_every_steps=4", "optimizer.lr=0.02", "optimizer.name=sgd", "train.layer_decay=0.8"]
    done = [
        subprocess.run(
            [*_command(*common, f"run_dir={tmp_path / f'run{n}'}", f"engine.zero_stage={n - 1}", ranks=n)],
            env=clean_environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        for n in (1, 2)
    ]
    assert [one.returncode for one in done] == [0, 0], done[-1].stderr[-2000:]
    scores = [json.loads((tmp_path / f"run{n}" / "scores.json").read_text()) for n in (1, 2)]
    assert scores[0]["fingerprint"] == scores[1]["fingerprint"] and scores[0]["checkpoint"] == scores[1]["checkpoint"]
    one, two = (row["rows"][0] for row in scores)
    assert one["log_loss"] == pytest.approx(two["log_loss"], rel=1e-3)
    assert one["low"] <= one["balanced_accuracy"] <= one["high"]
    assert all(one[f"{name}_low"] <= one[f"{name}_high"] for name in ("macro_f1", "calibration_error", "log_loss"))
    assert {k: v for k, v in one.items() if k.startswith("n_")} == {"n_train": 24, "n_validation": 8, "n_test": 8}
    record = json.loads((tmp_path / "run2" / "run.json").read_text())
    assert record["starts"][0]["reason"] == "completed"
    loaded = load_classifier(tmp_path / "run1")
    assert loaded.checkpoint.name == scores[0]["checkpoint"] and list(loaded.classes) == scores[0]["classes"]
    labels = Labels(LabelsConfig(store=str(store)))
    shown = torch.from_numpy(labels.image(int(labels.test[0])).astype(np.float32) / np.float32(255))[None, None]
    lines = (tmp_path / "run1" / "predictions.csv").read_text().splitlines()
    wanted = [float(value) for value in lines[1].split(",")[4:]]
    assert loaded.model.looked_at(shown)[0][0].tolist() == pytest.approx(wanted, abs=2e-6)
    code, table, report = _predicted(tmp_path / "run1", tmp_path / "images", tmp_path / "out")
    assert code == 1 and "4 files were not predicted" in capsys.readouterr().err
    assert [Path(row["file"]).name for row in table] == ["wide.png"] and table[0]["tiles"] == "3"
    assert sum(float(v) for name, v in table[0].items() if name.startswith("p_")) == pytest.approx(1, abs=1e-5)
    reasons = {Path(file).name: reason for file, reason in report["not_predicted"].items()}
    said = {"photo.png": "colour", "dot.png": "1 x 1", "broken.tif": "", "notes.txt": "no micrograph"}
    assert set(reasons) == set(said) and all(said[name] in reason for name, reason in reasons.items())
    assert (tmp_path / "out" / "contact-sheet.png").is_file()
    assert main(["suggest", str(tmp_path / "run1"), str(tmp_path / "images"), "--out", str(tmp_path / "next")]) == 1
    (row,) = csv.DictReader((tmp_path / "next" / "suggested.csv").open())
    assert Path(row["file"]).name == "wide.png" and row["predicted"] == table[0]["predicted"]
    assert 0 <= float(row["uncertainty"]) <= 1 and (tmp_path / "next" / "suggested.png").is_file()


def test_unsure_images_are_suggested_and_look_alikes_once():
    sure, unsure = [0.98, 0.01, 0.01], [0.4, 0.38, 0.22]
    doubt = uncertainty(np.asarray([sure, unsure, unsure, unsure, sure]))
    assert doubt == pytest.approx([0.03, 0.98, 0.98, 0.98, 0.03])
    # Places 1 and 2 look alike, 3 looks like what is labelled, 4 like nothing.
    features = np.asarray([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0.01], [1.0, 0, 0.2], [0, 0, 1.0]])
    chosen = choose(doubt, features, np.asarray([[1.0, 0, 0]]), 9)
    assert [place for place, _ in chosen][:3] == [1, 4, 3] and len(chosen) == 5
    assert chosen[0][1] == pytest.approx(1.0)
    assert sorted(place for place, _ in choose(doubt, features, None, 2)) == [1, 3]


def test_what_is_unlike_the_training_samples_is_said(tmp_path):
    rng = np.random.default_rng(0)
    known = rng.normal((5, 0, 0), 0.2, (40, 3))
    write_reference(tmp_path, known)
    found = read_reference(tmp_path).unlikeness(np.asarray([[5.0, 0.0, 0.1], [0.0, 5.0, 0.0]]))
    assert found[0] < 1 < 20 < found[1]
    write_reference(tmp_path, known[:1])
    assert read_reference(tmp_path) is None  # of one sample nothing is usual
    assert read_reference(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.store=", "data.store is not set"),
        ("encoder.source=", "encoder.source is not set"),
        ("train.batch_norm=frozen", "set train.batch_norm=batch"),
        ("train.tuned_layer=1", "did you mean 'train.tuned_layers'"),
        ("encoder.source=nowhere", "nowhere: no such folder"),
        ("train.bn_group_size=5", "does not divide the batch"),
        ("engine.zero_stage=3", "set engine.zero_stage below 3"),
    ],
)
def test_a_mistake_gives_one_sentence(store, tmp_path, capsys, change, said):
    (tmp_path / "empty.yaml").write_text("")
    wanted = [*TINY, f"data.store={store}", f"run_dir={tmp_path / 'run'}", change]
    assert main(["finetune", str(tmp_path / "empty.yaml"), *wanted]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_views_in_nanometres_are_predicted_at_their_mean_scale(store, tmp_path, monkeypatch):
    """At 0.5 nm a pixel, views of 32 px from 36 to 49 nm are 84 px of the tile on average."""
    views = "views={size_px: 32, crop_nm: [36, 49], exposure: image}"
    recipe, layout = _recipe(store, views, "train.global_batch_size=12"), batch_norm.make_layout(12, 12, 0, 1)
    labels = Labels(LabelsConfig(store=str(store)))
    monkeypatch.setattr(labels, "pixel_sizes", lambda numbers: np.full((len(numbers), 2), 0.5))
    task = ClassifyTask(recipe, labels, _topology(), torch.device("cpu"), layout, None)
    assert task.classifier.spec.looks[0][0] == pytest.approx(32 / 84, abs=1e-4)
    monkeypatch.setattr(
        labels, "pixel_sizes", lambda numbers: np.where(numbers[:, None] > labels.train[0], [0.5, 0.5], np.nan)
    )
    with pytest.raises(UserError, match=r"1 of .* have no pixel size, such as .*; set views.crop_px or crop_share"):
        ClassifyTask(recipe, labels, _topology(), torch.device("cpu"), layout, None)


def test_the_module_is_what_the_loop_wants(store):
    layout = batch_norm.make_layout(12, 12, 0, 1)
    task = ClassifyTask(
        _recipe(store, "train.global_batch_size=12"),
        Labels(LabelsConfig(store=str(store))),
        _topology(),
        torch.device("cpu"),
        layout,
        None,
    )
    assert isinstance(task.module, nn.Module) and not task.finished()
    for _ in range(2):
        figures = task.evaluate()
    assert figures["score"] == figures["validation_loss"]
    other = ClassifyTask(
        _recipe(store, "train.global_batch_size=12"), task.labels, _topology(), task.device, layout, None
    )
    other.load_state_dict(json.loads(json.dumps(task.state_dict())))
    assert other.state_dict() == task.state_dict() and other.state_dict()["looks_since"] == 1
    task.labels = Labels(LabelsConfig(store=str(store), draw_seed=1, labels_per_class=3))
    with pytest.raises(Exception, match="the checkpoint's train differs"):
        other.load_state_dict(task.state_dict())
    with pytest.raises(UserError, match="legal numbers of ranks"):
        task.recipe.train.micro_batches(12, 5)
