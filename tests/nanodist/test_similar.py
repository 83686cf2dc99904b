"""Look-alikes in a store: a tile finds itself, then others of its own kind, and not twice the same micrograph."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from nanodist.cli import main
from nanodist.encoders import EncoderSpec, random_encoder
from nanodist.export.weights import export_timm
from nanodist.shards import PackOptions, Store, pack


@pytest.fixture
def world(tmp_path):
    """Micrographs of fine and of coarse noise, two tiles each, and an encoder."""
    rng = np.random.default_rng(0)
    (tmp_path / "src").mkdir()
    for number in range(4):
        for name, size in (("fine", 1), ("coarse", 8)):
            noise = rng.integers(0, 255, (32 // size, 64 // size)).astype(np.uint8)
            Image.fromarray(np.kron(noise, np.ones((size, size), np.uint8))).save(
                tmp_path / "src" / f"{name}{number}.png"
            )
    pack([tmp_path / "src"], tmp_path / "store", PackOptions(tile=32, near_duplicates="keep"))
    export_timm(random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), 0), tmp_path / "e", {"name": "e"})
    return tmp_path


def _similar(world, *more):
    common = ["--encoder", str(world / "e"), "--store", str(world / "store"), "--out", str(world / "out")]
    code = main(["similar", *map(str, more), *common])
    return code, list(csv.DictReader((world / "out" / "similar.csv").open()))


def test_look_alikes_of_a_tile_and_of_a_whole_micrograph(world, capsys):
    store = Store.open(world / "store")
    assert len(store) == 16
    tile = next(i for i in range(16) if "coarse2" in store.keys[i])
    Image.fromarray(store.read(tile)).save(world / "tile.png")
    code, rows = _similar(world, world / "tile.png", "--count", "4")
    assert code == 0 and [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["sample"] == store.keys[tile] and float(rows[0]["similarity"]) == pytest.approx(1, abs=1e-3)
    assert all("coarse" in row["micrograph"] for row in rows)
    assert len({row["micrograph"] for row in rows}) == 4
    assert sorted(float(row["similarity"]) for row in rows)[::-1] == [float(row["similarity"]) for row in rows]
    assert Image.open(world / "out" / "similar.png").size[0] > 128
    code, rows = _similar(world, world / "src" / "fine0.png", "--count", "2", "--per-micrograph", "2")
    assert {row["micrograph"] for row in rows} == {store.groups[store.keys.index(rows[0]["sample"])]}
    assert "fine0" in rows[0]["micrograph"]


def test_what_cannot_be_read_is_named(world, capsys):
    (world / "bad.png").write_bytes(b"nothing")
    code, rows = _similar(world, world / "bad.png", world / "src" / "fine1.png")
    assert code == 1 and len(rows) == 8
    assert list(json.loads((world / "out" / "report.json").read_text())["not_read"]) == [str(world / "bad.png")]
    assert main(["similar", "x", "--encoder", str(world / "e"), "--store", str(world / "store"), "--out", "o",
                 "--count", "0"]) == 2  # fmt: skip
