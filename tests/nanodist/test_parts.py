import numpy as np
import pytest
from PIL import Image

from hpc.errors import UserError
from nanodist.shards import PackOptions, Part, pack
from nanodist.shards.parts import held_out

LABELS = ["a"] * 30 + ["b"] * 6
GROUPS = [f"a{i // 3}" for i in range(30)] + [f"b{i // 3}" for i in range(6)]


def test_every_label_is_on_both_sides_and_no_group_is():
    test = held_out(LABELS, GROUPS, Part("test", 0.3))
    assert len([g for g in test if g[0] == "a"]) == 3 and len([g for g in test if g[0] == "b"]) == 1
    assert held_out(LABELS[::-1], GROUPS[::-1], Part("train", 0.3)) == test
    assert held_out(LABELS, GROUPS, Part("test", 0.3, seed=1)) != test


def test_what_cannot_be_split_is_named():
    with pytest.raises(UserError, match="label 'c' has the single group 'c0'"):
        held_out([*LABELS, "c"], [*GROUPS, "c0"], Part("test"))
    with pytest.raises(UserError, match=r"1\.5; it must lie between 0 and 1"):
        held_out(LABELS, GROUPS, Part("test", 1.5))


def test_two_stores_are_the_whole_and_share_nothing(tmp_path):
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(5):
            pixels = np.random.default_rng(i + 10 * ord(label)).integers(0, 255, (16, 16)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    stores = [
        pack([tmp_path / "images"], tmp_path / name, PackOptions(tile=16), labels="folder", part=Part(name, 0.4))
        for name in ("train", "test")
    ]
    train, test = (set(store.groups) for store in stores)
    assert len(train) == 6 and len(test) == 4 and not train & test
    assert stores[1].manifest.options["part"] == {"name": "test", "test_share": 0.4, "seed": 0}
