"""What a user gets wrong is answered by one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import pytest

from nanodist.cli import main


def _said(capsys, *arguments):
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith(f"nanodist {arguments[0]}: error: "), said
    return said


@pytest.fixture
def empty_cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    # Nothing but what the test itself made.
    assert sorted(p.name for p in tmp_path.iterdir()) in ([], ["input"])


def test_misspelled_key(capsys, empty_cwd):
    said = _said(capsys, "pretrain", "simclr", "train.stesp=3", "data.store=x")
    assert "'train.stesp' does not exist (did you mean 'train.steps'?)" in said


def test_misspelled_recipe(capsys, empty_cwd):
    assert "recipe 'simlcr' is neither a file nor one of: " in _said(capsys, "pretrain", "simlcr")


def test_missing_store(capsys, empty_cwd):
    assert "nowhere" in _said(capsys, "pretrain", "simclr", "data.store=nowhere")


def test_store_not_given(capsys, empty_cwd):
    assert "data.store=FOLDER" in _said(capsys, "pretrain", "simclr")


def test_empty_folder(capsys, empty_cwd):
    (empty_cwd / "input").mkdir()
    assert "input" in _said(capsys, "pretrain", "simclr", "data.store=input")
    assert "input" in _said(capsys, "pack", "input", "--out", "store")


def test_folder_of_text_files_named_png(capsys, empty_cwd):
    (empty_cwd / "input").mkdir()
    for i in range(3):
        (empty_cwd / "input" / f"{i}.png").write_text("not a picture")
    assert "0.png" in _said(capsys, "pack", "input", "--out", "store")
    assert "input" in _said(capsys, "pretrain", "simclr", "data.store=input")


def test_batch_larger_than_the_store(capsys, empty_cwd):
    import numpy as np
    from PIL import Image

    (empty_cwd / "input").mkdir()
    for i in range(3):
        Image.fromarray(np.full((32, 32), 60 * i + np.arange(32), np.uint8)).save(empty_cwd / "input" / f"{i}.png")
    store = empty_cwd / "input" / "store"
    assert main(["pack", str(empty_cwd / "input"), "--out", str(store), "--tile", "32"]) == 0
    capsys.readouterr()
    said = _said(capsys, "pretrain", "simclr", f"data.store={store}")
    assert "holds 3 samples, fewer than train.global_batch_size=128" in said
