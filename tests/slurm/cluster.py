"""A real Slurm cluster on one machine, for tests and by hand: a head and some nodes, each in namespaces of its own.

    python -m tests.slurm.cluster up --nodes 3
    python -m tests.slurm.cluster exec sinfo
    python -m tests.slurm.cluster shell
    python -m tests.slurm.cluster down

Wants root on Linux with Slurm and Munge installed (``apt-get install slurm-wlm munge``) and neither of them running.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from tests.slurm import config
from tests.slurm.config import BRIDGE, HEAD, Layout
from tests.slurm.namespaces import ClusterError, Machine, check, on_head, plug, until

SWITCH = "NANODIST_SLURM_TESTS"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "nanodist-slurm"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
# Nodes refuse a start in the very second in which they revoked the credential of the one before.
_CREDENTIAL_S = 3.0
_DAEMONS = ("munged", "slurmctld", "slurmd")


def refusal() -> str | None:
    """Why this machine cannot have a test cluster, in one sentence; ``None`` if it can."""
    if os.environ.get(SWITCH) != "1":
        return f"the Slurm cluster is opt-in: set {SWITCH}=1 on a machine that has no Slurm of its own"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the Slurm cluster needs root on Linux, for its namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"the Slurm cluster needs {', '.join(missing)}: apt-get install slurm-wlm munge iproute2 util-linux"
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = entry.read_text().strip()
        except OSError:
            continue
        if name in _DAEMONS:
            return (
                f"this machine already runs {name} (pid {entry.parent.name}); the test cluster stays away from it "
                "(python -m tests.slurm.cluster down removes one that was brought up by hand)"
            )
    return None


class Cluster:
    """A head and ``nodes`` nodes. As a context manager it is up inside and gone, with its folder, afterwards.

    Attributes:
        folder: configuration, logs and spool; ``work`` in it is where commands run and jobs write their output.
        environ: variables of commands and, through sbatch, of jobs; to be added to before use.
    """

    def __init__(
        self, nodes: int = 3, cpus: int = 2, memory_mb: int = 7000, folder: Path = DEFAULT_FOLDER, **timing: int
    ) -> None:
        self.layout = Layout(nodes, cpus, memory_mb, **timing)
        self.folder = Path(folder).resolve()
        self.work = self.folder / "work"
        self.machines: dict[str, Machine] = {}
        self.environ = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    @classmethod
    def attach(cls, folder: Path = DEFAULT_FOLDER) -> Cluster:
        """The cluster that another process brought up in ``folder``.

        Raises:
            ClusterError: there is none.
        """
        try:
            record = json.loads((folder / "cluster.json").read_text())
        except OSError:
            raise ClusterError(f"no test cluster in {folder}; python -m tests.slurm.cluster up makes one") from None
        cluster = cls(folder=folder, **record["layout"])
        cluster.machines = {name: Machine(**values) for name, values in record["machines"].items()}
        return cluster

    def __enter__(self) -> Cluster:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()

    def up(self) -> Cluster:
        """Bring it up; returns when all nodes are idle.

        Raises:
            ClusterError: this machine may not or cannot have one; nothing is left.
        """
        problem = refusal()
        if problem:
            raise ClusterError(problem)
        if self.folder.exists():
            raise ClusterError(f"{self.folder} exists; remove it with python -m tests.slurm.cluster down")
        self.work.mkdir(parents=True)
        try:
            config.write(self.layout, self.folder)
            self._start_head()
            for name in self.layout.names():
                self._start_node(name)
            self.wait_idle()
        except BaseException as error:
            logs = "" if not isinstance(error, ClusterError) else self._log_tails()
            self.down()
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}{logs}") from None
            raise
        return self

    def down(self) -> None:
        """Kill every process of it, and remove its folder. Networks and mounts go with their last process."""
        for machine in self.machines.values():
            machine.kill()
        self.machines = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self,
        argv: Sequence[str | Path],
        folder: Path | None = None,
        on: str = HEAD,
        timeout_s: float = 120,
        environ: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head (a node with ``on``), as a user at the prompt would; never raises on its code."""
        machine = self.machines[on].command([str(a) for a in argv], folder or self.work)
        env = {**self.environ, **(environ or {})}
        return subprocess.run(
            machine, capture_output=True, text=True, timeout=timeout_s, env=env, stdin=subprocess.DEVNULL
        )

    def ask(self, *argv: str | Path, folder: Path | None = None, environ: dict[str, str] | None = None) -> str:
        """Standard output of a command on the head.

        Raises:
            ClusterError: it failed.
        """
        done = self.run(argv, folder, environ=environ)
        if done.returncode:
            raise ClusterError(f"{' '.join(map(str, argv))} failed ({done.returncode}): {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *argv: str | Path, folder: Path | None = None, environ: dict[str, str] | None = None) -> int:
        """Submit; the id of the job."""
        return int(self.ask("sbatch", "--parsable", *argv, folder=folder, environ=environ).split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of ``scontrol show job``, such as ``JobState``, ``Reason``, ``Restarts``, ``NodeList``."""
        line = self.ask("scontrol", "show", "job", "-o", str(job_id)).splitlines()[0]
        fields = re.split(r" (?=[A-Za-z][A-Za-z/:]*=)", line.strip())
        return dict(field.split("=", 1) for field in fields)

    def wait(self, job_id: int, states: Sequence[str] = ("COMPLETED",), timeout_s: float = 120) -> dict[str, str]:
        """Wait until the job is in one of ``states``; its fields then.

        Raises:
            ClusterError: it ended in another state, or ``timeout_s`` went by; the text has the end of its log.
        """
        job: dict[str, str] = {}

        def there() -> bool:
            job.update(self.job(job_id))
            return job["JobState"] in states or job["JobState"] in ENDED

        until(there, timeout_s, every_s=0.25)
        if job["JobState"] in states:
            return job
        raise ClusterError(
            f"job {job_id} is {job['JobState']} ({job['Reason']}, exit {job['ExitCode']}), not {' or '.join(states)}:\n"
            f"{self.log(job)[-3000:]}"
        )

    def wait_restart(self, job_id: int, restarts: int = 1, timeout_s: float = 60) -> dict[str, str]:
        """Wait until the job was requeued ``restarts`` times, and let the new start begin at once.

        Raises:
            ClusterError: it ended, or was not requeued in time; the text has the end of its log.
        """
        job: dict[str, str] = {}
        seen: list[float] = []

        def requeued() -> bool:
            job.update(self.job(job_id))
            if int(job["Restarts"]) < restarts or job["JobState"] != "PENDING":
                return job["JobState"] in ENDED or (job["JobState"] == "RUNNING" and int(job["Restarts"]) >= restarts)
            seen.append(time.monotonic())
            return time.monotonic() - seen[0] > _CREDENTIAL_S and self.release(job_id)

        until(requeued, timeout_s, every_s=0.25)
        if int(job["Restarts"]) >= restarts:
            return job
        state = f"{job['JobState']} with {job['Restarts']} restarts"
        raise ClusterError(f"job {job_id} is {state}, not {restarts}:\n{self.log(job)[-3000:]}")

    def log(self, job: dict[str, str]) -> str:
        """What the job wrote to its output file so far."""
        path = Path(job.get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_idle(self, names: Sequence[str] = (), good: Sequence[str] = ("idle",)) -> None:
        """Wait until the nodes (all of them) are ``good``.

        Raises:
            ClusterError: they are not within 30 s.
        """
        names = names or self.layout.names()

        def idle() -> bool:
            done = self.run(["sinfo", "-N", "-h", "-p", "normal", "-o", "%N %T", "-n", ",".join(names)])
            states = [line.split()[1] for line in done.stdout.splitlines()]
            return len(states) == len(names) and all(state in good for state in states)

        if not until(idle, 30, every_s=0.2):
            raise ClusterError(f"nodes did not come up in 30 s:\n{self.run(['sinfo', '-N', '-l']).stdout}")

    def release(self, job_id: int | str) -> bool:
        """Let a requeued job start at once, rather than after Slurm's delay; false while its last start still ends."""
        return self.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"]).returncode == 0

    def kill_node(self, name: str) -> None:
        """The node's cable is pulled and its power lost: nobody gets a goodbye from it."""
        on_head(self.machines[HEAD], f"ip link set {name} down")
        self.machines[name].kill()
        # The kernel may keep the network for minutes, for connections that nobody closed, or end it at once.
        on_head(self.machines[HEAD], f"ip link delete {name} 2> /dev/null || ! ip link show {name} 2> /dev/null")

    def revive_node(self, name: str, wait: bool = True) -> None:
        """Boot a dead node; returns when Slurm may use it again."""
        self._start_node(name)
        if wait:
            self.wait_idle([name], ("idle", "mixed", "allocated"))

    def pids(self, name: str, pattern: str = "") -> list[int]:
        """Process ids on a node whose command line matches the regular expression; ``os.kill`` takes them."""
        found = []
        for pid in self.machines[name].pids():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if re.search(pattern, line):
                found.append(pid)
        return found

    def _start_head(self) -> None:
        head = self._start_machine(HEAD)
        address = f"{self.layout.address(HEAD)}/24"
        on_head(
            head, f"ip link add {BRIDGE} type bridge; ip address add {address} dev {BRIDGE}; ip link set {BRIDGE} up"
        )
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon(HEAD, "munged", *(f"--{option}={munge / name}" for option, name in files.items()))
        self._daemon(HEAD, "slurmctld", "-c")

    def _start_node(self, name: str) -> None:
        node = self._start_machine(name)
        plug(self.machines[HEAD], node, f"{self.layout.address(name)}/24", BRIDGE)
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._daemon(name, "slurmd", "-N", name)

    def _start_machine(self, name: str) -> Machine:
        machine = self.machines[name] = Machine.start(name, self.folder / "hosts", self.folder)
        machines = {name: asdict(machine) for name, machine in self.machines.items()}
        record = {"layout": asdict(self.layout), "machines": machines}
        (self.folder / "cluster.json").write_text(json.dumps(record))
        return machine

    def _daemon(self, on: str, *argv: str) -> None:
        check(self.machines[on].command(argv), self.environ)

    def _log_tails(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"\n{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description="A Slurm cluster to try things.")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="Where its files are.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="Bring it up.")
    for name, default in asdict(Layout()).items():
        up.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    execute = commands.add_parser("exec", help="Run a command on the head, in the present folder.")
    execute.add_argument("argv", nargs=argparse.REMAINDER)
    commands.add_parser("shell", help="A shell on the head.")
    commands.add_parser("down", help="Remove it.")
    options = vars(parser.parse_args(arguments))
    command, folder = options.pop("command"), options.pop("folder")
    os.environ.setdefault(SWITCH, "1")  # who types the command has opted in
    try:
        if command == "up":
            cluster = Cluster(folder=folder, **options).up()
            print(f"{cluster.layout.nodes} nodes are up; their logs are in {cluster.folder}")
            return 0
        cluster = Cluster.attach(folder)
        if command == "down":
            cluster.down()
            return 0
        argv = options["argv"] if command == "exec" else [os.environ.get("SHELL", "bash")]
        line = cluster.machines[HEAD].command(argv, Path.cwd())
        return subprocess.run(line, env={**os.environ, **cluster.environ}).returncode
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
