"""Two views of tiles of 256 px at 224 px, against kornia's own classes (and torchvision's v2 where there is a GPU).

``python -m tests.benchmarks.bench_views [--quick]``. kornia's ``AugmentationSequential`` (crop and resize, reflection,
contrast, brightness, gamma, Gaussian blur, noise) is fed the parameters that nanodist drew and must make the same
pixels to 1e-4; the time of drawing counts on both sides. It is spared what its classes cannot do from parameters
alone: the mean that contrast turns about is handed to it, and a rotated crop is one quadrilateral, not a rotation and a
crop. Where crops are upright, its crop by slices is timed as well (``slices``): faster, but its resize sees nothing
beyond the crop, so that the outermost pixels differ. Ratios are of the medians of interleaved repeats, in processor
time of one thread; memory is the peak of a process over the views that it returns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc.config import build
from nanodist.views import ViewParameters, ViewsConfig, draw, make_views, render
from nanodist.views.noise import unit_noise

TILE, SIZE = 256, 224
# A margin at the tile's edge, since kornia's crop knows no mirror image there.
RECIPE: dict[str, Any] = {"size_px": SIZE, "crop_px": [140, 176], "noise_signal_share": 0.0}
UPRIGHT = {"rotation": "none", "crop_px": [180, 250]}


def tiles_of(count: int) -> Tensor:
    """Smooth uint8 tiles (count, 256, 256) with some noise, as a microscope's."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, TILE // 8, TILE // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (TILE, TILE), mode="bicubic", align_corners=False)[:, 0]
    grain = 0.05 * torch.randn(count, TILE, TILE, generator=generator)
    return ((0.1 + 0.8 * smooth + grain).clamp_(0, 1) * 255).to(torch.uint8)


def whole_pixels(drawn: ViewParameters) -> ViewParameters:
    """Upright crops moved to whole pixels inside the tile, which is all that kornia's crop by slices can do."""
    matrix = drawn.matrix.copy()
    step = np.abs(matrix[:, [0, 1], [0, 1]])
    side = np.round(step * SIZE)
    mirrored = np.sign(matrix[:, 0, 0])
    middle = matrix[:, :, 2] + matrix[:, :, :2].sum(-1) * (SIZE - 1) / 2
    first = np.clip(np.round(middle - side / 2 + 0.5), 1, TILE - 1 - side)
    step = side / SIZE
    matrix[:, 0, 0], matrix[:, 1, 1] = mirrored * step[:, 0], step[:, 1]
    centre = first + side / 2 - 0.5
    matrix[:, 0, 2] = centre[:, 0] - matrix[:, 0, 0] * (SIZE - 1) / 2
    matrix[:, 1, 2] = centre[:, 1] - matrix[:, 1, 1] * (SIZE - 1) / 2
    return dataclasses.replace(drawn, matrix=matrix)


