"""What :mod:`nanodist.views.on_cpu` does to pixels, compiled by numba for the processor at hand.

numba compiles :func:`make` anew when *this file* changes, and knows of no other: all that it calls, and every constant,
stands here. Loops are written so that LLVM turns them into vector instructions: an image is changed in place or written
to memory of its own (what may overlap is left scalar), sums of indices are slices (an index that could be negative is
checked), and integers are brought back to 32 bits after every operation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

# Nothing here is infinite or not a number. No "reassoc", "contract" or "arcp": LLVM could then sum and round otherwise
# in each compilation, and what numba reads from its cache is another one than what it has just made. So sums that are
# to become vectors are written as such, by columns.
_compiled = njit(nogil=True, error_model="numpy", fastmath={"nsz", "nnan", "ninf"})

# One view: ViewParameters, and where its crop lies. ``matrix`` leads from centres of its pixels to those of a window,
# rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of the tile's means over ``halved`` x ``halved`` pixels.
# ``inside`` says that nothing of the crop is mirrored.
RECORD = np.dtype(
    [
        ("matrix", "f8", (2, 3)),
        ("halved", "i8"),
        ("left", "i8"),
        ("top", "i8"),
        ("right", "i8"),
        ("bottom", "i8"),
        ("inside", "i8"),
        ("inverted", "f8"),
        ("brightness_factor", "f8"),
        ("contrast", "f8"),
        ("brightness", "f8"),
        ("gamma", "f8"),
        ("gradient", "f8", (2,)),
        ("blur_sigma_px", "f8"),
        ("solarized", "f8"),
        ("noise_std", "f8"),
        ("noise_key", "i8"),
        ("erased", "i8", (3,)),
    ]
)


@_compiled
def _load(tile: npt.NDArray[Any], record: Any, sums: Floats, window: Floats) -> None:
    """The window in counts; sums of whole numbers below 2^24, so that none is rounded."""
    times, columns = record.halved, window.shape[1]
    factor = np.float32(1.0 / (times * times))
    for y in range(window.shape[0]):
        sums[: columns * times] = np.float32(0)
        for part in range(times):
            source = tile[(record.top + y) * times + part, record.left * times : record.right * times]
            if times == 1:
                for x in range(columns):
                    window[y, x] = np.float32(source[x])
            else:
                for x in range(columns * times):
                    sums[x] += np.float32(source[x])
        if times > 1:
            for x in range(columns):
                total = np.float32(0)
                for part in range(times):
                    total += sums[x * times + part]
                window[y, x] = total * factor


@_compiled
def _neighbours(step: float, start: float, last: int, near: Ints, weight: Floats) -> None:
    """For places along an axis the first of two neighbours and the second's weight; mirrored at pixels 0 and last."""
    for j in range(len(near)):
        place = abs(step * j + start)
        place -= 2 * last * math.floor(place / (2 * last))
        place = last - abs(last - place)
        first = min(int(place), last - 1)
        near[j] = first
        weight[j] = place - first


@_compiled
def _upright(
    window: Floats, near: Ints, weight: Floats, y_near: Ints, y_weight: Floats, line: Floats, crop: Floats
) -> None:
    """Between two rows, then between two columns."""
    one = np.uint32(1)
    for i in range(crop.shape[0]):
        above, part = y_near[i], y_weight[i]
        below = above + 1
        for x in range(window.shape[1]):
            line[x] = window[above, x] + part * (window[below, x] - window[above, x])
        for j in range(crop.shape[1]):
            k = np.uint32(near[j])
            crop[i, j] = line[k] + weight[j] * (line[k + one] - line[k])


@_compiled
def _mirrored(place: Any, last: Any) -> Any:
    place = abs(place)
    period = np.float32(2) * last
    place -= period * np.floor(place / period)
    return min(place, period - place)


