"""One real Slurm cluster for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import DEFAULT_FOLDER, Cluster, refusal
from tests.slurm.namespaces import pids_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes of two cores. ``work/slurm`` is this checkout's folder of batch scripts."""
    problem = refusal()
    if problem is None and "PYTEST_XDIST_WORKER" in os.environ:
        problem = "one Slurm cluster a machine: run these tests with pytest -n 0 tests/slurm"
    if problem:
        pytest.skip(problem)
    cluster = Cluster(
        nodes=3, cpus=2, memory_mb=7000, folder=DEFAULT_FOLDER.with_name(f"nanodist-slurm-{os.getpid()}")
    ).up()
    cluster.environ["PYTHONPATH"] = str(ROOT)
    (cluster.work / "slurm").symlink_to(ROOT / "slurm")
    yield cluster
    spaces = [machine.namespace() for machine in cluster.machines.values()]
    cluster.down()
    left = [pid for space in spaces for pid in pids_of(space)]
    assert not left, f"processes left behind: {left}"
    assert not cluster.folder.exists(), f"{cluster.folder} is left behind"
