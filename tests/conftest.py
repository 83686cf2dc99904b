"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests share few cores; spinning threads of several processes would slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    """A pool of up to four gloo processes."""
    from tests.ranks import RankPool

    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real micrographs; tests that need it are skipped where it is absent."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("NANODIST_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real micrographs here; NANODIST_DATA names their folder")
    return folder
