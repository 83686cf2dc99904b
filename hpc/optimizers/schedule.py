"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def factor(step: int, total_steps: int, warmup_steps: int, kind: str, final_factor: float) -> float:
    """The share of the base learning rate at ``step`` (0 for the first).

    Linear warm-up that reaches 1 at step ``warmup_steps``, never 0; then ``"cosine"`` down to ``final_factor`` at the
    last step, or ``"constant"``.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
