"""Memory and traffic of a training step under :class:`hpc.engine.Engine`, from numbers alone.

Knows nothing of what is trained: it is told how large the parameters are and what a pass over a micro-batch allocates
(:mod:`hpc.planner_ledger` counts that), and adds what engine, ZeRO stage, BatchNorm and gradient cache hold and send.
Bytes throughout; ``element`` is the size of a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Weights:
    """What is trained.

    Attributes:
        groups: for each parameter group of the optimizer, elements of its parameters in the order of the module.
        buffers: bytes that are neither trained nor sharded.
        element: bytes of a weight; gradients, their sums and the optimizer have the same.
        states: elements of optimizer state for each weight (2 for Adam, 1 for momentum).
        step_copies: temporary elements for each weight of the tensors that one optimizer kernel takes.
        step_at_once: whether that kernel takes all tensors of a group together, or one by one.
        buckets: in which gradients are summed over ranks.
        norms: parameters whose norms are summed over ranks at ZeRO 1 and 2 (optimizers with trust ratios).
    """

    groups: tuple[tuple[int, ...], ...]
    buffers: int = 0
    element: int = 4
    states: float = 2.0
    step_copies: float = 0.0
    step_at_once: bool = False
    buckets: int = 1
    norms: int = 0

    @property
    def count(self) -> int:
        """Elements of all parameters."""
        return sum(sum(group) for group in self.groups)


@dataclass(frozen=True)
class Pass:
    """What passing over one micro-batch allocates, beside weights, inputs and gradients that were there before.

    Attributes:
        embed_peak: most during a forward without a graph; ``embed_kept`` is left of it.
        forward_peak: most during a forward with a graph; ``kept`` is left for the backward, outputs included.
        backward_peak: most during the backward, ``kept`` included, where each gradient is handed over once it is there.
        gathering_peak: the same, where all gradients stay on the parameters, as in a first pass of several.
        bucketed_peak: the same, where gradients lie in buckets until they are reduced, as at ZeRO 2.
        outputs: bytes of the outputs.
        scratch: what layers keep for themselves from then on; in none of the others.
    """

    embed_peak: int
    embed_kept: int
    forward_peak: int
    kept: int
    backward_peak: int
    gathering_peak: int
    bucketed_peak: int
    outputs: int
    scratch: int = 0


@dataclass(frozen=True)
class Loss:
    """What the loss of the global batch needs on a rank, from outputs to their gradients.

    Attributes:
        peak: most bytes beside its inputs, with ``kept`` (gradients of the inputs) left.
        sent: ``{collective: [calls, bytes handed to it]}``.
    """

    peak: int
    kept: int
    sent: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Norms:
    """BatchNorm layers whose groups span ranks, and running statistics.

    Attributes:
        channels: of each layer.
        rows: that pass through a layer at a time on a rank.
        parts: of different groups, in those rows (a part a view).
        span: ranks that share a group; 1: none.
    """

    channels: tuple[int, ...] = ()
    rows: int = 0
    parts: int = 1
    span: int = 1


@dataclass(frozen=True)
class Job:
    """How it runs.

    Attributes:
        ranks: processes, one a GPU.
        micro_batches: passes a step; more than one caches gradients.
        zero_stage: of DeepSpeed.
        inputs: bytes of this rank's inputs of a step, all micro-batches; kept until its end.
        inputs_peak: factor on ``inputs`` while they are made.
        gloo: it runs on CPUs, where the engine sums gradients on all ranks at every stage.
        ahead: the inputs of the next step are made between backward and optimizer, beside those of this one.
    """

    ranks: int
    micro_batches: int
    zero_stage: int
    inputs: int
    inputs_peak: float = 1.0
    gloo: bool = False
    ahead: bool = False

    @property
    def caching(self) -> bool:
        """Whether outputs are made twice."""
        return self.micro_batches > 1

    @property
    def lone(self) -> bool:
        """Whether gradients stay on the parameters, as there is nobody to sum them with."""
        return self.ranks == 1 and self.zero_stage == 0


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank.

    Attributes:
        held: what stays from step to step, by name.
        phases: most at once in each phase of a step, ``held`` included.
    """

    held: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Most at once in a step."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class Transfer:
    """One use of a collective, summed over a step.

    Attributes:
        purpose: what for.
        collective: its name in ``torch.distributed``.
        handed: bytes that a rank hands to it in a step.
        ranks: that take part.
        calls: a step.
    """

    purpose: str
    collective: str
    handed: int
    ranks: int
    calls: float = 1.0

    @property
    def sent(self) -> int:
        """Bytes that leave a rank, by algorithms that use the links best (rings); the mean where ranks differ."""
        others = self.ranks - 1
        factor = {
            "all_reduce": 2 * others / self.ranks,
            "all_gather": float(others),
            "broadcast": others / self.ranks,
            "reduce": others / self.ranks,
            "reduce_scatter": others / self.ranks,
            "all_to_all": others / self.ranks,
        }[self.collective]
        return round(self.handed * factor)


