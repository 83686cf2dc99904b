"""The recipe of a fine-tuning, for classification or segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hpc import config
from hpc.config import apply_overrides, build, option, parse_yaml, section
from hpc.errors import UserError
from hpc.sections import EngineConfig, GuardConfig, OptimizerConfig, SavingConfig
from hpc.tracking import TrackingConfig
from hpc.world_sizes import legal_world_sizes
from nanodist import recipes
from nanodist.downstream.labels import Budget
from nanodist.views import ViewsConfig
from nanodist.weights import named_by_timm


@dataclass(frozen=True)
class LabelsConfig:
    """The section ``data``: which labels are trained on. Splits and draws are those of ``nanodist probe``."""

    store: str = option("", "Store with labels, which training and validation come from.", how=True)
    test_store: str = option(
        "", "Store with other micrographs that is the whole test; empty: a share of store.", how=True
    )
    labels_per_class: int = option(
        0, "Labels a class (masks in all), those of the validation part among them; 0: all.", low=0
    )
    split_seed: int = option(0, "Which micrographs are the test, where there is no test_store.", low=0)
    draw_seed: int = option(0, "Which samples of the other micrographs give their labels.", low=0)
    test_share: float = option(0.25, "Share of each class's micrographs that is the test.", low=0.01, high=0.9)
    validation_share: float = option(
        0.25, "Share of each class's labelled micrographs that chooses the step; 0: none.", low=0.0, high=0.9
    )
    validation_from: int = option(
        8, "With fewer labels a class than this all are trained on, and the last step is taken.", low=2
    )
    cache_mb: int = option(2048, "Memory a rank for decoded tiles.", low=0, how=True)

    @property
    def budget(self) -> Budget:
        """Labels a class, as the probe writes it."""
        return self.labels_per_class or "all"


@dataclass(frozen=True)
class StartConfig:
    """The section ``encoder``: what the trunk is, and where its weights come from."""

    source: str = option("", "A run, a checkpoint, an export folder, timm:NAME, or timm:NAME@FILE (weights in a file).")
    weights: Literal["given", "random"] = option(
        "given", "random keeps the trunk and drops what it learned: supervised training from scratch."
    )
    trunk_options: dict[str, Any] = option({}, "With timm:NAME, more arguments of timm.create_model.")
    normalise: Literal["store", "image"] = option("image", "With timm:NAME, how pixels are normalised.")


@dataclass(frozen=True)
class DecoderConfig:
    """The section ``decoder``: from features to masks, where ``task`` is segmentation."""

    name: Literal["unet", "fpn"] = option("unet", "U-Net (Ronneberger 2015) or feature pyramid (Kirillov 2019).")
    width: int = option(128, "Channels of the decoder where it is widest.", low=8)
    masks: Literal["classes", "instances"] = option(
        "classes", "What pixels of masks mean: a class, or the number of an object (0: background)."
    )
    dice_weight: float = option(1.0, "Weight of the Dice loss beside cross entropy.", low=0.0)

    def check(self) -> None:
        """Raise ``ValueError`` for a width that the decoder cannot have."""
        if self.name == "fpn" and self.width % 64:
            raise ValueError(f"width is {self.width}; a feature pyramid wants a multiple of 64")


@dataclass(frozen=True)
class FinetuneTrainConfig:
    """The section ``train``."""

    steps: int = option(300, "Optimizer steps at most.", low=1)
    global_batch_size: int = option(32, "Samples a step over all ranks; all labels, where there are fewer.", low=1)
    micro_batch_size: int | None = option(
        None, "Most samples that a rank passes at a time; null: all.", low=1, how=True
    )
    tuned_layers: int | None = option(
        None, "Last blocks of the trunk that are trained; 0: the head alone; null: the whole trunk.", low=0
    )
    layer_decay: float = option(1.0, "Each earlier block learns this many times as fast.", low=0.0, high=1.0)
    batch_norm: Literal["frozen", "batch"] = option(
        "frozen", "Statistics of pretraining, or of bn_group_size samples of the batch."
    )
    bn_group_size: int | None = option(None, "Samples that BatchNorm is taken over; null: the batch.", low=2)
    zooms: Literal["drawn", "joined"] = option(
        "drawn", "drawn: a view is at one of views.zooms; joined: the head sees the features of one at each."
    )
    class_weights: Literal["none", "balanced"] = option("none", "balanced: every class weighs the same in the loss.")
    label_smoothing: float = option(0.0, "Share of the target that is spread over all classes.", low=0.0, high=0.9)
    evaluate_every_steps: int = option(20, "Steps between looks at the validation part.", low=1)
    patience: int = option(8, "Looks without a better one before training stops; 0: it never does.", low=0)
    non_finite: Literal["stop", "skip"] = option("stop", "What follows a loss or a gradient that is not finite.")
    precision: Literal["fp32", "bf16", "fp64"] = option("fp32", "bf16: autocast over fp32 weights and reductions.")
    log_every_steps: int = option(10, "Steps between lines of metrics.jsonl.", low=1, how=True)

    @property
    def tuned(self) -> str:
        """What of the trunk is trained, in words."""
        return {None: "all", 0: "head"}.get(self.tuned_layers, f"last {self.tuned_layers}")

    def batch_size(self, samples: int) -> int:
        """Samples a step where ``samples`` are trained on: no sample comes twice in a batch."""
        return min(self.global_batch_size, samples)

    def group_size(self, samples: int) -> int:
        """Samples a BatchNorm group; 1 where statistics are frozen and samples do not meet.

        Raises:
            UserError: it does not divide the batch.
        """
        if self.batch_norm == "frozen":
            return 1
        batch = self.batch_size(samples)
        group = self.bn_group_size or batch
        if batch % group or group < 2 <= batch:  # of a single mask, the statistics are over its pixels
            raise UserError(
                f"train.bn_group_size {group} does not divide the batch of {batch} (there are {samples} training "
                "labels); choose a divisor, or train.batch_norm=frozen"
            )
        return group

    def micro_batches(self, samples: int, world_size: int) -> int:
        """Micro-batches of each rank: the fewest that keep ``micro_batch_size`` and whole BatchNorm groups.

        Raises:
            UserError: the ranks cannot share the batch; names the legal numbers.
        """
        batch, group = self.batch_size(samples), self.group_size(samples)
        local = batch // world_size
        for count in range(-(-local // (self.micro_batch_size or max(local, 1))), local + 1):
            if count and local % count == 0 and world_size in legal_world_sizes(batch, group, world_size, count):
                return count
        legal = ", ".join(map(str, legal_world_sizes(batch, group)))
        raise UserError(
            f"{world_size} ranks cannot share a batch of {batch} samples (there are {samples} training labels) with "
            f"BatchNorm over {group}; legal numbers of ranks: {legal}"
        )


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything about one fine-tuning."""

    task: Literal["classification", "segmentation"] = option("classification", "Labels of images, or masks.")
    seed: int = option(0, "Of the head's weights, the order and the views.", low=0)
    run_dir: str = option("", "Where the run lives; empty: runs/FINGERPRINT.", how=True)
    data: LabelsConfig = section(LabelsConfig)
    encoder: StartConfig = section(StartConfig)
    decoder: DecoderConfig = section(DecoderConfig)
    views: ViewsConfig = section(ViewsConfig)
    symmetries: int = option(8, "Rotations and reflections that a prediction is averaged over.", low=1, high=8)
    train: FinetuneTrainConfig = section(FinetuneTrainConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    engine: EngineConfig = section(EngineConfig, how=True)
    checkpoint: SavingConfig = section(SavingConfig, how=True)
    guard: GuardConfig = section(GuardConfig, how=True)
    tracking: TrackingConfig = section(TrackingConfig, how=True)

    @property
    def sample_views(self) -> list[ViewsConfig]:
        """What each sample is seen as in a step: one view, or where zooms are joined one of each."""
        if self.train.zooms == "drawn":
            return [self.views]
        return [replace(self.views, zooms=[zoom]) for zoom in self.views.zooms]

    def check(self) -> None:
        """Raise ``ValueError`` for values that do not go together."""
        if self.train.batch_norm == "frozen" and self.encoder.weights == "random":
            raise ValueError(
                "encoder.weights=random has no statistics that train.batch_norm=frozen could keep; "
                "set train.batch_norm=batch"
            )
        if self.task == "segmentation" and self.train.class_weights != "none":
            raise ValueError("train.class_weights is for classification; masks are weighed by decoder.dice_weight")
        if self.task == "segmentation" and self.train.zooms == "joined":
            raise ValueError("train.zooms=joined is for classification; a mask has the scale of its view")
        if self.encoder.weights == "random" and self.train.tuned_layers:
            raise ValueError(
                "encoder.weights=random has no blocks worth keeping: leave train.tuned_layers out to train from "
                "scratch, or set it to 0 for a random trunk as a baseline"
            )


def load_recipe(source: str, overrides: list[str]) -> FinetuneRecipe:
    """The recipe of a YAML file, or of a packaged name, with dotted overrides.

    Raises:
        UserError: no such file or name, or anything in it that a recipe cannot hold.
    """
    text = recipes.text("finetune", source)
    return build(FinetuneRecipe, apply_overrides(parse_yaml(text, f"recipe {source}"), overrides))


def identify(
    recipe: FinetuneRecipe, stores: Sequence[str], weights_hash: Callable[[], str]
) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a fine-tuning, and the *what* that it is made of: recipe, stores, and weights it begins with.

    Args:
        recipe: of the fine-tuning.
        stores: hash of the manifest of the store, and of the test store where there is one.
        weights_hash: of the encoder that it begins with; asked for where ``encoder.source`` is a path, whose weights
            count and not the path itself.
    """
    inputs = dict(zip(("store", "test_store"), stores, strict=False))
    what = config.to_dict(recipe, what_only=True)
    if not named_by_timm(recipe.encoder.source):
        inputs["encoder"] = weights_hash()
        what["encoder"]["source"] = ""
    return config.identity_hash(what, inputs), {**what, "inputs": inputs}