class Kornia:
    """The same views by kornia's own classes.

    Args:
        tiles: (n, 256, 256) uint8.
        drawn: what to do to them.
        config: what it was drawn from.
        slices: crop by slices and ``interpolate`` (upright whole-pixel crops), not by one warp.
    """

    def __init__(self, tiles: Tensor, drawn: ViewParameters, config: ViewsConfig, slices: bool) -> None:
        import kornia.augmentation as K

        window = 2 * config.blur_reach() + 1
        crop = K.RandomResizedCrop(
            (SIZE, SIZE), cropping_mode="slice" if slices else "resample", align_corners=not slices
        )
        steps = [
            (crop, self._crop(drawn, slices)),
            (K.RandomHorizontalFlip(), {"batch_prob": torch.from_numpy(_mirrored(drawn)).float()}),
            (K.RandomContrast(clip_output=False), {"contrast_factor": _column(drawn.contrast)}),
            (K.RandomBrightness(clip_output=False), {"brightness_factor": self._brightness(tiles, drawn, config)}),
            (K.RandomGamma(), {"gamma_factor": _column(drawn.gamma), "gain_factor": torch.ones(len(tiles))}),
            (
                K.RandomGaussianBlur((window, window), config.blur_sigma_px),
                {"sigma": _column(np.where(drawn.blur_sigma_px > 0, drawn.blur_sigma_px, 1.0))},
            ),
        ]
        changed = torch.from_numpy((drawn.gamma != 1).astype(np.float32))
        for _, parameters in steps[2:5]:
            parameters["batch_prob"] = changed
        steps[5][1]["batch_prob"] = torch.from_numpy((drawn.blur_sigma_px > 0).astype(np.float32))
        if config.noise_probability:
            std = _column(drawn.noise_std).view(-1, 1, 1, 1)
            noise = std * unit_noise(torch.from_numpy(drawn.noise_key), SIZE, SIZE)
            steps.append((K.RandomGaussianNoise(), {"gaussian_noise": noise, "batch_prob": (std > 0).float().view(-1)}))
        self.sequence = K.AugmentationSequential(*(step for step, _ in steps), data_keys=["input"])
        self.parameters = self._items(steps, len(tiles))
        self.tiles = tiles

    def __call__(self) -> Tensor:
        """Views (n, 1, 224, 224)."""
        self.sequence.forward_parameters(torch.Size([len(self.tiles), 1, TILE, TILE]))  # its own draws, not used
        return self.sequence(self.tiles.float().div_(255).unsqueeze(1), params=self.parameters)

    def _items(self, steps: list[tuple[Any, dict[str, Tensor]]], count: int) -> list[Any]:
        from kornia.augmentation.container.params import ParamItem

        items = []
        for number, (step, parameters) in enumerate(steps):
            side = TILE if number == 0 else SIZE
            parameters["forward_input_shape"] = torch.tensor([count, 1, side, side])
            items.append(ParamItem(f"{type(step).__name__}_{number}", parameters))
        return items

    @staticmethod
    def _crop(drawn: ViewParameters, slices: bool) -> dict[str, Tensor]:
        count, far = len(drawn.matrix), SIZE - 1
        corners = np.array([[0, 0], [far, 0], [far, far], [0, far]], np.float64)
        if slices:
            side = np.abs(drawn.matrix[:, [0, 1], [0, 1]]) * SIZE
            middle = drawn.matrix[:, :, 2] + drawn.matrix[:, :, :2].sum(-1) * far / 2
            source = (middle - side / 2 + 0.5)[:, None] + (corners / far) * (side - 1)[:, None]
            source = np.round(source)
        else:
            # The reflection is a class of its own: a crop that is mirrored starts at its right end.
            order = np.where(_mirrored(drawn)[:, None], [1, 0, 3, 2], [0, 1, 2, 3])
            source = np.einsum("nij,nkj->nki", drawn.matrix[:, :, :2], corners[order]) + drawn.matrix[:, None, :, 2]
        return {
            "src": torch.from_numpy(source).float(),
            "dst": torch.from_numpy(corners).float().expand(count, -1, -1).contiguous(),
            "input_size": torch.full((count, 2), TILE),
            "output_size": torch.full((count, 2), SIZE),
            "batch_prob": torch.ones(count),
        }

    @staticmethod
    def _brightness(tiles: Tensor, drawn: ViewParameters, config: ViewsConfig) -> Tensor:
        plain = build(ViewsConfig, {"size_px": SIZE, "crop_px": list(config.crop_bounds())})
        neutral = dataclasses.replace(
            drawn,
            contrast=np.ones_like(drawn.contrast),
            brightness=np.zeros_like(drawn.brightness),
            gamma=np.ones_like(drawn.gamma),
            blur_sigma_px=np.zeros_like(drawn.blur_sigma_px),
            noise_std=np.zeros_like(drawn.noise_std),
        )
        mean = render(tiles, neutral, plain).mean((1, 2, 3))
        return 1 + _column(drawn.brightness) + mean * (1 - _column(drawn.contrast))


