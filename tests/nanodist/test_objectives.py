"""Objectives against the formulas of their papers on one process, on 1, 2 and 4 ranks with mean-shifted data."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from nanodist.objectives import ObjectiveConfig, barlow_twins, build_objective, nt_xent
from nanodist.objectives.collapse import collapse_measures

N, D = 16, 12


def _projections(dtype):
    """Each quarter of the batch has its own mean, as shards of different microscopes do."""
    generator = torch.Generator().manual_seed(3)
    shift = torch.arange(4.0, dtype=torch.float64).repeat_interleave(N // 4)[:, None] * torch.linspace(-1, 2, D)
    a = torch.randn(N, D, generator=generator, dtype=torch.float64) + shift
    b = a + 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def original_nt_xent(a, b, temperature):
    """Chen et al. 2020, algorithm 1, written out with loops over pairs."""
    z = torch.cat([normalize(a, dim=1), normalize(b, dim=1)])
    total = z.new_zeros(())
    for i in range(2 * N):
        partner = (i + N) % (2 * N)
        others = [k for k in range(2 * N) if k != i]
        logits = torch.stack([z[i] @ z[k] / temperature for k in others])
        total = total + cross_entropy(logits[None], torch.tensor([others.index(partner)]))
    return total / (2 * N)


def original_nt_xent_without_kin(a, b, temperature, kin):
    z = torch.cat([normalize(a, dim=1), normalize(b, dim=1)])
    total = z.new_zeros(())
    for i in range(2 * N):
        partner = (i + N) % (2 * N)
        others = [k for k in range(2 * N) if k == partner or kin[k % N] != kin[i % N]]
        logits = torch.stack([z[i] @ z[k] / temperature for k in others])
        total = total + cross_entropy(logits[None], torch.tensor([others.index(partner)]))
    return total / (2 * N)


def original_barlow_twins(a, b, weight):
    """Zbontar et al. 2021, with torch's BatchNorm for the normalisation, as their code has it."""
    norm = torch.nn.BatchNorm1d(D, affine=False).to(a.dtype)
    c = norm(a).T @ norm(b) / N
    on = torch.diagonal(c).add(-1).pow(2).sum()
    off = c.flatten()[:-1].view(D - 1, D + 1)[:, 1:].flatten().pow(2).sum()
    return on + weight * off


KIN = torch.arange(N) % 5


def _kin(a, group):
    first = 0 if group is None else torch.distributed.get_rank(group) * len(a)
    return KIN[first : first + len(a)]


FORMS = {
    "simclr_kin": (
        lambda a, b, g: nt_xent(a, b, 0.2, g, _kin(a, g)),
        lambda a, b: original_nt_xent_without_kin(a, b, 0.2, KIN),
    ),
    "simclr": (lambda a, b, g: nt_xent(a, b, 0.2, g), lambda a, b: original_nt_xent(a, b, 0.2)),
    "barlow_twins": (lambda a, b, g: barlow_twins(a, b, 0.0051, g), lambda a, b: original_barlow_twins(a, b, 0.0051)),
}


def _on_rank(rank, world_size, name, dtype):
    import torch.distributed as dist

    n = N // world_size
    a, b = (x[rank * n : (rank + 1) * n].clone().requires_grad_() for x in _projections(dtype))
    loss = FORMS[name][0](a, b, dist.group.WORLD if world_size > 1 else None)
    loss.backward()
    return loss.detach(), a.grad, b.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_are_the_originals(ranks, name, world_size, dtype, tolerance):
    a, b = (x.requires_grad_() for x in _projections(torch.float64))
    expected = FORMS[name][1](a, b)
    expected.backward()
    answers = ranks.run(world_size, _on_rank, name, dtype)
    for loss, *_ in answers:
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=0)
    for i, whole in ((1, a.grad), (2, b.grad)):
        got = torch.cat([answer[i] for answer in answers]).double()
        assert (got - whole).norm() / whole.norm() < tolerance * 10


def test_statistics_per_rank_would_be_seen():
    """The parity test above would be blind if every rank had like data; here the halves do differ."""
    a, b = _projections(torch.float64)
    whole = barlow_twins(a, b, 0.0051)
    parts = (barlow_twins(a[:8], b[:8], 0.0051) + barlow_twins(a[8:], b[8:], 0.0051)) / 2
    assert abs(whole - parts) / whole > 0.02


def test_bf16_is_computed_in_fp32():
    a, b = (x.bfloat16() for x in _projections(torch.float64))
    for config in (ObjectiveConfig(), ObjectiveConfig(name="barlow_twins")):
        loss = build_objective(config)(a, b, None, None)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, build_objective(config)(a.float(), b.float(), None, None))


def test_collapse_is_seen():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(256, 16, generator=generator)
    point = torch.ones(256, 16) + 1e-4 * spread
    line = spread[:, :1] * torch.ones(1, 16)
    healthy, collapsed, dimensional = (collapse_measures(x, x) for x in (spread, point, line))
    assert healthy["embedding_std"] > 0.9 and collapsed["embedding_std"] < 0.01
    assert healthy["effective_rank"] > 12 and dimensional["effective_rank"] < 1.5
    assert healthy["uniformity"] < -3 < collapsed["uniformity"] and healthy["alignment"] < 1e-9
