"""A trained PairVAE back from its run directory, and what it makes of patterns and of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc.checkpoint.files import CheckpointError, latest_checkpoint, read_state, read_tensors
from hpc.config import build, parse_yaml
from hpc.errors import UserError
from hpc.seeding import generator, key
from nanodist.encoders import Encoder, EncoderSpec, create_trunk
from nanodist.fitting import DAMAGED, fitting, refuse_options
from nanodist.pairvae.data import normals
from nanodist.pairvae.fields import first_images
from nanodist.pairvae.model import Geometry, Inputs, PairModel, build_model
from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.recipe import RECIPE_FILE, PairVAERecipe, Stage
from nanodist.scattering.pattern import Pattern

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
REFERENCE_FILE, LEVELS = "reference.safetensors", "sem.levels"
_AT_ONCE = 16
_MOST_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Trained:
    """A PairVAE in eval mode on the CPU.

    Attributes:
        recipe: what it was trained by.
        model: the module.
        train: keys of the items that it was trained on.
        store: hash of the manifest of the store.
        checkpoint: where the weights came from.
        levels: quantiles of the grey levels that were trained on, evenly from 0 to 1; ``None`` where the run has none.
    """

    recipe: PairVAERecipe
    model: PairModel
    train: tuple[str, ...]
    store: str
    checkpoint: Path
    levels: F64 | None = None

    @property
    def geometry(self) -> Geometry:
        """What patterns and crops are."""
        return self.model.geometry

    @torch.inference_mode()
    def sem_of(self, pattern: Pattern, draws: int, seed: int, name: str) -> F32:
        """Images (draws, P, P) in [0, 1] of a pattern: draws of its latent, and of what a pattern does not know.

        The latter, an image's own map, is drawn from its prior, or is that of a random field which scatters as the
        pattern does, after some rounds of the model's own chain (see :meth:`_settled`): recipe key ``draws_from``.
        """
        latent = self.model.encode_saxs(self._inputs([pattern], None))
        words = [key(seed, "pairvae-draw", name, number) for number in range(draws)]
        noise = torch.from_numpy(normals(words, self.model.latent_dim + self.model.image_noise))
        z = latent.mean + torch.exp(0.5 * latent.log_variance) * noise[:, : self.model.latent_dim]
        own = noise[:, self.model.latent_dim :]
        if self.from_fields:
            assert self.levels is not None
            streams = [generator(seed, "pairvae-field", name, number) for number in range(draws)]
            crops = CropScattering(self.geometry.size_px, self.geometry.pixel_size_nm)
            images = first_images(pattern, crops, self.levels, streams)
            if images is not None:
                own = self._settled(z, own, images, [key(seed, "pairvae-round", name, n) for n in range(draws)])
        made = [self.model.decode_sem(z[i : i + _AT_ONCE], own[i : i + _AT_ONCE]) for i in range(0, draws, _AT_ONCE)]
        return np.asarray(torch.cat(made)[:, 0].numpy(), np.float32)

    @property
    def from_fields(self) -> bool:
        """Whether draws begin with random fields."""
        return self.recipe.draws_from == "field" and self.levels is not None and self.model.image_noise > 0

    def drawing(self, draws_from: Literal["field", "prior"] | None) -> Trained:
        """The same, with draws that begin otherwise, unless ``None``."""
        if draws_from is None:
            return self
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, draws_from=draws_from))

    def _settled(self, z: Tensor, noise: Tensor, images: F32, words: Sequence[int]) -> Tensor:
        """Maps (n, m) of ``images`` (n, P, P), encoded, drawn and decoded under ``z`` (n, d) again and again.

        With the shared vector held, that is a chain whose draws come ever nearer to what the model was trained on
        (pseudo-Gibbs sampling; Rezende, Mohamed, Wierstra, ICML 2014). The prior of a map is white, but maps of images
        are waves: draws from the prior are none that the decoder has seen.
        """
        found = []
        for first in range(0, len(z), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            seen, drawn = list(images[part]), noise[part]
            for number in range(self.recipe.rounds + 1):
                latent = self.model.encode_own(self._inputs(None, seen))
                own = latent.mean + torch.exp(0.5 * latent.log_variance) * drawn
                if number < self.recipe.rounds:
                    seen = list(self.model.decode_sem(z[part], own)[:, 0].numpy())
                    drawn = torch.from_numpy(
                        normals([key(word, "round", number) for word in words[part]], noise.shape[1])
                    )
            found.append(own)
        return torch.cat(found)

    @torch.inference_mode()
    def saxs_of(self, crops: Sequence[F32]) -> F32:
        """The expected pattern (S, S) of one sample, of which there are several crops (P, P) in [0, 1].

        A shared vector is averaged over the crops; a latent map, which knows where a crop lay, is decoded for each.
        """
        latent = self.model.encode_sem(self._inputs(None, crops)).mean
        if self.model.image_noise:
            return np.asarray(self.model.decode_saxs(latent.mean(0, keepdim=True))[0].numpy(), np.float32)
        return np.asarray(self.model.decode_saxs(latent).mean(0).numpy(), np.float32)

    @torch.inference_mode()
    def saxs_again(self, pattern: Pattern) -> F32:
        """The expected pattern (S, S) from a pattern's own latent."""
        latent = self.model.encode_saxs(self._inputs([pattern], None)).mean
        return np.asarray(self.model.decode_saxs(latent)[0].numpy(), np.float32)

    @torch.inference_mode()
    def sem_again(self, crops: Sequence[F32]) -> F32:
        """Images (n, P, P) from the crops' own latents."""
        return np.asarray(self.model.reconstruct_sem(self._inputs(None, crops))[:, 0].numpy(), np.float32)

    @torch.inference_mode()
    def latent_of(self, pattern: Pattern | None, crops: Sequence[F32] | None) -> F64:
        """Mean (d,) of the shared latent of a pattern, or of several crops of a sample."""
        if pattern is not None:
            found = self.model.encode_saxs(self._inputs([pattern], None)).mean
        else:
            found = self.model.encode_sem(self._inputs(None, crops)).mean.mean(0, keepdim=True)
        return found[0].double().numpy()

    def _inputs(self, patterns: Sequence[Pattern] | None, crops: Sequence[F32] | None) -> Inputs:
        """Samples of which one member is given."""
        n = len(patterns) if patterns is not None else len(crops or ())
        side, size = self.geometry.grid.size, self.geometry.size_px
        intensity, sigma = torch.zeros(n, side, side), torch.zeros(n, side, side)
        mask, images = torch.zeros(n, side, side, dtype=torch.bool), torch.zeros(n, 1, size, size)
        for row, pattern in enumerate(patterns or ()):
            intensity[row], mask[row] = torch.from_numpy(pattern.intensity), torch.from_numpy(pattern.mask)
            if pattern.sigma is not None:
                sigma[row] = torch.from_numpy(pattern.sigma)
        for row, crop in enumerate(crops or ()):
            images[row, 0] = torch.from_numpy(crop)
        has = torch.tensor([[float(patterns is not None), float(crops is not None)]]).expand(n, 2)
        made = Inputs(intensity, sigma, mask, images, torch.eye(2).expand(n, 2, 2), has, torch.zeros(n, 0))
        return made._replace(features=self.model.pair_features(made))


