"""``nanodist predict``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = "Exit codes: 0 all files are predicted, 1 some are not (report.json names them), 2 your input."
    parser.add_argument("run", type=Path, metavar="RUN", help="Run directory of nanodist finetune.")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="Micrographs, or folders of them.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the table, the contact sheet and report.")
    parser.add_argument(
        "--faint",
        type=float,
        metavar="PROBABILITY",
        help="Of masks: pixels of at least this probability (such as 0.15) belong to likelier ones they continue, so "
        "that thin, faint wires are not broken.",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes the cores that there are.")


def run(options: argparse.Namespace) -> int:
    """Predict, and say what could not be."""
    import torch

    from hpc.environment import threads_of_rank
    from hpc.errors import UserError
    from nanodist.downstream.finetune.load import kind_of, load_classifier
    from nanodist.downstream.finetune.predict import REPORT, predict

    if options.threads < 0:
        raise UserError(f"--threads is {options.threads}; give a number of threads, or 0 for the cores that there are")
    torch.set_num_threads(options.threads or threads_of_rank(1))
    kind = kind_of(options.run)
    if options.faint is not None and kind == "classification":
        raise UserError(f"--faint is for masks, and {options.run} is a classifier: leave it out")
    if kind == "segmentation":
        from nanodist.downstream.segment.predict import load_segmenter, predict_masks

        failed = len(predict_masks(load_segmenter(options.run, options.faint), options.images, options.out))
    else:
        failed = predict(load_classifier(options.run), options.images, options.out)
    print(options.out / REPORT)
    if failed:
        files = "file was" if failed == 1 else "files were"
        print(f"{failed} {files} not predicted; {options.out / REPORT} says why", file=sys.stderr)
    return int(failed > 0)
