"""The module that is trained: trunk, projector, and a forward over both views."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from hpc.batch_norm import Layout, convert
from hpc.checkpoint.foreign import read_deepspeed
from hpc.errors import UserError
from hpc.seeding import key
from nanodist.encoders import EncoderSpec, create_trunk, load_encoder, normalise, output_width, timm_encoder
from nanodist.heads import build_projector
from nanodist.pretrain.recipe import PretrainRecipe
from nanodist.weights import FROM_TIMM

DEEPSPEED = "deepspeed:"


class TwoViewModel(nn.Module):
    """Projections of two views.

    Args:
        trunk, projector: weights in float32, or float64 for ``precision="fp64"``.
        spec: how pixels are normalised.
        bn_views: both views pass together. With ``"each"`` one lies below the other, and BatchNorm, whose groups end
            where a view ends, never mixes them; with ``"both"`` the two views of a sample follow each other.
        compiled: run the trunk through ``torch.compile``.
        precision: ``"bf16"`` runs trunk and projector under autocast; weights and their gradients stay float32.
        channels_last: memory layout of the images.
    """

    def __init__(
        self,
        trunk: nn.Module,
        projector: nn.Module,
        spec: EncoderSpec,
        precision: str,
        channels_last: bool,
        bn_views: str = "each",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.bn_views = bn_views
        # The method, not the module, so that weights keep their names.
        self._features = torch.compile(trunk.forward) if compiled else trunk.forward
        self.trunk, self.projector, self.spec = trunk, projector, spec
        self.precision = precision
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (n, d) of each of ``views`` (2, n, 1, S, S) in [0, 1]."""
        if self.bn_views == "both":
            a, b = self._project(views.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        else:
            # In one pass, which takes less time than two: every weight is cast, used and given its gradient once.
            a, b = self._project(views.flatten(0, 1)).chunk(2)
        return a, b

    def _project(self, view: Tensor) -> Tensor:
        pixels = normalise(view.double() if self.precision == "fp64" else view, self.spec)
        autocast = (
            torch.autocast(view.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        )
        with autocast:
            return self.projector(self._features(_laid_out(pixels, self.layout)))  # type: ignore[no-any-return]


def _laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """``images`` (n, 1, H, W) in ``layout``, also for the operators that they meet first.

    With one channel both layouts are the same in memory, so that ``contiguous`` leaves the strides of the other one,
    and everything down to the last convolution would be laid out after these.
    """
    return torch.empty_like(images, memory_format=layout).copy_(images)


class _Convolution(nn.Conv2d):
    """Keeps its weight plain, as checkpoints and DeepSpeed's broadcast want it, and uses it in channels_last.

    oneDNN's backward over channels_last images takes a fifth longer with a plain weight than this copy of it.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.contiguous(memory_format=torch.channels_last), bias)


def _use_channels_last(trunk: nn.Module) -> None:
    for part in trunk.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = _Convolution


def build_model(recipe: PretrainRecipe, spec: EncoderSpec, layout: Layout) -> TwoViewModel:
    """The model of a recipe with weights that depend only on its seed and ``init_from``, on the CPU.

    Raises:
        UserError: unknown trunk, a trunk that draws random numbers of its own, or weights that do not fit.
    """
    trunk = create_trunk(spec.trunk, key(recipe.seed, "trunk") % 2**63, **spec.trunk_options)
    refuse_unkeyed_randomness(trunk, spec.trunk)
    if recipe.encoder.checkpointing:
        _checkpoint_activations(trunk, spec.trunk)
    if recipe.init_from:
        _warm_start(trunk, recipe.init_from, spec, recipe.init_trust)
    # Asked of a trunk without memory: a pass through this one would have each rank's libraries make room for it.
    with torch.device("meta"):
        width = output_width(create_trunk(spec.trunk, 0, **spec.trunk_options), recipe.views.size_px)
    projector = build_projector(width, recipe.projector, key(recipe.seed, "projector") % 2**63)
    t = recipe.train
    if t.channels_last:
        _use_channels_last(trunk)
    model = TwoViewModel(trunk, projector, spec, t.precision, t.channels_last, t.bn_views, t.compile)
    convert(model, layout)
    # Only images are channels_last: DeepSpeed broadcasts weights as bytes and wants them contiguous.
    return model.double() if t.precision == "fp64" else model


def refuse_unkeyed_randomness(trunk: nn.Module, name: str) -> None:
    """Raise a ``UserError`` where ``trunk`` drops at random: the draws would depend on the machine."""
    for where, part in trunk.named_modules():
        # timm's names of rates: DropPath and DropBlock, dropout before the classifier, PatchDropout.
        rates = [getattr(part, rate, 0.0) for rate in ("drop_prob", "drop_rate", "prob")]
        rates += [part.p] if isinstance(part, nn.modules.dropout._DropoutNd) else []
        rate = next((rate for rate in rates if isinstance(rate, (int, float)) and rate > 0), None)
        if rate is not None:
            place = f"in '{where}'" if where else "before its head"
            raise UserError(
                f"trunk '{name}' drops at random {place} (rate {rate}), which would depend on the machine; "
                "set its drop rates to 0 in encoder.trunk_options"
            )


def _checkpoint_activations(trunk: nn.Module, name: str) -> None:
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in trunk.modules()):
        raise UserError(
            f"encoder.checkpointing: trunk '{name}' has BatchNorm, whose statistics would be seen twice; "
            "set train.micro_batch_size instead, which saves memory as well"
        )
    try:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UserError(f"encoder.checkpointing: timm cannot do it for trunk '{name}'") from None


def _warm_start(trunk: nn.Module, source: str, spec: EncoderSpec, trust: bool) -> None:
    if source.startswith(FROM_TIMM):
        weights = timm_encoder(source, 0, True, spec.trunk_options).trunk.state_dict()
    elif source.startswith(DEEPSPEED):
        weights = _part(read_deepspeed(source.removeprefix(DEEPSPEED), trust), set(trunk.state_dict()))
    else:
        weights = load_encoder(source).trunk.state_dict()
    own = trunk.state_dict()
    fitting = {name: w for name, w in weights.items() if w.shape == own.get(name, w).shape}
    missing, unexpected = trunk.load_state_dict(fitting, strict=False)
    if missing or unexpected:
        first = (missing or unexpected)[0]
        raise UserError(f"init_from {source} does not fit trunk '{spec.trunk}' (first mismatch: {first})")


def _part(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Of a larger model's ``weights`` those of the part that has most of ``names``, without the part's prefix."""
    last = next(iter(sorted(names)))
    prefixes = {name.removesuffix(last) for name in weights if name.endswith(last)} or {""}
    prefix = max(sorted(prefixes), key=lambda p: sum(p + name in weights for name in names))
    return {name: weights[prefix + name] for name in names if prefix + name in weights}
