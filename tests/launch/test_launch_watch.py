"""The table of ``launch status``, drawn on a terminal that is only text."""

import sys
import time

import pytest

from hpc.errors import UserError
from launch import watch
from launch.records import Record, SweepFolder

pytest.importorskip("rich")


class _Terminal:
    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_controller_that_does_not_answer_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    folder = SweepFolder(tmp_path / "labels")
    looks = [
        watch.Look(folder, {"a": "running", "b": "done"}, {"a": Record(), "b": Record()}, frozenset()),
        UserError("squeue cannot be asked which jobs are in the queue: no answer"),
        watch.Look(folder, {"a": "done", "b": "done"}, {"a": Record(), "b": Record()}, frozenset()),
    ]

    def at(_):
        look = looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look

    terminal = _Terminal()
    monkeypatch.setattr(watch.Look, "at", at)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    watch.watch([folder], 1.0)
    assert not looks and "no answer" in terminal.text and "labels" in terminal.text
