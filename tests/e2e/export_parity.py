"""Differences between encoders and their exports, loaded by every foreign library that is here.

``python -m tests.e2e.export_parity [--precision fp16]`` prints a table: a ResNet-50 and a vision transformer through
timm, transformers, torchvision, ONNX Runtime and torch.export, and the ResNet through the system's old torchvision
(Debian 12: torch 1.13), each from image files on. Exit code 1 where an fp32 difference is above 1e-4, or transformers
or the old torchvision is not here.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanodist.encoders import Encoder, EncoderSpec, random_encoder
from nanodist.export.folder import export
from nanodist.export.loading import FORMATS, TORCHVISION_RGB, loading_code

ALLOWED = 1e-4
ROOT = Path(__file__).resolve().parent.parent.parent
SPECS = {
    "ResNet-50": EncoderSpec("resnet50", 96, 0.4, 0.2, "image", pooling="last_two", looks=[(0.75, 128, 8)]),
    "ViT-S/16": EncoderSpec(
        "vit_small_patch16_224", 96, 0.5, 0.25, looks=[(1.0, 96, 4)], trunk_options={"img_size": 96}
    ),
}
OLD = """
import sys
import numpy as np
import torch, torchvision
exec(open(sys.argv[1]).read())
np.save(sys.argv[3], embed(np.load(sys.argv[2])).numpy())
print(torch.__version__, torchvision.__version__)
"""


def trained(spec: EncoderSpec) -> Encoder:
    """Weights of full size whose BatchNorm has seen images, as after a training."""
    encoder = random_encoder(spec, 1)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            side = spec.image_size
            encoder.trunk.train()(torch.randn(8, 1, side, side, generator=draw) * 0.5 + 0.2)
    return Encoder(spec, encoder.trunk.eval(), spec.trunk, None)


def old_stack(encoder: Encoder, folder: Path, scratch: Path) -> list[tuple[str, str, float]]:
    """The same image through the torchvision of the system's Python, by the reader that docs/export.md shows."""
    system = shutil.which("python3", path="/usr/bin:/bin")
    reader = (ROOT / "docs" / "export.md").read_text().split("```python\n")[1].split("```")[0]
    image = np.random.default_rng(0).integers(0, 65536, (150, 171)).astype(np.uint16)
    np.save(scratch / "image.npy", image)
    wanted, rows = encoder.embed([image])[0], []
    for kind in ("torchvision", TORCHVISION_RGB):
        code = loading_code(encoder.spec, str(folder), kind).replace(
            "from safetensors.torch import load_file\n", reader
        )
        (scratch / "code.py").write_text(code)
        files = [str(scratch / name) for name in ("code.py", "image.npy", "features.npy")]
        done = subprocess.run([str(system), "-I", "-c", OLD, *files], capture_output=True, text=True, check=False)
        if done.returncode:
            return rows
        torch_version, torchvision_version = done.stdout.split()
        difference = float(np.abs(np.load(scratch / "features.npy") - wanted).max() / np.abs(wanted).max())
        rows.append((f"{kind}, old", f"torchvision {torchvision_version}, torch {torch_version}", difference))
    return rows


def rows_of(name: str, precision: str, scratch: Path) -> list[tuple[str, str, float]]:
    """Format, libraries and relative difference for each way to load an encoder."""
    encoder, folder = trained(SPECS[name]), scratch / name
    formats = [one for one in FORMATS if one != "torchvision" or encoder.spec.trunk.startswith("resnet")]
    report: dict[str, Any] = export(encoder, folder, {"name": name}, formats, precision)
    rows = [
        (row["format"], ", ".join(f"{k} {v}" for k, v in row["loaded_with"].items()), row["relative_difference"])
        for row in report["formats"]
    ]
    return rows + (old_stack(encoder, folder, scratch) if "torchvision" in formats else [])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    precision = parser.parse_args().precision
    print(f"| encoder | format | loaded with | largest difference, {precision} |\n|---|---|---|---|", flush=True)
    bad = [] if importlib.util.find_spec("transformers") else ["transformers is not installed"]
    with tempfile.TemporaryDirectory(prefix="nanodist-export-") as scratch:
        for name in SPECS:
            rows = rows_of(name, precision, Path(scratch))
            for kind, libraries, difference in rows:
                print(f"| {name} | {kind} | {libraries} | {difference:.1e} |", flush=True)
                if precision == "fp32" and not difference <= ALLOWED:
                    bad.append(f"{name} by {kind} differs by {difference:.1e}")
            if name.startswith("ResNet") and not any(kind.endswith("old") for kind, *_ in rows):
                bad.append("no old torchvision here (Debian 12: apt-get install python3-torchvision)")
    print("; ".join(bad), file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