def _column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()


def _mirrored(drawn: ViewParameters) -> np.ndarray:
    return np.linalg.det(drawn.matrix[:, :, :2]) < 0


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each, called in turn; of this process's one thread, so that other processes do not count."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            begun = clock()
            function()
            taken[name].append(clock() - begun)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def compare(name: str, changes: dict[str, Any], count: int, repeats: int) -> dict[str, Any]:
    """Time and largest difference of two views of ``count`` tiles, both ways."""
    config = build(ViewsConfig, {**RECIPE, **changes})
    tiles, keys = tiles_of(count), [f"sample-{i}" for i in range(count)]
    drawn = [draw(config, 0, [0] * count, keys, view, TILE, TILE) for view in (0, 1)]
    upright = config.rotation == "none"
    drawn = [whole_pixels(d) if upright else d for d in drawn]
    warps = [Kornia(tiles, d, config, slices=False) for d in drawn]
    ours = [render(tiles, d, config) for d in drawn]
    row: dict[str, Any] = {"views": name}
    row["difference"] = max(float((a - b().clamp(0, 1)).abs().max()) for a, b in zip(ours, warps, strict=True))
    out = torch.empty(2, count, 1, SIZE, SIZE)

    def nanodist() -> None:
        for view, d in enumerate(drawn):
            draw(config, 0, [0] * count, keys, view, TILE, TILE)
            render(tiles, d, config, out[view])

    functions: dict[str, Callable[[], Any]] = {"nanodist": nanodist, "kornia": lambda: [w() for w in warps]}
    if upright:
        # Its resize sees nothing beyond the crop, so that the outermost pixels differ.
        slices = [Kornia(tiles, d, config, slices=True) for d in drawn]
        inner = (..., slice(2, -2), slice(2, -2)) if not config.blur_probability else (..., slice(9, -9), slice(9, -9))
        row["difference_slices"] = max(
            float((a - b().clamp(0, 1))[inner].abs().max()) for a, b in zip(ours, slices, strict=True)
        )
        functions["kornia_slices"] = lambda: [s() for s in slices]
    seconds = interleaved(functions, repeats)
    for way, taken in seconds.items():
        row[f"{way}_us"] = round(taken / (2 * count) * 1e6)
    for way, taken in seconds.items():
        if way != "nanodist":
            row[way.replace("kornia", "ratio")] = round(taken / seconds["nanodist"], 2)
    return row


def peak(way: str, count: int) -> None:
    """Print the output's MiB and the largest growth of this process while it makes two views of ``count`` tiles."""
    config = build(ViewsConfig, RECIPE)
    tiles, keys = tiles_of(count), [f"sample-{i}" for i in range(count)]

    def run(n: int) -> Any:
        if way == "nanodist":
            return make_views(tiles[:n], tiles[:n], config, 0, [0] * n, keys[:n])
        drawn = (draw(config, 0, [0] * n, keys[:n], view, TILE, TILE) for view in (0, 1))
        return [Kornia(tiles[:n], d, config, slices=False)() for d in drawn]

    run(2)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts anew
    before = resident("VmRSS")
    run(count)
    print(json.dumps({"output_mib": 2 * count * SIZE**2 * 4 / 2**20, "peak_mib": resident("VmHWM") - before}))


