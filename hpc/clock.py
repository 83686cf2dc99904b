"""Rates and waiting times of the training loop."""

from __future__ import annotations

import time

from hpc.progress import Progress
from hpc.task import Plan


class Clock:
    """Rate, share of waiting for data, and the progress line. Saves and evaluations are not training time."""

    def __init__(self, plan: Plan, step: int, is_main: bool) -> None:
        self._batch = plan.global_batch_size
        self._bar = Progress(plan.steps, "training", "steps", enabled=is_main)
        self._bar.done = self._bar.first = step
        self._steps, self._waited, self._elapsed = 0, 0.0, 0.0
        self._began = time.monotonic()

    def restart(self) -> None:
        """Leave out what was done since the last step."""
        self._began = time.monotonic()

    def stepped(self, waited: float, loss: float) -> None:
        """One more step is done, which waited so many seconds for its data."""
        now = time.monotonic()
        self._steps, self._waited = self._steps + 1, self._waited + waited
        self._elapsed, self._began = self._elapsed + now - self._began, now
        self._bar.update(note=f"loss {loss:.4f}")

    def line(self, step: int) -> dict[str, float]:
        """Figures since the last line."""
        elapsed = max(self._elapsed, 1e-9)
        values = {
            "step": step,
            "samples_seen": step * self._batch,
            "images_per_s": self._steps * self._batch / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self._steps, self._waited, self._elapsed = 0, 0.0, 0.0
        return values

    def close(self) -> None:
        """End the progress line."""
        self._bar.close()
