"""A pipeline on the test cluster, from pretraining to the page in one command, and what of it can be checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hpc.run_dir import metric_lines
from launch.records import SweepFolder
from tests.slurm.chaos_checks import Row
from tests.slurm.chaos_run import ROOT, nanodist
from tests.slurm.cluster import Cluster
from tests.slurm.namespaces import ClusterError, until

_VIEWS = {"size_px": 64, "crop_px": [80, 96]}
_HOW = {"engine": {"device": "cpu", "threads": 1}, "tracking": {"mode": "disabled"}}
PRETRAIN = {
    "views": _VIEWS,
    "encoder": {"trunk": "resnet10t", "trunk_options": {"channels": [8, 16, 24, 32]}, "normalise": "image"},
    "projector": {"widths": [32, 16]},
    "train": {"global_batch_size": 8, "log_every_steps": 1},
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 1},
    **_HOW,
}
FINETUNE = {
    "views": _VIEWS,
    "symmetries": 1,
    "train": {"steps": 4, "global_batch_size": 8, "tuned_layers": 0, "log_every_steps": 2},
    "optimizer": {"warmup_steps": 1},
    **_HOW,
}
# Where and how long it ran, which may differ between two places; paths of the encoder are among it.
_PLACE = ("run_dir", "seconds", "overhead_s", "tries", "log", "encoder", "reason")


def write(out: Path, name: str, steps: int, seeds: int, masks: bool = True) -> Path:
    """The store and the files of a pipeline in ``out``; the pipeline's folder."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "wires").is_dir():
        made = ("--micrographs", "6", "--size", "96", "--seed", "0", "--workers", "1")
        nanodist(out, "synth", "wires", "--out", "synth", *made)
        packed = ("--labels", "folder", "--masks", "images=truth", "--tile", "96", "--workers", "1")
        nanodist(out, "pack", "synth/images", *packed, "--out", "wires")
    (out / "pre.yaml").write_text(json.dumps(PRETRAIN))
    (out / "fine.yaml").write_text(json.dumps(FINETUNE))
    draws = [*range(seeds)]
    shared = {"store": str(out / "wires")}
    segment = {**shared, "task": "segmentation", "decoder.width": 16}
    probes = {**shared, "labels_per_class": "1", "splits": 1, "seeds": 2}
    sweeps = {
        "classify": {
            "job": "finetune",
            "recipe": "fine.yaml",
            "overrides": shared,
            "grid": {"labels_per_class": [1, 2], "draw_seed": draws},
        },
        "masks": {
            "job": "finetune",
            "recipe": "fine.yaml",
            "overrides": segment,
            "grid": {"labels_per_class": [2], "draw_seed": draws},
        },
        "probe": {"job": "probe", "overrides": probes, "grid": {"seed": draws}},
    }
    sweeps = {key: {**value, "pack": 50} for key, value in sweeps.items() if masks or key != "masks"}
    pretrain = {"recipe": "pre.yaml", "overrides": {**shared, "train.steps": steps}}
    document = {"name": name, "pretrain": pretrain, "sweeps": sweeps}
    (out / f"{name}.yaml").write_text(json.dumps(document))
    site = {"partition": "normal", "mem_gb": 3.3, "time_min": 60, "container": _container(out)}
    (out / "pipeline-site.yaml").write_text(json.dumps(site))
    return out / "pipelines" / name


def _container(out: Path) -> list[str]:
    """Words of a site's ``container``: what starts Python with mounts of its own, and notes the job that it is in."""
    script = out / "in container"
    lines = ("#!/bin/sh", 'echo "$SLURM_JOB_ID" >> "$(dirname "$0")/contained"', 'exec unshare --mount -- "$@"')
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    return [str(script), sys.executable]


