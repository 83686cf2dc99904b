"""One synthetic micrograph: conditions that do not depend on its class, image, instance masks and truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import UserError
from hpc.seeding import generator, uniforms
from hpc.seeding import key as seed_key
from nanodist.synth import detector, optics, specimen
from nanodist.synth.geometry import Frame, Projection, Wire, layer, project, spans
from nanodist.synth.wires import MORPHOLOGIES, Infeasible, layout

SMALLEST_PX, LARGEST_PX = 96, 8192
HAADF_EXPONENT = 1.7
REDRAWS = 50


@dataclass(frozen=True)
class Settings:
    """What all micrographs of a data set share.

    Args:
        size_px: side of the square image; wires are drawn in proportion to the field.
        pixel_size_nm: side of a pixel.
        dose_e_nm2: electrons on each nm^2; ``None`` draws 40 to 1500 electrons a pixel for each micrograph.
        haadf_share: share of micrographs taken as HAADF-STEM instead of bright-field TEM.
    """

    size_px: int = 256
    pixel_size_nm: float = 1.0
    dose_e_nm2: float | None = None
    haadf_share: float = 0.0

    def __post_init__(self) -> None:
        if not SMALLEST_PX <= self.size_px <= LARGEST_PX:
            raise UserError(f"size must be {SMALLEST_PX} to {LARGEST_PX} pixels, not {self.size_px}")
        if not 1e-3 <= self.pixel_size_nm <= 1e3:
            raise UserError(f"pixel size must be 0.001 to 1000 nm, not {self.pixel_size_nm}")
        if self.dose_e_nm2 is not None and not 0 < self.dose_e_nm2 * self.pixel_size_nm**2 <= 1e9:
            raise UserError(f"dose must give above 0 and at most 1e9 electrons a pixel, not {self.dose_e_nm2} e/nm^2")
        if not 0.0 <= self.haadf_share <= 1.0:
            raise UserError(f"HAADF share must be 0 to 1, not {self.haadf_share}")

    def frame(self) -> Frame:
        """The frame to compute on: a margin of 20 pixels or more that makes the FFT's length 2^a 3^b 5^c."""
        margin = max(20, self.size_px // 32)
        while not _smooth(self.size_px + 2 * margin) and margin < self.size_px:
            margin += 1
        return Frame(self.size_px, self.pixel_size_nm, margin)


@dataclass(frozen=True)
class Micrograph:
    """An image (size, size) uint16, one mask a wire (n, size, size) bool, and the truth as JSON-able values."""

    image: npt.NDArray[np.uint16]
    instances: npt.NDArray[np.bool_]
    truth: dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """How one micrograph was taken; ``collected`` is the share of the beam that reaches the detector.

    A wire ``haadf_unit_nm`` thick scatters that share onto the HAADF detector.
    """

    modality: str
    material: specimen.Material
    film: specimen.Film
    film_nm: float
    haadf_unit_nm: float
    lens: optics.Lens
    probe_nm: float
    illumination_drop: float
    illumination_centre: list[float]
    collected: float
    camera: detector.Camera


def _smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1


def _material(rng: np.random.Generator, width_nm: float) -> specimen.Material:
    """Optical depth and extinction distance in units of the wire width, so that thick wires are not darker."""
    depth, extinction, crystal = rng.uniform(0.15, 1.2), rng.uniform(0.5, 2.5), rng.random() < 0.6
    twin = rng.uniform(0.15, 1.0) if rng.random() < 0.4 else 0.0
    return specimen.Material(
        mean_free_path_nm=width_nm / depth,
        inner_potential_v=rng.uniform(5.0, 20.0),
        extinction_nm=extinction * width_nm if crystal else 0.0,
        diffraction=rng.uniform(0.2, 0.8),
        twin_spacing_nm=twin * width_nm,
        atomic_number=rng.uniform(8.0, 50.0),
    )


def _lens(rng: np.random.Generator, pixel_nm: float) -> optics.Lens:
    """Defocus such that the first Fresnel fringe, sqrt(lambda * defocus), is 0.5 to 3 pixels wide."""
    voltage = float(rng.choice([80.0, 120.0, 200.0, 300.0]))
    fringe = rng.uniform(0.5, 3.0) * pixel_nm
    sign = 1.0 if rng.random() < 0.85 else -1.0
    return optics.Lens(
        voltage_kv=voltage,
        cs_mm=rng.uniform(0.5, 2.7),
        defocus_nm=sign * fringe**2 / optics.wavelength_nm(voltage),
        focal_spread_nm=rng.uniform(4.0, 12.0),
        # The blur at the fringe scale is semi-angle * defocus, kept below about a fringe.
        semi_angle_mrad=1e3 * rng.uniform(0.05, 0.5) * optics.wavelength_nm(voltage) / fringe,
    )


def conditions(rng: np.random.Generator, haadf: bool, width_nm: float, settings: Settings) -> Conditions:
    """Conditions drawn alike for every class; ``width_nm`` is the mean wire width of the micrograph."""
    per_pixel = float(np.exp(rng.uniform(np.log(40.0), np.log(1500.0))))
    area = settings.pixel_size_nm**2
    dose = settings.dose_e_nm2 if settings.dose_e_nm2 is not None else per_pixel / area
    level = float(np.exp(rng.uniform(np.log(8000.0), np.log(36000.0))))
    collected = float(np.exp(rng.uniform(np.log(0.03), np.log(0.2)))) if haadf else 1.0
    gain = level / (dose * area * collected)
    black = rng.uniform(0.0, 0.3) * level if haadf else rng.uniform(100.0, 600.0)
    return Conditions(
        modality="haadf" if haadf else "bright_field",
        material=_material(rng, width_nm),
        film=specimen.Film(rng.uniform(0.05, 0.3), rng.uniform(0.0, 0.8), rng.uniform(0.02, 0.14)),
        film_nm=width_nm * rng.uniform(0.2, 1.0),
        haadf_unit_nm=2.0 * width_nm,
        lens=_lens(rng, settings.pixel_size_nm),
        probe_nm=rng.uniform(0.8, 2.5) * settings.pixel_size_nm,
        illumination_drop=rng.uniform(0.0, 0.3),
        illumination_centre=rng.uniform(-0.2, 1.2, 2).tolist(),
        collected=collected,
        camera=detector.Camera(dose, rng.uniform(0.4, 1.5), gain, black, rng.uniform(0.3, 3.0) * gain),
    )


def illumination(frame: Frame, made: Conditions) -> npt.NDArray[np.float64]:
    """A round beam: 1 at its centre, lower by ``illumination_drop`` one field away."""
    axis = (np.arange(frame.padded_px) - frame.margin_px + 0.5) / frame.size_px
    x, y = axis[None, :] - made.illumination_centre[0], axis[:, None] - made.illumination_centre[1]
    return np.exp(np.log1p(-made.illumination_drop) * (x**2 + y**2))


def render(
    wires: Sequence[Wire],
    seen: Sequence[Projection],
    debris: Sequence[Projection],
    made: Conditions,
    frame: Frame,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint16]:
    """The image (size, size) of projected wires, and of specks of debris, under these conditions."""
    thickness = specimen.projected_thickness([*seen, *debris], frame)
    if made.modality == "haadf":
        raw = specimen.haadf(thickness, made.material, made.film, made.film_nm, HAADF_EXPONENT, rng)
        unit = made.haadf_unit_nm * (made.material.atomic_number / 6.0) ** HAADF_EXPONENT
        raw = optics.probe_blur(raw / unit, made.probe_nm, frame.pixel_size_nm)
    else:
        diffraction = specimen.diffraction_map(wires, seen, made.material, frame, rng)
        wave = specimen.exit_wave(thickness, diffraction, made.material, made.film, made.lens.voltage_kv, rng)
        raw = optics.image(wave, made.lens, frame.pixel_size_nm)
    lit = np.maximum(raw, 0.0) * illumination(frame, made) * made.collected
    counts = made.camera.counts(lit, frame.pixel_size_nm, rng)
    return detector.to_uint16(counts[frame.inner])


def _wires(seed: int, morphology: str, index: int, frame: Frame) -> tuple[list[Wire], list[Projection]]:
    """Wires that are seen in the field, and their projections; a network that does not percolate is drawn again."""
    for attempt in range(REDRAWS):
        try:
            wires = layout(generator(seed, "synth", morphology, index, "layout", attempt), morphology, frame)
        except Infeasible:
            continue
        pairs = [(w, p) for w in wires if (p := project(w, frame)) is not None and layer(p, frame).any()]
        union = np.any([layer(p, frame) for _, p in pairs], axis=0)
        wrong = len(pairs) < 2 if morphology != "singular" else len(pairs) != 1
        if not wrong and (morphology != "network" or all(spans(union))):
            return [w for w, _ in pairs], [p for _, p in pairs]
    raise RuntimeError(f"no {morphology} layout in {REDRAWS} draws for seed {seed}, index {index}")


def _debris(rng: np.random.Generator, frame: Frame) -> list[Projection]:
    """Round specks of dirt, alike in every class: balls (wires without length) that no mask holds."""
    specks = []
    for _ in range(int(rng.poisson(rng.uniform(0.0, 8.0)))):
        centre = rng.uniform(0.0, 1.0, 2) * frame.field_nm
        specks.append(Wire(np.stack([centre, centre]), rng.uniform(0.005, 0.018) * frame.field_nm))
    return [seen for speck in specks if (seen := project(speck, frame)) is not None]


def _truth(wires: Sequence[Wire], instances: npt.NDArray[np.bool_], frame: Frame) -> dict[str, Any]:
    union, depth = np.asarray(instances.any(axis=0)), instances.sum(axis=0)
    across, down = spans(union)
    rows = [
        {
            "wire": number,
            "width_nm": 2 * wire.radius_nm,
            "contour_length_nm": wire.contour_length_nm,
            "visible_length_nm": wire.visible_length_nm(frame.field_nm),
            "end_to_end_nm": wire.end_to_end_nm,
            "orientation_deg": wire.orientation_deg,
            "border_cut": wire.is_cut(frame.field_nm),
            "area_nm2": float(mask.sum()) * frame.pixel_size_nm**2,
            "centre_line_nm": np.round(wire.points, 4).tolist(),
        }
        for number, (wire, mask) in enumerate(zip(wires, instances, strict=True))
    ]
    return {
        "coverage": float(union.mean()),
        "crossing_share": float((depth > 1).sum() / max(1, union.sum())),
        "spans_left_right": across,
        "spans_top_bottom": down,
        "wires": rows,
    }


def make(seed: int, morphology: str, index: int, settings: Settings) -> Micrograph:
    """Micrograph ``index`` of a class: a pure function of the arguments, whatever was made before or elsewhere.

    Raises:
        UserError: ``morphology`` is none of :data:`~nanodist.synth.wires.MORPHOLOGIES`.
    """
    if morphology not in MORPHOLOGIES:
        raise UserError(f"no morphology {morphology!r}; there are {', '.join(MORPHOLOGIES)}")
    frame = settings.frame()
    wires, seen = _wires(seed, morphology, index, frame)
    haadf = bool(uniforms([seed_key(seed, "synth", morphology, index, "modality")], 1)[0, 0] < settings.haadf_share)
    width = 2 * float(np.mean([wire.radius_nm for wire in wires]))
    made = conditions(generator(seed, "synth", morphology, index, "conditions"), haadf, width, settings)
    debris = _debris(generator(seed, "synth", morphology, index, "debris"), frame)
    image = render(wires, seen, debris, made, frame, generator(seed, "synth", morphology, index, "noise"))
    instances = np.stack([layer(projection, frame) for projection in seen])
    truth = {
        "schema": 1,
        "morphology": morphology,
        "seed": seed,
        "index": index,
        "size_px": settings.size_px,
        "pixel_size_nm": settings.pixel_size_nm,
        **_truth(wires, instances, frame),
        "debris": len(debris),
        "conditions": asdict(made),
    }
    return Micrograph(image, instances, truth)
