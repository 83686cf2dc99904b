"""What a machine has for training, and what is missing for what.

Each probe gives one :class:`Finding` and never fails; nothing is changed on the machine, and no network is asked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc.errors import UserError
from hpc.topology import detect
from hpc.tracking import resolve_mode

GIB = 2**30
_OLDEST_TORCH = (2, 8)
_PROBE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Finding:
    """One line of what is there.

    ``status`` is ``"ok"``, ``"note"`` (works, with a remark) or ``"missing"``; ``hint`` says what a missing thing is
    for and how to get it; without a ``required`` thing no training can run.
    """

    name: str
    status: Literal["ok", "note", "missing"]
    value: str
    hint: str = ""
    required: bool = False


def can_train(findings: list[Finding]) -> bool:
    """Whether everything that training requires is there."""
    return not any(finding.required and finding.status == "missing" for finding in findings)


class ImportProbe:
    """Imports a module in a process of its own, beside the other probes, since that takes seconds or may crash."""

    def __init__(self, code: str, environ: Mapping[str, str] | None = None) -> None:
        # Without a launcher's variables, so that no MPI takes this child for one of its processes.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "MPI_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**kept, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> tuple[bool, str]:
        """Whether the code ran, and the first line of its output, or the last one of its errors."""
        try:
            out, err = self._process.communicate(timeout=_PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return False, f"no answer within {_PROBE_TIMEOUT_S} s"
        if self._process.returncode == 0:
            return True, out.strip().partition("\n")[0]
        return False, err.strip().rpartition("\n")[2] or f"exit code {self._process.returncode}"


def deepspeed_probe() -> ImportProbe:
    """Start importing DeepSpeed, as training does."""
    return ImportProbe("import deepspeed", {"DS_IGNORE_CUDA_DETECTION": "1"})


def mpi_probe() -> ImportProbe:
    """Start asking mpi4py which MPI it uses, without initialising MPI."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    return ImportProbe(code)


def python() -> Finding:
    """The interpreter and the operating system."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok", text, required=True)


def torch_version() -> Finding:
    """PyTorch, which must be importable and young enough."""
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "missing", str(error), "for everything: pip install torch", required=True)
    oldest = ".".join(map(str, _OLDEST_TORCH))
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return Finding("torch", "missing", torch.__version__, f"at least {oldest}: pip install -U torch", required=True)
    return Finding("torch", "ok", torch.__version__, required=True)


def gpu() -> Finding:
    """CUDA devices, NCCL and bf16."""
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or device"
        return Finding("gpu", "note", "none", f"{reason}; training runs on the CPU (gloo)")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} {device.total_memory / GIB:.0f} GiB" for device in properties)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    value = f"{names}; CUDA {torch.version.cuda}, NCCL {nccl}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
    if nccl == "none":
        return Finding("gpu", "note", value, "this torch has no NCCL: one GPU only")
    return Finding("gpu", "ok", value)


def cores() -> int:
    """CPU cores that this process may use: its affinity mask, and below that the quota of its cgroup or container."""
    allowed = float(_mask())
    for text in _cgroup_values("cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            allowed = min(allowed, int(quota) / int(period))
    return max(1, int(allowed))


def cores_of_rank(local_world_size: int) -> int:
    """Cores for one of ``local_world_size`` ranks on this node, at least 1.

    A launcher that bound the rank (an affinity mask smaller than the machine) has shared already; a quota is that of
    the container or the job, and still to be shared.
    """
    mask, allowed = _mask(), cores()
    bound = mask < (os.cpu_count() or 1) and allowed == mask
    return max(1, allowed if bound else allowed // local_world_size)


def threads_of_rank(local_world_size: int, environ: Mapping[str, str] = os.environ) -> int:
    """CPU threads for one of ``local_world_size`` ranks on this node: ``OMP_NUM_THREADS``, or its share of the cores.

    With several ranks the variable does not count, since torchrun sets it to 1 where nobody did.
    """
    said = environ.get("OMP_NUM_THREADS", "")
    if local_world_size == 1 and said.isdecimal() and int(said):
        return int(said)
    return cores_of_rank(local_world_size)


def _mask() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(environ: Mapping[str, str] = os.environ) -> int:
    """Memory that the processes of this job may use on this node: of the machine, the cgroup, or the Slurm job.

    0 where the system does not tell.
    """
    limits = [_memory_bytes(), *(int(text) for text in _cgroup_values("memory.max") if text.isdigit())]
    # Slurm may watch over memory without a cgroup.
    node, cpu, count = (environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE"))
    if node.isdigit():
        limits.append(int(node) * 2**20)
    elif cpu.isdigit() and count.isdigit():
        limits.append(int(cpu) * int(count) * 2**20)
    return min((limit for limit in limits if limit > 0), default=0)


def _cgroup_values(name: str, root: Path = Path("/sys/fs/cgroup"), mine: str = "/proc/self/cgroup") -> list[str]:
    """What the file ``name`` says in the cgroup (version 2) of this process and in those above it.

    The limit of a job is not set in the innermost one.
    """
    try:
        lines = Path(mine).read_text().splitlines()
        inside = root / next(line for line in lines if line.startswith("0::"))[3:].lstrip("/")
    except (OSError, StopIteration):
        inside = root
    found = []
    for folder in (inside, *inside.parents):
        if folder.is_relative_to(root):
            try:
                found.append((folder / name).read_text().strip())
            except OSError:
                continue
    return found


def bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What makes bf16 fast on this CPU: AMX, AVX-512 or NEON; empty where nothing does, or the system does not tell."""
    flags: set[str] = set()
    try:
        lines = cpuinfo.read_text().splitlines()
        flags = set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    except (OSError, StopIteration):
        pass
    known = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512"), ("bf16", "NEON"))
    return next((text for flag, text in known if flag in flags), "")


