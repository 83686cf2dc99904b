"""The sections on a PairVAE: what it scored on unseen specimens, its grids, intensity curves and latent space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanodist.report import figures
from nanodist.report.collect import Run
from nanodist.report.markup import Markup, details, escaped, figure, image, missing, number, section, table
from nanodist.report.words import pair_score

IMAGE_BYTES = 1_200_000  # what all grids of a page may take together, before base64
MOST_MODELS = 6
_GRIDS = (
    (
        "saxs-to-sem.png",
        "SAXS to SEM",
        "each row an unseen specimen: the scattering pattern that was given, the true micrograph, three draws of the "
        "model, how far its draws differ, and what the nearest training pattern and a random field with the same "
        "scattering would have given",
    ),
    (
        "sem-to-saxs.png",
        "SEM to SAXS",
        "each row an unseen specimen: the micrograph that was given, the true pattern, the generated one, and that of "
        "the nearest training specimen",
    ),
    ("iq.png", "I(q)", "azimuthal means of true, generated and nearest patterns of unseen specimens"),
    ("latent.png", "Latent space", "patterns in the latent space by their period; ringed ones were never trained on"),
)
_STEMS = tuple(name.removesuffix(".png") for name, _, _ in _GRIDS)


def stages(path: Path) -> list[Path]:
    """The run directories of the stages of a PairVAE; empty where ``path`` is none."""
    return [path / name for name in ("solo", "pair") if (path / name / "run.json").is_file()]


def homes(runs: Sequence[Run]) -> list[Path]:
    """The folders of the PairVAEs among ``runs``, each once."""
    return list(dict.fromkeys(run.path.parent for run in runs if run.kind == "pairvae"))


def scores(folders: Sequence[Path]) -> str:
    """Medians with intervals by direction and method; empty where there is no PairVAE."""
    if not folders:
        return ""
    parts: list[str] = []
    every: list[dict[str, Any]] = []
    for folder in folders[:MOST_MODELS]:
        rows, items = _rows(folder / "evaluation" / "scores.json")
        if not rows:
            parts.append(
                missing(
                    f"{folder.name} is not evaluated yet: run 'nanodist pairvae evaluate RUN --out RUN/evaluation'."
                )
            )
            continue
        every += rows
        for direction in dict.fromkeys(str(row.get("direction")) for row in rows):
            parts.append(
                _table(folder.name, direction, [r for r in rows if str(r.get("direction")) == direction], items)
            )
    return section("pairs", "Unseen specimens", "".join(parts) + _meanings(every))


def _rows(file: Path) -> tuple[list[dict[str, Any]], Any]:
    try:
        data = json.loads(file.read_bytes())
        return [row for row in data["rows"] if isinstance(row, dict)], data.get("items")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], None


def _table(name: str, direction: str, rows: Sequence[dict[str, Any]], items: Any) -> str:
    metrics = list(dict.fromkeys(str(row.get("score")) for row in rows))
    methods = list(dict.fromkeys(str(row.get("method")) for row in rows))
    known = {(str(row.get("method")), str(row.get("score"))): row for row in rows}
    # Rebuilding an item from itself is another task, and the truth is no method.
    ranked = [name for name in methods if "(" not in name and not name.startswith("the true")]
    best = {}
    for metric in metrics:
        values = [_median(known.get((method, metric))) for method in ranked]
        best[metric] = min((value for value in values if value is not None), default=None)
    body = []
    for method in methods:
        cells = []
        for metric in metrics:
            row = known.get((method, metric))
            value = _median(row)
            if row is None or value is None:
                cells.append(Markup("–"))
                continue
            mark = ' class="best"' if value == best[metric] and method in ranked else ""
            cells.append(Markup(f"<span{mark}>{_in(metric, value, 3)}</span>{_interval(metric, row)}"))
        body.append((method, *cells))
    caption = (
        f"{name}, {direction}: medians of errors over {number(items)} unseen items with 95 % intervals over specimens; "
        "lower is better, bold the best. Methods in brackets rebuild an item from itself, so they are no rivals."
    )
    known_by = [pair_score(metric) for metric in metrics]
    head = ["method", *[f"{one.name} ({one.unit})" if one.unit else one.name for one in known_by]]
    return table(head, body, caption)


def _meanings(rows: Sequence[dict[str, Any]]) -> str:
    found = (pair_score(name) for name in dict.fromkeys(str(row.get("score")) for row in rows))
    meant = [(one.name, one.meaning) for one in found if one.meaning]
    return details("What the columns mean", f'<div class="wrap facts">{table([], meant)}</div>') if meant else ""


def _median(row: dict[str, Any] | None) -> float | None:
    value = None if row is None else row.get("median")
    return float(value) if isinstance(value, int | float) else None


def _in(metric: str, value: Any, digits: int) -> str:
    """A score in the unit of its column."""
    if not isinstance(value, int | float):
        return "–"
    if pair_score(metric).unit != "%":
        return number(value, digits)
    return f"{100 * value:.{0 if value >= 1 else 1}f}"


def _interval(metric: str, row: dict[str, Any]) -> str:
    low, high = (_in(metric, row.get(name), 2) for name in ("low", "high"))
    return f'<span class="interval">{escaped(f"{low} to {high}")}</span>'


def grids(folders: Sequence[Path]) -> str:
    """Both directions, I(q) and the latent space, and the last reconstructions of training."""
    if not folders:
        return ""
    parts, share = [], IMAGE_BYTES // (5 * min(len(folders), MOST_MODELS))
    for folder in folders[:MOST_MODELS]:
        shown = [(folder / "evaluation" / name, title, told) for name, title, told in _GRIDS]
        drawn = sorted((folder / "pair" / "pictures").glob("reconstructions-*.png"))
        told = "held-out pairs at the end of training: given, rebuilt from itself, and made from the other member"
        shown += [(drawn[-1], "Reconstructions", told)] if drawn else []
        found = [_picture(folder.name, *one, share) for one in shown if one[0].is_file()]
        parts += found or [missing(f"{folder.name} has no pictures yet.")]
    return section("grids", "Generated pairs", "".join(parts))


def _picture(name: str, file: Path, title: str, told: str, share: int) -> str:
    data = figures.picture(file.read_bytes(), 3 * share if "to" in file.stem else share)
    if data is None:
        return missing(f"{file.name} of {name} is no image.")
    shown = image(figures.data_uri(data), f"{title}, {name}: {told}")
    # On paper each has a height of its own, so that the plainer ones share pages.
    stem = file.stem if file.stem in _STEMS else "reconstructions"
    content = figure(shown, f"{name}: {told}.", wide=file.stem != "latent")
    return f'<div class="shot {stem}"><h3>{escaped(title)}</h3>{content}</div>'
