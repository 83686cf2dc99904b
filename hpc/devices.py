"""What this process has to compute with, and where a model runs that is used and not trained."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


def inference_device() -> torch.device:
    """The GPU where there is one, else the CPU; ``CUDA_VISIBLE_DEVICES=`` keeps a process off it.

    fp32 stays fp32: torch would give convolutions TF32, and features that differ from a CPU's in the third digit.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    plain_float32()
    return torch.device("cuda", torch.cuda.current_device())


def plain_float32() -> None:
    """No TF32 on GPUs: the precision is the recipe's, never the machine's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@cache
def triton_there() -> bool:
    """Whether Triton is installed; looked up once, as a step asks hundreds of times."""
    return importlib.util.find_spec("triton") is not None
