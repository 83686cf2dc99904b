"""What PairVAE says to be unlike its training: ``python -m tests.e2e.pair_outliers RUN... --pairs PAIRS [--each 8]``.

PAIRS are new specimens of the kinds that were trained on (``nanodist synth pairs``), of which few should be flagged.
Beside them come patterns and images of no such kind, of which all should be: frames with the geometry, mask and
counting noise of the new ones, but the scattering of something else, and micrographs of something else at the pixel
size of the new ones. The flag was designed on the kinds of this file; those of :mod:`tests.e2e.outliers_unseen`, marked
with a star, came afterwards. Each line has the share of files that each run flags. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

from nanodist.micrographs.read import read_micrograph
from nanodist.scattering.read import read_frame
from nanodist.synth.pairs import write_frame, write_sem
from tests.e2e import outliers_unseen as unseen

F64 = np.ndarray
PIXEL_SIZE_NM = 2.0  # of the new images
WANTED_Q = 0.2  # 1/nm, in the middle of the peaks that were trained on


def spheres(q: F64, angle: F64, rng: np.random.Generator) -> F64:
    """Dilute, nearly monodisperse spheres: many form-factor rings and no structure peak."""
    radius = rng.uniform(25, 50)
    radii = radius * (1 + 0.05 * rng.standard_normal(64))
    x = np.maximum(q[..., None] * radii, 1e-6)
    return ((3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2).mean(-1)


def chains(q: F64, angle: F64, rng: np.random.Generator) -> F64:
    """Gaussian chains (Debye, 1947): a shoulder and q^-2, no peak."""
    x = np.maximum((q * rng.uniform(8, 25)) ** 2, 1e-6)
    return 2 * (np.exp(-x) + x - 1) / x**2


def crystal(q: F64, angle: F64, rng: np.random.Generator) -> F64:
    """Four sharp spots, and four more at sqrt(2) between them: a square lattice, which no film has."""
    turn, width = rng.uniform(0, np.pi / 2), 0.006
    found = np.zeros_like(q)
    for order, start in ((1.0, 0.0), (2**0.5, np.pi / 4)):
        for k in range(4):
            a = turn + start + k * np.pi / 2
            square = (q * np.cos(angle) - order * WANTED_Q * np.cos(a)) ** 2
            square += (q * np.sin(angle) - order * WANTED_Q * np.sin(a)) ** 2
            found += np.exp(-square / (2 * width**2)) / order
    return found


def powder(q: F64, angle: F64, rng: np.random.Generator) -> F64:
    """Rings at 1, sqrt(2), sqrt(3), 2 of a cubic powder, all sharp and about as strong."""
    start = rng.uniform(0.12, 0.25)
    return sum(np.exp(-((q - start * order**0.5) ** 2) / (2 * 0.004**2)) for order in (1, 2, 3, 4))


def streak(q: F64, angle: F64, rng: np.random.Generator) -> F64:
    """The flare of slits: one streak through the beam."""
    across = np.abs(q * np.sin(angle - rng.uniform(0, np.pi)))
    return np.exp(-across / 0.01) / np.maximum(q, 0.02)


def shifted(q: F64, angle: F64, rng: np.random.Generator) -> F64:
    """A ring whose header has the beam in a wrong place, by a quarter of its radius."""
    away = np.hypot(q * np.cos(angle) - 0.05, q * np.sin(angle))
    return np.exp(-((away - WANTED_Q) ** 2) / (2 * 0.012**2))


PATTERNS: dict[str, Callable[[F64, F64, np.random.Generator], F64]] = {
    f.__name__: f for f in (spheres, chains, crystal, powder, streak, shifted)
}


def write_patterns(folder: Path, known: list[Path], each: int) -> None:
    """``each`` frames of each kind, with the detector of the known ones."""
    for k, path in enumerate(known[:each]):
        frame, raw = read_frame(path), tifffile.imread(path)
        assert frame.geometry is not None
        q_y, q_x = frame.geometry.q(raw.shape)
        for number, (kind, model) in enumerate({**PATTERNS, **unseen.PATTERNS}.items()):
            rng = np.random.default_rng([number, k])
            expected = model(np.hypot(q_y, q_x), np.arctan2(q_y, q_x), rng)
            expected = expected / expected[frame.mask].max() * frame.intensity.max() + 5
            counts = np.where(raw < 0, raw, rng.poisson(expected)).astype(np.int32)
            write_frame(folder / f"{kind}-{k}.tif", counts, frame.geometry)
        for number, (kind, spoil) in enumerate(unseen.FAULTY_PATTERNS.items()):
            spoiled = spoil(np.maximum(raw, 0), q_y, q_x, np.random.default_rng([number, k]))
            write_frame(folder / f"{kind}-{k}.tif", np.where(raw < 0, raw, spoiled).astype(np.int32), frame.geometry)


def write_images(folder: Path, known: list[Path], each: int) -> None:
    """``each`` images of each kind: nanowires, particles and viruses in TEM, three that are no micrograph, and more."""
    size = tifffile.imread(known[0]).shape[0]
    for what in ("wires", "particles", "viruses"):
        made = folder / what
        arguments = ["synth", what, "--out", str(made), "--micrographs", str(each), "--size", str(size)]
        subprocess.run([sys.executable, "-m", "nanodist", *arguments], check=True, stdout=subprocess.DEVNULL)
        every = sorted(p for p in (made / "images").rglob("*") if p.is_file())
        for k, path in enumerate(every[:: max(1, len(every) // each)][:each]):
            write_sem(folder / f"{what}-{k}.tif", _to_uint8(read_micrograph(path).pixels), PIXEL_SIZE_NM)
    y, x = np.indices((size, size))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    for k in range(each):
        rng = np.random.default_rng(k)
        noise = np.fft.fft2(rng.standard_normal((size, size)))
        natural = np.fft.ifft2(noise / np.maximum(frequency, 1 / size)).real
        cells = (y // (8 + 4 * k) + x // (8 + 4 * k)) % 2
        white = rng.standard_normal((size, size))
        for kind, image in (("photograph_like", natural), ("checkerboard", cells), ("white_noise", white)):
            write_sem(folder / f"{kind}-{k}.tif", _to_uint8(image), PIXEL_SIZE_NM)
        for kind, draw in unseen.IMAGES.items():
            write_sem(folder / f"{kind}-{k}.tif", _to_uint8(draw(size, rng)), PIXEL_SIZE_NM)
        for kind, spoil in unseen.FAULTY_IMAGES.items():
            spoiled = spoil(tifffile.imread(known[k % len(known)]), rng)
            write_sem(folder / f"{kind}-{k}.tif", np.clip(spoiled, 0, 255).astype(np.uint8), PIXEL_SIZE_NM)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    low, high = np.percentile(pixels, (0.5, 99.5))
    return (255 * np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1)).astype(np.uint8)


def flagged(run: str, given: str, files: list[Path], out: Path) -> dict[str, bool]:
    """Name of each file -> whether the run says that it is unlike its training."""
    command = ["pairvae", "generate", run, "--from", given, *map(str, files), "--out", str(out), "--draws", "1"]
    subprocess.run([sys.executable, "-m", "nanodist", *command], check=True, stdout=subprocess.DEVNULL)
    with open(out / "descriptors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [f"{row['file']}: {row['problem']}" for row in rows if row.get("problem")]
    assert not wrong, wrong
    return {row["file"]: row["out_of_distribution"] == "True" for row in rows}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--each", type=int, default=8)
    options = parser.parse_args()
    later = {*unseen.PATTERNS, *unseen.FAULTY_PATTERNS, *unseen.IMAGES, *unseen.FAULTY_IMAGES}
    result: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for given in ("saxs", "sem"):
            folder = work / given
            folder.mkdir()
            known = sorted((options.pairs / given).glob("*.tif"))
            (write_patterns if given == "saxs" else write_images)(folder, known, options.each)
            files = [*known, *sorted(folder.glob("*.tif"))]
            for number, run in enumerate(options.runs):
                shares: dict[str, list[bool]] = defaultdict(list)
                for file, strange in flagged(run, given, files, work / f"{given}-{number}").items():
                    own = Path(file).parent == options.pairs / given
                    kind = Path(file).stem.rsplit("-", 1)[0]
                    shares["the kinds trained on" if own else f"{kind}{' *' * (kind in later)}"].append(strange)
                for kind, found in shares.items():
                    result[f"{given}: {kind}"].append(f"{sum(found)} of {len(found)}")
    print(f"flagged by each of {len(options.runs)} runs")
    for kind, values in result.items():
        print(f"{kind:28s} " + "   ".join(f"{value:>9s}" for value in values))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
