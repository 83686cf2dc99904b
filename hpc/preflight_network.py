"""Which network interface the ranks of several nodes talk through."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from hpc.preflight import Finding
from hpc.topology import Topology

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel", "cali")


def addresses() -> dict[str, str]:
    """IPv4 address of every interface that has one; nothing where the system does not tell (not Linux)."""
    found: dict[str, str] = {}
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue  # no address
                found[name] = socket.inet_ntoa(answer[20:24])
    except (ImportError, AttributeError, OSError):
        return {}
    return found


def selected(spec: str, names: list[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME means: prefixes, ``=`` for whole names, ``^`` for all but those."""
    exclude, spec = spec.startswith("^"), spec.lstrip("^")
    exact, spec = spec.startswith("="), spec.lstrip("=")
    wanted = [part for part in spec.split(",") if part]
    hit = [name for name in names if any(name == part if exact else name.startswith(part) for part in wanted)]
    return [name for name in names if name not in hit] if exclude else hit


def interface(
    topology: Topology,
    backend: str,
    environ: Mapping[str, str] = os.environ,
    known: Mapping[str, str] | None = None,
    own_address: str | None = None,
) -> list[Finding]:
    """The interface of this rank, and what is wrong with the choice.

    Args:
        topology: one node needs no network.
        backend: ``"gloo"`` or ``"nccl"``.
        environ: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME decides where it is set.
        known: address by interface; looked up by default.
        own_address: what this host's name resolves to, which gloo takes; looked up by default.
    """
    if topology.node_count == 1:
        return []
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    known = addresses() if known is None else known
    if not known:
        return [Finding("warning", "the network interfaces of this system cannot be listed")]
    outside = [name for name, address in known.items() if not address.startswith("127.")]
    offered = ", ".join(f"{name} ({known[name]}{_speed(name)})" for name in outside) or "none but loopback"
    spec = environ.get(variable, "")
    if spec:
        chosen = selected(spec if backend == "nccl" else f"={spec}", list(known))
        if not chosen:
            return [Finding("error", f"{variable}={spec} names no interface here; there are: {offered}")]
        return [Finding("ok", f"{backend} talks through {', '.join(chosen)}{_speed(chosen[0])}, as {variable} says")]
    if backend == "gloo":
        address = _resolved() if own_address is None else own_address
        if address.startswith("127.") or not address:
            what = f"the name {topology.host} means {address or 'no address'} here, where no other node reaches it"
            return [Finding("error", f"{what}; set {variable} to one of: {offered}")]
        name = next((name for name in outside if known[name] == address), address)
        return [Finding("ok", f"gloo talks through {name}{_speed(name)}, the address of {topology.host}")]
    real = [name for name in outside if not name.startswith(_VIRTUAL)]
    if len(real) > 1:
        return [Finding("warning", f"NCCL chooses among {offered}; {variable} would say which")]
    return [Finding("ok", f"NCCL talks through {offered} or the fabric that it finds")]


def _resolved() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _speed(name: str) -> str:
    """``, 10 Gb/s`` where the system knows it."""
    try:
        megabits = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return ""
    return f", {megabits / 1000:g} Gb/s" if megabits > 0 else ""
