"""What a recipe will need on a cluster: its model and objective are run with shapes but no values, and counted.

The counts go into :mod:`hpc.planner`. Kernels' own workspaces, the CUDA context and fragmentation are not counted;
they are what the reserve is for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc.batch_norm import GroupedBatchNorm, Layout, make_layout
from hpc.errors import UserError
from hpc.optimizers import OptimizerConfig, build_optimizer
from hpc.optimizers.trust import TrustRatioOptimizer
from hpc.planner import Job, Loss, Memory, Norms, Pass, Transfer, Weights, fits, memory, traffic
from hpc.planner_buckets import PretendedBuckets
from hpc.planner_ledger import Ledger
from hpc.world_sizes import check_world_size, legal_world_sizes
from nanodist.encoders import EncoderSpec
from nanodist.objectives import build_objective
from nanodist.pretrain.model import TwoViewModel, build_model
from nanodist.pretrain.preflight_needs import model_size
from nanodist.pretrain.recipe import PretrainRecipe

# What making the views takes at most, as a multiple of the views; tests of the views hold it.
INPUTS_PEAK = 1.3
STAGES = (0, 1, 2)


@dataclass(frozen=True)
class Prediction:
    """One way to run a recipe, and what it takes on a rank.

    Attributes:
        samples: of a rank in a step.
        micro_batches: it passes them in so many parts.
        moved: by each collective in a step.
    """

    ranks: int
    samples: int
    micro_batches: int
    zero_stage: int
    checkpointing: bool
    memory: Memory
    moved: list[Transfer]

    @property
    def micro_batch_size(self) -> int:
        """Samples of a rank that pass at a time."""
        return self.samples // self.micro_batches

    def overrides(self) -> list[str]:
        """What to put behind ``nanodist pretrain RECIPE`` to run this way."""
        return [
            f"train.micro_batch_size={self.micro_batch_size}",
            f"engine.zero_stage={self.zero_stage}",
            *(["encoder.checkpointing=true"] if self.checkpointing else []),
        ]


@contextlib.contextmanager
def pretended_ranks(count: int) -> Iterator[None]:
    """While it is open, this process is rank 0 of ``count``; collectives move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if count == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        dist.destroy_process_group()