def cpu() -> Finding:
    """Cores that may be used, memory, and the instructions that make bf16 fast."""
    fast = bf16_instructions()
    memory = f", {memory_bytes() / GIB:.0f} GiB memory" if memory_bytes() else ""
    bf16 = f"bf16 by {fast}" if fast else "no bf16 instructions"
    return Finding("cpu", "ok", f"{cores()} of {os.cpu_count()} cores{memory}, {bf16}")


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def package(name: str, purpose: str, extra: str = "", *, required: bool = False) -> Finding:
    """Whether a distribution is installed; ``extra`` is the extra of nanodist that brings it, if one does."""
    try:
        return Finding(name, "ok", importlib.metadata.version(name), required=required)
    except importlib.metadata.PackageNotFoundError:
        wanted = f"'nanodist[{extra}]'" if extra else name
        hint = f"for {purpose}: pip install {wanted}"
        return Finding(name, "missing", "not installed", hint, required=required)


def deepspeed(probe: ImportProbe | None) -> Finding:
    """DeepSpeed's version, and with a probe whether it can be imported."""
    found = package("deepspeed", "training", "train", required=True)
    if probe is None or found.status == "missing":
        return found
    works, answer = probe.result()
    if works:
        return found
    return Finding("deepspeed", "missing", found.value, f"its import fails: {answer}", required=True)


