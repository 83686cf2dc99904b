"""Who this process is among the others of its run, whatever started it.

``detect`` reads the variables of the launcher, the innermost one first, since an outer launcher's variables stay
visible inside an inner one:

1. RANK, WORLD_SIZE, LOCAL_RANK: torchrun, the deepspeed launcher, or set by hand;
2. a task of submitit's local executor;
3. an MPI launcher of its own (Hydra, Intel MPI, Open MPI, MVAPICH, jsrun, PALS), where mpi4py settles the rest;
4. a step of srun, also when submitit made the job;
5. PMI variables outside of Slurm (other MPI launchers);
6. none of these: one process alone. The batch script of sbatch and the shell of salloc count as this.

A launcher whose variables are there only in part is an error that names the missing ones; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import socket
import uuid
from collections.abc import Mapping, MutableMapping, Sequence

from hpc import mpi
from hpc.errors import UserError

EXPLICIT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
SUBMITIT = (
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_JOB_ID",
)
SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
# What export() set, so that a child process can tell inherited variables from those of a launcher of its own.
MARK = "NANODIST_EXPORTED"
_OWN = (*EXPLICIT, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID")
_GROUPS = (_OWN, RENDEZVOUS, SUBMITIT, (*SLURM, "SLURM_STEP_ID"), mpi.VARIABLES)
# Steps that are no steps of srun: batch script, extern, interactive shell of salloc (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_PORTS = range(10000, 30000)  # below the ephemeral ports of Linux
_exported_here: dict[str, Topology] = {}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The place of this process: ranks count from 0, ``local_*`` within its node.

    Raises:
        UserError: the numbers contradict each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    node_count: int
    host: str
    launcher: str
    master_addr: str
    master_port: int

    def __post_init__(self) -> None:
        pairs = (("rank", "world_size"), ("local_rank", "local_world_size"), ("node_rank", "node_count"))
        for index, count in pairs:
            i, n = getattr(self, index), getattr(self, count)
            if not 0 <= i < n:
                raise UserError(f"{self.launcher} gives {index} {i} of {count} {n}; it must be from 0 to {n - 1}")
        if self.local_world_size > self.world_size or self.node_count > self.world_size:
            raise UserError(
                f"{self.launcher} gives {self.local_world_size} local processes on {self.node_count} nodes, "
                f"but only {self.world_size} in all"
            )
        if not 0 < self.master_port < 65536:
            raise UserError(f"{self.launcher} gives the port {self.master_port} (MASTER_PORT); it must be 1 to 65535")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes logs and the run directory."""
        return self.rank == 0

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set all variables that torch and DeepSpeed read; DeepSpeed starts an MPI search if one is missing."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        environ.update({name: str(value) for name, value in values.items()})
        if self.launcher != "torchrun":
            # Inherited from a torchrun above, it would make torch wait for a store that is not there.
            environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        token = uuid.uuid4().hex
        recorded = {name: environ[name] for group in _GROUPS for name in group if name in environ}
        environ[MARK] = json.dumps({"token": token, "environ": recorded})
        _exported_here[token] = self

    def shrunk(self, world_size: int) -> Topology:
        """The place of this rank, which must be below ``world_size``, where the ranks from there on take no part."""
        first_here = self.rank - self.local_rank
        # Ranks follow each other on a node, as launchers place them by default; else some of a node's are left out.
        local = max(self.local_rank + 1, min(self.local_world_size, world_size - first_here))
        nodes = max(self.node_rank + 1, min(self.node_count, world_size))
        return dataclasses.replace(self, world_size=world_size, local_world_size=local, node_count=nodes)

    def as_dict(self) -> dict[str, int | str]:
        """The fields as plain values, for ``run.json``."""
        return dataclasses.asdict(self)


def detect(environ: Mapping[str, str] = os.environ) -> Topology:
    """The topology of this process, as its launcher describes it (see the module for the order of precedence).

    Under an MPI launcher the call is collective. Called again after :meth:`Topology.export`, it gives the same.

    Raises:
        UserError: variables missing or contradicting; mpi4py missing or not of the MPI that started this process.
    """
    mine, environ = _without_inherited(environ)
    if mine is not None:
        return mine
    if any(name in environ for name in EXPLICIT):
        return _from_explicit(environ)
    if environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environ:
        return _from_submitit(environ)
    if mpi.started_by_mpi(environ):
        return _from_mpi(environ)
    if _is_slurm_step(environ):
        return _from_slurm(environ)
    if mpi.is_partly_set(environ):
        return _from_mpi(environ)
    rendezvous = [name for name in RENDEZVOUS if name in environ]
    if rendezvous:
        raise _partly("a distributed run", rendezvous, EXPLICIT)
    return Topology(0, 1, 0, 1, 0, 1, socket.gethostname(), "none", "127.0.0.1", free_port())


