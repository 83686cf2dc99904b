"""Masks go into the shards with their tiles, and give labels where that is asked for."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.shards import PackOptions, Store, pack, verify
from nanodist.shards.companions import read_mask_of
from nanodist.shards.masks import find_masks
from nanodist.shards.sources import Source

TILE = PackOptions(tile=32)


def picture(seed, shape=(64, 64)):
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def classes():
    """Left half background, right upper quarter class 2, lower quarter classes 1 (most) and 2; one pixel of 3 left."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:32, 32:] = 2
    mask[32:, 32:] = 1
    mask[40:50, 40:50] = 2
    mask[5, 5] = 3
    return mask


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    for name in ("one/images", "one/masks", "two/images", "two/instances"):
        (root / name).mkdir(parents=True)
    Image.fromarray(picture(0)).save(root / "one" / "images" / "a.png")
    Image.fromarray(classes()).save(root / "one" / "masks" / "a.png")
    Image.fromarray(picture(1)).save(root / "one" / "images" / "no-mask.png")
    tifffile.imwrite(root / "two" / "images" / "b.tif", picture(2, (32, 32)))
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(root / "two" / "instances" / "b.png")
    return root


def members(store):
    found = {}
    for shard in store.manifest.shards:
        with tarfile.open(store.path / shard.file) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def mask_of(store, key):
    return np.asarray(Image.open(io.BytesIO(members(store)[f"{key}.mask.png"])))


def test_masks_are_cut_as_their_micrographs_and_are_none_themselves(folder, tmp_path, capsys):
    line = ["pack", str(folder), "--out", str(tmp_path / "store"), "--tile", "32", "--labels", "masks"]
    assert main([*line, "--masks", "images=masks", "--masks", "images=instances"]) == 0
    store = Store.open(tmp_path / "store")
    assert {s.source for s in store.samples} == {"one/images/a.png", "one/images/no-mask.png", "two/images/b.tif"}
    for y in (0, 32):
        for x in (0, 32):
            got = mask_of(store, f"one__images__a--y{y:05d}x{x:05d}")
            np.testing.assert_array_equal(got, classes()[y : y + 32, x : x + 32])
    instances = mask_of(store, "two__images__b")
    np.testing.assert_array_equal(instances, np.arange(1024).reshape(32, 32))
    labels = dict(zip(store.keys, store.labels, strict=True))
    assert [labels[f"one__images__a--{place}"] for place in ("y00000x00000", "y00000x00032", "y00032x00032")] == [
        "0", "2", "1",
    ]  # fmt: skip
    assert labels["one__images__no-mask--y00000x00000"] is None
    facts = json.loads(members(store)["one__images__a--y00032x00032.json"])
    assert facts["mask"] == {"encoding": "png", "values": 2, "shares": {"1": 0.902344, "2": 0.097656}}
    assert json.loads(members(store)["two__images__b.json"])["mask"] == {"encoding": "png", "values": 1024}
    assert verify(store.path) == []
    # One of the micrographs has no mask, and gave 4 of the 9 tiles.
    assert main(["inspect", str(store.path)]) == 0 and "5 of 9 samples have one" in capsys.readouterr().out


def test_without_asking_the_labels_are_those_of_the_folder(folder, tmp_path):
    store = pack([folder / "one"], tmp_path / "store", TILE, labels="folder", masks=["images=masks"])
    assert set(store.labels) == {"images"} and len(store) == 8


def test_masks_from_a_table(folder, tmp_path):
    table = folder / "masks.csv"
    table.write_text("file,mask\none/images/a.png,one/masks/a.png\n")
    store = pack([folder / "one"], tmp_path / "store", TILE, masks=[f"{table}:mask"], labels="masks")
    assert sorted({label for label in store.labels if label}) == ["0", "1", "2"]
    table.write_text("file,mask\none/images/a.png,one/masks/gone.png\n")
    with pytest.raises(UserError, match=r"gone\.png, named by --masks as the mask of .*a\.png, does not exist"):
        pack([folder / "one"], tmp_path / "other", TILE, masks=[f"{table}:mask"])


