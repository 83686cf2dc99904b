"""What an MPI launcher says, agreed on by the processes themselves through mpi4py.

MPI only tells the processes who they are and where rank 0 listens; the training traffic is torch.distributed's. MPI
is finalized as soon as that is settled: a rank that fails later must not wait in MPI's exit handler for the others.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from hpc.errors import UserError

# (rank, size) variables of the launchers; those of PMI alone are also set by srun.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI's mpirun, IBM's jsrun
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),  # LSF's jsrun
    ("PALS_RANKID", "PMI_SIZE"),  # PBS on HPE Cray machines
)
_PMI = ("PMI_RANK", "PMI_SIZE")
_HYDRA = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI: set beside those of PMI by mpiexec, not by srun
VARIABLES = (*dict.fromkeys(name for pair in _LAUNCHERS for name in pair), *_PMI, *_HYDRA, "PMI_FD")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in ``MPI.COMM_WORLD``, and the address at which rank 0 can be reached."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    node_count: int
    master_addr: str
    master_port: int


def started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether the innermost launcher is surely MPI's own, also inside a Slurm allocation."""
    if any(rank in environ for rank, _ in _LAUNCHERS):
        return True
    return "PMI_RANK" in environ and any(name in environ for name in _HYDRA)


def is_partly_set(environ: Mapping[str, str]) -> bool:
    """Whether any variable of an MPI launcher is there, such as PMI's, which srun sets as well."""
    return any(name in environ for name in (*_PMI, *(rank for rank, _ in _LAUNCHERS)))


def agree(environ: Mapping[str, str] = os.environ) -> Place:
    """Ask MPI, collectively, who this process is; rank 0 picks its address and a free port for all.

    Raises:
        UserError: variables missing, mpi4py missing, or an MPI that does not see the launcher's other processes.
    """
    declared = _declared(environ)
    place = _ask()
    if place.size != declared[1]:
        raise UserError(
            f"the launcher started {declared[1]} processes, but mpi4py's MPI sees {place.size}: mpi4py uses another "
            "MPI than mpiexec; install mpi4py against the MPI of this mpiexec (pip install --no-binary mpi4py mpi4py)"
        )
    return place


def _declared(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and size as the launcher's variables give them."""
    for rank, size in (*_LAUNCHERS, _PMI):
        if rank in environ or (size in environ and (rank, size) == _PMI):
            missing = [name for name in (rank, size) if name not in environ]
            if missing:
                given = rank if size in missing else size
                raise UserError(f"the environment describes MPI only in part: {given} set, but {missing[0]} missing")
            try:
                return int(environ[rank]), int(environ[size])
            except ValueError:
                raise UserError(f"the variables {rank} and {size} must be whole numbers") from None
    raise UserError("the environment describes MPI only in part: no variable gives the rank")


@functools.lru_cache(maxsize=1)
def _ask() -> Place:
    foreign = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"this process was started by MPI, and that needs mpi4py ({error}): pip install nanodist[mpi], "
            "or nanodist[mpich] where the machine has no MPI of its own; or start with torchrun"
        ) from None
    except RuntimeError as error:
        raise UserError(f"mpi4py finds no usable MPI library: {error}") from None
    try:
        return place_of(MPI.COMM_WORLD, MPI.COMM_TYPE_SHARED)
    finally:
        if not foreign:
            MPI.Finalize()


def place_of(world: Any, shared: int) -> Place:
    """:class:`Place` of this process in the communicator ``world``; ``shared`` is ``MPI.COMM_TYPE_SHARED``."""
    node = world.Split_type(shared, key=world.Get_rank())
    # The smallest rank of a node stands for it: host names need not differ between nodes.
    leader = node.bcast(world.Get_rank(), root=0)
    leaders = sorted(set(world.allgather(leader)))
    address, port = world.bcast(_listening_place() if world.Get_rank() == 0 else None, root=0)
    place = Place(
        rank=world.Get_rank(),
        size=world.Get_size(),
        local_rank=node.Get_rank(),
        local_size=node.Get_size(),
        node_rank=leaders.index(leader),
        node_count=len(leaders),
        master_addr=address,
        master_port=port,
    )
    node.Free()
    return place


def _listening_place() -> tuple[str, int]:
    """An address of this machine that others can reach, and a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if address.startswith("127."):
        # Debian maps the host name to 127.0.1.1; the address of the default route is what others reach.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # documentation address: nothing is sent by connecting UDP
                address = str(probe.getsockname()[0])
            except OSError:
                pass
    return address, port
