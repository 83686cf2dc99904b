"""Small engines on the ranks of tests, and the same steps in one process without an engine."""

import os

import torch
import torch.distributed as dist
from torch import nn

from hpc.optimizers import OptimizerConfig, build_optimizer

SAMPLES = 12

CONFIGS = {
    "sgd": OptimizerConfig(name="sgd", weight_decay=0.1),
    "adamw": OptimizerConfig(name="adamw", weight_decay=0.1),
    "lars": OptimizerConfig(name="lars", weight_decay=0.1, trust_coefficient=0.1),
    "lars2": OptimizerConfig(name="lars", weight_decay=0.1, trust_coefficient=0.1, momentum_order="momentum_then_lr"),
    "lamb": OptimizerConfig(name="lamb", weight_decay=0.1),
}


def small_net(dtype=torch.float32):
    """Sizes that no partition ends with."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 7, bias=False)).to(dtype)


def inputs(step, dtype=torch.float32):
    """The global batch of a step; each sample has a mean of its own."""
    x = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (x + torch.arange(SAMPLES)[:, None] / 4).to(dtype)


def loss_of(outputs):
    """A sum over the global batch, so that parts add up."""
    return (outputs.square() + outputs).sum() / SAMPLES


def forget_groups():
    """DeepSpeed keeps groups and counts parts of models for the life of a process; those of tests live shorter."""
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import groups

    partition_parameters.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    comm.cdb = None
    for name, value in list(vars(groups).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


def wide_net(dtype=torch.float32):
    """With a weight that ZeRO 3 gathers for its use only, and whose elements three ranks cannot share evenly."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 401), nn.LayerNorm(401), nn.GELU(), nn.Linear(401, 301, bias=False)).to(dtype)


def build(rank, world_size, config, stage, clip=0.0, micro_batches=1, dtype=torch.float32, net=None):
    """An engine over ``net``, or else :func:`small_net`, on this rank."""
    from hpc.engine import Engine, EngineConfig
    from hpc.topology import Topology

    os.environ["DS_ACCELERATOR"] = "cpu"
    topology = Topology(rank, world_size, rank, world_size, 0, 1, "localhost", "test", "127.0.0.1", 1)
    topology.export()
    forget_groups()
    net = net or small_net(dtype)
    how = EngineConfig(zero_stage=stage, device="cpu")
    optimizer = build_optimizer(net, config, 0.1)
    return Engine(net, optimizer, how, topology, torch.device("cpu"), SAMPLES, clip, micro_batches)


def pass_over(engine, step, micro_batches=1, dtype=torch.float32):
    """Forward and backward of this rank's samples of a step."""
    place = engine.topology
    own = inputs(step, dtype).chunk(place.world_size)[place.rank].chunk(micro_batches)
    for number, part in enumerate(own):
        engine.backward(loss_of(engine.forward(part)), last=number == len(own) - 1)


def rate(step):
    """Learning rates that change from step to step."""
    return 0.1 / (step + 1)


def train(engine, steps, micro_batches=1, dtype=torch.float32):
    """The gradient norms of ``steps``."""
    norms = []
    for step in steps:
        pass_over(engine, step, micro_batches, dtype)
        norms.append(engine.gradient_norm())
        engine.step(rate(step))
    return norms


def weights_of(engine):
    """Copies of all weights; collective."""
    from hpc.checkpoint.elastic import gather

    return {name: tensor.clone() for name, tensor in gather(engine)["model"].items()}


def alone(config, clip=0.0, dtype=torch.float32, steps=3, net=None):
    """Gradient norms and weights of one process, in plain torch."""
    net = net or small_net(dtype)
    optimizer = build_optimizer(net, config, 0.1)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net(inputs(step, dtype))).backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in net.parameters()])))
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return norms, net.state_dict()


def check_close(got, wanted, tolerance):
    """Relative L2 of each tensor."""
    for name, value in wanted.items():
        error = (got[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert error < tolerance, (name, float(error))