def launch(cluster: Cluster, out: Path, *arguments: str) -> str:
    """``python -m launch`` on the head; what it printed.

    Raises:
        ClusterError: it failed.
    """
    line = [sys.executable, "-m", "launch", *arguments]
    done = cluster.run(line, folder=out, environ={"PYTHONPATH": str(ROOT)}, timeout_s=600)
    if done.returncode:
        raise ClusterError(f"launch {' '.join(arguments)} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def pipeline(cluster: Cluster, out: Path, preempt: bool = True, compare: bool = True, seeds: int = 3) -> list[Row]:
    """One command, struck once where ``preempt``; with ``compare``, all of it again on this machine without Slurm.

    Without either it is a short version, with no masks.
    """
    masks = preempt or compare
    home = write(out, "there", 40 if preempt else 2, seeds, masks)
    site = ("there.yaml", "--site", "pipeline-site.yaml")
    first = launch(cluster, out, "pipeline", *site)
    rows = [_queued(first, masks)]
    steps = {line["step"].split()[0]: line["id"] for line in map(json.loads, (home / "steps.jsonl").open())}
    if preempt:
        rows.append(_preempted(cluster, home, int(steps["pretrain"])))
        again = launch(cluster, out, "pipeline", *site)
        rows.append(Row("submitted again while it waits", again.splitlines()[0], "queued (" not in again))
    _wait(cluster, home)
    result = json.loads((home / "result.json").read_text())
    states = {sweep["sweep"]: sweep["states"] for sweep in result["sweeps"]}
    wanted = {"classify": 2 * seeds, **({"masks": seeds} if masks else {}), "probe": seeds}
    rows.append(
        Row(
            "from pretraining to the page in one command",
            f"{states}, a page of {(home / 'report.html').stat().st_size // 1024} KiB",
            states == {name: {"done": count} for name, count in wanted.items()},
        )
    )
    rows.append(_features(SweepFolder(home / "sweeps" / "probe")))
    rows.append(_contained(out, steps))
    before = (home / "report.html").stat().st_mtime_ns
    last = launch(cluster, out, "pipeline", *site)
    untouched = (home / "report.html").stat().st_mtime_ns == before and last.startswith("all is done")
    rows.append(Row("run again when all is done, it does nothing", last.partition(":")[0], untouched))
    return [*rows, _same_here(out, result, 40 if preempt else 2, seeds)] if compare else rows


def _queued(said: str, masks: bool) -> Row:
    names = [line.split()[0] for line in said.splitlines() if "queued (" in line]
    wanted = ["pretrain", "export", "classify", *(["masks"] if masks else []), "probe", "page:"]
    return Row("everything is in the queue at once", ", ".join(names), names == wanted)


def _preempted(cluster: Cluster, home: Path, job: int) -> Row:
    """Preempt the pretraining in its midst; what waits for it has to go on waiting."""

    def step() -> int:
        runs = [*home.glob("pretrain/runs/*/metrics.jsonl")]
        lines = metric_lines(runs[0]) if runs else []
        return int(lines[-1]["step"]) if lines else 0

    if not until(lambda: step() >= 3, 240):
        raise ClusterError(f"the pretraining does not train: {cluster.log(cluster.job(job))[-3000:]}")
    cluster.ask("scancel", "--signal=USR2", str(job))
    cluster.wait_restart(job, timeout_s=120)
    waiting = cluster.ask("squeue", "-h", "-t", "PENDING", "-o", "%r").split()
    return Row(
        "the pretraining is preempted: what depends on it waits",
        f"{len(waiting)} entries wait ({', '.join(sorted(set(waiting)))}) after step {step()}",
        waiting.count("(Dependency)") + waiting.count("Dependency") >= 5,
    )


def _wait(cluster: Cluster, home: Path) -> None:
    if not until((home / "report.html").exists, 900, every_s=0.5):
        logs = "\n".join(path.read_text()[-1500:] for path in sorted(home.rglob("*_log.err")))
        raise ClusterError(f"no page came: {cluster.run(['squeue']).stdout}\n{logs[-6000:]}")


def _contained(out: Path, steps: dict[str, str]) -> Row:
    """Every job of the pipeline ran in the site's container."""
    inside = set((out / "contained").read_text().split())
    apart = sorted(name for name, job in steps.items() if job not in inside)
    return Row("all of it runs in the site's container", f"{len(inside)} jobs; not {apart}", not apart)


def _features(folder: SweepFolder) -> Row:
    """The frozen encoder's features were computed by one job, before any of the probes began."""
    (helper,) = folder.helpers()
    files = [*(folder.path / "features").glob("*.npz")]
    record, probes = folder.record(helper), [folder.record(name) for name in folder.jobs()]
    made = max(path.stat().st_mtime for path in files)
    later = all(probe.began > max(made, record.ended) for probe in probes)
    return Row(
        "features of the encoder are computed once, by a job that the others wait for",
        f"{len(files)} file, {record.starts} start of the job, before all of {len(probes)} probes: {later}",
        len(files) == 1 and record.starts == 1 and later and record.state == "done",
    )


def _same_here(out: Path, there: dict[str, Any], steps: int, seeds: int) -> Row:
    """The same pipeline by ``--cluster local`` gives the same jobs and scores."""
    home = write(out, "here", steps, seeds)
    line = [sys.executable, "-m", "launch", "pipeline", "here.yaml", "--cluster", "local"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=out, env=environ, capture_output=True, text=True, timeout=1500)
    if done.returncode:
        raise ClusterError(f"launch pipeline --cluster local ended with {done.returncode}: {done.stderr}")
    here = json.loads((home / "result.json").read_text())
    tables = [_measured(document) for document in (there, here)]
    apart = sum(tables[0].get(key) != tables[1].get(key) for key in tables[0].keys() | tables[1].keys())
    return Row("the same by --cluster local", f"{len(tables[1])} rows, {apart} differ", not apart and bool(tables[1]))


def _measured(document: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What each job measured, by its sweep, fingerprint and place among the job's rows."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for sweep in document["sweeps"]:
        for row in sweep["rows"]:
            number = sum(key[:2] == (sweep["sweep"], row["fingerprint"]) for key in found)
            kept = {name: value for name, value in row.items() if name not in _PLACE}
            found[sweep["sweep"], row["fingerprint"], number] = kept
    return found
