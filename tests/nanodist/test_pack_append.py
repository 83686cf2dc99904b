"""pack --append: new shards beside the old ones, which stay as they are; all or nothing."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.shards import PackOptions, Part, Store, pack, verify
from tests.nanodist.packing import tree

SMALL = PackOptions(tile=32, shard_mb=0.008)


def images(folder, numbers, offset=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"m{number + offset:02d}.png")
    return folder


@pytest.fixture
def store(tmp_path):
    return pack([images(tmp_path / "src", range(8))], tmp_path / "store", SMALL, labels="folder")


def add(tmp_path, store, numbers, name="src", **more):
    folder = images(tmp_path / name, numbers)
    return pack([folder], store.path, SMALL, labels="folder", append=True, **more)


def test_a_store_grows(store, tmp_path):
    old = tree(store.path)
    grown = add(tmp_path, store, range(8, 14))
    assert [s.key for s in grown.samples] == [f"m{i:02d}" for i in range(14)]
    assert list(grown.samples)[:8] == list(store.samples)
    assert grown.manifest.shards[: len(store.manifest.shards)] == store.manifest.shards
    now = tree(grown.path)
    assert all(now[name] == data for name, data in old.items() if name != "manifest.json")
    assert grown.manifest_hash != store.manifest_hash and verify(grown.path) == []
    np.testing.assert_array_equal(store.read(3), grown.read(3))
    fresh = pack([tmp_path / "src"], tmp_path / "fresh", SMALL, labels="folder").manifest.statistics
    assert grown.manifest.statistics == fresh  # exact sums: not the mean of means
    assert grown.manifest.provenance["grown_from"] == [store.manifest_hash]
    assert now[f"manifest-{store.manifest_hash[:16]}.json"] == old["manifest.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "src", "store"]


def test_nothing_new_changes_nothing(store, tmp_path):
    before = tree(store.path)
    assert add(tmp_path, store, []).manifest_hash == store.manifest_hash
    assert tree(store.path) == before


def test_the_same_pixels_under_another_name_are_a_duplicate(store, tmp_path):
    images(tmp_path / "src", [3], offset=50)
    grown = add(tmp_path, store, [20])
    assert len(grown) == 9 and {"source": "m53.png", "reason": "exact duplicate", "key": "m53", "of": "m03"} in (
        grown.manifest.dropped
    )


def test_the_same_name_with_other_pixels_is_refused(store, tmp_path):
    before = tree(store.path)
    images(tmp_path / "other", [30])
    (tmp_path / "other" / "m30.png").rename(tmp_path / "other" / "m05.png")
    with pytest.raises(UserError, match=r"has a sample m05 already, and m05\.png"):
        pack([tmp_path / "other"], store.path, SMALL, append=True)
    assert tree(store.path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "src", "store"]


def test_sums_that_are_not_told_are_counted(store, tmp_path):
    import json

    path = store.path / "manifest.json"
    values = json.loads(path.read_text())
    del values["provenance"]["sums"]
    path.write_text(json.dumps(values))
    grown = add(tmp_path, store, [40]).manifest.statistics
    fresh = pack([tmp_path / "src"], tmp_path / "fresh", SMALL, labels="folder").manifest.statistics
    assert (grown["mean"], grown["std"]) == (fresh["mean"], fresh["std"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_growing(store, tmp_path, when):
    """At every file that is put in place: the old store or the new one, and the same call ends in the new one."""
    from tests.nanodist.test_pack_resume import killed_at

    images(tmp_path / "src", range(8, 20))
    shutil.copytree(store.path, tmp_path / "other")
    expected = pack([tmp_path / "src"], tmp_path / "other", SMALL, labels="folder", append=True)
    hashes = set()
    kills = 0
    while killed_at(kills + 1, when, lambda: pack([tmp_path / "src"], store.path, SMALL, labels="folder", append=True)):
        kills += 1
        hashes.add(Store.open(store.path).manifest_hash)
        assert verify(store.path) == []
    assert kills >= 5 and store.manifest_hash in hashes <= {store.manifest_hash, expected.manifest_hash}
    assert tree(store.path) == tree(expected.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "src", "store"]


@pytest.mark.parametrize("append", [False, True])
def test_stopped_once_the_store_is_there(store, tmp_path, monkeypatch, append):
    """Only the staging folder was left to remove: the same call does that, and another one is told of the store."""
    from nanodist.shards.staging import Staging

    source = images(tmp_path / "src", range(8, 12))
    out = store.path if append else tmp_path / "new"
    monkeypatch.setattr(Staging, "remove", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack([source], out, SMALL, labels="folder", append=append)
    monkeypatch.undo()
    made = tree(out)
    assert (tmp_path / f".{out.name}.packing").is_dir() and len(Store.open(out)) == 12
    if not append:
        with pytest.raises(UserError, match="exists and is not empty"):
            pack([source], out, SMALL)
    pack([source], out, SMALL, labels="folder", append=append)
    assert tree(out) == made and not (tmp_path / f".{out.name}.packing").exists()


def test_the_command_takes_the_options_of_the_store(store, tmp_path, capsys):
    images(tmp_path / "src", [21])
    line = ["pack", str(tmp_path / "src"), "--out", str(store.path), "--append", "--labels", "folder"]
    assert main([*line, "--tile", "64"]) == 2
    assert "was packed with --tile 32 and not 64" in capsys.readouterr().err
    assert main(line) == 0
    assert "9 samples of 9 files" in capsys.readouterr().out


def test_what_cannot_grow(tmp_path, capsys):
    source = images(tmp_path / "src", range(6))
    line = ["pack", str(source), "--append", "--out"]
    assert main([*line, str(tmp_path / "gone")]) == 2 and "does not exist" in capsys.readouterr().err
    pack([source], tmp_path / "part", SMALL, part=Part("train"))
    assert main([*line, str(tmp_path / "part")]) == 2 and "holds the part 'train'" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_a_store_of_before_grows_as_it_was_packed(tmp_path):
    """Its manifest knows no bars, no empty tiles, no near duplicates and no encoding: none is made of what is added."""
    import dataclasses

    from hpc import atomic
    from nanodist.shards.manifest import load_manifest

    before = dataclasses.replace(SMALL, encoding="png", empty_tiles="keep", near_duplicates="keep")
    store = pack([images(tmp_path / "src", range(3))], tmp_path / "store", before)
    manifest = load_manifest(store.path)
    new = ("encoding", "pixel_size_nm", "bars", "empty_tiles", "near_duplicates")
    options = {name: value for name, value in manifest.options.items() if name not in new}
    atomic.write_json(store.path / "manifest.json", dataclasses.replace(manifest, options=options).to_dict())
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "src" / "flat.png")
    assert main(["pack", str(tmp_path / "src"), "--out", str(store.path), "--append"]) == 0
    grown = Store.open(store.path)
    assert grown.keys[3:] == ["flat"] and {s.suffix for s in grown.samples} == {"png"}
    assert grown.manifest.options == options and verify(store.path) == []