@_compiled
def _turned(
    window: Floats, matrix: npt.NDArray[np.float64], inside: int, near: Ints, weight: Floats, y_weight: Floats,
    crop: Floats,
) -> None:  # fmt: skip
    """Between four neighbours, row by row: first where they are, then what they hold."""
    wide, flat, below, one = np.int32(window.shape[1]), window.reshape(-1), np.uint32(window.shape[1]), np.uint32(1)
    far_x, far_y = np.float32(window.shape[1] - 1), np.float32(window.shape[0] - 1)
    last_x, last_y = np.int32(window.shape[1] - 2), np.int32(window.shape[0] - 2)
    x_step, y_step = np.float32(matrix[0, 0]), np.float32(matrix[1, 0])
    for i in range(crop.shape[0]):
        x_row, y_row = np.float32(matrix[0, 1] * i + matrix[0, 2]), np.float32(matrix[1, 1] * i + matrix[1, 2])
        for j in range(crop.shape[1]):
            number = np.float32(np.int32(j))
            x, y = x_step * number + x_row, y_step * number + y_row
            if not inside:
                x, y = _mirrored(x, far_x), _mirrored(y, far_y)
            x_near = min(max(np.int32(x), np.int32(0)), last_x)
            y_near = min(max(np.int32(y), np.int32(0)), last_y)
            weight[j] = x - np.float32(x_near)
            y_weight[j] = y - np.float32(y_near)
            near[j] = np.int32(np.int32(y_near * wide) + x_near)
        for j in range(crop.shape[1]):
            k = np.uint32(near[j])
            upper = flat[k] + weight[j] * (flat[k + one] - flat[k])
            lower = flat[k + below] + weight[j] * (flat[k + below + one] - flat[k + below])
            crop[i, j] = upper + y_weight[j] * (lower - upper)


@_compiled
def _mean(image: Floats, room: Floats) -> float:
    sums = room[: image.shape[1]]
    sums[:] = np.float32(0)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            sums[j] += image[i, j]
    total = 0.0
    for j in range(image.shape[1]):
        total += sums[j]
    return total / image.size


@_compiled
def _deviation(image: Floats, mean: float, room: Floats) -> float:
    sums, middle = room[: image.shape[1]], np.float32(mean)
    sums[:] = np.float32(0)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            sums[j] += (image[i, j] - middle) * (image[i, j] - middle)
    total = 0.0
    for j in range(image.shape[1]):
        total += sums[j]
    return math.sqrt(total / image.size)


@_compiled
def _scale(image: Floats, scale: Any, shift: Any) -> None:
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            image[i, j] = image[i, j] * scale + shift


@_compiled
def _bound(image: Floats, scale: Any, shift: Any, low: Any) -> None:
    """``image * scale + shift`` within ``low`` and 1."""
    high = np.float32(1)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            image[i, j] = min(max(image[i, j] * scale + shift, low), high)


@_compiled
def _bend(image: Floats, scale: Any, shift: Any, gamma: Any) -> None:
    """``image * scale + shift`` within 1e-6 and 1, to the power of ``gamma``."""
    low, high = np.float32(1e-6), np.float32(1)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            image[i, j] = _power(min(max(image[i, j] * scale + shift, low), high), gamma)


