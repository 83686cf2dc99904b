from pathlib import Path

import pytest
import torch

from hpc.checkpoint import files
from hpc.checkpoint.retention import Retention, step_of, surplus


def _stay(steps, newest, retention, broken=(), scores=None):
    folders = [Path(files.step_name(step)) for step in steps]
    gone = surplus(
        folders,
        Path(files.step_name(newest)),
        retention,
        lambda folder: step_of(folder) not in broken,
        lambda folder: (scores or {}).get(step_of(folder)),
    )
    return [step for step in steps if Path(files.step_name(step)) not in gone]


@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(1, 0, 0), [60]),
        (Retention(0, 0, 0), [60]),
        (Retention(3, 0, 0), [40, 50, 60]),
        (Retention(2, 30, 0), [30, 50, 60]),
        (Retention(1, 0, 2), [10, 40, 60]),
        (Retention(2, 20, 1), [20, 40, 50, 60]),
        (Retention(9, 0, 0), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_last_every_and_best(retention, stay):
    scores = {10: 0.2, 20: 0.9, 30: None, 40: 0.1, 50: 0.5, 60: 0.4}
    assert _stay(range(10, 70, 10), 60, retention, scores=scores) == stay


def test_a_broken_one_takes_nobodys_place():
    assert _stay([10, 20, 30, 40], 40, Retention(2, 0, 0), broken={30}) == [20, 40]
    assert _stay([10, 20, 30, 40], 40, Retention(1, 0, 1), broken={20}, scores={10: 0.3, 20: 0.1}) == [10, 40]


def test_of_two_equally_good_ones_the_newer_stays():
    assert _stay([10, 20, 30], 30, Retention(1, 0, 1), scores={10: 0.5, 20: 0.5}) == [20, 30]


def test_those_after_the_newest_are_left_alone():
    """A run that went back by hand keeps its future until it comes there."""
    assert _stay([10, 20, 30, 40], 20, Retention(1, 0, 0)) == [20, 30, 40]


def test_ninety_million_steps_and_more_are_in_order():
    assert _stay([99_999_990, 100_000_000, 100_000_010], 100_000_010, Retention(2)) == [100_000_000, 100_000_010]


def test_the_score_in_the_state_decides_also_in_a_later_process(tmp_path):
    tensors = {"model": {"w": torch.ones(2)}}
    for step, score in [(10, 0.5), (20, 0.1), (30, float("nan")), (40, 0.3), (50, None)]:
        files.write(tmp_path, step, tensors, {}, Retention(last=1, best=1), score)
    assert sorted(step_of(p) for p in tmp_path.glob("step-*")) == [20, 50]
    assert files.read_state(tmp_path / "step-00000020")["score"] == 0.1
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    files.write(tmp_path, 60, tensors, {}, Retention(last=1, best=1), 0.05)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000060", "step-00000099", "step-of-mine"]
