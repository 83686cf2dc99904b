"""Progress of long work on a terminal: rate and time left; silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; ``3700`` -> ``1:01:40``."""
    whole = int(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """One line on standard error that is drawn over, at most five times a second.

    Args:
        total: how many units there are in all.
        what: what is being done, such as ``"packing"``.
        unit: plural of what is counted, such as ``"micrographs"``.
        enabled: ``None`` draws only on a terminal; pass ``False`` on ranks other than 0.
    """

    def __init__(self, total: int, what: str, unit: str = "", enabled: bool | None = None) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self.first = 0  # what was done before the clock started, as at a resume
        self.note = ""
        self._start = time.monotonic()
        self._drawn = 0.0
        self._enabled = sys.stderr.isatty() if enabled is None else enabled and sys.stderr.isatty()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units as done; ``note`` (such as a loss) follows the figures."""
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if self._enabled and (now - self._drawn > 0.2 or self.done >= self.total):
            self._drawn = now
            self._draw(now - self._start)

    def _draw(self, elapsed: float) -> None:
        rate = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        line = f"{self.what} {self.done}/{self.total} {self.unit} {rate:.1f}/s, {duration(left)} left {self.note}"
        sys.stderr.write("\r" + line.ljust(100)[:140])
        sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._enabled and self._drawn:
            sys.stderr.write("\n")
            sys.stderr.flush()


def track(items: Iterable[T], total: int, what: str, unit: str = "") -> Iterator[T]:
    """Yield ``items`` while a :class:`Progress` line counts them."""
    bar = Progress(total, what, unit)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()
