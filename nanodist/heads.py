"""Projectors: the multi-layer perceptrons between trunk and objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hpc.config import option


@dataclass(frozen=True)
class ProjectorConfig:
    """The section ``projector`` of a recipe."""

    widths: list[int] = option([512, 512, 128], "Width of each layer; the last is the size of a projection.", low=1)
    batch_norm: bool = option(True, "BatchNorm after every layer but the last.")
    last_batch_norm: bool = option(False, "BatchNorm after the last layer too.")

    def check(self) -> None:
        """Raise ``ValueError`` where there is no layer."""
        if not self.widths:
            raise ValueError("widths needs at least one layer")


def build_projector(in_features: int, config: ProjectorConfig, seed: int) -> nn.Sequential:
    """Linear-BN-ReLU layers and a last linear one; weights depend only on ``seed``."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, width in enumerate(config.widths):
            last = i == len(config.widths) - 1
            norm = config.last_batch_norm if last else config.batch_norm
            layers.append(nn.Linear(in_features, width, bias=not norm))
            if norm:
                layers.append(nn.BatchNorm1d(width))
            if not last:
                layers.append(nn.ReLU(inplace=True))
            in_features = width
    return nn.Sequential(*layers)
