"""``python -m launch``: submits what ``nanodist`` runs, one job or a sweep of many, and looks after them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc.closed_pipe import until_closed
from hpc.errors import UserError
from launch.jobs import COMMANDS, RecipeJob, check
from launch.resources import SlurmResources
from launch.submit import CLUSTERS, announce, submit, wait

_RESOURCES = {
    "nodes": "Nodes",
    "tasks_per_node": "Processes a node",
    "gpus_per_node": "GPUs a node",
    "cpus_per_task": "Cores a process",
    "time_min": "Time limit in minutes",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Submit nanodist's jobs to a cluster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("submit", help="Submit one job.")
    one.add_argument("job", choices=COMMANDS, help="The nanodist command to run.")
    one.add_argument("recipe", help="A YAML file, or the name of a packaged recipe.")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="Changes to the recipe.")
    one.add_argument("--folder", default="launch-logs", metavar="DIR", help="Where the job's logs go.")
    one.add_argument("--wait", action="store_true", help="Wait for the end; exit code 1 if the job failed.")
    many = commands.add_parser("sweep", help="Submit what is missing of a sweep.")
    again = commands.add_parser("retry", help="Submit failed, cancelled and lost jobs of a sweep again.")
    for sub in (many, again):
        sub.add_argument("sweep", help="YAML file of the sweep.")
        sub.add_argument("--pack", type=int, default=1, metavar="N", help="Jobs an allocation.")
        sub.add_argument("--side-by-side", type=int, default=1, metavar="N", help="Jobs of an allocation at once.")
        sub.add_argument("--max-parallel", type=int, default=64, metavar="N", help="Allocations at a time.")
    many.add_argument("--dry-run", action="store_true", help="Say what would run, and stop.")
    again.add_argument("fingerprints", nargs="*", metavar="FINGERPRINT", help="Of the jobs; default: all of them.")
    chain = commands.add_parser("pipeline", help="Pretrain, export, fan out and report: what is missing of it.")
    chain.add_argument("pipeline", help="YAML file of the pipeline.")
    chain.add_argument("--max-parallel", type=int, default=64, metavar="N", help="Allocations of a sweep at a time.")
    chain.add_argument("--dry-run", action="store_true", help="Say how far it is, and stop.")
    chain.add_argument("--wait", action="store_true", help="Wait for the page; exit code 1 if a step failed.")
    _add_place(chain)
    for sub in (one, many, again):
        _add_resources(sub)
    status = commands.add_parser("status", help="How far a sweep is.")
    status.add_argument("sweep", help="YAML file or folder of the sweep, or folder of the pipeline.")
    status.add_argument("--every", type=float, default=30.0, metavar="S", help="Seconds between looks; 0: look once.")
    table = commands.add_parser("collect", help="One table of all jobs of a sweep.")
    table.add_argument("sweep", help="YAML file of the sweep, or folder of the pipeline.")
    end = commands.add_parser("cancel", help="End jobs of sweeps, and none of their neighbours.")
    end.add_argument("fingerprints", nargs="+", metavar="FINGERPRINT", help="Of the jobs.")
    end.add_argument("--folder", default="sweeps", metavar="DIR", help="Where the sweeps are.")
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", choices=CLUSTERS, default="slurm", help="Slurm, processes here, or this process.")
    parser.add_argument("--site", metavar="FILE", help="YAML with the site's values (partition, modules, ...).")


def _add_resources(parser: argparse.ArgumentParser) -> None:
    _add_place(parser)
    for name, what in _RESOURCES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, metavar="N", help=f"{what}; overrides the site file.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the user's mistakes are one sentence and exit code 2."""
    return until_closed(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # key=value may follow options, which argparse's subcommands do not allow: they are moved to the front of those.
    if arguments[:1] == ["submit"]:
        arguments = _overrides_first(arguments)
    options = build_parser().parse_args(arguments)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "submit": _submit,
        "sweep": _sweep,
        "retry": _retry,
        "pipeline": _pipeline,
        "status": _status,
        "collect": _collect,
        "cancel": _cancel,
    }
    try:
        return commands[options.command](options)
    except UserError as error:
        print(f"python -m launch: error: {error}", file=sys.stderr)
        return 2


def _overrides_first(arguments: list[str]) -> list[str]:
    """``submit pretrain RECIPE --wait a=1`` as ``submit pretrain RECIPE a=1 --wait``."""
    head, rest = arguments[:3], arguments[3:]
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    return [*head, *overrides, *(text for text in rest if text not in overrides)]


def _resources(options: argparse.Namespace) -> SlurmResources:
    changes = {name: getattr(options, name, None) for name in _RESOURCES}
    if options.site:
        return SlurmResources.from_site(options.site, **changes)
    return SlurmResources.from_values({}, "command line", **changes)


