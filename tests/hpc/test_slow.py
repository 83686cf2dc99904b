"""A slow host is named, and chance is not."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from hpc.slow import LINES_IN_A_ROW, SlowHosts


def _watch(rank, world_size, slow_ranks):
    topology = SimpleNamespace(host=f"node{rank}", is_main=rank == 0)
    hosts, said, lines = SlowHosts(topology, dist.group.WORLD, torch.device("cpu")), [], []
    for slow in slow_ranks:
        hosts.stepped(0.5 if rank == slow else 0.1)
        lines.append(hosts.line(said.append))
    return said, lines


def test_a_rank_that_stays_slow_is_named_once(ranks):
    answers = ranks.run(3, _watch, [1] * (LINES_IN_A_ROW + 3))
    (sentence,) = answers[0][0]
    assert "rank 1 on node1 is slow: 500 ms" in sentence and "100 ms on the other ranks" in sentence
    assert answers[1][0] == answers[2][0] == []
    assert answers[0][1][0]["slowest_rank"] == 1 and abs(answers[0][1][0]["slowest_rank_ratio"] - 5) < 1e-6


def test_ranks_that_are_slow_in_turn_are_not(ranks):
    assert ranks.run(2, _watch, [0, 1] * LINES_IN_A_ROW)[0][0] == []


def test_one_rank_is_compared_with_nobody():
    hosts = SlowHosts(SimpleNamespace(host="n", is_main=True), None, torch.device("cpu"))
    with hosts.own_work():
        pass
    hosts.stepped(9.0)
    assert hosts.line(print) == {}
