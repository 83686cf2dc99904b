"""``python -m tests.e2e.measure_large [--size 8192] [--run RUN]``: time and peak memory of measuring one large mask.

A mask of 1500 wires that cross into large clusters, and of 3000 particles, is written as TIFF and measured by
``nanodist measure`` in a process of its own. The same is done at half and a quarter of the side, so that the growth of
memory with the image shows. With ``--run`` (of ``nanodist finetune``, ``task: segmentation``) a noisy micrograph of
that mask is first segmented by ``nanodist predict``, and what is predicted is measured. The last line is one JSON
object: seconds and peak MiB (of the process, with what Python and its libraries take before any mask is read) for each
size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from hpc import seeding
from nanodist.synth.geometry import Frame, Wire, project
from nanodist.synth.wires import curve, place

PIXEL_NM = 0.5
CHILD = """
import resource, sys
from nanodist.cli import main
code = main(sys.argv[1:])
print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
raise SystemExit(code)
"""


def large_mask(size: int, seed: int = 0) -> np.ndarray:
    """Wires 6 to 30 pixels wide and particles 8 to 40 across, with a density that does not depend on ``size``."""
    rng, frame = seeding.generator(seed, "large-mask", size), Frame(size, 1.0)
    mask = np.zeros((size, size), bool)
    share = (size / 8192) ** 2
    for _ in range(round(1500 * share)):
        line = place(
            curve(rng, rng.uniform(200, 1500), abs(rng.normal(0, 0.3)), 60),
            rng.uniform(0, size, 2),
            rng.uniform(0, np.pi),
        )
        seen = project(Wire(line, rng.uniform(3, 15)), frame)
        if seen is not None:
            mask[seen.window] |= seen.mask
    for _ in range(round(3000 * share)):
        centre = rng.uniform(0, size, 2)
        seen = project(Wire(np.stack([centre, centre]), rng.uniform(4, 20)), frame)
        if seen is not None:
            mask[seen.window] |= seen.mask
    return mask


def micrograph_of(mask: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bright field of the mask (H, W), uint8: dark, blurred by the optics, with noise; block by block."""
    rng, out = seeding.generator(seed, "large-micrograph"), np.empty(mask.shape, np.uint8)
    for y in range(0, len(mask), 512):
        above, below = max(0, y - 8), min(len(mask), y + 520)
        blurred = gaussian_filter(mask[above:below].astype(np.float32), 1.2)[y - above :][:512]
        out[y : y + 512] = np.clip(175 - 70 * blurred + rng.normal(0, 12, blurred.shape), 0, 255)
    return out


def run_apart(*arguments: str) -> tuple[float, float]:
    """Seconds and peak MiB of a command of nanodist in a process of its own."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return time.monotonic() - start, int(done.stderr.split("peak_kib")[1].split()[0]) / 1024


def segmented(size: int, folder: Path, run: Path) -> tuple[Path, dict[str, float]]:
    """The mask that is predicted of one micrograph; seconds, peak memory, and Dice against the true mask."""
    path, out, true = folder / f"{size}.tif", folder / f"predicted-{size}", large_mask(size)
    tifffile.imwrite(path, micrograph_of(true))
    seconds, peak = run_apart("predict", str(run), str(path), "--out", str(out), "--threads", "1")
    mask = out / "masks" / f"{size}.tif"
    found = tifffile.imread(mask) > 0
    dice = float(2 * np.count_nonzero(found & true) / (np.count_nonzero(found) + np.count_nonzero(true)))
    print(f"{size} x {size} segmented: {seconds:.0f} s, peak {peak:.0f} MiB, Dice {dice:.3f}", flush=True)
    return mask, {"segment_seconds": seconds, "segment_peak_mib": peak, "dice": dice}


def measured(size: int, folder: Path, run: Path | None) -> dict[str, float]:
    """Seconds, peak memory and what was found, for one size."""
    out, found = folder / f"out-{size}", dict[str, float]()
    if run is not None:
        path, found = segmented(size, folder, run)
    else:
        path = folder / f"{size}.tif"
        tifffile.imwrite(path, large_mask(size).astype(np.uint8) * 255, compression="zlib")
    options = ("--as", "mask", "--pixel-size-nm", str(PIXEL_NM), "--out", str(out))
    seconds, peak = run_apart("measure", str(path), *options)
    summary = json.loads((out / "summary.json").read_text())
    found |= {"seconds": seconds, "peak_mib": peak, "objects": summary["objects"], "wires": summary["wires"]}
    print(
        f"{size} x {size}: {seconds:.0f} s, peak {peak:.0f} MiB, {found['objects']} objects, {found['wires']} wires",
        flush=True,
    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure at three sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--run", type=Path, help="A segmentation that predicts the masks.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (args.size // 4, args.size // 2, args.size)
        print(json.dumps({str(size): measured(size, Path(folder), args.run) for size in sizes}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
