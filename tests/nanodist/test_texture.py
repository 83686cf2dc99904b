from __future__ import annotations

import time

import numpy as np
import pytest
from skimage.feature import graycomatrix, graycoprops

from nanodist.downstream import texture


def noise(seed: int, shape: tuple[int, int] = (256, 256), low: int = 40, high: int = 200) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(low, high, (shape[0] // 4, shape[1] // 4))
    return np.kron(coarse, np.ones((4, 4))).astype(np.uint8)


def test_glcm_properties_equal_scikit_image() -> None:
    levels = noise(0, (64, 64)) // 16
    matrix = graycomatrix(levels, [2], [0], 16, symmetric=True, normed=True)
    found = texture.glcm_properties(np.moveaxis(matrix[:, :, :, 0], -1, 0))[0]
    names = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")
    for value, name in zip(found, names, strict=True):
        assert value == pytest.approx(graycoprops(matrix, name)[0, 0], rel=1e-6), name


def test_horizontal_pairs_are_counted_as_in_scikit_image() -> None:
    levels = noise(1, (48, 64)) // 16
    found = texture._directions(levels, 16, 4)
    for row, angle in ((0, 0.0), (2, np.pi / 2)):
        matrix = graycomatrix(levels, [4], [angle], 16, symmetric=True, normed=True)
        np.testing.assert_allclose(found[row], texture.glcm_properties(np.moveaxis(matrix[:, :, :, 0], -1, 0))[0])


@pytest.mark.parametrize("radius", texture.LBP_RADII)
def test_binary_patterns_do_not_change_with_quarter_turns(radius: int) -> None:
    image = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    upright = texture.local_binary_patterns(image, radius)
    assert upright.shape == (36,)
    assert (upright**2).sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(upright, texture.local_binary_patterns(np.rot90(image).copy(), radius), atol=2e-2)


def test_the_spectrum_peaks_where_the_wave_is() -> None:
    column = np.arange(256)
    for frequency in (0.05, 0.2, 0.4):
        wave = np.tile(0.5 + 0.4 * np.sin(2 * np.pi * frequency * column), (256, 1)).astype(np.float32)
        expected = int(np.sqrt(frequency / 0.5) * texture.SPECTRUM_BINS)
        assert abs(int(texture.radial_spectrum(wave).argmax()) - expected) <= 1


def test_gain_and_offset_change_brightness_features_only() -> None:
    image = noise(3, low=20, high=100)
    brighter = (image.astype(int) * 2 + 30).astype(np.uint8)
    one, two = texture.texture_features([image, brighter])
    count = len(texture.brightness(np.zeros((8, 8), np.float32)))
    assert not np.allclose(one[:count], two[:count], atol=1e-2)
    np.testing.assert_allclose(one[count:], two[count:], atol=5e-2)


@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (64, 64), (300, 200)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_size_depth_and_a_constant_image_give_finite_features(shape: tuple[int, int], dtype: type) -> None:
    full = np.iinfo(dtype).max
    images = [
        np.zeros(shape, dtype),
        np.full(shape, full, dtype),
        np.random.default_rng(0).integers(0, full, shape).astype(dtype),
    ]
    found = texture.texture_features(images)
    assert found.shape == (3, len(texture.texture_of(np.zeros((256, 256), np.uint8))))
    assert np.isfinite(found).all()


def test_an_image_takes_a_few_milliseconds() -> None:
    image = noise(0)
    texture.texture_of(image)
    times = []
    for _ in range(7):
        start = time.process_time()
        texture.texture_of(image)
        times.append(time.process_time() - start)
    assert min(times) < 0.06  # about 0.014 s on one core; the margin is for slow machines
