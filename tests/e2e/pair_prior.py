"""How far the maps of training images are from their prior: ``python -m tests.e2e.pair_prior RUN... --store STORE``.

For each run of preset modern: of the maps of turned training crops, the largest component of their Fourier transform
over the mean one (averaged over the maps; waves have few large ones, white maps have none), the smallest and largest
variance over the channels' principal axes, and the same of white maps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from nanodist.pairvae.data import PairData, Sampler
from nanodist.pairvae.load import load
from nanodist.pairvae.run import open_store
from nanodist.pairvae.task import to_inputs


def maps_of(run: Path, store: str, epochs: int) -> np.ndarray:
    """Maps (n, channels, cells, cells) drawn from the posteriors of turned training crops."""
    trained = load(run)
    data = PairData(open_store(store), trained.recipe.data)
    sampler = Sampler(data, trained.recipe.model, trained.recipe.seed, "prior", trained.model.image_noise)
    found = []
    with torch.inference_mode():
        for epoch in range(epochs):
            batch = sampler.batch(0, np.full(len(data.train), epoch), data.train)
            latent = trained.model.encode_own(to_inputs(batch, torch.device("cpu")))
            found.append(latent.mean + torch.exp(0.5 * latent.log_variance) * torch.from_numpy(batch.noise))
    cells = trained.geometry.size_px // 8
    return torch.cat(found).unflatten(1, (-1, cells, cells)).numpy()


def figures(maps: np.ndarray) -> dict[str, float]:
    """See the module."""
    centred = maps - maps.mean((0, 2, 3), keepdims=True)
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(1).reshape(len(maps), -1)
    channels = np.moveaxis(centred, 1, 0).reshape(maps.shape[1], -1)
    variances = np.linalg.eigvalsh(np.cov(channels))
    peak = float((power.max(1) / power.mean(1)).mean())
    return {"largest_component": peak, "smallest_variance": variances[0], "largest_variance": variances[-1]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    for run in options.runs:
        maps = maps_of(run, options.store, options.epochs)
        result[str(run)] = figures(maps)
        result.setdefault("white", figures(np.random.default_rng(0).standard_normal(maps.shape)))
    for name, values in result.items():
        print(f"{name:40s} " + "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
