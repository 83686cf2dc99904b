"""The typed engine section of a recipe, and DeepSpeed behind a small face.

Everything here is a *how*: nodes, ranks and ZeRO stage change where states live, not what is computed. Weights,
gradients, their reduction and the optimizer are float32 (or float64) at every stage; ``bf16`` is an autocast of the
forward inside the module, so that no stage rounds differently. DeepSpeed partitions states, steps the optimizer and
gathers weights; gradients are summed by :mod:`hpc.reduction`, in one way at ZeRO 0, 1 and 2.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc.devices import plain_float32
from hpc.environment import threads_of_rank
from hpc.errors import UserError
from hpc.optimizers.partitions import segments
from hpc.optimizers.trust import TrustRatioOptimizer
from hpc.reduction import Gradients, LoneGradients, PartitionedGradients, ReplicatedGradients
from hpc.sections import EngineConfig
from hpc.topology import Topology, cuda_index, init_process_group
from hpc.zero3 import ShardedGradients

ZERO3_BUCKET_ELEMENTS = 10_000_000


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

    A launcher that bound the rank to cores of its own (an affinity mask smaller than the machine) has shared already;
    a rank that is alone on its node heeds ``OMP_NUM_THREADS``.
    """
    threads = config.threads or threads_of_rank(topology.local_world_size)
    torch.set_num_threads(threads)
    return threads


def start(config: EngineConfig, topology: Topology) -> torch.device:
    """Set device, threads and process group up; to be called once a training, before anything is built."""
    device = pick_device(config, topology)
    share_threads(config, topology)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _as_the_recipe_says(config)
    topology.export()
    init_process_group(topology, device.type, config.timeout_s)
    _forget_former_groups()
    return device


def _as_the_recipe_says(config: EngineConfig) -> None:
    """Keep a GPU from choosing its own arithmetic.

    Deterministic kernels make a start and a restart on the same GPUs equal bit for bit, where cuDNN has them.
    """
    plain_float32()
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for equal results


