"""Python for those who have no nanodist: how a pattern and a micrograph are brought to a PairVAE's graphs."""

from __future__ import annotations

from nanodist.pairvae.load import Trained
from nanodist.scattering.regrid import LEAST_COVERAGE

SAXS, SEM = "saxs-to-sem", "sem-to-saxs"

_ONNX = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{location}/onnx/{stem}.onnx", providers=["CPUExecutionProvider"])


def run(**given):
    return session.run(None, given)
"""
_TORCH_EXPORT = """import numpy as np
import torch

model = torch.export.load("{location}/torch-export/{stem}.pt2").module()


@torch.inference_mode()
def run(**given):
    return [answer.numpy() for answer in model(*map(torch.from_numpy, given.values()))]
"""
_SAXS = """

def q_of(shape, beam_centre_px, pixel_size_mm, distance_mm, wavelength_nm):
    # (q_y, q_x) in 1/nm of a detector square to the beam, q_y towards row 0; for a tilted one take pyFAI's
    down = (np.arange(shape[0])[:, None] - beam_centre_px[0]) * pixel_size_mm[0]
    right = (np.arange(shape[1])[None, :] - beam_centre_px[1]) * pixel_size_mm[1]
    radius = np.hypot(down, right)
    q = 4 * np.pi / wavelength_nm * np.sin(np.arctan2(radius, distance_mm) / 2)
    share = np.divide(q, radius, out=np.zeros_like(q), where=radius > 0)
    return -down * share, right * share


def on_grid(frame, measured, q_y, q_x, counts={counts}):
    # a frame (H, W) and where it was measured, shared out by area over the model's q grid
    size, step = {size}, {step!r}
    slopes = [np.gradient(plane, axis=axis) / step for plane in (q_y, q_x) for axis in (0, 1)]
    keep = measured & (np.maximum(abs(q_y), abs(q_x)) <= {q_max!r} + 2 * step)
    parts = min(16, max(2, 2 * int(np.ceil(max(float(np.median(abs(slope))) for slope in slopes)))))
    row, column = (size - 1) / 2 - q_y[keep] / step, (size - 1) / 2 + q_x[keep] / step
    turn, values = [slope[keep] for slope in slopes], frame[keep].astype("float64")
    area, total = np.zeros(size * size), np.zeros(size * size)
    for down in (np.arange(parts) + 0.5) / parts - 0.5:
        for right in (np.arange(parts) + 0.5) / parts - 0.5:
            y = np.floor(row - turn[0] * down - turn[1] * right + 0.5).astype(int)
            x = np.floor(column + turn[2] * down + turn[3] * right + 0.5).astype(int)
            inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
            place = y[inside] * size + x[inside]
            area += np.bincount(place, minlength=size * size) / parts**2
            total += np.bincount(place, values[inside], size * size) / parts**2
    per_pixel = 1 / np.median(abs(slopes[0] * slopes[3] - slopes[1] * slopes[2]))
    mask = area >= {coverage} * per_pixel
    mean = np.where(mask, total / np.where(mask, area, 1), 0) * (per_pixel if counts else 1)
    return mean.reshape(size, size).astype("float32"), mask.reshape(size, size).astype("float32")


def sem_of(intensity, mask, noise):
    # images (draws, P, P) in [0, 1] of a pattern on the grid; noise (draws, {noise}): standard normal, or 0: the mean
    many = np.repeat(np.stack([intensity, mask])[:, None], len(noise), axis=1)
    mean, log_variance, images = run(intensity=many[0], mask=many[1], noise=noise.astype("float32"))
    return mean[0], log_variance[0], images[:, 0]
"""
_PREPARE = """

def tiles_of(pixels, pixel_size_nm):
    # tiles (n, 1, P, P) in [0, 1] of a grey micrograph (H, W) whose pixels are (height, width) nm
    size, target_nm = {size}, {pixel!r}
    scale = [target_nm / one for one in pixel_size_nm]
    height, width = (int(length / step + 1e-9) for length, step in zip(pixels.shape, scale))
    box = (0, 0, width * scale[1], height * scale[0])
    image = Image.fromarray(pixels.astype("float32")).resize((width, height), Image.Resampling.BILINEAR, box=box)
    image = np.asarray(image, "float32")
{contrast}
    counts = [max(1, length // size) for length in image.shape]
    while counts[0] * counts[1] > 16:
        counts[int(np.argmax(counts))] -= 1
    starts = [
        [int(share * (length - size) + 0.5) for share in (np.linspace(0, 1, n) if n > 1 else [0.5])]
        for n, length in zip(counts, image.shape)
    ]
    return np.stack([image[None, y : y + size, x : x + size] for y in starts[0] for x in starts[1]])
"""
_BINARY = """    smooth = ndimage.gaussian_filter(image, 1.1)
    above = (smooth > ndimage.uniform_filter(smooth, {window})).astype("float32")
    image = ndimage.uniform_filter(above, 5)"""
_GREY = """    image = {smooth}
    image = image - ndimage.gaussian_filter(image, {half})
    low, high = np.percentile(image, (0.5, 99.5))
    image = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1).astype("float32")"""
_ONE = """

def saxs_of(tiles, noise=None):
    # latents of all tiles, and the expected pattern of their sample: of one latent, the mean over its tiles
    mean, log_variance, intensity = run(images=tiles, noise=np.zeros((len(tiles), {latent}), "float32"))
    wanted = mean.mean(0) if noise is None else mean.mean(0) + np.exp(log_variance.mean(0) / 2) * noise
    shift = ((wanted - mean[0]) / np.exp(log_variance[0] / 2)).astype("float32")  # noise that leads there
    return mean, log_variance, run(images=tiles[:1], noise=shift[None])[2][0]
"""
_EACH = """

def saxs_of(tiles, noise=None):
    # latents of all tiles, and the expected pattern of their sample: the mean over its tiles
    noise = np.zeros((len(tiles), {latent})) if noise is None else noise
    mean, log_variance, intensity = run(images=tiles, noise=noise.astype("float32"))
    return mean, log_variance, intensity.mean(0)
"""


def code_of(trained: Trained, location: str, kind: str, stem: str) -> str:
    """Python that prepares the input of one direction and runs its graph.

    Args:
        trained: the PairVAE.
        location: folder of the export, as it stands between double quotes.
        kind: ``onnx`` or ``torch-export``.
        stem: :data:`SAXS` or :data:`SEM`.
    """
    head = {"onnx": _ONNX, "torch-export": _TORCH_EXPORT}[kind].format(location=location, stem=stem)
    geometry, latent = trained.geometry, trained.model.latent_dim
    grid = geometry.grid
    if stem == SAXS:
        return head + _SAXS.format(
            counts=geometry.kind != "reduced",
            size=grid.size,
            step=grid.q_step_inv_nm,
            q_max=grid.q_max_inv_nm,
            coverage=LEAST_COVERAGE,
            noise=latent + trained.model.image_noise,
        )
    config = trained.recipe.data
    if config.contrast == "binary":
        contrast = _BINARY.format(window=config.window_px)
    else:
        smooth = f"ndimage.gaussian_filter(image, {config.smooth_px})" if config.smooth_px else "image"
        contrast = _GREY.format(smooth=smooth, half=config.size_px / 2)
    prepare = _PREPARE.format(size=geometry.size_px, pixel=geometry.pixel_size_nm, contrast=contrast)
    imports = "from PIL import Image\nfrom scipy import ndimage\n"
    first, rest = head.split("\n\n", 1)
    last = (_ONE if trained.model.image_noise else _EACH).format(latent=latent)
    return f"{first}\n{imports}\n{rest}{prepare}{last}"
