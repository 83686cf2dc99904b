"""The index of a store: one row a sample in columns, so that a million samples open in a moment."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sample:
    """One tile of a store.

    Attributes:
        key: unique, of letters, digits, ``_`` and ``-``.
        shard: number of the shard in the manifest.
        offset: where the sample's image begins in the shard file, in bytes.
        size: its length in bytes.
        suffix: its encoding, such as ``png``.
        label: class, or ``None``.
        group: what no split may part (the micrograph).
        pixel_size_nm: (y, x) in nanometres, or ``None`` where unknown.
        height: rows of pixels.
        width: columns of pixels.
        source: the file it came from, relative to what was packed.
        xxh3: hash of the ``size`` bytes, 16 hex digits.
    """

    key: str
    shard: int
    offset: int
    size: int
    suffix: str
    label: str | None
    group: str
    pixel_size_nm: tuple[float, float] | None
    height: int
    width: int
    source: str
    xxh3: str


_NUMBERS = {"shard": np.int32, "offset": np.int64, "size": np.int64, "height": np.int32, "width": np.int32}
_SAFE_KEYS = re.compile(r"[A-Za-z0-9_\-\n]+")
_TABLES = ("suffix", "label", "group", "source")


class Samples(Sequence[Sample]):
    """The samples of a store, made from the columns of its index as they are asked for."""

    def __init__(self, keys: list[str], columns: dict[str, npt.NDArray[Any]], tables: dict[str, list[Any]]) -> None:
        self.keys, self.columns, self.tables = keys, columns, tables

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        key = self.keys[i]
        numbers: dict[str, Any] = {name: int(self.columns[name][i]) for name in _NUMBERS}
        texts: dict[str, Any] = {name: self.tables[name][self.columns[name][i]] for name in _TABLES}
        y, x = self.columns["pixel_size_nm"][i].tolist()
        size_nm = None if np.isnan(y) else (y, x)
        return Sample(key=key, pixel_size_nm=size_nm, xxh3=f"{int(self.columns['xxh3'][i]):016x}", **numbers, **texts)

    def column(self, name: str) -> list[Any]:
        """One of suffix, label, group or source for every sample."""
        table = self.tables[name]
        return [table[code] for code in self.columns[name].tolist()]


def to_bytes(samples: Sequence[Sample]) -> bytes:
    """The index file of ``samples``: an uncompressed ``.npz`` of columns, without pickles; same samples, same bytes."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _NUMBERS.items():
        columns[name] = np.asarray([getattr(s, name) for s in samples], dtype)
    nan = (float("nan"), float("nan"))
    columns["pixel_size_nm"] = np.asarray([s.pixel_size_nm or nan for s in samples], np.float64).reshape(-1, 2)
    columns["xxh3"] = np.asarray([int(s.xxh3, 16) for s in samples], np.uint64)
    columns["keys"] = _text([s.key for s in samples])
    for name in _TABLES:
        table: dict[Any, int] = {}
        codes = [table.setdefault(getattr(s, name), len(table)) for s in samples]
        columns[name] = np.asarray(codes, np.int32)
        columns[f"{name}_table"] = _text(list(table))
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    return buffer.getvalue()


def from_bytes(data: bytes) -> Samples:
    """:func:`to_bytes` read back.

    Raises:
        ValueError: no such index, or columns that do not fit together.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, as none that nanodist wrote is")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        keys = json.loads(columns.pop("keys").tobytes())
        tables = {name: json.loads(columns.pop(f"{name}_table").tobytes()) for name in _TABLES}
        samples = Samples(keys, columns, tables)
        _check(samples)
    except (
        OSError,
        EOFError,
        KeyError,
        IndexError,
        UnicodeDecodeError,
        zipfile.BadZipFile,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(f"no readable index ({' '.join(str(error).split())})") from None
    return samples


def _check(samples: Samples) -> None:
    n = len(samples.keys)
    if n and not _SAFE_KEYS.fullmatch("\n".join(samples.keys)):  # others may name files by them
        raise ValueError("a key in it has other characters than letters, digits, _ and -")
    expected = dict.fromkeys([*_NUMBERS, *_TABLES, "xxh3"], (n,)) | {"pixel_size_nm": (n, 2)}
    wrong = [name for name, shape in expected.items() if samples.columns[name].shape != shape]
    if wrong:
        raise ValueError(f"its columns have different lengths: {', '.join(wrong)}")
    for name in _TABLES:
        codes = samples.columns[name]
        if n and (int(codes.min()) < 0 or int(codes.max()) >= len(samples.tables[name])):
            raise ValueError(f"column {name} points outside its table")
    if any(int(samples.columns[name].min(initial=0)) < 0 for name in _NUMBERS):
        raise ValueError("negative numbers in it")


def _text(values: list[Any]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(values, ensure_ascii=False).encode(), np.uint8)
