"""``nanodist probe``: what frozen features are worth with few labels, beside random weights and hand-made features."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import UserError
from hpc.progress import Progress
from nanodist.cli.probe_files import LEAVE_ONE_OUT, write

if TYPE_CHECKING:
    from nanodist.downstream.features import Dataset, FeatureSet
    from nanodist.downstream.probe import Plan, Protocol
    from nanodist.downstream.scores import Scored
    from nanodist.encoders import Encoder, EncoderSpec

BASELINES = ("random", "texture")
SHARE = "share"
# Number of splits, share of the test, label draws a split and validation rounds, where the command does not say.
USUAL = {"sound": (3, 0.3, 5, 3), "lu2022": (20, 0.2, 1, 0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nanodist probe``."""
    parser.add_argument(
        "encoders",
        metavar="RUN_OR_EXPORT",
        nargs="+",
        help="Run directory, export folder or timm:MODEL@FILE (such as ImageNet weights in a file), or NAME=PATH; "
        "several with one NAME are seeds of one encoder.",
    )
    parser.add_argument("--store", required=True, type=Path, help="Store with labels to train on (and to test on).")
    parser.add_argument("--test-store", type=Path, help="Store with other micrographs that is the whole test set.")
    parser.add_argument(
        "--labels-per-class", default="1,2,4,8,16,32,80", help="Numbers of labels a class; 'all' is always added."
    )
    parser.add_argument(
        "--protocol",
        choices=tuple(USUAL),
        default="sound",
        help="sound, or lu2022: the published one (20 splits of 80 to 20, a softmax layer by Adam) with its flaws.",
    )
    parser.add_argument(
        "--flaws",
        help="Which of choice-on-test,split-by-image to have, or 'none', to see what each adds (all with lu2022).",
    )
    parser.add_argument("--seeds", type=int, help="Number of label draws at each budget (5; lu2022: 1).")
    parser.add_argument(
        "--split",
        choices=(SHARE, LEAVE_ONE_OUT),
        default=SHARE,
        help="Hold out a share of the micrographs, or each group (specimen) in turn where a class has too few of them.",
    )
    parser.add_argument("--splits", type=int, help="Number of splits (3; lu2022: 20; one with --test-store).")
    parser.add_argument(
        "--test-share", type=float, help="Share of each class's micrographs in the test (0.3; lu2022: 0.2)."
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="Validation rounds that choose regularisation and neighbours (3); more where the choice is noisy.",
    )
    parser.add_argument("--baselines", default="random,texture", help="Which of random,texture to measure; or 'none'.")
    parser.add_argument(
        "--finetuned",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="Finished fine-tunings of the same stores as rows of the table: a run directory, or the folder of a sweep "
        "(encoder.weights=random: supervised from scratch); may be given again.",
    )
    parser.add_argument("--random-seeds", type=int, default=3, help="Number of random trunks in the random baseline.")
    parser.add_argument(
        "--short-classes",
        choices=("blank", "cap"),
        default="blank",
        help="Where a class has fewer labels than a budget: leave the budget blank, or take what the class has.",
    )
    parser.add_argument("--level", type=float, default=0.95, help="Level of the intervals.")
    parser.add_argument("--resamples", type=int, default=1000, help="Number of bootstrap resamples.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of splits, label draws and resamples.")
    parser.add_argument("--batch-size", type=int, default=64, help="Images embedded at once.")
    parser.add_argument("--features", type=Path, metavar="DIR", help="Folder for reusable features (OUT/features).")
    parser.add_argument("--embed-only", action="store_true", help="Make the reusable features, and stop.")
    parser.add_argument("--out", required=True, type=Path, help="Folder for the scores and for reusable features.")


