"""The ``nanodist`` command: one module a subcommand, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc.closed_pipe import until_closed
from hpc.errors import UserError
from nanodist._version import __version__

# name -> (module, sentence); the sentence stands here so that ``nanodist --help`` imports nothing.
COMMANDS = {
    "synth": "Make synthetic micrographs with exact ground truth.",
    "pack": "Pack micrographs into a store of WebDataset shards.",
    "index": "Make a store of shards that webdataset wrote, without changing them.",
    "masks": "Turn colour-coded masks, COCO annotations or ROIs into masks that pack takes.",
    "inspect": "Show what a store holds.",
    "verify": "Check every hash of a store and decode every sample.",
    "plan": "Predict memory, traffic and speed of a recipe on a cluster, and propose how to run it.",
    "pretrain": "Pretrain an encoder on a store, as a recipe says.",
    "views": "Draw the augmented views that a recipe makes of a store's samples.",
    "finetune": "Fine-tune an encoder on a handful of labels or masks, and test it on unseen micrographs.",
    "predict": "Predict classes or masks of micrographs with a fine-tuned encoder.",
    "compare": "Compare fine-tunings over the number of labels, with intervals and paired differences.",
    "probe": "Measure a frozen encoder by kNN and a linear probe over the number of labels.",
    "pairvae": "Train on pairs of SAXS patterns and SEM images, and make each from the other.",
    "suggest": "Name the micrographs that are worth labelling next.",
    "similar": "Find look-alikes of a micrograph in a store.",
    "measure": "Measure what masks show: widths, lengths, domains and percolation, in nm.",
    "scattering": "Inspect, calibrate and integrate scattering patterns.",
    "export": "Write a trained encoder so that others load it without nanodist.",
    "report": "Write one self-contained HTML page about a run.",
    "sync": "Give what runs without internet recorded for Weights & Biases to its server.",
    "dashboard": "Create a Weights & Biases dashboard for pretraining, fine-tunings or sweeps.",
    "doctor": "Say what this machine has, and what is missing for what.",
}


def build_parser() -> argparse.ArgumentParser:
    """The top parser; subcommands parse their own arguments once their module is imported."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{sentence}" for name, sentence in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="nanodist",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Self-supervised pretraining for electron microscopy.\n\ncommands:\n" + lines,
        epilog="'nanodist COMMAND --help' explains a command. Exit codes: 0 done, 1 a failure, 2 your input.",
    )
    parser.add_argument("--version", action="version", version=f"nanodist {__version__}")
    # DeepSpeed's launcher puts it before everything else; the same number stands in LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="One of the commands above.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a :class:`UserError` becomes one sentence on standard error and exit code 2."""
    return until_closed(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    module = importlib.import_module(f"nanodist.cli.{args.command}")
    parser = argparse.ArgumentParser(prog=f"nanodist {args.command}", description=COMMANDS[args.command])
    module.add_arguments(parser)
    # Intermixed, since recipe overrides (key=value) may follow options.
    options = parser.parse_intermixed_args(args.arguments)
    try:
        return int(module.run(options) or 0)
    except UserError as error:
        print(f"nanodist {args.command}: error: {error}", file=sys.stderr)
        return 2
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if not _was_given(error.filename, args.arguments):
            raise
        print(f"nanodist {args.command}: error: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"nanodist {args.command}: interrupted", file=sys.stderr)
        return 130


def _was_given(path: str | None, arguments: Sequence[str]) -> bool:
    """Whether a path, or a folder that it is in, is one of the arguments or the value of one."""
    given = {Path(value) for argument in arguments if (value := argument.rpartition("=")[2])}
    return path is not None and not given.isdisjoint([Path(path), *Path(path).parents])
