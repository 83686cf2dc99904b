"""Which numbers of ranks can share a batch."""

from __future__ import annotations


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
