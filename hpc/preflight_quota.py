"""How much a user may still write: the quota where a file system tells it, free space otherwise.

A cluster's file system has hundreds of TiB free and lets a user have one of them. XFS projects and CephFS report the
quota of a folder as free space by themselves; Lustre, Spectrum Scale (GPFS), and NFS, ext4 and XFS users have programs
that are asked here. One that is missing or does not answer at once leaves the free space.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 0.4
_KIB = 1024


@dataclass(frozen=True)
class Room:
    """Bytes and files that may still be written (``None``: not told or not limited), and who says so."""

    bytes: int
    files: int | None
    source: str


def room(folder: Path, environ: Mapping[str, str] = os.environ, mounts: str | None = None) -> Room:
    """The least that free space and quotas leave for ``folder``, which exists.

    Args:
        folder: where to write.
        environ: its PATH has the programs.
        mounts: the text of ``/proc/self/mounts``.
    """
    if not hasattr(os, "statvfs"):  # Windows
        return Room(shutil.disk_usage(folder).free, None, "free space")
    free = os.statvfs(folder)
    # Some file systems (btrfs, many network ones) do not count files and say 0 of 0.
    files = free.f_favail if free.f_files else None
    found = [Room(free.f_bavail * free.f_frsize, files, "free space"), *_quotas(folder, environ, mounts)]
    least = min(found, key=lambda one: one.bytes)
    counts = [one.files for one in found if one.files is not None]
    return Room(max(least.bytes, 0), max(min(counts), 0) if counts else None, least.source)


def mount_of(folder: Path, mounts: str) -> tuple[str, str, str]:
    """Device, mount point and type of the file system that ``folder`` is on."""
    best = ("", "/", "")
    for line in mounts.splitlines():
        device, point, kind, *_ = [*line.split(), "", "", ""]
        # Blanks in names are written as \040.
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
        if folder.is_relative_to(point) and len(point) >= len(best[1]):
            best = (device, point, kind)
    return best


def _quotas(folder: Path, environ: Mapping[str, str], mounts: str | None) -> Iterator[Room]:
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(errors="replace")
        except OSError:
            return
    device, point, kind = mount_of(folder.resolve(), mounts)
    ask = _Asker(environ)
    readers: dict[str, Callable[[], Iterator[Room]]] = {
        "lustre": lambda: _lustre(ask, folder, point),
        "gpfs": lambda: _gpfs(ask, device),
        **dict.fromkeys(("nfs", "nfs4", "ext4", "xfs"), lambda: _unix(ask, point)),
    }
    if kind in readers:
        yield from readers[kind]()


class _Asker:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {**environ, "LC_ALL": "C"}

    def __call__(self, program: str, *arguments: str) -> str:
        """What a program prints; nothing where it is missing, fails or is slow. Over quota is a failure to some."""
        found = shutil.which(program, path=self._environ.get("PATH"))
        if found is None:
            return ""
        try:
            return subprocess.run(
                [found, *arguments], env=self._environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return ""


def _left(used: str, soft: str, hard: str) -> int | None:
    """What a limit leaves; the hard one counts where there is one, 0 is none."""
    # An asterisk marks what is over its limit, brackets what Lustre is not sure of.
    values = [int(text.strip("*[]")) for text in (used, soft, hard)]
    limit = values[2] or values[1]
    return limit - values[0] if limit else None


def _room(words: list[str], source: str) -> Iterator[Room]:
    """From used, soft, hard and grace in KiB, and the same for files."""
    try:
        size, count = _left(*words[0:3]), _left(*words[4:7])
    except (ValueError, TypeError):
        return
    if size is not None or count is not None:
        yield Room(2**62 if size is None else size * _KIB, count, source)


def _lustre(ask: _Asker, folder: Path, point: str) -> Iterator[Room]:
    kinds = [("-u", str(os.getuid()), "user"), ("-g", str(folder.stat().st_gid), "group")]
    project = ask("lfs", "project", "-d", str(folder)).split()
    if project and project[0].isdigit() and project[0] != "0":
        kinds.append(("-p", project[0], "project"))
    for option, number, name in kinds:
        # A long name stands on a line of its own, so that lines mean nothing.
        words = ask("lfs", "quota", "-q", option, number, point).split()
        yield from _room(words[1:9], f"Lustre quota of the {name}")


def _unix(ask: _Asker, point: str) -> Iterator[Room]:
    # Raw grace times, as otherwise that column is left out where there is none.
    lines = ask("quota", "--no-wrap", "--raw-grace", "--user", f"--filesystem={point}").splitlines()
    for line in lines[2:]:
        yield from _room(line.split()[1:9], "quota of the user")


def _gpfs(ask: _Asker, device: str) -> Iterator[Room]:
    names: list[str] = []
    wanted = ("blockUsage", "blockQuota", "blockLimit", "filesUsage", "filesQuota", "filesLimit")
    for line in ask("mmlsquota", "-Y").splitlines():
        values = line.split(":")
        if "HEADER" in values[:3]:
            names = values
            continue
        row = dict(zip(names, values, strict=False))
        if row.get("filesystemName") == device.rpartition("/")[2] and all(name in row for name in wanted):
            block, files = [row[name] for name in wanted[:3]], [row[name] for name in wanted[3:]]
            yield from _room([*block, "", *files], f"{row.get('quotaType', '')} quota of Spectrum Scale".strip())
