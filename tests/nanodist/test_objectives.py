"""Objectives against the formulas of their papers on one process, on 1, 2 and 4 ranks with mean-shifted data."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hpc.errors import UserError
from nanodist.objectives import ObjectiveConfig, barlow_twins, build_objective, nt_xent, vicreg
from nanodist.objectives.tiles import Sizes
from tests.nanodist.original_objectives import original_barlow_twins, original_nt_xent, original_vicreg

# Odd where it can be: neither the samples nor the columns are a multiple of a tile, of a block or of the ranks.
N, D = 20, 150
SMALL = Sizes(rows=7, columns=11, band=3)
KIN = torch.arange(N) % 5


def _projections(dtype, columns):
    """Each quarter of the batch has its own mean, as shards of different microscopes do."""
    generator = torch.Generator().manual_seed(3)
    shift = torch.arange(4.0, dtype=torch.float64).repeat_interleave(N // 4)[:, None]
    shift = shift * torch.linspace(-1, 2, columns, dtype=torch.float64)
    a = torch.randn(N, columns, generator=generator, dtype=torch.float64) + shift
    b = a + 0.5 * torch.randn(N, columns, generator=generator, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def _kin(a, group):
    first = 0 if group is None else dist.get_rank(group) * len(a)
    return KIN[first : first + len(a)].to(a.device)


# name: columns, ours (a, b, group), the original (a, b)
FORMS = {
    "nt_xent": (12, lambda a, b, g: nt_xent(a, b, 0.2, g), lambda a, b: original_nt_xent(a, b, 0.2)),
    "nt_xent in tiles": (
        12,
        lambda a, b, g: nt_xent(a, b, 0.2, g, size=SMALL),
        lambda a, b: original_nt_xent(a, b, 0.2),
    ),
    "nt_xent, kin": (
        12,
        lambda a, b, g: nt_xent(a, b, 0.2, g, _kin(a, g), size=SMALL),
        lambda a, b: original_nt_xent(a, b, 0.2, KIN),
    ),
    "nt_xent, cold": (
        12,
        lambda a, b, g: nt_xent(a, b, 0.005, g, _kin(a, g), size=SMALL),
        lambda a, b: original_nt_xent(a, b, 0.005, KIN),
    ),
    "cross_view": (
        12,
        lambda a, b, g: nt_xent(a, b, 0.1, g, form="cross_view", size=SMALL),
        lambda a, b: original_nt_xent(a, b, 0.1, cross=True),
    ),
    "cross_view, kin": (
        12,
        lambda a, b, g: nt_xent(a, b, 0.1, g, _kin(a, g), "cross_view", SMALL),
        lambda a, b: original_nt_xent(a, b, 0.1, KIN, cross=True),
    ),
} | {
    f"{name}, {way}": (D, ours, theirs)
    for way in ("dense", "gram")
    for name, ours, theirs in (
        (
            "barlow_twins",
            lambda a, b, g, way=way: barlow_twins(a, b, 0.0051, g, way),
            lambda a, b: original_barlow_twins(a, b, 0.0051),
        ),
        (
            "vicreg",
            lambda a, b, g, way=way: vicreg(a, b, 25.0, 20.0, 2.0, g, way),
            lambda a, b: original_vicreg(a, b, 25.0, 20.0, 2.0),
        ),
    )
}


def _on_rank(rank, world_size, name, dtype):
    columns, ours, _ = FORMS[name]
    n = N // world_size
    a, b = (x[rank * n : (rank + 1) * n].clone().requires_grad_() for x in _projections(dtype, columns))
    # Several blocks of columns and panels of the matrix, as with thousands of columns.
    with mock.patch("nanodist.objectives.gram.CPU_BLOCK", 1), mock.patch("nanodist.objectives.gram.PANEL", 1):
        loss = ours(a, b, dist.group.WORLD if world_size > 1 else None)
        with torch.no_grad():
            assert torch.equal(loss, ours(a, b, dist.group.WORLD if world_size > 1 else None))
    (3 * loss).backward()
    return loss.detach(), a.grad / 3, b.grad / 3


def _compare(answers, name, dtype, tolerance, gradient_tolerance):
    columns, _, theirs = FORMS[name]
    # Rounding the inputs is not the objective's doing.
    a, b = (x.double().requires_grad_() for x in _projections(dtype, columns))
    expected = theirs(a, b)
    expected.backward()
    for loss, *_ in answers:
        assert torch.equal(loss, answers[0][0])
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=0)
    for i, whole in ((1, a.grad), (2, b.grad)):
        assert answers[0][i].dtype == dtype
        got = torch.cat([answer[i] for answer in answers]).double()
        assert (got - whole).norm() / whole.norm() < gradient_tolerance


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_are_the_originals(ranks, name, world_size, dtype, tolerance):
    # Cold: exponents near 290, of which any float32 arithmetic rounds off 2e-5, and the gradient is their powers.
    slack = 10 if "cold" in name and dtype == torch.float32 else 1
    _compare(ranks.run(world_size, _on_rank, name, dtype), name, dtype, tolerance * slack, tolerance * slack)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", list(FORMS))
def test_bf16_has_wide_sums(ranks, name, world_size):
    """Gradients come back in bf16 (2^-9), losses in float32; only NT-Xent, unless it is cold, multiplies in bf16."""
    answers = ranks.run(world_size, _on_rank, name, torch.bfloat16)
    assert answers[0][0].dtype == torch.float32
    narrow = "nt_xent" in name or "cross_view" in name
    _compare(answers, name, torch.bfloat16, 5e-3 if narrow and "cold" not in name else 1e-4, 2e-2 if narrow else 4e-3)


def test_statistics_per_rank_would_be_seen():
    """The parity test above would be blind if every rank had like data; here the halves do differ."""
    a, b = _projections(torch.float64, D)
    for loss in (partial(barlow_twins, redundancy_weight=0.0051), vicreg, partial(nt_xent, temperature=0.2)):
        whole = loss(a, b)
        parts = (loss(a[:10], b[:10]) + loss(a[10:], b[10:])) / 2
        assert abs(whole - parts) / whole > 0.02


def test_a_kept_graph_gives_its_gradient_again():
    a, b = (x.requires_grad_() for x in _projections(torch.float64, 12))
    loss = nt_xent(a, b, 0.2)
    first = [g.clone() for g in torch.autograd.grad(2 * loss, (a, b), retain_graph=True)]
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), tuple(g / 2 for g in first))


def test_autocast_does_not_reach_into_an_objective():
    a, b = _projections(torch.float32, D)
    for config in (ObjectiveConfig(), ObjectiveConfig(name="barlow_twins"), ObjectiveConfig(name="vicreg")):
        with torch.autocast("cpu", torch.bfloat16):
            inside = build_objective(config)(a, b, None, None)
        assert torch.equal(inside, build_objective(config)(a, b, None, None))


def test_recipe_values_reach_the_objective():
    a, b = _projections(torch.float64, D)
    cross = build_objective(ObjectiveConfig(temperature=0.1, form="cross_view"))(a, b, None, KIN)
    torch.testing.assert_close(cross, original_nt_xent(a, b, 0.1, KIN, cross=True))
    config = ObjectiveConfig(name="vicreg", invariance_weight=3.0, variance_weight=4.0, covariance_weight=5.0)
    torch.testing.assert_close(build_objective(config)(a, b, None, KIN), original_vicreg(a, b, 3.0, 4.0, 5.0))


@pytest.mark.parametrize("temperature", [0.2, 0.001])
def test_a_view_without_negatives_has_no_loss(temperature):
    a, b = (x.requires_grad_() for x in _projections(torch.float32, 12))
    loss = nt_xent(a, b, temperature, kin=torch.zeros(N, dtype=torch.long))
    loss.backward()
    assert loss == 0 and not a.grad.any() and not b.grad.any()


def test_vicreg_of_one_sample_is_refused():
    with pytest.raises(UserError, match="at least 2 samples"):
        vicreg(torch.ones(1, 4), torch.ones(1, 4))
