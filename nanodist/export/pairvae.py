"""A PairVAE as graphs that others run without nanodist, in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpc.seeding import generator
from nanodist.export.folder import made_whole, require_graphs, tell
from nanodist.export.pair_card import card_text
from nanodist.export.pair_code import SAXS, SEM, code_of
from nanodist.export.precision import require_half
from nanodist.export.weights import refuse_taken, require_finite
from nanodist.pairvae.images import prepared, tiling
from nanodist.pairvae.load import Trained
from nanodist.scattering.frame import Frame
from nanodist.scattering.geometry import Geometry as Detector
from nanodist.scattering.pattern import Pattern
from nanodist.scattering.regrid import regrid

DRAWS = 2
_GLUE_SAXS = """
def answer(pixels):
    pixels = pixels.astype("float32")
    intensity, mask = on_grid(pixels, np.isfinite(pixels), *q_of(pixels.shape, **{geometry}))
    return [intensity, mask, *sem_of(intensity, mask, np.random.default_rng(0).standard_normal(({draws}, {noise})))]
"""
_GLUE_SEM = """
def answer(pixels):
    tiles = tiles_of(pixels, ({pixel!r}, {pixel!r}))
    return [tiles[:, 0], *saxs_of(tiles)]
"""


def export_pairvae(
    trained: Trained,
    target: Path,
    formats: Sequence[str],
    name: str,
    card: Mapping[str, Any],
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write both directions of a PairVAE in every format of ``formats`` to the folder ``target``, or nothing at all.

    Args:
        trained: from :func:`nanodist.pairvae.load.load`.
        target: a folder that does not exist yet, or is empty.
        formats: some of :data:`nanodist.export.folder.GRAPHS`.
        name: on the card.
        card: ``license``, ``data_note``, ``recipe`` and ``scores`` (rows of the evaluation's ``scores.json``), each of
            which may lack.
        precision: ``fp32``, or ``fp16``, in which the weights are then held; intensities span more than that, so that
            the graphs compute in float32.

    Returns:
        The parity report, as in ``parity.json``: see :func:`nanodist.export.parity.compare`.

    Raises:
        UserError: a format that a PairVAE has not, or that needs what is not installed; ``target`` is taken or cannot
            be written; or what is loaded back gives other answers.
    """
    from nanodist.export.parity import compare

    wanted = require_graphs(formats, "a PairVAE", "its model is our own")
    refuse_taken(target)
    require_finite(trained.model.state_dict(), name)
    if precision == "fp16":
        require_half(dict(trained.model.named_parameters()), name)
    with made_whole(target) as folder:
        _write(trained, folder, wanted, precision)
        images, jobs = _checks(trained, json.dumps(str(folder.resolve()))[1:-1], wanted)
        parity = compare(jobs, images, precision)
        tell(folder, parity, card_text(trained, name, card, wanted, parity, target.name))
    return parity


def _write(trained: Trained, folder: Path, formats: Sequence[str], precision: str) -> None:
    from torch.export import Dim

    from nanodist.export.graph import traced, write_graphs
    from nanodist.export.pair_graph import FromSaxs, FromSem, parts_of
    from nanodist.export.precision import Held

    model, side, size = trained.model, trained.geometry.grid.size, trained.geometry.size_px
    batch, latent = Dim("batch", min=1), model.latent_dim
    planes = (torch.zeros(2, side, side), torch.ones(2, side, side), torch.zeros(2, latent + model.image_noise))
    tiles = (torch.zeros(2, 1, size, size), torch.zeros(2, latent))
    parts = parts_of(model)
    for stem, graph, examples in ((SAXS, FromSaxs(parts, latent), planes), (SEM, FromSem(parts), tiles)):
        given: nn.Module = graph.eval()
        sizes: tuple[Any, ...] = ({0: batch},) * len(examples)
        if precision == "fp16":
            given, sizes = Held(given).eval(), (sizes,)  # all inputs are one, of its own signature
        made = traced(given, examples, sizes, f"the PairVAE ({stem})")
        facts = {**_facts(trained, stem), "weights": precision}
        write_graphs(made, facts, folder, formats, stem)


