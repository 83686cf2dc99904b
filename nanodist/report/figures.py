"""The figures of a report: inline SVG whose ink follows the page's colours, and PNG for maps and pictures."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

# Okabe and Ito, Color Universal Design (2008), without black and with yellow last: it is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#F0E442")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Stand for "the page's text colour" and "its rule colour" in the SVG, and are replaced by CSS in :func:`svg`.
INK = "#010203"
RULE = "#040506"
# Points of all curves of a panel together; each has at least the second number, and one drawn faintly the third.
PANEL_POINTS, FEWEST_POINTS, FAINT_POINTS = 3000, 120, 24
FEW_POINTS = 6  # so few are marked one by one
OTHERS, FAINT = "other runs", "#9aa3ab"


@dataclass(frozen=True)
class Line:
    """One curve: a name for the legend, x and y (n,), an optional band (n,) each side, and its place in the order.

    ``faint`` ones are grey and share one entry of the legend.
    """

    name: str
    x: Array
    y: Array
    order: int
    low: Array | None = None
    high: Array | None = None
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its curves; ``ticks`` are (position, text) pairs for a budget axis."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    ticks: Sequence[tuple[float, str]] = ()
    floor: float | None = None
    ceiling: float | None = None
    reference: tuple[float, str] | None = None
    log_y: bool = False


def colour(order: int) -> str:
    """The colour of the ``order``-th thing; after eight they repeat with another line style."""
    return PALETTE[order % len(PALETTE)]


def style(order: int) -> str:
    """The line style that goes with :func:`colour`."""
    return STYLES[order // len(PALETTE) % len(STYLES)]


def thin(x: Array, y: Array, points: int) -> tuple[Array, Array]:
    """At most ``points`` means of neighbours in place of a long curve (n,)."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)
    count = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / count, np.add.reduceat(y, edges[:-1]) / count


def panels(drawn: Sequence[Panel], columns: int, width: float = 9.0, height: float = 2.7) -> str:
    """The panels as SVGs that stand side by side where there is room, under one legend.

    ``data-zoom`` tells the page's script where a panel lies and what its axes span, so that it can be zoomed.

    Args:
        drawn: what to draw.
        columns: side by side on a wide screen.
        width: of a row in inches, which sets how large its text is.
        height: of a panel in inches.
    """
    with settings():
        every = "".join(_panel_svg(panel, i, width / columns, height) for i, panel in enumerate(drawn))
    return f'{_legend(drawn)}<div class="panels" style="--columns:{columns}">{every}</div>'


def _panel_svg(panel: Panel, number: int, width: float, height: float) -> str:
    figure = new_figure(width, height)
    # Margins in inches, set by hand: matplotlib's layout engines draw every figure twice.
    figure.subplots_adjust(0.62 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.32 / height)
    ax = figure.add_subplot()
    _draw(ax, panel, number)
    text = svg(figure)
    for mark in ('id="', "url(#", 'href="#'):
        text = text.replace(mark, f"{mark}p{number}-")
    spans = [] if panel.ticks or panel.log_y else [_span(ax, number)]
    zoom = f' data-zoom="{html.escape(json.dumps(spans))}"' if spans else ""
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(panel.title)}"{zoom}', 1)


def _legend(drawn: Sequence[Panel]) -> str:
    """Names with their colours and strokes; nothing where there is only one."""
    marks: dict[str, str] = {}
    for line in (line for panel in drawn for line in panel.lines):
        stroke = "dashed" if line.dashed else {"-": "solid", ":": "dotted"}.get(style(line.order), "dashed")
        name, shown = (OTHERS, FAINT) if line.faint else (line.name, colour(line.order))
        marks.setdefault(name, f"border-top:3px {'solid' if line.faint else stroke} {shown}")
    if len(marks) < 2:
        return ""
    entries = (f'<li><span style="{look}"></span>{html.escape(name)}</li>' for name, look in marks.items())
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _span(ax: Axes, number: int) -> dict[str, Any]:
    """Where a panel lies in the SVG (left, top, right, bottom, in its units) and what its axes span."""
    figure = ax.figure
    wide, high = (72.0 * side for side in figure.get_size_inches())  # type: ignore[union-attr]
    box = ax.get_position()
    corners = (box.x0 * wide, (1 - box.y1) * high, box.x1 * wide, (1 - box.y0) * high)
    sides = {"x": ax.get_xlim(), "y": ax.get_ylim()}
    spans = {name: [float(f"{v:.7g}") for v in pair] for name, pair in sides.items()}
    return {"panel": number, "box": [round(v, 2) for v in corners], **spans}


