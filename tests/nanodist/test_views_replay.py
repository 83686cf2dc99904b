import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from hpc.errors import UserError
from hpc.seeding import permutation
from nanodist.cli import main
from nanodist.pretrain.recipe import load_recipe
from nanodist.pretrain.task import _check_partners
from nanodist.shards import GroupPartners, Loader, Order, PackOptions, Store, pack
from nanodist.shards.splits import split
from nanodist.shards.store import SampleError
from nanodist.views import make_view
from nanodist.views.replay import replay, steps_of
from nanodist.views.sheet import write_view_sheet

OVERRIDES = ["train.global_batch_size=8", "train.steps=12", "views.size_px=24", "views.crop_px=[20, 30]", "seed=5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("views")
    for group, i in itertools.product(range(7), range(3)):
        (path / "images" / f"g{group}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(10 * group + i).integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(pixels).save(path / "images" / f"g{group}" / f"{i}.png")
    pack([path / "images"], path / "store", PackOptions(tile=32), groups="folder")
    return path


@pytest.fixture
def store(folder):
    return Store.open(folder / "store")


@pytest.mark.parametrize(("positives", "drawn_for"), [("image", "batch"), ("group", "sample")])
def test_a_replay_is_what_training_saw(store, positives, drawn_for):
    recipe = load_recipe("simclr", [*OVERRIDES, f"data.positives={positives}", f"views.drawn_for={drawn_for}"])
    order = Order(len(store), recipe.seed, 8)
    partners = GroupPartners(store, recipe.seed) if positives == "group" else None
    loader = Loader(store, order, 0, 1, partners=partners)
    moved = 0
    for step, batch in enumerate(itertools.islice(loader, 7), 1):
        for i in (0, 7):
            one = replay(store, recipe.views, order, batch.keys[i], step, 12, partners is not None)
            assert (one.step, one.epoch) == (step, batch.epochs[i])
            second = batch.images if batch.partners is None else batch.partners
            for number, images in enumerate((batch.images, second)):
                tiles, epochs = torch.from_numpy(images), batch.epochs.tolist()
                seen = make_view(tiles, recipe.views, recipe.seed, epochs, batch.keys, number, step=batch.step)
                assert np.array_equal(one.views[number], seen[i, 0].numpy())
            moved += not np.array_equal(*one.tiles)
    assert (moved > 0) == (positives == "group")


def test_steps_of_a_sample_are_those_of_the_order(store):
    order = Order(len(store), 5, 8)
    every = [step for step in range(1, 40) if 4 in order.arrays(step - 1)[1]]
    for near in (1, 9, 20):
        expected = sorted(sorted(every, key=lambda s: abs(s - near))[:3])
        assert steps_of(order, 4, near) == expected


def test_what_cannot_be_replayed_is_said(store):
    recipe = load_recipe("simclr", OVERRIDES)
    order = Order(len(store), recipe.seed, 8)
    key = store.keys[4]
    absent = next(step for step in range(2, 12) if 4 not in order.arrays(step - 1)[1])
    steps = [step for step in range(1, 13) if 4 in order.arrays(step - 1)[1]]
    with pytest.raises(UserError, match=f"sample {key} is not in the batch of step {absent}; it is at step") as error:
        replay(store, recipe.views, order, key, absent, 12)
    named = [int(word) for word in str(error.value).split("at step ")[1].split(", ")]
    assert named and set(named) <= set(steps)
    for step in (0, 13):
        with pytest.raises(UserError, match=f"no step {step}; its steps run from 1 to 12"):
            replay(store, recipe.views, order, key, step, 12)
    with pytest.raises(UserError, match="holds no sample 'nobody'; its keys look like"):
        replay(store, recipe.views, order, "nobody", 1, 12)


def test_command(folder, store, tmp_path, capsys):
    order = Order(len(store), 5, 8)
    key, out = store.keys[int(order.arrays(2)[1][3])], tmp_path / "views.png"
    words = ["views", str(folder / "store"), *OVERRIDES, "--sample", key, "--step", "3", "--out", str(out)]
    assert main(words) == 0
    assert f"{key}, step 3, epoch 0" in capsys.readouterr().out
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    recipe = load_recipe("simclr", OVERRIDES)
    one = replay(store, recipe.views, order, key, 3, 12)
    # A view stands in the picture pixel by pixel, enlarged by a whole factor.
    view = (one.views[1] * 255).round().astype(int).repeat(11, 0).repeat(11, 1)
    places = [
        (y, x)
        for y in range(picture.shape[0] - view.shape[0] + 1)
        for x in range(picture.shape[1] - view.shape[1] + 1)
        if picture[y, x, 0] == view[0, 0] and np.array_equal(picture[y, x : x + view.shape[1], 0], view[0])
    ]
    assert any(np.array_equal(picture[y : y + len(view), x : x + len(view), 1], view) for y, x in places)


def test_command_without_a_sample_shows_the_batch(folder, store, tmp_path, capsys):
    words = [
        "views",
        str(folder / "store"),
        *OVERRIDES,
        "--step",
        "2",
        "--count",
        "4",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    expected = [store.keys[i] for i in Order(len(store), 5, 8).arrays(1)[1][:4]]
    assert [line.split(",")[0] for line in said.splitlines()[:4]] == expected


def test_command_shows_the_part_that_was_trained_on(folder, store, tmp_path, capsys):
    words = [
        "views",
        str(folder / "store"),
        *OVERRIDES,
        "data.split=train",
        "--step",
        "1",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main(words) == 0
    part = store.subset(split(store, 0.3)["train"])
    expected = [part.keys[i] for i in Order(len(part), 5, 8).arrays(0)[1][:6]]
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[:6]] == expected


def test_the_sheet_of_a_run_leaves_out_a_damaged_tile(store, tmp_path, monkeypatch):
    """With ``data.corrupt=replace`` it is the loader's to put another in its place."""
    config = load_recipe("simclr", OVERRIDES).views
    write_view_sheet(store, config, 5, tmp_path / "whole.png")
    damaged, read = int(permutation(len(store), 5, "sheet")[2]), store.read

    def broken(i):
        if i == damaged:
            raise SampleError(store.folder, "key", "damaged")
        return read(i)

    monkeypatch.setattr(store, "read", broken)
    write_view_sheet(store, config, 5, tmp_path / "seven.png")
    whole, seven = (Image.open(tmp_path / f"{name}.png").width for name in ("whole", "seven"))
    assert seven * 8 == whole * 7
    with pytest.raises(SampleError):
        write_view_sheet(store, config, 5, tmp_path / "asked.png", [damaged])


def test_partners_of_two_scales_are_not_cut_by_one_pixel_size(store):
    sizes = np.ones((len(store), 2))
    _check_partners(store, sizes)
    sizes[4] = 4.0
    with pytest.raises(UserError, match=r"tiles of one group, such as that of .*, have 1 to 4 nm a pixel"):
        _check_partners(store, sizes)


def test_command_says_what_is_wrong_and_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "views.png"
    for words, said in (
        (["--sample", "nobody"], "holds no sample 'nobody'"),
        (["--step", "13"], "no step 13"),
        (["views.preset=temm"], "preset is 'temm'"),
        (["views.crop_px=null", "views.crop_nm=[20, 30]", "--step", "1"], "has no pixel_size_nm"),
    ):
        assert main(["views", str(folder / "store"), *OVERRIDES, *words, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err and not out.exists()
