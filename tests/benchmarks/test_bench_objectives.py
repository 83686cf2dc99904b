"""The benchmark of the objectives runs and ends in one JSON object of finite ratios."""

import json
import math
import subprocess
import sys

import pytest


def test_quick_run_ends_in_ratios():
    pytest.importorskip("lightly", reason="the peer of the benchmark is not installed (extra bench)")
    command = [sys.executable, "-m", "tests.benchmarks.bench_objectives", "--quick", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"nt_xent_fp32_over_matmuls", "nt_xent_peak_mib_512", "barlow_128_faster_than_lightly"} <= set(found)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
