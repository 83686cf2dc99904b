"""The shadow of a beam stop and of the arm that holds it, where no mask file marks them."""

from __future__ import annotations

import math

import numpy as np

from nanodist.scattering.frame import Frame

# The shadow lets through less than this share of what is around it.
_DARK = 0.4
_DIFFERENCE = 6.0
_WINDOW = 5
_EDGE_PX = 2
_LEAST_ARM = 40
# The shadow of the stop ends within this share of the frame's diagonal; further out, the crest may be a ring.
_LARGEST_SHARE = 0.06
_FIRST_SHARE = 0.25
_RISE_PX = 10


def beam_stop(frame: Frame) -> np.ndarray:
    """Where the beam stop shades the detector, bool (H, W), two pixels wider than is seen.

    The stop is the dark region around the beam, inside the last sharp rise of the profile. Its arm is what hangs
    together with it and has less than 0.4 of the intensity on the opposite side of the beam (I(q) = I(-q) in
    transmission), by more than 6 standard errors of 5 x 5 pixels. A straight arm goes on to the edge of the frame, also
    where the opposite side was not measured. False everywhere where no stop is seen, or the beam lies outside.

    Raises:
        UserError: the frame has no q, or is all masked.
    """
    from scipy.ndimage import binary_dilation, label

    frame.require_measured()
    q_y, q_x = frame.q()
    row, column = np.unravel_index(int(np.hypot(q_y, q_x).argmin()), frame.shape)
    beam = (int(row), int(column))
    nothing = np.zeros(frame.shape, dtype=bool)
    if not (0 < row < frame.shape[0] - 1 and 0 < column < frame.shape[1] - 1):
        return nothing
    mean, noise = _smooth(frame)
    disc = _disc(frame, mean, beam)
    if not disc.any():
        return nothing
    opposite, known = _mirrored(mean, beam), _mirrored(frame.mask, beam)
    spread = np.hypot(noise, _mirrored(noise, beam))
    dark = frame.mask & known & (mean < _DARK * opposite) & (opposite - mean > _DIFFERENCE * spread)
    patches, _ = label(disc | dark)
    arm = dark & np.isin(patches, np.unique(patches[disc])) & ~binary_dilation(disc, iterations=_EDGE_PX)
    shadow = disc | arm | _strip(arm, beam)
    return np.asarray(binary_dilation(shadow, iterations=_EDGE_PX)) & frame.mask


def _strip(arm: np.ndarray, beam: tuple[int, int]) -> np.ndarray:
    """A straight arm from the beam to the edge of the frame, as wide as it was found; nothing for one that is not."""
    rows, columns = np.nonzero(arm)
    if len(rows) < _LEAST_ARM:
        return np.zeros_like(arm)
    down, right = rows - beam[0], columns - beam[1]
    direction = np.array([down.sum(), right.sum()]) / math.hypot(down.sum(), right.sum())
    width = float(np.quantile(np.abs(down * direction[1] - right * direction[0]), 0.95))
    length = float(np.quantile(down * direction[0] + right * direction[1], 0.95))
    if length < 3 * width:
        return np.zeros_like(arm)
    down, right = np.ogrid[: arm.shape[0], : arm.shape[1]]
    down, right = down - beam[0], right - beam[1]
    along, aside = down * direction[0] + right * direction[1], down * direction[1] - right * direction[0]
    return np.asarray((along > 0) & (np.abs(aside) <= width))


def _smooth(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Means over 5 x 5 measured pixels, and their standard errors."""
    from scipy.ndimage import uniform_filter

    values = np.where(frame.mask, frame.intensity, 0).astype(np.float64)
    share = np.maximum(uniform_filter(frame.mask.astype(np.float64), _WINDOW, mode="constant"), 1e-9)
    mean = uniform_filter(values, _WINDOW, mode="constant") / share
    squares = values if frame.kind == "counts" else _variance(frame)
    variance = uniform_filter(squares, _WINDOW, mode="constant") / share
    # A window that counted nothing is uncertain by one count.
    least = 1.0 / _WINDOW**2 if frame.kind == "counts" else 0.0
    return mean, np.sqrt(np.maximum(variance, least) / (np.minimum(share, 1) * _WINDOW**2))


def _variance(frame: Frame) -> np.ndarray:
    from nanodist.scattering.noise import estimated_sigma

    sigma = estimated_sigma(frame.intensity, frame.mask) if frame.sigma is None else frame.sigma
    return np.asarray(sigma, np.float64) ** 2


def _disc(frame: Frame, mean: np.ndarray, beam: tuple[int, int]) -> np.ndarray:
    """The dark region that holds the beam; nothing where the profile does not fall towards the beam."""
    from scipy.ndimage import binary_fill_holes, label

    rows, columns = np.indices(frame.shape, sparse=True)
    radius = np.hypot(rows - beam[0], columns - beam[1])
    ring = np.floor(radius).astype(np.int64)
    largest = math.ceil(_LARGEST_SHARE * math.hypot(*frame.shape))
    near = frame.mask & (ring < largest)
    pixels = np.bincount(ring[near], minlength=largest)
    profile = np.bincount(ring[near], mean[near], largest) / np.maximum(pixels, 1)
    # The outermost sharp rise: what shines through a stop may be brighter than what scatters around it.
    high = _FIRST_SHARE * profile.max()
    rises = [
        place
        for place in range(2, largest - 3)
        if profile[place] >= max(high, profile[place + 1 : place + 4].max())
        and profile[max(0, place - _RISE_PX) : place].min() < _DARK * profile[place]
    ]
    if not rises:
        return np.zeros(frame.shape, dtype=bool)
    inside = radius <= rises[-1]
    dark = inside & ((mean < _DARK * profile[rises[-1]]) | ~frame.mask)
    filled = np.asarray(binary_fill_holes(dark))
    patches, _ = label(filled)
    return filled & (patches == patches[beam]) & bool(patches[beam])


def _mirrored(plane: np.ndarray, beam: tuple[int, int]) -> np.ndarray:
    """The plane turned by half a turn about the beam; zero (False) where that lies outside."""
    turned = np.zeros_like(plane)
    spans = []
    for centre, side in zip(beam, plane.shape, strict=True):
        # Places p with 2 centre - p inside as well.
        low, high = max(0, 2 * centre - side + 1), min(side, 2 * centre + 1)
        spans.append((low, high, 2 * centre))
    (low, high, twice), (left, right, double) = spans
    if high > low and right > left:
        source = plane[twice - high + 1 : twice - low + 1, double - right + 1 : double - left + 1]
        turned[low:high, left:right] = source[::-1, ::-1]
    return turned
