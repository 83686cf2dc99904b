"""Python that loads each kind of export without nanodist: what the model card shows is what the check runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanodist.encoders import EncoderSpec

# In the order in which a card shows them.
TITLES = {
    "timm": "timm",
    "huggingface": "Hugging Face transformers",
    "torchvision": "torchvision",
    "onnx": "ONNX Runtime",
    "torch-export": "torch.export",
}
FORMATS = tuple(TITLES)
# torchvision's unchanged three-channel model: written and checked with "torchvision", told in its note.
TORCHVISION_RGB = "torchvision-rgb"

_LOOKS = """
def resized(x, scale):
    while scale <= 0.5:
        x, scale = torch.nn.functional.avg_pool2d(x, 2), 2 * scale
    if abs(scale - 1) < 1e-6:
        return x
    how = dict(mode="bilinear", antialias=True, align_corners=False, recompute_scale_factor=True)
    return torch.nn.functional.interpolate(x, scale_factor=scale, **how)


def pooled(x):
{pool}


@torch.inference_mode()
def embed(pixels):  # a grey image: array (H, W) of uint8 or uint16
    whole = torch.from_numpy(pixels.astype("float32") / np.iinfo(pixels.dtype).max)[None, None]
    joined = []
    for scale, crop_px, symmetries in [{looks}]:
        side = crop_px or max(whole.shape)
        top, left = (max(0, (n - side) // 2) for n in whole.shape[-2:])
        x = resized(whole[..., top : top + side, left : left + side], scale)
        {normalise}
        turns = [(x, k) for k in range(4)] + [(x.flip(-1), k) for k in range(4)]
        features = [pooled(torch.rot90(y, k, (-2, -1))) for y, k in turns[:symmetries]]
        joined.append(torch.stack(features).mean(0))
    return torch.cat(joined)
"""

_TIMM = """import numpy as np
import timm
import torch

model = timm.create_model("local-dir:{location}", pretrained=True).eval()

"""

_HUGGINGFACE = """import numpy as np
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{location}").eval(){single}.timm_model

"""

_TORCHVISION = """import numpy as np
import torch
import torchvision
from safetensors.torch import load_file

model = torchvision.models.{architecture}()
{grey}model.fc = torch.nn.Identity()
model.load_state_dict(load_file("{location}/torchvision/{file}"))
model.eval()

"""
_GREY = "model.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)\n"

_ONNX = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{location}/onnx/model.onnx", providers=["CPUExecutionProvider"])


def embed(pixels):  # a grey image: array (H, W) of uint8 or uint16
    images = pixels.astype("float32")[None, None] / np.float32(np.iinfo(pixels.dtype).max)
    return session.run(None, {{"images": images}})[0][0]
"""

_TORCH_EXPORT = """import numpy as np
import torch

model = torch.export.load("{location}/torch-export/model.pt2").module()


@torch.inference_mode()
def embed(pixels):  # a grey image: array (H, W) of uint8 or uint16
    images = pixels.astype("float32")[None, None] / np.float32(np.iinfo(pixels.dtype).max)
    return model(torch.from_numpy(images))[0]
"""


def loading_code(spec: EncoderSpec, location: str, kind: str, precision: str = "fp32") -> str:
    """Python that defines ``embed(pixels)``, which gives the features of one image exactly as nanodist does.

    Args:
        spec: how the encoder reads an image.
        location: folder of the export, as it stands between double quotes.
        kind: one of :data:`FORMATS`, or :data:`TORCHVISION_RGB`.
        precision: of the weights in the folder; transformers keeps them in it, which few CPUs compute well in.
    """
    if kind == "onnx":
        return _ONNX.format(location=location)
    if kind == "torch-export":
        return _TORCH_EXPORT.format(location=location)
    if kind.startswith("torchvision"):
        rgb = kind == TORCHVISION_RGB
        head = _TORCHVISION.format(
            architecture=architecture(spec),
            grey="" if rgb else _GREY,
            location=location,
            file="model_rgb.safetensors" if rgb else "model.safetensors",
        )
        pool = ["x = x.expand(-1, 3, -1, -1)"] * rgb + _pool_of_torchvision(spec)
    else:
        head = (_HUGGINGFACE if kind == "huggingface" else _TIMM).format(
            location=location, single="" if precision == "fp32" else ".float()"
        )
        pool = _pool_of_timm(spec)
    return head + _LOOKS.format(
        pool="\n".join(f"    {line}" for line in pool),
        looks=", ".join(str(tuple(look)) for look in spec.looks),
        normalise=_normalise(spec),
    )


def architecture(spec: EncoderSpec) -> str:
    """Name of the trunk without the tag of its weights: ``resnet18.a1_in1k`` -> ``resnet18``."""
    return spec.trunk.split(".")[0]


def _normalise(spec: EncoderSpec) -> str:
    if spec.normalise == "store":
        return f"x = (x - {spec.mean!r}) / {spec.std!r}"
    return "x = (x - x.mean()) / (x.std(unbiased=False) + 1e-3)"


def _pool_of_timm(spec: EncoderSpec) -> list[str]:
    if spec.pooling == "last":
        return ["return model(x)[0]"]
    chosen = "[-2:]" if spec.pooling == "last_two" else ""
    return [
        f"stages = model.forward_intermediates(x, norm=True, intermediates_only=True){chosen}",
        "return torch.cat([stage.mean((-2, -1)) for stage in stages], dim=1)[0]",
    ]


def _pool_of_torchvision(spec: EncoderSpec) -> list[str]:
    if spec.pooling == "last":
        return ["return model(x)[0]"]
    chosen = "[-2:]" if spec.pooling == "last_two" else ""
    return [
        "stages = [model.relu(model.bn1(model.conv1(x)))]",
        "x = model.maxpool(stages[0])",
        "for layer in (model.layer1, model.layer2, model.layer3, model.layer4):",
        "    x = layer(x)",
        "    stages.append(x)",
        f"return torch.cat([stage.mean((-2, -1)) for stage in stages{chosen}], dim=1)[0]",
    ]
