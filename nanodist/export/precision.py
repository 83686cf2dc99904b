"""In what numbers an export holds and computes its weights, and how far its answers may then be from the run's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hpc.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Relative to the largest number of an answer. fp32: the same weights through other kernels, 1e-7 to 1e-6 was seen; a
# wrong weight, argument or preprocessing gives 1e-3 and more. fp16: a weight is rounded by up to 5e-4 of itself, and so
# is each layer's answer where a graph computes in it; 3e-4 to 8e-3 was seen, most in a segmentation.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-2}
LARGEST = 65504.0


def require_half(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Refuse weights that are too large for fp16.

    Raises:
        UserError: one is; names it.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and value.numel() and float(value.detach().abs().max()) > LARGEST:
            raise UserError(
                f"weight {key} of {name} is too large for fp16 ({LARGEST:.0f}): export with --precision fp32"
            )


def rounded(tensors: dict[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """``tensors`` with their floating-point numbers in ``precision``."""
    return {key: value.to(DTYPES[precision]) if value.is_floating_point() else value for key, value in tensors.items()}


class Held(nn.Module):
    """A graph whose weights are held in fp16 and that computes in float32, for numbers that fp16 does not span.

    Args:
        graph: in float32; it stays as it is.
    """

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self._graph = [graph]  # in a list, since its own weights are not of this module
        self._names = {name: f"held_{k}" for k, (name, _) in enumerate(graph.named_parameters())}
        for name, value in graph.named_parameters():
            self.register_buffer(self._names[name], value.detach().half())

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the graph answers with the rounded weights."""
        weights = {name: getattr(self, held).float() for name, held in self._names.items()}
        return torch.func.functional_call(self._graph[0], weights, inputs)
