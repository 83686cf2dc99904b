"""Machines on this machine: each has its own network, host name, mounts and process ids, held by one init process.

Killing that process kills all that runs on the machine, and the kernel then removes its network: nothing is left.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# bash as init reaps the orphans that it inherits; a zombie would keep Slurm waiting for the end of a step.
_INIT = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
ip link set lo up
touch {ready}
while :; do sleep 3600 & wait $! || true; done
"""
_UNSHARE = ("unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")


class ClusterError(RuntimeError):
    """The test cluster cannot be brought up or does not do as asked."""


@dataclass(frozen=True)
class Machine:
    """One machine, by its init process. ``born`` (clock ticks since boot) tells it from a later process of that id."""

    name: str
    pid: int
    born: int

    @classmethod
    def start(cls, name: str, hosts: Path, folder: Path) -> Machine:
        """Make the namespaces; the network has only its loopback interface until :func:`plug`.

        Raises:
            ClusterError: the kernel refuses, such as for lack of rights.
        """
        ready, log = folder / f"{name}.ready", folder / f"{name}.log"
        ready.unlink(missing_ok=True)
        script = _INIT.format(name=shlex.quote(name), hosts=shlex.quote(str(hosts)), ready=shlex.quote(str(ready)))
        with open(log, "wb") as output:
            outer = subprocess.Popen(
                [*_UNSHARE, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if not until(lambda: ready.exists() or outer.poll() is not None, 10) or outer.poll() is not None:
            outer.kill()
            raise ClusterError(f"machine {name} cannot be made: {log.read_text().strip() or 'no answer'}")
        pid = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        return cls(name, pid, _born(pid) or 0)

    def alive(self) -> bool:
        """Whether its init process still runs."""
        return _born(self.pid) == self.born

    def kill(self) -> None:
        """End everything on it at once (SIGKILL), and wait until it is gone."""
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
        if not until(lambda: not self.alive(), 10):
            raise ClusterError(f"machine {self.name} (pid {self.pid}) does not die")

    def command(self, argv: Sequence[str], folder: Path | None = None) -> list[str]:
        """The command line that runs ``argv`` on this machine, in ``folder`` (``/`` if none)."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--ipc", "--pid"]
        return [*enter, "env", f"--chdir={folder or '/'}", *argv]

    def namespace(self) -> str | None:
        """Name of its process-id namespace; ``None`` once it is dead."""
        return _namespace(self.pid)

    def pids(self) -> list[int]:
        """Process ids, as the real machine counts them, of all that runs on it."""
        return pids_of(self.namespace())


def plug(head: Machine, node: Machine, address: str, bridge: str) -> None:
    """Give ``node`` an interface ``eth0`` with ``address`` on the head's ``bridge``; its other end is named as it."""
    on_head(head, f"ip link add {node.name} type veth peer name eth0 netns {node.pid}", real_pids=True)
    on_head(head, f"ip link set {node.name} master {bridge} up")
    check(node.command(["sh", "-ec", f"ip address add {address} dev eth0; ip link set eth0 up"]))


def on_head(head: Machine, line: str, real_pids: bool = False) -> None:
    """Run a shell line on the head; with ``real_pids`` only in its network, where process ids are the real ones."""
    argv = ["sh", "-ec", line]
    check(["nsenter", f"--target={head.pid}", "--net", *argv] if real_pids else head.command(argv))


def check(argv: Sequence[str], environ: dict[str, str] | None = None) -> str:
    """Standard output of a command.

    Raises:
        ClusterError: it failed; the text is its standard error.
    """
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environ)
    if done.returncode:
        raise ClusterError(f"{' '.join(argv)} failed ({done.returncode}): {(done.stderr or done.stdout).strip()}")
    return done.stdout


def until(condition: Callable[[], object], timeout_s: float, every_s: float = 0.05) -> bool:
    """Wait until ``condition()`` holds; whether it did within ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not (held := bool(condition())) and time.monotonic() < end:
        time.sleep(every_s)
    return held


def pids_of(namespace: str | None) -> list[int]:
    """Process ids, as the real machine counts them, of all that runs in a process-id namespace."""
    running = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return sorted(pid for pid in running if namespace and _namespace(pid) == namespace)


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _born(pid: int) -> int | None:
    """Start of a running process in clock ticks since boot; ``None`` for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
