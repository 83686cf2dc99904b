"""Objectives, forward and backward, against plain matrix products and lightly, in time and in memory.

``python -m tests.benchmarks.bench_objectives [--quick] [--device cuda] [--crossover]``, one thread. Times (of the
processor, on a CPU) are taken in turns, so that what else runs on the machine meets all alike; a ratio is the median of
the ratios of each turn. Memory is the peak of a fresh process above what it held with its inputs and after a small
warm-up (on a GPU, the peak of the allocator); the gradients count. ``--crossover`` shows where Gram and dense forms
meet instead. The last line is one JSON object; the exit code is 1 where a limit is missed (``--quick`` has none).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanodist.objectives import barlow_twins, nt_xent, vicreg

TEMPERATURE, WEIGHT = 0.2, 0.0051
Loss = Callable[[Tensor, Tensor], Tensor]


def lightly(name: str) -> Loss:
    """lightly's loss with the same constants."""
    from lightly.loss import BarlowTwinsLoss, NTXentLoss

    return NTXentLoss(TEMPERATURE) if name == "nt_xent" else BarlowTwinsLoss(WEIGHT)


def ours(name: str) -> Loss:
    """nanodist's loss."""
    if name == "nt_xent":
        return lambda a, b: nt_xent(a, b, TEMPERATURE)
    return lambda a, b: barlow_twins(a, b, WEIGHT)


def views(n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Two correlated projections (n, d) that want gradients."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, d, generator=generator)
    b = torch.randn(n, d, generator=generator).mul_(0.5).add_(a)
    return a.to(device, dtype).requires_grad_(), b.to(device, dtype).requires_grad_()


def forward_and_backward(loss: Loss, a: Tensor, b: Tensor) -> Callable[[], None]:
    """One training step's work of an objective."""

    def run() -> None:
        a.grad = b.grad = None
        loss(a, b).backward()

    return run


def matrix_products(n: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """z z^T of the 2n views, and both products of its backward."""
    z, upstream = (torch.randn(2 * n, width, device=device).to(dtype) for width in (d, 2 * n))

    def run() -> None:
        torch.mm(z, z.T)
        torch.mm(upstream, z)
        torch.mm(upstream.T, z)

    return run


def seconds(runs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[float]]:
    """Times of each of ``runs``, in turns, after one turn that does not count.

    On the CPU those of the processor, as other processes may have it in between.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the turns of the time of ``one`` over that of ``other``."""
    return statistics.median(x / y for x, y in zip(times[one], times[other], strict=True))


def _resident_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak_mib(who: str, name: str, n: int, d: int, device: str) -> float:
    """Peak memory of one step above inputs, in this process."""
    loss = ours(name) if who == "nanodist" else lightly(name)
    forward_and_backward(loss, *views(64, d, torch.float32, device))()
    a, b = views(n, d, torch.float32, device)
    run = forward_and_backward(loss, a, b)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _resident_mib("VmRSS")
    run()
    return _resident_mib("VmHWM") - before


def peak_of_fresh_process(who: str, name: str, n: int, d: int, device: str) -> float:
    """:func:`peak_mib` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_objectives", "--device", device]
    command += ["--peak", who, name, str(n), str(d)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def contrastive(quick: bool, repeats: int, device: str) -> dict[str, float]:
    """Ratios of NT-Xent."""
    n, d = (256, 32) if quick else (4096, 128)
    found = {}
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        a, b = views(n, d, dtype, device)
        runs = {
            "ours": forward_and_backward(ours("nt_xent"), a, b),
            "products": matrix_products(n, d, dtype, device),
        }
        if label == "fp32":
            runs["lightly"] = forward_and_backward(lightly("nt_xent"), a, b)
        times = seconds(runs, repeats, device)
        found[f"nt_xent_{label}_over_matmuls"] = ratio(times, "ours", "products")
        if label == "fp32":
            found["nt_xent_faster_than_lightly"] = ratio(times, "lightly", "ours")
    for n in (512,) if quick else (8192, 16384):
        found[f"nt_xent_peak_mib_{n}"] = peak_of_fresh_process("nanodist", "nt_xent", n, d, device)
    return found


def redundancy(quick: bool, repeats: int, device: str) -> dict[str, float]:
    """Ratios of Barlow Twins to lightly."""
    found = {}
    for n, d in ((32, 512), (128, 512)) if quick else ((256, 8192), (1024, 8192)):
        a, b = views(n, d, torch.float32, device)
        runs = {who: forward_and_backward(f("barlow"), a, b) for who, f in (("ours", ours), ("lightly", lightly))}
        found[f"barlow_{n}_faster_than_lightly"] = ratio(seconds(runs, repeats, device), "lightly", "ours")
        peaks = [peak_of_fresh_process(who, "barlow", n, d, device) for who in ("lightly", "nanodist")]
        found[f"barlow_{n}_peak_mib"] = peaks[1]
        found[f"barlow_{n}_less_memory_than_lightly"] = peaks[0] / max(peaks[1], 0.1)
    return found


def crossover(d: int, repeats: int, device: str) -> dict[str, float]:
    """Time of the Gram form over the dense form's by samples per column."""
    found = {}
    for name, loss in (("barlow", lambda a, b, w: barlow_twins(a, b, WEIGHT, way=w)), ("vicreg", None)):
        for share in (0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25):
            a, b = views(int(share * d), d, torch.float32, device)
            either = loss or (lambda a, b, w: vicreg(a, b, way=w))
            runs = {w: forward_and_backward(lambda a, b, w=w, f=either: f(a, b, w), a, b) for w in ("gram", "dense")}
            found[f"{name}_gram_over_dense_at_{share}"] = ratio(seconds(runs, repeats, device), "gram", "dense")
    return found


# What is measured: the limit, and whether it is one from above.
LIMITS = {
    "nt_xent_fp32_over_matmuls": (0.60, True),
    "nt_xent_bf16_over_matmuls": (0.75, True),
    "nt_xent_faster_than_lightly": (6.0, False),
    "nt_xent_peak_mib_8192": (60.0, True),
    "nt_xent_peak_mib_16384": (120.0, True),
    "barlow_1024_faster_than_lightly": (6.0, False),
    "barlow_1024_less_memory_than_lightly": (7.0, False),
    "barlow_256_faster_than_lightly": (25.0, False),
    "barlow_256_less_memory_than_lightly": (25.0, False),
}


def main() -> int:
    """Measure, print a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each comparison")
    parser.add_argument("--crossover", action="store_true", help="Gram against dense forms by shape, instead")
    parser.add_argument("--peak", nargs=4, metavar=("WHO", "LOSS", "N", "D"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        who, name, n, d = args.peak
        print(peak_mib(who, name, int(n), int(d), args.device))
        return 0
    if args.crossover:
        found = crossover(128 if args.quick else 1536, args.repeats, args.device)
    else:
        found = contrastive(args.quick, args.repeats, args.device) | redundancy(args.quick, args.repeats, args.device)
    print("| what | measured | limit |\n|---|---|---|")
    missed = False
    for name, value in found.items():
        limit, above = LIMITS.get(name, (None, True)) if not args.quick else (None, True)
        told = "" if limit is None else f"at {'most' if above else 'least'} {limit:g}"
        print(f"| {name} | {value:.3g} | {told} |")
        missed = missed or (limit is not None and (value > limit if above else value < limit))
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
