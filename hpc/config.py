"""Strict typed recipes: dataclasses from YAML and dotted overrides, back to YAML, and their fingerprint.

A recipe has two halves. *What* decides the result and is hashed into the fingerprint; *how* (fields declared with
``how=True``, or inside a section so declared) only decides where and how fast it runs, and is free to change at a
resume.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hpc.errors import UserError

C = TypeVar("C")
REQUIRED = dataclasses.MISSING


def option(
    default: Any = REQUIRED,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    how: bool = False,
) -> Any:
    """A recipe field: default, one sentence of help, inclusive bounds, and whether it is a *how*."""
    metadata = {"help": help, "low": low, "high": high, "how": how}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, *, how: bool = False) -> Any:
    """A nested section of a recipe with the defaults of ``cls``."""
    return dataclasses.field(default_factory=cls, metadata={"how": how})


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Types of fields; resolving them takes longer than all the rest of a section."""
    return get_type_hints(cls)


def build(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Make a ``cls`` from nested mappings, checking every key, type and bound.

    Where the class has ``expand(values)``, a class method, it first turns what was written into plain values of fields
    (a preset's name into what it stands for). After the fields, ``check(self)`` is called where the class has one. A
    ``ValueError`` from either is reported under the section's name.

    Raises:
        UserError: unknown key (with the nearest known one), missing key, wrong type or value out of bounds.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"recipe section '{where or 'top level'}' must be a mapping, not {values!r}")
    values = _reported(where, getattr(cls, "expand", dict), values)
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise UserError(_unknown(prefix, str(name), list(fields)))
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], prefix + name, field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"recipe key '{prefix}{name}' is missing: {field.metadata.get('help', '')}")
    made = cls(**arguments)
    check = getattr(made, "check", None)
    if check is not None:
        _reported(where, check)
    return made


def _reported(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns; its ``ValueError`` becomes the user's, under the name of the section."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise UserError(f"recipe section '{where or 'top level'}': {error}") from None


def _unknown(prefix: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean '{prefix}{near[0]}'?)" if near else ""
    return f"recipe key '{prefix}{name}' does not exist{hint}; allowed here: {', '.join(known)}"


def _convert(kind: Any, value: Any, where: str, metadata: Mapping[str, Any]) -> Any:
    """``value`` as a ``kind``; ints become floats where floats are asked for, nothing else is converted."""
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if (
            not isinstance(value, (str, int))
            or value not in get_args(kind)
            or isinstance(value, bool) != isinstance(get_args(kind)[0], bool)
        ):
            raise UserError(f"recipe key '{where}' is {value!r}; allowed: {', '.join(map(str, get_args(kind)))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        kinds = [k for k in get_args(kind) if k is not type(None)]
        return _convert(kinds[0], value, where, metadata)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise UserError(f"recipe key '{where}' must be keys and values, not {value!r}")
        return dict(value)
    if origin in (list, tuple):
        return _convert_sequence(kind, value, where, metadata)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, str):
        value = _float_from_text(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"recipe key '{where}' must be {_name(kind)}, not {value!r}")
    _check_bounds(value, where, metadata)
    return value


def _convert_sequence(kind: Any, value: Any, where: str, metadata: Mapping[str, Any]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"recipe key '{where}' must be a list, not {value!r}")
    kinds = get_args(kind)
    fixed = get_origin(kind) is tuple and Ellipsis not in kinds
    if fixed and len(value) != len(kinds):
        raise UserError(f"recipe key '{where}' must have {len(kinds)} values, not {len(value)}")
    items = [_convert(kinds[i] if fixed else kinds[0], v, f"{where}[{i}]", metadata) for i, v in enumerate(value)]
    return get_origin(kind)(items)


def _float_from_text(value: str) -> Any:
    """YAML 1.1 reads ``1e-3`` as text; people write it, so it counts as a number."""
    try:
        return float(value)
    except ValueError:
        return value


def _check_bounds(value: Any, where: str, metadata: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"recipe key '{where}' must be a finite number, not {value}")
    low, high = metadata.get("low"), metadata.get("high")
    if isinstance(value, (int, float)) and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise UserError(f"recipe key '{where}' is {value}; it must be {bounds}")


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


class _Loader(yaml.SafeLoader):
    """YAML as recipes mean it: a key stands once, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raise where a key stands twice, of which YAML would take the last."""
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.tag != "tag:yaml.org,2002:merge"):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping as a dictionary (empty text gives ``{}``).

    Raises:
        UserError: no valid YAML (with the line), or no mapping.
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold keys and values, not {type(values).__name__}")
    return values


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """:func:`parse_yaml` of a file; ``what`` it is stands before its name in errors.

    Raises:
        UserError: it cannot be read; otherwise as there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 ({error.reason} at byte {error.start}): save it as such") from None
    return parse_yaml(text, f"{what} {path}")


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` with dotted overrides such as ``train.steps=20`` put in; the right sides are read as YAML.

    Raises:
        UserError: an override without ``=``, or through a key that is no section.
    """
    result = json.loads(json.dumps(values))
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            raise UserError(f"override '{override}' must look like section.key=value")
        value = copy.deepcopy(_right_side(text))
        *path, last = name.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UserError(f"override '{override}': '{part}' is a value, not a section")
        place[last] = value
    return result


@functools.lru_cache(maxsize=4096)
def _right_side(text: str) -> Any:
    """The value of an override; a sweep has the same few in thousands of recipes."""
    try:
        return yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        return text


def to_dict(recipe: Any, *, what_only: bool = False) -> dict[str, Any]:
    """A recipe as nested plain values; with ``what_only`` the *how* fields and sections are left out."""
    result: dict[str, Any] = {}
    for name, how in _fields(type(recipe)):  # type: ignore[arg-type]
        if what_only and how:
            continue
        value = getattr(recipe, name)
        if hasattr(value, "__dataclass_fields__"):
            result[name] = to_dict(value, what_only=what_only)
        else:
            result[name] = list(value) if isinstance(value, tuple) else value
    return result


@functools.cache
def _fields(cls: Any) -> list[tuple[str, bool]]:
    """Name of each field, and whether it is a *how*."""
    return [(field.name, bool(field.metadata.get("how"))) for field in dataclasses.fields(cls)]


def to_yaml(recipe: Any) -> str:
    """A recipe as YAML that :func:`build` reads back to an equal one."""
    return plain_yaml(to_dict(recipe))


def plain_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, allow_unicode=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def fingerprint(recipe: Any, **inputs: str) -> str:
    """Twelve hex digits over the *what* of a recipe and the hashes of its ``inputs`` (such as the store's)."""
    return identity_hash(to_dict(recipe, what_only=True), inputs)


def identity_hash(what: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """:func:`fingerprint`, where the *what* is at hand."""
    canonical = json.dumps({"recipe": what, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, as ``key: old -> new`` sentences, for the error at a resume."""
    before, after = flatten(old), flatten(new)
    absent = "(absent)"
    names = [*before, *(n for n in after if n not in before)]
    pairs = ((n, before.get(n, absent), after.get(n, absent)) for n in names)
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]
