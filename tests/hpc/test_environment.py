import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from hpc import environment
from hpc.environment import Finding, ImportProbe, attempt, can_train, compiler_available, package

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def program(folder, name):
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_only_what_is_required_and_missing_stops_training():
    assert can_train([Finding("a", "ok", "1", required=True), Finding("b", "missing", "", "get it")])
    assert not can_train([Finding("a", "missing", "", required=True)])


def test_a_missing_package_says_what_for_and_how_to_get_it():
    found = package("no-such-distribution", "dancing", "train", required=True)
    assert found.status == "missing" and found.hint == "for dancing: pip install 'nanodist[train]'"
    assert package("no-such-distribution", "dancing").hint == "for dancing: pip install no-such-distribution"
    assert package("numpy", "counting").status == "ok"


def test_this_machine_has_what_the_tests_run_on():
    assert environment.python().status == environment.torch_version().status == "ok"
    assert environment.gpu().status in ("ok", "note")
    assert 1 <= environment.cores() <= (os.cpu_count() or 1)
    assert f"{environment.cores()} of" in environment.cpu().value


def test_instructions_for_bf16_are_read_from_the_cpu(tmp_path):
    for line, fast in (
        ("flags : fpu avx512f avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("flags : fpu avx512f avx512_bf16", "AVX-512"),
        ("Features : fp asimd bf16", "NEON"),
        ("flags : fpu avx2", ""),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{line}\n")
        assert environment.bf16_instructions(tmp_path / "cpuinfo") == fast
    assert environment.bf16_instructions(tmp_path / "none") == ""


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.7.1+cpu")
    found = environment.torch_version()
    assert found.status == "missing" and found.required and "2.8" in found.hint


def test_a_compiler_needs_ninja_and_follows_cxx(tmp_path):
    path = {"PATH": str(tmp_path)}
    assert not compiler_available(path)
    program(tmp_path, "g++")
    assert not compiler_available(path)
    program(tmp_path, "ninja")
    assert compiler_available(path)
    assert compiler_available({**path, "CXX": str(tmp_path / "g++")})
    (tmp_path / "g++").unlink()
    assert not compiler_available({**path, "CXX": "icpx"})
    program(tmp_path, "icpx")
    assert compiler_available({**path, "CXX": "icpx"})


def test_slurm_is_known_by_its_programs_and_its_job(tmp_path):
    nothing = {"PATH": str(tmp_path)}
    assert environment.slurm(nothing).status == "note"
    assert "job 7" in environment.slurm({**nothing, "SLURM_JOB_ID": "7"}).value
    program(tmp_path, "sbatch")
    program(tmp_path, "srun")
    assert environment.slurm(nothing) == Finding("slurm", "ok", "sbatch and srun, not in a job")


def test_a_partly_set_launcher_stops_training():
    assert environment.launcher({}).value == "plain start, one process"
    found = environment.launcher({"RANK": "0"})
    assert found.required and found.status == "missing" and "WORLD_SIZE" in found.hint


@pytest.mark.parametrize(("mode", "status"), [("offline", "ok"), ("nonsense", "missing")])
def test_tracking_mode(mode, status):
    pytest.importorskip("wandb")
    assert environment.tracking({"WANDB_MODE": mode}).status == status


@pytest.mark.parametrize(("free", "status"), [(2**30 - 1, "missing"), (2**30, "ok")])
def test_disk_space_is_that_of_the_nearest_folder(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**40, 0, free))
    found = environment.disk(tmp_path / "runs" / "new")
    assert found.status == status and str(tmp_path) in found.value and "runs" not in found.value


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = environment.disk(tmp_path)
    assert found.status == "missing" and "cannot be written" in found.hint


@pytest.mark.parametrize(("total", "status"), [(2**26, "note"), (2**33, "ok")])
def test_small_shared_memory_is_noted(tmp_path, monkeypatch, total, status):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(total, 0, total))
    assert environment.shared_memory(str(tmp_path)).status == status
    assert environment.shared_memory(str(tmp_path / "absent")).status == "note"


def test_imports_are_tried_in_another_process(monkeypatch):
    probes = [ImportProbe(code) for code in ("print('fine')\nprint('rest')", "raise ImportError('libcudart')", "1/0")]
    assert [probe.result() for probe in probes] == [
        (True, "fine"),
        (False, "ImportError: libcudart"),
        (False, "ZeroDivisionError: division by zero"),
    ]


