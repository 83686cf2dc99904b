import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc import mpi
from hpc.errors import UserError
from hpc.topology import Topology, cuda_index, detect, expand_nodelist, init_process_group

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_JOB_NODELIST": "node[01-09]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_JOB_ID": "314159",
}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def place(topology):
    return (
        (topology.rank, topology.world_size),
        (topology.local_rank, topology.local_world_size),
        (
            topology.node_rank,
            topology.node_count,
        ),
    )


def test_plain_start_is_one_process():
    found = detect({"HOME": "/root"})
    assert place(found) == ((0, 1), (0, 1), (0, 1)) and found.launcher == "none" and found.is_main
    assert found.master_addr == "127.0.0.1" and found.master_port > 0


@pytest.mark.parametrize(("environ", "launcher"), [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed")])
def test_launchers_that_say_everything(environ, launcher):
    found = detect(environ)
    assert place(found) == ((3, 4), (1, 2), (1, 2)) and found.launcher == launcher and not found.is_main
    assert (found.master_addr, found.master_port) == ("head", 29500)


def test_srun_uses_the_step_and_derives_the_port_from_the_job():
    found = detect(SRUN)
    assert place(found) == ((4, 5), (0, 1), (2, 3)) and found.launcher == "srun"
    assert found.master_addr == "node07"
    assert found.master_port == detect({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port
    other_job = detect({**SRUN, "SLURM_JOB_ID": "4243"}).master_port
    other_step = detect({**SRUN, "SLURM_STEP_ID": "1"}).master_port
    assert len({found.master_port, other_job, other_step}) == 3
    assert all(1024 < port < 32768 for port in (found.master_port, other_job, other_step))


def test_srun_on_one_node_needs_no_host_name():
    one = {**without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_STEP_TASKS_PER_NODE")}
    one.update(SLURM_STEP_NUM_NODES="1", SLURM_NODEID="0", SLURM_LOCALID="4")
    found = detect(one)
    assert place(found) == ((4, 5), (4, 5), (0, 1)) and found.master_addr == "127.0.0.1"


def test_srun_takes_the_rendezvous_that_a_site_sets():
    found = detect({**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "2222"})
    assert (found.master_addr, found.master_port, found.launcher) == ("10.1.1.1", 2222, "srun")


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"], ids=["batch", "batch-id", "interactive"])
def test_batch_script_and_interactive_shell_are_plain_starts(step):
    # sbatch sets SLURM_PROCID=0 and SLURM_NTASKS=5 in its script as well
    environ = {**without(SRUN, "SLURM_STEP_ID"), "SLURM_PROCID": "0"}
    found = detect(environ if step is None else {**environ, "SLURM_STEP_ID": step})
    assert found.launcher == "none" and found.world_size == 1


def test_submitit_local_and_slurm():
    found = detect(SUBMITIT)
    assert place(found) == ((1, 2), (1, 2), (0, 1)) and found.launcher == "submitit"
    assert found.master_port == detect({**SUBMITIT, "SUBMITIT_LOCAL_GLOBALID": "0"}).master_port
    assert detect({**SRUN, "SUBMITIT_EXECUTOR": "slurm"}).launcher == "submitit"


def test_the_innermost_launcher_wins():
    assert detect({**SRUN, **TORCHRUN}).launcher == "torchrun"
    assert detect({**SUBMITIT, **TORCHRUN}).launcher == "torchrun"
    # srun --mpi=pmi2 sets PMI's variables; the mpiexec of Hydra marks its processes
    assert detect({**SRUN, "PMI_RANK": "4", "PMI_SIZE": "5"}).launcher == "srun"
    assert mpi.started_by_mpi({**SRUN, **HYDRA}) and mpi.started_by_mpi({**SRUN, "OMPI_COMM_WORLD_RANK": "0"})


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("whole", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_partly_set_environment_names_what_is_missing(whole, missing):
    with pytest.raises(UserError, match=rf"but {missing} missing"):
        detect(without(whole, missing))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, LOCAL_WORLD_SIZE missing"),
        ({"MASTER_ADDR": "head"}, "RANK, WORLD_SIZE, LOCAL_RANK missing"),
        (without(SRUN, "SLURM_NODEID"), "SLURM_NODEID missing"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "SLURM_JOB_NODELIST missing"),
        (without(SUBMITIT, "SUBMITIT_LOCAL_NTASKS"), "SUBMITIT_LOCAL_NTASKS missing"),
        ({"PMI_RANK": "1"}, "PMI_SIZE missing"),
        ({"PMI_SIZE": "2"}, "PMI_RANK missing"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE missing"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of world_size 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local_rank 2 of local_world_size 2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "only 4 in all"),
        ({**TORCHRUN, "RANK": "one"}, "RANK must be a whole number, not 'one'"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "port 70000"),
        ({**DEEPSPEED, "LOCAL_SIZE": "0"}, "at least 1"),
        ({**SRUN, "SLURM_PROCID": "5"}, "rank 5 of world_size 5"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "tasks per node"),
        ({**SRUN, "SLURM_STEP_NODELIST": "node[1-"}, "not a Slurm node list"),
    ],
)
def test_contradictions_are_one_sentence(environ, message):
    with pytest.raises(UserError, match=message):
        detect(environ)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu5", ["gpu5"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]n[08-09]-ib", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]),
    ],
)
def test_node_lists(text, names):
    assert expand_nodelist(text) == names


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-2", "n[a-b]", "n]1["])
def test_broken_node_lists(text):
    with pytest.raises(UserError, match="not a Slurm node list"):
        expand_nodelist(text)


@pytest.mark.parametrize("environ", [{}, TORCHRUN, SRUN, SUBMITIT], ids=["plain", "torchrun", "srun", "submitit"])
def test_export_sets_all_that_deepspeed_looks_for_and_detect_agrees_afterwards(environ):
    environ = dict(environ)
    found = detect(environ)
    found.export(environ)
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(environ)
    assert detect(environ) == found


@pytest.mark.parametrize("parent", [{}, TORCHRUN, SRUN, SUBMITIT], ids=["plain", "torchrun", "srun", "submitit"])
@pytest.mark.parametrize("child", [{}, SRUN, SUBMITIT, TORCHRUN], ids=["plain", "srun", "submitit", "torchrun"])
def test_a_child_does_not_take_its_parents_rank_for_its_own(parent, child):
    inherited = dict(parent)
    detect(parent).export(inherited)
    mark = json.loads(inherited["NANODIST_EXPORTED"])
    inherited["NANODIST_EXPORTED"] = json.dumps({**mark, "token": "of another process"})
    own = {"SLURM_JOB_ID": "99", "SUBMITIT_LOCAL_JOB_ID": "99", "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "x"}
    child = {name: own.get(name, value) for name, value in child.items()}
    expected = detect(child)
    assert dataclasses.replace(detect({**inherited, **child}), master_port=1) == dataclasses.replace(
        expected, master_port=1
    )


def test_cuda_index_is_zero_where_slurm_shows_one_device_a_task():
    two = detect({**TORCHRUN})
    assert cuda_index(two, 1) == 0 and cuda_index(two, 2) == 1 and cuda_index(two, 8) == 1
    with pytest.raises(UserError, match="4 processes but shows 2 CUDA devices"):
        cuda_index(dataclasses.replace(two, local_world_size=4), 2)


class Node:
    """A communicator of the processes of one node, as mpi4py's would answer."""

    def __init__(self, world_ranks, rank):
        self.ranks, self.rank = world_ranks, rank

    def Get_rank(self):
        return self.ranks.index(self.rank)

    def Get_size(self):
        return len(self.ranks)

    def bcast(self, value, root):
        return self.ranks[root]

    def Free(self):
        pass


class World:
    """``MPI.COMM_WORLD`` over nodes whose ranks are given, seen from ``rank``."""

    def __init__(self, nodes, rank):
        self.nodes, self.rank = nodes, rank

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return sum(map(len, self.nodes))

    def Split_type(self, kind, key):
        return Node(next(node for node in self.nodes if self.rank in node), self.rank)

    def allgather(self, leader):
        return [node[0] for node in self.nodes for _ in node]

    def bcast(self, value, root):
        return ("10.0.0.1", 2345)


def test_mpi_places_ranks_that_are_dealt_out_round_robin():
    nodes = [[0, 2, 4], [1, 3]]
    places = [mpi.place_of(World(nodes, rank), 0) for rank in range(5)]
    assert [(p.node_rank, p.local_rank, p.local_size) for p in places] == [
        (0, 0, 3),
        (1, 0, 2),
        (0, 1, 3),
        (1, 1, 2),
        (0, 2, 3),
    ]
    assert {(p.size, p.node_count, p.master_addr, p.master_port) for p in places} == {(5, 2, "10.0.0.1", 2345)}


def test_an_mpi_that_sees_one_process_of_several_is_an_error(monkeypatch):
    monkeypatch.setattr(mpi, "_ask", lambda: mpi.Place(0, 1, 0, 1, 0, 1, "127.0.0.1", 2345))
    with pytest.raises(UserError, match="started 2 processes, but mpi4py's MPI sees 1"):
        detect({**HYDRA, "PMI_SIZE": "2"})


def test_missing_mpi4py_names_the_extra(monkeypatch):
    mpi._ask.cache_clear()
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"pip install nanodist\[mpi\]"):
        detect(HYDRA)


def test_single_process_group_on_the_cpu(tmp_path):
    done = run_script(tmp_path, [sys.executable], "", {})
    assert done == [{"rank": 0, "world": 1, "sum": 1.0, "launcher": "none", "again": True}]


SCRIPT = """
import json, os, pathlib, torch
from torch import distributed
from hpc.topology import detect, init_process_group
topology = detect()
init_process_group(topology, "cpu", timeout_s=60)
init_process_group(topology, "cpu", timeout_s=60)
total = torch.tensor(float(topology.rank + 1))
distributed.all_reduce(total)
fields = {"rank": distributed.get_rank(), "world": distributed.get_world_size(), "sum": total.item()}
fields |= {"launcher": topology.launcher, "again": detect() == topology}
pathlib.Path(os.environ["OUT"], f"{topology.rank}.json").write_text(json.dumps(fields))
distributed.barrier()
distributed.destroy_process_group()
"""


def run_script(tmp_path, command, extra, environ):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + extra)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI"))}
    clean.update(OUT=str(tmp_path), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environ)
    subprocess.run([*map(str, command), str(script)], env=clean, check=True, timeout=120, capture_output=True)
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]


def expected(launcher):
    return [{"rank": rank, "world": 2, "sum": 3.0, "launcher": launcher, "again": True} for rank in range(2)]


def test_two_processes_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert run_script(tmp_path, command, "", {}) == expected("torchrun")


def test_two_processes_under_mpiexec(tmp_path):
    pytest.importorskip("mpi4py")
    mpiexec = BIN / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python (pip install mpich)")
    assert run_script(tmp_path, [mpiexec, "-n", "2", sys.executable], "", {}) == expected("mpi")


def test_init_process_group_refuses_a_device_that_is_not_there(monkeypatch):
    topology = Topology(0, 2, 0, 2, 0, 1, "here", "env", "127.0.0.1", 29500)
    with pytest.raises(UserError, match="0 CUDA devices"):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        init_process_group(topology, "cuda", environ={})
