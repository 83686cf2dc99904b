"""Sums of gradients over ranks, the same way at ZeRO 0, 1 and 2.

DeepSpeed reduces each stage by other code, with more copies and after the backward pass. Here all stages share one:
a gradient is copied into its bucket as soon as it is there, in the dtype of its parameter, and a full bucket is summed
while the backward pass goes on. At ZeRO 0 every rank gets the sums; at 1 and 2 the rank does that owns the part of
DeepSpeed's flat partition, which DeepSpeed's optimizer then takes as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
# Buckets of ZeRO 2 that are being reduced at once; older ones are waited for and given back.
IN_FLIGHT = 2


@dataclass
class _Slot:
    """Where the gradient of a parameter lies in the flat gradient of its group."""

    parameter: nn.Parameter
    group: int
    offset: int
    ready: bool = False


@dataclass
class _Bucket:
    """A contiguous range of one group's flat gradient, which is reduced at once."""

    group: int
    start: int
    stop: int
    slots: list[_Slot] = field(default_factory=list)
    missing: int = 0
    buffer: Tensor | None = None
    works: list[Any] = field(default_factory=list)

    def add(self, slot: _Slot) -> None:
        """Extend the range to one more parameter."""
        self.slots.append(slot)
        self.start = min(self.start, slot.offset)
        self.stop = max(self.stop, slot.offset + slot.parameter.numel())

    def wait(self) -> None:
        """Until the reduction is done."""
        for work in self.works:
            work.wait()
        self.works.clear()


def _as_parameter(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """A view of ``flat`` with the shape of ``parameter``, and its strides (fused optimizers walk over the storage)."""
    return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())


def _buckets(slots: list[_Slot], limit_bytes: int) -> list[_Bucket]:
    """Buckets in the order in which backward fills them: from the last parameter to the first."""
    closed: list[_Bucket] = []
    opened: dict[int, _Bucket] = {}
    for slot in reversed(slots):
        bucket = opened.setdefault(slot.group, _Bucket(slot.group, slot.offset, slot.offset))
        bucket.add(slot)
        if (bucket.stop - bucket.start) * slot.parameter.element_size() >= limit_bytes:
            closed.append(opened.pop(slot.group))
    return closed + list(opened.values())


class Gradients(ABC):
    """What the engine asks of the gradients of a stage."""

    @abstractmethod
    def backward(self, run: Callable[[], None], last: bool) -> None:
        """Call ``run``, which is one backward pass; the sums over the ranks are there once the ``last`` one is."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The gradients that this rank holds after the reduction."""

    def stepped(self) -> None:  # noqa: B027  # most have nothing to do
        """The optimizer has used them."""

    @abstractmethod
    def discard(self) -> None:
        """Drop everything."""


