"""Segmentation: masks under the views' geometry, the loss and gradient on two ranks, and a run to its masks."""

import csv
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.distributed as dist
from PIL import Image

from hpc import batch_norm
from hpc.config import apply_overrides, build
from hpc.errors import UserError
from nanodist.cli import main
from nanodist.downstream import neighbours
from nanodist.downstream.finetune.recipe import DecoderConfig, FinetuneRecipe, LabelsConfig
from nanodist.downstream.segment import predict
from nanodist.downstream.segment.data import Masks
from nanodist.downstream.segment.hysteresis import faint_classes
from nanodist.downstream.segment.loss import dice_and_cross_entropy, mean_iou
from nanodist.downstream.segment.maps import class_maps
from nanodist.downstream.segment.model import Segmenter
from nanodist.downstream.segment.predict import LoadedSegmenter, mask_tiff, segment
from nanodist.downstream.segment.promise import SLACK, DicePromise
from nanodist.downstream.segment.scores import boundary_f1, image_scores, mean_with_interval
from nanodist.downstream.segment.task import SegmentTask
from nanodist.downstream.segment.windows import mean_features, strips
from nanodist.encoders import EncoderSpec, create_trunk
from nanodist.micrographs import read_micrograph
from nanodist.shards import PackOptions, Store, pack
from nanodist.shards.companions import read_mask_of
from nanodist.shards.store import SampleError
from nanodist.synth import MORPHOLOGIES, Settings, write_dataset
from nanodist.views import ViewsConfig, make_view
from tests.nanodist.packing import clean_environment
from tests.nanodist.test_finetune import ROOT, TINY, _command, _topology

pytest.importorskip("segmentation_models_pytorch")
SEGMENT = [*TINY, "task=segmentation", "decoder.width=16", "views.size_px=64", "train.global_batch_size=8"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment")
    write_dataset(folder / "synth", 1, 4, MORPHOLOGIES, Settings(size_px=96))
    pack([folder / "synth" / "images"], folder / "store", PackOptions(tile=96), labels="folder", masks=["images=truth"])
    return folder / "store"


def _recipe(store, *overrides):
    return build(FinetuneRecipe, apply_overrides({}, [*SEGMENT, f"data.store={store}", *overrides]))


def test_a_mask_comes_back_as_it_was_packed_and_a_damaged_one_is_named(store, tmp_path):
    opened = Store.open(store)
    source = next((store.parent / "synth" / "truth").rglob("*.mask.png"))
    name = source.name.removesuffix(".mask.png")
    i = next(i for i in range(len(opened)) if Path(opened.samples[i].source).stem == name)
    assert np.array_equal(read_mask_of(opened, i), np.asarray(Image.open(source)))
    sample = opened.samples[i]
    shard = tmp_path / "store" / opened.manifest.shards[sample.shard].file
    shard.parent.mkdir()
    for file in store.iterdir():
        (shard.parent / file.name).write_bytes(file.read_bytes())
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT", sample.offset + sample.size) + 20
    data[at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SampleError, match=f"{sample.key}: its mask"):
        read_mask_of(Store.open(shard.parent), i)


def test_a_store_without_masks_is_refused(tmp_path):
    write_dataset(tmp_path / "synth", 1, 2, dict(list(MORPHOLOGIES.items())[:1]), Settings(size_px=96))
    pack([tmp_path / "synth" / "images"], tmp_path / "store", PackOptions(tile=96))
    with pytest.raises(UserError, match="has no masks; pack it with --masks"):
        Masks(LabelsConfig(store=str(tmp_path / "store")), DecoderConfig())


def test_parts_share_no_micrograph(store):
    masks = Masks(LabelsConfig(store=str(store), labels_per_class=8), DecoderConfig())
    parts = [set(masks.targets.groups[part].tolist()) for part in (masks.train, masks.validation, masks.test)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(masks.train) + len(masks.validation) == 8 and masks.values[0] == 0


def test_the_classes_of_a_view_are_where_its_image_shows_them():
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 80, 90), np.uint8)
    for n in range(2):
        y, x = rng.integers(10, 50, 2)
        mask[n, y : y + 25, x : x + 30], mask[n, 5:15, 60:80] = 1, 2
    # The image shows the classes as grey values, so that the view itself says where they went.
    grey = torch.from_numpy(np.asarray([0, 120, 240], np.uint8)[mask])
    plain = ViewsConfig(size_px=64, crop_px=(50, 70), contrast=0, brightness=0, gamma=0, blur_probability=0,
                        noise_probability=0)  # fmt: skip
    busy = build(ViewsConfig, {"preset": "tem", "size_px": 64, "crop_px": [50, 70]})
    view = make_view(grey, plain, 3, [4, 5], ["a", "b"], 0)[:, 0]
    for config in (plain, busy):
        maps = class_maps(torch.from_numpy(mask), 3, config, 3, [4, 5], ["a", "b"])
        if config is plain:
            clear = (view * 255 - torch.tensor([0.0, 120.0, 240.0])[maps]).abs() < 55
            assert clear.float().mean() > 0.97 and set(maps.unique().tolist()) == {0, 1, 2}
        assert maps.shape == (2, 64, 64)


