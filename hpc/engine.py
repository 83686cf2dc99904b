"""The typed engine section of a recipe, and DeepSpeed behind a small face.

Everything here is a *how*: nodes, ranks and ZeRO stage change where states live, not what is computed. Weights,
gradients, their reduction and the optimizer are float32 (or float64) at every stage; ``bf16`` is an autocast of the
forward inside the module, so that no stage rounds differently.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc.config import option
from hpc.errors import UserError
from hpc.topology import Topology, cuda_index, init_process_group


@dataclass(frozen=True)
class EngineConfig:
    """The section ``engine`` of a recipe; a *how*."""

    zero_stage: Literal[0, 1, 2] = option(0, "0 replicates; 1 shards optimizer states; 2 shards gradients too.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU of the local rank where there is one.")
    threads: int = option(0, "CPU threads a rank; 0 shares the cores of the node among its ranks.", low=0)
    timeout_s: int = option(1800, "A collective that waits longer than this ends the run.", low=1)


def pick_device(config: EngineConfig, topology: Topology) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: CUDA is asked for and not there, or a node has fewer GPUs than ranks.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("engine.device is cuda, but torch sees no GPU; set engine.device=cpu or auto")
    return torch.device("cuda", cuda_index(topology, torch.cuda.device_count()))


def share_threads(config: EngineConfig, topology: Topology) -> int:
    """Set and return torch's CPU threads of this rank: the cores it may use, shared among the ranks of the node.

    A launcher that bound the rank to cores of its own (an affinity mask smaller than the machine) has shared already.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = allowed < (os.cpu_count() or 1)
    threads = config.threads or max(1, allowed if bound else allowed // topology.local_world_size)
    torch.set_num_threads(threads)
    return threads


def start(config: EngineConfig, topology: Topology) -> torch.device:
    """Set device, threads and process group up; to be called once, before anything is built."""
    device = pick_device(config, topology)
    share_threads(config, topology)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    topology.export()
    init_process_group(topology, device.type, config.timeout_s)
    return device


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError:
        raise UserError("DeepSpeed is not installed; training needs it: pip install 'nanodist[train]'") from None
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory all-reduce for CPUs at its start. Only inference uses it, and a run must
    # not depend on whether a machine has a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A module and its optimizer under DeepSpeed.

    Args:
        module: on the CPU, with the same weights on every rank.
        optimizer: over the module's parameters.
        config: the recipe's section.
        topology: where this rank stands.
        device: from :func:`start`.
        global_batch_size: samples a step over all ranks.
        clip_norm: largest global gradient norm; 0 does not clip.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        topology: Topology,
        device: torch.device,
        global_batch_size: int,
        clip_norm: float = 0.0,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.topology, self.device, self.zero_stage = topology, device, config.zero_stage
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(device),
            optimizer=optimizer,
            config=_deepspeed_config(config, topology, global_batch_size, clip_norm, module),
            dist_init_required=False,
        )
        self.module: nn.Module = module
        # DeepSpeed refuses to reduce float64, which is there to check things rather than to train.
        self._own_reduction = next(module.parameters()).dtype == torch.float64
        if self._own_reduction:
            self.deepspeed.enable_backward_allreduce = False

    def forward(self, *inputs: Any) -> Any:
        """Outputs of the module."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one loss of the global batch, of which this rank's backward gives a part.

        DeepSpeed averages over the ranks where the parts want a sum, hence the factor.
        """
        self.deepspeed.backward(loss * self.topology.world_size)
        if self._own_reduction:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.topology.world_size

    def step(self, lr: float) -> None:
        """One optimizer step at learning rate ``lr`` (every parameter group)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()


def _deepspeed_config(
    config: EngineConfig, topology: Topology, global_batch_size: int, clip_norm: float, module: nn.Module
) -> dict[str, Any]:
    if global_batch_size % topology.world_size:
        raise UserError(f"a global batch of {global_batch_size} cannot be shared by {topology.world_size} ranks")
    wide = next(module.parameters()).dtype == torch.float64
    if wide and config.zero_stage:
        raise UserError("float64 runs at engine.zero_stage=0 only")
    return {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": global_batch_size // topology.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "communication_data_type": None if wide else "fp32",
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False, "round_robin_gradients": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
