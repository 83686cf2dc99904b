import dataclasses

import numpy as np
import pytest
import torch

from nanodist.views import ViewsConfig, draw, make_view
from nanodist.views.noise import unit_noise

KEYS = [f"sample-{i}" for i in range(12)]
PLAIN = {"flip": False, "intensity_probability": 0.0, "blur_probability": 0.0, "noise_probability": 0.0}
FULL = ViewsConfig(
    size_px=32,
    crop_px=(20.0, 90.0),
    zooms=[1.0, 2.0],
    exposure="image",
    background_gradient=0.1,
    erase_probability=0.5,
)


def _tiles(n=12, size=96, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    top = 256 if dtype == torch.uint8 else 65536
    return torch.randint(0, top, (n, size, size), generator=generator).to(dtype)


def test_a_view_does_not_depend_on_its_batch():
    tiles = _tiles()
    whole = make_view(tiles, FULL, 0, [3] * 12, KEYS, 1)
    for part in (slice(0, 1), slice(5, 9), slice(11, 12)):
        alone = make_view(tiles[part], FULL, 0, [3] * len(KEYS[part]), KEYS[part], 1)
        assert torch.equal(alone, whole[part])


def test_every_part_of_the_key_changes_the_view():
    tile = _tiles(1)
    base = make_view(tile, FULL, 0, [0], ["a"], 0)
    for seed, epoch, key, view in ((1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)):
        assert (make_view(tile, FULL, seed, [epoch], [key], view) - base).abs().max() > 0.05
    assert torch.equal(make_view(tile, FULL, 0, [0], ["a"], 0), base)


def test_without_changes_a_view_is_the_tile():
    config = ViewsConfig(size_px=96, crop_px=(96.0, 96.0), rotation="none", **PLAIN)
    for dtype, full in ((torch.uint8, 255), (torch.uint16, 65535)):
        tiles = _tiles(dtype=dtype)
        view = make_view(tiles, config, 0, [0] * 12, KEYS, 0)[:, 0]
        torch.testing.assert_close(view, tiles.float() / full, rtol=0, atol=2e-5)


def test_a_coarse_view_is_an_average():
    config = ViewsConfig(size_px=24, crop_px=(96.0, 96.0), rotation="none", **PLAIN)
    tiles = _tiles()
    expected = torch.nn.functional.avg_pool2d(tiles[:, None].float() / 255, 4)
    torch.testing.assert_close(make_view(tiles, config, 0, [0] * 12, KEYS, 0), expected, rtol=0, atol=1e-5)


def test_right_angles_and_reflections_are_exact():
    config = ViewsConfig(size_px=96, crop_px=(96.0, 96.0), rotation="right_angles", **{**PLAIN, "flip": True})
    tiles = _tiles()
    views = make_view(tiles, config, 0, [0] * 12, KEYS, 0)[:, 0]
    seen = set()
    for tile, view in zip(tiles.float() / 255, views, strict=True):
        forms = [torch.rot90(f, k, (0, 1)) for f in (tile, tile.flip(1)) for k in range(4)]
        errors = [float((form - view).abs().max()) for form in forms]
        seen.add(int(np.argmin(errors)))
        assert min(errors) < 1e-4
    assert len(seen) >= 4


def test_crops_have_the_size_that_was_asked_for_and_stay_inside():
    config = ViewsConfig(size_px=32, crop_px=(30.0, 60.0), rotation="free", **PLAIN)
    drawn = draw(config, 0, [0] * 400, [f"s{i}" for i in range(400)], 0, 96, 96)
    side = np.sqrt(np.abs(np.linalg.det(drawn.matrix[:, :, :2]))) * 32
    assert side.min() > 29.9 and side.max() < 60.1 and abs(np.log(side).mean() - np.log(30 * 60) / 2) < 0.02
    corners = np.array([[x, y, 1] for x in (-0.5, 31.5) for y in (-0.5, 31.5)])
    places = np.einsum("nij,kj->nki", drawn.matrix, corners)
    assert places.min() > -0.51 and places.max() < 95.51


def test_centred_crops_keep_to_their_jitter():
    config = ViewsConfig(size_px=32, crop_px=(40.0, 40.0), centre_jitter_px=5.0, **PLAIN)
    drawn = draw(config, 0, [0] * 200, [f"s{i}" for i in range(200)], 0, 96, 96)
    centre = drawn.matrix @ np.array([15.5, 15.5, 1.0])
    off = np.abs(centre - 47.5)
    assert off.max() <= 5.0 and off.max() > 4.0


def test_zoom_is_shared_by_the_views_of_a_sample():
    config = ViewsConfig(size_px=32, crop_px=(64.0, 64.0), zooms=[1.0, 2.0], **PLAIN)
    a, b = (draw(config, 0, [0] * 100, [f"s{i}" for i in range(100)], view, 96, 96) for view in (0, 1))
    sides = [np.round(np.sqrt(np.abs(np.linalg.det(d.matrix[:, :, :2]))) * 32) for d in (a, b)]
    assert np.array_equal(*sides) and set(sides[0]) == {32.0, 64.0}


def test_noise_has_the_variance_that_was_asked_for():
    noise = unit_noise(torch.arange(64, dtype=torch.int64) * 7919, 64, 64)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.var()) - 1) < 0.01
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat)
    assert (correlation - torch.eye(64)).abs().max() < 0.08
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean()
    assert abs(float(neighbours)) < 0.01
    assert torch.equal(noise[5:6], unit_noise(torch.tensor([5 * 7919]), 64, 64))


def test_exposure_makes_a_dark_tile_visible():
    dark = (_tiles(2).float() * 0.02).to(torch.uint8)
    config = ViewsConfig(size_px=32, crop_px=(64.0, 64.0), exposure="image", **PLAIN)
    view = make_view(dark, config, 0, [0, 0], KEYS[:2], 0)
    assert abs(float(view.mean()) - 0.5) < 0.02 and float(view.std()) > 0.1


def test_inversion_turns_black_into_white():
    tiles = _tiles()
    config = ViewsConfig(size_px=96, crop_px=(96.0, 96.0), rotation="none", **PLAIN)
    plain = make_view(tiles, config, 0, [0] * 12, KEYS, 0)
    inverted = make_view(tiles, dataclasses.replace(config, invert_probability=1.0), 0, [0] * 12, KEYS, 0)
    torch.testing.assert_close(inverted, 1 - plain, rtol=0, atol=1e-5)


def test_a_range_the_wrong_way_is_refused():
    with pytest.raises(ValueError, match="crop_px runs from 9"):
        ViewsConfig(crop_px=(9.0, 5.0)).check()
