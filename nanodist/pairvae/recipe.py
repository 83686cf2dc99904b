"""The recipe of a PairVAE: a solo stage, in which each modality learns by itself, and a pair stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hpc import config
from hpc.config import apply_overrides, build, option, parse_yaml, section
from hpc.engine import EngineConfig
from hpc.errors import UserError
from hpc.optimizers import OptimizerConfig
from hpc.task import GuardConfig, SavingConfig
from hpc.tracking import TrackingConfig
from hpc.world_sizes import legal_world_sizes
from nanodist import recipes

OWN = "conv"
RECIPE_FILE = "recipe.yaml"
Stage = Literal["solo", "pair"]
STAGES: tuple[Stage, ...] = ("solo", "pair")


@dataclass(frozen=True)
class PairDataConfig:
    """The section ``data``: which pairs, and how a micrograph becomes a crop."""

    store: str = option("", "Store that nanodist pack --pairs wrote.", how=True)
    test_share: float = option(1 / 3, "Share of the specimens that is never trained on.", low=0.0, high=0.9)
    split_seed: int = option(0, "Which specimens these are.", low=0)
    size_px: int = option(192, "Side of a crop.", low=32)
    pixel_size_nm: float | None = option(
        None, "Pixel that micrographs are brought to; null: the median of the training part.", low=1e-3
    )
    contrast: Literal["grey", "binary"] = option(
        "grey", "What is learned of a micrograph: its levels between two percentiles, or 0 and 1 (local threshold)."
    )
    window_px: int = option(15, "With binary: side of the window of the local threshold.", low=3)
    smooth_px: float = option(0.7, "With grey: standard deviation of a Gaussian against noise.", low=0.0)


@dataclass(frozen=True)
class PairModelConfig:
    """The section ``model``."""

    preset: Literal["lu2023", "modern"] = option("modern", "As published, or with the physics kept.")
    encoder: str = option(
        OWN, "Trunk of the SEM encoder (lu2023: of both): a run, an export, timm:NAME; modern: also 'conv', its own."
    )
    encoder_weights: Literal["given", "random"] = option("given", "random drops what the trunk learned.")
    trunk_options: dict[str, Any] = option({}, "With timm:NAME, more arguments of timm.create_model.")
    latent_side: int = option(6, "lu2023: side of the latent map.", low=2)
    latent_width: int = option(32, "Channels of the latent map (lu2023), numbers of the shared latent (modern).", low=2)
    local_width: int = option(16, "modern: channels of the SEM image's own latent map, one cell per 8 x 8 px.", low=1)
    width: int = option(32, "modern: channels of the decoders where they are narrowest is half of it.", low=8)
    saxs_filters: int = option(8, "lu2023: filters of the SAXS decoder.", low=1)
    saxs_kernel: int = option(5, "lu2023: their side.", low=3)
    sem_filters: int = option(32, "lu2023: filters of the SEM decoder.", low=1)
    sem_kernel: int = option(15, "lu2023: their side.", low=3)
    max_rotation_deg: float = option(0.0, "modern: one common rotation of both members, up to this.", low=0, high=180)
    flip: bool = option(False, "modern: one common reflection of both members, in half of the cases.")
    zoom: float = option(1.0, "modern: one common magnification of both members, from 1 / zoom to zoom.", low=1.0)
    fixed_crop_from_epoch: int | None = option(
        None, "From this epoch of the pair stage on each image keeps one crop; null: always a new one.", low=0
    )

    def check(self) -> None:
        """Raise ``ValueError`` for values that do not go together."""
        if self.preset == "lu2023":
            if self.encoder == OWN:
                raise ValueError("preset lu2023 stands on a pretrained trunk: set encoder to a run or timm:NAME")
            if self.max_rotation_deg or self.flip or self.zoom != 1.0:
                raise ValueError("max_rotation_deg, flip and zoom are of preset modern; lu2023 only crops")
            if self.saxs_kernel % 2 == 0 or self.sem_kernel % 2 == 0:
                raise ValueError("saxs_kernel and sem_kernel are odd")


@dataclass(frozen=True)
class StageConfig:
    """The sections ``solo`` and ``pair``: how long, and what the loss weighs. Terms that a preset lacks weigh 0."""

    epochs: float = option(100.0, "Passes over the training part.", low=0.0)
    saxs_epochs: float | None = option(
        None, "lu2023, solo: from this epoch on the SAXS VAE rests; null: it never does.", low=0.0
    )
    global_batch_size: int = option(8, "Samples a step over all ranks.", low=1)
    micro_batch_size: int | None = option(None, "modern: most samples a rank passes at once.", low=1, how=True)
    weights: dict[str, float] = option({}, "Weight of each term of the loss; docs/pairvae.md explains them.")
    redundancy_weight: float = option(0.0051, "lu2023, pair: off-diagonal weight of Barlow Twins.", low=0.0)
    draws: int = option(2, "modern: SEM images drawn from each pattern a step, for the physics term.", low=1)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    non_finite: Literal["stop", "skip"] = option("stop", "What follows a loss or a gradient that is not finite.")
    log_every_steps: int = option(10, "Steps between lines of metrics.jsonl.", low=1, how=True)
    picture_every_epochs: float = option(50.0, "Epochs between grids of reconstructions; 0: none.", low=0.0, how=True)

    def steps(self, samples: int) -> int:
        """Optimizer steps of the stage over ``samples``."""
        return max(1, round(self.epochs * samples / self.batch_size(samples)))

    def batch_size(self, samples: int) -> int:
        """Samples a step; all of them, where there are fewer."""
        return min(self.global_batch_size, samples)


@dataclass(frozen=True)
class PairVAERecipe:
    """Everything about one PairVAE."""

    seed: int = option(0, "Of the weights, the order, the crops and all draws.", low=0)
    run_dir: str = option("", "Where the run lives, with a folder for each stage; empty: runs/FINGERPRINT.", how=True)
    data: PairDataConfig = section(PairDataConfig)
    model: PairModelConfig = section(PairModelConfig)
    solo: StageConfig = section(StageConfig)
    pair: StageConfig = section(StageConfig)
    draws: int = option(8, "SEM images that evaluate and generate draw from a pattern.", low=1, how=True)
    draws_from: Literal["field", "prior"] = option(
        "field",
        "modern: what draws of images begin with: random fields that scatter as the pattern does, or the prior.",
        how=True,
    )
    rounds: int = option(4, "modern, with field: how often a draw is encoded and decoded again.", low=0, how=True)
    evaluate: bool = option(True, "After training, generate from specimens that no stage saw, and score it.", how=True)
    engine: EngineConfig = section(EngineConfig, how=True)
    checkpoint: SavingConfig = section(SavingConfig, how=True)
    guard: GuardConfig = section(GuardConfig, how=True)
    tracking: TrackingConfig = section(TrackingConfig, how=True)

    def check(self) -> None:
        """Raise ``ValueError`` for weights of terms that the preset does not have."""
        known = TERMS[self.model.preset]
        for stage in STAGES:
            for name in self.stage(stage).weights:
                if name not in known:
                    raise ValueError(
                        f"{stage}.weights: preset {self.model.preset} has no term '{name}'; it has {known}"
                    )
        cells = self.data.size_px // 8
        if self.model.preset == "modern" and self.data.size_px % 32:
            raise ValueError(f"data.size_px {self.data.size_px} is no multiple of 32 ({cells} cells of 8 px)")
        side, size = self.model.latent_side, self.data.size_px
        if self.model.preset == "lu2023" and (size % side or size // side & (size // side - 1)):
            raise ValueError(f"data.size_px {size} is not model.latent_side {side} times a power of two")

    def stage(self, name: Stage) -> StageConfig:
        """The section of a stage."""
        return self.solo if name == "solo" else self.pair

    def view(self, name: Stage) -> StageView:
        """What :func:`hpc.job.run_task` has to know of a stage."""
        stage = self.stage(name)
        return StageView(self, name, self.engine, stage.optimizer, self.guard, self.tracking)


TERMS: dict[str, tuple[str, ...]] = {
    "lu2023": ("barlow", "saxs_saxs", "saxs_sem", "sem_sem", "sem_saxs", "kl"),
    "modern": (
        "saxs_saxs",
        "sem_saxs",
        "sem_sem",
        "saxs_sem",
        "kl_saxs",
        "kl_sem",
        "coupling",
        "physics",
    ),
}


@dataclass(frozen=True)
class StageView:
    """One stage of a recipe as a job of its own."""

    recipe: PairVAERecipe
    name: Stage
    engine: EngineConfig
    optimizer: OptimizerConfig
    guard: GuardConfig
    tracking: TrackingConfig


def micro_batches(stage: StageConfig, samples: int, world_size: int, coupled: bool) -> int:
    """Passes of each rank a step.

    Args:
        coupled: BatchNorm is taken over the global batch, so that a rank passes all its samples at once.

    Raises:
        UserError: the ranks cannot share the batch; names the legal numbers.
    """
    batch = stage.batch_size(samples)
    legal = legal_world_sizes(batch, batch if coupled else 1)
    if world_size not in legal:
        raise UserError(
            f"{world_size} ranks cannot share a batch of {batch} (there are {samples} training items); legal numbers "
            f"of ranks: {', '.join(map(str, legal))}"
        )
    local = batch // world_size
    if coupled or stage.micro_batch_size is None:
        return 1
    return next(
        count for count in range(1, local + 1) if local % count == 0 and local // count <= stage.micro_batch_size
    )


def load_recipe(source: str, overrides: list[str]) -> PairVAERecipe:
    """The recipe of a YAML file, or of a packaged name, with dotted overrides.

    Raises:
        UserError: no such file or name, or anything in it that a recipe cannot hold.
    """
    text = recipes.text("pairvae", source)
    return build(PairVAERecipe, apply_overrides(parse_yaml(text, f"recipe {source}"), overrides))


def identify(recipe: PairVAERecipe, store_hash: str, encoder_hash: str) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a run, and the *what* that it is made of; a trunk from a path counts by its weights."""
    inputs = {"store": store_hash}
    what = config.to_dict(recipe, what_only=True)
    if encoder_hash:
        inputs["encoder"] = encoder_hash
        what["model"]["encoder"] = ""
    return config.identity_hash(what, inputs), {**what, "inputs": inputs}


def of_stage(what: dict[str, Any], stage: Stage) -> tuple[str, dict[str, Any]]:
    """Fingerprint and *what* of one stage: the solo stage does not depend on the pair stage, which follows it."""
    kept = {name: value for name, value in what.items() if not (stage == "solo" and name == "pair")}
    kept["stage"] = stage
    return config.identity_hash(kept, what["inputs"]), kept
