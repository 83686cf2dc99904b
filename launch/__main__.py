"""``python -m launch``: submits what ``nanodist`` runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hpc.errors import UserError
from launch.jobs import PretrainJob, check
from launch.resources import SlurmResources
from launch.submit import CLUSTERS, announce, submit, wait


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Submit nanodist's jobs to a cluster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("submit", help="Submit one job.")
    one.add_argument("job", choices=["pretrain"], help="The nanodist command to run.")
    one.add_argument("recipe", help="A YAML file, or the name of a packaged recipe.")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="Changes to the recipe.")
    one.add_argument("--cluster", choices=CLUSTERS, default="slurm", help="Slurm, processes here, or this process.")
    one.add_argument("--site", metavar="FILE", help="YAML with the site's values (partition, account, modules, ...).")
    one.add_argument("--nodes", type=int, metavar="N", help="Nodes; overrides the site file.")
    one.add_argument("--tasks-per-node", type=int, metavar="N", help="Processes a node; overrides the site file.")
    one.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs a node; overrides the site file.")
    one.add_argument("--cpus-per-task", type=int, metavar="N", help="Cores a process; overrides the site file.")
    one.add_argument("--time-min", type=int, metavar="N", help="Time limit in minutes; overrides the site file.")
    one.add_argument("--folder", default="launch-logs", metavar="DIR", help="Where the job's logs go.")
    one.add_argument("--wait", action="store_true", help="Wait for the end; exit code 1 if the job failed.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the user's mistakes are one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # key=value may follow options, which argparse's subcommands do not allow: they are moved to the front of those.
    options = build_parser().parse_args(_overrides_first(arguments))
    try:
        return _submit(options)
    except UserError as error:
        print(f"python -m launch: error: {error}", file=sys.stderr)
        return 2


def _overrides_first(arguments: list[str]) -> list[str]:
    """``submit pretrain RECIPE --wait a=1`` as ``submit pretrain RECIPE a=1 --wait``."""
    head, rest = arguments[:3], arguments[3:]
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    return [*head, *overrides, *(text for text in rest if text not in overrides)]


def _submit(options: argparse.Namespace) -> int:
    names = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time_min")
    changes = {name: getattr(options, name) for name in names}
    if options.site:
        resources = SlurmResources.from_site(options.site, **changes)
    else:
        resources = SlurmResources.from_values({}, "command line", **changes)
    job = PretrainJob(options.recipe, tuple(options.overrides))
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


if __name__ == "__main__":
    sys.exit(main())
