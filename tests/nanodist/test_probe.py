"""``nanodist probe`` end to end: packed synthetic textures, exported encoders, scores, errors."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanodist.cli import main
from nanodist.downstream.features import FeatureSet, transductive
from nanodist.downstream.labels import encode
from nanodist.downstream.probe import Prober, Protocol, leave_one_group_out, plan_split, split_within

DATA = Path(os.environ.get("NANODIST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def write_textures(folder: Path, classes: int, micrographs: int, crops: int, offset: int = 0) -> None:
    """Noise of another grain per class, and another brightness per micrograph, which says nothing of the class."""
    for c in range(classes):
        for m in range(micrographs):
            generator = np.random.default_rng([c, m + offset])
            shade = int(generator.integers(40, 120))
            for k in range(crops):
                grain = 2**c
                coarse = generator.integers(0, 90, (48 // grain + 1, 48 // grain + 1))
                image = np.kron(coarse, np.ones((grain, grain)))[:48, :48] + shade
                path = folder / f"class{c}" / f"m{c}-{m + offset}" / f"crop{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.astype(np.uint8)).save(path)


def write_meta(folder: Path) -> Path:
    files = sorted(folder.rglob("*.png"))
    lines = [f"{f.relative_to(folder).as_posix()},{f.parts[-3]},{f.parts[-2]}" for f in files]
    meta = folder / "meta.csv"
    meta.write_text("\n".join(["file,label,micrograph", *lines]) + "\n")
    return meta


def pack(folder: Path, out: Path, labels: bool = True) -> Path:
    meta = write_meta(folder)
    options = ["--groups", f"{meta}:micrograph", "--workers", "1", "--tile", "none"]
    options += ["--labels", f"{meta}:label"] if labels else []
    assert main(["pack", str(folder), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores with other micrographs, one without labels, and exports of two small trunks."""
    from nanodist.encoders import EncoderSpec, random_encoder
    from nanodist.export.card import facts
    from nanodist.export.weights import export_timm
    from nanodist.shards import Store

    root = tmp_path_factory.mktemp("probe")
    write_textures(root / "train", 3, 4, 4)
    write_textures(root / "test", 3, 2, 3, offset=10)
    write_textures(root / "lone", 2, 1, 3)
    store = pack(root / "train", root / "store")
    for name in ("test", "lone"):
        pack(root / name, root / f"{name}-store")
    pack(root / "test", root / "unlabelled", labels=False)
    spec = EncoderSpec("resnet10t", 32, 0.5, 0.2, normalise="image")
    for seed in (7, 8):
        encoder = random_encoder(spec, seed)
        encoder.name, encoder.seen = "tiny", {"manifest_hash": Store.open(store).manifest_hash}
        export_timm(encoder, root / f"export{seed}", facts("tiny", {}, {}, encoder.seen, []))
    return root


def probe(place: Path, out: Path, *options: str) -> int:
    fast = ["--random-seeds", "2", "--seeds", "2", "--resamples", "100"]
    encoder = [str(place / "export7")]
    return main(["probe", *encoder, "--store", str(place / "store"), "--out", str(out), *fast, *options])


