"""One optimizer step on one global batch."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hpc.engine import Engine
from hpc.gradient_cache import GradientCache
from hpc.task import Task


@dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        loss: of the global batch.
        gradient_norm: L2, over all parameters, before clipping; NaN where the loss was not finite.
        outputs: of this rank, detached.
        taken: whether the optimizer stepped; it does not where loss or gradient are not finite.
    """

    loss: float
    gradient_norm: float
    outputs: dict[str, Tensor]
    taken: bool

    def what_is_not_finite(self) -> str:
        """``the loss`` or ``the gradient``."""
        return "the gradient" if math.isfinite(self.loss) else "the loss"


def train_step(
    task: Task, engine: Engine, batch: Any, lr: float, own_work: AbstractContextManager[None] | None = None
) -> StepResult:
    """One step on one global batch; nothing is changed where its loss or gradient is not finite, on any rank.

    The loss is one value on all ranks and the gradient's norm is taken after the reduction, so all ranks decide alike.
    ``own_work`` is entered around what this rank does by itself.
    """
    engine.module.train()
    with own_work or nullcontext():
        parts = task.parts(batch)
    cache = GradientCache(task, engine, parts) if len(parts) > 1 else None
    outputs = cache.embed() if cache else task.forward(engine.forward, parts[0])
    loss = task.loss(outputs, batch)
    if cache:
        cache.backward(loss)
    else:
        engine.backward(loss)
    # A GPU still works on the backward pass here. The first number that is read waits for it.
    task.ahead()
    norm = engine.gradient_norm()
    value = float(loss.detach())
    norm = norm if math.isfinite(value) else math.nan
    taken = math.isfinite(norm)
    if taken:
        engine.step(lr)
        task.after_step()
    else:
        engine.discard()
        task.after_skipped_step()
    return StepResult(value, norm, {name: tensor.detach() for name, tensor in outputs.items()}, taken)
