"""What a report shows, read from run and probe folders that another process may be writing at this moment."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import run_dir
from hpc.errors import UserError

MAX_EMBEDDING_BYTES = 1 << 30
MAX_THUMBNAIL_PX = 128


@dataclass(frozen=True)
class Metrics:
    """What a run logged, one row a step, in order of steps.

    Attributes:
        rows: the JSON objects of the surviving history (see :func:`hpc.run_dir.read_metrics`).
        dropped: how many lines are not in it: steps that a resume ran again, and lines torn by a kill.
    """

    rows: list[dict[str, Any]]
    dropped: int = 0

    def series(self, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Steps and values of ``name`` as two (n,) arrays, at the steps where it is a finite number."""
        pairs = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        array = np.asarray(pairs, np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


@dataclass(frozen=True)
class Probe:
    """One folder that ``nanodist probe`` wrote.

    Attributes:
        name: name of the folder, or of its run where the folder lies in one.
        data: everything in ``scores.json``.
        features: (n, d) embeddings of test images, or ``None``.
        labels: their (n,) classes.
        problem: why there are no features, in words.
        thumbnails: row of ``features`` -> its picture (S, S), for some of them; ``None`` where the probe kept none.
    """

    path: Path
    name: str
    data: dict[str, Any]
    features: npt.NDArray[np.float32] | None = None
    labels: npt.NDArray[np.str_] | None = None
    problem: str = ""
    thumbnails: dict[int, npt.NDArray[np.uint8]] | None = None

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The rows that tables and curves are made of: encoder, method, labels_per_class, mean, low, high, n."""
        return self.records("summary")

    @property
    def encoder(self) -> str:
        """The encoder whose features are in ``embedding.npz``: the first that was measured."""
        return str(self.summary[0].get("encoder")) if self.summary else self.name

    def records(self, name: str) -> list[dict[str, Any]]:
        """The list of records called ``name`` in ``scores.json``; empty where there is none."""
        rows = self.data.get(name)
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        recipe_text: ``recipe.yaml`` as it is, and ``recipe`` the same as nested values.
        info: ``run.json``.
        views: the bytes of ``views.png``, or ``None``.
        notes: what is missing or unreadable, one sentence each.
    """

    path: Path
    name: str
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=lambda: Metrics([]))
    views: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def starts(self) -> list[dict[str, Any]]:
        """One entry per start of the run, as ``run.json`` has them."""
        starts = self.info.get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    @property
    def kind(self) -> str:
        """``pretrain``, ``classification``, ``segmentation`` or ``pairvae`` (one stage of it)."""
        if self.recipe.get("task") in ("classification", "segmentation"):
            return str(self.recipe["task"])
        return "pairvae" if "solo" in self.recipe and "pair" in self.recipe else "pretrain"

    def recipe_of(self) -> Path:
        """The file of the recipe that a command takes; the stages of a PairVAE share the one above them."""
        above = self.path.parent / "recipe.yaml"
        return above if self.kind == "pairvae" and above.is_file() else self.path / "recipe.yaml"

    def value(self, *names: str) -> Any:
        """The first of the dotted ``names`` that the recipe or else ``run.json`` has, or ``None``."""
        for source in (self.recipe, self.info):
            for name in names:
                found = _dotted(source, name)
                if found is not None and not isinstance(found, Mapping):
                    return found
        return None


