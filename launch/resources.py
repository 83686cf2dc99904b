"""What a job asks of a cluster; the values of a site come from a YAML file, never from code."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.config import build, option, read_yaml
from hpc.errors import UserError

_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:$|_)", re.IGNORECASE)
# Python 3.10 has no PYTHONSAFEPATH: what lies in the working directory would be imported before the snapshot.
_WITHOUT_HERE = (
    "import sys, runpy; sys.path.remove(''); sys.argv = sys.argv[3:]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


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
    environment: dict[str, str] = option({}, "Variables of the jobs' environment; no secrets.")
    container: tuple[str, ...] = option(
        (), "Words that Python is started by, such as [apptainer, exec, --nv, image.sif, python3]."
    )

    def check(self) -> None:
        """Raise ``ValueError`` for a variable that cannot be, or that looks like a secret."""
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: '{name}' is no name of a variable")
            if _SECRET.search(name):
                raise ValueError(
                    f"environment: '{name}' looks like a secret, which does not belong into a file; export it in the "
                    "shell that submits, or log in ('wandb login')"
                )

    @classmethod
    def from_site(cls, path: str | Path, **changes: Any) -> SlurmResources:
        """The values of a site's YAML file, with ``changes`` put over them (``None`` changes nothing).

        Raises:
            UserError: no such file, no YAML, an unknown key (the valid ones are listed), a wrong type or value.
        """
        return cls.from_values(read_yaml(path, "site file"), f"site file {path}", **changes)

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

    def changed(self, values: Mapping[str, Any], where: str) -> SlurmResources:
        """The same with ``values`` put over them.

        Raises:
            UserError: as :meth:`from_values`.
        """
        return self.from_values({**dataclasses.asdict(self), **values}, where)

    def python(self, cluster: str) -> str:
        """The command that starts Python in a job, as shell text."""
        here = [sys.executable] if sys.version_info >= (3, 11) else [sys.executable, "-u", "-c", _WITHOUT_HERE]
        return shlex.join(self.container if self.container and cluster == "slurm" else here)

    def shell_lines(self) -> list[str]:
        """What the batch script runs before ``srun``; names of modules and values of variables are quoted."""
        variables = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [*(f"module load {shlex.quote(name)}" for name in self.modules), *variables, *self.setup]

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
