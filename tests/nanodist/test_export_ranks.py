"""A checkpoint of four ranks under ZeRO 2, exported by one process, holds the weights that trained."""

from dataclasses import asdict

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from nanodist.encoders import EncoderSpec, create_trunk, load_encoder
from nanodist.export.weights import export_timm
from tests.hpc.engines import CONFIGS, SAMPLES, build

SPEC = EncoderSpec("test_vit", 64, 0.5, 0.25, trunk_options={"img_size": 64})


class Net(nn.Module):
    """A trunk and a head, named as those of a pretraining."""

    def __init__(self):
        super().__init__()
        self.trunk = create_trunk(SPEC.trunk, 0, **SPEC.trunk_options)
        self.head = nn.Linear(self.trunk.num_features, 3)

    def forward(self, images):
        return self.head(self.trunk(images))


def _trained(rank, world_size, folder):
    from hpc.checkpoint.elastic import gather
    from hpc.checkpoint.files import write

    engine = build(rank, world_size, CONFIGS["adamw"], 2, net=Net())
    for step in range(2):
        draw = torch.Generator().manual_seed(step)
        images = torch.randn(SAMPLES, 1, 64, 64, generator=draw).chunk(world_size)[rank]
        engine.backward(engine.forward(images).square().mean(), last=True)
        engine.gradient_norm()
        engine.step(0.01)
    tensors = gather(engine)
    if rank == 0:
        write(folder, 2, tensors, {"task": {"encoder": asdict(SPEC), "seen": {}}}, 1)
    return {name: value.detach().cpu().numpy().copy() for name, value in engine.module.state_dict().items()}


def test_the_export_of_four_ranks_is_what_trained(ranks, tmp_path):
    of_ranks = ranks.run(4, _trained, tmp_path / "run" / "checkpoints")
    export_timm(load_encoder(tmp_path / "run"), tmp_path / "encoder", {"name": "vit"})
    found, start = load_file(tmp_path / "encoder" / "model.safetensors"), Net().trunk.state_dict()
    assert set(found) == set(start)
    for name, value in found.items():
        assert all(np.array_equal(value, weights[f"trunk.{name}"]) for weights in of_ranks), name
    assert any(not np.array_equal(value, start[name].numpy()) for name, value in found.items())
