"""Objectives: pure functions of the two views' projections and a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hpc.collectives import Group
from hpc.config import option
from nanodist.objectives.barlow_twins import barlow_twins
from nanodist.objectives.nt_xent import nt_xent
from nanodist.objectives.vicreg import vicreg

__all__ = ["ObjectiveConfig", "barlow_twins", "build_objective", "nt_xent", "vicreg"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The section ``objective`` of a recipe."""

    name: Literal["simclr", "barlow_twins", "vicreg"] = option("simclr", "Which loss.")
    temperature: float = option(0.2, "SimCLR: divides the cosine similarities.", low=1e-3)
    form: Literal["nt_xent", "cross_view"] = option(
        "nt_xent", "SimCLR: negatives of a view are all other views, or only the other view's (cross_view)."
    )
    redundancy_weight: float = option(0.0051, "Barlow Twins: weight of the off-diagonal terms.", low=0.0)
    invariance_weight: float = option(25.0, "VICReg: weight of the views' mean squared difference.", low=0.0)
    variance_weight: float = option(25.0, "VICReg: weight of what standard deviations lack to 1.", low=0.0)
    covariance_weight: float = option(1.0, "VICReg: weight of the off-diagonal covariances.", low=0.0)


def build_objective(config: ObjectiveConfig) -> Callable[[Tensor, Tensor, Group, Tensor | None], Tensor]:
    """The loss of ``config`` as a function of (a, b, group, kin).

    ``kin`` (n,) numbers samples that must not be told apart; only SimCLR tells samples apart.
    """
    if config.name == "simclr":
        return lambda a, b, group, kin: nt_xent(a, b, config.temperature, group, kin, config.form)
    if config.name == "vicreg":
        weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)
        return lambda a, b, group, kin: vicreg(a, b, *weights, group)
    return lambda a, b, group, kin: barlow_twins(a, b, config.redundancy_weight, group)
