"""Optimizers and their parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hpc.optimizers.lamb import LAMB
from hpc.optimizers.lars import LARS
from hpc.sections import OptimizerConfig


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
