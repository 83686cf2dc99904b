"""Reads thousands of recipes that differ in a few values: what two of them share is read once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from hpc.config import apply_overrides, build
from hpc.errors import UserError


class Reader:
    """Recipes of one class from a mapping and changes to it; the same as ``build(cls, apply_overrides(...))``.

    Args:
        cls: of the recipes.
        values: what all share.
    """

    def __init__(self, cls: type, values: Mapping[str, Any]) -> None:
        self._cls, self._values = cls, values
        hints = get_type_hints(cls)
        self._sections = {
            f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])
        }
        self._built: dict[str, Any] = {}

    def read(self, overrides: Sequence[str]) -> Any:
        """The recipe with ``overrides``, such as ``data.labels_per_class=2``.

        Raises:
            UserError: as :func:`hpc.config.build`.
        """
        own: dict[str, list[str]] = {}
        for text in overrides:
            own.setdefault(text.partition("=")[0].partition(".")[0], []).append(text)
        top = [text for name, texts in own.items() if name not in self._sections for text in texts]
        values = apply_overrides({n: v for n, v in self._values.items() if n not in self._sections}, top)
        for name in self._sections:
            if name in own or name in self._values:
                values[name] = self._section(name, own.get(name, []))
        return build(self._cls, values)

    def _section(self, name: str, overrides: Sequence[str]) -> Any:
        key = json.dumps([name, *overrides])
        if key not in self._built:
            given = {name: self._values[name]} if name in self._values else {}
            values = apply_overrides(given, overrides)[name]
            if values is not None and not isinstance(values, Mapping):
                raise UserError(f"recipe section '{name}' must be a mapping, not {values!r}")
            self._built[key] = build(self._sections[name], values or {}, name)
        return self._built[key]
