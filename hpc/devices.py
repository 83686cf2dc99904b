"""Where a model runs that is used and not trained."""

from __future__ import annotations

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
