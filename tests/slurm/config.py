"""The files that configure the test cluster: slurm.conf, hosts, Munge's key."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "br0"
HEAD = "head"


@dataclass(frozen=True)
class Layout:
    """Size and timing of the cluster. Times in seconds; a real cluster's are larger, but the order of events is its."""

    nodes: int = 3
    cpus: int = 2
    memory_mb: int = 7000
    slurmd_timeout_s: int = 15
    kill_wait_s: int = 5
    grace_s: int = 30
    requeue_delay_s: int = 10

    def names(self) -> list[str]:
        """Host names of the nodes."""
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    def address(self, name: str) -> str:
        """Address of the head or of a node; the networks are their own, so they clash with nobody's."""
        return f"10.111.0.{1 + ([HEAD, *self.names()].index(name))}"


def hosts(layout: Layout) -> str:
    """Text of ``/etc/hosts``."""
    lines = [f"{layout.address(name)} {name}" for name in (HEAD, *layout.names())]
    return "\n".join(["127.0.0.1 localhost", *lines, ""])


def slurm_conf(layout: Layout, folder: Path) -> str:
    """Text of ``slurm.conf``.

    ``cred_expire`` is also the time that a requeued job waits (default 120 s). ``config_overrides`` lets nodes claim
    cores and memory that the machine lacks.
    """
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={layout.address(name)} CPUs={layout.cpus} RealMemory={layout.memory_mb}"
        for name in layout.names()
    )
    return f"""\
ClusterName=nanodist
SlurmctldHost={HEAD}({layout.address(HEAD)})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={layout.requeue_delay_s}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={layout.memory_mb // layout.cpus}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout={layout.slurmd_timeout_s}
KillWait={layout.kill_wait_s}
OverTimeLimit=0
InactiveLimit=0
MinJobAge=86400
MailProg=/bin/true
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={layout.grace_s}
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def write(layout: Layout, folder: Path) -> None:
    """Write all of them into ``folder``, which only root may write."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    (folder / "hosts").write_text(hosts(layout))
    (folder / "slurm.conf").write_text(slurm_conf(layout, folder))
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
