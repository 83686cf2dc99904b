"""The index of a store: one row a sample in columns, mapped into memory: millions of samples open in a moment."""

from __future__ import annotations

import io
import json
import mmap
import re
import struct
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError

Buffer = bytes | mmap.mmap
T = TypeVar("T")


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
_SAFE_KEY = re.compile(r"[A-Za-z0-9_\-]+")
_TABLES = ("suffix", "label", "group", "source")
_LOCAL_HEADER = 30


class Lazy(Sequence[T]):
    """A sequence whose items are made as they are asked for, by :meth:`at`."""

    @abstractmethod
    def at(self, i: int) -> T:
        """Item ``i``, from 0 to the length less one."""

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        every = range(len(self))
        return [self.at(k) for k in every[i]] if isinstance(i, slice) else self.at(every[i])


class Keys(Lazy[str]):
    """The keys of all samples, read from one run of bytes as they are asked for."""

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    def at(self, i: int) -> str:
        """See :class:`Lazy`."""
        start = int(self._ends[i - 1]) if i else 0
        return _safe_key(self._text[start : int(self._ends[i])].tobytes().decode("ascii", "replace"))

    def __iter__(self) -> Iterator[str]:
        text, start = self._text.tobytes().decode("ascii", "replace"), 0
        for end in self._ends.tolist():
            yield _safe_key(text[start:end])
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class _Taken(Lazy[str]):
    """Some keys of others."""

    def __init__(self, keys: Sequence[str], numbers: npt.NDArray[np.int64]) -> None:
        self._keys, self._numbers = keys, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, i: int) -> str:
        """See :class:`Lazy`."""
        return self._keys[int(self._numbers[i])]


def _safe_key(key: str) -> str:
    if not _SAFE_KEY.fullmatch(key):  # others may name files by it
        raise UserError(f"the index has the key {key!r}, with other characters than letters, digits, _ and -")
    return key


class Samples(Lazy[Sample]):
    """The samples of a store, made from the columns of its index as they are asked for.

    Attributes:
        keys: of all samples.
        columns: arrays with a row a sample: shard, offset, size, height, width, xxh3, pixel_size_nm (NaN where it is
            unknown), and codes into the tables of suffix, label, group and source.
    """

    def __init__(
        self, keys: Sequence[str], columns: dict[str, npt.NDArray[Any]], tables: Mapping[str, npt.NDArray[np.uint8]]
    ) -> None:
        self.keys, self.columns = keys, columns
        self._texts, self._tables = tables, dict[str, list[Any]]()

    def __len__(self) -> int:
        return len(self.keys)

    def at(self, i: int) -> Sample:
        """See :class:`Lazy`."""
        key = self.keys[i]
        numbers: dict[str, Any] = {name: int(self.columns[name][i]) for name in _NUMBERS}
        texts: dict[str, Any] = {name: self.table(name)[self.columns[name][i]] for name in _TABLES}
        y, x = self.columns["pixel_size_nm"][i].tolist()
        size_nm = None if np.isnan(y) else (y, x)
        return Sample(key=key, pixel_size_nm=size_nm, xxh3=f"{int(self.columns['xxh3'][i]):016x}", **numbers, **texts)

    def take(self, numbers: npt.NDArray[np.int64]) -> Samples:
        """The samples ``numbers`` alone."""
        return Samples(_Taken(self.keys, numbers), {k: v[numbers] for k, v in self.columns.items()}, self._texts)

    def table(self, name: str) -> list[Any]:
        """The values of suffix, label, group or source, which the codes in the column of that name point into.

        Raises:
            UserError: a code points outside.
        """
        if name not in self._tables:
            try:
                values = json.loads(self._texts[name].tobytes())
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"the index's table of {name} is damaged ({error}): pack again") from None
            codes = self.columns[name]
            if not isinstance(values, list) or (len(codes) and not 0 <= codes.min() <= codes.max() < len(values)):
                raise UserError(f"the index's column {name} points outside its table: pack again")
            self._tables[name] = values
        return self._tables[name]

    def column(self, name: str) -> list[Any]:
        """One of suffix, label, group or source for every sample."""
        table = self.table(name)
        return [table[code] for code in self.columns[name].tolist()]


