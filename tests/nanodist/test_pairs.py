"""pack --pairs: what goes in comes out on one grid, bytes depend on the pairs alone, bad input is one sentence."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.pairvae.pairs import PairStore
from nanodist.scattering import Geometry, QGrid, compressed, read_frame, regrid
from nanodist.shards.pair_pack import PairOptions, pack_pairs
from nanodist.shards.store import Store
from nanodist.synth.pairs import write_frame, write_sem

GEOMETRY = Geometry(2000.0, (30.0, 28.5), (0.5, 0.5), 0.1)
OPTIONS = PairOptions(grid_size=32)


def counts(seed, level=50):
    """A frame of 61 x 58 pixels whose level grows to the right, with a gap of sentinels."""
    rng = np.random.default_rng(seed)
    values = rng.poisson(level + np.arange(58)[None, :] * np.ones((61, 1))).astype(np.int32)
    values[40:44] = -1
    return values


def write_table(folder, rows, columns=("saxs", "sem", "sample")):
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return folder / "pairs.csv"


@pytest.fixture
def pairs(tmp_path):
    """Three patterns and four images of three specimens."""
    folder = tmp_path / "src"
    (folder / "saxs").mkdir(parents=True)
    (folder / "sem").mkdir()
    for number in range(3):
        write_frame(folder / "saxs" / f"p{number}.tif", counts(number, 40 + 20 * number), GEOMETRY)
    for number in range(4):
        image = np.random.default_rng(9 + number).integers(0, 256, (40 + number, 50)).astype(np.uint8)
        write_sem(folder / "sem" / f"i{number}.tif", image, 2.0 + number)
    rows = [
        ["saxs/p1.tif", "sem/i1.tif", "film B"],
        ["saxs/p0.tif", "sem/i0.tif", "film A"],
        ["saxs/p2.tif", "sem/i2.tif", "film/C"],
        ["saxs/p1.tif", "sem/i3.tif", "film B"],
    ]
    return write_table(folder, rows)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def said(arguments, capsys):
    """Exit code 2, nothing made, and what was said, one sentence."""
    assert main(["pack", *map(str, arguments)]) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("nanodist pack: error: ") and "\n" not in text
    return text


def test_what_went_in_comes_out(pairs, tmp_path):
    manifest, unused = pack_pairs(pairs, tmp_path / "st", OPTIONS)
    store = PairStore.open(tmp_path / "st")
    assert store.keys == ("film-B--0", "film-B--1", "film-A", "film-C")  # specimens together, as they first come
    assert store.samples == ("film B", "film B", "film A", "film/C")
    assert not unused and store.manifest_hash == manifest.content_hash
    frame = read_frame(pairs.parent / "saxs" / "p0.tif")
    expected, found = regrid(frame, store.grid), store.pattern(2)
    np.testing.assert_array_equal(found.intensity, expected.intensity)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.kind == "counts" and found.sigma is None and not found.mask.all()
    assert (found.intensity[~found.mask] == 0).all()
    np.testing.assert_array_equal(store.pattern(0).intensity, store.pattern(1).intensity)
    pixels, size = store.micrograph(1)
    np.testing.assert_array_equal(pixels, tifffile.imread(pairs.parent / "sem" / "i3.tif"))
    assert size == pytest.approx((5.0, 5.0)) and pixels.dtype == np.uint8
    assert store.truth(0) == {}
    facts = store.facts(2)
    assert facts["saxs"]["geometry"]["distance_mm"] == pytest.approx(2000) and facts["sem"]["source"] == "sem/i0.tif"
    assert facts["saxs"]["corrections"]["dark"] == "not done"


def test_grid_and_reference_come_from_the_patterns(pairs, tmp_path):
    manifest, _ = pack_pairs(pairs, tmp_path / "st", OPTIONS)
    store = PairStore.open(tmp_path / "st")
    q_y, q_x = read_frame(pairs.parent / "saxs" / "p0.tif").q()
    reach = min(np.abs(q_y).max(), np.abs(q_x).max())
    assert 0.99 * reach < store.grid.q_max_inv_nm <= reach
    middles = [np.median(store.pattern(i).intensity[store.pattern(i).mask]) for i in range(4)]
    assert store.reference == pytest.approx(np.median(middles))
    assert compressed(np.float32(store.reference), store.reference) == pytest.approx(np.arcsinh(1))
    fixed, _ = pack_pairs(pairs, tmp_path / "fixed", PairOptions(grid_size=16, q_max_inv_nm=0.2))
    assert fixed.grid == QGrid(16, 0.2) and fixed.content_hash != manifest.content_hash


def test_bytes_depend_on_the_pairs_alone(pairs, tmp_path):
    pack_pairs(pairs, tmp_path / "a", PairOptions(grid_size=32, shard_mb=0.01))
    pack_pairs(pairs, tmp_path / "b", PairOptions(grid_size=32, shard_mb=0.01), workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 5  # a shard for each item
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "src"]


def test_shards_are_plain_tars_that_webdataset_reads(pairs, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pack_pairs(pairs, tmp_path / "st", OPTIONS)
    shard = tmp_path / "st" / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        assert all((m.mtime, m.uid, m.pax_headers) == (0, 0, {}) for m in tar.getmembers())
        assert np.load(io.BytesIO(tar.extractfile("film-A.saxs.npy").read())).shape == (1, 32, 32)
    assert names[:3] == ["film-B--0.saxs.npy", "film-B--0.sem.png", "film-B--0.json"]
    items = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("l8"))
    store = PairStore.open(tmp_path / "st")
    assert [item["__key__"] for item in items] == list(store.keys)
    np.testing.assert_array_equal(np.asarray(items[3]["sem.png"]), store.micrograph(3)[0])
    assert np.isnan(items[3]["saxs.npy"]).any() and items[3]["json"]["sample"] == "film/C"


def test_a_store_goes_to_another_process(pairs, tmp_path):
    pack_pairs(pairs, tmp_path / "st", OPTIONS)
    store = pickle.loads(pickle.dumps(PairStore.open(tmp_path / "st")))
    assert store.pattern(0) is not None and len(store) == 4


def test_halves_are_legal_where_they_are_asked_for(pairs, tmp_path, capsys):
    rows = [["saxs/p0.tif", "sem/i0.tif", "a"], ["", "sem/i1.tif", "b"], ["saxs/p1.tif", "", "c"]]
    table = write_table(pairs.parent, rows)
    text = said(["--pairs", table, "--out", tmp_path / "st"], capsys)
    assert "line 3" in text and "sample 'b' has an SEM image without a pattern" in text and "--unpaired keep" in text
    assert not (tmp_path / "st").exists()
    pack_pairs(table, tmp_path / "kept", PairOptions(grid_size=32, unpaired="keep"))
    store = PairStore.open(tmp_path / "kept")
    assert [store.pattern(i) is None for i in range(3)] == [False, True, False]
    assert [store.micrograph(i) is None for i in range(3)] == [False, False, True]
    skipped, _ = pack_pairs(table, tmp_path / "skipped", PairOptions(grid_size=32, unpaired="skip"))
    assert [item.key for item in skipped.items] == ["a"] and len(skipped.dropped) == 2
    assert main(["verify", str(tmp_path / "kept")]) == 0


def test_reduced_data_keep_their_sign_and_their_sigma(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 1.0, (48, 48)).astype(np.float32)
    sigma = np.full((48, 48), 1.5, np.float32)
    tifffile.imwrite(tmp_path / "r.tif", values)
    tifffile.imwrite(tmp_path / "s.tif", sigma)
    write_sem(tmp_path / "i.tif", rng.integers(0, 255, (32, 32)).astype(np.uint8), 1.0)
    known = (
        "distance_mm",
        "beam_row_px",
        "beam_column_px",
        "detector_pixel_y_mm",
        "detector_pixel_x_mm",
        "wavelength_nm",
    )
    row = ["r.tif", "i.tif", "a", "s.tif", "reduced", 2000, 23.5, 23.5, 0.5, 0.5, 0.1, "note"]
    table = write_table(tmp_path, [row], ("saxs", "sem", "sample", "sigma", "kind", *known, "remark"))
    _, unused = pack_pairs(table, tmp_path / "st", PairOptions(grid_size=24))
    assert unused == ["remark"]
    pattern = PairStore.open(tmp_path / "st").pattern(0)
    assert pattern.kind == "reduced" and (pattern.intensity < 0).any()
    assert (pattern.sigma[pattern.mask] > 0).all() and pattern.sigma.max() <= 1.5


def test_an_information_bar_is_cut_and_a_pixel_size_given(pairs, tmp_path):
    image = np.random.default_rng(1).integers(60, 200, (220, 200)).astype(np.uint8)
    image[190:] = 0
    image[200:208, 20:80] = 255
    Image.fromarray(image).save(pairs.parent / "sem" / "bar.png")
    table = write_table(
        pairs.parent, [["saxs/p0.tif", "sem/bar.png", "a", "3.5"]], ("saxs", "sem", "sample", "pixel_size_nm")
    )
    pack_pairs(table, tmp_path / "st", PairOptions(grid_size=32, bars="cut"))
    pixels, size = PairStore.open(tmp_path / "st").micrograph(0)
    assert pixels.shape[0] <= 191 and size == (3.5, 3.5)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["saxs/none.tif", "sem/i0.tif", "a"], "line 2: saxs is 'saxs/none.tif', and there is no file"),
        (["saxs/p0.tif", "sem/none.tif", "a"], "line 2: sem is 'sem/none.tif', and there is no file"),
        (["saxs/p0.tif", "", "a"], "sample 'a' has a pattern without an SEM image"),
        (["saxs/p0.tif", "sem/i0.tif", ""], "line 2 names no sample"),
        (["", "", "a"], "neither a pattern nor an SEM image"),
        (["saxs/bare.tif", "sem/i0.tif", "a"], "has no geometry"),
        (["saxs/gisaxs_p0.tif", "sem/i0.tif", "a"], "grazing incidence"),
        (["saxs/masked.tif", "sem/i0.tif", "a"], "no measured pixel"),
        (["saxs/p0.tif", "sem/unknown.png", "a"], "states no pixel size"),
        (["saxs/p0.tif", "sem/flat.tif", "a"], "without contrast"),
        (["saxs/picture.jpg", "sem/i0.tif", "a"], "is a picture"),
    ],
)
def test_bad_input_is_one_sentence(row, words, pairs, tmp_path, capsys):
    folder = pairs.parent
    tifffile.imwrite(folder / "saxs" / "bare.tif", counts(0))
    write_frame(folder / "saxs" / "gisaxs_p0.tif", counts(0), GEOMETRY)
    write_frame(folder / "saxs" / "masked.tif", np.full((61, 58), -1, np.int32), GEOMETRY)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "saxs" / "picture.jpg")
    Image.fromarray(np.eye(30, dtype=np.uint8) * 200).save(folder / "sem" / "unknown.png")
    write_sem(folder / "sem" / "flat.tif", np.full((30, 30), 7, np.uint8), 1.0)
    table = write_table(folder, [row, ["saxs/p1.tif", "sem/i1.tif", "b"]])
    assert words in said(["--pairs", table, "--out", tmp_path / "st", "--grid-size", "32"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    if row[0] and row[1] and row[2] and "none" not in row[0] + row[1]:
        manifest, _ = pack_pairs(table, tmp_path / "st", PairOptions(grid_size=32, skip_bad=True))
        assert [item.key for item in manifest.items] == ["b"] and words in manifest.dropped[0]["reason"]


def test_tables_that_contradict_themselves_are_refused(pairs, tmp_path):
    folder, out = pairs.parent, tmp_path / "st"
    for rows, columns, words in (
        ([["saxs/p0.tif", "sem/i0.tif", "a"]] * 2, ("saxs", "sem", "sample"), "line 3 is the same pair as line 2"),
        (
            [["saxs/p0.tif", "sem/i0.tif", "a"], ["saxs/p0.tif", "sem/i1.tif", "b"]],
            ("saxs", "sem", "sample"),
            "a split would part it",
        ),
        ([], ("saxs", "sem", "sample"), "lists no pair"),
        ([["saxs/p0.tif", "sem/i0.tif"]], ("saxs", "sem"), "has no column sample"),
        ([["saxs/p0.tif", "sem/i0.tif", "a", "far"]], ("saxs", "sem", "sample", "distance_mm"), "must be a number"),
        ([["saxs/p0.tif", "sem/i0.tif", "a", "3"]], ("saxs", "sem", "sample", "beam_row_px"), "state both"),
        ([["saxs/p0.tif", "sem/i0.tif", "a", "wet"]], ("saxs", "sem", "sample", "setup"), "must be one of"),
    ):
        with pytest.raises(UserError, match=words):
            pack_pairs(write_table(folder, rows, columns), out, OPTIONS)
    with pytest.raises(UserError, match="does not exist"):
        pack_pairs(folder / "none.csv", out, OPTIONS)
    tifffile.imwrite(
        folder / "saxs" / "reduced.tif", np.random.default_rng(0).normal(0, 1, (61, 58)).astype(np.float32)
    )
    numbers = (
        "distance_mm",
        "beam_row_px",
        "beam_column_px",
        "detector_pixel_y_mm",
        "detector_pixel_x_mm",
        "wavelength_nm",
    )
    values = [2000, 30, 28, 0.5, 0.5, 0.1]
    rows = [["saxs/p0.tif", "sem/i0.tif", "a", *values], ["saxs/reduced.tif", "sem/i1.tif", "b", *values]]
    with pytest.raises(UserError, match="no common scale"):
        pack_pairs(write_table(folder, rows, ("saxs", "sem", "sample", *numbers)), out, OPTIONS)
    assert not out.exists()


def test_options_that_do_not_fit_are_refused(pairs, tmp_path, capsys):
    out = ["--out", tmp_path / "st"]
    assert "do not go together" in said([pairs.parent, "--pairs", pairs, *out], capsys)
    assert "--tile and --pairs" in said(["--pairs", pairs, "--tile", "64", *out], capsys)
    assert "is about pairs" in said([pairs.parent, "--grid-size", "64", *out], capsys)
    assert "nothing to pack" in said(out, capsys)
    assert "--grid-size is 4" in said(["--pairs", pairs, "--grid-size", "4", *out], capsys)
    (tmp_path / "st").mkdir()
    (tmp_path / "st" / "x").touch()
    assert "is not empty" in said(["--pairs", pairs, *out], capsys)


def test_inspect_and_verify_know_pairs_and_other_readers_say_what_they_are(pairs, tmp_path, capsys):
    assert main(["pack", "--pairs", str(pairs), "--out", str(tmp_path / "st"), "--grid-size", "32"]) == 0
    assert "4 pairs of 3 specimens" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "st"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "asinh(I / " in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").size[0] > 2 * 2 * 192 - 1
    assert main(["verify", str(tmp_path / "st")]) == 0
    with pytest.raises(UserError, match="store of pairs"):
        Store.open(tmp_path / "st")
    assert main(["pack", str(pairs.parent / "sem"), "--tile", "16", "--out", str(tmp_path / "plain")]) == 0
    with pytest.raises(UserError, match="store of micrographs"):
        PairStore.open(tmp_path / "plain")
    with pytest.raises(UserError, match="does not exist"):
        PairStore.open(tmp_path / "none")


def test_damage_is_named(pairs, tmp_path, capsys):
    pack_pairs(pairs, tmp_path / "st", OPTIONS)
    store, shard = PairStore.open(tmp_path / "st"), tmp_path / "st" / "shard-000000.tar"
    whole = shard.read_bytes()
    place = store.manifest.items[2].saxs.offset + 200
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    damaged = PairStore.open(tmp_path / "st")
    with pytest.raises(UserError, match="item film-A: its bytes are damaged"):
        damaged.pattern(2)
    assert damaged.pattern(0) is not None
    assert main(["verify", str(tmp_path / "st")]) == 1
    out = capsys.readouterr().out
    assert "item film-A" in out and "2 faults" in out
    shard.write_bytes(whole[:-1024])
    with pytest.raises(UserError, match="truncated"):
        PairStore.open(tmp_path / "st")
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        PairStore.open(tmp_path / "st")
    path = tmp_path / "st" / "manifest.json"
    values = json.loads(path.read_text())
    for change in ({"reference": 3.0}, {"schema": 9}, {"items": 3}, {"format": "other"}, {"grid": {"size": 1}}):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=r"manifest\.json"):
            PairStore.open(tmp_path / "st")