def _facts(trained: Trained, stem: str) -> dict[str, Any]:
    """``saxs-to-sem.json`` and ``sem-to-saxs.json``: what a program must know beside the graph."""
    from nanodist.export.graph import OPSET

    geometry, model, data = trained.geometry, trained.model, trained.recipe.data
    side, size, latent = geometry.grid.size, geometry.size_px, model.latent_dim
    noise = latent + (model.image_noise if stem == SAXS else 0)
    what = {"name": "noise", "shape": ["batch", noise], "what": "standard normal for a draw, 0 for the mean"}
    latents = [
        {"name": "latent_mean", "shape": ["batch", latent]},
        {"name": "latent_log_variance", "shape": ["batch", latent]},
    ]
    plane, image = ["batch", side, side], ["batch", 1, size, size]
    pattern = {"name": "intensity", "shape": plane, "what": f"{geometry.kind}, of each pixel of q_grid"}
    if stem == SAXS:
        mask = {"name": "mask", "shape": plane, "what": "1 where measured, else 0; intensity is 0 there"}
        inputs, outputs = [pattern, mask, what], [*latents, {"name": "images", "shape": image, "what": "0 to 1"}]
        inside = ["asinh(intensity / reference)", "mask", "encoder", "draw of the latent by noise", "image decoder"]
    else:
        inputs = [{"name": "images", "shape": image, "what": "prepared tiles, 0 to 1"}, what]
        outputs = [*latents, pattern]
        inside = [
            "normalisation of the tile",
            "encoder",
            "draw of the latent by noise",
            "pattern decoder",
            "sinh or exp",
        ]
    q_grid = {
        **geometry.grid.as_dict(),
        "q_step_inv_nm": geometry.grid.q_step_inv_nm,
        "beam_at_px": [(side - 1) / 2, (side - 1) / 2],
        "q_y": "grows towards row 0",
    }
    sem = {"size_px": size, "pixel_size_nm": geometry.pixel_size_nm, "contrast": data.contrast}
    more = {"window_px": data.window_px} if data.contrast == "binary" else {"smooth_px": data.smooth_px}
    return {
        "schema": 1,
        "task": f"pairvae {stem}",
        "preset": trained.recipe.model.preset,
        "inputs": inputs,
        "outputs": outputs,
        "type": "float32",
        "q_grid": q_grid,
        "reference": geometry.reference,
        "pattern_kind": geometry.kind,
        "sem": {**sem, **more},
        "inside": inside,
        "beside": "regridding of a detector's frame and preparation of a micrograph: see the code in README.md",
        "noise_of": {"latent": latent, "image": noise - latent},
        "sizes": "The batch is free; patterns and tiles have one size.",
        "opset": OPSET,
    }


def _checks(trained: Trained, here: str, formats: Sequence[str]) -> tuple[list[npt.NDArray[Any]], list[Any]]:
    """The files of both directions, and for each format and direction what has to come out."""
    from nanodist.export.parity import Job

    detectors, frames = _frames(trained)
    micrographs = _micrographs(trained)
    noise = trained.model.latent_dim + trained.model.image_noise
    pixel = 0.8 * trained.geometry.pixel_size_nm
    glue = {
        SAXS: _GLUE_SAXS.format(geometry=detectors, draws=DRAWS, noise=noise),
        SEM: _GLUE_SEM.format(pixel=pixel),
    }
    wanted = {
        SAXS: [_from_frame(trained, frame, detectors) for frame in frames],
        SEM: [_from_micrograph(trained, pixels, pixel) for pixels in micrographs],
    }
    jobs = [
        Job(f"{kind} {stem}", code_of(trained, here, kind, stem) + glue[stem], "answer", wanted[stem], first)
        for stem, first in ((SAXS, 0), (SEM, len(frames)))
        for kind in formats
    ]
    return [*frames, *micrographs], jobs