def resident(kind: str) -> float:
    """Memory of this process in MiB: VmRSS, or VmHWM for its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) / 1024


def memory(count: int) -> dict[str, Any]:
    """Peak memory over the output's, each way in a process of its own."""
    row: dict[str, Any] = {}
    for way in ("nanodist", "kornia"):
        command = [sys.executable, "-m", "tests.benchmarks.bench_views", "--peak", way, "--count", str(count)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row[f"{way}_peak_mib"], row["output_mib"] = round(answer["peak_mib"], 1), round(answer["output_mib"], 1)
        row[f"{way}_peak_ratio"] = round(answer["peak_mib"] / answer["output_mib"], 3)
    return row


def on_gpu(count: int, repeats: int) -> dict[str, Any]:
    """The device's way against the classes of kornia and of torchvision's v2, each with its own draws: views a second.

    kornia draws once a sample, as nanodist does, v2 once a batch. None adds noise.
    """
    config = build(ViewsConfig, {**RECIPE, "noise_probability": 0.0})
    tiles, keys = tiles_of(count).cuda(), [f"sample-{i}" for i in range(count)]

    def ours() -> None:
        make_views(tiles, tiles, config, 0, [0] * count, keys)
        torch.cuda.synchronize()

    functions: dict[str, Callable[[], Any]] = {"nanodist": ours}
    peers = {"kornia": _kornia_on_gpu()}
    try:
        peers["torchvision"] = _torchvision_on_gpu()
    except ImportError:
        print("torchvision is not installed: its views are not timed")
    for name, sequence in peers.items():

        def peer(sequence: Callable[[Tensor], Tensor] = sequence) -> None:
            grey = tiles.float().div_(255).unsqueeze(1)
            for _ in range(2):
                sequence(grey)
            torch.cuda.synchronize()

        functions[name] = peer
    seconds = interleaved(functions, repeats, time.perf_counter)
    row = {f"gpu_{way}_views_per_s": round(2 * count / taken) for way, taken in seconds.items()}
    return {**row, **{f"gpu_ratio_{way}": round(seconds[way] / seconds["nanodist"], 2) for way in peers}}


def _torchvision_on_gpu() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    steps = [
        v2.RandomRotation(180, interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(SIZE, scale=(0.3, 0.5), ratio=(1.0, 1.0), antialias=False),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.4),
        v2.GaussianBlur(11, (0.3, 1.5)),
    ]
    return v2.Compose(steps)  # type: ignore[no-any-return]


def _kornia_on_gpu() -> Callable[[Tensor], Tensor]:
    import kornia.augmentation as K

    return K.AugmentationSequential(  # type: ignore[no-any-return]
        K.RandomRotation(180.0),
        K.RandomResizedCrop((SIZE, SIZE), scale=(0.3, 0.5), ratio=(1.0, 1.0), cropping_mode="resample"),
        K.RandomHorizontalFlip(),
        K.RandomContrast((0.6, 1.4)),
        K.RandomBrightness((0.8, 1.2)),
        K.RandomGamma((0.6, 1.6)),
        K.RandomGaussianBlur((11, 11), (0.3, 1.5), p=0.5),
        data_keys=["input"],
    )


def main() -> None:
    """Print one line a setting, and the ratios as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Fewer tiles and repeats.")
    parser.add_argument("--peak", choices=["nanodist", "kornia"], help="Only measure the memory of one way.")
    parser.add_argument("--count", type=int, default=256, help="Tiles for --peak and --gpu.")
    parser.add_argument("--gpu", action="store_true", help="Only time the GPU's way.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak, options.count)
        return
    if options.gpu:
        print(json.dumps(on_gpu(options.count, 15)))
        return
    count, repeats = (8, 5) if options.quick else (32, 9)
    settings: dict[str, dict[str, Any]] = {
        "upright": {**UPRIGHT, "noise_probability": 0.0},
        "upright, noise": UPRIGHT,
        "rotated": {"noise_probability": 0.0},
        "rotated, noise": {},
    }
    rows = []
    for name, changes in settings.items():
        rows.append(compare(name, changes, count, repeats))
        print(rows[-1], flush=True)
    result: dict[str, Any] = {}
    for row in rows:
        name = row["views"].replace(", ", "_")
        result.update({f"{name}_{kind}": row[kind] for kind in ("ratio", "ratio_slices") if kind in row})
    result["largest_difference"] = max(row["difference"] for row in rows)
    result.update(memory(64 if options.quick else 256))
    if torch.cuda.is_available():
        result.update(on_gpu(256, repeats))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
