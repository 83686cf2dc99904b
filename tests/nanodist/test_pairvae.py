"""PairVAE: turning of both members, likelihoods, the physics term, batches, and losses on several ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hpc.errors import UserError
from hpc.topology import Topology
from nanodist.objectives import elbo
from nanodist.pairvae.data import PairData, Sampler, split
from nanodist.pairvae.describe import apart, describe_pattern, first_peak, image_spectrum
from nanodist.pairvae.images import crop, prepared, transformation
from nanodist.pairvae.physics import CropScattering, mismatch
from nanodist.pairvae.polar import folded, grid_vectors, polar_grid, turned, turned_back
from nanodist.pairvae.recipe import PairDataConfig, load_recipe
from nanodist.pairvae.run import make_task
from nanodist.scattering.pattern import QGrid
from tests.nanodist.pairs_in_memory import PairsInMemory, ring, waves

TINY = {
    "modern": [
        "data={size_px: 32, pixel_size_nm: 6.0, contrast: grey}",
        "model={preset: modern, latent_width: 6, local_width: 2, width: 8, max_rotation_deg: 180, flip: true,"
        " zoom: 1.2}",
    ],
    "lu2023": [
        "data={size_px: 32, pixel_size_nm: 6.0, contrast: binary, window_px: 7}",
        "model={preset: lu2023, encoder: timm:test_resnet, encoder_weights: random, latent_side: 2, latent_width: 4,"
        " sem_filters: 4, sem_kernel: 5, fixed_crop_from_epoch: 1}",
    ],
}
RUN = [
    "engine.device=cpu",
    "engine.threads=1",
    "tracking.mode=disabled",
    "solo.log_every_steps=1",
    "pair.log_every_steps=1",
]


def tiny(preset, *overrides):
    return load_recipe(preset, [*TINY[preset], *RUN, *overrides])


def _topology(rank=0, world_size=1):
    return Topology(rank, world_size, rank, world_size, 0, 1, "host", "test", "127.0.0.1", 29500)


def _task(preset, stage, rank=0, world_size=1, store=None, *overrides):
    recipe = tiny(preset, f"{stage}.global_batch_size=4", *overrides)
    data = PairData(store or PairsInMemory(8, grid_px=32, size_px=96), recipe.data)
    world = dist.new_group() if world_size > 1 else None
    return make_task(recipe, stage, data, _topology(rank, world_size), torch.device("cpu"), world)


@pytest.mark.parametrize(("angle", "flip", "zoom"), [(30.0, False, 1.0), (-70.0, True, 1.2), (0.0, True, 0.8)])
def test_image_and_pattern_are_turned_alike(angle, flip, zoom):
    rng = np.random.default_rng(3)
    field = waves((400, 400), 3.0, 40.0, 25.0, 4.0, rng).astype(np.float32)
    matrix = transformation(angle, flip, zoom)
    found = describe_pattern(image_spectrum([crop(field, 160, matrix, (0.5, 0.5))], 3.0))
    # What the turned pattern has at q, the pattern as measured has at A^T q.
    grid = QGrid(128, 0.4)
    vectors = turned(grid_vectors(grid), torch.from_numpy(matrix)[None])[0].numpy()
    expected = ring(vectors[:, 1], vectors[:, 0], 40.0, 25.0, 4.0)
    q_x, q_y = grid_vectors(grid).numpy().T
    brightest = int(np.argmax(expected))
    want = np.degrees(np.arctan2(q_y[brightest], q_x[brightest]))
    assert apart(found.orientation_deg, want, 180) < 5
    assert found.period_nm == pytest.approx(2 * np.pi / np.hypot(q_x, q_y)[brightest], rel=0.05)
    assert found.period_nm == pytest.approx(40.0 * zoom, rel=0.05)
    again = turned_back(torch.from_numpy(vectors), torch.from_numpy(matrix)[None])[0]
    assert torch.allclose(again, grid_vectors(grid))


def test_a_polar_map_gives_back_the_pattern_that_it_was_made_of():
    grid = QGrid(96, 0.5)
    q_y, q_x = grid.q()
    plane = torch.from_numpy(ring(q_y, q_x, 30.0, 100.0, 25.0, 0.15))[None]
    mask = torch.ones_like(plane, dtype=torch.bool)
    mask[0, :48, 40:56] = False  # an arm: the opposite side knows what is under it
    polar, pixels = polar_grid(grid), grid_vectors(grid)[None]
    values, share = folded(plane, mask, (grid.size - 1) / 2, grid.q_step_inv_nm, polar.vectors()[None])
    assert float(share.min()) > 0.4 or float(share.min()) == 0.0
    back = polar.at(values.view(1, 1, polar.rows, polar.columns), pixels)[0, 0].view(96, 96)
    inside = torch.from_numpy(np.hypot(q_y, q_x) < 0.45)
    assert float((back - plane[0])[inside].abs().max()) < 0.06


def test_likelihoods_are_least_at_the_truth_and_blind_to_what_is_masked():
    rng = torch.Generator().manual_seed(0)
    rate = 5 + 20 * torch.rand(3, 8, 8, generator=rng)
    counts, mask = torch.poisson(rate, generator=rng), torch.rand(3, 8, 8, generator=rng) > 0.3
    log_rate = counts.clamp_min(1e-3).log().requires_grad_()
    loss = elbo.poisson_nll(log_rate, counts, mask)
    assert float(loss.detach().abs().max()) < 1e-3
    other = torch.where(mask, counts, 1e6)
    wrong = (rate * 1.5).log()
    assert torch.equal(elbo.poisson_nll(wrong, counts, mask), elbo.poisson_nll(wrong, other, mask))
    # Up to constants and the mean count it is torch's Poisson likelihood.
    a, b = (torch.nn.functional.poisson_nll_loss(x[mask], counts[mask], reduction="none") for x in (wrong, rate.log()))
    weight = 1 / (mask.sum((1, 2)) * elbo.masked_mean(counts, mask))
    want = sum(float((v * weight[:, None, None].expand_as(mask)[mask]).sum()) * s for v, s in ((a, 1), (b, -1)))
    got = (elbo.poisson_nll(wrong, counts, mask) - elbo.poisson_nll(rate.log(), counts, mask)).sum()
    assert float(got) == pytest.approx(want, rel=1e-4)
    data = torch.randn(3, 8, 8, generator=rng) - 1.0  # negative reduced data stay what they are
    sigma = torch.full_like(data, 0.5)
    assert float(elbo.gaussian_nll(data, data, sigma, mask).max()) == 0.0
    assert float(elbo.gaussian_nll(data.clamp_min(0), data, sigma, mask).min()) > 0.0


def test_the_physics_term_knows_its_own_period_and_no_scale_or_background():
    rng = np.random.default_rng(1)
    crops, grid = CropScattering(96, 3.0), QGrid(96, 0.6)
    q_y, q_x = grid.q()
    images = torch.from_numpy(np.stack([waves((96, 96), 3.0, 40.0, 60.0, 20.0, rng) for _ in range(16)]))[:, None]
    found = crops.compared(crops.spectrum(images).mean(0, keepdim=True))
    errors = {}
    for name, period, angle in (("own", 40.0, 60.0), ("period", 32.0, 60.0), ("turned", 40.0, 100.0)):
        intensity = torch.from_numpy(700 * ring(q_y, q_x, period, angle, 20.0) + 9)[None]
        mask = torch.from_numpy(np.hypot(q_y, q_x) > 0.05)[None]
        target, known = crops.target(intensity, mask, grid, torch.eye(2, dtype=torch.float64)[None])
        errors[name] = float(mismatch(found, target, known))
    assert errors["own"] < 0.05 and errors["period"] > 5 * errors["own"] and errors["turned"] > 5 * errors["own"]
    target = 3.0 * found + 0.7
    assert float(mismatch(found, target, torch.ones_like(found))) < 1e-12
    low, high = crops.range_inv_nm
    q = crops.vectors.norm(dim=1)
    assert low == pytest.approx(4 * np.pi / 288) and high == pytest.approx(np.pi / 6)
    assert float(q.min()) > low and float(q.max()) < high


def test_the_gradient_of_the_physics_term_is_that_of_its_differences():
    rng = torch.Generator().manual_seed(0)
    spectrum = torch.rand(2, 30, generator=rng, dtype=torch.float64).requires_grad_()
    target = torch.rand(2, 30, generator=rng, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda s: mismatch(s, target, torch.ones_like(target)), spectrum)


@pytest.mark.parametrize("period", [20.0, 35.0, 60.0])
def test_the_first_peak_stands_above_parasitic_scattering(period):
    q = np.linspace(0.02, 0.6, 150)
    q0 = 2 * np.pi / period
    intensity = 1000 * np.exp(-0.5 * ((q / q0 - 1) / 0.08) ** 2) + 1e-3 * q**-3.0 * 20 + 3
    found, width = first_peak(q, intensity)
    assert found == pytest.approx(q0, rel=0.01)
    assert width == pytest.approx(2.355 * 0.08 * q0, rel=0.25)
    assert np.isnan(first_peak(q, q**-4.0)[0])


def test_a_split_never_parts_a_specimen():
    samples = [f"film{i // 3}" for i in range(30)]
    train, test = split(samples, 0.3, 0)
    assert len(train) + len(test) == 30 and len(test) == 9
    assert not {samples[i] for i in train} & {samples[i] for i in test}
    assert not np.array_equal(test, split(samples, 0.3, 1)[1])


def test_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume():
    recipe = tiny("modern")
    data = PairData(PairsInMemory(9, grid_px=32, size_px=96), recipe.data)
    sampler = Sampler(data, recipe.model, 5, "pair", 11)
    whole, later = sampler.batches(4, 0, 1, 1, 0), sampler.batches(4, 0, 1, 1, 2)
    halves = [Sampler(data, recipe.model, 5, "pair", 11).batches(4, rank, 2, 1, 0) for rank in range(2)]
    for step in range(4):
        one, parts = next(whole), [next(half) for half in halves]
        assert one.keys == parts[0].keys + parts[1].keys
        for name in ("images", "turns", "noise", "intensity"):
            assert np.array_equal(getattr(one, name), np.concatenate([getattr(part, name) for part in parts])), name
        if step >= 2:
            assert np.array_equal(one.images, next(later).images)


def test_a_fixed_crop_is_one_crop_and_a_new_one_is_another():
    recipe = tiny("lu2023")
    data = PairData(PairsInMemory(6, grid_px=32, size_px=96), recipe.data)
    sampler = Sampler(data, recipe.model, 0, "pair", 2)
    places = [sampler.turn(0, epoch)[1] for epoch in range(4)]
    assert places[0] != places[1] and places[1] == places[2] == places[3]


def _step(rank, world_size, preset, stage):
    """Loss, and this rank's part of the gradient of the global batch."""
    task = _task(preset, stage, rank, world_size)
    task.module.double().train()
    batch = next(task.batches(1))
    loss = task.loss(task.forward(task.module, task.parts(batch)[0]), batch)
    loss.backward()
    task.after_step()
    gradients = {name: p.grad.numpy() for name, p in task.module.named_parameters() if p.grad is not None}
    moved = {name: b.numpy() for name, b in task.module.named_buffers() if "decoder" in name and "running" in name}
    return float(loss.detach()), gradients, moved


