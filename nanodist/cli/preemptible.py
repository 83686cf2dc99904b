"""How a command that trains answers to signals, and with what it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc.preemption import Preemption


def preemptible(command: str, train: Callable[[Preemption], object]) -> int:
    """Call ``train``, and return the exit code of ``nanodist COMMAND``.

    Signals only set a flag in the :class:`Preemption` that ``train`` is given, from before torch is imported, which
    takes seconds: a signal must not kill a process that has not begun.
    """
    from hpc.preemption import EXIT_CODE, Preemption

    preemption = Preemption()
    preemption.install()
    code = 1
    try:
        code = _code(command, train, preemption)
    finally:
        # A process that ends since it was asked to keeps deaf until it is gone, so that its exit code is its own: srun
        # ends the ranks that are left as soon as the first one has returned with its code.
        if code == EXIT_CODE:
            preemption.ignore()
        else:
            preemption.uninstall()
    return code


def _code(command: str, train: Callable[[Preemption], object], preemption: Preemption) -> int:
    from hpc.loop import Preempted
    from hpc.preemption import EXIT_CODE
    from hpc.saving import NotSaved

    try:
        train(preemption)
    except Preempted as stopped:
        # Ctrl-C is the user's own wish, and asks nobody to start again.
        return 130 if stopped.reason == "SIGINT" else EXIT_CODE
    except NotSaved as lost:
        # No checkpoint, so no code that says so; a start looks for room before it trains. Rank 0 has the sentence.
        if str(lost):
            print(f"nanodist {command}: error: {lost}; once that is mended, the same command goes on", file=sys.stderr)
        return 1
    return 0