def run(args: argparse.Namespace) -> int:
    """Embed, probe, score, write and print."""
    from nanodist.downstream.features import labelled
    from nanodist.downstream.labels import parse_budgets
    from nanodist.downstream.lu2022 import SPLIT_BY_IMAGE, by_image, parse_flaws
    from nanodist.downstream.probe import Protocol
    from nanodist.shards import Store

    splits, share, seeds, rounds = USUAL[args.protocol]
    args.splits = splits if args.splits is None else args.splits
    args.test_share = share if args.test_share is None else args.test_share
    args.seeds = seeds if args.seeds is None else args.seeds
    flaws = parse_flaws(args.flaws, args.protocol)
    _check(args, flaws)
    budgets = tuple(parse_budgets(args.labels_per_class))
    rounds = rounds if args.rounds is None else args.rounds
    cap = args.short_classes == "cap"
    protocol = Protocol(budgets, args.seeds, rounds, cap=cap, seed=args.seed, name=args.protocol, flaws=flaws)
    test_store = Store.open(args.test_store) if args.test_store else None
    dataset = labelled(Store.open(args.store), test_store)
    if SPLIT_BY_IMAGE in flaws:
        dataset = dataclasses.replace(dataset, targets=by_image(dataset.targets, dataset.keys))
    if args.embed_only:
        gather(args, dataset)
        return 0
    plans = make_plans(dataset, protocol, args.splits, args.test_share, args.split == LEAVE_ONE_OUT)
    trained: list[Scored] = []
    if args.finetuned:
        from nanodist.downstream.finetuned import finetuned_rows

        trained = finetuned_rows(args.finetuned, dataset, plans, protocol)
    sources = gather(args, dataset)
    scored = score(dataset, sources, plans, protocol) + trained
    print(write(args, dataset, plans, protocol, scored))
    _tell(args)
    return 0


def _tell(args: argparse.Namespace) -> None:
    """W&B gets the scores, the label-efficiency curve and the map, where it has the run that was probed alone."""
    from hpc.wandb_after import has, tell

    _, separator, path = args.encoders[0].partition("=")
    run_dir = Path(path if separator and not Path(args.encoders[0]).exists() else args.encoders[0])
    if len(args.encoders) > 1 or not has(run_dir):
        return
    from nanodist.report.for_wandb import of_probe

    figures, pictures = of_probe(args.out)
    tell(run_dir, figures=figures, pictures=pictures)


