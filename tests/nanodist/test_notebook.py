"""The example notebook runs as it is, and what ``import nanodist`` offers works in three lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanodist.encoders import EncoderSpec, random_encoder
from nanodist.export.weights import export_timm

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def encoder(tmp_path):
    export_timm(random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), 0), tmp_path / "e", {"name": "e"})
    return tmp_path / "e"


def test_the_notebook_runs_in_a_fresh_process(tmp_path, encoder):
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "NANODIST_ENCODER": str(encoder), "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    code += "\nprint(sorted(found.image), found.image['coverage'])"
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "uint16 (256, 256)" in done.stdout and done.stdout.count("is most like") == 8


def test_three_lines(encoder, tmp_path):
    import nanodist

    features = nanodist.load_encoder(str(encoder)).embed([np.zeros((40, 30), np.uint8), np.ones((20, 20), np.uint16)])
    assert features.shape[0] == 2 and features.dtype == np.float32
    mask = np.zeros((64, 64), bool)
    mask[30:34, 8:56] = True
    assert nanodist.measure(mask, pixel_size_nm=2.0).image["coverage"] == pytest.approx(mask.mean())
    with pytest.raises(AttributeError, match="no attribute 'embed'"):
        nanodist.embed  # noqa: B018
