"""Interop: our loader reads what webdataset's ShardWriter wrote, and webdataset reads ours."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from hpc.errors import UserError
from nanodist.cli import main
from nanodist.decoding.codec import ENCODINGS, webdataset_decoder
from nanodist.shards import Loader, Order, PackOptions, Store, index_shards, pack, verify


def tile(number, dtype=np.uint8):
    top = 255 if dtype == np.uint8 else 60000
    return np.random.default_rng(number).integers(0, top, (24, 24)).astype(dtype)


def write(folder, count=9, **more):
    """Shards of webdataset's own writer, three samples each, with PAX headers and keys of its users."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(count):
            facts = {"pixel_size_nm": 0.5 if i % 2 else None, "group": f"grid {i // 2}"}
            writer.write({"__key__": f"run 1/Größe{i}", "png": tile(i), "cls": i % 3, "json": facts, **more})
    return folder


def test_a_store_of_shard_writer_is_indexed_read_and_verified(tmp_path, capsys):
    folder = write(tmp_path / "shards")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["index", str(folder)]) == 0
    assert "9 samples of 8 bits in 3 shards, 5 groups, 3 labels; tiles: 24x24 (9)" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in before} == before
    store = Store.open(folder)
    assert store.labels == [str(i % 3) for i in range(9)] and store.groups[:3] == ["grid 0", "grid 0", "grid 1"]
    assert [s.pixel_size_nm for s in store.samples[:2]] == [None, (0.5, 0.5)]
    assert all("." not in key and key.isascii() for key in store.keys) and len(set(store.keys)) == 9
    with Loader(store, Order(9, 0, 9), 0, 1) as loader:
        batch = next(loader)
    for i, image in zip(batch.indices, batch.images, strict=True):
        np.testing.assert_array_equal(image, tile(i))
    pixels = np.stack([tile(i) for i in range(9)]) / 255
    assert store.statistics["mean"] == pytest.approx(pixels.mean()) and store.statistics["std"] == pytest.approx(
        pixels.std()
    )
    assert main(["verify", str(folder)]) == 0


def test_more_shards_later_keep_the_manifest_of_before(tmp_path):
    folder = write(tmp_path / "shards", 3)
    first = index_shards(folder)
    (folder / "part-001.tar").write_bytes((write(tmp_path / "more", 6) / "part-001.tar").read_bytes())
    second = index_shards(folder)
    assert (first.samples, second.samples) == (3, 6)
    old = Store.open(folder, first.content_hash)
    assert len(old) == 3 and len(Store.open(folder)) == 6
    np.testing.assert_array_equal(old.read(2), tile(2))
    with pytest.raises(UserError, match="does not hold the manifest 0000"):
        Store.open(folder, "0000")


def test_a_flipped_bit_of_another_writers_shard_is_found(tmp_path):
    folder = write(tmp_path / "shards")
    index_shards(folder)
    sample = Store.open(folder).samples[4]
    path = folder / "part-001.tar"
    data = bytearray(path.read_bytes())
    data[sample.offset + sample.size // 2] ^= 1
    path.write_bytes(data)
    assert {f.sample for f in verify(folder)} == {"", sample.key}


def test_several_images_a_sample(tmp_path):
    folder = write(tmp_path / "shards", **{"seg.png": tile(99)})
    assert index_shards(folder, "seg.png").samples == 9
    np.testing.assert_array_equal(Store.open(folder).read(3), tile(99))
    assert main(["index", str(folder), "--image", "nothing"]) == 2


def evil(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            if name.startswith("link"):
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
                continue
            buffer = io.BytesIO()
            Image.fromarray(tile(0)).save(buffer, "PNG")
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))


def bomb(path):
    """A PNG of a few bytes that says it is 30000 x 30000 pixels."""
    with tarfile.open(path, "w") as tar:
        data = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0" + bytes(40)
        info = tarfile.TarInfo("a.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def coloured(path):
    with tarfile.open(path, "w") as tar:
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
        info = tarfile.TarInfo("a.png")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: evil(p, "a.png", "../b.png"), r"'\.\./b\.png' points outside the tar"),
        (lambda p: evil(p, "/etc/b.png"), "points outside the tar"),
        (lambda p: evil(p, "link.png"), "is a link or device"),
        (lambda p: evil(p, "a.png", "a.png"), "two members 'a.png' of one sample"),
        (lambda p: evil(p, "a.txt"), "no sample has an image"),
        (bomb, "sample a: it claims 30000 x 30000 pixels"),
        (coloured, "sample a: its pixels are no 8 or 16 bit grey"),
        (lambda p: p.write_bytes(b"no tar at all" * 200), "truncated|damaged tar"),
        (lambda p: (evil(p, "a.png"), p.write_bytes(p.read_bytes()[:700])), "is truncated"),
    ],
)
def test_what_is_refused(tmp_path, make, words):
    make(tmp_path / "x.tar")
    with pytest.raises(UserError, match=words) as error:
        index_shards(tmp_path)
    assert "x.tar" in str(error.value) or "no sample" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_mixed_depths_and_packed_stores_are_refused(tmp_path):
    folder = write(tmp_path / "shards")
    with webdataset.ShardWriter(str(folder / "z-%03d.tar"), verbose=0) as writer:
        buffer = io.BytesIO()
        Image.fromarray(tile(0, np.uint16)).save(buffer, "PNG")
        writer.write({"__key__": "deep", "png": buffer.getvalue()})
    with pytest.raises(UserError, match=r"8 and of 16 bits \(9 and 1\)"):
        index_shards(folder)
    Image.fromarray(tile(0)).save(tmp_path / "a.png")
    store = pack([tmp_path / "a.png"], tmp_path / "store", PackOptions(tile=None))
    with pytest.raises(UserError, match="has its index already"):
        index_shards(store.path)
    with pytest.raises(UserError, match=r"holds no \*\.tar"):
        index_shards(tmp_path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("depth", [8, 16])
def test_webdataset_reads_every_encoding(tmp_path, encoding, depth):
    if (encoding, depth) == ("jpg", 16):
        with pytest.raises(UserError, match="holds 8 bits a pixel"):
            PackOptions(encoding="jpg", depth=16)
        return
    dtype = np.uint8 if depth == 8 else np.uint16
    (tmp_path / "src").mkdir()
    for i in range(4):
        Image.fromarray(tile(i, dtype)).save(tmp_path / "src" / f"a.{i}.png")
    store = pack([tmp_path / "src"], tmp_path / "store", PackOptions(tile=None, encoding=encoding, depth=depth))
    assert verify(store.path) == []
    suffix = store.samples[0].suffix
    shard = str(store.path / store.manifest.shards[0].file)
    plain = list(webdataset.WebDataset(shard, shardshuffle=False).decode(webdataset_decoder))
    assert [sample["__key__"] for sample in plain] == store.keys
    for i, sample in enumerate(plain):
        assert sample[suffix].dtype == dtype and sample["json"]["key"] == store.keys[i]
        np.testing.assert_array_equal(sample[suffix], store.read(i))
        if encoding != "jpg":
            np.testing.assert_array_equal(store.read(i), tile(i, dtype))
    if depth == 8:
        for i, sample in enumerate(webdataset.WebDataset(shard, shardshuffle=False).decode("l")):
            np.testing.assert_allclose(
                sample[suffix] * np.float32(255), store.read(i), atol=1.01 if encoding == "jpg" else 1e-3
            )
    with tarfile.open(shard) as tar:
        assert all(not member.pax_headers for member in tar)
