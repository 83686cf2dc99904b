"""A short version of ``python -m tests.e2e.measure_truth``."""

from __future__ import annotations

import pytest

from tests.e2e.measure_truth import OBJECTS, Checked, Wire, check_objects, holds, percolates, report, run


def test_masks_give_back_the_true_widths_lengths_and_percolation(capsys):
    found = report(run(12, 1, seed=3))
    assert found["whole"]["n"] >= 5 and holds(found["whole"])
    assert holds(found["union, apart"])
    assert found["percolation_agreement"] == 1.0
    assert found["failures"]["whole"] == 0
    assert "12 of 12 micrographs agree" in capsys.readouterr().out


@pytest.mark.parametrize("label", OBJECTS)
def test_masks_give_back_the_true_sizes_of_particles(label):
    pairs = check_objects(1, (label, 1))
    assert len(pairs) >= 9
    for _, quantity, seen, true in pairs:
        assert seen == pytest.approx(true, rel=0.02, abs=0.5 if quantity == "equivalent_diameter" else 1.5)


def test_bars_and_failures_see_what_is_wrong(capsys):
    """The comparison itself can fail: a bias, a lost wire and another percolation are all told."""
    wires = [Wire(f"w{i}", "whole", 10.0, 100.0, 10.2, 104.0 if i else None) for i in range(5)]
    wires[0].why = "not found"
    checked = Checked("x", wires, ((True, True), (True, False)))
    found = report([checked])
    assert not holds(found["whole"])
    assert found["percolation_agreement"] == 0.0 and found["failures"]["whole"] == 1
    assert "- w0, whole: not found" in capsys.readouterr().out


def test_the_true_percolation_is_geometry():
    line = {"centre_line_nm": [[-5.0, 20.0], [60.0, 22.0]], "width_nm": 4.0}
    half = {"centre_line_nm": [[30.0, -5.0], [30.0, 20.0]], "width_nm": 4.0}
    rest = {"centre_line_nm": [[35.0, 21.0], [36.0, 60.0]], "width_nm": 4.0}
    assert percolates([line], 50.0) == (True, False)
    assert percolates([half, rest], 50.0) == (False, False)
    assert percolates([line, half, rest], 50.0) == (True, True)
