"""Any ranks, micro-batches and ZeRO stages are the same run, and a comparison that could not fail would be none.

The whole grid, all objectives, 3 and 4 ranks at every stage and with curves, is ``python -m tests.e2e.invariance``.
"""

import pytest

from tests.e2e.invariance import SABOTAGES, STATES, check, holds

OBJECTIVES = ("simclr", "barlow_twins")
CHANNELS = (16, 32, 64, 128)  # a quarter of resnet10t's, which is what takes time


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def rows(folder):
    return check(folder, OBJECTIVES, worlds=(2,), at_one_stage=("barlow_twins",), channels=CHANNELS)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(("objective", "zero"), [("simclr", 0), ("simclr", 1), ("simclr", 2), ("barlow_twins", 1)])
def test_two_ranks_take_the_step_of_one(rows, objective, micro, zero):
    own = [
        r for r in rows if (r["objective"], r["micro"], r["zero"], r["sabotage"]) == (objective, micro, zero, "none")
    ]
    assert sorted(r["step"] for r in own) == sorted(STATES)
    for row in own:
        assert holds(row), row
        assert row["buffers"] < 1e-5, row
        assert row["fall"] >= 0.2, row


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sabotage", SABOTAGES[1:])
def test_a_swapped_sample_and_norm_per_rank_are_seen(rows, objective, sabotage):
    (row,) = [r for r in rows if (r["objective"], r["sabotage"]) == (objective, sabotage)]
    assert not holds(row)
    if sabotage == "norm_per_rank":
        assert row["same_samples"] and row["gradient"] > 1e-2
    else:
        assert not row["same_samples"] and row["views"] > 1e-2 and row["gradient"] > 1e-2


def test_three_ranks_of_four_micro_batches(folder, rows):
    found = check(folder, ("simclr",), worlds=(3,), stages=(1,), micro_batches=(4,), channels=CHANNELS)
    own = [row for row in found if row["ranks"] == 3]
    assert len(own) == len(STATES) < len(rows)
    assert all(holds(row) for row in own), own