def _draw(ax: Axes, panel: Panel, number: int) -> None:
    points = max(FEWEST_POINTS, PANEL_POINTS // max(1, sum(not line.faint for line in panel.lines)))
    ax.xaxis.set_gid(f"zoom-x-{number}")
    ax.yaxis.set_gid(f"zoom-y-{number}")
    shade = 0.16 if len(panel.lines) < 4 else 0.09
    for k, line in enumerate(sorted(panel.lines, key=lambda line: not line.faint)):
        gid = f"zoom-line-{number}-{k}"
        if line.faint:
            x, y = thin(line.x, line.y, FAINT_POINTS)
            ax.plot(x, y, color=FAINT, lw=0.6, alpha=0.55, label=OTHERS, gid=gid)
            continue
        x, y = (line.x, line.y) if line.low is not None else thin(line.x, line.y, points)
        marks: dict[str, Any] = {"marker": MARKERS[line.order % len(MARKERS)], "ms": 4.5} if panel.ticks else {}
        if len(x) <= FEW_POINTS and not marks:
            marks = {"marker": ".", "ms": 7}
        look = "--" if line.dashed else style(line.order)
        ax.plot(x, y, look, color=colour(line.order), lw=1.6, label=line.name, gid=gid, **marks)
        if line.low is not None and line.high is not None:
            ax.fill_between(x, line.low, line.high, color=colour(line.order), alpha=shade, lw=0)
    ax.set_title(panel.title, loc="left")
    ax.set_xlabel(panel.x_label)
    ax.yaxis.set_major_formatter(lambda value, _: tick(value))
    ax.grid(True, axis="y")
    if panel.log_y:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: tick(value))
    if panel.floor is not None:
        ax.set_ylim(panel.floor, _above(panel) if panel.ceiling is None else panel.ceiling)
    if panel.reference is not None:
        value, text = panel.reference
        ax.axhline(value, color=INK, lw=0.8, ls=(0, (1, 2)))
        ax.annotate(text, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if panel.ticks:
        ax.set_xscale("log", base=2)
        ax.set_xticks([p for p, _ in panel.ticks], [t for _, t in panel.ticks])
        ax.minorticks_off()


def _above(panel: Panel) -> float:
    """A top of the axis that leaves room over the highest point; 1 above the floor where all points lie on it."""
    floor = panel.floor or 0.0
    highest = max((float(np.nanmax(line.y)) for line in panel.lines if np.isfinite(line.y).any()), default=floor)
    return floor + 1.06 * (highest - floor) if highest > floor else floor + 1.0


def tick(value: float) -> str:
    """A short tick label: ``0.25``, ``1200``, ``5e-5``, with a true minus sign."""
    text = f"{value:.4g}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "\u2212")


def picture(data: bytes, max_bytes: int) -> bytes | None:
    """An image file as PNG (or, where that is over ``max_bytes``, JPEG of falling size); ``None`` if unreadable."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as source:
            image = source.convert("L" if source.mode in ("1", "L", "I", "I;16", "F") else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((1600, 4000))
    encoded = _encode(image, "PNG")
    while len(encoded) > max_bytes and min(image.size) > 32:
        encoded = _encode(image, "JPEG")
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5))
    return encoded


def data_uri(image: bytes) -> str:
    """PNG or JPEG bytes as a ``data:`` address."""
    kind = "jpeg" if image[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def svg(figure: Figure) -> str:
    """A figure as SVG to be set into HTML: no metadata, no name spaces, colours of the page for ink and rules."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", text)
    return text.replace(INK, "currentColor").replace(RULE, "var(--rule)")


def _encode(image: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 82}))
    return buffer.getvalue()


def settings() -> Any:
    """Matplotlib's settings for all figures, to be entered."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "nanodist",
            "font.family": "sans-serif",
            "font.size": 9.5,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": RULE,
            "grid.linewidth": 0.6,
            "text.parse_math": False,
        }
    )


def new_figure(width: float, height: float, face: str = "none", layout: Any = None) -> Figure:
    """An empty figure of ``width`` by ``height`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout, facecolor=face)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()
