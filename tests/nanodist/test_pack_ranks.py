"""pack on several ranks: the bytes of one process, whatever starts them; and ranks that are none are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc import mpi
from hpc.errors import UserError
from hpc.topology import MARK
from nanodist.shards import PackOptions, Store, pack
from nanodist.shards.pack_ranks import Group, OtherRankFailed, cores, find_place
from tests.nanodist.packing import OPTIONS, ROOT, clean_environment, command, finish, micrographs, start_ranks, tree

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return micrographs(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The store of one process, in this one."""
    out = tmp_path_factory.mktemp("alone") / "store"
    pack([source], out, PackOptions(tile=32, shard_mb=0.05, skip_bad=True), labels="folder")
    store = Store.open(out)
    assert len(store.manifest.shards) > 4 and len({entry["reason"] for entry in store.manifest.dropped}) == 2
    return out


def as_ranks(rank, size, out, sources, skip_bad):
    """In a process of the pool: one rank of a packing; gives its error, if any."""
    outs = out if isinstance(out, list) else [out] * size
    ranks = Group(SimpleNamespace(rank=rank, world_size=size), None)
    options = PackOptions(tile=32, shard_mb=0.05, skip_bad=skip_bad)
    try:
        pack(sources, outs[rank], options, ranks=ranks, labels="folder")
    except (UserError, OtherRankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_give_the_bytes_of_one_process(ranks, source, alone, tmp_path, size):
    assert ranks.run(size, as_ranks, tmp_path / "store", [source], True) == [None] * size
    assert tree(tmp_path / "store") == tree(alone)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_command_on_two_ranks_with_workers(source, alone, tmp_path):
    codes, out, err = finish(start_ranks(2, source, "--out", tmp_path / "store", *OPTIONS, "--workers", "2"))
    assert codes == [0, 0], err
    assert tree(tmp_path / "store") == tree(alone)
    assert out.count("samples of") == 1  # rank 0 alone reports


def test_mpiexec_gives_the_bytes_of_one_process(source, alone, tmp_path):
    pytest.importorskip("mpi4py")
    if not (BIN / "mpiexec").exists():
        pytest.skip("no mpiexec beside this Python (pip install mpich)")
    line = [str(BIN / "mpiexec"), "-n", "2", *command(source, "--out", tmp_path / "store", *OPTIONS)]
    done = subprocess.run(line, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "store") == tree(alone)


def test_more_ranks_than_work(ranks, source, tmp_path):
    assert ranks.run(3, as_ranks, tmp_path / "store", [source / "wires" / "m000.png"], False) == [None] * 3
    assert Store.open(tmp_path / "store").keys == ["m000"]


def test_a_bad_file_stops_all_ranks_and_one_of_them_says_so(ranks, source, tmp_path):
    errors = ranks.run(3, as_ranks, tmp_path / "store", [source], False)
    assert sorted(error.partition(":")[0] for error in errors) == ["OtherRankFailed", "OtherRankFailed", "UserError"]
    assert sum("bad.png is a text file" in error for error in errors) == 1
    assert not (tmp_path / "store").exists()
    # What the others had packed serves the same command with --skip-bad.
    assert ranks.run(2, as_ranks, tmp_path / "store", [source], True) == [None, None]


def test_ranks_of_different_commands_are_refused(ranks, source, tmp_path):
    errors = ranks.run(2, as_ranks, [tmp_path / "a", tmp_path / "b"], [source], True)
    assert "rank 1 was asked for out" in errors[0] and errors[1].startswith("OtherRankFailed: rank 0 failed")
    assert list(tmp_path.iterdir()) == []


# Processes of one job that each take themselves for the only one.

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_an_mpi_that_sees_one_process_of_two_is_refused(source, tmp_path):
    """mpiexec of one MPI and the mpi4py of another: the variables say 2, and MPI itself 1."""
    pytest.importorskip("mpi4py")
    done = subprocess.run(
        command(source, "--out", tmp_path / "store", *OPTIONS),
        env=clean_environment(**HYDRA),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "mpi4py's MPI sees 1" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


ONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**ONE, **STEP}, "one of 4 .SLURM_STEP_NUM_TASKS."),  # srun -n 4 torchrun --standalone
        ({**ONE, "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}, "one of 3"),
        ({"PMIX_RANK": "2"}, "number 2 of several .PMIX_RANK."),
    ],
)
def test_one_of_many_that_takes_itself_for_the_only_one(environ, words):
    with pytest.raises(UserError, match=words):
        find_place(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},  # the batch script of sbatch
        {**ONE, **STEP, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_process_that_is_alone(environ):
    assert find_place(environ).world_size == 1


def test_a_command_below_a_rank_is_alone():
    """What a run exported to its children does not make them ranks, nor refuse them."""
    mark = {MARK: '{"token": "t", "environ": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}}'}
    assert find_place({**STEP, **ONE, "SLURM_STEP_ID": "4294967291", **mark}).world_size == 1


def test_one_process_of_mpi_is_fine(monkeypatch):
    monkeypatch.setattr(mpi, "_ask", lambda: mpi.Place(0, 1, 0, 1, 0, 1, "127.0.0.1", 2345))
    assert find_place({**HYDRA, "PMI_SIZE": "1", "PMI_RANK": "0"}).world_size == 1


class Seats:
    """Ranks of one machine, with the cores that each may use."""

    rank, size = 0, 3

    def __init__(self, others):
        self.others = others

    def each(self, work):
        host, mine = work()
        return [(host, mine), *((host, cores) for cores in self.others), ("elsewhere", mine)]


def test_ranks_share_the_cores_that_they_may_use_alike(monkeypatch):
    monkeypatch.setattr("nanodist.shards.pack_ranks._affinity", lambda: frozenset(range(8)))
    assert cores(Seats([])) == 8
    assert cores(Seats([frozenset(range(8))])) == 4
    assert cores(Seats([frozenset(range(8, 16))])) == 8
    assert cores(Seats([frozenset(range(8))] * 20)) == 1
