"""pack: deterministic standard tars, labels and groups, and nothing left behind on an error."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.shards import PackOptions, Store, pack
from nanodist.shards.tiles import PERCENTILES, _percentiles, tile_starts, to_depth

SMALL = PackOptions(tile=32)


def image(seed=0, shape=(32, 32), dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


@pytest.fixture
def folder(tmp_path):
    """Six micrographs in two folders, of 8 and 16 bits, one with two pages."""
    source = tmp_path / "src"
    for number, name in enumerate(["wires/a.1.png", "wires/b.png", "rods/a.1.png", "rods/d e.png"]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(number, (32, 64) if number == 0 else (32, 32))).save(source / name)
    tifffile.imwrite(source / "rods" / "stack.tif", image(9, (2, 32, 32), np.uint16), photometric="minisblack")
    tifffile.imwrite(source / "rods" / "float.tif", image(10).astype(np.float32) / 7)
    (source / "notes.txt").write_text("not a micrograph")
    return source


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def nothing_but(tmp_path, *names):
    return sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_what_is_in_a_store(folder, tmp_path):
    store = pack([folder], tmp_path / "out", SMALL, labels="folder")
    assert [s.source for s in store.samples][:3] == ["rods/a.1.png", "rods/d e.png", "rods/float.tif"]
    assert store.keys == [
        "rods__a-1",
        "rods__d-e",
        "rods__float",
        "rods__stack--p0",
        "rods__stack--p1",
        "wires__a-1--y00000x00000",
        "wires__a-1--y00000x00032",
        "wires__b",
    ]
    assert store.labels == ["rods"] * 5 + ["wires"] * 3
    assert store.groups == [s.source for s in store.samples]
    np.testing.assert_array_equal(store.read(0), image(2))
    np.testing.assert_array_equal(store.read(6), image(0, (32, 64))[:, 32:])
    assert store.read(3).dtype == np.uint8
    values = np.stack([store.read(i) for i in range(len(store))]) / 255
    assert store.manifest.statistics["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert store.manifest.statistics["std"] == pytest.approx(values.std(), rel=1e-12)
    assert store.manifest.provenance["other_files"] == {".txt": 1}


def test_tars_are_plain_ustar_with_image_and_json(folder, tmp_path):
    store = pack([folder], tmp_path / "out", SMALL, labels="folder")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = tar.getmembers()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.pax_headers) == (0, 0, 0, "", {}) for m in members)
        assert [m.name for m in members[:2]] == ["rods__a-1.tif", "rods__a-1.json"]
        facts = json.load(tar.extractfile("rods__float.json"))
        pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile("rods__float.tif").read())))
    assert facts["scaling"]["method"] == "percentiles" and facts["file"]["dtype"] == "float32"
    assert (facts["key"], facts["label"], facts["group"]) == ("rods__float", "rods", "rods/float.tif")
    np.testing.assert_array_equal(pixels, store.read(2))


def test_webdataset_reads_the_shards(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    store = pack([folder], tmp_path / "out", SMALL)
    shard = str(tmp_path / "out" / "shard-000000.tar")
    for handler, top in [("l", 255), ("l8", 1)]:
        samples = list(webdataset.WebDataset(shard, shardshuffle=False).decode(handler))
        assert [s["__key__"] for s in samples] == store.keys
        for i, sample in enumerate(samples):
            np.testing.assert_allclose(sample["tif"] * np.float32(top), store.read(i), rtol=1e-6)
            assert sample["json"]["key"] == store.keys[i]


def test_same_bytes_from_any_number_of_workers_and_any_place(folder, tmp_path):
    options = PackOptions(tile=32, shard_mb=0.005)
    pack([folder], tmp_path / "one", options, labels="folder")
    pack([folder], tmp_path / "two", options, labels="folder", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(Store.open(tmp_path / "one").manifest.shards) > 2
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "elsewhere")
    pack([tmp_path / "moved" / "elsewhere"], tmp_path / "three", options, labels="folder")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_depth_16_keeps_16_bits_and_reads_them_back(folder, tmp_path):
    store = pack([folder], tmp_path / "out", PackOptions(tile=32, depth=16))
    np.testing.assert_array_equal(store.read(3), image(9, (2, 32, 32), np.uint16)[0])
    np.testing.assert_array_equal(store.read(0), image(2).astype(np.uint16) * 257)
    assert store.dtype == np.uint16 == store.read(2).dtype


def test_normalise_always_scales_8_bits_as_well(tmp_path):
    dim = image(0) // 4 + 60
    Image.fromarray(dim).save(tmp_path / "a.png")
    untouched = pack([tmp_path / "a.png"], tmp_path / "auto", SMALL).read(0)
    scaled = pack([tmp_path / "a.png"], tmp_path / "always", PackOptions(tile=32, normalise="always")).read(0)
    np.testing.assert_array_equal(untouched, dim)
    assert (scaled.min(), scaled.max()) == (0, 255)


def test_one_hot_pixel_does_not_set_the_contrast():
    pixels = image(0, (200, 200), np.uint8).astype(np.float32)
    pixels[0, 0] = 1e9
    scaled, facts = to_depth(pixels, 8, False)
    assert scaled.std() > 60 and scaled[0, 0] == 255 and facts["high"] < 256


@given(
    st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32]),
    st.integers(1, 1200),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_counted_percentiles_are_those_of_numpy(dtype, height, width, seed):
    rng = np.random.default_rng(seed)
    pixels = (rng.normal(size=(height, width)) * rng.choice([3, 30, 3000])).clip(-120, 30000).astype(dtype)
    low, high = _percentiles(pixels)
    expected = np.percentile(pixels, PERCENTILES, method="nearest")
    assert [low.item(), high.item()] == expected.tolist() and low.dtype == expected.dtype == dtype


@given(st.integers(8, 300), st.integers(8, 64), st.integers(0, 63))
def test_tiles_cover_and_spread_evenly(length, tile, overlap):
    if length < tile or overlap >= tile:
        with pytest.raises(ValueError, match="no tiles"):
            tile_starts(length, tile, overlap)
        return
    starts = tile_starts(length, tile, overlap)
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == length - tile
    assert all(step <= tile - overlap for step in steps) and (len(steps) == 0 or np.ptp(steps) <= 1)


def test_small_micrographs_are_set_aside_and_whole_ones_kept_without_tiles(folder, tmp_path):
    Image.fromarray(image(20, (16, 40))).save(folder / "thin.png")
    store = pack([folder], tmp_path / "a", SMALL)
    assert store.manifest.dropped == [{"source": "thin.png", "reason": "smaller than the tile of 32 px"}]
    whole = pack([folder], tmp_path / "b", PackOptions(tile=None))
    assert {(s.height, s.width) for s in whole.samples} == {(32, 32), (32, 64), (16, 40)}
    assert whole.manifest.dropped == []


def test_exact_duplicates_and_flat_micrographs_are_dropped_and_reported(folder, tmp_path):
    Image.fromarray(image(1)).save(folder / "again.png")  # the pixels of wires/b.png
    tifffile.imwrite(folder / "flat.tif", np.full((32, 32), 7, np.uint16))
    store = pack([folder], tmp_path / "out", SMALL, labels="folder")
    reasons = {entry["source"]: entry["reason"] for entry in store.manifest.dropped}
    assert reasons == {
        "flat.tif": "without contrast: every pixel has the same value",
        "wires/b.png": "exact duplicate, which has another label",
    }
    assert len(store) == 8


def test_keys_stay_apart_and_safe(tmp_path):
    names = ["a b.png", "a-b.png", "A+b.png", "..png", "ÜÖ.png", "x" * 200 + ".png", "s__t.png", "s/t.png"]
    for number, name in enumerate(names):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(number)).save(tmp_path / "src" / name, "PNG")
    store = pack([tmp_path / "src"], tmp_path / "out", SMALL)
    # "..png" is hidden.
    assert len(store) == len(names) - 1 == len({key.lower() for key in store.keys})
    assert all(len(key) <= 90 and "." not in key and "/" not in key for key in store.keys)
    assert [s.source for s in store.samples] == sorted(n for n in names if n != "..png")


def test_files_and_several_folders_keep_names_from_their_common_folder(folder, tmp_path):
    store = pack([folder / "wires", folder / "rods" / "a.1.png", folder / "wires" / "b.png"], tmp_path / "out", SMALL)
    assert sorted({s.source for s in store.samples}) == ["rods/a.1.png", "wires/a.1.png", "wires/b.png"]


# Labels and groups from tables.


def table(path, rows, header="file,label,session"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_labels_and_groups_from_a_csv(folder, tmp_path):
    rows = [f"{name},{name[0]},s1" for name in ("wires/a.1.png", "wires/b.png", "rods/a.1.png", "rods/d e.png")]
    inside = table(folder / "meta.csv", [*rows, "rods/stack.tif,r,s2", "rods/float.tif,r,s2", "gone.png,g,s3"])
    store = pack([folder], tmp_path / "a", SMALL, labels=f"{inside}:label", groups=f"{inside}:session")
    assert store.labels == list("rrrrrwww")
    assert store.groups == ["s1", "s1", "s2", "s2", "s2", "s1", "s1", "s1"]
    (tmp_path / "far").mkdir()
    outside = table(tmp_path / "far" / "meta.csv", inside.read_text().splitlines()[1:])
    inside.unlink()
    again = pack([folder], tmp_path / "b", SMALL, labels=f"{outside}:label", groups=f"{outside}:session")
    assert again.manifest_hash == store.manifest_hash


def test_a_name_in_a_csv_that_fits_two_files_is_refused(folder, tmp_path):
    (tmp_path / "far").mkdir()
    spec = f"{table(tmp_path / 'far' / 'meta.csv', ['a.1.png,w,s'])}:label"
    with pytest.raises(UserError, match=r"'a\.1\.png', which fits 2 files"):
        pack([folder], tmp_path / "out", SMALL, labels=spec)


def test_a_row_about_another_folder_does_not_label_its_namesake(folder, tmp_path):
    spec = f"{table(folder / 'meta.csv', ['elsewhere/b.png,x,s'])}:label"
    with pytest.raises(UserError, match="6 of 6 micrographs"):
        pack([folder], tmp_path / "out", SMALL, labels=spec)


def test_unlisted_micrographs(folder, tmp_path):
    spec = f"{table(folder / 'meta.csv', ['wires/b.png,w,s'])}:label"
    with pytest.raises(UserError, match=r"5 of 6 micrographs \(such as rods/a\.1\.png\) have no row"):
        pack([folder], tmp_path / "out", SMALL, labels=spec)
    kept = pack([folder], tmp_path / "kept", SMALL, labels=spec, unlisted="keep")
    assert kept.labels == [None] * 7 + ["w"]
    skipped = pack([folder], tmp_path / "skipped", SMALL, labels=spec, unlisted="skip")
    assert skipped.labels == ["w"] and len(skipped.manifest.dropped) == 5


@pytest.mark.parametrize(
    ("rows", "header", "spec", "words"),
    [
        (
            ["wires/b.png,w,s"],
            "file,label,session",
            "meta.csv:colour",
            "no column 'colour' for --labels; it has: file,",
        ),
        (["wires/b.png,w,s"], "name,label,session", "meta.csv:label", "no column 'file'"),
        (["wires/b.png,w,s", "wires/b.png,v,s"], "file,label,session", "meta.csv:label", "gives two labels"),
        ([], "file,label,session", "gone.csv:label", "does not exist"),
        ([], "file,label,session", "meta.csv", "must be 'folder', 'masks' or FILE.csv:COLUMN"),
    ],
)
def test_tables_that_do_not_fit(folder, tmp_path, rows, header, spec, words):
    table(folder / "meta.csv", rows, header)
    with pytest.raises(UserError, match=words):
        pack([folder], tmp_path / "out", SMALL, labels=str(folder / spec))


# Bad input: one sentence, exit code 2, nothing left behind.


def run_cli(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize("case", ["missing", "empty", "no images", "renamed text", "other format", "all excluded"])
def test_sources_that_are_none(tmp_path, capsys, case):
    source = tmp_path / "src"
    extra: list[str] = []
    if case != "missing":
        source.mkdir()
    if case == "no images":
        (source / "notes.txt").write_text("x")
    if case == "renamed text":
        for number in range(3):
            (source / f"{number}.png").write_text("I am text")
    if case == "other format":
        (source / "a.xyz").write_text("x")
        source = source / "a.xyz"
    if case == "all excluded":
        Image.fromarray(image(0)).save(source / "mask.png")
        extra = ["--exclude", "mask*"]
    words = {
        "missing": "does not exist",
        "empty": "is empty",
        "no images": "holds no micrograph (1 .txt)",
        "renamed text": "0.png is a text file",
        "other format": "is no micrograph that is read",
        "all excluded": "are excluded",
    }[case]
    before = sorted(tmp_path.rglob("*"))
    code, printed = run_cli(capsys, "pack", source, "--out", tmp_path / "deep" / "out", *extra)
    assert code == 2 and words in printed.err and printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_file_stops_or_is_set_aside(folder, tmp_path, capsys):
    (folder / "bad.png").write_text("text")
    (folder / "bad.tif").write_bytes(b"II*\0" + bytes(10))
    code, printed = run_cli(capsys, "pack", folder, "--out", tmp_path / "out", "--tile", 32)
    assert code == 2 and "bad.png" in printed.err and "--skip-bad" in printed.err
    assert nothing_but(tmp_path, "src")
    code, printed = run_cli(capsys, "pack", folder, "--out", tmp_path / "out", "--tile", 32, "--skip-bad")
    assert code == 0 and "set aside 1: the file is a text file" in printed.out
    dropped = Store.open(tmp_path / "out").manifest.dropped
    assert [entry["source"] for entry in dropped] == ["bad.png", "bad.tif"]
    assert str(tmp_path) not in json.dumps(dropped)


def test_skipping_everything_is_an_error_as_well(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "bad.png").write_text("text")
    with pytest.raises(UserError, match="none of the 1 files can be packed"):
        pack([tmp_path / "src"], tmp_path / "out", PackOptions(skip_bad=True))
    Image.fromarray(image(0)).save(tmp_path / "src" / "bad.png")
    with pytest.raises(UserError, match="smaller than the tile of 256 px"):
        pack([tmp_path / "src"], tmp_path / "out", PackOptions())
    assert nothing_but(tmp_path, "src")


def test_an_out_that_is_in_use_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not empty"):
        pack([folder], tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == {"thesis.txt": b"dear"}


def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    import errno

    from nanodist.shards import pieces

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pieces, "_write", full)
    with pytest.raises(UserError, match="the disk is full"):
        pack([folder], tmp_path / "new" / "out", SMALL)
    assert nothing_but(tmp_path, "src")


@pytest.mark.parametrize(
    "values", [{"tile": 4}, {"tile": 32, "overlap": 32}, {"overlap": -1}, {"depth": 12}, {"shard_mb": 0.0}]
)
def test_impossible_options(values):
    with pytest.raises(UserError, match="--"):
        PackOptions(**values)
