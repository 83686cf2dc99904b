"""The check of killed packings, short: see ``python -m tests.e2e.packing_kills``."""

from __future__ import annotations

from tests.e2e.packing_kills import check, found
from tests.nanodist.packing import tree


def test_two_kills_end_in_the_same_bytes(tmp_path):
    result = check(tmp_path, kills=2, files=40, seed=1, sizes=[], most=1)
    assert result["different"] == 0 and sum(result["stages"].values()) == 2
    # What it compares is seen to differ: half a store under its name is a fault.
    whole = tree(tmp_path / "first")
    next((tmp_path / "first").glob("*.tar")).unlink()
    assert found(tmp_path / "first", whole)[1] is not None
