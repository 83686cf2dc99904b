import torch

from hpc.collectives import all_reduce_sum, any_rank, gather_rows, sum_of_shares


def _rows(world_size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4 * world_size, 3, generator=generator, dtype=torch.float64)


def _rank_loss(rank, world_size):
    import torch.distributed as dist

    x = _rows(world_size)[4 * rank : 4 * rank + 4].requires_grad_()
    group = dist.group.WORLD
    mean = all_reduce_sum(x.sum(0), group) / (4 * world_size)
    everyone = gather_rows(x, group)
    share = ((x - mean) @ everyone.T).pow(3).sum()
    loss = sum_of_shares(share, group)
    loss.backward()
    return loss.detach(), x.grad, any_rank(rank == 1, group), any_rank(False, group)


def test_gradient_parts_are_those_of_one_process(ranks):
    x = _rows(4).requires_grad_()
    loss = ((x - x.mean(0)) @ x.T).pow(3).sum()
    loss.backward()
    answers = ranks.run(4, _rank_loss)
    for got, *_ in answers:
        torch.testing.assert_close(got, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([a[1] for a in answers]), x.grad, rtol=1e-11, atol=1e-10)
    assert [a[2] for a in answers] == [True] * 4 and [a[3] for a in answers] == [False] * 4


def test_one_process_needs_no_group():
    x = torch.ones(2, 2)
    assert sum_of_shares(x, None) is x and gather_rows(x, None) is x and any_rank(True, None)