@pytest.mark.parametrize("stage", ["solo", "pair"])
@pytest.mark.parametrize("preset", ["modern", "lu2023"])
def test_loss_and_gradient_of_two_ranks_are_those_of_one(ranks, preset, stage):
    loss, gradient, moved = _step(0, 1, preset, stage)
    parts = ranks.run(2, _step, preset, stage)
    assert all(part[0] == pytest.approx(loss, rel=1e-10) for part in parts)
    assert len(gradient) > 20
    largest = max(np.linalg.norm(want) for want in gradient.values())
    for name, want in gradient.items():
        got = sum(part[1].get(name, 0.0) for part in parts)
        assert np.linalg.norm(got - want) <= 1e-7 * np.linalg.norm(want) + 1e-9 * largest, name
    assert bool(moved) == (preset == "lu2023")
    for name, want in moved.items():
        assert np.allclose(parts[1][2][name], want, rtol=1e-6), name


def test_a_missing_member_still_trains_its_own_autoencoder_and_nothing_else():
    store = PairsInMemory(8, grid_px=32, size_px=96, missing=[(i, name) for i, name in enumerate(["saxs", "sem"] * 4)])
    task = _task("modern", "pair", 0, 1, store, "data.test_share=0.0", "pair.global_batch_size=8")
    outputs = task.forward(task.module, task.parts(next(task.batches(0)))[0])
    batch = next(task.batches(0))
    saxs, sem = (torch.from_numpy(flag) > 0 for flag in batch.has.T)
    assert torch.equal(saxs, ~sem) and saxs.any() and sem.any()
    for name in ("sem_saxs", "saxs_sem", "coupling"):
        assert not outputs[name].any(), name
    for name, there in (("saxs_saxs", saxs), ("kl_saxs", saxs), ("sem_sem", sem), ("kl_sem", sem)):
        assert (outputs[name] != 0).equal(there), name
    assert (outputs["physics"] > 0).all()
    with pytest.raises(UserError, match="item item000 has no saxs member, and preset lu2023 trains on pairs alone"):
        _task("lu2023", "solo", 0, 1, store, "data.test_share=0.0")


