"""A step in micro-batches is the step of the undivided batch: loss, gradient and running statistics."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc.batch_norm import convert, make_layout
from hpc.collectives import gather_rows, sum_of_shares
from hpc.errors import UserError
from hpc.step import train_step
from hpc.world_sizes import legal_world_sizes
from nanodist.shards.loader import places
from tests.hpc.plain import PlainEngine

BATCH = 16


def _net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double()
    nn.init.uniform_(net[1].weight, 0.5, 2)
    return net


def _data():
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x + torch.arange(BATCH, dtype=torch.float64)[:, None] / 4


class Coupled:
    """Each sample is told from all others of the global batch."""

    def __init__(self, module, layout, group, micro_batches):
        self.module, self.layout, self.group, self.micro_batches = module, layout, group, micro_batches

    def parts(self, batch):
        return list(batch.x.chunk(self.micro_batches))

    def forward(self, model, part):
        return {"z": model(part), "unused": part.sum(1)}

    def replaying(self):
        return self.layout.replaying() if self.layout else nullcontext()

    def loss(self, outputs, batch):
        z = gather_rows(outputs["z"], self.group)
        own = outputs["z"] @ z.T
        return sum_of_shares(own.logsumexp(1).sum() - outputs["z"].square().sum(), self.group) / BATCH

    def ahead(self):
        pass

    def after_step(self):
        self.layout.update_running_statistics()

    def after_skipped_step(self):
        self.layout.forget()


def _step(rank, world_size, micro_batches, group_size):
    import torch.distributed as dist

    layout = make_layout(BATCH, group_size, rank, world_size, micro_batches)
    net = convert(_net(), layout)
    group = dist.group.WORLD if world_size > 1 else None
    task, engine = Coupled(net, layout, group, micro_batches), PlainEngine(net, group, rank)
    grads = {}
    engine.step = lambda lr: grads.update({k: p.grad.clone() for k, p in net.named_parameters()})
    own = torch.from_numpy(places(BATCH, rank, world_size, micro_batches))
    batch = SimpleNamespace(step=0, keys=[], wait_seconds=0.0, x=_data()[own])
    result = train_step(task, engine, batch, 0.1)
    assert engine.backwards == [False] * (micro_batches - 1) + [True]
    buffers = {k: b.clone() for k, b in net.named_buffers()}
    return result.loss, grads, buffers


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("micro_batches", "group_size"), [(2, 4), (4, 4), (4, 2), (2, 8)])
def test_equals_the_undivided_batch(ranks, world_size, micro_batches, group_size):
    loss, grads, buffers = _step(0, 1, 1, group_size)
    for got_loss, got_grads, got_buffers in ranks.run(world_size, _step, micro_batches, group_size):
        assert got_loss == pytest.approx(loss, rel=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(got_grads[name], grad, rtol=1e-10, atol=1e-12)
        for name, buffer in buffers.items():
            torch.testing.assert_close(got_buffers[name], buffer, rtol=1e-12, atol=1e-13)


def test_plain_accumulation_would_be_another_objective():
    whole, _, _ = _step(0, 1, 1, 4)
    layout = make_layout(4, 4, 0, 1)
    net = convert(_net(), layout)
    task = Coupled(net, layout, None, 1)
    parts = [task.loss(task.forward(net, part), None) for part in _data().split(4)]
    assert abs(float(sum(parts)) - whole) > 1e-2


def test_places_are_contiguous_over_all_ranks_in_every_micro_step():
    for world, micro in ((1, 1), (2, 1), (2, 4), (4, 2)):
        mine = [places(BATCH, rank, world, micro).reshape(micro, -1) for rank in range(world)]
        laid = torch.tensor([[int(i) for rank in range(world) for i in mine[rank][k]] for k in range(micro)])
        assert laid.flatten().tolist() == list(range(BATCH))
    with pytest.raises(UserError, match="cannot be shared by 3 ranks in 2 micro-batches"):
        places(BATCH, 0, 3, 2)


def test_groups_must_lie_inside_a_micro_step():
    assert legal_world_sizes(16, 8, micro_batches=2) == [1, 2, 4, 8]
    assert legal_world_sizes(16, 16, micro_batches=2) == []
    with pytest.raises(UserError, match="in 2 micro-batches with BatchNorm groups of 16; legal numbers of ranks: none"):
        make_layout(16, 16, 0, 1, 2)