def test_scores_are_complete_tidy_and_free_the_second_time(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert probe(place, out, "--splits", "2", "--labels-per-class", "1,2,64") == 0
    table = capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert scores["schema"] == 1 and scores["chance"] == pytest.approx(1 / 3)
    # encoders (1 + 2 random + texture) x methods x splits x (3 budgets x 2 seeds + all)
    assert len(scores["rows"]) == 4 * 2 * 2 * (3 * 2 + 1)
    with open(out / "scores.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(scores["rows"])
    for row in scores["rows"]:
        blank = row["labels_per_class"] == 64
        assert (row["balanced_accuracy"] is None) == blank == bool(row["reason"])
        assert row["transductive"] is (row["kind"] == "pretrained")
    assert "class0 has 12" in table and "tiny*" in table
    assert "encoder seeds: tiny 1, random 2 (of one seed" in table
    assert "test micrographs of each class: class0 " in table
    by_name = {(s["encoder"], s["method"], s["labels_per_class"]): s for s in scores["summary"]}
    for s in by_name.values():
        assert s["mean"] is None or s["low"] - 1e-6 <= s["mean"] <= s["high"] + 1e-6
    assert by_name["random", "linear", 2]["encoder_seeds"] == 2
    assert by_name["texture", "linear", "all"]["mean"] > 0.9
    mean = np.mean([r["balanced_accuracy"] for r in scores["rows"] if _curve(r) == ("texture", "linear", 2)])
    assert by_name["texture", "linear", 2]["mean"] == pytest.approx(mean, abs=1e-5)
    for curve in (("random", "linear", 2), ("random", "knn", 1)):
        for name in ("macro_f1", "accuracy", "calibration_error"):
            mean = np.mean([r[name] for r in scores["rows"] if _curve(r) == curve])
            assert by_name[curve][name] == pytest.approx(mean, abs=1e-5)
            assert by_name[curve][f"{name}_low"] - 1e-6 <= mean <= by_name[curve][f"{name}_high"] + 1e-6
    with open(out / "summary.csv", newline="") as file:
        summed = list(csv.DictReader(file))
    assert len(summed) == len(by_name) and {"balanced_accuracy_low", "macro_f1_high"} <= set(summed[0])
    pairs = {
        (d["encoder"], d["baseline"], d["method"], d["labels_per_class"]): d["mean"] for d in scores["differences"]
    }
    assert len(pairs) == 2 * 2 * 3
    expected = by_name["tiny", "knn", 1]["mean"] - by_name["random", "knn", 1]["mean"]
    assert pairs["tiny", "random", "knn", 1] == pytest.approx(expected, abs=1e-5)
    check_split(scores, out)

    from nanodist.encoders import Encoder

    def never(*_: object, **__: object) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(Encoder, "embed", never)
    monkeypatch.setattr("nanodist.downstream.texture.texture_of", never)
    first = (out / "scores.json").read_bytes()
    assert probe(place, out, "--splits", "2", "--labels-per-class", "1,2,64") == 0
    assert (out / "scores.json").read_bytes() == first
    assert probe(place, out, "--splits", "2", "--labels-per-class", "2", "--rounds", "5") == 0
    surer = json.loads((out / "scores.json").read_text())
    assert surer["protocol"]["rounds"] == 5
    assert {len(counts["validation"]) for counts in surer["splits"][0]["micrographs"].values()} == {5}
    assert "in 5 rounds" in capsys.readouterr().out


def _curve(row: dict[str, object]) -> tuple[object, ...]:
    return row["encoder"], row["method"], row["labels_per_class"]


def check_split(scores: dict, out: Path) -> None:
    for split in scores["splits"]:
        assert split["validation_samples"] > 0
        for counts in split["micrographs"].values():
            assert counts["train"] + counts["test"] == 4 and counts["test"] == 1
            assert counts["validation"] == [1, 1, 1]
    tested = set(scores["splits"][0]["test_groups"])
    with np.load(out / "embedding.npz", allow_pickle=False) as arrays:
        assert arrays["features"].shape == (scores["splits"][0]["test_samples"], 512)
        assert set(arrays["groups"].tolist()) == tested
        assert all(g.startswith(f"m{c[-1]}-") for g, c in zip(arrays["groups"], arrays["labels"], strict=True))
    assert scores["draws"][0]["labels"] == {"class0": 1, "class1": 1, "class2": 1}


def test_a_test_store_is_the_whole_test_and_names_make_encoder_seeds(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encoders = [f"pair={place / 'export7'}", f"pair={place / 'export8'}", f"again={place / 'export8'}"]
    options = ["--test-store", str(place / "test-store"), "--labels-per-class", "2,64", "--short-classes", "cap"]
    options += ["--seeds", "2", "--resamples", "50", "--baselines", "texture"]
    assert main(["probe", *encoders, "--store", str(place / "store"), "--out", str(out), *options]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert [s["test_samples"] for s in scores["splits"]] == [18]
    assert scores["splits"][0]["train_samples"] == 48
    capped = [r for r in scores["rows"] if r["labels_per_class"] == 64]
    assert all(r["balanced_accuracy"] is not None and "class0 has 16" in r["reason"] for r in capped)
    summary = {(s["encoder"], s["method"], s["labels_per_class"]): s for s in scores["summary"]}
    assert summary["pair", "linear", 2]["encoder_seeds"] == 2
    assert summary["pair", "linear", 2]["transductive"] is None  # pretrained on another store: not known
    assert {e for e, _, _ in summary} == {"pair", "texture", "again"}
    over = {(d["encoder"], d["baseline"]): d["mean"] for d in scores["differences"] if d["labels_per_class"] == 2}
    assert set(over) == {("pair", "texture"), ("again", "texture"), ("again", "pair")}
    gain = summary["again", "knn", 2]["mean"] - summary["pair", "knn", 2]["mean"]
    assert over["again", "pair"] == pytest.approx(gain, abs=1e-5)


def finetuning(folder: Path, store: Path, draw: int, labels: int | str = 2, used: int = 6, **more: object) -> Path:
    """What a run from scratch leaves that has two thirds of the samples of a test store right, with 0.7 for each."""
    from nanodist.shards import Store

    opened = Store.open(store)
    row = {"encoder": "timm:x", "weights": "random", "tuned": "all", "seed": 0, "split_seed": 0, "draw_seed": draw}
    row |= {"labels_per_class": labels, "n_train": used, "n_validation": 0} | more
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({"kind": "classification", "rows": [row]}))
    lines = ["sample,micrograph,label,predicted,p_class0,p_class1,p_class2"]
    for i, label in enumerate(opened.labels):
        said = label if i % 3 or draw else "class0"
        chances = ",".join("0.7" if name == said else "0.15" for name in ("class0", "class1", "class2"))
        lines.append(f"{opened.samples[i].key},{opened.groups[i]},{label},{said},{chances}")
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_training_from_scratch_is_a_row_and_a_baseline_of_the_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = str(place / "test-store")
    for draw in (0, 1):
        finetuning(tmp_path / f"sweep/runs/{draw}", place / "test-store", draw)
    options = ["--test-store", tests, "--labels-per-class", "2", "--baselines", "none", "--seeds", "3"]
    assert probe(place, tmp_path / "out", *options, "--finetuned", str(tmp_path / "sweep")) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    by_name = {_curve(s): s for s in scores["summary"]}
    scratch = by_name["from scratch", "finetune", 2]
    rows = [r for r in scores["rows"] if r["encoder"] == "from scratch"]
    assert [r["seed"] for r in rows] == [0, 1] and rows[1]["calibration_error"] == pytest.approx(0.3)
    assert rows[1]["balanced_accuracy"] == 1.0 > rows[0]["balanced_accuracy"]
    assert scratch["mean"] == pytest.approx(np.mean([r["balanced_accuracy"] for r in rows]), abs=1e-6)
    assert scratch["kind"] == "scratch" and scratch["transductive"] is False
    # Over the two draws that both have, of the three that the encoder has.
    linear = [r["balanced_accuracy"] for r in scores["rows"] if _curve(r) == ("tiny", "linear", 2) and r["seed"] < 2]
    gains = {(d["baseline"], d["method"]): d for d in scores["differences"]}
    assert gains["from scratch", "linear"]["mean"] == pytest.approx(np.mean(linear) - scratch["mean"], abs=1e-5)
    assert "from scratch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"used": 9}, "was trained on 9 labels, where the probe draws 6"),
        ({"labels": 5}, "it has 5 labels a class of draw 0, which the probe has not; see --labels-per-class"),
        ({"split_seed": 1}, "is of split 1, and the probe has 0 alone"),
        ({"seed": 3}, "are the same replicate"),
        ({"store": "store"}, "was tested on 48 samples, which are not the 18"),
    ],
)
def test_a_fine_tuning_of_other_labels_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object], message: str
) -> None:
    made = {"store": "test-store", **changed}
    run = finetuning(tmp_path / "run", place / str(made.pop("store")), 0, **made)  # type: ignore[arg-type]
    runs = ["--finetuned", str(run)] * (2 if "seed" in changed else 1)
    if "seed" in changed:
        runs[-1] = str(finetuning(tmp_path / "again", place / "test-store", 0, seed=3))
    options = ["--test-store", str(place / "test-store"), "--labels-per-class", "2", *runs]
    assert probe(place, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_each_micrograph_is_left_out_in_turn(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--split", "leave-one-group-out", "--labels-per-class", "2", "--baselines", "texture", "--seeds", "1"]
    assert probe(place, out, *options) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert [split["test_groups"] for split in scores["splits"]] == [[f"m{c}-{m}"] for c in range(3) for m in range(4)]
    assert scores["chance"] == pytest.approx(1 / 3) and scores["protocol"]["splits"] == 12
    folds = [f for f in scores["folds"] if (f["encoder"], f["method"], f["labels_per_class"]) == ("texture", "knn", 2)]
    assert [f["classes"] for f in folds] == [[f"class{c}"] for c in range(3) for _ in range(4)]
    assert all(f["test_samples"] == 4 for f in folds)
    summary = {_curve(s): s for s in scores["summary"]}["texture", "knn", 2]
    assert summary["mean"] == pytest.approx(np.mean([f["right"] for f in folds]), abs=1e-5)
    assert summary["test_micrographs"] == 12
    said = capsys.readouterr().out
    assert "m2-3 (class2, 4 samples): tiny" in said and "left out in turn" in said


def test_settings_are_not_chosen_where_only_one_class_has_a_micrograph_to_spare() -> None:
    """Of two specimens of a class one is left out, so that the rest can validate the other class only."""
    groups = np.repeat(np.arange(7), 6)
    targets = encode(["rod" if g < 2 else "sphere" for g in groups], [f"s{g}" for g in groups])
    features = np.random.default_rng(0).normal(size=(42, 5)) + 3.0 * (groups < 2)[:, None]
    protocol = Protocol((2, "all"), seeds=1)
    found = []
    for split in leave_one_group_out(targets):
        assert len(np.unique(targets.groups[split.test])) == 1
        assert not set(targets.groups[split.test]) & set(targets.groups[split.train])
        outcomes = Prober(features, targets, plan_split(targets, split, protocol), protocol).outcomes()
        found.append({outcome.validation_score is None for outcome in outcomes})
    assert found == [{True}] * 2 + [{False}] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "leave-one-group-out", "--test-store", "{place}/test-store"], "makes its own test sets"),
        (["--labels-per-class", "1,two"], "'two' is not a whole number"),
        (["--baselines", "imagenet"], "'imagenet' does not exist"),
        (["--test-share", "1.5"], "--test-share is 1.5"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--rounds", "5", "--protocol", "lu2022"], "--rounds: neither lu2022 nor a choice on the test"),
        (["--rounds", "5", "--flaws", "choice-on-test"], "--rounds: neither lu2022 nor a choice on the test"),
        (["--store", "{place}/unlabelled"], "has no labels"),
        (["--store", "{place}/lone-store"], "one micrograph only"),
        (["--test-store", "{place}/store"], "share 12 micrograph(s), such as 'm0-0'"),
        (["{place}/nothing"], "no such folder"),
        (["{place}/export8"], "the name 'tiny' is taken"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert probe(place, out, *[o.replace("{place}", str(place)) for o in options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


def test_transductive_is_known_from_micrographs_before_stores() -> None:
    def saw(kind: str, seen: dict | None) -> bool | None:
        return transductive(FeatureSet("x", kind, 0, np.zeros((1, 1), np.float32), seen), "abc", ["m1", "m2"])  # type: ignore[arg-type]

    assert saw("texture", None) is False
    assert saw("pretrained", None) is None
    assert saw("pretrained", {"manifest_hash": "other"}) is None
    assert saw("pretrained", {"manifest_hash": "abc"}) is True
    assert saw("pretrained", {"manifest_hash": "abc", "groups": ["m3"]}) is False
    assert saw("pretrained", {"manifest_hash": "other", "groups": ["m2", "m3"]}) is True


def test_noise_is_at_chance_however_many_micrographs_leak_would_help() -> None:
    """Features that name the micrograph, and nothing of the class, must not score above chance on unseen ones."""
    groups = np.repeat(np.arange(60), 6)
    targets = encode([f"c{g % 3}" for g in groups], [f"m{g:02d}" for g in groups])
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 50))[groups] + 0.1 * generator.normal(size=(360, 50))
    scores = []
    for number in range(4):
        protocol = Protocol((8, "all"), seeds=2)
        plan = plan_split(targets, split_within(targets, 0.3, 0, number), protocol)
        outcomes = list(Prober(features, targets, plan, protocol).outcomes())
        scores += [(o.predicted == targets.y[plan.split.test]).mean() for o in outcomes if o.predicted is not None]
    assert abs(np.mean(scores) - 1 / 3) < 0.08


def test_swapping_the_labels_of_the_test_changes_no_prediction() -> None:
    """Neither the settings nor the fit see the test labels."""
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(24), 4)
    labels = groups % 3
    features = generator.normal(size=(3, 10))[labels] + generator.normal(size=(96, 10))
    targets = encode([f"c{c}" for c in labels], [f"m{g:02d}" for g in groups])
    protocol = Protocol((2, 4, "all"), seeds=2)
    plan = plan_split(targets, split_within(targets, 0.3, 0, 0), protocol)
    before = list(Prober(features, targets, plan, protocol).outcomes())
    targets.y[plan.split.test] = (targets.y[plan.split.test] + 1) % 3
    after = list(Prober(features, targets, plan, protocol).outcomes())
    for one, two in zip(before, after, strict=True):
        assert one.setting == two.setting
        np.testing.assert_array_equal(one.predicted, two.predicted)


@pytest.mark.skipif(not (DATA / "tem_virus" / "meta.csv").is_file(), reason=f"no tem_virus in {DATA}")
def test_texture_separates_some_real_viruses_on_unseen_micrographs() -> None:
    from nanodist.downstream.texture import texture_features

    wanted = ("Adenovirus", "Astrovirus", "Norovirus", "Influenza")
    with open(DATA / "tem_virus" / "meta.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in wanted]
    taken: dict[str, int] = {}
    kept = []
    for row in rows:
        taken[row["micrograph"]] = taken.get(row["micrograph"], 0) + 1
        kept += [row] if taken[row["micrograph"]] <= 4 else []
    images = [np.asarray(Image.open(DATA / "tem_virus" / row["file"])) for row in kept]
    targets = encode([row["label"] for row in kept], [row["micrograph"] for row in kept])
    protocol = Protocol((8,), seeds=3)
    features = texture_features(images)
    found = []
    for number in range(3):
        plan = plan_split(targets, split_within(targets, 0.3, 0, number), protocol)
        for outcome in Prober(features, targets, plan, protocol).outcomes(["linear"]):
            found.append((outcome.predicted == targets.y[plan.split.test]).mean())
    assert np.mean(found) > 0.5  # chance is 0.25
