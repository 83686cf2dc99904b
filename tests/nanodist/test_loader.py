"""The loader: ranks share one global batch, threads change nothing, and any step can be resumed by any ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc.errors import UserError
from nanodist.shards import Loader, Order, PackOptions, Store, pack


def make_store(folder, count=13, shapes=((16, 16),)):
    (folder / "src").mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, shapes[number % len(shapes)]).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "src" / f"m{number:02d}.png")
    return pack([folder / "src"], folder / "store", PackOptions(tile=None, shard_mb=0.003))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("loader"))


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def together(parts):
    """The parts of all ranks at one step, laid end to end."""
    return (
        np.concatenate([p.epochs for p in parts]).tolist(),
        np.concatenate([p.indices for p in parts]).tolist(),
        [key for p in parts for key in p.keys],
        np.concatenate([p.images for p in parts]),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_laid_end_to_end_are_the_global_batch(store, world_size, workers):
    order = Order(len(store), 5, 8)
    ranks = [take(Loader(store, order, rank, world_size, workers), 5) for rank in range(world_size)]
    for step in range(5):
        epochs, indices, keys, images = together([batches[step] for batches in ranks])
        assert list(zip(epochs, indices, strict=True)) == order.batch(step)
        assert keys == [store.keys[i] for i in indices]
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, np.stack([store.read(i) for i in indices]))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_resume_at_any_step_with_other_ranks_and_workers(store, seed, before, after, stop, workers):
    order = Order(len(store), seed, 12)
    expected = [order.batch(step) for step in range(stop + 2)]
    seen, states = [], []
    loaders = [Loader(store, order, rank, before, workers, read_ahead=3) for rank in range(before)]
    for _ in range(stop):
        seen.append(together([next(loader) for loader in loaders]))
    for loader in loaders:
        states.append(loader.state_dict())
        loader.close()
    assert all(state == {"version": 1, "step": stop} for state in states)
    resumed = [Loader(store, Order(len(store), seed, 12), rank, after) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(states[0])
    seen += [together([next(loader) for loader in resumed]) for _ in range(2)]
    assert [list(zip(epochs, indices, strict=True)) for epochs, indices, _, _ in seen] == expected


def test_start_step_and_loading_state_in_the_middle(store):
    order = Order(len(store), 0, 4)
    with Loader(store, order, 0, 1, workers=2, start_step=3) as loader:
        assert next(loader).step == 3
        loader.load_state_dict({"version": 1, "step": 9})
        batch = next(iter(loader))
        assert batch.step == 9 and batch.indices.tolist() == [i for _, i in order.batch(9)]
        assert batch.wait_seconds > 0


def test_threads_and_processes_end_with_the_loader(store):
    before = threading.active_count()
    loader = Loader(store, Order(len(store), 0, 4), 0, 1, workers=None)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before
    loader = Loader(store, Order(len(store), 0, 4), 0, 1, workers=3)
    next(loader)
    processes = loader._team._workers
    assert len(processes) == 3 and all(process.poll() is None for process in processes)
    loader.close()
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_stops_the_consumer_at_its_own_step(tmp_path, workers):
    store = make_store(tmp_path)
    order = Order(len(store), 1, 4)
    bad = order.batch(2)[1][1]
    sample = store.samples[bad]
    path = store.path / store.manifest.shards[sample.shard].file
    data = bytearray(path.read_bytes())
    data[sample.offset + 50] ^= 1
    path.write_bytes(data)
    with Loader(Store.open(store.path), order, 0, 1, workers) as loader:
        assert [next(loader).step, next(loader).step] == [0, 1]
        for _ in range(2):  # asking again neither skips the step nor hangs
            with pytest.raises(UserError, match=rf"{path.name}, sample {sample.key}"):
                next(loader)
        assert loader.state_dict()["step"] == 2


def test_what_a_loader_refuses(store, tmp_path):
    order = Order(len(store), 0, 12)
    with pytest.raises(UserError, match="12 cannot be shared by 5 ranks; legal world sizes are 1, 2, 3, 4, 6, 12"):
        Loader(store, order, 0, 5)
    with pytest.raises(UserError, match="rank 2 is not in a world of 2"):
        Loader(store, order, 2, 2)
    with pytest.raises(UserError, match="order is over 99 samples"):
        Loader(store, Order(99, 0, 12), 0, 1)
    with pytest.raises(UserError, match="version 7"):
        Loader(store, order, 0, 1).load_state_dict({"version": 7, "step": 0})
    mixed = make_store(tmp_path, shapes=((16, 16), (16, 24)))
    with pytest.raises(UserError, match=r"m00 is 16 x 16, sample m01 is 16 x 24.*pack with --tile"):
        Loader(mixed, Order(len(mixed), 0, 12), 0, 1)


def test_who_leaves_no_time_reads_raw_tiles_itself_and_sees_the_same(tmp_path):
    make_store(tmp_path)
    raw = pack([tmp_path / "src"], tmp_path / "raw", PackOptions(tile=None, encoding="raw"))
    order = Order(len(raw), 0, 4)
    expected = take(Loader(raw, order, 0, 1), 12)
    ahead = []
    with Loader(raw, order, 0, 1, workers=None) as loader:
        for batch in expected:
            team = loader._team
            team._seconds = 0.0 if batch.step < 6 else 1e9  # of the last reading: nothing, or more than any pause
            got = next(loader)
            np.testing.assert_array_equal(got.images, batch.images)
            assert got.keys == batch.keys
            ahead.append(len(loader._ahead))
    assert ahead == [2, 2, 2, 2, 2, 2, 1, 0, 0, 0, 0, 0]
