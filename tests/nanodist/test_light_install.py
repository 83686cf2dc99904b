"""A plain install has no DeepSpeed, MPI, kornia, numba, webdataset, W&B or submitit, and must do without."""

import os
import subprocess
import sys
from pathlib import Path

EXTRAS = ("deepspeed", "mpi4py", "kornia", "numba", "webdataset", "wandb", "submitit", "onnx")
# An import of a name that stands for None fails as one that is not installed.
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
USE = """
import numpy as np, tempfile, pathlib
from PIL import Image
from nanodist.cli import main
from nanodist.encoders import EncoderSpec, random_encoder
from nanodist.export.weights import export_timm
root = pathlib.Path(tempfile.mkdtemp())
for label in "ab":
    (root / "images" / label).mkdir(parents=True)
    for i in range(6):
        pixels = np.random.default_rng(i + 100 * ord(label)).integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
assert main(["pack", str(root / "images"), "--out", str(root / "s"), "--labels", "folder", "--tile", "32"]) == 0
assert main(["inspect", str(root / "s")]) == 0 and main(["verify", str(root / "s")]) == 0
export_timm(random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), 0), root / "e", {"name": "e"})
probe = ["probe", f"e={root}/e", "--store", str(root / "s"), "--out", str(root / "p")]
assert main([*probe, "--labels-per-class", "1,2", "--splits", "1", "--seeds", "2", "--baselines", "none"]) == 0
assert main(["pretrain", "simclr", "data.store=" + str(root / "s"), "train.global_batch_size=4"]) == 2
assert not pathlib.Path("runs").exists()
print("done")
"""


def _python(code, folder=None):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


def test_pack_probe_and_export_need_no_extra(tmp_path):
    done = _python(BLOCK + USE, tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("done"), done.stderr[-3000:]
    assert "pip install 'nanodist[train]'" in done.stderr


def test_importing_nanodist_is_light():
    code = "import sys, nanodist, nanodist.cli; print([m for m in ('torch', 'mpi4py') if m in sys.modules])"
    assert _python(code).stdout.strip() == "[]"
