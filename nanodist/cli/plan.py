"""``nanodist plan``."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc.planner import Speed
    from nanodist.pretrain.planning import Pace, Prediction
    from nanodist.pretrain.recipe import PretrainRecipe

GIB, MIB = 2**30, 2**20
MOST_TIMED = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = (
        "Nothing is trained and no store is needed. Memory is what torch's allocator hands out; the reserve is for "
        "what it does not see: CUDA context, libraries' workspaces, NCCL, fragmentation. Bytes are those that leave a "
        "rank under ring algorithms. Speed is never guessed: it is measured where this machine has the device, or "
        "given. Exit code 1: nothing fits."
    )
    parser.add_argument("recipe", help="A YAML file, or the name of a packaged recipe.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Changes, such as train.steps=20.")
    parser.add_argument("--gpus", type=int, default=1, help="Ranks of all nodes together, one a GPU.")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="Memory of a GPU in GiB.")
    parser.add_argument("--reserve", type=float, default=0.1, help="Share of the memory that has to stay free.")
    parser.add_argument(
        "--images-per-s-per-gpu", type=float, metavar="N", help="Samples (of two views) a GPU trains in a second."
    )
    parser.add_argument(
        "--bandwidth-gb-s", type=float, metavar="GB", help="10^9 bytes a second that a rank can send to another node."
    )
    parser.add_argument("--json", action="store_true", help="Print everything as one JSON object.")


def run(options: argparse.Namespace) -> int:
    """Print what was predicted and proposed."""
    import json

    from hpc.errors import UserError
    from nanodist.pretrain.planning import Planner, as_written, propose, with_checkpointing
    from nanodist.pretrain.recipe import load_recipe

    _check(options)
    recipe = load_recipe(options.recipe, options.overrides)
    _check_ranks(recipe, options.gpus)
    if recipe.engine.zero_stage == 3:
        raise UserError("ZeRO 3 gathers weights in the middle of a step, which is not predicted; plan stages 0 to 2")
    planner = Planner(recipe, options.gpus)
    limit = int(options.gpu_memory * GIB)
    written = as_written(planner)
    proposed = propose(planner, limit, options.reserve)
    if proposed is None and (other := with_checkpointing(recipe, options.gpus)) is not None:
        proposed = propose(other, limit, options.reserve)
    pace = _pace(recipe, options, written)
    if options.json:
        print(json.dumps(_as_json(options, written, proposed, pace)))
    else:
        print(_as_text(options, written, proposed, pace))
    return 1 if proposed is None else 0


def _check(options: argparse.Namespace) -> None:
    from hpc.errors import UserError

    for name in ("gpus", "gpu_memory", "images_per_s_per_gpu", "bandwidth_gb_s"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    if not 0 <= options.reserve < 1:
        raise UserError(f"--reserve is {options.reserve}; it must be a share from 0 to below 1")


def _check_ranks(recipe: PretrainRecipe, ranks: int) -> None:
    """Raise a ``UserError`` that names the legal numbers, where ``ranks`` is none."""
    from hpc.errors import UserError
    from hpc.world_sizes import check_world_size
    from nanodist.pretrain.seats import legal_world_sizes

    if ranks in legal_world_sizes(recipe, ranks):
        return
    if recipe.train.global_batch_size % ranks == 0:
        recipe.train.micro_batches(ranks)
    check_world_size(recipe.train.global_batch_size, recipe.bn_group_size(), ranks)
    raise UserError(f"{ranks} ranks cannot share the recipe's batch")


def _pace(recipe: PretrainRecipe, options: argparse.Namespace, written: Prediction) -> Pace | None:
    from nanodist.pretrain.planning import device_to_time, given_pace, measured_pace

    if options.images_per_s_per_gpu:
        return given_pace(options.images_per_s_per_gpu)
    device = device_to_time(recipe)
    return None if device is None else measured_pace(recipe, device, max(2, min(MOST_TIMED, written.samples)))


def _speed(way: Prediction, pace: Pace | None, options: argparse.Namespace) -> Speed | None:
    from hpc.planner import speed

    if pace is None:
        return None
    bandwidth = options.bandwidth_gb_s * 1e9 if options.bandwidth_gb_s else math.inf
    return speed(way.samples, pace.forward_s, pace.both_s, way.micro_batches > 1, way.moved, bandwidth)


def _as_json(
    options: argparse.Namespace, written: Prediction, proposed: Prediction | None, pace: Pace | None
) -> dict[str, Any]:
    return {
        "schema": 1,
        "gpus": options.gpus,
        "gpu_memory_bytes": int(options.gpu_memory * GIB),
        "reserve": options.reserve,
        "as_written": _way_as_json(written, pace, options),
        "proposed": None if proposed is None else _way_as_json(proposed, pace, options),
        "pace": None
        if pace is None
        else {"forward_s": pace.forward_s, "forward_backward_s": pace.both_s, "source": pace.source},
        "bandwidth_bytes_per_s": options.bandwidth_gb_s and options.bandwidth_gb_s * 1e9,
    }


def _way_as_json(way: Prediction, pace: Pace | None, options: argparse.Namespace) -> dict[str, Any]:
    from hpc.planner import fits

    speed = _speed(way, pace, options)
    return {
        "micro_batch_size": way.micro_batch_size,
        "micro_batches": way.micro_batches,
        "gradient_caching": way.micro_batches > 1,
        "zero_stage": way.zero_stage,
        "checkpointing": way.checkpointing,
        "overrides": way.overrides(),
        "fits": fits(way.memory.peak, int(options.gpu_memory * GIB), options.reserve),
        "memory": {"held": way.memory.held, "phases": way.memory.phases, "peak": way.memory.peak},
        "moved": [
            {
                "purpose": t.purpose,
                "collective": t.collective,
                "calls": t.calls,
                "handed": t.handed,
                "ranks": t.ranks,
                "sent": t.sent,
            }
            for t in way.moved
        ],
        "steps_per_s": None if speed is None else [speed.slowest, speed.fastest],
    }


def _as_text(options: argparse.Namespace, written: Prediction, proposed: Prediction | None, pace: Pace | None) -> str:
    ranks = f"{options.gpus} {'rank' if options.gpus == 1 else 'ranks'}"
    usable = options.gpu_memory * (1 - options.reserve)
    lines = [
        f"{ranks} of {options.gpu_memory:g} GiB, {100 * options.reserve:g} % in reserve: {usable:.1f} GiB to use; "
        f"{written.samples} samples a rank and step",
        "",
        *_columns(written, proposed, options, pace),
        "",
        *_speed_notes(pace, options),
    ]
    if proposed is None:
        lines.append(
            "Nothing fits. Use more GPUs, a smaller train.global_batch_size, train.bn_group_size or views.size_px."
        )
    else:
        lines.append("Proposed: the fewest micro-batches, then the lowest ZeRO stage, that fit:")
        lines.append(f"  {' '.join(proposed.overrides())}")
    return "\n".join(lines)


def _columns(
    written: Prediction, proposed: Prediction | None, options: argparse.Namespace, pace: Pace | None
) -> list[str]:
    """The recipe as it is written, and as it is proposed, side by side."""
    ways = [written] if proposed is None else [written, proposed]
    rows = [["", *["as written", "proposed"][: len(ways)]]]
    rows += [
        ["samples at a time", *(str(way.micro_batch_size) for way in ways)],
        ["micro-batches", *(f"{w.micro_batches}{' (gradient caching)' * (w.micro_batches > 1)}" for w in ways)],
        ["ZeRO stage", *(str(way.zero_stage) for way in ways)],
        ["checkpointing", *("yes" if way.checkpointing else "no" for way in ways)],
        ["MEMORY A RANK, MiB"],
        *_rows([way.memory.held for way in ways], MIB, "held: "),
        *_rows([way.memory.phases for way in ways], MIB, "most in: "),
        ["SENT A RANK AND STEP, MB"],
        *_rows([{f"{t.purpose} ({t.collective})": t.sent for t in way.moved} for way in ways], 1e6, ""),
        ["sum", *(f"{sum(t.sent for t in way.moved) / 1e6:.3f}" for way in ways)],
    ]
    speeds = [_speed(way, pace, options) for way in ways]
    rows.append(["STEPS A SECOND", *(_span(speed) for speed in speeds)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(ways) + 1)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def _rows(columns: list[dict[str, int]], unit: float, prefix: str) -> list[list[str]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    digits = 1 if unit == MIB else 3
    return [
        [f"  {prefix}{name}", *(f"{c[name] / unit:.{digits}f}" if name in c else "-" for c in columns)]
        for name in names
    ]


def _span(speed: Speed | None) -> str:
    if speed is None:
        return "not predicted"
    if math.isclose(speed.slowest, speed.fastest, rel_tol=0.01):
        return f"{speed.slowest:.3g}"
    return f"{speed.slowest:.3g} to {speed.fastest:.3g}"


def _speed_notes(pace: Pace | None, options: argparse.Namespace) -> list[str]:
    """Which constants were measured, given, assumed or missing."""
    if pace is None:
        return [
            "Speed is not predicted: this machine has no GPU, and no constant was given. Train some steps on one GPU",
            "(train.steps=50), and give images_per_s of its metrics.jsonl as --images-per-s-per-gpu.",
        ]
    per_s = f"{1 / pace.both_s:.4g} samples a second and rank through trunk and projector: {pace.source}."
    if options.bandwidth_gb_s:
        link = f"Links of {options.bandwidth_gb_s:g} GB/s: given; from no overlap with the backward pass to a full one."
    else:
        link = "No --bandwidth-gb-s: communication is left out of the speed, which is an upper bound."
    rest = "Reading, views, objective and optimizer are left out, where images per second were measured here."
    return [per_s, link, *([rest] if pace.source.startswith("measured") else [])]
