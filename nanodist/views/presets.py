"""Named sets of values for the section ``views``: ``views: {preset: tem, size_px: 96}``; what is given wins."""

from __future__ import annotations

from typing import Any

_NOTHING: dict[str, Any] = {
    "rotation": "none",
    "flip": True,
    "contrast": 0.0,
    "brightness": 0.0,
    "gamma": 0.0,
    "blur_probability": 0.0,
    "noise_probability": 0.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Chen et al. 2020, appendix A, colour distortion of strength 1. One grey channel: hue, saturation and the drop of
    # colour change nothing and are left out; clipped once, after brightness and contrast.
    "simclr": {
        **_NOTHING,
        "size_px": 224,
        "crop_share": [0.08**0.5, 1.0],
        "crop_law": "area",
        "aspect": [0.75, 4 / 3],
        "intensity_probability": 0.8,
        "brightness_factor": 0.8,
        "contrast": 0.8,
        "blur_probability": 0.5,
        "blur_sigma_px": [0.1, 2.0],
    },
    # Zbontar et al. 2021, section 2.2 (those of BYOL): the first view is always blurred, the second sometimes
    # solarized. Bilinear where they resize bicubically; hue, saturation and the drop of colour as above.
    "barlow": {
        **_NOTHING,
        "size_px": 224,
        "crop_share": [0.08**0.5, 1.0],
        "crop_law": "area",
        "aspect": [0.75, 4 / 3],
        "intensity_probability": 0.8,
        "brightness_factor": 0.4,
        "contrast": 0.4,
        "blur_probability": 1.0,
        "blur_probability_second": 0.1,
        "blur_sigma_px": [0.1, 2.0],
        "solarize_probability_second": 0.2,
    },
    # Lu, Montz, Emrick, Jayaraman 2022 (10.1039/D2DD00066K): reflection, a square crop of 25 to 50 % of the side, and
    # with probability 0.8 contrast +-0.8 (saturation and hue change no grey). Their notebook draws once a batch
    # (drawn_for: batch); here each view has its own draw, as the text says. They found SimCLR better without the crop.
    "lu2022": {
        **_NOTHING,
        "size_px": 224,
        "crop_share": [0.25, 0.5],
        "crop_law": "side",
        "intensity_probability": 0.8,
        "contrast": 0.8,
    },
    # What a microscope varies: orientation, exposure, background, focus, dose. Not the shape (no aspect jitter makes
    # spheres into rods) and little of the size, which often is the label.
    "tem": {
        "size_px": 224,
        "crop_share": [0.8, 1.0],
        "crop_law": "log",
        "rotation": "free",
        "flip": True,
        "exposure": "image",
        "contrast": 0.0,
        "brightness": 0.0,
        "gamma": 0.65,
        "intensity_probability": 1.0,
        "background_gradient": 0.083,
        "blur_probability": 0.5,
        "blur_sigma_px": [0.3, 2.0],
        "noise_stage": "linear",
        "noise_probability": 0.8,
        "noise_std": [0.0, 0.15],
        "noise_signal_share": 0.5,
        "erase_probability": 0.3,
    },
}
