"""Any ranks, micro-batches and ZeRO stages are the same run, and a comparison that could not fail would be none.

The whole grid, with VICReg, 3 and 4 ranks at every stage and with curves, is ``python -m tests.e2e.invariance``.
"""

import pytest

from tests.e2e.invariance import SABOTAGES, STATES, check, holds

OBJECTIVES = ("simclr", "barlow_twins")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return check(tmp_path_factory.mktemp("invariance"), OBJECTIVES, worlds=(2,))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("zero", [0, 1, 2])
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


def test_three_ranks_of_four_micro_batches(tmp_path):
    for row in check(tmp_path, ("simclr",), worlds=(3,), stages=(1,), micro_batches=(4,)):
        assert row["ranks"] == 3 and holds(row), row
