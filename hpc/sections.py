"""Sections that recipes of several kinds have; none needs torch, so that thousands of recipes are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc.config import option

MomentumOrder = Literal["lr_then_momentum", "momentum_then_lr"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The section ``optimizer`` of a recipe."""

    name: Literal["adamw", "sgd", "lars", "lamb"] = option("adamw", "Which optimizer; lars and lamb: large batches.")
    lr: float = option(1e-3, "Peak learning rate, at lr_batch_size samples a step.", low=0.0)
    lr_batch_size: int = option(0, "lr is scaled by global_batch_size / lr_batch_size; 0 leaves it as it is.", low=0)
    weight_decay: float = option(0.05, "Decay of weights; biases and norms are left out.", low=0.0)
    momentum: float = option(0.9, "Momentum of SGD and LARS.", low=0.0, high=1.0)
    momentum_order: MomentumOrder = option(
        "lr_then_momentum",
        "LARS: its momentum sums steps (the paper, SimCLR), or gradients that lr multiplies after (Barlow Twins).",
    )
    trust_coefficient: float = option(0.001, "LARS: |weight| / |gradient| is multiplied by it.", low=0.0)
    betas: tuple[float, float] = option((0.9, 0.999), "Averages of AdamW and LAMB.", low=0.0, high=0.999999)
    schedule: Literal["cosine", "constant"] = option("cosine", "What follows the warm-up.")
    warmup_steps: int = option(100, "Steps of linear warm-up, at most a tenth of the run.", low=0)
    decay_steps: int = option(
        0, "The cosine ends after so many steps, and its last rate stays; 0: with the run.", low=0
    )
    final_lr_factor: float = option(0.01, "Share of the peak at the last step of the cosine.", low=0.0, high=1.0)
    clip_norm: float = option(0.0, "Largest global gradient norm (L2); 0 does not clip.", low=0.0)

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate after the warm-up for a batch of ``global_batch_size`` (linear scaling rule)."""
        return self.lr * (global_batch_size / self.lr_batch_size if self.lr_batch_size else 1.0)


@dataclass(frozen=True)
class EngineConfig:
    """The section ``engine`` of a recipe; a *how*."""

    zero_stage: Literal[0, 1, 2, 3] = option(
        0, "0 replicates; 1 shards optimizer states; 2 shards gradients too; 3 weights too (no BatchNorm, LARS, LAMB)."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU of the local rank where there is one.")
    deterministic: bool = option(True, "On GPUs: only cuDNN kernels that give the same bits again; false: the fastest.")
    threads: int = option(0, "CPU threads a rank; 0 shares the cores of the node among its ranks.", low=0)
    timeout_s: int = option(1800, "A collective that waits longer than this ends the run.", low=1)
    surplus_ranks: Literal["refuse", "idle"] = option(
        "refuse", "Where the recipe cannot run on so many ranks: refuse, or train on as many as it can."
    )


@dataclass(frozen=True)
class SavingConfig:
    """The section ``checkpoint`` of a recipe; a *how*."""

    every_steps: int = option(100, "Steps between checkpoints; the last step is always saved.", low=1)
    keep: int = option(2, "How many of the newest checkpoints stay.", low=1)
    keep_every_steps: int = option(0, "Checkpoints of multiples of this step stay for good; 0: none do.", low=0)
    keep_best: int = option(0, "How many of the best stay: by online evaluation, or else by the loss.", low=0)
    background: bool = option(True, "Write while training goes on; it waits for the copy to memory only.")


@dataclass(frozen=True)
class GuardConfig:
    """The section ``guard`` of a recipe: what ends a start before its time; a *how*."""

    margin_s: float = option(120.0, "Save and stop this long before the end of the job's time limit.", low=0.0)
    hang_s: float = option(1800.0, "No step for so long is a hang: stacks are dumped, the rank ends; 0: off.", low=0.0)
    futile_starts: int = option(
        3, "After so many starts in a row that failed with no progress, refuse; 0: never.", low=0
    )