def test_webdataset_gives_them_under_their_name(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    store = pack([folder / "one"], tmp_path / "store", TILE, masks=["images=masks"])
    samples = list(webdataset.WebDataset(str(store.path / "shard-000000.tar"), shardshuffle=False).decode("l8"))
    by_key = {sample["__key__"]: sample for sample in samples}
    assert list(by_key) == store.keys
    np.testing.assert_array_equal(by_key[store.keys[3]]["mask.png"], classes()[32:, 32:])


def test_a_mask_is_cut_where_bars_are_and_resampled_by_the_nearest(tmp_path):
    root = tmp_path / "src"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(60, 200, (128, 128)).astype(np.uint8)
    pixels[12:16, 10:60] = 255
    mask = np.arange(128 * 128).reshape(128, 128).astype(np.uint16)
    Image.fromarray(pixels).save(root / "images" / "a.png", dpi=(25.4e6 / 2.0, 25.4e6 / 2.0))  # 2 nm
    Image.fromarray(mask).save(root / "masks" / "a.png")
    options = PackOptions(tile=None, bars="cut", pixel_size_nm=4.0)
    store = pack([root], tmp_path / "store", options, masks=["images=masks"])
    facts = json.loads(members(store)["images__a.json"])
    part = facts["cut_to_px"]
    assert part["x"] == 0 and part["width"] == 128 and 16 < part["y"] < 48 and part["y"] + part["height"] == 128
    got = mask_of(store, "images__a")
    assert got.shape == store.read(0).shape == (part["height"] // 2, 64)
    np.testing.assert_array_equal(got, mask[part["y"] + 1 :: 2, 1::2][: len(got)])


def test_the_same_pixels_under_two_masks_are_two_samples(folder, tmp_path):
    (folder / "one" / "images" / "same.png").write_bytes((folder / "one" / "images" / "a.png").read_bytes())
    Image.fromarray(np.ones((64, 64), np.uint8)).save(folder / "one" / "masks" / "same.png")
    store = pack([folder / "one"], tmp_path / "store", TILE, masks=["images=masks"])
    assert len(store) == 12 and store.manifest.dropped == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("size", r"a\.png is a mask of 32 x 32 pixels, and its micrograph has 64 x 64: make them alike"),
        ("float", r"a\.tif is a mask of float32 values from 0.5 to 0.5: masks hold whole numbers"),
        ("colour", r"a\.png is a colour picture"),
    ],
)
def test_masks_that_do_not_fit(folder, tmp_path, change, words):
    path = folder / "one" / "masks" / "a.png"
    if change == "size":
        Image.fromarray(classes()[:32, :32]).save(path)
    elif change == "colour":
        Image.fromarray(np.stack([classes() * k for k in (1, 2, 3)], axis=-1)).save(path)
    else:
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), np.full((64, 64), 0.5, np.float32))
    with pytest.raises(UserError, match=words):
        pack([folder / "one"], tmp_path / "store", TILE, masks=["images=masks"])
    store = pack([folder / "one"], tmp_path / "store", PackOptions(tile=32, skip_bad=True), masks=["images=masks"])
    assert [e["source"] for e in store.manifest.dropped] == ["images/a.png"]
    assert str(tmp_path) not in json.dumps(store.manifest.dropped)


def test_one_mask_is_not_that_of_a_stack(tmp_path):
    rng = np.random.default_rng(0)
    for name, pages in (("images", 3), ("masks", 1)):
        (tmp_path / name).mkdir()
        pixels = rng.integers(0, 200 if name == "images" else 2, (pages, 64, 64)).astype(np.uint8)
        tifffile.imwrite(tmp_path / name / "s.tif", pixels, photometric="minisblack")
    with pytest.raises(UserError, match=r"s.tif is one mask, and its micrograph a stack: save as many pages"):
        pack([tmp_path / "images"], tmp_path / "store", TILE, masks=["images=masks"])
    tifffile.imwrite(
        tmp_path / "masks" / "s.tif", rng.integers(0, 2, (3, 64, 64)).astype(np.uint8), photometric="minisblack"
    )
    store = pack([tmp_path / "images"], tmp_path / "store", TILE, masks=["images=masks"])
    masks = [read_mask_of(store, i) for i in range(len(store))]
    assert len(masks) == 12 and len({mask.tobytes() for mask in masks}) == 12


