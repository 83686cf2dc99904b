"""What LARS and LAMB share: norms of whole parameters, wherever their pieces lie.

ZeRO hands an optimizer one flat tensor a parameter group: a slice of all parameters laid end to end, cut wherever the
share of the rank ends. A norm of that tensor, or of a cut piece, is not the norm of a parameter. So each piece is
squared by itself, and the squares are summed over the ranks before the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hpc.optimizers.partitions import GroupSegments, Segment


class Pieces(NamedTuple):
    """This rank's pieces of the parameters of one group, piece by piece.

    Attributes:
        weights, gradients: views.
        owners: which parameter of the group a piece belongs to.
        holders: the tensor in the group's ``params`` that holds each piece.
        segments: where in the holder; ``None`` for all of it.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    owners: list[int]
    holders: list[Tensor]
    segments: list[Segment | None]

    def of(self, states: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The pieces of ``states(holder)``."""
        return [_cut(states(p), segment) for p, segment in zip(self.holders, self.segments, strict=True)]


def _cut(tensor: Tensor, segment: Segment | None) -> Tensor:
    return tensor if segment is None else tensor[segment.start : segment.start + segment.length]


class TrustRatioOptimizer(torch.optim.Optimizer):
    """An optimizer that scales the update of each parameter by a ratio of norms.

    Groups with ``"adapt": False`` (biases and norm parameters in the references) have ratio 1.
    """

    _process_group: Any = None
    _SHARDS = "pieces"
    _coefficient = ""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, {"adapt": True, **defaults})
        self._last: dict[int, Tensor] = {}

    def trust_ratios(self) -> dict[str, float]:
        """``trust_ratio_min``, ``_median`` and ``_max`` of the last step over the parameters that adapt.

        A ratio is what multiplies a parameter's update, LARS's coefficient included. Empty before the first step, and
        where nothing adapts; the same on all ranks.
        """
        if not self._last:
            return {}
        scales = [self.param_groups[i].get(self._coefficient, 1.0) for i in self._last]
        every = torch.cat([ratios * scale for ratios, scale in zip(self._last.values(), scales, strict=True)])
        found = torch.stack([every.min(), every.median(), every.max()]).tolist()
        return dict(zip(("trust_ratio_min", "trust_ratio_median", "trust_ratio_max"), found, strict=True))

    def shard(self, groups: list[GroupSegments], process_group: Any) -> None:
        """Say what the flat tensors hold that ZeRO put in the place of the parameters.

        Args:
            groups: from :func:`hpc.optimizers.partitions.segments`.
            process_group: of all ranks, for nothing but this and the engine's reductions; ``None`` on one rank.
        """
        self._process_group = process_group
        for group, pieces in zip(self.param_groups, groups, strict=True):
            group[self._SHARDS] = pieces

    def _pieces(self, group: dict[str, Any]) -> Pieces:
        shards: GroupSegments | None = group.get(self._SHARDS)
        if shards is None:
            held: list[tuple[Tensor, Segment | None, int]] = [(p, None, i) for i, p in enumerate(group["params"])]
            held = [entry for entry in held if entry[0].grad is not None]
        else:
            held = [(group["params"][0], segment, segment.owner) for segment in shards.segments]
        return Pieces(
            weights=[_cut(p, segment) for p, segment, _ in held],
            gradients=[_cut(p.grad, segment) for p, segment, _ in held if p.grad is not None],
            owners=[owner for _, _, owner in held],
            holders=[p for p, _, _ in held],
            segments=[segment for _, segment, _ in held],
        )

    def _ratios(self, group: dict[str, Any], pieces: Pieces, updates: list[Tensor]) -> list[Tensor]:
        """``|weights| / |updates|`` of the whole parameter, for each piece; 1 where either norm is 0.

        Collective where the parameters are partitioned.
        """
        shards: GroupSegments | None = group.get(self._SHARDS)
        count = len(group["params"]) if shards is None else shards.parameters
        squares = torch.zeros(2, count, dtype=torch.float64, device=group["params"][0].device)
        if pieces.owners:
            owners = torch.tensor(pieces.owners, device=squares.device)
            for row, tensors in enumerate((pieces.weights, updates)):
                norms = torch.stack(torch._foreach_norm(tensors))
                squares[row].index_add_(0, owners, norms.double().square())
        if shards is not None and self._process_group is not None:
            dist.all_reduce(squares, group=self._process_group)
        weights, steps = squares.sqrt()
        ratios = torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)
        self._last[next(i for i, one in enumerate(self.param_groups) if one is group)] = ratios
        return [ratios[owner] for owner in pieces.owners]
