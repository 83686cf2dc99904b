"""From a grid to points: grids, zips, lists and random draws of recipe values, and conditions on them.

A point is a mapping from a name (a recipe key, or a short form of one) to a value. The parts of a definition multiply:
every row of ``zip`` with every row of ``list``, every corner of ``grid`` and every one of the random draws.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc.errors import UserError

Point = dict[str, Any]
_MOST = 1_000_000
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
}


def points(
    grid: Mapping[str, Sequence[Any]] | None = None,
    zip: Mapping[str, Sequence[Any]] | None = None,
    list: Sequence[Mapping[str, Any]] | None = None,
    random: Mapping[str, Any] | None = None,
    where: Sequence[str | Callable[[Point], bool]] = (),
) -> Sequence[Point]:
    """All points of a definition, in a fixed order, none twice.

    Args:
        grid: name -> values, every combination.
        zip: name -> values, as long as each other, taken together.
        list: points that are written out.
        random: ``{"draws": 20, "seed": 0, "values": {name: SPACE}}``; a space is a list to choose from, or
            ``{"low": a, "high": b}`` with ``log: true`` or ``whole: true`` where wanted.
        where: conditions, all of which a point has to fulfil: ``"labels_per_class <= 8 or lr == 0.1"`` (comparisons,
            ``and``, ``or``, ``not``, ``in``), or functions of a point.

    Raises:
        UserError: a part that is none of these, two parts with one name, or a condition that cannot be read.
    """
    parts = [_zipped(zip or {}), _listed(list), _corners(grid or {}), _drawn(random)]
    names = [name for part in parts for name in (part[0] if part else ())]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"sweep: '{twice}' stands in two of grid, zip, list and random; give it once")
    if math.prod(map(len, parts)) > _MOST:
        raise UserError(f"sweep: that is {math.prod(map(len, parts))} jobs, more than {_MOST}")
    conditions = [_condition(text) if isinstance(text, str) else text for text in where]
    found: dict[str, Point] = {}
    for rows in itertools.product(*parts):
        point = {name: value for row in rows for name, value in row.items()}
        if all(condition(point) for condition in conditions):
            found.setdefault(repr(sorted(point.items(), key=lambda item: item[0])), point)
    return [*found.values()]


def _values(part: str, name: str, values: Any) -> Sequence[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise UserError(f"sweep: {part}: '{name}' must have a list of values, not {values!r}")
    return [*values]


def _corners(grid: Mapping[str, Any]) -> Sequence[Point]:
    columns = [[(name, value) for value in _values("grid", name, values)] for name, values in grid.items()]
    return [dict(row) for row in itertools.product(*columns)]


def _zipped(columns: Mapping[str, Any]) -> Sequence[Point]:
    lengths = {name: len(_values("zip", name, values)) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"sweep: zip: lists of different lengths ({', '.join(f'{n}: {k}' for n, k in lengths.items())})"
        )
    rows = zip(*([(name, value) for value in _values("zip", name, v)] for name, v in columns.items()), strict=True)
    return [dict(row) for row in rows] if columns else [{}]


def _listed(rows: Any) -> Sequence[Point]:
    if rows is None:
        return [{}]
    if isinstance(rows, (str, Mapping)) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError("sweep: list must be a list of mappings, each a point")
    if len({frozenset(row) for row in rows}) > 1:
        raise UserError("sweep: list: all points must have the same names")
    return [dict(row) for row in rows]


def _drawn(definition: Mapping[str, Any] | None) -> Sequence[Point]:
    if definition is None:
        return [{}]
    unknown = set(definition) - {"draws", "seed", "values"}
    if unknown or not {"draws", "values"} <= set(definition):
        raise UserError("sweep: random has the keys draws, seed and values, of which draws and values are needed")
    draw = random.Random(int(definition.get("seed", 0)))
    spaces = [(name, _space(name, space)) for name, space in definition["values"].items()]
    return [{name: space(draw) for name, space in spaces} for _ in range(int(definition["draws"]))]


def _space(name: str, space: Any) -> Callable[[random.Random], Any]:
    if not isinstance(space, Mapping):
        values = _values("random", name, space)
        return lambda draw: draw.choice(values)
    if not {"low", "high"} <= set(space) <= {"low", "high", "log", "whole"}:
        raise UserError(f"sweep: random: '{name}' must be a list, or low and high (with log or whole)")
    low, high, log = float(space["low"]), float(space["high"]), bool(space.get("log"))
    if low > high or (log and low <= 0):
        raise UserError(f"sweep: random: '{name}' runs from {low:g} to {high:g}{', on a log scale' if log else ''}")

    def one(draw: random.Random) -> float | int:
        value = math.exp(draw.uniform(math.log(low), math.log(high))) if log else draw.uniform(low, high)
        # Six digits are what people read in tables; more would only make long command lines.
        return round(value) if space.get("whole") else float(f"{value:.6g}")

    return one


def _condition(text: str) -> Callable[[Point], bool]:
    """A function from the text of a condition; only what stands in :func:`_evaluate` is understood, nothing is run."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise UserError(f"sweep: where: '{text}' cannot be read") from None

    def holds(point: Point) -> bool:
        try:
            return bool(_evaluate(tree, point))
        except (ValueError, TypeError) as error:
            raise UserError(f"sweep: where: '{text}': {error}") from None

    return holds


def _evaluate(node: ast.expr, point: Point) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = ast.unparse(node)
        if name not in point:
            raise ValueError(f"'{name}' is none of {', '.join(point)}")
        return point[name]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item, point) for item in node.elts]
    if isinstance(node, ast.BoolOp):
        values = (_evaluate(value, point) for value in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        value = _evaluate(node.operand, point)
        return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        sides = [_evaluate(side, point) for side in (node.left, *node.comparators)]
        pairs = zip(node.ops, itertools.pairwise(sides), strict=True)
        return all(_COMPARE[type(op)](left, right) for op, (left, right) in pairs)
    raise ValueError(f"'{ast.unparse(node)}' is not understood; use comparisons, and, or, not, in")
