"""The graphs of a PairVAE, in both directions."""

from pathlib import Path

import pytest
import torch

from hpc.errors import UserError
from nanodist.export.pair_graph import FromSaxs, FromSem, parts_of
from nanodist.export.pairvae import export_pairvae
from nanodist.pairvae.load import Trained
from nanodist.pairvae.model import Geometry, Inputs, Statistics, build_model, start_encoder
from nanodist.scattering.pattern import QGrid
from tests.nanodist.test_pairvae import tiny

GEOMETRY = Geometry(QGrid(32, 0.5), 20.0, 32, 6.0, "counts")


def trained(preset: str) -> Trained:
    """A small model whose weights are all random, also those that begin at 0."""
    recipe, draw = tiny(preset), torch.Generator().manual_seed(0)
    values = torch.rand(4, 32, 32, generator=draw)
    seen = Statistics(values, torch.ones(4, 32, 32, dtype=torch.bool))
    model = build_model(recipe.model, GEOMETRY, 0, "pair", start_encoder(recipe.model, 0), seen, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return Trained(recipe, model, ("a", "b", "c"), "in-memory", Path("nowhere"))


def given() -> Inputs:
    draw = torch.Generator().manual_seed(1)
    intensity = torch.poisson(torch.rand(3, 32, 32, generator=draw) * 90, generator=draw)
    mask = torch.rand(3, 32, 32, generator=draw) > 0.2
    mask[:, 15:17, 15:17] = False  # a beam stop, which no opposite pixel knows
    images = torch.rand(3, 1, 32, 32, generator=draw)
    turns, has = torch.eye(2).expand(3, 2, 2), torch.ones(3, 2)
    return Inputs(intensity * mask, torch.zeros(3, 32, 32), mask, images, turns, has, torch.zeros(3, 0))


@pytest.mark.parametrize("preset", ["modern", "lu2023"])
def test_the_graphs_compute_what_the_model_does(preset):
    model, inputs = trained(preset).model, given()
    latent = model.latent_dim
    noise = torch.randn(3, latent + model.image_noise, generator=torch.Generator().manual_seed(2))
    parts = parts_of(model)
    with torch.inference_mode():
        pattern, image = model.encode_saxs(inputs), model.encode_sem(inputs)
        z = pattern.mean + torch.exp(0.5 * pattern.log_variance) * noise[:, :latent]
        wanted = [*pattern, model.decode_sem(z, noise[:, latent:])]
        found = FromSaxs(parts, latent)(inputs.intensity, inputs.mask.float(), noise)
        z = image.mean + torch.exp(0.5 * image.log_variance) * noise[:, :latent]
        wanted += [*image, model.decode_saxs(z)]
        found = [*found, *FromSem(parts)(inputs.images, noise[:, :latent])]
    for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got.shape == want.shape and float(want.std()) > 1e-4, number
        assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max()), number


def test_what_a_pairvae_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="exported as onnx or torch-export, not as timm"):
        export_pairvae(trained("modern"), tmp_path / "x", ("timm",), "films", {})
    assert list(tmp_path.iterdir()) == []