def _submit(options: argparse.Namespace) -> int:
    resources = _resources(options)
    job = RecipeJob(options.recipe, tuple(options.overrides), command=options.job)
    code = check(job)
    if code != 0:
        return code
    handle = submit(job, resources, options.cluster, options.folder, name=f"nanodist-{options.job}")
    announce(handle, options.folder)
    if not options.wait and options.cluster != "debug":
        return 0
    failure = wait(handle)
    if failure is not None:
        print(f"job {handle.job_id} failed: {failure}", file=sys.stderr)
        return 1
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from launch.sweep import Sweep

    sweep, resources = Sweep.from_yaml(options.sweep), _resources(options)
    preview = sweep.preview(resources, options.pack, options.side_by_side)
    if options.dry_run:
        print(preview.text())
        return 0
    handles = sweep.submit(options.cluster, resources, options.max_parallel, options.pack, options.side_by_side)
    numbers = ", ".join(str(handle.job_id) for handle in handles[:5]) + (", ..." if len(handles) > 5 else "")
    where = f" ({numbers})" if handles else ""
    print(f"{preview.missing} of {preview.jobs} jobs in {preview.allocations} allocations{where}; {sweep.folder.path}")
    if options.cluster == "local":
        for handle in handles:
            wait(handle)
    return 0


def _retry(options: argparse.Namespace) -> int:
    from launch.sweep import Sweep

    sweep = Sweep.from_yaml(options.sweep)
    names = sweep.retry(
        options.fingerprints,
        cluster=options.cluster,
        resources=_resources(options),
        max_parallel=options.max_parallel,
        pack=options.pack,
        side_by_side=options.side_by_side,
    )
    print(f"{len(names)} jobs again{': ' + ', '.join(names) if names else ''}")
    return 0


def _pipeline(options: argparse.Namespace) -> int:
    from launch.pipeline import Pipeline

    pipeline, resources = Pipeline.from_yaml(options.pipeline), _resources(options)
    if options.dry_run:
        print(pipeline.preview())
        return 0
    steps = pipeline.submit(options.cluster, resources, options.max_parallel)
    for step in steps:
        jobs = ", ".join(step.jobs[:5]) + (", ..." if len(step.jobs) > 5 else "")
        print(f"{step.name}: {step.state}{f' ({jobs})' if jobs else ''}{f': {step.reason}' if step.reason else ''}")
    if options.wait or options.cluster != "slurm":
        bad = pipeline.wait()
        for sentence in bad:
            print(sentence, file=sys.stderr)
        print(pipeline.page)
        return 1 if bad else 0
    if not steps and not pipeline.waiting():
        print(f"all is done: {pipeline.page}")
    else:
        print(f"{'' if steps else 'all is in the queue; '}{pipeline.page} comes at the end")
    return 0


def _status(options: argparse.Namespace) -> int:
    from launch.records import SweepFolder
    from launch.sweep import Sweep
    from launch.watch import watch

    place = Path(options.sweep)
    if (place / "pipeline.json").is_file():
        folders = [SweepFolder(path.parent) for path in sorted(place.glob("sweeps/*/records"))]
        watch(folders, options.every, place)
    else:
        watch([SweepFolder(place) if place.is_dir() else Sweep.from_yaml(place).folder], options.every)
    return 0


def _collect(options: argparse.Namespace) -> int:
    from launch.pipeline import Pipeline
    from launch.sweep import Sweep

    definition = Path(options.sweep) / "pipeline.json"
    if definition.is_file():
        print(Pipeline.from_yaml(definition).write_page())
        return 0
    sweep = Sweep.from_yaml(options.sweep)
    table = sweep.collect()
    print(table.drop(columns=["log", "run_dir"], errors="ignore").to_string(max_rows=40))
    print(f"{sweep.folder.path / 'sweep.parquet'}, {sweep.folder.path / 'sweep.json'}")
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from launch.queue import cancel
    from launch.records import SweepFolder

    homes = {path.parent for path in Path(options.folder).glob("*/jobs.jsonl")}
    known = {name: folder for folder in map(SweepFolder, sorted(homes)) for name in folder.jobs()}
    unknown = [name for name in options.fingerprints if name not in known]
    if unknown:
        raise UserError(f"no sweep in {options.folder} has a job {unknown[0]}; collect names them")
    for folder in {known[name].path: known[name] for name in options.fingerprints}.values():
        ended = cancel(folder, [name for name in options.fingerprints if known[name].path == folder.path])
        print(f"{folder.name}: {len(ended)} jobs cancelled{': ' + ', '.join(ended) if ended else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
