import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch

from hpc import config as recipes
from hpc.errors import UserError
from nanodist.views import ViewsConfig, cpu_kernels, draw, make_view, make_views, on_cpu, on_device, render
from nanodist.views.noise import unit_noise
from nanodist.views.presets import PRESETS

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


def _made(way, tiles, config, keys, view=0):
    drawn = draw(config, 0, [3] * len(keys), keys, view, *tiles.shape[-2:])
    return way.apply(tiles, drawn, config, torch.empty(len(tiles), 1, config.size_px, config.size_px))


@pytest.mark.parametrize("way", [on_cpu, on_device])
@pytest.mark.parametrize("stage", ["last", "linear"])
def test_a_view_does_not_depend_on_its_batch(way, stage):
    tiles, config = _tiles(), dataclasses.replace(FULL, noise_stage=stage)
    whole = _made(way, tiles, config, KEYS, 1)
    for part in (slice(0, 1), slice(5, 9), slice(11, 12)):
        assert torch.equal(_made(way, tiles[part], config, KEYS[part], 1), whole[part])


VARIED = {
    "full": FULL,
    "linear": dataclasses.replace(FULL, noise_stage="linear", invert_probability=0.5, noise_signal_share=1.0),
    "solarized": dataclasses.replace(FULL, solarize_probability=0.5, brightness_factor=0.5, exposure="keep"),
    "right angles": dataclasses.replace(FULL, rotation="right_angles", aspect=(0.5, 2.0)),
    "upright": dataclasses.replace(FULL, rotation="none", size_px=50),
    "enlarged": dataclasses.replace(FULL, crop_px=(8.0, 30.0), size_px=41, blur_sigma_px=(0.1, 3.0)),
    "whole tile, turned": dataclasses.replace(FULL, crop_px=(96.0, 96.0), zooms=[1.0]),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("name", VARIED)
def test_both_ways_make_the_same_pixels(name, dtype):
    tiles, config = _tiles(dtype=dtype), VARIED[name]
    for view in (0, 1):
        a, b = (_made(way, tiles, config, KEYS, view) for way in (on_cpu, on_device))
        assert a.std() > 0.05
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 97), (131, 45)])
def test_both_ways_agree_on_oblong_tiles(shape):
    tiles = torch.randint(0, 256, (12, *shape), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    a, b = (_made(way, tiles, dataclasses.replace(FULL, zooms=[0.4, 1.0]), KEYS) for way in (on_cpu, on_device))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_make_views_is_two_views():
    first, second = _tiles(), _tiles().flip(0)
    both = make_views(first, second, FULL, 0, [0] * 12, KEYS)
    for number, tiles in enumerate((first, second)):
        assert torch.equal(both[number], make_view(tiles, FULL, 0, [0] * 12, KEYS, number))


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


def test_a_batch_may_share_its_draws_but_not_its_noise():
    config = ViewsConfig(size_px=24, crop_px=(30, 60), noise_probability=1.0, drawn_for="batch")
    here, there = (draw(config, 3, [0, 1, 0], keys, 0, 96, 96, step=7) for keys in (["a", "b", "c"], ["d", "b", "e"]))
    assert np.array_equal(here.matrix, there.matrix) and np.ptp(here.matrix, 0).max() == np.ptp(here.gamma) == 0
    assert len({*here.noise_key.tolist(), *there.noise_key.tolist()}) == 5
    for other in (draw(config, 3, [0], ["a"], 1, 96, 96, step=7), draw(config, 3, [0], ["a"], 0, 96, 96, step=8)):
        assert not np.allclose(other.matrix[0], here.matrix[0])


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


def test_noise_word_by_word_is_the_noise():
    keys = np.array([0, 1, 7919, 2**31 - 1])
    expected = unit_noise(torch.from_numpy(keys), 40, 40)[:, 0]

    # the hash as it is published, in numbers without a limit
    def lowbias32(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    pixel, key = 3 * 40 + 5, int(keys[2])
    word = lowbias32(lowbias32(pixel + 0x9E3779B9) ^ lowbias32(key))
    total = sum(word.to_bytes(4, "little"))
    assert float(expected[2, 3, 5]) == pytest.approx((total - 510) * (3 / 65535) ** 0.5, abs=1e-6)
    # and the same from the compiled loops
    tiles = torch.full((4, 60, 60), 128, dtype=torch.uint8)
    options = {
        "intensity_probability": 0.0,
        "blur_probability": 0.0,
        "noise_probability": 1.0,
        "noise_std": (0.05, 0.1),
    }
    config = ViewsConfig(size_px=40, crop_px=(50.0, 50.0), noise_signal_share=0.0, **options)
    drawn = dataclasses.replace(draw(config, 0, [0] * 4, KEYS[:4], 0, 60, 60), noise_key=keys)
    seen = (render(tiles, drawn, config)[:, 0] - 128 / 255) / torch.from_numpy(drawn.noise_std).float().view(-1, 1, 1)
    torch.testing.assert_close(seen, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [10, 32, 41, 64, 75, 96, 97, 120])
def test_blur_is_kornias(size):
    from kornia.filters import gaussian_blur2d

    plain = ViewsConfig(size_px=size, crop_px=(float(size),) * 2, rotation="none", **PLAIN)
    config = dataclasses.replace(plain, blur_sigma_px=(0.2, 2.1), blur_probability=1.0)
    tiles, sigmas = _tiles(3, size), np.array([0.15, 0.7, 2.1])
    drawn = dataclasses.replace(draw(config, 0, [0] * 3, KEYS[:3], 0, size, size), blur_sigma_px=sigmas)
    for tile, view, sigma in zip(tiles.double() / 255, render(tiles, drawn, config), sigmas, strict=True):
        expected = gaussian_blur2d(tile[None, None], 2 * config.blur_reach() + 1, (sigma, sigma), "reflect")[0, 0]
        torch.testing.assert_close(view[0], expected.float(), rtol=0, atol=2e-6)


def test_threads_and_memory_change_no_bit(monkeypatch):
    tiles = _tiles(dtype=torch.uint16)
    want = make_view(tiles, FULL, 0, [0] * 12, KEYS, 0)
    monkeypatch.setattr(on_cpu, "_PIXELS_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    started = []
    monkeypatch.setattr(on_cpu, "ThreadPoolExecutor", lambda n: started.append(n) or ThreadPoolExecutor(n))
    room = torch.full((12, 2, 32, 32), -1.0)
    turned = tiles.transpose(1, 2).contiguous().transpose(1, 2)
    assert make_view(turned, FULL, 0, [0] * 12, KEYS, 0, out=room[:, 1:]).data_ptr() == room[:, 1:].data_ptr()
    assert started == [3] and torch.equal(room[:, 1:], want) and (room[:, 0] == -1).all()
    with pytest.raises(ValueError, match="not int32"):
        make_view(tiles.int(), FULL, 0, [0] * 12, KEYS, 0)


def test_power_is_a_power():
    power = numba.vectorize(["f4(f4, f4)"])(cpu_kernels._power.py_func)
    x = np.concatenate([np.geomspace(1e-6, 1, 4000), np.linspace(0.001, 1, 4000)]).astype(np.float32)
    for exponent in (0.3, 0.61, 1.6, 3.0):
        expected = x.astype(np.float64) ** np.float32(exponent)
        assert np.abs(power(x, np.float32(exponent)) - expected).max() < 1e-6


def test_views_are_compiled_without_a_cache_where_there_is_none(monkeypatch, capfd):
    made = []

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'make': no locator available")
        return lambda function: lambda *arguments: made.append(arguments) or time.sleep(0.2)

    monkeypatch.setattr(numba, "njit", njit)
    monkeypatch.setattr(on_cpu, "_SLOW_S", 0.02)
    on_cpu.compiled.__wrapped__()
    assert len(made) == 1 and "compiling what makes views" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    on_cpu.compiled.__wrapped__()
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(UserError, match=r"need numba .*nanodist\[train\]"):
        on_cpu.compiled.__wrapped__()


def test_noise_grows_with_linear_intensity():
    # Dark left, bright right; gamma and contrast bend the grey scale only after linear noise.
    tile = torch.full((1, 96, 96), 40, dtype=torch.uint8)
    tile[..., 48:] = 160
    config = ViewsConfig(
        size_px=96,
        crop_px=(96.0, 96.0),
        rotation="none",
        noise_stage="linear",
        noise_std=(0.05, 0.05),
        noise_signal_share=0.75,
        **{**PLAIN, "noise_probability": 1.0},
    )
    views = torch.cat([make_view(tile, config, 0, [0], [key], 0) for key in KEYS])
    for half, level in ((slice(0, 48), 40 / 255), (slice(48, 96), 160 / 255)):
        measured = float((views[..., half] - level).square().mean())
        assert measured == pytest.approx(0.05**2 * (0.25 + 0.75 * level), rel=0.03)
    bent = dataclasses.replace(config, gamma=1.0, contrast=0.0, brightness=0.0, intensity_probability=1.0)
    last = dataclasses.replace(bent, noise_stage="last")
    drawn = draw(bent, 0, [0], KEYS[:1], 0, 96, 96)
    a, b = (render(tile, drawn, c)[..., :48] for c in (bent, last))
    gamma, level = drawn.gamma[0], 40 / 255
    before = gamma * level ** (gamma - 1) * 0.05 * (0.25 + 0.75 * level) ** 0.5
    after = 0.05 * (0.25 + 0.75 * level**gamma) ** 0.5
    assert abs(before / after - 1) > 0.06
    assert float(a.std()) == pytest.approx(before, rel=0.03) and float(b.std()) == pytest.approx(after, rel=0.03)


def test_a_turned_view_has_no_black_corners():
    tiles = torch.full((12, 96, 96), 200, dtype=torch.uint8)
    config = ViewsConfig(size_px=64, crop_px=(96.0, 96.0), rotation="free", **PLAIN)
    for way in (on_cpu, on_device):
        assert float((_made(way, tiles, config, KEYS) - 200 / 255).abs().max()) < 1e-5


def test_crops_in_nanometres():
    config = ViewsConfig(size_px=32, crop_px=None, crop_nm=(40.0, 40.0), rotation="none", **PLAIN)
    sizes = np.array([[1.0, 1.0], [0.5, 0.5], [2.0, 1.0]])
    drawn = draw(config, 0, [0] * 3, KEYS[:3], 0, 96, 96, sizes)
    sides = np.abs(np.diagonal(drawn.matrix[:, :, :2], axis1=1, axis2=2)) * 32
    assert np.allclose(sides, [[40, 40], [80, 80], [40, 20]])
    assert np.allclose(drawn.pixel_size_nm, 40 / 32)
    sizes[1] = np.nan
    with pytest.raises(UserError, match="sample sample-1 has no pixel_size_nm"):
        draw(config, 0, [0] * 3, KEYS[:3], 0, 96, 96, sizes)
    with pytest.raises(UserError, match="sample sample-0 has no pixel_size_nm"):
        make_view(_tiles(3), config, 0, [0] * 3, KEYS[:3], 0)


def test_the_pixel_size_travels_with_the_view():
    config = ViewsConfig(size_px=32, crop_px=(20.0, 90.0), **PLAIN)
    drawn = draw(config, 0, [0] * 12, KEYS, 0, 96, 96, np.full((12, 2), 0.7))
    scale = np.sqrt(np.abs(np.linalg.det(drawn.matrix[:, :, :2])))
    assert np.allclose(drawn.pixel_size_nm, 0.7 * scale[:, None])
    assert np.isnan(draw(config, 0, [0] * 12, KEYS, 0, 96, 96).pixel_size_nm).all()


def test_aspect_and_laws():
    keys = [f"s{i}" for i in range(2000)]
    common = {"size_px": 32, "rotation": "none", **PLAIN}

    def sides(**more):
        config = recipes.build(ViewsConfig, {**common, **more})
        drawn = draw(config, 0, [0] * len(keys), keys, 0, 200, 200)
        return np.abs(np.diagonal(drawn.matrix[:, :, :2], axis1=1, axis2=2)) * 32

    width, height = sides(crop_px=[20, 40], aspect=[0.5, 2.0]).T
    ratio = width / height
    assert 0.5 <= ratio.min() < 0.52 and 1.93 < ratio.max() <= 2 and abs(np.log(ratio).mean()) < 0.05
    assert np.sqrt(width * height).min() > 19.9 and np.sqrt(width * height).max() < 40.1
    square = sides(crop_px=[20, 40])
    assert np.allclose(square[:, 0], square[:, 1])
    for law, power in (("side", 1), ("area", 2)):
        share = (sides(crop_share=[0.1, 0.5], crop_law=law)[:, 0] / 200) ** power
        place = (share - 0.1**power) / (0.5**power - 0.1**power)
        assert abs(place.mean() - 0.5) < 0.02 and abs(place.var() - 1 / 12) < 0.01


def test_solarizing_and_brightness_factor():
    plain = ViewsConfig(size_px=96, crop_px=(96.0, 96.0), rotation="none", **PLAIN)
    tiles = _tiles()
    base = make_view(tiles, plain, 0, [0] * 12, KEYS, 1)
    solar = dataclasses.replace(plain, solarize_probability_second=1.0)
    assert torch.equal(make_view(tiles, solar, 0, [0] * 12, KEYS, 0), make_view(tiles, plain, 0, [0] * 12, KEYS, 0))
    seen = make_view(tiles, solar, 0, [0] * 12, KEYS, 1)
    torch.testing.assert_close(seen, torch.minimum(base, 1 - base), rtol=0, atol=1e-5)
    bright = dataclasses.replace(plain, brightness_factor=0.5, intensity_probability=1.0)
    bright = dataclasses.replace(bright, contrast=0.0, brightness=0.0, gamma=0.0)
    drawn = draw(bright, 0, [0] * 12, KEYS, 1, 96, 96)
    expected = (base * torch.from_numpy(drawn.brightness_factor).float().view(-1, 1, 1, 1)).clamp(0, 1)
    assert np.ptp(drawn.brightness_factor) > 0.3
    torch.testing.assert_close(make_view(tiles, bright, 0, [0] * 12, KEYS, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = recipes.build(ViewsConfig, {"preset": name, "size_px": 40})
    assert config.size_px == 40 and config.crop_px is None and config.crop_share is not None
    assert recipes.build(ViewsConfig, recipes.parse_yaml(recipes.to_yaml(config), "x")) == config
    views = make_views(_tiles(), _tiles(), config, 0, [0] * 12, KEYS)
    assert views.shape == (2, 12, 1, 40, 40) and (views[0] - views[1]).abs().mean() > 0.02
    if name in ("tem", "lu2022"):
        assert config.aspect is None


def test_a_preset_gives_way_and_mistakes_are_named():
    config = recipes.build(ViewsConfig, {"preset": "tem", "crop_px": [30, 40], "noise_stage": "last"})
    assert config.crop_px == (30, 40) and config.crop_share is None and config.noise_stage == "last"
    assert config.exposure == "image"
    with pytest.raises(UserError, match="section 'views': preset is 'temm'; allowed: simclr, barlow, lu2022, tem"):
        recipes.build(ViewsConfig, {"preset": "temm"}, "views")
    with pytest.raises(UserError, match="not crop_px and crop_share"):
        recipes.build(ViewsConfig, {"crop_px": [30, 40], "crop_share": [0.5, 1.0]})
    with pytest.raises(UserError, match="not none of them"):
        recipes.build(ViewsConfig, {"crop_px": None})
    assert recipes.build(ViewsConfig, {"crop_share": [0.25, 1.0]}).mean_crop_px(100, 200) == pytest.approx(50)
    nm = recipes.build(ViewsConfig, {"crop_nm": [25, 100]})
    assert nm.mean_crop_px(100, 200, 2.0) == pytest.approx(25)
    # A crop is no larger than its tile, so that its scale is that of the views.
    assert recipes.build(ViewsConfig, {"crop_px": [256, 256]}).mean_crop_px(128, 160) == 128
    with pytest.raises(ValueError, match="pixel size"):
        nm.mean_crop_px(100, 200)


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