def init_process_group(
    topology: Topology, device_type: str, timeout_s: float = 1800.0, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Join the process group of torch.distributed (gloo for ``"cpu"``, NCCL for ``"cuda"``); again is a no-op.

    Also exports the topology and, for ``"cuda"``, makes this process's device the current one.

    Args:
        topology: what :func:`detect` gave.
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout_s: seconds after which a collective that does not end is an error.
        environ: the variables of this process.

    Raises:
        UserError: more processes on this node than CUDA devices.
    """
    import torch
    from torch import distributed

    topology.export(environ)
    if device_type == "cuda":
        torch.cuda.set_device(cuda_index(topology, torch.cuda.device_count()))
    if distributed.is_initialized():
        return
    loopback = next((name for _, name in _interfaces() if name in ("lo", "lo0")), None)
    if topology.node_count == 1 and loopback is not None:
        # gloo otherwise resolves the host name, which fails on many laptops and in many containers.
        environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    distributed.init_process_group(
        backend={"cpu": "gloo", "cuda": "nccl"}[device_type],
        init_method="env://",
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def _interfaces() -> list[tuple[int, str]]:
    return socket.if_nameindex() if hasattr(socket, "if_nameindex") else []


def cuda_index(topology: Topology, device_count: int) -> int:
    """The device of this process among the ``device_count`` that it sees.

    Slurm may show each task only its own device, which is then number 0.

    Raises:
        UserError: no device, or fewer devices than processes on this node.
    """
    if device_count == 1:
        return 0
    if device_count < topology.local_world_size:
        raise UserError(
            f"{topology.host} runs {topology.local_world_size} processes but shows {device_count} CUDA devices; "
            "start one process per device, or pretrain on the CPU"
        )
    return topology.local_rank


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def expand_nodelist(text: str) -> list[str]:
    """Slurm's ``node[01-03,07],gpu5`` as host names, in order; several brackets in a name multiply.

    Raises:
        UserError: the text is not a node list.
    """
    # A comma inside brackets belongs to the range list, not to the list of names.
    parts = re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", text)
    if not parts or ",".join(parts) != text:
        raise UserError(f"'{text}' is not a Slurm node list such as node[01-03,07],gpu5")
    return [name for part in parts for name in _expand_name(part)]


def _expand_name(part: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\]]*)\](.*)", part)
    if not match:
        return [part]
    head, ranges, tail = match.groups()
    numbers: list[str] = []
    for item in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not bounds:
            raise UserError(f"'{part}' is not a Slurm node list: '{item}' is no number or range")
        low, high = bounds[1], bounds[2] or bounds[1]
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [head + number + rest for number in numbers for rest in _expand_name(tail)]


def _without_inherited(environ: Mapping[str, str]) -> tuple[Topology | None, Mapping[str, str]]:
    """This process's own earlier topology, and the variables less those that a parent's launcher left behind.

    A job submitted, or a command started, from a process that had exported its topology inherits RANK and the like
    (sbatch hands the whole environment on): taken at their word, every process of the child would be rank 0 of 1.
    """
    if MARK not in environ:
        return None, environ
    mark = json.loads(environ[MARK])
    inherited = mark["environ"]
    kept = dict(environ)
    unchanged = True
    for group in _GROUPS:
        names = [name for name in group if name in inherited or name in environ]
        if all(environ.get(name) == inherited.get(name) for name in names):
            for name in names:
                kept.pop(name, None)
        else:
            unchanged = False
    mine = _exported_here.get(mark["token"]) if unchanged else None
    return mine, kept


def _partly(launcher: str, given: Sequence[str], missing: Sequence[str]) -> UserError:
    return UserError(
        f"the environment describes {launcher} only in part: {', '.join(given)} set, but {', '.join(missing)} missing; "
        "start with torchrun, srun, mpiexec or deepspeed, or unset the former for a single process"
    )


def _require(environ: Mapping[str, str], names: Sequence[str], launcher: str) -> dict[str, int]:
    """The variables ``names`` as whole numbers, all of which must be there."""
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise _partly(launcher, [name for name in names if environ.get(name)], missing)
    return {name: _number(environ, name) for name in names}


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"the variable {name} must be a whole number, not '{environ[name]}'") from None


def _from_explicit(environ: Mapping[str, str]) -> Topology:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "LOCAL_SIZE" in environ else "env"
    size_name = "LOCAL_SIZE" if launcher == "deepspeed" else "LOCAL_WORLD_SIZE"
    names = [*EXPLICIT, *RENDEZVOUS, size_name]
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise _partly(launcher if launcher != "env" else "a distributed run", _given(environ, names), missing)
    values = _require(environ, [*EXPLICIT, "MASTER_PORT", size_name], launcher)
    rank, world, local = values["RANK"], values["WORLD_SIZE"], values[size_name]
    if local < 1:
        raise UserError(f"{launcher} gives {size_name} {local}; it must be at least 1")
    # Ranks are numbered node by node by these launchers.
    node_rank = _number(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // local
    nodes = _number(environ, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in environ else -(-world // local)
    addr = environ["MASTER_ADDR"]
    host = socket.gethostname()
    return Topology(
        rank, world, values["LOCAL_RANK"], local, node_rank, nodes, host, launcher, addr, values["MASTER_PORT"]
    )


def _given(environ: Mapping[str, str], names: Sequence[str]) -> list[str]:
    return [name for name in names if environ.get(name)]


def _from_submitit(environ: Mapping[str, str]) -> Topology:
    values = _require(environ, SUBMITIT, "submitit's local executor")
    rank, world = values["SUBMITIT_LOCAL_GLOBALID"], values["SUBMITIT_LOCAL_NTASKS"]
    local = values["SUBMITIT_LOCAL_LOCALID"]
    port = _port(environ, values["SUBMITIT_LOCAL_JOB_ID"])
    return Topology(rank, world, local, world, 0, 1, socket.gethostname(), "submitit", "127.0.0.1", port)


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in environ and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _from_slurm(environ: Mapping[str, str]) -> Topology:
    launcher = "submitit" if environ.get("SUBMITIT_EXECUTOR") == "slurm" else "srun"
    world_name = _first(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    nodes_name = _first(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    values = _require(environ, [*SLURM, world_name, nodes_name], launcher)
    nodes, node = values[nodes_name], values["SLURM_NODEID"]
    local_world, addr = values[world_name], "127.0.0.1"
    if nodes > 1:
        tasks_name = _first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
        list_name = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
        missing = [name for name in (tasks_name, list_name) if not environ.get(name)]
        if missing:
            raise _partly(launcher, _given(environ, SLURM), missing)
        counts = _tasks_per_node(environ[tasks_name])
        if not 0 <= node < len(counts):
            raise UserError(f"{launcher} gives SLURM_NODEID {node}, but {tasks_name} is {environ[tasks_name]}")
        local_world, addr = counts[node], expand_nodelist(environ[list_name])[0]
    step = int(environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", "0")))
    # The odd factor keeps the steps of one job apart, and neighbouring jobs apart from both.
    port = _port(environ, values["SLURM_JOB_ID"] + 7919 * step)
    addr = environ.get("MASTER_ADDR", addr)
    rank, world, local = values["SLURM_PROCID"], values[world_name], values["SLURM_LOCALID"]
    return Topology(rank, world, local, local_world, node, nodes, socket.gethostname(), launcher, addr, port)


def _first(environ: Mapping[str, str], *names: str) -> str:
    """The first of ``names`` that is set, or the last one."""
    return next((name for name in names if environ.get(name)), names[-1])


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` as ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"'{text}' is not Slurm's number of tasks per node, such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _port(environ: Mapping[str, str], job: int) -> int:
    """The port that all processes of a job derive alike, unless MASTER_PORT says another."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    return _PORTS[job % len(_PORTS)]


def _from_mpi(environ: Mapping[str, str]) -> Topology:
    place = mpi.agree(environ)
    addr = environ.get("MASTER_ADDR") or (place.master_addr if place.node_count > 1 else "127.0.0.1")
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else place.master_port
    return Topology(
        rank=place.rank,
        world_size=place.size,
        local_rank=place.local_rank,
        local_world_size=place.local_size,
        node_rank=place.node_rank,
        node_count=place.node_count,
        host=socket.gethostname(),
        launcher="mpi",
        master_addr=addr,
        master_port=port,
    )
