"""The buckets of :mod:`hpc.reduction`, without ranks and without gradients: what they hold while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hpc.reduction import BUCKET_BYTES, IN_FLIGHT, _Bucket, _buckets, _Slot


class PretendedBuckets:
    """Makes and drops buckets when :class:`hpc.reduction.PartitionedGradients` at ZeRO 2 does, from hooks.

    A bucket is made with its first gradient, and the oldest is dropped once more than ``IN_FLIGHT`` are full.

    Args:
        parameters: those that are trained, in the order of the module; real or fake.
        groups: the number of the optimizer's group of each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[int]) -> None:
        offsets: dict[int, int] = {}
        slots = []
        for parameter, group in zip(parameters, groups, strict=True):
            slots.append(_Slot(parameter, group, offsets.setdefault(group, 0)))
            offsets[group] += parameter.numel()
        self._order, self._launched = _buckets(slots, BUCKET_BYTES), 0
        self._handles = []
        for bucket in self._order:
            bucket.missing = len(bucket.slots)
            for slot in bucket.slots:
                self._handles.append(slot.parameter.register_post_accumulate_grad_hook(self._hook(bucket)))

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            if bucket.buffer is None:
                bucket.buffer = parameter.new_empty(bucket.stop - bucket.start)
            parameter.grad = None
            bucket.missing -= 1
            self._drop_full()

        return ready

    @torch.no_grad()
    def _drop_full(self) -> None:
        while self._launched < len(self._order) and not self._order[self._launched].missing:
            self._launched += 1
            if self._launched > IN_FLIGHT:
                self._order[self._launched - 1 - IN_FLIGHT].buffer = None

    def sizes(self) -> list[int]:
        """Elements of each bucket."""
        return [bucket.stop - bucket.start for bucket in self._order]

    def close(self) -> None:
        """Drop everything."""
        for handle in self._handles:
            handle.remove()
        for bucket in self._order:
            bucket.buffer = None
