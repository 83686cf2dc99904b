"""One self-contained HTML page about one or more runs: nothing in it is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from hpc import atomic
from hpc.errors import UserError
from nanodist._version import __version__
from nanodist.report import accuracy, curves, sections
from nanodist.report.collect import Probe, Run, default_probes, read_probe, read_run
from nanodist.report.facts import facts
from nanodist.report.markup import escaped

# The browser itself then refuses to load anything or to run a script, whatever stands in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CONTENTS = (
    ("scores", "Accuracy"),
    ("labels", "Label efficiency"),
    ("map", "Map"),
    ("trained", "What was trained"),
    ("training", "Training"),
    ("views", "View pairs"),
    ("speed", "Throughput"),
    ("starts", "Starts"),
    ("recipe", "Recipe"),
)


def write_report(runs: Sequence[Path], out: Path, probes: Sequence[Path] | None = None) -> Path:
    """Write the page about ``runs`` to ``out`` and return ``out``.

    Args:
        runs: run directories, drawn over one another in this order.
        out: the HTML file; an older one is replaced once the new one is whole.
        probes: folders of ``nanodist probe``; ``None`` takes ``RUN/probe`` of each run that has one.

    Raises:
        UserError: a folder is not what it should be, or ``out`` cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out a file name, such as {out / 'report.html'}.")
    collected = distinct([read_run(Path(path)) for path in runs])
    measured = [read_probe(Path(path)) for path in (default_probes(collected) if probes is None else probes)]
    text = render(collected, measured)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(out, text)
    except OSError as error:
        raise UserError(f"The report cannot be written to {out}: {error}.") from error
    return out


def render(runs: Sequence[Run], probes: Sequence[Probe]) -> str:
    """The page as HTML; the same for the same files."""
    found = curves.accuracy_curves(probes, runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs[:4])}"
    if len(runs) > 4:
        title += ", …"
    body = "".join(
        (
            accuracy.scores(probes, found),
            accuracy.efficiency(probes, found),
            accuracy.maps(probes),
            sections.what_was_trained(runs),
            sections.training(runs),
            sections.views(runs),
            sections.speed(runs),
            sections.starts(runs),
            sections.recipes(runs),
        )
    )
    return shell(title, lead(runs), CONTENTS, body)


def shell(title: str, lead: str, contents: Sequence[tuple[str, str]], body: str) -> str:
    """A whole page around sections; ``contents`` are their ids and names."""
    style = resources.files("nanodist.report").joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{name}">{escaped(text)}</a>' for name, text in contents)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)} – nanodist report</title><style>\n{style}</style></head><body>"
        f'<header><h1>{escaped(title)}</h1><p class="lead">{escaped(lead)}</p><nav>{links}</nav></header>'
        f"<main>{body}</main><footer>Written by nanodist {escaped(__version__)} from the files of the run. "
        "The page needs no network.</footer></body></html>\n"
    )


def lead(runs: Sequence[Run]) -> str:
    """One sentence under the title: what was pretrained, with what, on what."""
    if len(runs) > 1:
        return "Self-supervised pretraining on electron micrographs: several runs compared."
    known = facts(runs[0])
    parts = [f"{known['Trunk'] or 'An encoder'} pretrained by {known['Objective'] or 'self-supervision'}"]
    if known["Steps"]:
        parts.append(f"{known['Steps']} steps")
    if known["Global batch"]:
        parts.append(f"batch {known['Global batch']}")
    if known["Store"]:
        parts.append(f"on {Path(str(known['Store'])).name}")
    return ", ".join(parts) + "."


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that differ: equal ones get a number."""
    seen: dict[str, int] = {}
    result = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        result.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} ({seen[run.name]})"))
    return result
