"""What fine-tunings scored on test micrographs: scores, confusion of classes, masks from the worst to the best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodist.report import figures
from nanodist.report.collect import Probe, Run
from nanodist.report.curves import method_name
from nanodist.report.markup import Markup, details, escaped, figure, image, missing, number, section, table

IMAGE_BYTES = 900_000  # what all overlays of a page may take together, before base64
MOST_OVERLAYS = 12
MOST_CLASSES = 40
MOST_MATRICES = 6
WHITE_FROM = 0.86  # where white text on a shade has the contrast of dark text: 4 to 1
_METRICS = (("dice", "Dice"), ("iou", "IoU"), ("boundary_f1", "Boundary F1"))


@dataclass(frozen=True)
class Result:
    """``scores.json`` of a fine-tuning, and its overlays."""

    run: Run
    data: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One of a classification; of a segmentation one a metric and class."""
        rows = self.data.get("rows")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def read_results(runs: Sequence[Run]) -> list[Result]:
    """The results that there are already."""
    found = []
    for run in runs:
        try:
            data = json.loads((run.path / "scores.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(data, dict):
            found.append(Result(run, data))
    return found


def scores(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """A row a fine-tuning; empty where no run is one."""
    if not any(run.kind in ("classification", "segmentation") for run in runs):
        return ""
    if not results:
        return section("results", "Test scores", missing("No scores.json yet: it is written when training ends."))
    parts = [_classifiers(results), _segmenters(results)]
    return section("results", "Test scores", "".join(parts))


def _classifiers(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        if one.data.get("kind") == "classification" and one.rows:
            row = one.rows[0]
            best = Markup(f'{_3(row.get("balanced_accuracy"))}<span class="interval">{_interval(row)}</span>')
            rest = [_3(row.get(name)) for name in ("macro_f1", "accuracy", "calibration_error")]
            budget = number(row.get("labels_per_class"))
            rows.append((one.run.name, budget, best, *rest, number(row.get("n_train")), number(row.get("n_test"))))
    head = ["run", "labels per class", "balanced accuracy", "macro F1", "accuracy", "calibration error", "n train"]
    caption = "Classification of unseen micrographs; intervals are 95 % bootstraps over test micrographs."
    return table([*head, "n test"], rows, caption) if rows else ""


def _segmenters(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        if one.data.get("kind") != "segmentation":
            continue
        classes = dict.fromkeys(str(row.get("class")) for row in one.rows)
        for name in sorted(classes, key=lambda c: c != "all but background"):
            mine = {row.get("metric"): row for row in one.rows if str(row.get("class")) == name}
            cells = [
                Markup(f'{_3(row.get("mean"))}<span class="interval">{_interval(row)}</span>')
                for row in (mine.get(metric, {}) for metric, _ in _METRICS)
            ]
            images = next((number(row.get("images")) for row in mine.values()), "–")
            rows.append((one.run.name, name, number(one.rows[0].get("masks")), *cells, images))
    head = ["run", "class", "labelled images", *[name for _, name in _METRICS], "test images"]
    reach = next((one.data.get("boundary_reach_px") for one in results if one.data.get("boundary_reach_px")), None)
    near = f" A boundary may be {number(reach)} px off." if reach else ""
    caption = (
        "Masks of whole unseen images: means with 95 % bootstraps over test micrographs. A class has the name or the "
        f"grey level that the masks give it; 'all but background' leaves out the first.{near}"
    )
    return table(head, rows, caption, label_columns=2) if rows else ""


def confusion(results: Sequence[Result], probes: Sequence[Probe]) -> str:
    """Confusion matrices of classifiers and of probes; empty where there is none."""
    drawn: list[tuple[str, list[str], Any]] = []
    for one in results:
        if "confusion" in one.data:
            drawn.append((f"{one.run.name}, test samples", _classes(one.data), one.data["confusion"]))
    for probe in probes:
        chosen = _quoted(probe)
        if chosen is not None:
            budget = chosen.get("labels_per_class")
            amount = "all labels" if budget == "all" else f"{number(budget)} labels per class"
            title = f"{chosen.get('encoder')}, {method_name(str(chosen.get('method'))).lower()}, {amount}"
            drawn.append((f"{title}; summed over splits and label draws", _classes(probe.data), chosen.get("counts")))
    good = [(title, names, counts) for title, names, counts in drawn if _is_square(counts, len(names))]
    if not good:
        return ""
    parts = [matrix(title, names, counts) for title, names, counts in good[:MOST_MATRICES]]
    if len(good) > MOST_MATRICES:
        parts.append(missing(f"{len(good) - MOST_MATRICES} more matrices are left out."))
    return section("confusion", "Confusion of classes", "".join(parts))


def matrix(title: str, names: Sequence[str], counts: Sequence[Sequence[float]]) -> str:
    """Counts (true class by row) as a table whose shade is the share of the row; text says the same."""
    if len(names) > MOST_CLASSES:
        return missing(f"{title}: {len(names)} classes are too many to draw; scores.json has the counts.")
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in names)
    body = []
    for name, row in zip(names, counts, strict=True):
        total = sum(row)
        cells = []
        for count in row:
            share = count / total if total else 0.0
            dark = " dark" if share > WHITE_FROM else ""
            cells.append(
                f'<td class="shade{dark}" style="--share:{share:.3f}"><b>{100 * share:.0f}</b>'
                f'<span class="interval">{number(int(count))}</span></td>'
            )
        body.append(f'<tr><th scope="row">{escaped(name)}</th>{"".join(cells)}</tr>')
    caption = f"{title}. A row is a true class: percent of its samples that were called so, and how many."
    return (
        f'<div class="scroll"><table class="matrix"><caption>{escaped(caption)}</caption>'
        f'<thead><tr><th scope="col">true \\ called</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def gallery(results: Sequence[Result]) -> str:
    """Test images with true and predicted outlines, the worst first; empty where no segmentation has any."""
    segmented = [one for one in results if one.data.get("kind") == "segmentation"][:MOST_MATRICES]
    parts = []
    for one in segmented:
        shown = _overlays(one.run.path / "report" / "overlays")[:MOST_OVERLAYS]
        if not shown:
            parts.append(missing(f"{one.run.name} has no overlays (report/overlays)."))
            continue
        share = IMAGE_BYTES // (len(shown) * len(segmented))
        tiles = []
        for row, file in shown:
            data = figures.picture(file.read_bytes(), share)
            if data is not None:
                words = f"{row.get('sample')}: IoU {_3(row.get('iou'))}, Dice {_3(row.get('dice'))}"
                tiles.append(figure(image(figures.data_uri(data), f"Outlines on {words}"), words))
        told = (
            f"{one.run.name}: {len(tiles)} of {number(_of(one))} test images by IoU without background, the worst "
            "first. Left the micrograph, right what is true (blue, full) and what was predicted (orange, dashed)."
        )
        parts.append(f'<p>{escaped(told)}</p><div class="gallery">{"".join(tiles)}</div>')
    return section("gallery", "Masks, the worst first", "".join(parts)) if parts else ""


def _overlays(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    try:
        listed = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return []
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    # Only the last part of a name, so that an index cannot point out of the folder.
    pairs = [(row, folder / Path(str(row.get("file"))).name) for row in rows]
    return [(row, file) for row, file in pairs if file.is_file()]


def _of(one: Result) -> Any:
    return one.rows[0].get("n_test") if one.rows else None


def _quoted(probe: Probe) -> dict[str, Any] | None:
    """The matrix of the first encoder's linear probe at 8 labels a class, or at the most there are."""
    rows = [row for row in probe.records("confusion") if row.get("encoder") == probe.encoder]
    rows = [row for row in rows if row.get("method") == "linear"] or rows
    return next((row for row in rows if row.get("labels_per_class") == 8), rows[-1] if rows else None)


def _classes(data: dict[str, Any]) -> list[str]:
    names = data.get("classes")
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_square(counts: Any, side: int) -> bool:
    good = isinstance(counts, list) and len(counts) == side > 0
    return good and all(
        isinstance(row, list) and len(row) == side and all(isinstance(v, int | float) and v >= 0 for v in row)
        for row in counts
    )


def details_of(results: Sequence[Result]) -> str:
    """Which checkpoint was tested."""
    rows = [(one.run.name, str(one.data.get("checkpoint", "–"))) for one in results]
    return details("Checkpoints that were tested", table(["run", "checkpoint"], rows)) if rows else ""


def _3(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _interval(row: dict[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return f"{low:.2f} to {high:.2f}" if isinstance(low, int | float) and isinstance(high, int | float) else ""
