"""Whether a pattern can be one in transmission: there I(q) = I(-q) (Friedel), at grazing incidence it is not."""

from __future__ import annotations

import numpy as np

from nanodist.scattering.pattern import Pattern

_WINDOW = 7
# A window is compared where its intensity stands out of its noise by so much.
_SIGNIFICANT = 10.0
# The median over windows of the larger over the smaller of I(q) and I(-q) from which a pattern is refused.
LARGEST_RATIO = 2.0
_LEAST_PIXELS = 1000


def friedel_ratio(pattern: Pattern) -> float | None:
    """The median over windows of 7 x 7 pixels of the larger over the smaller of I(q) and I(-q).

    1 for a pattern in transmission with its beam at the centre, up to noise; the shadow of the sample below the horizon
    makes it large at grazing incidence, and so does a beam centre that is off. None where less than 1000 pixels have
    their opposite measured and stand out of their noise.
    """
    from scipy.ndimage import uniform_filter

    both = pattern.mask & pattern.mask[::-1, ::-1]
    values = np.where(both, pattern.intensity, 0).astype(np.float64)
    if pattern.kind == "counts":
        variance = values
    elif pattern.sigma is not None:
        variance = np.where(both, pattern.sigma, 0).astype(np.float64) ** 2
    else:
        return None
    area = _WINDOW**2
    mean = uniform_filter(values, _WINDOW, mode="constant")
    noise = np.sqrt(np.maximum(uniform_filter(variance, _WINDOW, mode="constant"), 0) / area)
    opposite, noise = mean[::-1, ::-1], np.maximum(noise, noise[::-1, ::-1])
    high, low = np.maximum(mean, opposite), np.minimum(mean, opposite)
    chosen = both & (high > _SIGNIFICANT * noise) & (high > 0)
    if chosen.sum() < _LEAST_PIXELS:
        return None
    # Of a window that is empty only its noise is known.
    return float(np.median(high[chosen] / np.maximum(low[chosen], noise[chosen])))
