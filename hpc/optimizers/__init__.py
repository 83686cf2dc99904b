"""Optimizers and their parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hpc.config import option
from hpc.optimizers.lamb import LAMB
from hpc.optimizers.lars import LARS, MomentumOrder


@dataclass(frozen=True)
class OptimizerConfig:
    """The section ``optimizer`` of a recipe."""

    name: Literal["adamw", "sgd", "lars", "lamb"] = option("adamw", "Which optimizer; lars and lamb: large batches.")
    lr: float = option(1e-3, "Peak learning rate, at lr_batch_size samples a step.", low=0.0)
    lr_batch_size: int = option(0, "lr is scaled by global_batch_size / lr_batch_size; 0 leaves it as it is.", low=0)
    weight_decay: float = option(0.05, "Decay of weights; biases and norms are left out.", low=0.0)
    momentum: float = option(0.9, "Momentum of SGD and LARS.", low=0.0, high=1.0)
    momentum_order: MomentumOrder = option(
        "lr_then_momentum",
        "LARS: its momentum sums steps (the paper, SimCLR), or gradients that lr multiplies after (Barlow Twins).",
    )
    trust_coefficient: float = option(0.001, "LARS: |weight| / |gradient| is multiplied by it.", low=0.0)
    betas: tuple[float, float] = option((0.9, 0.999), "Averages of AdamW and LAMB.", low=0.0, high=1.0)
    schedule: Literal["cosine", "constant"] = option("cosine", "What follows the warm-up.")
    warmup_steps: int = option(100, "Steps of linear warm-up, at most a tenth of the run.", low=0)
    final_lr_factor: float = option(0.01, "Share of the peak at the last step of the cosine.", low=0.0, high=1.0)
    clip_norm: float = option(0.0, "Largest global gradient norm (L2); 0 does not clip.", low=0.0)

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate after the warm-up for a batch of ``global_batch_size`` (linear scaling rule)."""
        return self.lr * (global_batch_size / self.lr_batch_size if self.lr_batch_size else 1.0)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weights (two or more dimensions) with decay; biases and norm parameters without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over the trained parameters of ``module``.

    LARS and LAMB leave biases and norm parameters out of decay and of the trust ratio, as their references do.
    """
    weights, others = parameter_groups(module, config.weight_decay)
    if config.name in ("lars", "lamb"):
        others["adapt"] = False
    groups = [g for g in (weights, others) if g["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    if config.name == "lars":
        return LARS(groups, lr, config.momentum, 0.0, config.trust_coefficient, config.momentum_order)
    if config.name == "lamb":
        return LAMB(groups, lr, config.betas)
    # Fused: one kernel over ZeRO's flat partition, also on the CPU, where the default is several times slower.
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
