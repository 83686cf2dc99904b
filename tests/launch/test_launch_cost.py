import os

import pytest

from launch import cost
from launch.records import Job, Record, SweepFolder


def test_cores_and_gpus_are_read_from_tres():
    assert cost.tres("billing=8,cpu=8,gres/gpu:a100=4,gres/gpu=4,mem=64G,node=2") == {"cpu": 8.0, "gres/gpu": 4.0}
    assert cost.tres("cpu=2,gres/gpu:a100=1,gres/gpu:v100=2")["gres/gpu"] == 3.0
    assert cost.tres("") == {"cpu": 0.0, "gres/gpu": 0.0}


@pytest.fixture
def sweep(tmp_path):
    folder = SweepFolder(tmp_path / "s")
    folder.make()
    folder.add_jobs([Job(name, {}, []) for name in "abc"])
    for name in "abc":
        folder.write(name, Record(state="done", seconds=1800.0))
    folder.add_allocation("7_0", "slurm", fingerprints=["a", "b"], gpus=1, cpus=4, at_once=2)
    folder.add_allocation("7_1", "slurm", fingerprints=["c"], gpus=1, cpus=4, at_once=1)
    return folder


@pytest.mark.parametrize("accounting", [True, False])
def test_a_sweep_costs_what_slurm_accounted_or_else_what_its_jobs_took(sweep, tmp_path, monkeypatch, accounting):
    rows = (
        "7_0|3600|billing=4,cpu=4,gres/gpu=1,mem=8G,node=1\n7_0|1800|cpu=4,gres/gpu=1\n7_1|7200|cpu=4,gres/gpu=1\n8|x|"
    )
    (tmp_path / "said").write_text(rows if accounting else "")
    program = tmp_path / "sacct"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/said\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = cost.of_sweep("s", sweep)
    if accounting:  # every start counts
        assert (found.hours, found.cpu_hours, found.gpu_hours, found.source) == (3.5, 14.0, 3.5, "sacct")
        assert "--jobs=7" in (tmp_path / "asked").read_text() and found.jobs == 2
    else:
        # Two of them shared four cores and a GPU.
        assert (found.hours, found.cpu_hours, found.gpu_hours) == (1.5, 1.0 + 1.0 + 2.0, 0.25 + 0.25 + 0.5)
        assert found.source == cost.MEASURED
