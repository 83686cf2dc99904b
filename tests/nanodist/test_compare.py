"""``nanodist compare``: curves, intervals and paired differences of runs that stand on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from nanodist.cli import main

SAMPLES = [(f"s{g}-{k}", f"m{g}", "ab"[g % 2]) for g in range(8) for k in range(3)]


def write_run(folder: Path, document: dict[str, Any], table: str, lines: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(document))
    (folder / table).write_text("\n".join(lines) + "\n")


def what(weights: str, labels: int | str, draw: int, tuned: str = "all", **more: Any) -> dict[str, Any]:
    return {"encoder": "runs/a", "weights": weights, "tuned": tuned, "split_seed": 0, "draw_seed": draw, "seed": 0,
            "n_train": 2}  | {"labels_per_class": labels, **more}  # fmt: skip


def classified(folder: Path, weights: str, labels: int | str, draw: int, right: float, **more: Any) -> None:
    rng = np.random.default_rng([draw, int(100 * right)])
    lines = ["sample,micrograph,label,predicted,p_a,p_b,p_c"]
    for key, group, label in SAMPLES:
        said = label if rng.random() < right else "c"
        shares = [f"{0.7 if name == said else 0.15}" for name in "abc"]
        lines.append(f"{key},{group},{label},{said},{','.join(shares)}")
    write_run(
        folder, {"kind": "classification", "rows": [what(weights, labels, draw, **more)]}, "predictions.csv", lines
    )


def segmented(folder: Path, weights: str, values: list[tuple[str, str]], draw: int = 0) -> None:
    """Two images of two micrographs: ``values`` are Dice of classes 1 and 2."""
    names = [f"{metric}_{c}" for metric in ("dice", "iou", "boundary_f1") for c in (0, 1, 2)]
    lines = [",".join(["sample", "micrograph", *names])]
    lines += [f"i{i},m{i}," + ",".join([f"0.9,{a},{b}"] * 3) for i, (a, b) in enumerate(values)]
    row = what(weights, "all", draw)
    row["masks"] = row.pop("labels_per_class")
    write_run(folder, {"kind": "segmentation", "classes": [0, 1, 2], "rows": [row]}, "images.csv", lines)


def compared(out: Path, *runs: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    assert main(["compare", *map(str, runs), "--out", str(out), "--resamples", "200", *more]) == 0
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def of(metric: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["metric"] == metric]


def test_curves_of_classifiers_and_their_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for draw in (0, 1):
        classified(tmp_path / f"sweep/runs/p1{draw}", "given", 1, draw, 0.9)
        classified(tmp_path / f"sweep/runs/r1{draw}", "random", 1, draw, 0.3)
        classified(tmp_path / f"sweep/runs/p4{draw}", "given", 4, draw, 0.95)
    found = compared(tmp_path / "out", tmp_path / "sweep")
    rows = {(row["setting"], row["labels"]): row for row in of("balanced accuracy", found)}
    assert list(rows) == [("pretrained, fine-tuned", 1), ("pretrained, fine-tuned", 4), ("from scratch", 1)]
    shares = []
    for draw in (0, 1):
        lines = (tmp_path / f"sweep/runs/p1{draw}/predictions.csv").read_text().splitlines()[1:]
        right = [line.split(",")[2] == line.split(",")[3] for line in lines]
        classes = [line.split(",")[2] for line in lines]
        shares += [np.mean([r for r, c in zip(right, classes, strict=True) if c == one]) for one in "ab"]
    one = rows["pretrained, fine-tuned", 1]
    assert one["mean"] == pytest.approx(np.mean(shares), abs=1e-6) and one["low"] < one["mean"] < one["high"]
    assert (one["runs"], one["images"], one["micrographs"]) == (2, 24, 8)
    (gain,) = found["differences"]
    assert gain["mean"] == pytest.approx(one["mean"] - rows["from scratch", 1]["mean"], abs=2e-6) and gain["low"] > 0
    assert "pretrained, fine-tuned minus from scratch" in capsys.readouterr().out


def test_scores_of_whole_runs_have_intervals_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for draw in (0, 1):
        classified(tmp_path / f"p{draw}", "given", 4, draw, 0.7)
    found = compared(tmp_path / "out", tmp_path / "p0", tmp_path / "p1")
    f1, right, gaps = [], [], []
    for draw in (0, 1):
        lines = [line.split(",") for line in (tmp_path / f"p{draw}/predictions.csv").read_text().splitlines()[1:]]
        truth, said = [line[2] for line in lines], [line[3] for line in lines]
        f1.append(f1_score(truth, said, average="macro"))
        right.append(accuracy_score(truth, said))
        gaps.append(abs(0.7 - right[-1]))  # all confidences are 0.7, in one bin
    for metric, values in (("macro F1", f1), ("accuracy", right), ("calibration error", gaps)):
        (row,) = of(metric, found)
        assert row["mean"] == pytest.approx(np.mean(values), abs=1e-6), metric
        assert row["low"] <= row["mean"] <= row["high"] and row["low"] < row["high"]
        assert (row["micrographs_per_class"], row["runs"]) == ({"a": 4, "b": 4}, 2)
    assert "calibration error" in capsys.readouterr().out


def test_encoder_seeds_are_a_level_of_the_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, right in enumerate((0.5, 0.8)):
        classified(tmp_path / f"sweep/p{seed}", "given", 4, 0, right, encoder=f"runs/{seed}")
        classified(tmp_path / f"sweep/r{seed}", "random", 4, 0, 0.2 + 0.1 * seed, encoder=f"runs/{seed}", seed=seed)
    apart = compared(tmp_path / "apart", tmp_path / "sweep")
    assert [(row["setting"], row["encoder_seeds"]) for row in of("balanced accuracy", apart)] == [
        ("0: pretrained, fine-tuned", 1), ("1: pretrained, fine-tuned", 1), ("0: from scratch", 1),
        ("1: from scratch", 1)]  # fmt: skip
    assert "of one encoder seed" in capsys.readouterr().out
    one = compared(tmp_path / "one", tmp_path / "sweep", more=("--encoders", "mine=runs/0,runs/1"))
    said = capsys.readouterr().out
    tuned, scratch = of("balanced accuracy", one)
    assert (tuned["setting"], tuned["encoder_seeds"], scratch["encoder_seeds"]) == ("pretrained, fine-tuned", 2, 2)
    first, second = (row for row in of("balanced accuracy", apart) if "pretrained" in row["setting"])
    assert tuned["mean"] == pytest.approx((first["mean"] + second["mean"]) / 2, abs=1e-6)
    # The interval reaches to either seed by itself, which no resampling of micrographs alone would.
    assert tuned["low"] < first["mean"] < second["mean"] < tuned["high"]
    assert tuned["micrographs_per_class"] == {"a": 4, "b": 4}
    assert "test micrographs of each class: a 4, b 4" in said and "(2 encoder seeds)" in said
    assert "of one encoder seed" not in said
    (gain,) = one["differences"]
    assert gain["mean"] == pytest.approx(tuned["mean"] - scratch["mean"], abs=2e-6) and gain["runs"] == 2
    classified(tmp_path / "sweep/p2", "given", 4, 1, 0.5, encoder="runs/0")
    for asked, wrong in (
        ("mine=runs/0,runs/1", "lacks encoder runs/1, draw 1 of split 0"),
        ("mine=runs/7", "no run began with runs/7"),
        ("runs/0", "write NAME=PATH,PATH"),
    ):
        line = ["compare", str(tmp_path / "sweep"), "--out", str(tmp_path / "no"), "--encoders", asked]
        assert main(line) == 2 and wrong in capsys.readouterr().err


def test_masks_are_compared_on_the_same_images(tmp_path: Path) -> None:
    # The second image has no class 2; one run sees it nevertheless, which is 0 for it and right for the other.
    segmented(tmp_path / "a", "given", [("0.8", "0.6"), ("0.4", "")])
    segmented(tmp_path / "b", "random", [("0.5", "0.5"), ("0.3", "0.0")])
    found = compared(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    rows = {(row["setting"], row["metric"], row["class"]): row for row in found["rows"]}
    assert rows["pretrained, fine-tuned", "dice", "1"]["mean"] == pytest.approx(0.6)
    assert rows["pretrained, fine-tuned", "dice", "2"]["mean"] == pytest.approx(0.8)
    assert rows["from scratch", "dice", "2"]["mean"] == pytest.approx(0.25)
    assert rows["from scratch", "boundary_f1", "all but background"]["mean"] == pytest.approx((0.5 + 0.15) / 2)
    gains = {(row["metric"], row["class"]): row for row in found["differences"]}
    assert gains["dice", "1"]["mean"] == pytest.approx(0.2) and gains["dice", "1"]["low"] == pytest.approx(0.1)


def test_values_of_the_recipe_tell_settings_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / name for name in ("p", "short", "long")]
    for run, weights, steps, right in zip(runs, ("given", *2 * ["random"]), (30, 30, 90), (0.9, 0.2, 0.5), strict=True):
        classified(run, weights, 1, 0, right)
        (run / "recipe.yaml").write_text(f"train: {{steps: {steps}}}\n")
    found = compared(tmp_path / "out", *runs, more=("--by", "train.steps"))
    rows = {row["setting"]: row["mean"] for row in of("balanced accuracy", found)}
    base = "pretrained, fine-tuned, train.steps 30"
    assert list(rows) == [base, "from scratch, train.steps 30", "from scratch, train.steps 90"]
    gains = {row["baseline"]: row["mean"] for row in found["differences"]}
    assert gains == pytest.approx({name: rows[base] - rows[name] for name in list(rows)[1:]}, abs=2e-6)
    refused = ["compare", *map(str, runs), "--out", str(tmp_path / "no")]
    assert main([*refused, "--by", "train.step"]) == 2 and main([*refused, "--by", "seed.more"]) == 2
    assert main(refused) == 2
    errors = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'p' / 'recipe.yaml'} has no 'train.step'" in errors[0] and "has no 'seed.more'" in errors[1]
    assert "differ in nothing that is compared" in errors[2] and "--by" in errors[2] and len(errors) == 3
    # A run from before there was a key has what the key is by itself.
    (tmp_path / "long" / "recipe.yaml").write_text("train: {zooms: joined}\n")
    found = compared(tmp_path / "zooms", *runs, more=("--by", "train.zooms"))
    names = {row["setting"] for row in found["rows"]}
    given, scratch = "pretrained, fine-tuned, train.zooms drawn", "from scratch, train.zooms"
    assert names == {given, f"{scratch} drawn", f"{scratch} joined"}


def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segmented(tmp_path / "a", "given", [("0.8", "0.6"), ("0.4", "")])
    segmented(tmp_path / "b", "random", [("0.5", "0.5")])
    classified(tmp_path / "c", "given", 1, 0, 0.9)
    classified(tmp_path / "d", "given", 1, 0, 0.8)
    for names, said in (
        ("ab", "different samples"),
        ("ac", "are not compared: give runs of one kind"),
        ("cd", "differ in nothing that is compared"),
        ("e", "holds no scores.json"),
    ):
        paths = [str(tmp_path / name) for name in names]
        assert main(["compare", *paths, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        assert main(["compare", str(tmp_path / "a"), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / out}: " in error and "give another path" in error and error.count("\n") == 1
    (tmp_path / "a" / "images.csv").unlink()
    assert main(["compare", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 2