# Names of the operators that torch.distributed calls.
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
}


def _flat(group: tuple[int, ...], ranks: int) -> int:
    """Elements of DeepSpeed's flat tensor of a group: a whole number of partitions that NCCL wants aligned."""
    step = 2 * ranks
    return -(-sum(group) // step) * step


def _flat_all(weights: Weights, ranks: int) -> int:
    return sum(_flat(group, ranks) for group in weights.groups)


def held(weights: Weights, job: Job) -> dict[str, int]:
    """What stays on a rank from step to step."""
    e, w, stage = weights.element, job.ranks, job.zero_stage
    if stage == 0:
        return {
            "weights": weights.count * e + weights.buffers,
            "optimizer states": round(weights.count * weights.states) * e,
            **({} if job.lone else {"flat gradients": weights.count * e}),
        }
    whole = _flat_all(weights, w)
    return {
        "weights": whole * e + weights.buffers,
        "master copy of the partition": whole // w * e,
        "optimizer states": round(whole // w * weights.states) * e,
        "flat gradients": (whole // w if stage == 2 and w > 1 else whole) * e,
    }


def _own_gradients(weights: Weights, job: Job) -> int:
    """Bytes of gradients that lie on the parameters between two passes of a step, or before the optimizer."""
    handed_over = (job.zero_stage == 2 and job.ranks > 1) or (job.micro_batches == 1 and not job.lone)
    return 0 if handed_over else weights.count * weights.element


def _step_peak(weights: Weights, job: Job) -> int:
    """Temporary bytes of the optimizer."""
    if job.zero_stage:
        most = max(_flat(group, job.ranks) // job.ranks for group in weights.groups)
    elif weights.step_at_once:
        most = max(sum(group) for group in weights.groups)
    else:
        most = max(max(group) for group in weights.groups)
    return round(weights.step_copies * most) * weights.element


def memory(weights: Weights, one: Pass, loss: Loss, job: Job) -> Memory:
    """Memory of a rank, where ``one`` is the pass over one of its micro-batches."""
    stays = {**held(weights, job), **({"scratch of layers": one.scratch} if one.scratch else {})}
    base = sum(stays.values()) + job.inputs
    all_outputs = one.outputs * job.micro_batches
    backward = one.bucketed_peak if job.zero_stage == 2 and job.ranks > 1 else one.backward_peak
    own = _own_gradients(weights, job)
    phases = {"inputs": base - job.inputs + round(job.inputs * job.inputs_peak)}
    if not job.caching:
        phases["forward"] = base + one.forward_peak
        phases["loss"] = base + one.kept + loss.peak
        phases["backward"] = base + loss.kept + (one.gathering_peak if job.lone else backward)
    else:
        waiting = all_outputs + loss.kept
        phases["embedding"] = base + one.embed_kept * (job.micro_batches - 1) + max(one.embed_peak, 2 * all_outputs)
        phases["loss"] = base + all_outputs + loss.peak
        # The first pass puts the gradients on the parameters, later ones add to them.
        passes = backward if own == 0 else max(one.gathering_peak, own + backward)
        phases["backward"] = base + waiting + max(passes, own + one.forward_peak)
    done = base + all_outputs + (own if job.lone else 0)
    if job.ahead:
        phases["next inputs"] = done + round(job.inputs * job.inputs_peak)
        done += job.inputs
    phases["optimizer"] = done + _step_peak(weights, job)
    return Memory(stays, phases)


def traffic(weights: Weights, loss: Loss, norms: Norms, job: Job) -> list[Transfer]:
    """What a rank hands to each collective in a step; nothing on one rank."""
    w, e = job.ranks, weights.element
    if w == 1:
        return []
    moved = [*_gradient_traffic(weights, job)]
    for name, (calls, size) in sorted(loss.sent.items()):
        moved.append(Transfer("objective", COLLECTIVES[name], size, w, calls))
    moved += _norm_traffic(norms, job, max(e, 4))
    moved.append(Transfer("preemption flag", "all_reduce", 8, w))
    return [transfer for transfer in moved if transfer.handed]


def _gradient_traffic(weights: Weights, job: Job) -> list[Transfer]:
    w, e = job.ranks, weights.element
    if job.zero_stage == 0:
        return [
            Transfer("gradients", "all_reduce", weights.count * e, w, weights.buckets),
            Transfer("gradient norm", "broadcast", 8, w),
        ]
    passes = job.micro_batches if job.zero_stage == 2 else 1
    flat = _flat_all(weights, w)
    return [
        Transfer(
            "gradients", "all_reduce" if job.gloo else "reduce", weights.count * e * passes, w, weights.buckets * passes
        ),
        Transfer("gradient norm", "all_reduce", 8, w),
        Transfer("trust ratios", "all_reduce", 16 * weights.norms, w, len(weights.groups)),
        Transfer("weights", "all_gather", flat // w * e, w, len(weights.groups)),
    ]


def _norm_traffic(norms: Norms, job: Job, element: int) -> list[Transfer]:
    channels = sum(norms.channels)
    moved = [Transfer("running statistics", "all_reduce", 2 * channels * element, job.ranks)]
    if norms.span > 1:
        graphs = job.micro_batches
        forwards = graphs * (2 if job.caching else 1)
        layers = len(norms.channels)
        moments = forwards * norms.rows * 2 * channels * element
        moved.append(Transfer("BatchNorm moments", "all_gather", moments, norms.span, forwards * layers))
        sums = graphs * norms.parts * 2 * channels * element
        moved.append(Transfer("BatchNorm gradients", "all_reduce", sums, norms.span, graphs * layers))
    return moved


@dataclass(frozen=True)
class Speed:
    """Steps per second, between no overlap of communication with the backward pass and a perfect one."""

    slowest: float
    fastest: float


def speed(
    samples: int, forward_s: float, both_s: float, caching: bool, moved: list[Transfer], bandwidth: float
) -> Speed:
    """Steps per second of a rank.

    Args:
        samples: of a rank in a step.
        forward_s, both_s: seconds a sample of a forward without a graph, and of a forward and a backward.
        caching: adds a forward.
        moved: from :func:`traffic`.
        bandwidth: bytes per second that leave a rank; infinite leaves communication out.
    """
    compute = samples * (both_s + (forward_s if caching else 0.0))
    hidden = sum(t.sent for t in moved if t.purpose == "gradients") / bandwidth
    open_s = sum(t.sent for t in moved if t.purpose != "gradients") / bandwidth
    backward = samples * max(both_s - forward_s, 0.0)
    return Speed(1 / (compute + open_s + hidden), 1 / (compute + open_s + max(0.0, hidden - backward)))


def fits(peak: int, limit: int, reserve: float) -> bool:
    """Whether ``peak`` leaves the share ``reserve`` of ``limit`` free."""
    return peak <= math.floor(limit * (1 - reserve))