def test_reduced_data_go_under_their_sigma_and_raw_counts_under_poisson():
    counts = _task("modern", "solo", 0, 1, PairsInMemory(8, grid_px=32, size_px=96))
    reduced = _task("modern", "solo", 0, 1, PairsInMemory(8, grid_px=32, size_px=96, reduced=True))
    found = []
    for task in (counts, reduced):
        inputs = task.parts(next(task.batches(0)))[0]
        found.append(task.model._saxs_error(task.model.encode_saxs(inputs).mean, inputs).detach())
    assert not torch.allclose(found[0], found[1])


def test_binary_contrast_is_the_papers_and_grey_takes_shading_out():
    shade = np.linspace(0, 80, 128)[None, :] + np.zeros((128, 1))
    stripes = (60 * (np.arange(128) // 6 % 2))[:, None] + shade
    image = stripes.astype(np.uint8)
    binary = prepared(image, (2.0, 2.0), 2.0, PairDataConfig(contrast="binary", size_px=64))
    assert abs(binary[:, 20:40].mean() - binary[:, 90:110].mean()) < 0.05 and binary.min() == 0 and binary.max() == 1
    grey = prepared(image, (2.0, 2.0), 2.0, PairDataConfig(size_px=64))
    assert abs(grey[:, 20:40].mean() - grey[:, 90:110].mean()) < 0.12  # 0.31 before
    assert prepared(image, (2.0, 2.0), 4.0, PairDataConfig(size_px=32)).shape == (64, 64)


@pytest.mark.parametrize(
    ("preset", "override", "sentence"),
    [
        ("modern", "pair.weights={barlow: 1.0}", "has no term 'barlow'"),
        ("lu2023", "model.encoder=conv", "stands on a pretrained trunk"),
        ("lu2023", "model.flip=true", "lu2023 only crops"),
        ("modern", "data.size_px=50", "no multiple of 32"),
    ],
)
def test_what_a_preset_cannot_do_is_said(preset, override, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(preset, override)


def test_a_micrograph_smaller_than_a_crop_is_named():
    with pytest.raises(UserError, match=r"item item00\d covers .* less than a crop of 32 px of 20 nm"):
        PairData(PairsInMemory(4, grid_px=32, size_px=96), tiny("modern", "data.pixel_size_nm=20").data).image(0)


def test_the_exposure_of_a_pattern_is_not_asked_of_an_image():
    task = _task("modern", "pair")
    inputs = task.parts(next(task.batches(0)))[0]
    inputs = inputs._replace(intensity=inputs.intensity.clamp_min(1.0))
    z = task.model.encode_sem(inputs).mean.detach()
    long = inputs._replace(intensity=100 * inputs.intensity)
    own, other = (task.model._saxs_error(z, given).detach() for given in (inputs, long))
    fitted = [task.model._saxs_error(z, given, True).detach() for given in (inputs, long)]
    assert (abs(other - own) > abs(fitted[1] - fitted[0])).all()
