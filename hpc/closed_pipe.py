"""Commands whose output goes into something that closes, as ``head`` does."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import IO

# What a shell says of a tool that SIGPIPE ended.
CLOSED = 128 + 13


def until_closed(command: Callable[[], int]) -> int:
    """Run a command line's function; end quietly where nobody reads its output any more.

    The signal is left as Python has it (ignored): its default would also end a process at a closed connection. A
    broken pipe that is neither standard output nor standard error stays an error.

    Args:
        command: does the work and gives the exit code.

    Returns:
        The command's exit code, or 141, which shells give for a tool that SIGPIPE ended.
    """
    try:
        try:
            return command()
        finally:
            # Here, where it can be caught, and not when the interpreter ends.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None and not stream.closed:
                    stream.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
        if not closed:
            raise
        for stream in closed:
            # What is still in the buffer goes nowhere, and the interpreter's end says nothing of it.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        return CLOSED


def _nobody_reads(stream: IO[str] | None) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file below it
        return False
