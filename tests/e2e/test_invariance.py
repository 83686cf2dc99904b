"""One rank and two ranks are the same run, and a comparison that could not fail would be none."""

import pytest

from tests.e2e.invariance import OBJECTIVES, SABOTAGES, STATES, check, holds


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return check(tmp_path_factory.mktemp("invariance"))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_ranks_take_the_step_of_one(rows, objective, zero):
    own = [r for r in rows if (r["objective"], r["zero"], r["sabotage"]) == (objective, zero, "none")]
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
