import itertools

import pytest

from hpc.errors import UserError
from launch.grid import points


def test_parts_multiply_and_keep_their_order():
    found = points(
        grid={"a": [1, 2], "b": range(2)}, zip={"c": ["x", "y"], "d": [0.1, 0.2]}, list=[{"e": None}, {"e": [1]}]
    )
    assert len(found) == 2 * 2 * 2 * 2
    assert [(p["c"], p["d"]) for p in found] == [("x", 0.1)] * 8 + [("y", 0.2)] * 8
    assert [(p["a"], p["b"]) for p in found[:4]] == list(itertools.product([1, 2], range(2)))
    assert points() == [{}]


def test_a_point_that_comes_twice_is_one():
    assert points(list=[{"a": 1}, {"a": 2}, {"a": 1}]) == [{"a": 1}, {"a": 2}]


def test_random_draws_follow_their_seed_and_stay_in_their_space():
    spaces = {
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "k": {"low": 2, "high": 5, "whole": True},
        "c": ["u", "v"],
    }
    found = points(random={"draws": 200, "seed": 3, "values": spaces})
    assert found == points(random={"draws": 200, "seed": 3, "values": spaces})
    assert found != points(random={"draws": 200, "seed": 4, "values": spaces})
    assert len(found) == 200 and {p["k"] for p in found} == {2, 3, 4, 5} and {p["c"] for p in found} == {"u", "v"}
    # On a log scale a third of the draws lies in each decade.
    shares = [sum(10.0**-e <= p["lr"] < 10.0 ** (1 - e) for p in found) / 200 for e in (4, 3, 2)]
    assert all(0.2 < share < 0.47 for share in shares), shares


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("a <= 2", [1, 2]),
        ("not a == 2 and b in ['x']", [1, 3]),
        ("a == 1 or 2 < a < 4", [1, 3]),
        ("train.k == -1", [1, 2, 3]),
        (lambda point: point["a"] > 2, [3]),
    ],
)
def test_conditions(where, left):
    found = points(grid={"a": [1, 2, 3], "b": ["x"], "train.k": [-1]}, where=[where])
    assert [point["a"] for point in found] == left


@pytest.mark.parametrize(
    "text", ["__import__('os').system('touch owned')", "a.__class__", "a + 1 == 2", "[x for x in a]"]
)
def test_a_condition_runs_no_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="where"):
        points(grid={"a": [1]}, where=[text])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"grid": {"a": "text"}}, "grid: 'a' must have a list of values"),
        ({"zip": {"a": [1], "b": [1, 2]}}, r"different lengths \(a: 1, b: 2\)"),
        ({"list": [{"a": 1}, {"b": 1}]}, "same names"),
        ({"list": {"a": 1}}, "list of mappings"),
        ({"grid": {"a": [1]}, "list": [{"a": 1}]}, "'a' stands in two"),
        ({"random": {"values": {}}}, "draws and values are needed"),
        ({"random": {"draws": 1, "values": {"a": {"low": 0, "high": 1, "log": True}}}}, "from 0 to 1, on a log scale"),
        ({"grid": {"a": [1]}, "where": ["b == 1"]}, "'b' is none of a"),
        ({"grid": {"a": [1]}, "where": ["a =="]}, "cannot be read"),
        ({"grid": {"a": [1]}, "where": ["a < 'x'"]}, "not supported between"),
        ({"grid": {"a": range(2000), "b": range(2000)}}, "4000000 jobs"),
    ],
)
def test_what_cannot_be_is_one_sentence(parts, message):
    with pytest.raises(UserError, match=message):
        points(**parts)
