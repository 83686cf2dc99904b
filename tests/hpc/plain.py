"""An engine without DeepSpeed: what the loop asks of one, in plain torch."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class PlainEngine:
    """Gradients are summed over micro-batches and over the ranks of ``group``."""

    def __init__(self, module: nn.Module, group: Any = None, rank: int = 0) -> None:
        self.module, self.zero_stage, self.device, self.group = module, 0, torch.device("cpu"), group
        self.topology = SimpleNamespace(is_main=rank == 0, rank=rank, host=f"node{rank}")
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
        self.rates: list[float] = []
        self.backwards: list[bool] = []

    def forward(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss, *, last=True):
        self.backwards.append(last)
        loss.backward()
        if last and self.group is not None:
            for parameter in self.module.parameters():
                dist.all_reduce(parameter.grad, group=self.group)

    def gradient_norm(self):
        return float(torch.stack([p.grad.norm() for p in self.module.parameters()]).norm())

    def step(self, lr):
        self.rates.append(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trust_ratios(self):
        return {}

    def discard(self):
        self.optimizer.zero_grad()


class Quadratic:
    """A task of one linear layer; ``bad_loss`` and ``bad_gradient`` are steps (from 0) at which these are NaN;
    ``enough`` evaluations finish it."""

    def __init__(self, bad_loss=(), bad_gradient=(), enough=99):
        torch.manual_seed(0)
        self.module, self.bad_loss, self.bad_gradient = nn.Linear(3, 1), bad_loss, bad_gradient
        self.moved = self.skipped = self.evaluated = 0
        self.enough = enough

    def batches(self, start_step):
        step = start_step
        while True:
            yield SimpleNamespace(step=step, keys=[f"s{step}-{i}" for i in range(20)], wait_seconds=0.0)
            step += 1

    def parts(self, batch):
        return [torch.full((4, 3), 1.0 + batch.step % 3)]

    def forward(self, model, part):
        return {"y": model(part)}

    def replaying(self):
        return nullcontext()

    def loss(self, outputs, batch):
        loss = outputs["y"].square().mean()
        if batch.step in self.bad_gradient:
            # sqrt has an infinite slope at 0, so that 0 times it is NaN while the value is finite.
            loss = loss + (outputs["y"] * 0).sum().sqrt()
        return loss * float("nan") if batch.step in self.bad_loss else loss

    def ahead(self):
        pass

    def after_step(self):
        self.moved += 1

    def after_skipped_step(self):
        self.skipped += 1

    def measures(self, outputs):
        return {"spread": float(outputs["y"].std())}

    def evaluate(self):
        self.evaluated += 1
        return {"eval_knn": 0.1 * self.evaluated, "score": -0.1 * self.evaluated}

    def finished(self):
        return self.evaluated >= self.enough

    def epochs_done(self, step):
        return step / 10

    def state_dict(self):
        return {"version": 1}

    def load_state_dict(self, state):
        assert state == {"version": 1}
