"""Which piece of which parameter lies where in DeepSpeed's flat partitions."""

from __future__ import annotations

from typing import Any, NamedTuple


class Segment(NamedTuple):
    """``length`` elements from ``start`` on, in this rank's flat partition, of parameter ``owner`` of its group."""

    owner: int
    start: int
    length: int


class GroupSegments(NamedTuple):
    """What this rank holds of one parameter group, and how many parameters the group has."""

    segments: list[Segment]
    parameters: int


def segments(zero: Any) -> list[GroupSegments]:
    """The map of each parameter group of ``zero``, DeepSpeed's optimizer at ZeRO 1 or 2."""
    found = []
    for members in zero.bit16_groups:
        own = []
        for index, parameter in enumerate(members):
            if parameter._hp_mapping is not None:
                place = parameter._hp_mapping.get_hp_fragment_address()
                own.append(Segment(index, int(place.start), int(place.numel)))
        found.append(GroupSegments(own, len(members)))
    return found
