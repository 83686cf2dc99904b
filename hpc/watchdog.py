"""Turns "no step for N minutes" into a stack dump of every rank and the end of the process.

Two clocks. A daemon thread counts the silence: it needs the GIL, has it while the main thread waits in a collective,
and can write, wait and choose the exit code. Where the main thread hangs in C code that keeps the GIL, that thread
stands still too; for this, it keeps winding up faulthandler's timer, a thread in C that needs nothing of Python, and
which then writes the stacks and ends the process (with code 1, which is not ours to choose).

A hang is rarely found by one rank alone, since the others wait for it. They all must have dumped before the first one
ends, because the launcher then kills the rest: whoever finds a hang writes a file ``hang``, which the others look for,
and stays for a few seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

EXIT_CODE = 70  # EX_SOFTWARE
SLOW_FACTOR = 4.0
MARK = "hang"


class Watchdog:
    """Watches this process from its making to :meth:`close`; one a process.

    Args:
        limit_s: a silence of so many seconds between two steps is a hang.
        folder: where ``rank-N.txt`` goes, the same for all ranks; better one a start, so that dumps of earlier starts
            stay. It is made if it is missing.
        rank: of this process.
        slow_limit_s: the limit before the first step is done (compilation, first reads) and inside :meth:`paused`;
            by default four times ``limit_s``.
        grace_s: how long a rank that found a hang waits for the others to dump; by default a twentieth of the limit,
            between 2 and 20 seconds.

    Raises:
        ValueError: the limit is not above 0.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, limit_s: float, folder: Path, rank: int, slow_limit_s: float | None = None, grace_s: float | None = None
    ) -> None:
        if limit_s <= 0:
            raise ValueError(f"limit_s is {limit_s}; it must be above 0")
        self.limit_s, self.rank = limit_s, rank
        self.slow_limit_s = max(limit_s, SLOW_FACTOR * limit_s if slow_limit_s is None else slow_limit_s)
        self.grace_s = min(20.0, max(2.0, limit_s / 20)) if grace_s is None else grace_s
        self._poll_s = min(5.0, limit_s / 20)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._mark = folder / f"rank-{rank}.txt", folder / MARK
        # Open from the beginning: the timer in C takes a file descriptor, and the disk may hang with everything else.
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
        self._old_mark = self._mark_time()
        self._beats, self._pauses, self._since = 0, 0, time.monotonic()
        self._closed, self._dumped, self._found_elsewhere = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._look, name="watchdog-look", daemon=True).start()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A step is done."""
        self._since = time.monotonic()
        self._beats += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While it is open (a save, an evaluation) no step is expected; the slow limit holds."""
        self._pauses += 1
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._pauses -= 1

    def close(self) -> None:
        """Stop watching; a file without a dump is taken away.

        To be called in a ``finally``: where a hang was found and a neighbour has ended already, the collective fails
        here, and the call then does not return but ends with the watchdog's exit code.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        empty = self._file.tell() == 0 and os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if empty:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def limit(self) -> float:
        """The limit that holds now, in seconds."""
        return self.slow_limit_s if self._pauses or not self._beats else self.limit_s

    def _silence(self) -> float:
        return time.monotonic() - self._since

    def _watch(self) -> None:
        while not self._closed.is_set():
            silence = self._silence()
            left = self.limit() - silence
            if left <= 0:
                self._end(f"no step for {silence:.0f} s")
            if self._found_elsewhere.is_set():
                self._end(f"another rank found a hang, here no step for {silence:.0f} s")
            # If this thread is not run again until then, the GIL is held. Half the grace comes on top, so that the
            # other ranks, which dump at the limit and stay for the whole of it, see this one dump too.
            faulthandler.dump_traceback_later(
                left + self.grace_s / 2 + self._poll_s, exit=True, file=self._file.fileno()
            )
            self._closed.wait(self._poll_s)

    def _look(self) -> None:
        """Look for the mark of another rank; in a thread of its own, as a file system that hangs would stop it."""
        while not self._closed.wait(self._poll_s):
            if self._silence() > self.limit_s / 2 and self._marked():
                self._found_elsewhere.set()
                return

    def _end(self, what: str) -> None:
        line = f"watchdog: rank {self.rank} on {socket.gethostname()}: {what}, {self._beats} steps done by this start"
        os.write(2, f"{line}; stacks go to {self.path}; exit code {EXIT_CODE}\n".encode())
        threading.Thread(target=self._end_without_files, daemon=True).start()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self._file.write(f"{line}, process {os.getpid()}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            if not self._marked():
                self._mark.write_text(line + "\n", encoding="utf-8")
            self._dumped.set()
        time.sleep(self.grace_s)
        os._exit(EXIT_CODE)

    def _end_without_files(self) -> None:
        """What ends the process where writing the dump hangs, as the training may have for the same reason."""
        if not self._dumped.wait(self.grace_s / 2):
            faulthandler.dump_traceback(2, all_threads=True)
            time.sleep(self.grace_s)
            os._exit(EXIT_CODE)

    def _mark_time(self) -> int | None:
        try:
            return self._mark.stat().st_mtime_ns
        except OSError:
            return None

    def _marked(self) -> bool:
        """Whether a rank of this start has found a hang: the mark is there, and is not of an earlier start."""
        found = self._mark_time()
        return found is not None and found != self._old_mark