def read_run(path: Path) -> Run:
    """Read the run directory ``path``; parts that are not there yet are noted, not an error.

    Raises:
        UserError: ``path`` is no folder, or holds nothing of a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the run directory of a training, or the folder of a sweep.")
    known = ("recipe.yaml", "run.json", "metrics.jsonl")
    if not any((path / name).is_file() for name in known):
        raise UserError(f"{path} is not a run directory: it has none of {', '.join(known)}.")
    notes: list[str] = []
    text = _text(path / "recipe.yaml", notes)
    recipe = _parse(path / "recipe.yaml", text, notes)
    info = _parse(path / "run.json", _text(path / "run.json", notes), notes)
    metrics = read_metrics(path / "metrics.jsonl")
    if not metrics.rows:
        notes.append("metrics.jsonl holds no step yet, so there are no curves.")
    views = next((p for p in (path / "report" / "views.png", path / "views.png") if p.is_file()), None)
    here = path.resolve()
    stage = here.name in ("solo", "pair") and (here.parent / "recipe.yaml").is_file()
    name = info.get("name") or (f"{here.parent.name}, {here.name}" if stage else here.name)
    return Run(path, str(name), text, recipe, info, metrics, views.read_bytes() if views else None, tuple(notes))


def read_metrics(path: Path) -> Metrics:
    """Read ``metrics.jsonl``: of several lines of one step the later one counts, a torn line is left out."""
    if not path.is_file():
        return Metrics([])
    rows = run_dir.read_metrics(path)
    lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return Metrics(rows, max(0, lines - len(rows)))


def read_probe(path: Path) -> Probe:
    """Read a probe folder (or its ``scores.json``) and the embedding beside it.

    Raises:
        UserError: there is no readable ``scores.json``.
    """
    path = Path(path)
    file = path if path.name.endswith(".json") else path / "scores.json"
    if not file.is_file():
        raise UserError(f"{path} has no scores.json: give --probe the folder that 'nanodist probe --out' wrote.")
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not readable ({error}): run 'nanodist probe' again.") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} does not hold the scores of a probe.")
    folder = file.resolve().parent
    name = folder.parent.name if folder.name == "probe" else folder.name
    features, labels, problem = _embedding(folder / "embedding.npz")
    pictures = None if features is None else _thumbnails(folder / "embedding.npz", len(features))
    return Probe(folder, name, data, features, labels, problem, pictures)


def default_probes(runs: Iterable[Run]) -> list[Path]:
    """The probe folders that lie in the runs themselves."""
    return [run.path / "probe" for run in runs if (run.path / "probe" / "scores.json").is_file()]


def _embedding(path: Path) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.str_] | None, str]:
    """Features (n, d), classes (n,) and a problem in words, from ``embedding.npz``; nothing is unpickled."""
    if not path.is_file():
        return None, None, "the probe wrote no embedding.npz"
    if path.stat().st_size > MAX_EMBEDDING_BYTES:
        return None, None, "embedding.npz is over 1 GiB"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features = _first(arrays, "features", "embedding", "embeddings").astype(np.float32)
            labels = _first(arrays, "labels", "label", "classes").astype(str)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return None, None, f"embedding.npz cannot be read ({error})"
    if features.ndim != 2 or len(features) != len(labels) or not np.isfinite(features).all():
        return None, None, "embedding.npz does not hold finite features (n, d) with n labels"
    return features, labels, ""


def _thumbnails(path: Path, count: int) -> dict[int, npt.NDArray[np.uint8]] | None:
    """Small pictures of some rows; ``None`` where there are none, or not what they should be."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows, pictures = np.asarray(arrays["thumbnail_rows"]), np.asarray(arrays["thumbnails"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    good = rows.ndim == 1 and pictures.ndim == 3 and len(rows) == len(pictures) and pictures.dtype == np.uint8
    if not good or pictures.shape[1] != pictures.shape[2] or not 1 <= pictures.shape[1] <= MAX_THUMBNAIL_PX:
        return None
    return {int(row): picture for row, picture in zip(rows, pictures, strict=True) if 0 <= row < count}


def _first(arrays: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise KeyError(f"none of {', '.join(names)}")


def _text(path: Path, notes: list[str]) -> str:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(path: Path, text: str, notes: list[str]) -> dict[str, Any]:
    """A JSON or YAML file's mapping; an unreadable one is noted and counts as empty."""
    import yaml

    if not text:
        return {}
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        notes.append(f"{path.name} is not readable.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no keys and values.")
        return {}
    return value


def _dotted(source: Mapping[str, Any], name: str) -> Any:
    place: Any = source
    for part in name.split("."):
        if not isinstance(place, Mapping) or part not in place:
            return None
        place = place[part]
    return place


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
