"""A PairVAE runs in both directions in a process without nanodist, from detector frames and micrographs on."""

import json
from pathlib import Path

import pytest
import torch

from hpc.errors import UserError
from nanodist.export.pair_graph import FromSaxs, FromSem, parts_of
from nanodist.export.pairvae import export_pairvae
from nanodist.export.precision import Held
from nanodist.pairvae.load import Trained
from nanodist.pairvae.model import Geometry, Inputs, Statistics, build_model, start_encoder
from nanodist.scattering.pattern import QGrid
from tests.nanodist.test_pairvae import tiny

GEOMETRY = Geometry(QGrid(32, 0.5), 20.0, 32, 6.0, "counts")
SCORES = [
    {"direction": "SAXS to SEM", "method": "PairVAE", "score": "period_error", "items": 9, "median": 0.0213,
     "low": 0.011, "high": 0.042},
    {"direction": "SAXS to SEM", "method": "nearest", "score": "period_error", "items": 9, "median": 0.777},
]  # fmt: skip


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


def test_both_directions_answer_as_the_run_does(tmp_path):
    card = {"license": "CC-BY-4.0", "scores": SCORES}
    report = export_pairvae(trained("modern"), tmp_path / "pair", ("torch-export",), "films", card)
    names = ["torch-export saxs-to-sem", "torch-export sem-to-saxs"]
    assert [row["format"] for row in report["formats"]] == names
    assert all(len(row["images"]) == 2 for row in report["formats"])
    assert json.loads((tmp_path / "pair" / "parity.json").read_text()) == report
    facts = json.loads((tmp_path / "pair" / "torch-export" / "saxs-to-sem.json").read_text())
    assert facts["q_grid"]["size"] == 32 and facts["reference"] == 20.0 and facts["sem"]["pixel_size_nm"] == 6.0
    assert [one["name"] for one in facts["inputs"]] == ["intensity", "mask", "noise"]
    text = (tmp_path / "pair" / "README.md").read_text()
    assert "| SAXS to SEM | period\\_error" not in text and "| SAXS to SEM | period_error | 9 | 0.0213 | " in text
    assert "0.777" not in text and "origin and licence were not stated" in text and "Not inside" in text
    sem_to_saxs = torch.export.load(tmp_path / "pair" / "torch-export" / "sem-to-saxs.pt2").module()
    for count in (1, 5):
        mean, log_variance, intensity = sem_to_saxs(torch.rand(count, 1, 32, 32), torch.zeros(count, 6))
        assert mean.shape == log_variance.shape == (count, 6) and intensity.shape == (count, 32, 32)


def test_weights_held_in_half_precision_answer_to_rounding():
    graph = FromSem(parts_of(trained("modern").model)).eval()
    inputs = torch.rand(2, 1, 32, 32), torch.randn(2, 6)
    held = Held(graph)
    assert all(value.dtype == torch.float16 for value in held.state_dict().values())
    with torch.inference_mode():
        for found, wanted in zip(held(*inputs), graph(*inputs), strict=True):
            assert found.dtype == torch.float32 and not torch.equal(found, wanted)
            assert float((found - wanted).abs().max()) < 2e-2 * float(wanted.abs().max())


def test_what_a_pairvae_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="exported as onnx or torch-export, not as timm"):
        export_pairvae(trained("modern"), tmp_path / "x", ("timm",), "films", {})
    assert list(tmp_path.iterdir()) == []