def test_one_mask_is_not_that_of_two_images(tmp_path):
    """What measure --rois wrote of a/x.tif has the name of a-x.tif."""
    sources = [Source(tmp_path / "images" / name, name, name) for name in ("a-x.tif", "a/x.tif")]
    (tmp_path / "rois").mkdir()
    (tmp_path / "rois" / "00001-a-x.labels.tif").touch()
    with pytest.raises(UserError, match=r"00001-a-x.labels.tif would be the mask of .*a-x.tif and of .*a/x.tif"):
        find_masks(["images=rois"], sources)
    (tmp_path / "rois" / "a").mkdir()
    (tmp_path / "rois" / "a" / "x.png").touch()
    masks = find_masks(["images=rois"], sources)
    found = {source.name: masks[source.path].name for source in sources}
    assert found == {"a-x.tif": "00001-a-x.labels.tif", "a/x.tif": "x.png"}


def test_label_images_of_measure_give_way_to_masks_of_the_plain_name(tmp_path):
    """And numbered ones to others; an image may have such a number itself."""
    names = ("x", "v", "00001-y", "00002-y", "00004-z")
    sources = [Source(tmp_path / "images" / f"{name}.tif", f"{name}.tif", name) for name in names]
    (tmp_path / "rois").mkdir()

    def found(*masks):
        for mask in masks:
            (tmp_path / "rois" / mask).touch()
        return {image.stem: mask.name for image, mask in find_masks(["images=rois"], sources).items()}

    expected = {"x": "00001-x.mask.labels.tif", "v": "00005-v.instances.labels.tif"}
    expected |= {name: f"{name}.labels.tif" for name in names[2:]}
    assert found(*expected.values()) == expected
    with pytest.raises(UserError, match=r"00001-x.* and .*00002-x.* would both be the mask of 'x': leave one out"):
        found("00002-x.labels.tif")
    for better in ("x.labels.tif", "x.mask.png"):
        assert found(better) == expected | {"x": better}
    (tmp_path / "rois" / "x.mask.png").unlink()
    with pytest.raises(UserError, match=r"x\.labels\.png and .*x\.labels\.tif would both be the mask of 'x'"):
        found("x.labels.png")
    (tmp_path / "rois" / "x.labels.png").unlink()
    with pytest.raises(UserError, match=r"v\.mask\.png and .*v\.tif would both be the mask of 'v': leave one out"):
        found("v.mask.png", "v.tif")


@pytest.mark.parametrize(
    ("masks", "labels", "words"),
    [
        (["images"], None, r"--masks is 'images'; it must be FOLDER=MASKS, such as images=masks"),
        (["images=nothing"], None, r"--masks images=nothing gives a mask to none of the 6 files"),
        ([], "masks", "--labels masks needs --masks"),
    ],
)
def test_specs_that_are_none(folder, tmp_path, masks, labels, words):
    (folder / "one" / "images" / "more.png").write_bytes((folder / "one" / "images" / "a.png").read_bytes())
    with pytest.raises(UserError, match=words):
        pack([folder], tmp_path / "store", TILE, masks=masks, labels=labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_of_several_tables_the_first_that_lists_a_file_counts(folder, tmp_path):
    for name, rows in (("one", "one/images/a.png,A,s1"), ("two", "two/images/b.tif,B,s2\none/images/a.png,C,s3")):
        (folder / f"{name}.csv").write_text(f"file,label,session\n{rows}\n")
    tables = [folder / "one.csv", folder / "two.csv"]
    labels, groups = ([f"{table}:{column}" for table in tables] for column in ("label", "session"))
    store = pack([folder], tmp_path / "a", TILE, labels=labels, groups=groups, unlisted="keep", masks=["images=masks"])
    found = {s.source: (s.label, s.group) for s in store.samples}
    assert found["one/images/a.png"] == ("A", "s1") and found["two/images/b.tif"] == ("B", "s2")
    assert found["one/images/no-mask.png"] == (None, "one/images/no-mask.png")
    more = pack([folder], tmp_path / "b", TILE, labels=["masks", *labels], unlisted="keep", masks=["images=masks"])
    assert {s.label for s in more.samples if s.source == "one/images/a.png"} == {"0", "1", "2"}
    assert {s.label for s in more.samples if s.source == "two/images/b.tif"} == {"B"}
