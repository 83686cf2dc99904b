"""Commands end quietly when what reads their output closes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpc.closed_pipe import CLOSED, until_closed

SCRIPT = """
import sys
from hpc.closed_pipe import until_closed
def many():
    for n in range(100000): print(n)
    return 0
def few():
    print("few")
    raise SystemExit(0)
sys.exit(until_closed({}))
"""


@pytest.mark.parametrize(
    "line",
    [
        ("-c", SCRIPT.format("many")),
        ("-c", SCRIPT.format("few")),
        ("-m", "nanodist", "--help"),
        ("-m", "launch", "--help"),
    ],
    ids=["while it writes", "what is in the buffer at the end", "nanodist --help", "launch --help"],
)
def test_a_command_ends_quietly_when_its_reader_closes(line: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        # Unbuffered, argparse itself passes over a closed pipe.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            [sys.executable, *line], stdout=writer, stderr=subprocess.PIPE, env=environment, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED, b"")


def test_other_broken_pipes_stay_errors() -> None:
    def breaks() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            os.write(writer, b"lost")
        finally:
            os.close(writer)
        return 0

    with pytest.raises(BrokenPipeError):
        until_closed(breaks)
    assert until_closed(lambda: 3) == 3
