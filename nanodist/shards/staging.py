"""The staging folder beside a store: what a killed packing has done, for the same command to go on from.

``.STORE.packing/`` holds ``pieces/``, ``records/`` of whole shards, and ``store/``, which becomes the store at the end.
Nothing in it looks like a store before its manifest is written, which comes last.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from pathlib import Path
from typing import Any

from hpc import atomic
from hpc.errors import UserError
from nanodist.shards.manifest import NAME, load_manifest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Staging:
    """Paths in the staging folder of the store ``out``; the methods are for rank 0.

    Args:
        out: folder of the store.
        grow: the store exists, and its new shards go into it under names that its manifest does not know yet.
    """

    def __init__(self, out: Path, grow: bool = False) -> None:
        self.out, self.grow = Path(os.path.abspath(out)), grow
        self.folder = self.out.with_name(f".{self.out.name}.packing")
        self.pieces, self.records = self.folder / "pieces", self.folder / "records"
        self.shards = self.out if grow else self.folder / "store"
        self.stop = self.folder / "stop"
        self._lock: Any = None
        self._mine = False
        self._made: list[Path] = []

    def open(self) -> str:
        """Make the folder or take up what is there; gives a token that the other ranks find in it too.

        Raises:
            UserError: another process packs to the same store.
        """
        # The innermost first: what is made here goes again if nothing comes of it.
        self._made = [parent for parent in self.out.parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._mine = True
        for folder in (self.pieces, self.records, self.shards):
            folder.mkdir(exist_ok=True)
            for left in folder.glob(".*.tmp"):
                left.unlink()
        self.stop.unlink(missing_ok=True)
        if not self.grow:
            (self.shards / NAME).unlink(missing_ok=True)
        token = uuid.uuid4().hex
        atomic.write_text(self.folder / "token", token)
        return token

    def announce(self, command: str, content_hash: str) -> None:
        """Say what the store will be once it is published, and by which command."""
        atomic.write_json(self.folder / "goal.json", {"command": command, "content_hash": content_hash})

    def was_published(self, command: str) -> bool:
        """Whether the same command made the store and was killed before it had removed this folder."""
        try:
            goal = json.loads((self.folder / "goal.json").read_bytes())
            return bool(goal == {"command": command, "content_hash": load_manifest(self.out).content_hash})
        except (OSError, ValueError, UserError):
            return False

    def check(self, token: str) -> None:
        """Refuse, on any rank, to work in a folder that is not the one of rank 0.

        Raises:
            UserError: the file system is not shared.
        """
        try:
            found = (self.folder / "token").read_text()
        except OSError:
            found = ""
        if found != token:
            raise UserError(
                f"{socket.gethostname()} does not see what rank 0 writes to {self.folder.parent}: the folder of --out "
                "must lie on a file system that all nodes share"
            )

    def close(self, keep: bool) -> bool:
        """Let go of the folder after a failure; ``keep`` what is whole in it, if anything is. Tells whether it did."""
        if not self._mine:
            return False
        kept = keep and any(self.pieces.glob("*.json"))
        if not kept:
            self._remove_new_shards()
            self._remove()
            for parent in self._made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        self._release()
        return kept

    def publish(self) -> None:
        """Make the whole store appear under its name."""
        if not self.grow:
            atomic.sync_directory(self.shards)
            if self.out.exists():
                self.out.rmdir()
            os.replace(self.shards, self.out)
            atomic.sync_directory(self.out.parent)

    def remove(self) -> None:
        """Remove the folder, once the store is there."""
        self._remove()
        self._release()

    def _remove(self) -> None:
        # Renamed first: one that is half removed must not be taken up.
        doomed = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            os.replace(self.folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _remove_new_shards(self) -> None:
        """Of a store that was to grow: what its manifest does not know."""
        if self.grow:
            known = {shard.file for shard in load_manifest(self.out).shards}
            for record in self.records.glob("*.json"):
                if record.stem not in known:
                    (self.shards / record.stem).unlink(missing_ok=True)

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        path = self.folder / "lock"
        while True:
            file = open(path, "wb")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"another process is packing to {self.out}: wait for it, choose another --out, or start the ranks "
                    "of one packing with srun, mpiexec or torchrun, so that they know of each other"
                ) from None
            except OSError:  # file systems without locks
                pass
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    self._lock = file
                    return
            file.close()  # the folder was finished and removed in between
            self.folder.mkdir(parents=True, exist_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