@contextlib.contextmanager
def running(config: EngineConfig, topology: Topology) -> Iterator[torch.device]:
    """:func:`start`, and the end of the process group after the block."""
    device = start(config, topology)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _forget_former_groups() -> None:
    """DeepSpeed keeps its copy of the world of an earlier training in this process, which is gone."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._WORLD_GROUP = None  # type: ignore[attr-defined]


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "deepspeed":
            raise UserError("DeepSpeed is not installed; training needs it: pip install 'nanodist[train]'") from None
        raise UserError(f"DeepSpeed is installed and does not start: {' '.join(str(error).split())[:300]}") from error
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
        micro_batches: passes a step, each over an equal share of the rank's samples.

    Raises:
        UserError: the batch cannot be shared, or the stage does not go with the optimizer, the dtype or the module.
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
        micro_batches: int = 1,
    ) -> None:
        deepspeed = _import_deepspeed()
        _check(module, optimizer, config)
        self.topology, self.device, self.zero_stage = topology, device, config.zero_stage
        module.to(device)
        lain_last = _lay_contiguously(module)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_deepspeed_config(config, topology, global_batch_size, micro_batches, module),
            dist_init_required=False,
        )
        if not config.zero_stage:
            for parameter in lain_last:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.module: nn.Module = module
        self._adapting = optimizer if isinstance(optimizer, TrustRatioOptimizer) else None
        self._clip_norm = clip_norm
        self._norm: float | None = None
        # A group of its own, so that its collectives never interleave with those of losses and norms in the backward.
        self._group: Any = dist.new_group() if topology.world_size > 1 else None
        self._gradients = self._take_gradients()
        if isinstance(optimizer, TrustRatioOptimizer) and config.zero_stage in (1, 2):
            optimizer.shard(segments(self.optimizer), self._group)

    def _take_gradients(self) -> Gradients:
        # In the order of the module, not of the optimizer's groups: backward fills them from the last to the first.
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if self.zero_stage == 3:
            return ShardedGradients(self.optimizer)
        self.deepspeed.enable_backward_allreduce = False
        if self.zero_stage:
            return PartitionedGradients(self.optimizer, trained, self.topology.rank, self._group)
        return LoneGradients(trained) if self._group is None else ReplicatedGradients(trained, self._group)

    def forward(self, *inputs: Any) -> Any:
        """Outputs of the module."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of one loss of the global batch, of which this rank's backward gives a part.

        The parts of all ranks and passes are summed, never averaged. ``last`` marks the last pass of a step; after it
        the sums over the ranks are there.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self._norm = None
        if self.zero_stage == 3:
            loss = loss * self.topology.world_size
        self._gradients.backward(lambda: self.deepspeed.backward(loss, scale_wrt_gas=False), last)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """L2 norm of the summed gradient before clipping, the same on all ranks; not finite if any element is not.

        Collective, the first time after a step's last backward.
        """
        if self._norm is None:
            norms = torch.stack(torch._foreach_norm(self._gradients.tensors()))
            square = norms.double().square().sum()
            if self._group is not None and self.zero_stage:
                dist.all_reduce(square, group=self._group)
            elif self._group is not None:
                # The gradients are the same everywhere, the last bit of their norm need not be.
                dist.broadcast(square, 0, group=self._group)
            self._norm = math.sqrt(square.item()) if math.isfinite(square.item()) else float(square.item())
        return self._norm

    @torch.no_grad()
    def _clip(self) -> None:
        norm = self.gradient_norm()
        if norm > self._clip_norm:
            torch._foreach_mul_(self._gradients.tensors(), self._clip_norm / (norm + 1e-6))

    def step(self, lr: float) -> None:
        """One optimizer step at learning rate ``lr``, times ``lr_scale`` of a parameter group that has one."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self._clip_norm:
            self._clip()
        self.deepspeed.step()
        self._gradients.stepped()
        self._norm = None

    def trust_ratios(self) -> dict[str, float]:
        """Of the last step, see :meth:`TrustRatioOptimizer.trust_ratios`; empty for optimizers without."""
        return {} if self._adapting is None else self._adapting.trust_ratios()

    def discard(self) -> None:
        """Drop the gradients of the passes since the last step; nothing else changes."""
        self._gradients.discard()
        self._norm = None


def _lay_contiguously(module: nn.Module) -> list[nn.Parameter]:
    """Lay the weights out plainly, which DeepSpeed's broadcast and flat groups want; those that were channels_last.

    At ZeRO 0 they go back. A convolution over a channels_last image gives a channels_last image either way.
    """
    moved = [parameter for parameter in module.parameters() if not parameter.is_contiguous()]
    for parameter in moved:
        parameter.data = parameter.data.contiguous()
    return [parameter for parameter in moved if parameter.ndim == 4]


def _check(module: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig) -> None:
    if config.zero_stage and next(module.parameters()).dtype == torch.float64:
        raise UserError("float64 runs at engine.zero_stage=0 only")
    if config.zero_stage < 3:
        return
    if isinstance(optimizer, TrustRatioOptimizer):
        name = type(optimizer).__name__
        raise UserError(f"{name} needs the norms of whole parameters, which engine.zero_stage=3 cuts; use 0, 1 or 2")
    normed = [name for name, part in module.named_modules() if "BatchNorm" in type(part).__name__]
    if normed:
        raise UserError(f"engine.zero_stage=3 is for models without BatchNorm, and '{normed[0]}' is one; use 0, 1 or 2")


def _deepspeed_config(
    config: EngineConfig, topology: Topology, global_batch_size: int, micro_batches: int, module: nn.Module
) -> dict[str, Any]:
    if global_batch_size % (topology.world_size * micro_batches):
        passes = f" in {micro_batches} micro-batches each" if micro_batches > 1 else ""
        raise UserError(
            f"a global batch of {global_batch_size} cannot be shared by {topology.world_size} ranks{passes}"
        )
    wide = next(module.parameters()).dtype == torch.float64
    # At ZeRO 3 DeepSpeed reduces, and by default would hold 2 GB of buffer for it.
    by_stage: dict[int, dict[str, Any]] = {
        1: {"compute_grad_norm": False},
        2: {"compute_grad_norm": False},
        3: {"reduce_bucket_size": ZERO3_BUCKET_ELEMENTS},
    }
    return {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": global_batch_size // (topology.world_size * micro_batches),
        "gradient_accumulation_steps": micro_batches,
        # Norm, clipping and reduction are the engine's.
        "gradient_clipping": 0.0,
        "communication_data_type": None if wide else "fp32",
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "round_robin_gradients": False,
            **by_stage.get(config.zero_stage, {}),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