class LoneGradients(Gradients):
    """ZeRO 0 on one rank: the gradients stay where autograd puts them, since there is nobody to sum them with.

    Args:
        parameters: those that are trained.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def backward(self, run: Callable[[], None], last: bool) -> None:
        """See :class:`Gradients`."""
        run()

    def tensors(self) -> list[Tensor]:
        """See :class:`Gradients`."""
        return _gradients_of(self._parameters)

    def discard(self) -> None:
        """See :class:`Gradients`."""
        for parameter in self._parameters:
            parameter.grad = None


def _gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The ``grad`` of each, zeros where the loss left a parameter out."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class _Bucketed(Gradients):
    """Hooks, buckets and their order, which must be one and the same on all ranks."""

    def __init__(self, slots: list[_Slot], group: Any, every_pass: bool) -> None:
        self._slots, self._group, self._every_pass = slots, group, every_pass
        self._order = _buckets(slots, BUCKET_BYTES)
        self._armed, self._launched = False, 0
        for bucket in self._order:
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(self._hook(slot, bucket))

    def _hook(self, slot: _Slot, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if self._armed:
                self._fill(slot, bucket)
                self._launch_full()

        return ready

    def backward(self, run: Callable[[], None], last: bool) -> None:
        self._armed = last or self._every_pass
        if not self._armed:
            run()
            return
        self._launched = 0
        for bucket in self._order:
            bucket.missing = len(bucket.slots)
            for slot in bucket.slots:
                slot.ready = False
        run()
        self._armed = False
        for bucket in self._order:
            for slot in bucket.slots:
                if not slot.ready:
                    self._fill(slot, bucket)
        self._launch_full()
        for bucket in self._order:
            bucket.wait()
            self._reduced(bucket)

    @torch.no_grad()
    def _fill(self, slot: _Slot, bucket: _Bucket) -> None:
        """Take a gradient over; one that did not come, of a parameter that the loss leaves out, is zero."""
        if slot.ready:
            raise RuntimeError("a gradient came twice in one backward pass; use checkpointing without re-entry")
        parameter, room = slot.parameter, _as_parameter(self._room(slot, bucket), slot.parameter)
        if parameter.grad is None:
            room.zero_()
        else:
            room.copy_(parameter.grad)
        parameter.grad = self._left_behind(room)
        slot.ready = True
        bucket.missing -= 1

    def _launch_full(self) -> None:
        while self._launched < len(self._order) and not self._order[self._launched].missing:
            self._reduce(self._order[self._launched])
            self._launched += 1
            if self._every_pass and self._launched > IN_FLIGHT:
                done = self._order[self._launched - 1 - IN_FLIGHT]
                done.wait()
                self._reduced(done)

    @abstractmethod
    def _room(self, slot: _Slot, bucket: _Bucket) -> Tensor: ...

    @abstractmethod
    def _left_behind(self, room: Tensor) -> Tensor | None: ...

    @abstractmethod
    def _reduce(self, bucket: _Bucket) -> None: ...

    def _reduced(self, bucket: _Bucket) -> None:
        """The sums of ``bucket`` are there."""

    def discard(self) -> None:
        for slot in self._slots:
            slot.parameter.grad = None


class ReplicatedGradients(_Bucketed):
    """ZeRO 0: every rank holds all sums, as ``grad`` of the parameters.

    Args:
        parameters: those that are trained.
        group: process group of its own.
    """

    def __init__(self, parameters: list[nn.Parameter], group: Any) -> None:
        self._parameters = parameters
        slots, offset = [], 0
        for parameter in parameters:
            slots.append(_Slot(parameter, 0, offset))
            offset += parameter.numel()
        self._flat = torch.empty(offset, dtype=parameters[0].dtype, device=parameters[0].device)
        super().__init__(slots, group, every_pass=False)

    def _room(self, slot: _Slot, bucket: _Bucket) -> Tensor:
        return self._flat[slot.offset : slot.offset + slot.parameter.numel()]

    def _left_behind(self, room: Tensor) -> Tensor | None:
        return room

    def _reduce(self, bucket: _Bucket) -> None:
        whole = self._flat[bucket.start : bucket.stop]
        bucket.works.append(dist.all_reduce(whole, group=self._group, async_op=True))

    def tensors(self) -> list[Tensor]:
        """See :class:`Gradients`."""
        return _gradients_of(self._parameters)


class PartitionedGradients(_Bucketed):
    """ZeRO 1 and 2: a rank holds the sums of its partition of each flat parameter group.

    At ZeRO 1 the passes of a step accumulate on each rank, and the last one reduces. At ZeRO 2 each pass does, so that
    no rank ever holds all gradients: buckets are there for the time of their reduction only.

    Args:
        zero: DeepSpeed's optimizer of the stage; its own reduction is taken out.
        parameters: those that are trained, in the order of the module.
        group: process group of its own; ``None`` on one rank.
    """

    def __init__(self, zero: Any, parameters: list[nn.Parameter], rank: int, group: Any) -> None:
        # On one rank there is nothing to shard.
        self._zero, self._sharded = zero, bool(zero.partition_gradients) and group is not None
        for hook in zero._grad_acc_hooks:
            hook.remove()
        places = {}
        for number, members in enumerate(zero.round_robin_bit16_groups):
            for parameter, offset in zip(members, zero.round_robin_bit16_offsets[number], strict=True):
                places[parameter] = _Slot(parameter, number, offset)
        self._sizes = [int(size) for size in zero.partition_size]
        self._starts = [rank * size for size in self._sizes]
        like = parameters[0]
        lengths = self._sizes if self._sharded else [flat.numel() for flat in zero.bit16_groups_flat]
        # Zeros: what lies between and behind the parameters is never written, and the norm must not see it.
        self._flat = [torch.zeros(length, dtype=like.dtype, device=like.device) for length in lengths]
        self._fresh = True
        super().__init__([places[p] for p in parameters], group, every_pass=self._sharded)

    def backward(self, run: Callable[[], None], last: bool) -> None:
        """See :class:`Gradients`."""
        super().backward(run, last)
        self._fresh = last
        if last:
            for number, own in enumerate(self.tensors()):
                self._zero.averaged_gradients[number] = _FlatPartition(own)

    def _room(self, slot: _Slot, bucket: _Bucket) -> Tensor:
        if not self._sharded:
            return self._flat[slot.group][slot.offset : slot.offset + slot.parameter.numel()]
        if bucket.buffer is None:
            like = slot.parameter
            bucket.buffer = torch.empty(bucket.stop - bucket.start, dtype=like.dtype, device=like.device)
        return bucket.buffer[slot.offset - bucket.start :][: slot.parameter.numel()]

    def _left_behind(self, room: Tensor) -> Tensor | None:
        return None

    def _reduce(self, bucket: _Bucket) -> None:
        if self._group is None:
            return
        whole = bucket.buffer if bucket.buffer is not None else self._flat[bucket.group][bucket.start : bucket.stop]
        if dist.get_backend(self._group) == "gloo":
            # Its reduce to one rank was measured to take longer than its reduce to all.
            bucket.works.append(dist.all_reduce(whole, group=self._group, async_op=True))
            return
        size = self._sizes[bucket.group]
        for owner in range(bucket.start // size, math.ceil(bucket.stop / size)):
            part = whole[max(owner * size - bucket.start, 0) : (owner + 1) * size - bucket.start]
            bucket.works.append(dist.reduce(part, owner, group=self._group, async_op=True))

    def _reduced(self, bucket: _Bucket) -> None:
        # At ZeRO 2 this rank's share moves to its partition, and the rest is forgotten.
        if bucket.buffer is None:
            return
        size, own = self._sizes[bucket.group], self._starts[bucket.group]
        first, end = max(bucket.start, own), min(bucket.stop, own + size)
        if first < end:
            source = bucket.buffer[first - bucket.start : end - bucket.start]
            room = self._flat[bucket.group][first - own : end - own]
            room.copy_(source) if self._fresh else room.add_(source)
        bucket.buffer = None

    def tensors(self) -> list[Tensor]:
        """See :class:`Gradients`."""
        if self._sharded:
            return self._flat
        return [
            flat[start : start + size] for flat, start, size in zip(self._flat, self._starts, self._sizes, strict=True)
        ]

    def discard(self) -> None:
        """See :class:`Gradients`."""
        super().discard()
        self._fresh = True
        self._zero.averaged_gradients.clear()


class _FlatPartition(list[Tensor]):
    """What DeepSpeed's optimizer takes as a gradient that is flat already, without copying it."""

    def __init__(self, flat_partition: Tensor) -> None:
        super().__init__([flat_partition])
        self.flat_partition = flat_partition
