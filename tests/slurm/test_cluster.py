"""The test cluster itself: it is a real one, and its nodes really die."""

from __future__ import annotations

import os
import signal

import pytest

from tests.slurm.cluster import Cluster, ClusterError, refusal
from tests.slurm.namespaces import until


def test_srun_runs_on_every_node_with_a_network_of_its_own(cluster: Cluster):
    done = cluster.run(["srun", "-N3", "-n6", "sh", "-c", 'echo "$(hostname) $(ip -o -4 address show eth0)"'])
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[0] for line in lines] == ["node1", "node1", "node2", "node2", "node3", "node3"]
    assert {line[4] for line in lines} == {"10.111.0.2/24", "10.111.0.3/24", "10.111.0.4/24"}


def test_a_second_cluster_is_refused(cluster: Cluster, tmp_path):
    assert "already runs" in (refusal() or "")
    with pytest.raises(ClusterError, match="already runs"):
        Cluster(nodes=1, folder=tmp_path / "second").up()
    assert not (tmp_path / "second").exists()
    cluster.wait_idle()


def test_without_the_variable_it_is_refused(monkeypatch):
    monkeypatch.delenv("NANODIST_SLURM_TESTS", raising=False)
    assert "NANODIST_SLURM_TESTS=1" in (refusal() or "")


def test_pids_are_those_of_the_node(cluster: Cluster):
    job = cluster.sbatch("-w", "node[1-2]", "-n2", "-o", "pids.out", "--wrap", "srun sleep 321")
    cluster.wait(job, ["RUNNING"])
    first, second = (_only(cluster, name, r"^\S*sleep 321") for name in ("node1", "node2"))
    assert first != second
    for pid in (first, second):
        os.kill(pid, signal.SIGKILL)
    assert cluster.wait(job, ["FAILED"], timeout_s=30)["ExitCode"] == "137:0"


def _only(cluster: Cluster, name: str, pattern: str) -> int:
    assert until(lambda: len(cluster.pids(name, pattern)) == 1, 20), cluster.pids(name, pattern)
    return cluster.pids(name, pattern)[0]


def test_a_job_outlives_its_node(cluster: Cluster):
    script = cluster.work / "outlive.sh"
    script.write_text(
        '#!/bin/bash\necho "$SLURM_JOB_NUM_NODES nodes"\n[ -n "$SLURM_RESTART_COUNT" ] || srun sleep 300\n'
    )
    cluster.wait_idle()  # Slurm does not wait for a node to come free where MIN of them are there
    job = cluster.sbatch("-N1-3", "-c2", "--open-mode=append", "-o", "outlive.out", script)
    cluster.wait(job, ["RUNNING"])
    _only(cluster, "node3", r"^\S*sleep 300")
    cluster.kill_node("node3")
    assert cluster.pids("node1") and not cluster.pids("node3")
    try:
        cluster.wait_restart(job, timeout_s=90)
        done = cluster.wait(job, timeout_s=60)
        assert done["Restarts"] == "1"
        assert [line for line in cluster.log(done).splitlines() if "nodes" in line] == ["3 nodes", "2 nodes"]
    finally:
        cluster.revive_node("node3")
    assert cluster.run(["srun", "-N3", "hostname"]).stdout.split().count("node3") == 1