def test_the_loss_is_that_of_each_image_alone():
    torch.manual_seed(0)
    logits, classes = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.randint(0, 3, (3, 8, 8))
    together = dice_and_cross_entropy(logits, classes, 0.7)
    apart = torch.cat([dice_and_cross_entropy(logits[i : i + 1], classes[i : i + 1], 0.7) for i in range(3)])
    torch.testing.assert_close(together, apart)
    right = 30.0 * torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).double()
    assert dice_and_cross_entropy(right, classes, 1.0).max() < 1e-9
    assert mean_iou(classes[0], classes[0], 4) == 1.0
    # By hand: of 2 pixels, class 0 with p = 0.8 and class 1 with p = 0.6.
    p = torch.tensor([[[[0.8, 0.4]], [[0.2, 0.6]]]], dtype=torch.float64).log()
    want = -(np.log(0.8) + np.log(0.6)) / 2 + 1 - (2 * 0.8 / 2.2 + 2 * 0.6 / 1.8) / 2
    assert float(dice_and_cross_entropy(p, torch.tensor([[[0, 1]]]), 1.0)) == pytest.approx(want)


def test_scores_of_a_shifted_square():
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 10:30] = 1
    shifted = np.roll(truth, 5, axis=1)
    scores = image_scores(0, shifted, truth, 3)
    assert scores.dice[1] == pytest.approx(0.75) and scores.iou[1] == pytest.approx(0.6) and np.isnan(scores.dice[2])
    assert boundary_f1(truth == 1, truth == 1) == 1.0 and boundary_f1(np.roll(truth, 2, 1) == 1, truth == 1) == 1.0
    assert boundary_f1(np.roll(truth, 9, (0, 1)) == 1, truth == 1) < 0.2
    assert boundary_f1(np.zeros((5, 5), bool), np.zeros((5, 5), bool)) == 1.0


def test_intervals_are_over_micrographs():
    values = np.asarray([0.0, 0.0, 0.0, 1.0, 1.0, np.nan])
    found = mean_with_interval(values, np.asarray([0, 0, 0, 1, 1, 2]))
    assert found["mean"] == 0.4 and (found["low"], found["high"]) == (0.0, 1.0)
    assert (found["images"], found["micrographs"]) == (5, 2)