def compiler_available(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torch and DeepSpeed could compile C++ code here: a C++ compiler, and ninja on PATH as torch wants it."""
    path = environ.get("PATH")
    compiler = shutil.which(environ.get("CXX") or "c++", path=path) or shutil.which("g++", path=path)
    return compiler is not None and shutil.which("ninja", path=path) is not None


def compiler() -> Finding:
    """A C++ compiler, which only DeepSpeed's shared-memory operation for the CPU wants."""
    if compiler_available():
        return Finding("compiler", "ok", "C++ compiler and ninja")
    hint = (
        "only DeepSpeed's compiled operations (shared memory between CPU ranks) need g++ and ninja; "
        "training leaves them out and runs without"
    )
    return Finding("compiler", "note", "no C++ compiler or no ninja", hint)


def _with_scripts(path: str | None) -> str:
    """``path`` and the folder of this Python, where pip puts programs."""
    return os.pathsep.join([str(Path(sys.executable).parent), path or os.defpath])


def mpi(probe: ImportProbe | None) -> Finding:
    """mpi4py, the MPI library behind it, and mpiexec."""
    found = package("mpi4py", "starting with mpiexec (torchrun and srun do without)", "mpi")
    if found.status == "missing" or probe is None:
        return Finding("mpi", found.status, found.value, found.hint)
    works, answer = probe.result()
    if not works:
        return Finding("mpi", "missing", f"mpi4py {found.value}", f"mpi4py finds no MPI library ({answer})")
    mpiexec = shutil.which("mpiexec", path=_with_scripts(os.environ.get("PATH")))
    value = f"mpi4py {found.value} on {' '.join(answer.split())}, {mpiexec or 'no mpiexec'}"
    if mpiexec is None:
        return Finding("mpi", "note", value, "mpiexec is not on PATH; load the site's MPI module")
    return Finding("mpi", "ok", value)


def slurm(environ: Mapping[str, str] = os.environ) -> Finding:
    """Slurm's programs, and the job that this process is in."""
    there = [name for name in ("sbatch", "srun") if shutil.which(name, path=environ.get("PATH"))]
    job = f"in job {environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else "not in a job"
    if len(there) == 2:
        return Finding("slurm", "ok", f"sbatch and srun, {job}")
    if "SLURM_JOB_ID" in environ:
        return Finding("slurm", "note", job, "sbatch or srun is not on PATH: jobs are neither made nor requeued here")
    return Finding("slurm", "note", "none", "only for sbatch and python -m launch; torchrun and mpiexec do without")


def launcher(environ: Mapping[str, str] = os.environ) -> Finding:
    """What started this process, as training would see it."""
    try:
        found = detect(environ)
    except UserError as error:
        return Finding("launcher", "missing", "contradictory variables", str(error), required=True)
    if found.launcher == "none":
        return Finding("launcher", "ok", "plain start, one process")
    return Finding("launcher", "ok", f"{found.launcher}: rank {found.rank} of {found.world_size} on {found.host}")


def tracking(environ: Mapping[str, str] = os.environ) -> Finding:
    """Where Weights & Biases would record."""
    found = package("wandb", "curves in Weights & Biases (metrics.jsonl is always written)", "train")
    if found.status == "missing":
        return found
    try:
        mode = resolve_mode("auto", environ)
    except UserError as error:
        return Finding("wandb", "missing", found.value, str(error), required=True)
    return Finding("wandb", "ok", f"{found.value}, {mode}")


def disk(folder: str | Path, least_bytes: int = GIB) -> Finding:
    """Free space and write permission in ``folder``, or in the nearest parent that exists."""
    path = Path(folder).absolute()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    value = f"{free / GIB:.1f} GiB free in {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "missing", value, "it cannot be written; choose another folder", required=True)
    if free < least_bytes:
        return Finding("disk", "missing", value, f"at least {least_bytes / GIB:.0f} GiB for a run", required=True)
    return Finding("disk", "ok", value)


def shared_memory(path: str = "/dev/shm") -> Finding:
    """The size of shared memory, through which the GPUs of a node talk where they have no direct way."""
    if not os.path.isdir(path):
        return Finding("shared memory", "note", f"no {path}", "only NCCL on Linux uses it")
    usage = shutil.disk_usage(path)
    value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {path}"
    if usage.total < GIB // 2:
        return Finding("shared memory", "note", value, "small for several GPUs; docker run --shm-size=1g")
    return Finding("shared memory", "ok", value)


def attempt(name: str, probe: Callable[[], Finding]) -> Finding:
    """The probe's finding, or that it failed: one odd machine must not hide the other lines."""
    try:
        return probe()
    except Exception as error:  # a report about a broken machine must come through
        return Finding(name, "missing", "unknown", f"the probe failed: {type(error).__name__}: {error}")
