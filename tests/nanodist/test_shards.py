"""Stores: read at random, refused when they are not whole, and every fault found by read and by verify."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.shards import PackOptions, Store, pack, verify
from nanodist.shards.manifest import load_manifest

DATA = Path(os.environ.get("NANODIST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture
def store(tmp_path):
    """Eight samples in several shards."""
    (tmp_path / "src").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "src" / f"m{number}.png")
    return pack([tmp_path / "src"], tmp_path / "store", PackOptions(tile=32, shard_mb=0.008), labels="folder")


def rewrite(path, change):
    """Change a store's manifest after it was written."""
    values = json.loads((path / "manifest.json").read_text())
    change(values)
    (path / "manifest.json").write_text(json.dumps(values))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_samples_point_at_their_bytes(store):
    assert len(store) == 8 and len(store.manifest.shards) > 2
    for i, sample in enumerate(store.samples):
        data = (store.path / store.manifest.shards[sample.shard].file).read_bytes()
        member = data[sample.offset : sample.offset + sample.size]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(member))), store.read(i))
    assert store.samples[-1] == store.samples[7] and store.samples[2:4] == [store.samples[2], store.samples[3]]
    with pytest.raises(IndexError):
        store.samples[8]


def test_a_store_travels_to_another_process_and_reopens(store):
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read(5), store.read(5))
    store.close()
    store.read(5)
    assert copy.manifest_hash == store.manifest_hash and len(store.manifest_hash) == 64


def test_a_flipped_byte_in_a_payload_is_found_by_read_and_verify(store, capsys):
    sample = store.samples[3]
    shard = store.manifest.shards[sample.shard].file
    flip(store.path / shard, sample.offset + sample.size // 2)
    with pytest.raises(UserError, match=rf"{shard}, sample m3: its bytes have xxh3"):
        Store.open(store.path).read(3)
    faults = verify(store.path)
    assert [(f.shard, f.sample) for f in faults] == [(shard, ""), (shard, "m3")]
    assert main(["verify", str(store.path)]) == 1
    assert "sample m3" in capsys.readouterr().out
    np.testing.assert_array_equal(Store.open(store.path).read(2), store.read(2))


def test_every_flipped_byte_of_a_shard_is_found(store):
    """Headers, JSON, padding and pixels alike."""
    path = store.path / store.manifest.shards[0].file
    whole = path.read_bytes()
    for offset in np.linspace(0, len(whole) - 1, 25).astype(int):
        flip(path, offset)
        assert verify(store.path, workers=1), f"byte {offset}"
        path.write_bytes(whole)
    assert verify(store.path) == []


@pytest.mark.parametrize("keep", ["nothing", "a part of a header", "a part of the last sample"])
def test_a_truncated_tar(store, keep):
    path = store.path / store.manifest.shards[1].file
    last = [s for s in store.samples if s.shard == 1][-1]
    length = {"nothing": 0, "a part of a header": 100}.get(keep, last.offset + last.size // 2)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"{path.name} is truncated"):
        Store.open(store.path)
    with pytest.raises(UserError, match="truncated"):
        store.read(store.keys.index(last.key))
    faults = verify(store.path)
    assert {f.shard for f in faults} == {path.name} and any(f.sample for f in faults)


def test_a_missing_tar(store):
    path = store.path / store.manifest.shards[1].file
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing"):
        Store.open(store.path)
    store.close()
    with pytest.raises(UserError, match="the shard is missing"):
        store.read(next(i for i, s in enumerate(store.samples) if s.shard == 1))
    faults = verify(store.path)
    assert [(f.shard, f.fault) for f in faults] == [(path.name, "is missing")]


def test_no_store_at_all(store, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {
        "gone": "does not exist",
        "empty": "is an empty folder",
        "src": "has no manifest.json",
        "file": "is a file",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as error:
            Store.open(tmp_path / name)
        assert name in str(error.value)


def test_manifest_of_another_version_names_both(store):
    rewrite(store.path, lambda values: values.update(schema=99))
    with pytest.raises(UserError, match="schema version 99 and this nanodist reads versions 1 and 2"):
        Store.open(store.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(samples=7), "changed after it was written"),
        (lambda v: v.pop("index"), "lacks index"),
        (lambda v: v["shards"][0].update(file="../../etc/passwd"), "not a plain name inside the store"),
        (lambda v: v["shards"][0].update(file="/etc/passwd"), "not a plain name inside the store"),
        (lambda v: v["index"].update(file="a/b"), "not a plain name inside the store"),
        (lambda v: v["shards"][0].update(extra=1), "damaged"),
        (lambda v: v.update(format="other"), "no manifest of a nanodist store"),
    ],
)
def test_manifests_that_are_not_believed(store, change, words):
    rewrite(store.path, change)
    with pytest.raises(UserError, match=words):
        Store.open(store.path)


def test_damaged_json_and_index(store):
    index = store.path / "index.npz"
    flip(index, index.stat().st_size // 2)
    with pytest.raises(UserError, match=r"index\.npz is damaged"):
        Store.open(store.path)
    index.write_bytes(b"")
    with pytest.raises(UserError, match=r"index\.npz is truncated"):
        Store.open(store.path)
    (store.path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Store.open(store.path)


def test_verify_names_members_that_do_not_belong(store):
    """A tar with a foreign member and a link is reported, and nothing is written anywhere."""
    path = store.path / store.manifest.shards[-1].file
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("../../evil.png"), io.BytesIO())
        link = tarfile.TarInfo("m7.link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    faults = [f.fault for f in verify(store.path)]
    assert any("'../../evil.png' points outside the tar" in fault for fault in faults)
    assert any("m7.link" in fault for fault in faults)


def test_provenance_is_no_part_of_the_hash(store):
    rewrite(store.path, lambda values: values["provenance"].update(nanodist="9.9"))
    assert load_manifest(store.path).content_hash == store.manifest_hash


def test_inspect_prints_a_table_and_draws_a_sheet(store, tmp_path, capsys):
    assert main(["inspect", str(store.path), "--sheet", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    printed = capsys.readouterr().out
    assert "8 of 8 files in 8 groups" in printed and "32x32 (8)" in printed and store.manifest_hash in printed
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] > 128 and sheet[4:36, 4:36].tolist() == store.read(0).tolist()
    assert main(["inspect", str(tmp_path / "gone")]) == 2


def test_verify_of_a_good_store_is_zero(store, capsys):
    assert main(["verify", str(store.path)]) == 0
    assert "0 faults" in capsys.readouterr().out


@pytest.mark.skipif(not (DATA / "tem_virus").is_dir(), reason="needs the real micrographs in NANODIST_DATA")
def test_real_micrographs_with_labels_and_groups(tmp_path):
    source = DATA / "tem_virus" / "Orf"
    meta = DATA / "tem_virus" / "meta.csv"
    store = pack([source], tmp_path / "s", PackOptions(), labels=f"{meta}:label", groups=f"{meta}:micrograph")
    assert len(store) == 22 and set(store.labels) == {"Orf"} and len(set(store.groups)) == 9
    original = np.asarray(Image.open(source / store.samples[0].source))
    np.testing.assert_array_equal(store.read(0), original)
    assert verify(store.path) == []
