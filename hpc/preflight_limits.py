"""What a run is predicted to take, against what the job has: time and memory."""

from __future__ import annotations

import torch

from hpc.environment import memory_bytes
from hpc.preflight import Finding, size_text
from hpc.topology import Topology

TIGHT = 0.85  # of the memory; the rest is for the framework, workspaces and fragmentation


def end(
    steps: int, batch: int, seconds_left: float | None, margin_s: float, images_per_s: float | None
) -> list[Finding]:
    """Predicted end against the time limit.

    Args:
        steps: that are left.
        batch: samples a step.
        seconds_left: until the job ends; ``None``: no limit is known.
        margin_s: how long before it a run saves and stops.
        images_per_s: of all ranks; ``None``: not known.
    """
    needed = None if images_per_s is None else steps * batch / images_per_s
    if seconds_left is None:
        return (
            [] if needed is None else [Finding("ok", f"{steps} steps left, about {_duration(needed)}; no time limit")]
        )
    usable, limit = seconds_left - margin_s, _duration(seconds_left)
    if usable <= 0 and steps:
        what = f"the job ends in {limit} and guard.margin_s={margin_s:g}: it would save and stop at once"
        return [Finding("error", f"{what}; ask for more time or lower the margin")]
    if needed is None:
        speed = f"{steps * batch / max(usable, 1):.0f} images/s over all ranks"
        return [Finding("ok", f"{steps} steps left in {limit}: to end in this job takes {speed}, which is not known")]
    if needed > usable:
        starts = int(-(-needed // usable))
        what = f"{steps} steps left take about {_duration(needed)}, the job ends in {limit}"
        return [Finding("warning", f"{what}: about {starts} starts; it saves, stops with code 75 and goes on")]
    return [Finding("ok", f"{steps} steps left take about {_duration(needed)} of {limit}")]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def fits(states: int, activations: int, have: int, where: str) -> list[Finding]:
    """Predicted memory of a rank against what it has.

    Args:
        states: bytes of weights, gradients and optimizer, which are certain.
        activations: bytes of what backward keeps, an estimate.
        have: bytes that there are.
        where: what these are, such as ``"of its GPU"``.
    """
    total = states + activations
    parts = f"{size_text(states)} weights, gradients and optimizer, {size_text(activations)} activations"
    what = f"predicted {size_text(total)} a rank ({parts}) of {size_text(have)} {where}"
    if states > have:
        return [Finding("error", f"{what}; more ranks with engine.zero_stage=2 take less each")]
    if total > TIGHT * have:
        return [Finding("warning", f"{what}; a smaller train.micro_batch_size takes less")]
    return [Finding("ok", what)]


def memory_of(device: torch.device, topology: Topology) -> tuple[int, str]:
    """Bytes that this rank may use on ``device``, and what they are."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "of its GPU"
    return memory_bytes() // topology.local_world_size, "of its share of the node"
