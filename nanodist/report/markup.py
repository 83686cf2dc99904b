"""HTML pieces in which every text from outside is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TALL = 40  # rows; longer tables scroll in themselves


@dataclass(frozen=True)
class Markup:
    """Text that is HTML already, so that :func:`escaped` leaves it alone."""

    text: str


def escaped(value: Any) -> str:
    """``value`` as HTML: :class:`Markup` as it is, everything else with ``<``, ``&`` and quotes made harmless."""
    return value.text if isinstance(value, Markup) else html.escape(str(value))


def number(value: Any, digits: int = 4) -> str:
    """A number for a table: thousands apart, few digits, a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def cell(value: Any) -> str:
    """A value or a list of values for a table; a long list is cut."""
    if isinstance(value, list):
        shown = ", ".join(number(item) for item in value[:12])
        return shown + (f", … ({len(value)} in all)" if len(value) > 12 else "")
    return number(value)


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "", label_columns: int = 1, sort: bool = True
) -> str:
    """A table that scrolls sideways on a narrow screen; the first ``label_columns`` cells of a row are its head.

    One with a heading and three rows or more can be sorted by a click on the heading, unless ``sort`` is false.
    """
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = []
    for row in rows:
        cells = [
            f'<th scope="row">{escaped(cell)}</th>' if index < label_columns else f"<td>{escaped(cell)}</td>"
            for index, cell in enumerate(row)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    mark = ' class="sortable"' if sort and head and len(body) > 2 else ""
    tall = " tall" if len(body) > TALL else ""
    return f'<div class="scroll{tall}"><table{mark}>{title}{header}<tbody>{"".join(body)}</tbody></table></div>'


def figure(content: str, caption: str, wide: bool = False) -> str:
    """SVG or an ``img`` with its caption; a ``wide`` one keeps its size on a phone, and scrolls in itself."""
    if wide:
        told = f"<figcaption>{escaped(caption)}</figcaption>"
        return f'<figure class="wide"><div class="pan">{content}</div>{told}</figure>'
    return f"<figure>{content}<figcaption>{escaped(caption)}</figcaption></figure>"


def inline_svg(svgs: str, alternative: str, prefix: str) -> str:
    """SVGs for the page: named together for screen readers, their ids made unique by ``prefix``."""
    for mark in ('id="', "url(#", 'href="#'):
        svgs = svgs.replace(mark, f"{mark}{prefix}-")
    return f'<div role="group" aria-label="{escaped(alternative)}">{svgs}</div>'


def image(address: str, alternative: str) -> str:
    """An ``img`` from a ``data:`` address."""
    return f'<img src="{address}" alt="{escaped(alternative)}">'


def details(summary: str, content: str) -> str:
    """Content that is folded away on the screen and shown in print."""
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def missing(text: str) -> str:
    """A plain sentence where a part is not there."""
    return f'<p class="missing">{escaped(text)}</p>'


def section(identifier: str, title: str, content: str) -> str:
    """A titled section that the navigation can jump to."""
    return f'<section id="{identifier}"><h2>{escaped(title)}</h2>{content}</section>'
