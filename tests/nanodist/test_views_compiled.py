"""Compiled again, read from the cache, compiled for a lesser processor: views are the same bits, whichever it was."""

import os
import subprocess
import sys

DIGESTS = """
import hashlib
import torch
from nanodist.views.on_cpu import compiled
from tests.nanodist.test_views import KEYS, VARIED, _made, _tiles, on_cpu

compiled()
for name, config in VARIED.items():
    for dtype in (torch.uint8, torch.uint16):
        views = _made(on_cpu, _tiles(dtype=dtype), config, KEYS)
        print(name, dtype, hashlib.sha256(views.numpy().tobytes()).hexdigest()[:16])
"""


def _digests(cache, **environ):
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_first_start_and_those_from_the_cache_make_the_same_views(tmp_path):
    first = _digests(tmp_path / "own")
    code = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")}
    assert len(first) == 14 and len(set(first)) == 14 and len(code) == 1
    assert _digests(tmp_path / "own") == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")} == code, "the cache was not read"
    # Without the vectors and the fused products that this machine may have.
    assert _digests(tmp_path / "plain", NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == first