def test_an_import_that_crashes_or_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(environment, "_PROBE_TIMEOUT_S", 0.5)
    assert ImportProbe("import time; time.sleep(60)").result() == (False, "no answer within 0.5 s")
    assert ImportProbe("import os; os._exit(3)").result()[0] is False


def test_a_deepspeed_that_cannot_be_imported_is_missing():
    pytest.importorskip("deepspeed")
    found = environment.deepspeed(ImportProbe("raise ImportError('no libaio')"))
    assert found.status == "missing" and found.required and "no libaio" in found.hint


def test_mpi_without_its_library_is_missing():
    pytest.importorskip("mpi4py")
    assert environment.mpi(environment.mpi_probe()).status in ("ok", "note")
    assert environment.mpi(ImportProbe("raise RuntimeError('cannot load MPI library')")).status == "missing"


def test_a_probe_that_fails_is_a_line_of_its_own():
    found = attempt("odd", lambda: 1 / 0)
    assert found.name == "odd" and found.status == "missing" and "ZeroDivisionError" in found.hint


NO_COMPILER = """
import shutil, torch
from hpc.engine import Engine, EngineConfig, start
from hpc.environment import compiler_available
from hpc.topology import detect
assert not compiler_available() and not shutil.which("g++")
topology, config = detect(), EngineConfig(device="cpu", zero_stage=0)
device = start(config, topology)
torch.manual_seed(0)
module = torch.nn.Linear(4, 1, bias=False)
before = module.weight.detach().clone()
engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1.0), config, topology, device, 2)
engine.backward(engine.forward(torch.full((1, 4), float(topology.rank + 1))).sum())
engine.step(1.0)
torch.testing.assert_close(before - module.weight.detach(), torch.full((1, 4), 3.0))  # 1 of rank 0, 2 of rank 1
print("STEPPED", topology.rank)
"""


def test_two_cpu_ranks_train_under_deepspeed_where_no_compiler_is(tmp_path):
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(NO_COMPILER)
    programs = tmp_path / "bin"
    programs.mkdir()
    environ = {"PATH": str(programs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(script)], env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.count("STEPPED") == 2, done.stderr[-2000:]


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """A job's cgroup in another one, with a limit on each of the two."""
    inner = tmp_path / "fs" / "slurm" / "job_7"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:cpu:/elsewhere\n0::/slurm/job_7\n")
    read = environment._cgroup_values
    monkeypatch.setattr(environment, "_cgroup_values", lambda name: read(name, tmp_path / "fs", tmp_path / "cgroup"))
    return inner


def test_cores_and_memory_are_those_of_the_cgroups_above_as_well(cgroup):
    cores, memory = environment.cores(), environment.memory_bytes({})
    for name, value in {"cpu.max": "max 100000", "memory.max": "max"}.items():
        (cgroup / name).write_text(value)
    assert (environment.cores(), environment.memory_bytes({})) == (cores, memory)
    for name, value in {"cpu.max": "150000 100000", "memory.max": "1000000"}.items():
        (cgroup.parent / name).write_text(value)
    assert (environment.cores(), environment.memory_bytes({})) == (1, 1000000)


def test_memory_is_at_most_that_of_the_slurm_job(cgroup):
    assert environment.memory_bytes({"SLURM_MEM_PER_NODE": "8"}) == 8 * 2**20
    assert environment.memory_bytes({"SLURM_MEM_PER_CPU": "3", "SLURM_CPUS_ON_NODE": "2"}) == 6 * 2**20


@pytest.mark.parametrize(
    ("machine", "mask", "quota", "expected"),
    [(64, 64, "max 100000", 16), (64, 8, "max 100000", 8), (64, 8, "400000 100000", 1), (64, 64, "800000 100000", 2)],
)
def test_a_rank_takes_what_it_is_bound_to_or_its_share(cgroup, monkeypatch, machine, mask, quota, expected):
    monkeypatch.setattr("os.cpu_count", lambda: machine)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(mask)))
    (cgroup / "cpu.max").write_text(quota)
    assert environment.cores_of_rank(4) == expected


def test_a_lone_rank_heeds_the_number_of_threads_that_it_is_told(monkeypatch):
    monkeypatch.setattr(environment, "cores_of_rank", lambda ranks: 8 // ranks)
    assert environment.threads_of_rank(1, {"OMP_NUM_THREADS": "3"}) == 3
    assert environment.threads_of_rank(1, {}) == environment.threads_of_rank(1, {"OMP_NUM_THREADS": "0"}) == 8
    assert environment.threads_of_rank(2, {"OMP_NUM_THREADS": "1"}) == 4  # torchrun's doing
