"""Which numbers of ranks can share a batch."""

from __future__ import annotations

from hpc.errors import UserError


def legal_world_sizes(
    global_batch_size: int, bn_group_size: int, most: int = 1024, micro_batches: int = 1
) -> list[int]:
    """World sizes up to ``most`` that share the batch evenly and keep every group whole inside one micro-step.

    With ``micro_batches``, all ranks together pass over that many equal, contiguous parts of the global batch in turn.
    """
    step, rest = divmod(global_batch_size, micro_batches)
    if rest or step % bn_group_size:
        return []
    sizes = [w for w in range(1, min(most, step) + 1) if step % w == 0]
    local = {w: step // w for w in sizes}
    return [w for w in sizes if local[w] % bn_group_size == 0 or bn_group_size % local[w] == 0]


def check_world_size(global_batch_size: int, bn_group_size: int, world_size: int, micro_batches: int = 1) -> None:
    """Raise a ``UserError`` that names the legal numbers of ranks, where ``world_size`` is none of them."""
    if world_size in legal_world_sizes(global_batch_size, bn_group_size, max(world_size, 1), micro_batches):
        return
    legal = ", ".join(map(str, legal_world_sizes(global_batch_size, bn_group_size, 1024, micro_batches)))
    parts = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    none = f"none (bn_group_size must divide the {'batch' if micro_batches == 1 else 'samples of a micro-step'})"
    raise UserError(
        f"{world_size} {'rank' if world_size == 1 else 'ranks'} cannot share a global batch of {global_batch_size}"
        f"{parts} with BatchNorm groups of {bn_group_size}; legal numbers of ranks: {legal or none}"
    )
