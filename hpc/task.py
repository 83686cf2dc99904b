"""What a job kind gives the training loop, and what the loop needs of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from hpc.optimizers.schedule import factor
from hpc.sections import GuardConfig, OptimizerConfig, SavingConfig


class StepBatch(Protocol):
    """What the loop needs to know of a batch."""

    step: int
    keys: list[str]
    wait_seconds: float


class Task(Protocol):
    """What a job kind gives the loop. ``forward`` and ``loss`` are apart, since some losses couple the batch."""

    module: nn.Module

    def batches(self, start_step: int) -> Iterator[Any]:
        """This rank's part of every global batch from ``start_step`` on, without end."""
        ...

    def parts(self, batch: Any) -> list[Any]:
        """What ``forward`` takes, on the device, one part for each micro-batch."""
        ...

    def forward(self, model: Callable[..., Any], part: Any) -> dict[str, Tensor]:
        """Named outputs (n, ...) of ``model`` (the engine's forward) for this rank's samples of one micro-batch."""
        ...

    def replaying(self) -> AbstractContextManager[None]:
        """While it is open, a forward leaves no trace, such as statistics that were seen once already."""
        ...

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        """The loss of the global batch, the same on every rank; gradients as :mod:`hpc.collectives` says."""
        ...

    def ahead(self) -> None:
        """What can be begun for the next step while a GPU is busy with this one; may do nothing."""
        ...

    def after_step(self) -> None:
        """What moves once an optimizer step, such as running statistics."""
        ...

    def after_skipped_step(self) -> None:
        """Forget what the forward of a step that is not taken left behind."""
        ...

    def measures(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Figures for the log; every rank calls it on the same steps."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on data that is not trained on; collective; changes nothing in the training. ``score``: lower is
        better, where checkpoints are to be ranked by it."""
        ...

    def finished(self) -> bool:
        """Whether there is nothing to gain from more steps; the same on all ranks, and after a resume."""
        ...

    def epochs_done(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state beside the module's tensors, with a ``version``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; a mismatch raises ``CheckpointError`` with both values."""
        ...


@dataclass
class TrainState:
    """Where a run stands: optimizer steps done (a skipped one counts)."""

    step: int = 0


@dataclass(frozen=True)
class Plan:
    """What the loop needs of a recipe.

    Attributes:
        steps: optimizer steps of the whole run.
        global_batch_size: samples a step.
        log_every_steps: steps between lines of ``metrics.jsonl``; the first and the last step are always logged.
        evaluate_every_steps: steps between online evaluations; 0: none.
        non_finite: what follows a loss or a gradient that is not finite.
    """

    steps: int
    global_batch_size: int
    log_every_steps: int
    optimizer: OptimizerConfig
    saving: SavingConfig
    guard: GuardConfig = GuardConfig()
    evaluate_every_steps: int = 0
    non_finite: Literal["stop", "skip"] = "stop"

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step after ``step`` are done."""
        o = self.optimizer
        # A run that is cut short by an override should still reach its peak.
        warmup = min(o.warmup_steps, self.steps // 10)
        share = factor(step, o.decay_steps or self.steps, warmup, o.schedule, o.final_lr_factor)
        return o.peak_lr(self.global_batch_size) * share
