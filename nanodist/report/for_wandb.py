"""What W&B is shown of a probe: numbers for its summary, and pictures of the report's figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nanodist.report import curves, maps
from nanodist.report.collect import Probe, read_probe
from nanodist.report.figures import colour, new_figure, png, settings, style


def of_probe(folder: Path) -> tuple[dict[str, float], dict[str, bytes]]:
    """Figures ``probe/METHOD/BUDGET`` of the probed encoder, and PNGs by name: the curve, and the map if there is one.

    Args:
        folder: that ``nanodist probe`` wrote.
    """
    probe = read_probe(folder)
    figures = {
        f"probe/{row['method']}/{row['labels_per_class']}": float(row["mean"])
        for row in probe.summary
        if row.get("encoder") == probe.encoder and row.get("mean") is not None
    }
    pictures = {"pictures/label-efficiency": _curve(probe)}
    if probe.features is not None and probe.labels is not None:
        chosen, points, _ = maps.lay_out(probe.features)
        pictures["pictures/embeddings-map"] = maps.embedding_map(points, [str(probe.labels[i]) for i in chosen])
    return figures, pictures


def _curve(probe: Probe) -> bytes:
    """Accuracy over labels per class with intervals, the linear probe where there is one."""
    found = curves.accuracy_curves([probe], [])
    chance = probe.data.get("chance")
    panels = curves.accuracy_panels(found, chance if isinstance(chance, float) else None)
    with settings():
        figure = new_figure(5.2 * max(1, len(panels)), 3.8, face="white", layout="constrained")
        for place, panel in enumerate(panels):
            ax = figure.add_subplot(1, len(panels), place + 1)
            for line in panel.lines:
                look = "--" if line.dashed else style(line.order)
                ax.plot(line.x, line.y, look, marker="o", color=colour(line.order), label=line.name)
                if line.low is not None and line.high is not None and np.isfinite(line.low).any():
                    ax.fill_between(line.x, line.low, line.high, color=colour(line.order), alpha=0.16, lw=0)
            ax.set(title=panel.title, xlabel=panel.x_label, ylabel="balanced accuracy", ylim=(0, panel.ceiling))
            ax.set_xscale("log", base=2)
            ax.set_xticks([p for p, _ in panel.ticks], [t for _, t in panel.ticks])
            ax.minorticks_off()
            ax.legend(frameon=False)
        return png(figure)