def to_bytes(samples: Sequence[Sample]) -> bytes:
    """The index file of ``samples``: an uncompressed ``.npz`` of columns, without pickles; same samples, same bytes."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _NUMBERS.items():
        columns[name] = np.asarray([getattr(s, name) for s in samples], dtype)
    nan = (float("nan"), float("nan"))
    columns["pixel_size_nm"] = np.asarray([s.pixel_size_nm or nan for s in samples], np.float64).reshape(-1, 2)
    columns["xxh3"] = np.asarray([int(s.xxh3, 16) for s in samples], np.uint64)
    columns["keys"] = np.frombuffer("".join(s.key for s in samples).encode(), np.uint8)
    columns["key_ends"] = np.cumsum([len(s.key) for s in samples], dtype=np.int64)
    for name in _TABLES:
        table: dict[Any, int] = {}
        codes = [table.setdefault(getattr(s, name), len(table)) for s in samples]
        columns[name] = np.asarray(codes, np.int32)
        columns[f"{name}_table"] = np.frombuffer(json.dumps(list(table), ensure_ascii=False).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    return buffer.getvalue()


def open_index(path: Path) -> Samples:
    """The index file at ``path``, mapped: only what is asked for is read.

    Raises:
        ValueError: no index, or columns that do not fit together.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return from_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:
            raise ValueError(f"no readable index ({' '.join(str(error).split())})") from None


def from_buffer(data: Buffer) -> Samples:
    """:func:`to_bytes` read back, without a copy of ``data``.

    Raises:
        ValueError: no such index, or columns that do not fit together.
    """
    try:
        columns = _arrays(data)
        text = columns.pop("keys")
        ends = columns.pop("key_ends", None)
        keys: Sequence[str] = _old_keys(text) if ends is None else Keys(text, ends)
        samples = Samples(keys, columns, {name: columns.pop(f"{name}_table") for name in _TABLES})
        _check(samples, len(text), ends)
    except (
        OSError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return samples


def _old_keys(text: npt.NDArray[np.uint8]) -> list[str]:
    """Stores of schema 1 hold their keys as JSON."""
    keys = [str(key) for key in json.loads(text.tobytes())]
    for key in keys:
        _safe_key(key)
    return keys


def _arrays(data: Buffer) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an uncompressed ``.npz``, as views of ``data`` (numpy itself maps no archives)."""
    arrays = {}
    with zipfile.ZipFile(_File(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, as none that nanodist wrote is")
            name_length, extra_length = struct.unpack_from("<HH", data, entry.header_offset + 26)
            start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
            head = io.BytesIO(data[start : start + 4096])
            if np.lib.format.read_magic(head) != (1, 0):  # type: ignore[no-untyped-call]
                raise ValueError("its arrays are of an unknown version")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)  # type: ignore[no-untyped-call]
            if fortran or dtype.hasobject:
                raise ValueError("its arrays are of an unknown kind")
            count = int(np.prod(shape, dtype=np.int64))
            if head.tell() + count * dtype.itemsize != entry.file_size:
                raise ValueError(f"its array {entry.filename} has another length than it says")
            array = np.frombuffer(data, dtype, count, start + head.tell()) if count else np.empty(0, dtype)
            arrays[entry.filename.removesuffix(".npy")] = array.reshape(shape)
    return arrays


class _File(io.RawIOBase):
    """Bytes or a map as a file, without a copy and without moving the map's own position."""

    def __init__(self, data: Buffer) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size < 0 else min(len(self._data), self._at + size)
        part = bytes(self._data[self._at : end])
        self._at += len(part)
        return part


def _check(samples: Samples, key_bytes: int, ends: npt.NDArray[np.int64] | None) -> None:
    n = len(samples.keys)
    expected = dict.fromkeys([*_NUMBERS, *_TABLES, "xxh3"], (n,)) | {"pixel_size_nm": (n, 2)}
    wrong = [name for name, shape in expected.items() if samples.columns[name].shape != shape]
    if wrong:
        raise ValueError(f"its columns have different lengths: {', '.join(wrong)}")
    if any(int(samples.columns[name].min(initial=0)) < 0 for name in _NUMBERS):
        raise ValueError("negative numbers in it")
    if ends is not None and n and (ends[-1] != key_bytes or ends[0] < 0 or bool((ends[1:] < ends[:-1]).any())):
        raise ValueError("its keys have other lengths than it says")
