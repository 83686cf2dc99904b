"""Optimizers and their parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


def parameter_groups(
    module: nn.Module, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Weights (two or more dimensions) with decay, then biases and norm parameters without; of each first those that
    learn fastest.

    Args:
        module: what is not trained (``requires_grad`` is false) is left out.
        weight_decay: of the weights.
        scales: factor of the learning rate by parameter name, 1 where a name is missing; becomes ``lr_scale``.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            scale, plain = (scales or {}).get(name, 1.0), p.ndim <= 1
            made = {"params": [], "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale, "plain": plain}
            groups.setdefault((plain, -scale), made)["params"].append(p)
    return [groups[which] for which in sorted(groups)]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, lr: float, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over the trained parameters of ``module``; ``scales`` as :func:`parameter_groups`.

    LARS and LAMB leave biases and norm parameters out of decay and of the trust ratio, as their references do.
    """
    groups = parameter_groups(module, config.weight_decay, scales)
    for group in groups:
        if group.pop("plain") and config.name in ("lars", "lamb"):
            group["adapt"] = False
        group["lr"] = lr * group["lr_scale"]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    if config.name == "lars":
        return LARS(groups, lr, config.momentum, 0.0, config.trust_coefficient, config.momentum_order)
    if config.name == "lamb":
        return LAMB(groups, lr, config.betas)
    # Fused: one kernel over ZeRO's flat partition, also on the CPU, where the default is several times slower.
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