@_compiled
def _power(x: Any, exponent: Any) -> Any:
    """x^exponent by 2^(exponent * log2 x): polynomials of degree 6 and 5, off by at most 3e-7 and by 8e-8 of the power.

    Fitted for the least largest error, to the logarithm over 2^-0.5 to 2^0.5 and to 2^t over 0 to 1.
    """
    bits = np.float32(x).view(np.int32)
    whole = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    t = np.int32(bits - np.int32(whole << np.int32(23))).view(np.float32) - np.float32(1)
    p = np.float32(0.170658466)
    p = p * t + np.float32(-0.2726866)
    p = p * t + np.float32(0.297250457)
    p = p * t + np.float32(-0.358963203)
    p = p * t + np.float32(0.480466248)
    p = p * t + np.float32(-0.721375828)
    p = p * t + np.float32(1.4426997)
    y = max((p * t + np.float32(whole)) * exponent, np.float32(-125))
    floor = np.floor(y)
    t = y - floor
    p = np.float32(0.00187757667)
    p = p * t + np.float32(0.00898934013)
    p = p * t + np.float32(0.055826318)
    p = p * t + np.float32(0.240153617)
    p = p * t + np.float32(0.693153073)
    p = p * t + np.float32(0.999999925)
    return p * np.int32(np.int32(np.int32(floor) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled
def _slope(image: Floats, right: float, down: float) -> None:
    """Add a plane that rises by ``right`` and ``down`` from the middle to the edges."""
    last = len(image) - 1
    rise = np.float32(2 * right / last)
    for i in range(image.shape[0]):
        start = np.float32(down * (2 * i / last - 1) - right)
        for j in range(image.shape[1]):
            image[i, j] += rise * np.float32(np.int32(j)) + start


@_compiled
def _grey(record: Any, scale: float, shift: float, mean: float, image: Floats) -> None:
    """Brightness, contrast, gamma and the plane of the background, of ``image * scale + shift``; ``mean``: of image."""
    scale, shift = scale * record.brightness_factor, shift * record.brightness_factor
    shift = shift * record.contrast + (mean * scale + shift) * (1 - record.contrast) + record.brightness
    scale = scale * record.contrast
    if record.gamma == 1:
        _bound(image, np.float32(scale), np.float32(shift), np.float32(1e-6))
    else:
        _bend(image, np.float32(scale), np.float32(shift), np.float32(record.gamma))
    if record.gradient[0] or record.gradient[1]:
        _slope(image, record.gradient[0], record.gradient[1])


@_compiled
def _weights(sigma: float, weights: Floats) -> int:
    """Weights of the window's middle and of the pairs beside it; returns how many pairs a float32 takes note of."""
    total = 1.0
    for k in range(1, len(weights)):
        total += 2 * math.exp(-0.5 * (k / sigma) ** 2)
    pairs = 0
    for k in range(len(weights)):
        weight = math.exp(-0.5 * (k / sigma) ** 2)
        if weight > 1e-9:
            pairs = k
        # Numbers below float32's normal range would slow every product down.
        weights[k] = weight / total if weight > 1e-9 else 0.0
    return pairs


@_compiled
def _blur(image: Floats, weights: Floats, pairs: int, room: Floats, out: Floats) -> None:
    """Down, then across, two pairs of neighbours at a time; ``weights`` holds a 0 more than pairs may count.

    The image is mirrored at its edges, which are not doubled. ``room`` holds a row, and what lies beyond its ends.
    """
    size, last, edge = image.shape[0], 2 * (image.shape[0] - 1), len(weights)
    line = room[edge : edge + size]
    for i in range(size):
        for j in range(size):
            line[j] = image[i, j] * weights[0]
        for k in range(1, pairs + 1, 2):
            up, down, weight = abs(i - k), min(i + k, last - i - k), weights[k]
            far_up, far_down, far = abs(i - k - 1), min(i + k + 1, last - i - k - 1), weights[k + 1]
            for j in range(size):
                line[j] += (image[up, j] + image[down, j]) * weight + (image[far_up, j] + image[far_down, j]) * far
        for k in range(1, pairs + 2):
            room[edge - k] = line[k]
            room[edge + size - 1 + k] = line[size - 1 - k]
        for j in range(size):
            out[i, j] = line[j] * weights[0]
        for k in range(1, pairs + 1, 2):
            left, right, weight = room[edge - k :], room[edge + k :], weights[k]
            far_left, far_right, far = room[edge - k - 1 :], room[edge + k + 1 :], weights[k + 1]
            for j in range(size):
                out[i, j] += (left[j] + right[j]) * weight + (far_left[j] + far_right[j]) * far


@_compiled
def _hashed(x: Any) -> Any:
    """The hash of :mod:`nanodist.views.noise`, of uint32."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_compiled
def _noise(record: Any, share: float, image: Floats) -> None:
    """Add what :func:`nanodist.views.noise.unit_noise` draws, with the variance of ``record`` and ``share``."""
    key = _hashed(np.uint32(record.noise_key))
    scale, grows, stays = np.float32(record.noise_std * math.sqrt(3 / 65535)), np.float32(share), np.float32(1 - share)
    halves = np.uint32(0x00FF00FF)
    for i in range(image.shape[0]):
        first = np.uint32(i * image.shape[1] + 0x9E3779B9)
        for j in range(image.shape[1]):
            word = _hashed(np.uint32(_hashed(np.uint32(np.uint32(j) + first)) ^ key))
            pairs = np.uint32(((word >> np.uint32(8)) & halves) + (word & halves))
            total = np.int32((pairs + (pairs >> np.uint32(16))) & np.uint32(0x7FF))
            spread = np.sqrt(grows * max(image[i, j], np.float32(0)) + stays)
            image[i, j] += scale * np.float32(np.int32(total - np.int32(510))) * spread


@_compiled
def _solarize(image: Floats) -> None:
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            image[i, j] -= max(image[i, j] + image[i, j] - np.float32(1), np.float32(0))


@_compiled
def _crop(
    record: Any, window: Floats, near: Ints, weight: Floats, y_near: Ints, y_weight: Floats, line: Floats, crop: Floats
) -> None:
    matrix = record.matrix
    if matrix[0, 1] == 0 and matrix[1, 0] == 0:
        _neighbours(matrix[0, 0], matrix[0, 2], window.shape[1] - 1, near, weight)
        _neighbours(matrix[1, 1], matrix[1, 2], window.shape[0] - 1, y_near, y_weight)
        _upright(window, near, weight, y_near, y_weight, line, crop)
    else:
        _turned(window, matrix, record.inside, near, weight, y_weight, crop)


@_compiled
def _grade(
    record: Any, scale: float, exposed: bool, linear: bool, share: float, first: Floats, weights: Floats, room: Floats,
    view: Floats,
) -> None:  # fmt: skip
    """All that follows the crop, of which counts times ``scale`` are grey values; it lies in ``first``.

    That is ``view`` where nothing is blurred, as the blur alone does not work in place.
    """
    shift, mean = 0.0, _mean(first, room)
    if exposed:
        scale = scale / (6 * (_deviation(first, mean, room) * scale + 1e-3))
        shift = 0.5 - mean * scale
    if record.inverted:
        scale, shift = -scale, 1 - shift
    if linear:
        _scale(first, np.float32(scale), np.float32(shift))
    else:
        _grey(record, scale, shift, mean, first)
    if record.blur_sigma_px > 0:
        _blur(first, weights, _weights(record.blur_sigma_px, weights[:-1]), room, view)
    if linear:
        if record.noise_std:
            _noise(record, share, view)
        _grey(record, 1.0, 0.0, _mean(view, room), view)
    if record.solarized:
        _solarize(view)
    if record.noise_std and not linear:
        _noise(record, share, view)
    top, left, side = record.erased[0], record.erased[1], record.erased[2]
    if side:
        view[top : top + side, left : left + side] = np.float32(_mean(view, room))
    _bound(view, np.float32(1), np.float32(0), np.float32(0))


def make(
    narrow: npt.NDArray[np.uint8], wide: npt.NDArray[np.uint16], records: npt.NDArray[np.void], area: int, width: int,
    reach: int, exposed: bool, linear: bool, share: float, views: Floats,
) -> None:  # fmt: skip
    """Write the views (n, size, size) of tiles (n, height, width), one after the other in the same memory.

    Args:
        narrow: tiles of 8 bits, or none where they are ``wide``.
        wide: tiles of 16 bits, or none.
        records: (n,) of :data:`RECORD`.
        area: pixels of the largest window.
        width: of the widest one, in pixels of the tile.
        reach: half the width of every blur's window, without its middle.
        exposed: each view is brought to one mean and deviation.
        linear: blur and noise come before contrast, brightness and gamma.
        share: of the noise variance that grows with intensity.
        views: float32, in [0, 1] when this returns.
    """
    size, scale = views.shape[-1], 1 / 255.0 if len(narrow) else 1 / 65535.0
    space, sums, line = np.empty(area, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    crop = np.empty((size, size), np.float32)
    near, y_near = np.empty(size, np.int32), np.empty(size, np.int32)
    weight, y_weight = np.empty(size, np.float32), np.empty(size, np.float32)
    weights, room = np.zeros(reach + 2, np.float32), np.empty(size + 2 * (reach + 2), np.float32)
    for n in range(len(views)):
        record, view = records[n], views[n]
        rows, columns = record.bottom - record.top, record.right - record.left
        window = space[: rows * columns].reshape(rows, columns)
        if len(narrow):
            _load(narrow[n], record, sums, window)
        else:
            _load(wide[n], record, sums, window)
        first = crop if record.blur_sigma_px > 0 else view
        _crop(record, window, near, weight, y_near, y_weight, line, first)
        _grade(record, scale, exposed, linear, share, first, weights, room, view)