class _Threshold(Segmenter):
    """In the place of a network: says what is bright, and nothing depends on anything around."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.classes, self.at = 2, torch.nn.Parameter(torch.tensor(0.5))

    def predict(self, images):
        return torch.cat([1 - images, images], 1)


def test_the_promised_dice_is_what_masks_drawn_by_the_probabilities_have():
    rng = np.random.default_rng(0)
    one = np.clip(rng.normal(np.where(np.hypot(*np.mgrid[-40:40, -40:40]) < 20, 0.8, 0.1), 0.15), 0, 1)
    likely = np.stack([1 - one, one]).astype(np.float32)
    mask = likely.argmax(0)
    drawn = rng.random((200, 80, 80)) < one
    slack = SLACK * mask.size
    each = [
        (2 * ((drawn == c) & (mask == c)).sum((1, 2)) + slack) / ((drawn == c).sum((1, 2)) + (mask == c).sum() + slack)
        for c in (0, 1)
    ]
    dice = np.mean(each, axis=0)
    promise = DicePromise(2)
    for rows in (slice(0, 30), slice(30, 80)):
        promise.add(likely[:, rows], mask[rows])
    assert promise.dice() == pytest.approx(dice.mean(), abs=2e-3) and 0.6 < promise.dice() < 0.9
    sure, empty = DicePromise(3), DicePromise(3)
    sure.add(np.stack([mask == 0, mask == 1, mask == 2]).astype(np.float32), mask)
    empty.add(np.stack([np.full(mask.shape, p) for p in (0.9998, 1e-4, 1e-4)]), np.zeros(mask.shape, int))
    assert sure.dice() == 1.0 and empty.dice() > 0.98  # nothing there is no bad mask
    unsure = DicePromise(3)
    unsure.add(np.stack([np.full(mask.shape, p) for p in (0.4, 0.35, 0.25)]), np.zeros(mask.shape, int))
    assert unsure.dice() < 0.25


def test_features_of_a_micrograph_are_the_mean_over_its_windows():
    model = Segmenter(
        create_trunk("test_resnet", 0), 2, EncoderSpec("test_resnet", 32, 0.5, 0.2), DecoderConfig(width=16), True
    ).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64), np.uint8)
    found = mean_features(model, pixels, 32, 32)
    windows = [pixels[y : y + 32, x : x + 32] / np.float32(255) for y in (0, 8) for x in (0, 32)]
    with torch.inference_mode():
        wanted = model.features(torch.from_numpy(np.stack(windows))[:, None]).double().mean(0).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    small = mean_features(model, pixels[:20], 32, 32)
    np.testing.assert_allclose(small, mean_features(model, np.pad(pixels[:20], ((0, 12), (0, 0)), "symmetric"), 32, 32))


@pytest.mark.parametrize(("shape", "crop"), [((130, 97), 32), ((20, 70), 32), ((64, 64), 64), ((33, 200), 32)])
def test_windows_cover_a_micrograph_of_any_size_and_turn_back(shape, crop):
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    rows = list(strips(_Threshold(), pixels, crop, crop, turns=8))
    assert [y for y, _ in rows] == sorted({y for y, _ in rows})
    made = np.concatenate([likely for _, likely in rows], axis=1)
    assert made.shape == (2, *shape)
    np.testing.assert_allclose(made[1], pixels / 255, atol=1e-5)


def test_faint_pixels_continue_a_wire_and_do_not_widen_it():
    pixels = np.full((600, 48), 10, np.uint8)  # more rows than are looked at at a time
    pixels[:, 10:16], pixels[:, 11:15] = 70, 230  # a wire with blurred edges
    for first, last in ((100, 102), (300, 307), (500, 540)):  # gaps, and patches of noise beside them
        pixels[first:last, 9:17], pixels[first:last, 11:15], pixels[first:last, 30:36] = 10, 70, 70
    plain = LoadedSegmenter(_Threshold(), (0, 255), 32, 32, 1, Path("none"))
    wire = np.zeros(pixels.shape, np.uint8)
    wire[:, 11:15] = 1
    np.testing.assert_array_equal(segment(plain, pixels).classes, (pixels > 128) * wire)
    closed = wire.copy()
    closed[100:102, [11, 14]] = 0  # of a short gap the corners stay open
    np.testing.assert_array_equal(segment(replace(plain, faint=0.2), pixels).classes, closed)
    np.testing.assert_array_equal(segment(replace(plain, faint=0.4), pixels).classes, (pixels > 128) * wire)
    # Of several classes a faint pixel has the likeliest one; the ground may be likelier than each and not than all.
    likely = np.asarray([0.45, 0.8, 0.1], np.float32), np.asarray([0.25, 0.15, 0.1], np.float32)
    likely = np.stack([likely[0], likely[1], 1 - likely[0] - likely[1]])[:, None]
    assert faint_classes(likely, 0.3).tolist() == [[2, 0, 2]]


@pytest.mark.parametrize("name", ["unet", "fpn"])
def test_decoders_give_every_pixel_its_classes(name):
    spec = EncoderSpec("test_resnet", 64, 0.5, 0.2)
    model = Segmenter(create_trunk("test_resnet", 0), 3, spec, DecoderConfig(name=name, width=64), True)
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 3, 64, 64)
    with pytest.raises(UserError, match="no feature maps at strides 4 to 32"):
        Segmenter(create_trunk("test_vit", 0, img_size=64), 3, spec, DecoderConfig(), True)


def _step(rank, world_size, store):
    recipe = _recipe(store, "train.precision=fp64")
    masks = Masks(recipe.data, recipe.decoder)
    world = dist.new_group() if world_size > 1 else None
    layout = batch_norm.make_layout(8, 8, rank, world_size)
    task = SegmentTask(recipe, masks, _topology(rank, world_size), torch.device("cpu"), layout, world)
    task.module.train()
    batch = next(task.batches(0))
    loss = task.loss(task.forward(task.module, task.parts(batch)[0]), batch)
    loss.backward()
    figures = task.evaluate()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in task.module.named_parameters()}, figures


def test_loss_gradient_and_validation_of_two_ranks_are_those_of_one(ranks, store):
    loss, gradient, figures = _step(0, 1, store)
    parts = ranks.run(2, _step, store)
    for got, _, measured in parts:
        assert got == pytest.approx(loss, rel=1e-12) and measured == pytest.approx(figures, rel=1e-9)
    for name, want in gradient.items():
        got = parts[0][1][name] + parts[1][1][name]
        assert np.linalg.norm(got - want) <= 1e-9 * max(np.linalg.norm(want), 1e-6), name


def test_one_mask_and_a_random_trunk_that_stays(store):
    assert _recipe(store).train.group_size(1) == 1 and _recipe(store).train.group_size(8) == 8
    assert _recipe(store, "train.tuned_layers=0").train.tuned == "head"
    with pytest.raises(UserError, match="has no blocks worth keeping"):
        _recipe(store, "train.tuned_layers=1")


def test_masks_keep_their_pixel_size(tmp_path):
    (tmp_path / "m.tif").write_bytes(mask_tiff(np.eye(9, dtype=np.uint8), (0.5, 0.25)))
    read = read_micrograph(tmp_path / "m.tif")
    assert read.pixel_size_nm == pytest.approx((0.5, 0.25), rel=1e-6) and read.pixels.sum() == 9


def test_each_micrograph_has_a_mask_of_its_own(tmp_path, monkeypatch):
    """Names with dots, names that are those of numbered ones, and a stack of which one page is blank."""

    def segment(_loaded, pixels, progress):
        return predict.Segmented(np.asarray(pixels > 128, np.uint8), 1.0)

    monkeypatch.setattr(predict, "segment", segment)
    rng, files = np.random.default_rng(0), ("day1/wire-2", "day1/wire", "day2/wire", "dose_0.5", "dose_0.7")
    for place, name in enumerate(files):
        path = tmp_path / "in" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, rng.integers(0, 256, (40, 40 + place), np.uint8))
    movie = rng.integers(0, 65536, (3, 40, 50), np.uint16)
    movie[1] = 7
    tifffile.imwrite(tmp_path / "in" / "movie.tif", movie, photometric="minisblack")
    loaded = predict.LoadedSegmenter(torch.nn.Identity(), (0, 1), 32, 32, 1, tmp_path, None)
    problems = predict.predict_masks(loaded, [tmp_path / "in"], tmp_path / "out")
    assert list(problems) == [f"{tmp_path / 'in' / 'movie.tif'}, page 1"] and "contrast" in next(
        iter(problems.values())
    )
    made = tmp_path / "out" / "masks"
    widths = {str(path.relative_to(made)): tifffile.imread(path).shape[1] for path in made.rglob("*.tif")}
    assert widths == {**{f"{name}.tif": 40 + i for i, name in enumerate(files)}, "movie-p0.tif": 50, "movie-p2.tif": 50}
    loose = [tmp_path / "in" / f"{name}.tif" for name in ("day1/wire-2", "day1/wire", "day2/wire")]
    predict.predict_masks(loaded, loose, tmp_path / "loose")
    assert {path.name for path in (tmp_path / "loose" / "masks").iterdir()} == {"wire-2.tif", "wire.tif", "wire-3.tif"}
    with pytest.raises(UserError, match="has masks of another prediction"):
        predict.predict_masks(loaded, loose, tmp_path / "loose")
    with open(tmp_path / "out" / "shares.csv", newline="") as file:
        assert len({row["mask"] for row in csv.DictReader(file)}) == 7


def _check_suggested(run, folder, out, store):
    """Those that are worth a mask; the two ranks kept what they were trained on."""
    loaded = predict.load_segmenter(run)
    masks = Masks(_recipe(store).data, DecoderConfig())
    trained = np.sort(np.concatenate([masks.train, masks.validation]))
    rows = [mean_features(loaded.model, masks.image(int(i)), loaded.crop_px, loaded.size_px) for i in trained]
    np.testing.assert_allclose(loaded.reference.rows, neighbours.unit_rows(np.stack(rows)), atol=1e-5)
    assert main(["suggest", str(run), str(folder), "--out", str(out), "--count", "3"]) == 0
    with open(out / "suggested.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["rank"] for row in table] == ["1", "2", "3"] and len({row["file"] for row in table}) == 3
    assert all(0 <= float(row["expected_dice"]) <= 1 and 0 <= float(row["distance"]) <= 2 for row in table)
    assert Image.open(out / "suggested.png").mode == "RGB"


def test_a_run_from_masks_to_masks(store, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    wanted = [str(tmp_path / "empty.yaml"), *SEGMENT, f"data.store={store}", f"run_dir={tmp_path / 'run'}"]
    wanted += ["train.steps=6", "train.evaluate_every_steps=3", "symmetries=1"]
    done = subprocess.run(
        _command(*wanted, ranks=2), env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    dice = next(row for row in scores["rows"] if (row["metric"], row["class"]) == ("dice", 255))
    assert dice["low"] <= dice["mean"] <= dice["high"] and dice["n_test"] == dice["images"] == 4
    assert (dice["tuned"], dice["draw_seed"], dice["seed"]) == ("all", 0, 0)
    assert main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "compared")]) == 0
    compared = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    assert next(row for row in compared if (row["metric"], row["class"]) == ("dice", "255"))["mean"] == pytest.approx(
        dice["mean"], abs=1e-5
    )
    images = sorted((store.parent / "synth" / "images").rglob("*.tif"))[:2]
    (tmp_path / "notes.txt").write_text("text")
    arguments = ["predict", str(tmp_path / "run"), *map(str, images), str(tmp_path / "notes.txt")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--threads", "1"]) == 1
    assert "1 file was not predicted" in capsys.readouterr().err
    masks = sorted((tmp_path / "out" / "masks").iterdir())
    assert len(masks) == 2 and set(np.unique(tifffile.imread(masks[0]))) <= set(scores["classes"])
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["predicted"] == 2 and "text file" in report["not_predicted"][str(tmp_path / "notes.txt")]
    with open(tmp_path / "out" / "shares.csv", newline="") as file:
        shares = list(csv.DictReader(file))
    assert all(0 < float(row["expected_dice"]) < 1 and float(row["unlike_training"]) > 0 for row in shares)
    _check_suggested(tmp_path / "run", images[0].parent, tmp_path / "next", store)
    assert main([*arguments, "--out", str(tmp_path / "faint"), "--threads", "-1"]) == 2
    assert "--threads is -1" in capsys.readouterr().err
    for faint, code in ((0.6, 2), (0.01, 0)):
        again = [*arguments[:-1], "--out", str(tmp_path / "faint"), "--threads", "1", "--faint", str(faint)]
        assert main(again) == code
    assert "--faint is 0.6; it must lie between 0 and 0.5" in capsys.readouterr().err
    for one in masks:
        more = tifffile.imread(tmp_path / "faint" / "masks" / one.name) > 0
        assert (more >= (tifffile.imread(one) > 0)).all()
    # The same in one command, by specimens.
    line, notes = ["measure", "--run", str(tmp_path / "run")], str(tmp_path / "notes.txt")
    assert main([*line, notes, "--out", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()
    assert main([*line, str(images[0].parent), "--class", "7", "--out", str(tmp_path / "none")]) == 2
    assert "--class 7: " in (told := capsys.readouterr().err) and "tells the classes 0, 255 apart" in told
    (images[0].parent / "notes.txt").write_text("text")
    # As particles, since tracing what so short a training takes for wires would take longer than all else.
    line += [str(images[0].parent), notes, "--as", "mask", "--no-overlays", "--shape", "particles"]
    assert main([*line, "--out", str(tmp_path / "sizes")]) == 1
    summary = json.loads((tmp_path / "sizes" / "summary.json").read_text())
    assert {row["specimen"] for row in summary["specimens"]} == {str(images[0].parent)}
    assert {row["file"] for row in summary["skipped"]} == {str(images[0].parent / "notes.txt"), "files"}
    assert any(notes in row["reason"] for row in summary["skipped"])
    made = sorted((tmp_path / "sizes" / "predicted").glob("*/masks/*.tif"))
    assert len(made) == summary["images"] == len(list(images[0].parent.glob("*.tif")))
    np.testing.assert_array_equal(*(tifffile.imread(path) for path in (masks[0], made[0])))