def load(run_dir: Path, stage: Stage = "pair") -> Trained:
    """The PairVAE of a run directory of ``nanodist pairvae train``, as it is after a stage.

    Raises:
        UserError: the folder is none, or holds no whole checkpoint of that stage.
    """
    recipe_path = run_dir / RECIPE_FILE
    if not recipe_path.is_file() or not (run_dir / stage / "checkpoints").is_dir():
        raise UserError(f"{run_dir} is not the run directory of nanodist pairvae train with a {stage} stage")
    try:
        folder = latest_checkpoint(run_dir / stage / "checkpoints")
        task: dict[str, Any] = read_state(folder)["task"]
        recipe = build(PairVAERecipe, _read_yaml(recipe_path))
        if task.get("kind") != "pairvae" or task["preset"] != recipe.model.preset:
            raise UserError(f"{run_dir}: the checkpoint is not of the recipe's preset {recipe.model.preset}")
        geometry = Geometry.of_dict(task["geometry"])

        def make() -> PairModel:
            return build_model(recipe.model, geometry, 0, stage, _encoder(task["encoder"], folder), None, None)

        model = fitting(make, read_tensors(folder / "model.safetensors"), folder)
        train = tuple(str(name) for name in task["train"])
        levels = _levels(run_dir / REFERENCE_FILE) if stage == "pair" else None
        return Trained(recipe, model.float().eval(), train, str(task["store"]), folder, levels)
    except (CheckpointError, *DAMAGED) as error:
        raise UserError(f"{run_dir}: cannot load the PairVAE: {' '.join(str(error).split())[:300]}") from None


def _levels(path: Path) -> F64 | None:
    """Grey levels of the training part, which a run that is still trained, and one of before, does not have."""
    found = read_tensors(path).get(LEVELS) if path.is_file() else None
    if found is None:
        return None
    if found.ndim != 1 or len(found) < 2 or not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{path} holds no grey levels")
    return np.asarray(found.double().numpy())


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_RECIPE_BYTES:
        raise UserError(f"{path} is no recipe: it is larger than {_MOST_RECIPE_BYTES >> 20} MiB")
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))


def _encoder(spec: dict[str, Any] | None, folder: Path) -> Encoder | None:
    """A trunk for the weights of a checkpoint to go into."""
    if spec is None:
        return None
    made = build(EncoderSpec, spec, str(folder))
    refuse_options(made.trunk_options, folder)
    made = dataclasses.replace(made, looks=[(1.0, 0, 1)])
    return Encoder(made, create_trunk(made.trunk, 0, **made.trunk_options), "pairvae")
