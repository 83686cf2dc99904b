"""A global batch that is larger than the memory of the ranks, under a loss that couples its samples.

All micro-batches are embedded without a graph; the loss of the whole batch gives the gradient of every embedding;
then each micro-batch passes again, with a graph, and hands its share on to the parameters (Gao et al. 2021, *Scaling
Deep Contrastive Learning Batch Size under Memory Limited Setup*). Loss and gradient are those of the undivided batch.
Accumulating the losses of micro-batches would be another objective: each sample would be told from fewer others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc.engine import Engine
from hpc.task import Task


class GradientCache:
    """The two passes of one step over the micro-batches ``parts`` of this rank."""

    def __init__(self, task: Task, engine: Engine, parts: list[Any]) -> None:
        self._task, self._engine, self._parts = task, engine, parts
        self._rows: list[int] = []
        self.outputs: dict[str, Tensor] = {}

    def embed(self) -> dict[str, Tensor]:
        """Outputs (n, ...) of all micro-batches, end to end, as leaves that the loss gives a gradient."""
        with torch.no_grad():
            made = [self._task.forward(self._engine.forward, part) for part in self._parts]
        self._rows = [len(next(iter(part.values()))) for part in made]
        self.outputs = {name: torch.cat([part[name] for part in made]).requires_grad_() for name in made[0]}
        return self.outputs

    def backward(self, loss: Tensor) -> None:
        """Parameter gradients of ``loss``, which was computed from the outputs of :meth:`embed`."""
        loss.backward()  # type: ignore[no-untyped-call]
        given = {name: leaf.grad for name, leaf in self.outputs.items()}
        shares = {name: g.split(self._rows) for name, g in given.items() if g is not None}
        last = len(self._parts) - 1
        with self._task.replaying():
            for number, part in enumerate(self._parts):
                again = self._task.forward(self._engine.forward, part)
                # Its gradient with respect to an output is that output's share, to the last bit.
                products = [(again[name] * share[number]).sum() for name, share in shares.items()]
                self._engine.backward(torch.stack(products).sum(), last=number == last)
