"""How many ranks a recipe can run on, and what becomes of the ranks that are too many."""

from __future__ import annotations

from collections.abc import Callable

from hpc import world_sizes
from hpc.errors import UserError
from hpc.topology import Topology
from nanodist.pretrain.recipe import PretrainRecipe


def legal_world_sizes(recipe: PretrainRecipe, most: int) -> list[int]:
    """Numbers of ranks up to ``most`` that the recipe can run on."""
    batch, group = recipe.train.global_batch_size, recipe.bn_group_size()
    legal = []
    for size in range(1, min(most, batch) + 1):
        try:
            micro_batches = recipe.train.micro_batches(size) if batch % size == 0 else 0
        except UserError:
            continue
        if micro_batches and size in world_sizes.legal_world_sizes(batch, group, size, micro_batches):
            legal.append(size)
    return legal


def take_seat(recipe: PretrainRecipe, topology: Topology, say: Callable[[str], None]) -> Topology | None:
    """The topology of the largest legal world, where there are too many ranks; ``None`` for a rank that is left over.

    Raises:
        UserError: the number of ranks is illegal and ``engine.surplus_ranks`` is ``refuse``.
    """
    legal = legal_world_sizes(recipe, topology.world_size)
    if topology.world_size in legal:
        return topology
    if recipe.engine.surplus_ranks == "refuse" or not legal:
        # Says which numbers are legal.
        recipe.train.micro_batches(topology.world_size)
        world_sizes.check_world_size(recipe.train.global_batch_size, recipe.bn_group_size(), topology.world_size)
        raise AssertionError("an illegal world size that nothing refuses")
    if topology.is_main:
        say(f"{topology.world_size} ranks are not legal for this recipe: {legal[-1]} train, the others are idle")
    return topology.shrunk(legal[-1]) if topology.rank < legal[-1] else None