class Planner:
    """Counts the parts of a recipe on ``ranks`` ranks, each only once.

    Args:
        recipe: what to train. Its warm start and compilation are left out: they change no size.
        ranks: processes, one a GPU.

    Raises:
        UserError: the recipe's model cannot be built or takes no views of its size, or its batch cannot be shared so.
    """

    def __init__(self, recipe: PretrainRecipe, ranks: int) -> None:
        train = dataclasses.replace(recipe.train, compile=False)
        self.recipe = dataclasses.replace(recipe, train=train, init_from=None)
        self.ranks, self.gloo = ranks, recipe.engine.device == "cpu"
        batch = recipe.train.global_batch_size
        if batch % ranks:
            check_world_size(batch, recipe.bn_group_size(), ranks)
        self.samples = batch // ranks
        model_size(self.recipe)  # says what is wrong with a trunk that does not take the views
        self._model = build_model(self.recipe, any_spec(recipe), Layout(2, 2))
        self._groups = optimizer_groups(self._model, recipe.optimizer)
        self.weights = weigh(self._model, recipe.optimizer)
        self._fake = FakeTensorMode()
        _make_fake(self._model, self._fake)
        self._passes: dict[int, tuple[Pass, Norms]] = {}
        self._losses: Loss | None = None
        self._outputs: list[tuple[int, torch.dtype]] = []

    def micro_batches(self) -> list[int]:
        """Legal numbers of micro-batches, ascending."""
        batch, group = self.recipe.train.global_batch_size, self.recipe.bn_group_size()
        counts = (c for c in range(1, self.samples + 1) if self.samples % c == 0)
        return [c for c in counts if self.ranks in legal_world_sizes(batch, group, self.ranks, c)]

    def predict(self, micro_batches: int, zero_stage: int) -> Prediction:
        """Memory and traffic of a rank that passes its samples in so many parts."""
        if micro_batches not in self._passes:
            with pretended_ranks(self.ranks):
                self._passes[micro_batches] = self._count_pass(micro_batches)
        one, norms = self._passes[micro_batches]
        size = self.recipe.views.size_px
        inputs, on_gpus = 2 * self.samples * size * size * 4, not self.gloo
        job = Job(self.ranks, micro_batches, zero_stage, inputs, INPUTS_PEAK, self.gloo, ahead=on_gpus)
        loss = self._loss()
        return Prediction(
            self.ranks,
            self.samples,
            micro_batches,
            zero_stage,
            self.recipe.encoder.checkpointing,
            memory(self.weights, one, loss, job),
            traffic(self.weights, loss, norms, job),
        )

    def _count_pass(self, micro_batches: int) -> tuple[Pass, Norms]:
        t, views = self.recipe.train, 2 if self.recipe.train.bn_views == "both" else 1
        rows = self.samples // micro_batches
        layout = make_layout(
            t.global_batch_size, self.recipe.bn_group_size(), 0, self.ranks, micro_batches, views=views
        )
        layout.counting = True
        layers = _lay(self._model, layout)
        span = 1 if layout.span is None else dist.get_world_size(layout.span)
        norms = Norms(tuple(layer.num_features for layer in layers), 2 * rows, 2 // views, span)
        size = self.recipe.views.size_px
        with self._fake:
            # A part of the views of all samples, as training cuts it.
            batch = torch.empty(2, self.samples, 1, size, size)[:, :rows]
            one, outputs = count_pass(self._model, layout, batch, self._groups)
        self._outputs = [(z.shape[1], z.dtype) for z in outputs]
        return one, norms

    def _loss(self) -> Loss:
        if self._losses is None:
            with pretended_ranks(self.ranks), self._fake:
                group = dist.group.WORLD if self.ranks > 1 else None
                a, b = (
                    torch.empty(self.samples, width, dtype=dtype, requires_grad=True) for width, dtype in self._outputs
                )
                self._losses = count_loss(self.recipe, a, b, group)
        return self._losses


def any_spec(recipe: PretrainRecipe) -> EncoderSpec:
    """The recipe's encoder for no store in particular: its numbers decide no sizes."""
    e = recipe.encoder
    return EncoderSpec(
        trunk=e.trunk,
        trunk_options=e.trunk_options,
        image_size=recipe.views.size_px,
        mean=0.5,
        std=0.25,
        normalise=e.normalise,
    )


def _lay(model: nn.Module, layout: Layout) -> list[GroupedBatchNorm]:
    """Give the BatchNorm layers of ``model`` another layout."""
    layers = [part for part in model.modules() if isinstance(part, GroupedBatchNorm)]
    for layer in layers:
        layer.layout = layout
        layer.seen.clear()
    layout.layers[:] = layers
    return layers


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Parameters and buffers become shapes without values."""
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = nn.Parameter(fake.from_tensor(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = made
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake.from_tensor(buffer)


def count_pass(model: TwoViewModel, layout: Layout, batch: Tensor, groups: list[int]) -> tuple[Pass, list[Tensor]]:
    """What ``model`` allocates for ``batch`` (2, n, 1, S, S), and its outputs; real or fake tensors alike."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    with Ledger() as ledger:
        with torch.no_grad():
            made = model(batch)
        embed_peak, embed_kept = ledger.peak, ledger.live
        outputs = sum(z.numel() * z.element_size() for z in made)
        del made
        layout.forget()
        scratch = ledger.live
        peaks = {}
        for name, hooks in (
            ("backward_peak", lambda: [p.register_post_accumulate_grad_hook(_drop) for p in trained]),
            ("gathering_peak", lambda: []),
            ("bucketed_peak", lambda: [PretendedBuckets(trained, groups)]),
        ):
            handles = hooks()
            forward_peak, kept, peaks[name], made = _count_graph(model, batch, ledger)
            for handle in handles:
                handle.close() if isinstance(handle, PretendedBuckets) else handle.remove()
            for parameter in trained:
                parameter.grad = None
            layout.forget()
    embed_peak, embed_kept = embed_peak - scratch, embed_kept - scratch
    return Pass(embed_peak, embed_kept, forward_peak, kept, outputs=outputs, scratch=scratch, **peaks), made


def _count_graph(model: TwoViewModel, batch: Tensor, ledger: Ledger) -> tuple[int, int, int, list[Tensor]]:
    """Peak of the forward, what it keeps, peak of the backward, and the outputs."""
    base = ledger.mark()
    made = list(model(batch))
    forward_peak, kept = ledger.peak - base, ledger.live - base
    given = [torch.ones_like(z) for z in made]
    extra = sum(g.numel() * g.element_size() for g in given)  # the loss's to count
    ledger.mark()
    torch.autograd.backward(made, given)
    return forward_peak, kept, ledger.peak - base - extra, [z.detach() for z in made]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def count_loss(recipe: PretrainRecipe, a: Tensor, b: Tensor, group: Any) -> Loss:
    """What the objective allocates and sends for the projections ``a`` and ``b`` (n, d) of a rank."""
    objective = build_objective(recipe.objective)
    with Ledger() as ledger:
        loss = objective(a, b, group, None)
        kept = ledger.live
        loss.backward()  # type: ignore[no-untyped-call]
        peak = ledger.peak
    sent = {name: list(entry) for name, entry in ledger.sent.items()}
    if recipe.data.positives == "group" and recipe.objective.name == "simclr" and group is not None:
        entry = sent.setdefault("_allgather_base_", [0, 0])  # the groups' numbers, int64
        entry[0] += 1
        entry[1] += 8 * len(a)
    return Loss(peak, kept, sent)


def optimizer_groups(model: nn.Module, config: OptimizerConfig) -> list[int]:
    """The number of the optimizer's group of each trained parameter, in the order of the module."""
    number = {p: i for i, g in enumerate(build_optimizer(model, config, 1e-3).param_groups) for p in g["params"]}
    return [number[p] for p in model.parameters() if p.requires_grad]


def weigh(model: nn.Module, config: OptimizerConfig) -> Weights:
    """Sizes of the parameters of ``model`` and of what its optimizer adds."""
    optimizer = build_optimizer(model, config, 1e-3)
    groups = tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    buckets = PretendedBuckets(trained, optimizer_groups(model, config))
    buckets.close()
    states, single = _count_step(config, 1)
    _, several = _count_step(config, 4)
    return Weights(
        groups,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        element=next(model.parameters()).element_size(),
        states=states,
        step_copies=single,
        step_at_once=several > 0.75 * single,
        buckets=len(buckets.sizes()),
        norms=sum(map(len, groups)) if isinstance(optimizer, TrustRatioOptimizer) else 0,
    )


def _count_step(config: OptimizerConfig, tensors: int) -> tuple[float, float]:
    """States and temporaries of a real step, as multiples of ``tensors`` equal weights."""
    weights = nn.ParameterList([nn.Parameter(torch.ones(128, 128)) for _ in range(tensors)])
    optimizer = build_optimizer(weights, config, 1e-3)
    total = sum(w.numel() for w in weights)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with Ledger() as ledger:
            optimizer.step()
    # Counters, one number each, are not worth it.
    states = sum(s.numel() for entry in optimizer.state.values() for s in tensors_of(entry) if s.numel() > 1)
    return round(states / total, 2), round(ledger.peak / (4 * total), 2)


def tensors_of(entry: dict[str, Any]) -> list[Tensor]:
    """The tensors of one entry of an optimizer's state."""
    return [value for value in entry.values() if isinstance(value, Tensor)]


def as_written(planner: Planner) -> Prediction:
    """What the recipe says by itself."""
    recipe = planner.recipe
    return planner.predict(recipe.train.micro_batches(planner.ranks), recipe.engine.zero_stage)


def propose(planner: Planner, limit: int, reserve: float) -> Prediction | None:
    """The fewest micro-batches that fit into ``limit`` bytes, and then the lowest ZeRO stage; ``None``: nothing does.

    In this order, since a second micro-batch costs a forward pass, while ZeRO moves no more than all-reduce does.
    """
    found = None
    counts = planner.micro_batches()
    stages = STAGES if planner.recipe.train.precision != "fp64" else STAGES[:1]
    low, high = 0, len(counts)
    while low < high:  # memory falls with the number of micro-batches
        middle = (low + high) // 2
        ways = (planner.predict(counts[middle], stage) for stage in stages)
        best = next((way for way in ways if fits(way.memory.peak, limit, reserve)), None)
        if best is None:
            low = middle + 1
        else:
            found, high = best, middle
    return found


def with_checkpointing(recipe: PretrainRecipe, ranks: int) -> Planner | None:
    """The same recipe with activations made again in the backward; ``None`` where that cannot be."""
    if recipe.encoder.checkpointing:
        return None
    encoder = dataclasses.replace(recipe.encoder, checkpointing=True)
    try:
        return Planner(dataclasses.replace(recipe, encoder=encoder), ranks)
    except UserError:
        return None


@dataclass(frozen=True)
class Pace:
    """Seconds a sample (both views) through trunk and projector, and where the figures come from."""

    forward_s: float
    both_s: float
    source: str


def given_pace(images_per_s: float) -> Pace:
    """From samples per second of a GPU, as ``images_per_s`` of ``metrics.jsonl`` divided by the ranks."""
    return Pace(1 / (3 * images_per_s), 1 / images_per_s, "given; its forward is assumed to be a third of it")


def device_to_time(recipe: PretrainRecipe) -> torch.device | None:
    """What the recipe runs on, where this machine has it."""
    if recipe.engine.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def measured_pace(recipe: PretrainRecipe, device: torch.device, samples: int) -> Pace:
    """Time forward and backward on ``device``; the least of five after two that do not count."""
    rows = 2 * samples if recipe.train.bn_views == "both" else samples
    model = build_model(dataclasses.replace(recipe, init_from=None), any_spec(recipe), Layout(rows, rows)).to(device)
    model.train()
    views = torch.rand(2, samples, 1, recipe.views.size_px, recipe.views.size_px, device=device)

    def forward() -> None:
        with torch.no_grad():
            model(views)

    def both() -> None:
        a, b = model(views)
        (a.float().sum() + b.float().sum()).backward()
        model.zero_grad()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    forward_s, both_s = (_least_seconds(function, device) / samples for function in (forward, both))
    return Pace(forward_s, both_s, f"measured here on {samples} samples at a time ({name})")


def _least_seconds(function: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])
