"""The GPU's kernels, in Triton's interpreter where there is no GPU: what they compute, not how fast."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CHECK = """
import json, sys
from unittest import mock
import torch
from torch import nn
from hpc import batch_norm_gpu
from hpc.batch_norm import convert, make_layout

device = "cuda" if torch.cuda.is_available() else "cpu"
launched = []
plain = batch_norm_gpu._launch

def launch(kernel, *arguments, **fixed):
    launched.append(kernel.__name__)
    plain(kernel, *arguments, **fixed)

def answer(kernels, dtype, channels, size, group, form, given):
    layout = make_layout(8, group, 0, 1)
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(channels).to(torch.float64 if dtype == torch.float64 else torch.float32)
    norm.weight.data.copy_(torch.rand(channels, generator=generator) * 1.5 + 0.5)
    norm = convert(nn.Sequential(norm), layout)[0].to(device)
    x = torch.randn(16, channels, *size, generator=generator, dtype=torch.float64)  # two views of eight
    x += torch.arange(16, dtype=torch.float64).view(-1, 1, 1, 1)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x, dy = (t.to(given).to(device, dtype).contiguous(memory_format=form) for t in (x, dy))
    x.requires_grad_()
    with mock.patch.multiple(batch_norm_gpu, fits=lambda x: kernels, _launch=launch):
        y = norm(x)
        y.backward(dy)
    assert y.is_contiguous(memory_format=form) and y.dtype == dtype
    layout.update_running_statistics()
    return [t.double().cpu() for t in (y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_var)]

worst = {}
for dtype in (torch.float64, torch.bfloat16):
    for channels, size, group in ((5, (7, 9), 4), (70, (3, 3), 8)):
        for form in (torch.contiguous_format, torch.channels_last):
            true = answer(False, torch.float64, channels, size, group, form, dtype)
            for a, b in zip(true, answer(True, dtype, channels, size, group, form, dtype)):
                off = float((a - b).norm() / a.norm())
                worst[str(dtype)] = max(off, worst.get(str(dtype), 0.0))

from nanodist.objectives import nt_xent, nt_xent_gpu
from tests.nanodist.original_objectives import original_nt_xent

cases = (0.2, None, "nt_xent"), (0.05, torch.arange(75) % 7, "nt_xent"), (0.2, None, "cross_view")
for temperature, kin, form in cases:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(75, 20, generator=generator)
    both = [a, a + 0.5 * torch.randn(75, 20, generator=generator)]
    want, got = ([x.to(*t).requires_grad_() for x in both] for t in ((torch.float64,), (device,)))
    original_nt_xent(*want, temperature, kin, cross=form == "cross_view").backward()
    fits = nt_xent_gpu.fits if device == "cuda" else lambda z: True
    with mock.patch.object(nt_xent_gpu, "fits", fits):
        nt_xent(*got, temperature, None, None if kin is None else kin.to(device), form).backward()
    a, b = (torch.cat([x.grad.double().cpu() for x in both]) for both in (got, want))
    worst["nt_xent"] = max(float((a - b).norm() / b.norm()), worst.get("nt_xent", 0.0))
print(json.dumps({"worst": worst, "launched": sorted(set(launched))}))
"""


def test_kernels_are_the_plain_formulas():
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    if __import__("torch").cuda.is_available():
        del environ["TRITON_INTERPRET"]
    done = subprocess.run([sys.executable, "-c", CHECK], env=environ, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launched"] == ["combine", "merge", "moments", "normalise", "sums"]
    # bf16: the rounding of the result alone, which the interpreter takes down instead of to the nearest.
    for what, most in (("torch.float64", 1e-12), ("torch.bfloat16", 4e-3), ("nt_xent", 1e-5)):
        assert found["worst"][what] < most, found["worst"]