def _check(args: argparse.Namespace, flaws: Sequence[str]) -> None:
    from nanodist.downstream.probe import CHOICE_ON_TEST

    if not 0.0 < args.test_share < 1.0:
        raise UserError(f"--test-share is {args.test_share}; it must lie between 0 and 1")
    if not 0.5 <= args.level < 1.0:
        raise UserError(f"--level is {args.level}; it must be at least 0.5 and below 1")
    for name in ("seeds", "splits", "random_seeds", "batch_size", "resamples", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    unknown = [name for name in _baselines(args) if name not in BASELINES]
    if unknown:
        raise UserError(f"--baselines: '{unknown[0]}' does not exist; allowed: {', '.join(BASELINES)} or none")
    if args.rounds is not None and (args.protocol == "lu2022" or CHOICE_ON_TEST in flaws):
        raise UserError("--rounds: neither lu2022 nor a choice on the test has validation rounds; leave it out")
    if args.split == LEAVE_ONE_OUT and args.test_store:
        raise UserError(f"--split {LEAVE_ONE_OUT} makes its own test sets: leave --test-store out")
    if args.split == LEAVE_ONE_OUT and args.finetuned:
        raise UserError(
            f"--finetuned: a fine-tuning leaves out a share of the micrographs; leave --split {args.split} out"
        )
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")


def _baselines(args: argparse.Namespace) -> list[str]:
    return [] if args.baselines == "none" else [name.strip() for name in args.baselines.split(",")]


def make_plans(
    dataset: Dataset, protocol: Protocol, splits: int, test_share: float, leave_one_out: bool = False
) -> list[Plan]:
    """The splits with their label draws; one split where the test store is the test set.

    Args:
        dataset: labelled samples.
        protocol: what is drawn.
        splits: number of splits by micrograph.
        test_share: share of each class's micrographs in the test.
        leave_one_out: a fold for each micrograph, in place of these.
    """
    import numpy as np

    from nanodist.downstream.labels import check_splittable, without
    from nanodist.downstream.probe import Split, leave_one_group_out, plan_split, split_within

    every = np.arange(len(dataset.targets.y))
    if dataset.fixed_test is None:
        check_splittable(dataset.targets, every, f"store {dataset.test_store.path}")
        found = (
            leave_one_group_out(dataset.targets)
            if leave_one_out
            else [split_within(dataset.targets, test_share, protocol.seed, number) for number in range(splits)]
        )
    else:
        found = [Split(0, without(every, dataset.fixed_test), dataset.fixed_test)]
    return [plan_split(dataset.targets, split, protocol) for split in found]


def gather(args: argparse.Namespace, dataset: Dataset) -> list[FeatureSet]:
    """Features of the encoders asked for, then of the baselines."""
    from nanodist.downstream.features import FeatureSet, encoder_features, hand_made_features

    cache = args.features or args.out / "features"
    loaded = load_all(args.encoders)
    wanted = _baselines(args)
    sources = []
    seeds: dict[str, int] = {}
    for name, encoder in loaded:
        seeds[name] = seeds.get(name, -1) + 1
        features = encoder_features(dataset, encoder, cache, args.batch_size)
        trunk = spec_key(encoder.spec)
        sources.append(FeatureSet(name, "pretrained", seeds[name], features, encoder.seen, trunk))
    if "random" in wanted:
        sources += _random_sources(args, dataset, cache, {spec_key(e.spec): e.spec for _, e in loaded})
    if "texture" in wanted:
        sources.append(FeatureSet("texture", "texture", 0, hand_made_features(dataset, cache)))
    return sources


def _random_sources(
    args: argparse.Namespace, dataset: Dataset, cache: Path, specs: dict[str, EncoderSpec]
) -> list[FeatureSet]:
    """Random weights for every trunk and way of embedding among the encoders."""
    from nanodist.downstream.features import FeatureSet, encoder_features
    from nanodist.encoders import random_encoder

    sources = []
    for number, (key, spec) in enumerate(specs.items()):
        name = "random" if len(specs) == 1 else f"random {spec.trunk} {number + 1}"
        for seed in range(args.random_seeds):
            features = encoder_features(dataset, random_encoder(spec, seed), cache, args.batch_size)
            sources.append(FeatureSet(name, "random", seed, features, None, key))
    return sources


def spec_key(spec: EncoderSpec) -> str:
    """Text that is equal for encoders which share a random baseline."""
    return json.dumps(dataclasses.asdict(spec), sort_keys=True)


def load_all(arguments: Sequence[str]) -> list[tuple[str, Encoder]]:
    """Encoders with the names they have in tables.

    Raises:
        UserError: a path is no encoder, or two that were given no name are called the same.
    """
    from nanodist.encoders import load_encoder

    found: list[tuple[str, Encoder]] = []
    given: set[str] = set()
    for argument in arguments:
        name, separator, path = argument.partition("=")
        named = bool(separator) and bool(name) and "@" not in name and not Path(argument).exists()
        encoder = load_encoder(path if named else argument)
        name = name if named else encoder.name
        clash = name in {n for n, _ in found} and not (named and name in given)
        if clash or name in BASELINES:
            raise UserError(
                f"{argument}: the name '{name}' is taken; write NAME=PATH (one NAME for several paths makes them seeds "
                "of one encoder)"
            )
        found.append((name, encoder))
        given |= {name} if named else set()
    return found


def score(dataset: Dataset, sources: Sequence[FeatureSet], plans: Sequence[Plan], protocol: Protocol) -> list[Scored]:
    """Probe every feature set on every split."""
    from nanodist.downstream import lu2022
    from nanodist.downstream.features import transductive
    from nanodist.downstream.probe import Prober
    from nanodist.downstream.scores import Scored

    targets, scored = dataset.targets, []
    tests = {plan.split.seed: dataset.micrographs(plan.split.test) for plan in plans}
    bar = Progress(len(sources) * len(plans), "probing", "splits")
    for source in sources:
        saw = {seed: transductive(source, dataset.test_store.manifest_hash, names) for seed, names in tests.items()}
        if protocol.name == "lu2022":
            found = lu2022.outcomes(source.features, targets, plans, protocol)
            scored += [Scored(source, plan, outcome, saw[plan.split.seed]) for plan, outcome in found]
            bar.update(len(plans), note=source.name)
            continue
        for plan in plans:
            outcomes = Prober(source.features, targets, plan, protocol).outcomes()
            scored += [Scored(source, plan, outcome, saw[plan.split.seed]) for outcome in outcomes]
            bar.update(note=source.name)
    bar.close()
    return scored
