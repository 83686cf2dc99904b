"""The recipe of a pretraining: every value that decides its result, and those that only decide how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hpc.config import apply_overrides, build, option, parse_yaml, section
from hpc.engine import EngineConfig
from hpc.errors import UserError
from hpc.optimizers import OptimizerConfig
from hpc.task import GuardConfig, SavingConfig
from hpc.tracking import TrackingConfig
from hpc.world_sizes import legal_world_sizes
from nanodist import recipes
from nanodist.encoders import EncoderSpec, Look, Pooling, check_looks
from nanodist.fitting import FETCHING
from nanodist.heads import ProjectorConfig
from nanodist.objectives import ObjectiveConfig
from nanodist.views import ViewsConfig


@dataclass(frozen=True)
class DataConfig:
    """The section ``data``. The store enters the fingerprint by the hash of its manifest, not by its path."""

    store: str = option("", "Folder or address (https://, s3://) of a store that nanodist pack wrote.", how=True)
    mix: list[tuple[str, float]] = option(
        [],
        "Several stores in place of one, as [STORE, weight]: shares of each batch, hashed with the stores.",
        how=True,
    )
    manifest: str = option(
        "", "Hash of the manifest to train on; empty: what the run began with, or else the newest.", how=True
    )
    split: Literal["all", "train", "test"] = option("all", "Take only one part of the store's groups.")
    test_share: float = option(0.3, "With split: share of each label's groups that is held out.", low=0.0, high=1.0)
    window_mb: int = option(
        768,
        "Stores of more MiB are shuffled in blocks within such a window, and not all at once; 0: always all.",
        low=0,
    )
    corrupt: Literal["error", "replace"] = option(
        "error",
        "A damaged sample stops the run, or another one stands in for it, the same on any ranks, and is counted.",
    )
    positives: Literal["image", "group"] = option(
        "image", "What two views show: one tile, or two tiles of one group (micrograph), which then are no negatives."
    )
    cache_mb: int = option(
        128, "Memory a rank for decoded tiles (a store that fits is decoded once), or for blocks.", low=0, how=True
    )
    workers: int | None = option(
        None,
        "Processes a rank that read ahead; 0: the training thread reads; null: as cores and encoding say.",
        low=0,
        how=True,
    )
    read_ahead: int = option(2, "Batches that are read ahead.", low=1, how=True)
    stage_to: str = option(
        "", "Folder on a disk of the node (such as $TMPDIR) to copy shards to, once a node.", how=True
    )
    remote_cache: str = option("", "Folder for blocks of remote shards; empty: NANODIST_CACHE or ~/.cache.", how=True)
    remote_cache_mb: int = option(20480, "Most MiB in that folder.", low=1, how=True)


@dataclass(frozen=True)
class EncoderConfig:
    """The section ``encoder``: the trunk, and how an image is embedded with it afterwards."""

    trunk: str = option("resnet18", "timm model name.")
    trunk_options: dict[str, Any] = option({}, "More arguments of timm.create_model, such as channels of a ResNet.")
    checkpointing: bool = option(
        False,
        "Activations are made again in the backward: less memory, more work; for trunks without BatchNorm.",
        how=True,
    )
    normalise: Literal["store", "image"] = option("store", "Pixels by the store's or each image's mean and deviation.")
    pooling: Pooling = option("last", "Feature stages that make an embedding, averaged over the image and joined.")
    looks: list[Look] | None = option(
        None, "How an image is embedded: a list of [scale, crop_px, symmetries]; null: whole, at the views' mean scale."
    )

    def check(self) -> None:
        """Raise ``ValueError`` for a look or a trunk option that no checkpoint could be loaded with."""
        check_looks(self.looks or [])
        fetching = sorted(FETCHING & self.trunk_options.keys())
        if fetching:
            raise ValueError(f"trunk_options: '{fetching[0]}' loads weights; give them by init_from (timm:NAME@FILE)")
        other = sorted({"name", "seed", "in_chans", "num_classes"} & self.trunk_options.keys())
        if other:
            raise ValueError(f"trunk_options: '{other[0]}' is set by the recipe itself; leave it out")


@dataclass(frozen=True)
class TrainConfig:
    """The section ``train``."""

    steps: int | None = option(None, "Optimizer steps; wins over epochs.", low=1)
    epochs: float | None = option(100.0, "Passes over the store, where steps is not given.", low=0.0)
    global_batch_size: int = option(128, "Samples a step over all ranks; each gives two views.", low=2)
    bn_group_size: int | None = option(None, "Samples that BatchNorm is taken over; null: the batch.", low=2)
    bn_views: Literal["each", "both"] = option("each", "BatchNorm over each view by itself, or over both together.")
    micro_batch_size: int | None = option(
        None,
        "Most samples that a rank passes at a time; null: all of its part. Smaller parts cache gradients.",
        low=1,
        how=True,
    )
    non_finite: Literal["stop", "skip"] = option("stop", "What follows a loss or a gradient that is not finite.")
    precision: Literal["fp32", "bf16", "fp64"] = option("fp32", "bf16: autocast over fp32 weights and reductions.")
    log_every_steps: int = option(10, "Steps between lines of metrics.jsonl.", low=1, how=True)
    compile: bool = option(False, "torch.compile the trunk: faster after a slow start, differs in rounding.", how=True)
    channels_last: bool = option(True, "Memory layout of the images; faster, differs in rounding.", how=True)

    def check(self) -> None:
        """Raise ``ValueError`` where the length is missing or groups cannot fill the batch."""
        if self.steps is None and not self.epochs:
            raise ValueError("give steps or epochs")
        if self.bn_group_size is not None and self.global_batch_size % self.bn_group_size:
            raise ValueError(f"bn_group_size {self.bn_group_size} does not divide {self.global_batch_size}")

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches of each rank: the fewest that keep ``micro_batch_size`` and whole BatchNorm groups.

        Raises:
            UserError: no number does; the legal numbers of ranks for undivided parts are named by the layout.
        """
        local = self.global_batch_size // world_size
        most = self.micro_batch_size or local
        group = self.bn_group_size or self.global_batch_size
        if most >= local or self.global_batch_size % world_size:
            return 1  # what does not divide at all is refused where the layout is made
        for count in range(-(-local // most), local + 1):
            if local % count == 0 and world_size in legal_world_sizes(self.global_batch_size, group, world_size, count):
                return count
        raise UserError(
            f"train.micro_batch_size {most} on {world_size} ranks cannot keep BatchNorm groups of {group} samples "
            f"whole inside a micro-step (at most {most * world_size} samples); choose a smaller train.bn_group_size "
            "or a larger micro_batch_size"
        )

    def total_steps(self, samples: int) -> int:
        """Optimizer steps over a store of ``samples``."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0.0) * samples / self.global_batch_size))


@dataclass(frozen=True)
class EvaluationConfig:
    """The section ``evaluation``: how good the encoder is while it trains; a *how*, as it changes nothing in it."""

    store: str = option("", "Labelled store that the encoder is measured on; empty: no evaluation.")
    every_epochs: float = option(
        10.0, "Passes over the data between evaluations; the last is at the end; 0: none.", low=0.0
    )
    labels_per_class: int = option(8, "Labelled samples a class; the others are told from them.", low=1)
    neighbours: int = option(5, "k of the k-nearest-neighbour accuracy.", low=1)


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything about one pretraining."""

    seed: int = option(0, "Of weights, order and views.", low=0)
    run_dir: str = option("", "Where the run lives; empty: runs/FINGERPRINT.", how=True)
    init_from: str | None = option(
        None,
        "Warm start: a run, an export folder, timm:NAME (weights that timm loads), timm:NAME@FILE (weights in a file), "
        "or deepspeed:CHECKPOINT.",
    )
    init_trust: bool = option(
        False, "Unpickle the checkpoint of init_from, which runs code that it may carry; --trust sets it.", how=True
    )
    data: DataConfig = section(DataConfig)
    views: ViewsConfig = section(ViewsConfig)
    encoder: EncoderConfig = section(EncoderConfig)
    projector: ProjectorConfig = section(ProjectorConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    engine: EngineConfig = section(EngineConfig, how=True)
    checkpoint: SavingConfig = section(SavingConfig, how=True)
    guard: GuardConfig = section(GuardConfig, how=True)
    evaluation: EvaluationConfig = section(EvaluationConfig, how=True)
    tracking: TrackingConfig = section(TrackingConfig, how=True)

    def bn_group_size(self) -> int:
        """Samples of one view a BatchNorm group."""
        return self.train.bn_group_size or self.train.global_batch_size

    def encoder_spec(
        self, mean: float, std: float, tile_px: tuple[int, int] = (256, 256), pixel_size_nm: float = 1.0
    ) -> EncoderSpec:
        """How images are embedded: at the mean scale of the views, as the trunk saw them.

        Args:
            mean, std: of the store's grey values in [0, 1].
            tile_px: height and width of a tile; they matter for ``views.crop_share`` alone.
            pixel_size_nm: of a typical tile; it matters for ``views.crop_nm`` alone.
        """
        scale = self.views.size_px / self.views.mean_crop_px(*tile_px, pixel_size_nm)
        return EncoderSpec(
            trunk=self.encoder.trunk,
            trunk_options=self.encoder.trunk_options,
            image_size=self.views.size_px,
            mean=mean,
            std=std,
            normalise=self.encoder.normalise,
            pooling=self.encoder.pooling,
            looks=self.encoder.looks or [(round(scale, 3), 0, 1)],
        )


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with nanodist."""
    return recipes.names("pretrain")


def load_recipe(source: str, overrides: list[str]) -> PretrainRecipe:
    """The recipe of a YAML file, or of a packaged name, with dotted overrides.

    Raises:
        UserError: no such file or name, or anything in it that a recipe cannot hold.
    """
    text = recipes.text("pretrain", source)
    return build(PretrainRecipe, apply_overrides(parse_yaml(text, f"recipe {source}"), overrides))
