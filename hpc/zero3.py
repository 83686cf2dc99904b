"""ZeRO 3, where weights too are there only while they are used: DeepSpeed reduces, states are reached through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpc.reduction import Gradients


class ShardedGradients(Gradients):
    """The gradients of ZeRO 3: a rank holds its share of each parameter's.

    Each pass reduces, in float32 like the other stages. DeepSpeed averages where the parts want a sum, so the engine
    multiplies the loss by the number of ranks.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def backward(self, run: Callable[[], None], last: bool) -> None:
        """See :class:`hpc.reduction.Gradients`."""
        run()

    def tensors(self) -> list[Tensor]:
        """See :class:`hpc.reduction.Gradients`."""
        return [part for group in self._zero.averaged_gradients.values() if group is not None for part in group]

    def stepped(self) -> None:
        """Forget what a parameter without a gradient in the next step would be stepped on again."""
        torch._foreach_zero_(self._held())

    def _held(self) -> list[Tensor]:
        return list(self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())

    def discard(self) -> None:
        """See :class:`hpc.reduction.Gradients`."""
        self._zero.zero_grad()
        for bucket in self._zero.ipg_buckets.values():
            bucket.clear_params()
        self._zero.averaged_gradients.clear()
        self.stepped()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, also where this rank holds none of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def read(zero: Any, parameter: nn.Parameter, slot: str | None = None) -> Tensor:
    """The whole float32 weight, or the optimizer's ``slot`` of it; collective."""
    return zero.get_full_hp_param(parameter, slot)  # type: ignore[no-any-return]


def write(zero: Any, parameter: nn.Parameter, value: Tensor, slot: str | None = None) -> None:
    """Put this rank's share of a whole ``value`` in; :func:`publish` then makes weights take effect.

    DeepSpeed's own setter fails where the number of elements is no multiple of the number of ranks.
    """
    share, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=slot)
    flat, start = value.flatten(), share.numel() * zero._get_param_partition_rank(parameter)
    own = flat[start : start + share.numel()]
    share.data[: own.numel()].copy_(own)
    share.data[own.numel() :].zero_()


def holders(zero: Any) -> list[Tensor]:
    """The flat tensors that the optimizer's state is kept by."""
    return list(zero.fp32_partitioned_groups_flat)


def publish(zero: Any) -> None:
    """Make the weights that the modules see those of the float32 shares; collective."""
    zero._partition_all_parameters()
    for number in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
