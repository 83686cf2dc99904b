"""The order: exactly once an epoch, no sample twice in a batch, and a pure function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from nanodist.shards import Order

sizes = st.integers(1, 12).flatmap(lambda batch: st.tuples(st.integers(batch, 5 * batch + 3), st.just(batch)))


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(0, 2**31), st.integers(1, 4))
def test_every_sample_once_an_epoch_and_never_twice_in_a_batch(size, seed, epochs):
    total, batch = size
    order = Order(total, seed, batch)
    steps = -(-epochs * total // batch)
    batches = [order.batch(step) for step in range(steps)]
    assert all(len(entries) == batch for entries in batches)
    for entries in batches:
        assert len({index for _, index in entries}) == batch
    flat = [entry for entries in batches for entry in entries][: epochs * total]
    assert [epoch for epoch, _ in flat] == sorted(epoch for epoch, _ in flat)
    for epoch in range(epochs):
        assert sorted(index for e, index in flat if e == epoch) == list(range(total))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**31), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_a_batch_depends_on_nothing_that_was_asked_before(size, seed, steps):
    total, batch = size
    used = Order(total, seed, batch)
    for step in steps:
        assert used.batch(step) == Order(total, seed, batch).batch(step)


def test_boundary_conflicts_do_occur_and_change_only_what_they_must():
    """Without the exchange some batches would hold a sample twice; with it, order and draw agree but for those."""
    order, changed = Order(40, 3, 12), 0
    for epoch in range(1, 60):
        drawn = Order(40, 3, 40)._drawn(epoch)
        made = order.epoch(epoch)
        tail = (epoch * 40) % 12
        before = order.epoch(epoch - 1)[40 - tail :] if tail else []
        conflicts = np.isin(drawn[: 12 - tail], before).sum() if tail else 0
        assert (made != drawn).sum() == 2 * conflicts
        assert (made[12:] == drawn[12:]).all()
        changed += int(conflicts)
    assert changed > 5


def test_seeds_and_epochs_give_other_orders_and_arrays_are_protected():
    order = Order(100, 0, 10)
    assert order.epoch(0).tolist() != Order(100, 1, 10).epoch(0).tolist()
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    with pytest.raises(ValueError, match="read-only"):
        order.epoch(0)[0] = 1


def test_the_order_of_a_seed_is_pinned():
    """Changing these numbers breaks every run that was begun: it needs a new version of the store's order."""
    assert Order(10, 7, 4).batch(2) == PINNED


PINNED = [(0, 3), (0, 2), (1, 8), (1, 4)]


def test_far_steps_are_as_cheap_as_near_ones():
    order = Order(1000, 0, 64)
    assert order.batch(10**9)[0][0] == 64 * 10**9 // 1000


def test_fewer_samples_than_a_batch():
    with pytest.raises(UserError, match="7 samples, fewer than global_batch_size 8"):
        Order(7, 0, 8)
    with pytest.raises(UserError, match="at least 1"):
        Order(7, 0, 0)
