"""Which files are packed, under which names, and what labels and groups they carry."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hpc.errors import UserError
from nanodist.micrographs import FORMATS, SUFFIXES, is_named_like_one
from nanodist.shards.tar import MAX_KEY

# Room for the page and the place of a tile behind a file's own part of the key.
_MAX_STEM = MAX_KEY - 30


@dataclass(frozen=True)
class Source:
    """A file to pack: its path, its name relative to what was packed, and the stem of its samples' keys."""

    path: Path
    name: str
    stem: str


def find_sources(paths: Sequence[Path], exclude: Sequence[str] = ()) -> tuple[list[Source], dict[str, int]]:
    """All micrographs in ``paths`` (folders with all that is in them, or files), sorted by name, without doubles.

    Names are relative to the folder that all ``paths`` share, so that they do not depend on where that folder lies.

    Returns:
        the sources, and how many other files of each suffix the folders hold.

    Raises:
        UserError: a path that does not exist, no micrograph in all, or a named file of another format.
    """
    found: dict[Path, None] = {}
    other: Counter[str] = Counter()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: name a folder of micrographs or a micrograph file")
        for file in _files(path) if path.is_dir() else [path]:
            if is_named_like_one(file):
                found[Path(os.path.abspath(file))] = None
            elif path.is_dir():
                other[file.suffix.lower() or "(none)"] += 1
            else:
                raise UserError(f"{path} is no micrograph that is read: {FORMATS} files are ({', '.join(SUFFIXES)})")
    root = _common_folder(paths)
    named = {Path(os.path.relpath(file, root)).as_posix(): file for file in found}
    kept = sorted(name for name in named if not any(fnmatch(name, pattern) for pattern in exclude))
    if not kept:
        raise UserError(_nothing(paths, other, len(named)))
    stems = _stems(kept)
    return [Source(named[name], name, stems[name]) for name in kept], dict(sorted(other.items()))


def _files(folder: Path) -> list[Path]:
    """All files below ``folder`` but hidden ones (such as the ``._x.png`` that macOS leaves)."""
    files = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(where, name) for name in names if not name.startswith(".")]
    return files


def _common_folder(paths: Sequence[Path]) -> Path:
    folders = [os.path.abspath(path if path.is_dir() else path.parent) for path in paths]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # Windows: on different drives
        raise UserError("the sources lie on different drives: pack each drive into a store of its own") from None


def _nothing(paths: Sequence[Path], other: Counter[str], excluded: int) -> str:
    where = ", ".join(map(str, paths))
    if excluded:
        return f"all {excluded} micrographs in {where} are excluded: change --exclude"
    if not other:
        return f"{where} is empty: name a folder that holds {FORMATS} files"
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(4))
    return f"{where} holds no micrograph ({kinds}): {FORMATS} files are read ({', '.join(SUFFIXES)})"


def _stems(names: Sequence[str]) -> dict[str, str]:
    """A readable stem of safe characters for each name; names that would share one get a hash of the whole name.

    webdataset cuts keys at the first dot, so that there is none; ``--`` never occurs and parts tile places off.
    """
    plain = {name: _plain(name) for name in names}
    uses = Counter(stem.lower() for stem in plain.values())
    return {
        name: stem if stem and uses[stem.lower()] == 1 and len(stem) <= _MAX_STEM else _hashed(stem, name)
        for name, stem in plain.items()
    }


def _plain(name: str) -> str:
    without_suffix = name.rpartition(".")[0]
    return re.sub(r"[^A-Za-z0-9_]+", "-", without_suffix.replace("/", "__")).strip("-")


def _hashed(stem: str, name: str) -> str:
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=5).hexdigest()
    return f"{stem[: _MAX_STEM - 11].strip('-')}-{digest}".strip("-")


def read_values(spec: str, sources: Sequence[Source], what: str) -> list[str | None]:
    """The label or group of each source, as ``spec`` says; ``None`` where the CSV does not list it or is empty.

    Args:
        spec: ``file`` (the source's name), ``folder`` (the name of the folder that it lies in), or ``FILE.csv:COLUMN``.
        sources: the files to pack.
        what: ``labels``, ``groups`` or ``masks``, for errors.

    Raises:
        UserError: no such file or column, two values for one file, or a row that fits several files.
    """
    if spec == "file" and what == "groups":
        return [source.name for source in sources]
    if spec == "folder":
        return [source.path.parent.name for source in sources]
    file, separator, column = spec.rpartition(":")
    if not separator or not file or not column or not file.lower().endswith(".csv"):
        words = {"groups": "'file', 'folder'", "labels": "'folder', 'masks'"}.get(what, "FOLDER=MASKS")
        raise UserError(f"--{what} is '{spec}'; it must be {words} or FILE.csv:COLUMN")
    rows = _read_csv(Path(file), column, what)
    values: dict[Path, str] = {}
    finder = Finder(sources, Path(file))
    for name, value in rows:
        path = finder.find(name)
        if path is None:
            continue
        if values.setdefault(path, value) != value:
            raise UserError(f"{file} gives two {what} to {name} ('{values[path]}' and '{value}'): keep one row")
    return [values.get(source.path) or None for source in sources]


def _read_csv(path: Path, column: str, what: str) -> list[tuple[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for needed in ("file", column):
                if needed not in columns:
                    raise UserError(f"{path} has no column '{needed}' for --{what}; it has: {', '.join(columns)}")
            return [(row["file"].strip(), (row[column] or "").strip()) for row in reader if row["file"]]
    except FileNotFoundError:
        raise UserError(f"{path}, named by --{what}, does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}, named by --{what}, is no readable CSV: {error}") from None


class Finder:
    """Finds which source a CSV row means: by its path from the CSV's folder, else by the end of its path."""

    def __init__(self, sources: Sequence[Source], table: Path) -> None:
        self.folder = Path(os.path.abspath(table.parent))
        self.table = table
        self.paths = {source.path for source in sources}
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for source in sources:
            self.by_name[source.path.name].append(source.path)

    def find(self, name: str) -> Path | None:
        """The source's path, or ``None`` for a row about a file that is not packed."""
        parts = name.replace("\\", "/")
        exact = Path(os.path.normpath(self.folder / parts))
        if exact in self.paths:
            return exact
        if exact.exists():
            return None  # it means a file that exists and is not packed, not its namesake
        ending = "/" + parts.lstrip("./")
        namesakes = self.by_name.get(parts.rpartition("/")[2], [])
        candidates = [path for path in namesakes if path.as_posix().endswith(ending)]
        if len(candidates) > 1:
            raise UserError(
                f"{self.table} lists '{name}', which fits {len(candidates)} files ({candidates[0]}, {candidates[1]}): "
                "write paths relative to the CSV"
            )
        return candidates[0] if candidates else None
