"""One self-contained HTML page about one or more runs: nothing in it is fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from hpc import atomic
from hpc.errors import UserError
from nanodist._version import __version__
from nanodist.report import accuracy, curves, pair_sections, sections
from nanodist.report import results as results_sections
from nanodist.report.collect import Probe, Run, default_probes, read_probe, read_run
from nanodist.report.facts import TASKS, facts
from nanodist.report.markup import escaped
from nanodist.report.measured import Measured, default_measured, morphology, read_measured
from nanodist.report.pair_sections import stages
from nanodist.report.reproduce import again
from nanodist.report.results import read_results
from nanodist.report.sweep_files import is_sweep, joined, read_sweep
from nanodist.report.words import counted

# The browser itself then refuses to load anything, and to run any script but the page's own, whatever stands in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
_KINDS = {
    "pretrain": "self-supervised pretraining on electron micrographs",
    "classification": "fine-tuning for classification",
    "segmentation": "fine-tuning for segmentation",
    "pairvae": "PairVAE of scattering patterns and micrographs, in two stages",
}


def write_report(
    runs: Sequence[Path], out: Path, probes: Sequence[Path] | None = None, measured: Sequence[Path] | None = None
) -> Path:
    """Write the page about ``runs`` to ``out`` and return ``out``.

    Args:
        runs: run directories, drawn over one another in this order; or folders of sweeps and pipelines.
        out: the HTML file; an older one is replaced once the new one is whole.
        probes: folders of ``nanodist probe``; ``None`` takes ``RUN/probe`` of each run that has one.
        measured: folders of ``nanodist measure``; ``None`` takes ``RUN/measured`` of each run that has one.

    Raises:
        UserError: a folder is not what it should be, or ``out`` cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out a file name, such as {out / 'report.html'}.")
    text = _page([Path(path) for path in runs], probes, measured)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(out, text)
    except OSError as error:
        raise UserError(f"The report cannot be written to {out}: {error}.") from error
    return out


def _page(paths: Sequence[Path], probes: Sequence[Path] | None, measured: Sequence[Path] | None) -> str:
    sweeps = [path for path in paths if is_sweep(path)]
    if sweeps:
        if len(sweeps) < len(paths):
            other = next(path for path in paths if path not in sweeps)
            raise UserError(f"{other} is a run and {sweeps[0]} a sweep: a page is about one or the other.")
        from nanodist.report.sweep_page import render as render_sweeps

        return render_sweeps(joined([read_sweep(path) for path in sweeps]))
    collected = distinct([read_run(one) for path in paths for one in (stages(path) or [path])])
    found = default_probes(collected) if probes is None else [Path(path) for path in probes]
    folders = default_measured(collected) if measured is None else [Path(path) for path in measured]
    return render(collected, [read_probe(path) for path in found], [read_measured(path) for path in folders])


def render(runs: Sequence[Run], probes: Sequence[Probe], measured: Sequence[Measured] = ()) -> str:
    """The page as HTML; the same for the same files."""
    found = curves.accuracy_curves(probes, runs)
    first = [run.name for run in runs[:4]]
    title = first[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(first)}"
    title = title + ", …" if len(runs) > 4 else title
    pairs = pair_sections.homes(runs)
    if pairs and all(run.kind == "pairvae" for run in runs):
        title = ", ".join(folder.resolve().name for folder in pairs[:4]) + (", …" if len(pairs) > 4 else "")
    results = read_results(runs)
    # A probe is asked for where there is an encoder to be probed.
    probed = bool(probes) or any(run.kind == "pretrain" for run in runs)
    parts = (
        ("results", "Test scores", results_sections.scores(runs, results)),
        ("pairs", "Unseen specimens", pair_sections.scores(pairs)),
        ("grids", "Generated pairs", pair_sections.grids(pairs)),
        ("scores", "Accuracy", accuracy.scores(probes, found) if probed else ""),
        ("labels", "Label efficiency", accuracy.efficiency(probes, found) if probed else ""),
        ("confusion", "Confusion", results_sections.confusion(results, probes)),
        ("map", "Map", accuracy.maps(probes) if probed else ""),
        ("gallery", "Masks", results_sections.gallery(results)),
        ("morphology", "Morphology", morphology(measured)),
        ("trained", "What was trained", sections.what_was_trained(runs)),
        ("training", "Training", sections.training(runs)),
        ("views", "View pairs", sections.views(runs)),
        ("speed", "Throughput and cost", sections.speed(runs)),
        ("starts", "Starts", sections.starts(runs)),
        ("recipe", "Do it again", again(runs)),
    )
    contents = [(name, text) for name, text, body in parts if body]
    return shell(title, lead(runs), contents, "".join(body for _, _, body in parts))


def shell(title: str, lead: str, contents: Sequence[tuple[str, str]], body: str) -> str:
    """A whole page around sections; ``contents`` are their ids and names."""
    here = resources.files("nanodist.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    links = "".join(f'<a href="#{name}">{escaped(text)}</a>' for name, text in contents)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)} – nanodist report</title><style>\n{style}</style></head><body>"
        f'<header><h1>{escaped(title)}</h1><p class="lead">{escaped(lead)}</p>'
        f'<nav aria-label="Contents">{links}</nav></header>'
        f"<main>{body}</main><footer>Written by nanodist {escaped(__version__)} from the files of the run. "
        f"The page needs no network.</footer><script>{script}</script></body></html>\n"
    )


def lead(runs: Sequence[Run]) -> str:
    """One sentence under the title: what was pretrained, with what, on what."""
    kinds = list(dict.fromkeys(_KINDS[run.kind] for run in runs))
    if len(runs) == 1 and runs[0].kind in TASKS:
        return _fine_tuned(runs[0])
    if len(runs) > 1 or runs[0].kind != "pretrain":
        told = " and ".join(kinds)
        compared = len({run.recipe_of() for run in runs}) > 1
        return f"{told[:1].upper()}{told[1:]}{': several runs compared' if compared else ''}."
    known = facts(runs[0])
    parts = [f"{known['Trunk'] or 'An encoder'} pretrained by {known['Objective'] or 'self-supervision'}"]
    if known["Steps"]:
        parts.append(f"{known['Steps']} steps")
    if known["Global batch"]:
        parts.append(f"batch {known['Global batch']}")
    if known["Store"]:
        parts.append(f"on {Path(str(known['Store'])).name}")
    return ", ".join(parts) + "."


def _fine_tuned(run: Run) -> str:
    known = facts(run)
    source = known["Starting encoder"] or known["Trunk"] or "an encoder"
    scratch = known["Weights at the start"] == "random"
    parts = [f"{run.kind.capitalize()} with {source}{', from random weights' if scratch else ' fine-tuned'}"]
    for label, thing in (("Labelled images", "labelled images"), ("Labels per class", "labels per class")):
        parts += [counted(known[label], thing)] if known[label] is not None else []
    parts += [f"{known['Steps']} steps"] if known["Steps"] else []
    parts += [f"on {Path(str(known['Store'])).name}"] if known["Store"] else []
    return ", ".join(parts) + "."


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that differ: equal ones get a number."""
    seen: dict[str, int] = {}
    result = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        result.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} ({seen[run.name]})"))
    return result
