"""A pipeline on the real cluster; the long versions are ``python -m tests.slurm.chaos pipeline`` and ``sweep``."""

from __future__ import annotations

from pathlib import Path

from tests.slurm import chaos_pipeline
from tests.slurm.cluster import Cluster


def test_one_command_takes_a_pipeline_from_pretraining_to_its_page(cluster: Cluster, tmp_path: Path) -> None:
    rows = chaos_pipeline.pipeline(cluster, tmp_path / "a 'name' $(touch owned)", preempt=False, compare=False, seeds=1)
    assert not [row for row in rows if not row.kept], rows
    assert not [*tmp_path.rglob("owned")]
