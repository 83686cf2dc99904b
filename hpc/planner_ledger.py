"""Counts what a piece of training code allocates and sends, by watching every operation on tensors.

With fake tensors (shapes without values) this costs no memory and hardly any time, so that a step of 32 ranks on large
GPUs can be counted on a laptop; with real tensors it counts a real step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What is handed over (rank's input), by the place of the tensors among the arguments of the c10d operator.
_SENT_ARGUMENT = {
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "broadcast_": 0,
    "reduce_": 0,
    "allgather_": 1,
    "_allgather_base_": 1,
    "alltoall_base_": 1,
    "alltoall_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "gather_": 1,
    "scatter_": 1,
}

_FEW_PIXELS = 4


def taken_inside(func: Any, args: Sequence[Any]) -> int:
    """Bytes that a kernel takes for itself, beside what it returns, where they are known and not small.

    torch's convolutions on the CPU lay weights and their gradients out anew: a copy of the weight in the forward and
    two in the backward (four of images of a few pixels, where oneDNN has no AVX-512), and one more of a weight that is
    not in channels_last. Found with the profiler, as a test does.
    """
    if func is torch.ops.aten.convolution.default:
        weight, copies = args[1], 1
    elif func is torch.ops.aten.convolution_backward.default:
        few = args[0].shape[2:].numel() <= _FEW_PIXELS and "AVX512" not in torch.backends.cpu.get_cpu_capability()
        weight, copies = args[2], 4 if few else 2
    else:
        return 0
    if weight.device.type != "cpu" or weight.dim() != 4:
        return 0
    copies += not weight.is_contiguous(memory_format=torch.channels_last)
    return copies * int(weight.numel()) * int(weight.element_size())


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or results."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class Ledger(TorchDispatchMode):
    """While it is active, adds up the storages that operations make, less those that are gone.

    What existed before counts as nothing; what kernels use inside themselves, only as :func:`taken_inside` knows.

    Attributes:
        live: bytes now.
        peak: most bytes since the last :meth:`mark`.
        sent: ``{operator: [calls, bytes]}`` that this rank handed to the operators of :data:`_SENT_ARGUMENT`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sent: dict[str, list[int]] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def mark(self) -> int:
        """Begin a new phase for :attr:`peak`; returns what is live."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and enter what it made, or what it sends."""
        if func.namespace == "c10d":
            self._enter_collective(func.__name__, args)
            return func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks for a device or a layout, most often of all
            return func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._enter(tensor, before)
        self.peak = max(self.peak, self.live + taken_inside(func, args))
        return result

    def _enter_collective(self, name: str, args: Sequence[Any]) -> None:
        name = name.split(".")[0]
        if name not in _SENT_ARGUMENT:
            return
        size = sum(t.numel() * t.element_size() for t in tensors_in(args[_SENT_ARGUMENT[name]]))
        entry = self.sent.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += size

    def _enter(self, tensor: Tensor, before: set[int]) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in before or key in self._known:
            return  # a view, or written in place
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