def _frames(trained: Trained) -> tuple[dict[str, Any], list[npt.NDArray[np.float32]]]:
    """A detector over the middle of the q grid, and frames on it with a ring, gaps as NaN."""
    grid = trained.geometry.grid
    height, width, pixel_mm, wavelength_nm = 150, 171, 0.172, 0.1
    reach = 0.9 * grid.q_max_inv_nm  # at half the width
    distance = width / 2 * pixel_mm / np.tan(2 * np.arcsin(reach * wavelength_nm / (4 * np.pi)))
    detector: dict[str, Any] = {
        "beam_centre_px": (71.3, 90.2),
        "pixel_size_mm": (pixel_mm, pixel_mm),
        "distance_mm": float(distance),
        "wavelength_nm": wavelength_nm,
    }
    q_y, q_x = Detector(**detector).q((height, width))
    modulus, draw = np.hypot(q_y, q_x), generator(0, "export parity of patterns")
    frames = []
    for share in (0.2, 0.45):
        ring = np.exp(-((modulus / (share * grid.q_max_inv_nm) - 1) ** 2) / 0.02) * (1 + q_x**2 / modulus.max() ** 2)
        frame = draw.poisson(20 * trained.geometry.reference * ring + 3).astype(np.float32)
        frame[modulus < 0.03 * grid.q_max_inv_nm] = np.nan
        frame[100:106] = np.nan
        frames.append(frame)
    return detector, frames


def _from_frame(trained: Trained, frame: npt.NDArray[np.float32], detector: dict[str, Any]) -> list[npt.NDArray[Any]]:
    measured = np.isfinite(frame)
    kind: Any = "reduced" if trained.geometry.kind == "reduced" else "counts"
    whole = Frame(np.where(measured, frame, 0), measured, kind, "check", Detector(**detector), setup="transmission")
    pattern = regrid(whole, trained.geometry.grid)
    latent = _latent(trained, pattern)
    noise = torch.from_numpy(
        np.random.default_rng(0).standard_normal((DRAWS, trained.model.latent_dim + trained.model.image_noise))
    ).float()
    d = trained.model.latent_dim
    with torch.inference_mode():
        z = latent[0] + torch.exp(0.5 * latent[1]) * noise[:, :d]
        images = trained.model.decode_sem(z, noise[:, d:])[:, 0].numpy()
    return [pattern.intensity, pattern.mask.astype(np.float32), latent[0][0].numpy(), latent[1][0].numpy(), images]


@torch.inference_mode()
def _latent(trained: Trained, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    found = trained.model.encode_saxs(trained._inputs([pattern], None))
    return found.mean, found.log_variance


def _micrographs(trained: Trained) -> list[npt.NDArray[Any]]:
    """Smooth noise of 8 and 16 bit, larger than a tile by no whole number."""
    from scipy import ndimage

    draw, size = generator(0, "export parity of micrographs"), trained.geometry.size_px
    made = []
    for shape, kind in (
        ((int(1.3 * size), int(2.9 * size)), np.uint8),
        ((int(1.4 * size), int(1.4 * size)), np.uint16),
    ):
        smooth = ndimage.gaussian_filter(draw.standard_normal(shape), 2.5)
        made.append(((smooth - smooth.min()) / np.ptp(smooth) * np.iinfo(kind).max).astype(kind))
    return made


def _from_micrograph(trained: Trained, pixels: npt.NDArray[Any], pixel_nm: float) -> list[npt.NDArray[Any]]:
    geometry = trained.geometry
    image = prepared(pixels, (pixel_nm, pixel_nm), geometry.pixel_size_nm, trained.recipe.data)
    tiles = tiling(image, geometry.size_px)
    with torch.inference_mode():
        latent = trained.model.encode_sem(trained._inputs(None, tiles))
    return [np.stack(tiles), latent.mean.numpy(), latent.log_variance.numpy(), trained.saxs_of(tiles)]
