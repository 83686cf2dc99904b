"""The comparison of ``python -m tests.e2e.measure_predicted`` tells wires that were found from each kind of failure."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nanodist.morphology import measure
from tests.e2e.measure_predicted import PIXEL_NM, Seen, check, report

SIZE = 128


def _wire(y: float, x0: float, x1: float, width: float = 8.0) -> dict[str, object]:
    line = [[x * PIXEL_NM, y * PIXEL_NM] for x in np.linspace(x0, x1, 50)]
    known = {"width_nm": width * PIXEL_NM, "contour_length_nm": (x1 - x0) * PIXEL_NM, "border_cut": False}
    return {"centre_line_nm": line, **known}


def _mask(y: float, x0: float, x1: float, width: float = 8.0) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    beyond = np.maximum(np.maximum(x0 - columns, columns - x1), 0)
    return np.hypot(rows - y, beyond) <= width / 2


def test_found_missed_split_and_merged_wires_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    places = [(15, 20, 100), (40, 20, 100), (65, 20, 100), (92, 15, 55), (92, 66, 112)]
    truth = {"size_px": SIZE, "morphology": "dispersed", "wires": [_wire(*place) for place in places]}
    predicted = _mask(15, 20, 100) | _mask(65, 20, 52) | _mask(65, 66, 100) | _mask(92, 15, 112)
    made = measure(predicted, PIXEL_NM, shape="wires")
    lines = [np.asarray(line)[:, ::-1] * PIXEL_NM for line in made.lines]
    instances = np.stack([_mask(*place) for place in places])
    found = check("x", truth, instances, predicted, Seen({}, made.wires, lines))
    assert [one.kind for one in found] == ["", "missed", "split", "merged", "merged"]
    assert found[0].wire.measured_width == pytest.approx(8.0, rel=0.02)
    assert found[0].wire.measured_length == pytest.approx(80.0, rel=0.01)
    figures = report(found)["apart"]
    assert Counter({k: figures[k] for k in ("missed", "split", "merged", "off")}) == Counter(
        missed=1, split=1, merged=2
    )
    assert "x wire 1, apart: missed: not found" in capsys.readouterr().out
