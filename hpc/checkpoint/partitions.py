"""The optimizer's tensors of ZeRO 1 and 2, whole: every rank holds an equal slice of a flat tensor a parameter group.

The slices travel as they are, in as many transfers as there are ranks, groups and states, straight to where they lie
in the flat tensor. DeepSpeed's own way is an all-reduce of zeros and a part for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

# Of a slice at a time, where it comes through memory of the GPU: so much from every rank.
PIECE_BYTES = 32 * 2**20

# Gives memory on the host for a flat tensor, by a name and like another one but for its length.
Room = Callable[[str, int, Tensor], Tensor]


def to_all(zero: Any, slot: str) -> dict[nn.Parameter, Tensor]:
    """A state (such as ``exp_avg``) of all parameters, whole and in new memory, on every rank; collective."""
    found: dict[nn.Parameter, Tensor] = {}
    for number, own in enumerate(_slices(zero, slot)):
        group = zero.real_dp_process_group[number]
        flat = own.new_empty(own.numel() * dist.get_world_size(group))
        dist.all_gather_into_tensor(flat, own, group=group)
        found |= _named(zero, number, flat)
    return found


def to_main(zero: Any, slots: list[str], room: Room | None, staged: bool) -> dict[str, dict[nn.Parameter, Tensor]]:
    """States of all parameters by slot, whole and in the memory of ``room``, on rank 0; collective.

    Args:
        zero: DeepSpeed's optimizer.
        slots: the names of the states.
        room: on rank 0; ``None`` on all others, which get nothing.
        staged: the slices lie on a GPU, and travel through its memory, which takes ``PIECE_BYTES`` a rank; otherwise
            they go from memory to memory of the host.
    """
    found: dict[str, dict[nn.Parameter, Tensor]] = {slot: {} for slot in slots if room is not None}
    works: list[Any] = []
    for slot in slots:
        for number, own in enumerate(_slices(zero, slot)):
            group = zero.real_dp_process_group[number]
            flat = None
            if room is not None:
                flat = room(f"{slot}, group {number}", own.numel() * dist.get_world_size(group), own)
                found[slot] |= _named(zero, number, flat)
            if staged:
                _through_device(own, flat, group)
            else:
                works += _exchange(own, flat, group)
    for work in works:
        work.wait()
    return found


def _slices(zero: Any, slot: str) -> list[Tensor]:
    """This rank's slice of each group."""
    states = zero.optimizer.state
    return [states[flat][slot] for flat in zero.single_partition_of_fp32_groups]


def _named(zero: Any, number: int, flat: Tensor) -> dict[nn.Parameter, Tensor]:
    """Where the parameters of a group lie in its flat tensor."""
    members, offsets = zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number]
    return {p: flat[start : start + p.numel()].view(p.shape) for p, start in zip(members, offsets, strict=True)}


def _exchange(own: Tensor, flat: Tensor | None, group: Any) -> list[Any]:
    """Begin to send a slice to rank 0, or to receive those of all others there."""
    if flat is None:
        return [dist.isend(own, group=group, group_dst=0)]
    parts = flat.chunk(dist.get_world_size(group))
    works = [dist.irecv(part, group=group, group_src=rank) for rank, part in enumerate(parts) if rank]
    parts[0].copy_(own)
    return works


def _through_device(own: Tensor, flat: Tensor | None, group: Any) -> None:
    """Gather on the device of rank 0 piece by piece, so that it never holds the whole."""
    world = dist.get_world_size(group)
    length = max(1, PIECE_BYTES // own.element_size())
    stage = None if flat is None else own.new_empty(world, min(length, own.numel()))
    for start in range(0, own.numel(), length):
        piece = own[start : start + length]
        if flat is None or stage is None:
            dist.gather(piece, None, group=group, group_dst=0)
            continue
        arrived = [row[: piece.numel()] for row in stage]
        dist.gather(piece, arrived, group=group, group_dst=0)
        for part, row in zip(flat.chunk(world), arrived, strict=True):
            # In stream order: the next piece arrives after it.
            part[start : start + piece.numel()].copy_(row, non_blocking=True)
