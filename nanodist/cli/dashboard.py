"""``nanodist dashboard``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from nanodist.report.dashboard import dashboard_kinds

    parser.add_argument("kind", choices=dashboard_kinds(), help="Which jobs it is for.")
    parser.add_argument("--project", default="nanodist", help="W&B project (default nanodist).")
    parser.add_argument("--entity", default="", help="W&B team or user; the one that is logged in unless given.")
    parser.add_argument("--group", action="append", default=[], help="Show only this W&B group; may be repeated.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Write its specification as JSON, and send nothing.")


def run(args: argparse.Namespace) -> int:
    """Create the dashboard in W&B, or write what it would be."""
    from hpc import atomic
    from hpc.errors import UserError
    from hpc.tracking import has_api_key
    from nanodist.report.dashboard import build_dashboard

    workspace = build_dashboard(args.kind, args.project, args.entity, args.group)
    if args.out is not None:
        specification = json.loads(workspace._to_model().model_dump_json(by_alias=True))
        atomic.write_json(args.out, specification)
        print(f"{args.out}: specification of '{workspace.name}'")
        return 0
    if not has_api_key():
        raise UserError("no W&B API key: run 'wandb login', or set WANDB_API_KEY; --out FILE writes it without")
    try:
        workspace.save()
    except Exception as error:  # whatever W&B's client or server says of it
        raise UserError(f"W&B did not take the dashboard: {' '.join(str(error).split())[:300]}") from None
    print(workspace.url)
    return 0
