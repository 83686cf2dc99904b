"""What a GPU computes is what a CPU computes. Skipped where there is no GPU."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hpc.batch_norm import convert, make_layout
from hpc.devices import inference_device
from nanodist.encoders import EncoderSpec, random_encoder
from nanodist.objectives import nt_xent
from nanodist.shards import PackOptions, pack
from nanodist.synth import MORPHOLOGIES, Settings, write_dataset
from nanodist.views import draw, on_cpu, on_device
from nanodist.views.noise import unit_noise
from tests.nanodist.original_objectives import original_nt_xent
from tests.nanodist.test_objectives import FORMS, _projections
from tests.nanodist.test_views import VARIED, _tiles

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
RECIPE = ["encoder.trunk=resnet10t", "projector.widths=[64,32]", "views.size_px=48", "views.crop_px=[72,96]"]
RECIPE += ["train.global_batch_size=16", "train.bn_group_size=4", "train.log_every_steps=1", "tracking.mode=disabled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of synthetic micrographs."""
    path = tmp_path_factory.mktemp("cuda")
    write_dataset(path / "synth", 1, 8, MORPHOLOGIES, Settings(size_px=96))
    pack([path / "synth" / "images"], path / "store", PackOptions(tile=96), labels="folder")
    return path


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_views_are_the_same_pixels(name, dtype):
    tiles, config = _tiles(dtype=dtype), VARIED[name]
    drawn = draw(config, 0, [3] * len(tiles), [f"sample-{i}" for i in range(len(tiles))], 0, *tiles.shape[-2:])
    shape = (len(tiles), 1, config.size_px, config.size_px)
    a = on_cpu.apply(tiles, drawn, config, torch.empty(shape))
    b = on_device.apply(tiles.cuda(), drawn, config, torch.empty(shape, device="cuda"))
    torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-4)


def test_noise_is_the_same():
    keys = torch.arange(1, 2**62, 2**60)
    torch.testing.assert_close(unit_noise(keys.cuda(), 50, 41).cpu(), unit_noise(keys, 50, 41), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_objectives_and_gradients_are_those_of_the_papers(name):
    columns, ours, original = FORMS[name]
    a, b = _projections(torch.float64, columns)
    want = [x.clone().requires_grad_() for x in (a, b)]
    original(*want).backward()
    got = [x.cuda().requires_grad_() for x in (a, b)]
    ours(*got, None).backward()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("width", [64, 128, 200])
def test_nt_xent_of_many_views(dtype, most, width):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(700, width, generator=generator)
    views = [x.to(dtype) for x in (a, a + 0.5 * torch.randn(700, width, generator=generator))]
    want, got = ([x.to(*t).requires_grad_() for x in views] for t in ((torch.float64,), ("cuda",)))
    original_nt_xent(*want, 0.2).backward()
    nt_xent(*got, 0.2).backward()
    a, b = (torch.cat([x.grad.double().cpu() for x in both]) for both in (got, want))
    assert (a - b).norm() / b.norm() < most


def test_batch_norm_over_groups():
    answers = []
    for device in ("cpu", "cuda"):
        net = convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4)).double(), make_layout(16, 4, 0, 1)).to(device)
        x = torch.randn(16, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = (x + torch.arange(16.0, dtype=torch.float64).view(-1, 1, 1, 1)).to(device).requires_grad_()
        net(x).pow(3).sum().backward()
        answers.append((x.grad.cpu(), net[0].weight.grad.cpu()))
    torch.testing.assert_close(*answers, rtol=1e-9, atol=1e-9)


def test_features_are_those_of_the_cpu_in_fp32():
    images = [np.random.default_rng(i).integers(0, 255, (96, 96), np.uint8) for i in range(6)]
    encoder = random_encoder(EncoderSpec("resnet18", 96, 0.5, 0.25, "image"), 0)
    want = encoder.embed(images)
    np.testing.assert_allclose(encoder.to(inference_device()).embed(images), want, rtol=0, atol=2e-4 * want.std())


def _command(folder, name, *changes):
    line = [sys.executable, "-m", "nanodist", "pretrain", "simclr", f"data.store={folder / 'store'}"]
    return [*line, f"run_dir={folder / name}", *RECIPE, *changes]


def _train(folder, name, *changes):
    done = subprocess.run(_command(folder, name, *changes), capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text)["loss"] for text in lines if "loss" in json.loads(text)]


def test_a_run_on_a_gpu_is_the_run_on_the_cpu(folder):
    common = ("train.steps=6", "train.precision=fp64")
    cpu = _train(folder, "cpu", *common, "engine.device=cpu")
    gpu = _train(folder, "gpu", *common, "engine.device=cuda")
    parts = _train(folder, "parts", *common, "engine.device=cuda", "train.micro_batch_size=8")
    np.testing.assert_allclose(parts, gpu, rtol=1e-6)
    np.testing.assert_allclose(gpu, cpu, rtol=1e-3)  # views are the same to 1e-4 only


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(folder):
    common = ("train.steps=300", "checkpoint.every_steps=20", "engine.device=cuda", "engine.zero_stage=1")
    killed = subprocess.Popen(_command(folder, "killed", *common), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    latest, end = folder / "killed" / "checkpoints" / "latest", time.monotonic() + 200
    while not latest.exists() and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert latest.read_text().strip() < "step-00000300"
    assert _train(folder, "killed", *common)[-20:] == _train(folder, "whole", *common)[-20:]
