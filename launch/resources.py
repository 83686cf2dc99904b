"""What a job asks of a cluster; the values of a site come from a YAML file, never from code."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from hpc.config import build, option, parse_yaml
from hpc.errors import UserError


@dataclasses.dataclass(frozen=True)
class SlurmResources:
    """The resources of one job. Empty text and 0 leave a value to the cluster's default."""

    partition: str = option("", "Partition to wait in.")
    account: str = option("", "Account to charge.")
    qos: str = option("", "Quality of service.")
    constraint: str = option("", "Features that the nodes must have.")
    nodes: int = option(1, "Nodes.", low=1)
    tasks_per_node: int = option(0, "Processes a node; 0: one per GPU, or one.", low=0)
    gpus_per_node: int = option(0, "GPUs a node.", low=0)
    cpus_per_task: int = option(1, "Cores a process.", low=1)
    mem_gb: float = option(0.0, "Memory a node in GB, with /dev/shm and page cache.", low=0.0)
    time_min: int = option(60, "Time limit in minutes.", low=1)
    modules: tuple[str, ...] = option((), "Environment modules to load, in order.")
    setup: tuple[str, ...] = option((), "Shell lines that run before the job, such as activating an environment.")

    @classmethod
    def from_site(cls, path: str | Path, **changes: Any) -> SlurmResources:
        """The values of a site's YAML file, with ``changes`` put over them (``None`` changes nothing).

        Raises:
            UserError: no such file, no YAML, an unknown key (the valid ones are listed), a wrong type or value.
        """
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise UserError(f"site file {path} cannot be read: {error.strerror or error}") from None
        return cls.from_values(parse_yaml(text, f"site file {path}"), f"site file {path}", **changes)

    @classmethod
    def from_values(cls, values: dict[str, Any], where: str = "resources", **changes: Any) -> SlurmResources:
        """As :meth:`from_site`, from a mapping; ``where`` names it in errors."""
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return build(cls, {**values, **given})
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('recipe ')}") from None

    def tasks(self) -> int:
        """Processes a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def shell_lines(self) -> list[str]:
        """What the batch script runs before ``srun``; names of modules are quoted."""
        return [*(f"module load {shlex.quote(name)}" for name in self.modules), *self.setup]

    def submitit_parameters(self, cluster: str = "slurm") -> dict[str, Any]:
        """Arguments of submitit's ``AutoExecutor.update_parameters`` for ``cluster`` (slurm, local or debug)."""
        shared: dict[str, Any] = {
            "nodes": self.nodes,
            "tasks_per_node": self.tasks(),
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "timeout_min": self.time_min,
        }
        if cluster == "debug":
            return {}
        if cluster == "local":
            # A local job takes the shell's environment; modules belong to clusters.
            return {**shared, "local_setup": list(self.setup)}
        slurm = {
            "mem_gb": self.mem_gb or None,
            "slurm_partition": self.partition or None,
            "slurm_account": self.account or None,
            "slurm_qos": self.qos or None,
            "slurm_constraint": self.constraint or None,
            "slurm_setup": self.shell_lines() or None,
            # srun does not inherit it from sbatch since Slurm 22.05.
            "slurm_srun_args": [f"--cpus-per-task={self.cpus_per_task}", "--kill-on-bad-exit=1"],
        }
        if not self.gpus_per_node:
            # Clusters without GPUs refuse a request for none of them.
            shared.pop("gpus_per_node")
        return {**shared, **{name: value for name, value in slurm.items() if value is not None}}
