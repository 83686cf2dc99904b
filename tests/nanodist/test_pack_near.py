"""Near duplicates: told by a hash that bears what copies suffer, put into one group everywhere, never parted."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from nanodist.cli import main
from nanodist.shards import PackOptions, Part, Store, pack, verify
from nanodist.shards.assemble import _regrouped
from nanodist.shards.merge import _growth
from nanodist.shards.near import NEAR_BITS, find_near, near_pairs, perceptual_hash
from nanodist.shards.pieces import json_bytes
from nanodist.shards.tar import member

SMALL = PackOptions(tile=48, shard_mb=0.02)


def scene(seed, side=96):
    """A micrograph of blobs and grain."""
    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.normal(size=(side, side)), 5, mode="wrap")
    return (120 + 40 * blobs / blobs.std() + rng.normal(0, 6, (side, side))).clip(0, 255).astype(np.uint8)


def copies(pixels):
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    yield "jpeg", np.asarray(Image.open(buffer))
    yield "half the size", np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX))
    yield "darker", (pixels * 0.6).astype(np.uint8)
    yield "gamma", (255 * (pixels / 255) ** 0.8).astype(np.uint8)
    yield "16 bit", pixels.astype(np.uint16) * 200
    yield "a pixel further", np.roll(pixels, 1, axis=1)
    yield "noise", pixels + np.random.default_rng(1).normal(0, 5, pixels.shape)


def distance(a, b):
    return (int(a, 16) ^ int(b, 16)).bit_count()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_hash_bears_copies_and_tells_others(seed):
    bits = perceptual_hash(scene(seed))
    assert len(bits) == 64
    for what, copy in copies(scene(seed)):
        assert distance(bits, perceptual_hash(copy)) <= NEAR_BITS, what
    assert min(distance(bits, perceptual_hash(scene(other))) for other in range(10, 40)) > NEAR_BITS + 20


def test_pairs_against_counting_bits_one_by_one():
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, (20, 255), dtype=np.uint8)
    every = np.repeat(centres, 8, axis=0) ^ (rng.random((160, 255)) < 0.1).astype(np.uint8)
    every = every[rng.permutation(160)]
    hashes = [np.packbits(row).tobytes().hex() for row in every]
    expected = [
        (i, k) for i in range(160) for k in range(i + 1, 160) if k >= 50 and (every[i] ^ every[k]).sum() <= NEAR_BITS
    ]
    assert near_pairs(hashes[:50], hashes[50:]) == expected and len(expected) > 100


def flipped(bits, count):
    return f"{int(bits, 16) ^ (2 ** (count + 1) - 2):064x}"


def test_groups_are_joined_in_chains_under_the_first_name():
    a = perceptual_hash(scene(0))
    b, c = flipped(a, 40), flipped(flipped(a, 40), 80)  # c is 40 from b and 40 from a's other side
    far = perceptual_hash(scene(5))
    near = find_near("group", [("old", far)], [("z", a), ("y", far), ("x", b), ("w", c)])
    assert [near.group(name) for name in ("z", "y", "x", "w", "old")] == ["z", "old", "z", "z", "old"]
    dropped = find_near("drop", [("old", far)], [("z", a), ("y", far), ("x", b)]).of
    assert dropped == {1: 0, 2: 1}
    assert find_near("keep", [], [("z", a), ("x", a)]).group_of == {}


def test_what_is_near_to_a_dropped_one_alone_stays():
    a = perceptual_hash(scene(0))
    b = flipped(a, 40)
    c = f"{int(b, 16) ^ ((2**40 - 1) << 100):064x}"  # 40 from b, 80 from a
    assert find_near("drop", [], [("a", a), ("b", b), ("c", c)]).of == {1: 0}
    assert find_near("group", [], [("a", a), ("b", b), ("c", c)]).group_of == {"b": "a", "c": "a"}


@pytest.fixture
def folder(tmp_path):
    """Eight scenes of two labels; of three of them a darker copy, with a long name and with a short one."""
    source = tmp_path / "src"
    for number in range(8):
        path = source / ("a", "b")[number % 2] / f"scene{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number)).save(path)
    for number, name in ((0, "a/z-a-much-longer-name-than-the-first-one-has-é.png"), (1, "b/z.png"), (4, "b/y.png")):
        Image.fromarray((scene(number) * 0.8).astype(np.uint8)).save(source / name)
    return source


def in_shards(store):
    found = {}
    for shard in store.manifest.shards:
        with tarfile.open(store.path / shard.file) as tar:
            found |= {m.name[:-5]: json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")}
    return found


def group_of(store):
    return dict(zip((s.source for s in store.samples), store.groups, strict=True))


def test_one_group_in_the_index_and_in_the_shards(folder, tmp_path, capsys):
    assert main(["pack", str(folder), "--out", str(tmp_path / "store"), "--tile", "48", "--shard-mb", "0.02"]) == 0
    assert "near duplicates: 3 groups became part of 3 others" in capsys.readouterr().out
    store = Store.open(tmp_path / "store")
    groups = group_of(store)
    long = next(name for name in groups if "longer" in name)
    assert groups[long] == "a/scene0.png" and groups["b/z.png"] == "b/scene1.png"
    assert len(set(groups.values())) == 8 and len(groups) == 11 and len(store.manifest.shards) > 3
    shards = in_shards(store)
    assert {s.key: s.group for s in store.samples} == {key: facts["group"] for key, facts in shards.items()}
    assert all(facts["perceptual_hash"] for facts in shards.values())
    assert verify(store.path) == []
    assert store.manifest.statistics["near_duplicates"]["a/scene0.png"] == [long]
    kept = pack([folder], tmp_path / "keep", PackOptions(tile=48, near_duplicates="keep"))
    assert len(set(group_of(kept).values())) == 11 and "perceptual_hash" not in next(iter(in_shards(kept).values()))


def test_the_planned_length_is_that_of_the_json_with_another_group():
    """For every length of the JSON within two blocks: the offsets of all samples that follow hang on it."""
    for length in range(1, 1100, 7):
        old = "ö" * (length // 2) + "x" * (length % 2)
        for new in ("g", 'with "quotes"', "y" * 600):
            text = json_bytes({"key": "k", "group": old, "label": None})
            members = member("k.tif", b"pixels") + member("k.json", text)
            moved = _regrouped(members, len(text), new)
            assert len(moved) == len(members) + _growth(len(text), old, new)
            with tarfile.open(fileobj=io.BytesIO(moved + bytes(1024))) as tar:
                assert tar.extractfile("k.tif").read() == b"pixels"
                assert json.load(tar.extractfile("k.json")) == {"key": "k", "group": new, "label": None}


def test_dropping_them_is_said(folder, tmp_path):
    store = pack([folder], tmp_path / "store", PackOptions(tile=48, near_duplicates="drop"))
    assert len({s.source for s in store.samples}) == 8
    assert [(e["source"], e["reason"], e["of"]) for e in store.manifest.dropped if "-" not in e["source"]] == [
        ("b/y.png", "near duplicate", "a/scene4.png"),
        ("b/z.png", "near duplicate", "b/scene1.png"),
    ]


def test_no_split_parts_them(folder, tmp_path):
    for seed in range(4):
        parts = [
            pack([folder], tmp_path / f"{name}{seed}", SMALL, labels="folder", part=Part(name, 0.5, seed))
            for name in ("train", "test")
        ]
        sides = [set(group_of(part).values()) for part in parts]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8
        assert len(group_of(parts[0])) + len(group_of(parts[1])) == 11


def test_a_store_that_grows_puts_new_copies_to_the_old_ones(folder, tmp_path):
    store = pack([folder], tmp_path / "store", SMALL)
    new = tmp_path / "src2" / "new"
    new.mkdir(parents=True)
    Image.fromarray((scene(2) * 0.7).astype(np.uint8)).save(new / "copy2.png")
    Image.fromarray(scene(50)).save(new / "fresh.png")
    grown = pack([tmp_path / "src2"], store.path, SMALL, append=True)
    groups = group_of(grown)
    assert groups["new/copy2.png"] == "a/scene2.png"
    shards = in_shards(grown)
    assert {s.key: s.group for s in grown.samples} == {key: facts["group"] for key, facts in shards.items()}
    assert verify(grown.path) == []
    near = grown.manifest.statistics["near_duplicates"]
    assert len(near) == 4 and sum(map(len, near.values())) == 4


def test_two_old_groups_that_a_new_micrograph_brings_together(tmp_path):
    """The index joins them; the shards of before stay as they are."""
    rng = np.random.default_rng(3)
    first = scene(0).astype(float)
    other = gaussian_filter(rng.normal(size=(96, 96)), 5, mode="wrap")
    blends = [first + weight * 14 * other / other.std() for weight in (-1, 0, 1)]
    bits = [perceptual_hash(b.clip(0, 255).astype(np.uint8)) for b in blends]
    assert distance(bits[0], bits[2]) > NEAR_BITS >= max(distance(bits[0], bits[1]), distance(bits[1], bits[2]))
    for name, picture in zip(("a", "between", "b"), blends, strict=True):
        (tmp_path / ("new" if name == "between" else "old")).mkdir(exist_ok=True)
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        image.save(tmp_path / ("new" if name == "between" else "old") / f"{name}.png")
    store = pack([tmp_path / "old"], tmp_path / "store", SMALL)
    assert set(store.groups) == {"a.png", "b.png"}
    grown = pack([tmp_path / "new"], store.path, SMALL, append=True)
    assert set(grown.groups) == {"a.png"} and grown.manifest.statistics["groups"] == 1
    assert grown.manifest.shards[: len(store.manifest.shards)] == store.manifest.shards
