"""For any store, seed, batch, ranks, workers, window and resume: each sample once an epoch, in one global order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc.errors import UserError
from nanodist.decoding import reading
from nanodist.shards import Loader, Mixture, Order, PackOptions, Store, make_order, pack, verify
from nanodist.shards.order import MixedOrder, Window, shares
from nanodist.shards.splits import split
from nanodist.shards.windows import window_of
from tests.e2e import corruptions

SAMPLES = 90


def make(folder, count=SAMPLES, seed=0, **options):
    for i in range(count):
        (folder / "src" / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng((seed, i)).integers(0, 255, (16, 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "src" / f"c{i % 3}" / f"m{i:03d}.png")
    return pack([folder / "src"], folder / "store", PackOptions(tile=None, shard_mb=0.02, **options), labels="folder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("properties"))


@st.composite
def runs(draw):
    """A part of the store, a batch, ranks before and after a resume, and a window of blocks or none."""
    before = draw(st.integers(1, 16))
    after = draw(st.integers(1, 16))
    batch = draw(st.sampled_from([n for n in range(1, 64) if n % before == 0 and n % after == 0] or [before]))
    after = after if batch % after == 0 else 1
    total = draw(st.integers(batch, SAMPLES))
    cuts = draw(st.lists(st.integers(1, max(1, total - 1)), unique=True, max_size=12))
    window = draw(st.one_of(st.none(), st.integers(1, 80)))
    steps = draw(st.integers(1, 6))
    stop = draw(st.integers(0, steps))
    return before, after, batch, total, sorted(c for c in cuts if c < total), window, steps, stop


def check(whole, run, seed, workers):
    before, after, batch, total, cuts, window, steps, stop = run
    numbers = np.random.default_rng(seed).permutation(SAMPLES)[:total]
    store = whole.subset(np.sort(numbers))
    laid = Window(np.asarray([0, *cuts, total]), window) if window else None

    def batches(ranks, count, start, workers):
        order = Order(total, seed, batch, laid)
        loaders = [Loader(store, order, rank, ranks, workers, start_step=start) for rank in range(ranks)]
        try:
            made = []
            for _ in range(count):
                parts = [next(loader) for loader in loaders]
                pairs = [(int(e), int(i)) for p in parts for e, i in zip(p.epochs, p.indices, strict=True)]
                made.append(pairs)
                for part in parts[:2]:
                    assert part.keys == [store.keys[int(i)] for i in part.indices]
                    np.testing.assert_array_equal(part.images[-1], store.read(int(part.indices[-1])))
            assert all(loader.state_dict() == {"version": 1, "step": start + count} for loader in loaders)
            return made
        finally:
            for loader in loaders:
                loader.close()

    seen = batches(before, stop, 0, workers) + batches(after, steps - stop, stop, 0)
    assert seen == [Order(total, seed, batch, laid).batch(step) for step in range(steps)]
    flat = [pair for entries in seen for pair in entries]
    assert len(set(flat)) == len(flat) and all(len({i for _, i in entries}) == batch for entries in seen)
    for epoch in range(len(flat) // total):
        assert sorted(i for e, i in flat if e == epoch) == list(range(total))


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(0, 2**31))
def test_one_global_order_on_any_ranks_and_over_a_resume(whole, run, seed):
    check(whole, run, seed, 0)


@settings(max_examples=3, deadline=None)
@given(runs().filter(lambda run: run[0] <= 2 and run[-1] > 0), st.integers(0, 2**31), st.integers(1, 4))
def test_the_same_in_processes(whole, run, seed, workers):
    check(whole, run, seed, workers)


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(0, 2**31), st.integers(0, 9))
def test_orders_in_windows_are_permutations_however_they_are_asked_for(run, seed, epoch):
    _, _, batch, total, cuts, window, _, _ = run
    laid = Window(np.asarray([0, *cuts, total]), window or 10)
    order = Order(total, seed, batch, laid)
    assert sorted(order.epoch(epoch).tolist()) == list(range(total))
    assert order.epoch(epoch).tolist() == Order(total, seed, batch, laid).epoch(epoch).tolist()


def test_blocks_are_read_once_by_one_rank(tmp_path, monkeypatch):
    """With blocks of 4 KiB: what all ranks read is little more than what they use, and pixels are those of files."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4096)
    store = make(tmp_path, 480, encoding="raw")
    window = Window(store.blocks.first, 120)
    assert (store.blocks.length >= 4096).all() and store.blocks.first[-1] == 480
    stored = sum(shard.bytes for shard in store.manifest.shards)
    assert window_of(store, 0) is None and window_of(store, 2) is None  # it fits
    read = used = 0
    for rank in range(4):
        fresh = Store.open(store.path)
        with Loader(fresh, Order(480, 3, 8, window), rank, 4, cache_mb=64) as loader:
            assert loader.in_blocks
            for _ in range(60):
                batch = next(loader)
                np.testing.assert_array_equal(batch.images[0], store.read(int(batch.indices[0])))
            traffic = loader.source.files.traffic
        assert traffic.smallest_read >= 4096
        read, used = read + traffic.bytes_read, used + traffic.bytes_used
    assert used == 480 * (16 * 16 + len(b"P5\n16 16\n255\n"))
    # Tiles this small are mostly tar headers; a block at the edge of a lane is read by two ranks.
    assert read < 1.3 * stored
    with Loader(Store.open(store.path), Order(480, 3, 8, window), 0, 1, cache_mb=0) as loader:
        assert not loader.in_blocks


def test_mixed_stores_keep_their_own_epochs(tmp_path):
    stores = [make(tmp_path / "a", 30, 1), make(tmp_path / "b", 50, 2, encoding="raw")]
    mix = Mixture(stores, [1, 3])
    order = make_order(mix, 7, 16)
    assert isinstance(order, MixedOrder) and [o.global_batch_size for o in order.orders] == [4, 12]
    seen = [[], []]
    for step in range(40):
        epochs, indices = order.arrays(step)
        assert len(set(indices.tolist())) == 16
        for half in (slice(0, 8), slice(8, 16)):  # ranks get their share of each store
            assert (indices[half] < 30).sum() == 2
        for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
            seen[int(index >= 30)].append((epoch, index))
    for pairs, low, high in ((seen[0], 0, 30), (seen[1], 30, 80)):
        for epoch in range(len(pairs) // (high - low)):
            assert sorted(i for e, i in pairs if e == epoch) == list(range(low, high))
    with Loader(mix, order, 1, 2) as loader:
        for _ in range(5):
            batch = next(loader)
            for key, index, image in zip(batch.keys, batch.indices.tolist(), batch.images, strict=True):
                store, number = (0, index) if index < 30 else (1, index - 30)
                assert key == f"{store}_{stores[store].keys[number]}"
                np.testing.assert_array_equal(image, stores[store].read(number))
    assert len(mix.keys) == 80 and list(mix.keys)[31] == mix.keys[31] and mix.range_of(31) == (30, 80)
    pixels = [np.stack([s.read(i) for i in range(len(s))]) / 255 for s in stores]
    assert mix.statistics["mean"] == pytest.approx(0.25 * pixels[0].mean() + 0.75 * pixels[1].mean())
    assert Mixture(stores, [1, 2]).manifest_hash != mix.manifest_hash
    assert order.steps_of(31, 5)[0] in range(40) and shares([0.7, 0.3], 64) == [45, 19]
    with pytest.raises(UserError, match="30 samples and is to fill 60 of the 64"):
        make_order(Mixture(stores, [15, 1]), 0, 64)
    with pytest.raises(UserError, match="each must be more than 0"):
        Mixture(stores, [1, -1])


def test_a_split_parts_no_group_and_is_a_store(whole):
    parts = split(whole, 0.3)
    train, test = whole.subset(parts["train"]), whole.subset(parts["test"])
    assert len(train) + len(test) == SAMPLES and not set(train.groups) & set(test.groups)
    assert {label: test.labels.count(label) for label in set(test.labels)} == {"c0": 9, "c1": 9, "c2": 9}
    assert len({whole.manifest_hash, train.manifest_hash, test.manifest_hash}) == 3
    assert len(test.group_names) == 27


def test_replacement_is_the_same_on_any_ranks_and_counted(tmp_path):
    store = make(tmp_path, 24)
    order = Order(24, 1, 8)
    bad = [order.batch(1)[3][1], order.batch(1)[6][1]]
    for number in bad:
        sample = store.samples[number]
        path = store.path / store.manifest.shards[sample.shard].file
        data = bytearray(path.read_bytes())
        data[sample.offset + sample.size // 2] ^= 4
        path.write_bytes(data)
    seen = []
    for ranks, workers in ((1, 0), (2, 0), (4, None), (2, 2)):
        loaders = [Loader(Store.open(store.path), order, r, ranks, workers, corrupt="replace") for r in range(ranks)]
        batches = [[next(loader) for loader in loaders] for _ in range(6)]
        seen.append([[key for part in parts for key in part.keys] for parts in batches])
        replaced = [entry for loader in loaders for entry in loader.replaced]
        assert {store.keys[i] for i in bad} == {key for key, _, _ in replaced} and len(replaced) == 4
        for parts in batches:
            for part in parts:
                np.testing.assert_array_equal(part.images, np.stack([store.read(int(i)) for i in part.indices]))
        for loader in loaders:
            loader.close()
    assert all(keys == seen[0] for keys in seen)
    assert all(len(set(keys)) == 8 for keys in seen[0])
    assert not {store.keys[i] for i in bad} & {key for keys in seen[0] for key in keys}


def test_random_corruptions_are_all_found():
    """The short form of ``python -m tests.e2e.corruptions``."""
    result = corruptions.run(24, seed=5)
    assert result["missed"] == [] and result["payload"] >= 12
    assert result["verify"] == result["loader"] == result["replace"] == 24


def test_a_killed_worker_is_told_and_verify_is_clean(whole):
    assert verify(whole.path) == []
    with Loader(whole, Order(SAMPLES, 0, 10), 0, 1, workers=2) as loader:
        while not all(loader._team._ready):
            next(loader)
        for _ in range(3):
            next(loader)
        loader._team._workers[1].kill()
        with pytest.raises(UserError, match="a loader process ended with code -9"):
            for _ in range(9):
                next(loader)
