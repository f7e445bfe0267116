"""Views: against Kornia's own operations on the same draws, the seed contract, the geometry's margins, and what is refused."""

from __future__ import annotations

import dataclasses

import kornia
import numpy as np
import pytest
import torch

from cellfast.augment import PRESETS, AugmentConfig, TwoViews, center_crop, rotation_margin_px
from cellfast.augment.parameters import anchor_affine
from cellfast.errors import CellfastError

SIZE, OUT = 40, 32


def cells(count: int, channels: int, size: int = SIZE, dtype: torch.dtype = torch.uint16, seed: int = 0) -> torch.Tensor:
    """Smooth random images that use the dtype's range."""
    top = 255 if dtype == torch.uint8 else 40000
    noise = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = kornia.filters.gaussian_blur2d(noise, (9, 9), (2.0, 2.0))
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    return ((smooth - low) / (high - low) * top).to(torch.int32).to(dtype)


def bounds(channels: int, top: float = 40000.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(channels), torch.full((channels,), top)


def only(**values) -> AugmentConfig:
    return AugmentConfig.preset("none", **values)


def test_views_equal_an_explicit_kornia_chain_on_the_same_draws():
    """Every operation on, values that do not clip, and a crop so large that nothing outside it is sampled."""
    batch, channels, size = 6, 3, 80
    config = AugmentConfig(
        crop_area=(0.4, 1.0), elastic_p=0.6, elastic_sigma_px=6.0, blur_p=0.6, blur_sigma_px=(0.3, 1.5), blur_kernel_px=7,
        noise_p=0.0, brightness=0.1, contrast=0.2, channel_shift=0.05, channel_gain=0.1,
    )  # fmt: skip
    crops = cells(batch, channels, size)
    low, high = torch.full((channels,), -20000.0), torch.full((channels,), 60000.0)  # x in [0.25, 0.75]
    two_views = TwoViews(config, channels, size, OUT)
    views = two_views(crops, low, high, seed=7)
    draws = two_views.draw(batch, 7)
    assert (draws.elastic_row >= 0).any()
    assert (draws.elastic_row < 0).any()
    x = (crops.float() - low[:, None, None]) / (high - low)[:, None, None]
    basis = two_views._draws.elastic_basis
    blurred = 0
    for view in range(2 * batch):
        image = x[view % batch][None]
        # The affine part as a forward matrix in pixels, for warp_affine.
        sampling = torch.eye(3, dtype=torch.float64)
        sampling[:2] = draws.matrix[view].double()
        to_centre, from_centre = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
        to_centre[:2, 2] = -(OUT - 1) / 2
        from_centre[:2, 2] = (OUT - 1) / 2 + (size - OUT) // 2
        pixels = from_centre @ sampling @ to_centre
        row = int(draws.elastic_row[view])
        if row < 0:
            forward = torch.linalg.inv(pixels)[None, :2].float()
            warped = kornia.geometry.transform.warp_affine(image, forward, (OUT, OUT), align_corners=True)
        else:
            ys, xs = torch.meshgrid(torch.arange(OUT).double(), torch.arange(OUT).double(), indexing="ij")
            points = torch.einsum("ij,jhw->ihw", pixels, torch.stack((xs, ys, torch.ones_like(xs)))).float()
            field = basis @ draws.elastic[row] @ basis.T
            warped = kornia.geometry.transform.remap(
                image, (points[0] + field[0])[None], (points[1] + field[1])[None], align_corners=True
            )
        sigma = float(draws.blur_sigma[view])
        if sigma > 0:
            blurred += 1
            warped = kornia.filters.gaussian_blur2d(warped, (7, 7), (sigma, sigma), border_type="reflect")
        for channel in range(channels):
            plane = warped[:, channel : channel + 1]
            plane = kornia.enhance.adjust_contrast_with_mean_subtraction(plane, float(draws.contrast[view, channel]))
            plane = plane * draws.gain[view, channel] + draws.offset[view, channel]
            assert 0 < plane.min()
            assert plane.max() < 1
            torch.testing.assert_close(views[view, channel], plane[0, 0], atol=2e-4, rtol=0)
    assert 0 < blurred < 2 * batch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint16), (2, torch.uint8), (3, torch.uint16), (5, torch.uint16)])
def test_any_channel_count_and_depth(preset, channels, dtype, memory_format):
    crops = cells(5, channels, dtype=dtype)
    low, high = bounds(channels, 255.0 if dtype == torch.uint8 else 40000.0)
    before = crops.clone()
    views = TwoViews(preset, channels, SIZE, OUT, memory_format=memory_format)(crops, low, high, seed=3)
    assert views.shape == (10, channels, OUT, OUT)
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=memory_format)
    assert 0 <= views.min()
    assert views.max() <= 1
    assert torch.equal(before, crops)
    other = TwoViews(preset, channels, SIZE, OUT)(crops, low, high, seed=3)
    torch.testing.assert_close(views, other, atol=0, rtol=0)
    if preset != "none":
        assert all(not torch.equal(views[i], views[5 + i]) for i in range(5))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_chunks_do_not_change_the_views(preset):
    crops, (low, high) = cells(7, 2), bounds(2)
    whole, parts = (TwoViews(preset, 2, SIZE, OUT, method="torch") for _ in range(2))
    whole.chunk_size, parts.chunk_size = 7, 3
    torch.testing.assert_close(whole(crops, low, high, seed=1), parts(crops, low, high, seed=1), atol=1e-5, rtol=0)


def test_the_seed_alone_decides_and_the_global_generators_stay_untouched():
    crops, (low, high) = cells(4, 3), bounds(3)
    config = AugmentConfig.preset("default", crop_area=(0.5, 1.0), elastic_p=0.5, noise_p=1.0, blur_p=0.5)
    two_views = TwoViews(config, 3, SIZE, OUT)
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = two_views(crops, low, high, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state()))  # noqa: NPY002
    torch.manual_seed(99)
    assert torch.equal(first, TwoViews(config, 3, SIZE, OUT)(crops, low, high, seed=5))
    assert not torch.equal(first, two_views(crops, low, high, seed=6))
    two_views(crops, low, high, seed=-1)
    two_views(crops, low, high, seed=2**70)


def test_nothing_on_is_the_central_crop_twice():
    crops, (low, high) = cells(3, 4, size=41), bounds(4)
    views = TwoViews("none", 4, 41, OUT)(crops, low, high, seed=0)
    expected = center_crop(crops, low, high, OUT)
    torch.testing.assert_close(views, torch.cat((expected, expected)), atol=2e-5, rtol=0)


def test_flips_mirror_exactly():
    crops, (low, high) = cells(3, 2), bounds(2)
    still = center_crop(crops, low, high, OUT).repeat(2, 1, 1, 1)
    flipped = TwoViews(only(flip_horizontal=1.0), 2, SIZE, OUT)(crops, low, high, seed=0)
    torch.testing.assert_close(flipped, still.flip(3), atol=2e-5, rtol=0)
    flipped = TwoViews(only(flip_vertical=1.0), 2, SIZE, OUT)(crops, low, high, seed=0)
    torch.testing.assert_close(flipped, still.flip(2), atol=2e-5, rtol=0)


def test_matrices_span_what_the_configuration_says():
    config = only(rotation_deg=180.0, zoom=(0.8, 1.25), translation_px=3.0, flip_vertical=0.5)
    matrix = TwoViews(config, 1, SIZE, OUT).draw(4000, 0).matrix.double()
    scale = torch.linalg.svdvals(matrix[:, :, :2])
    torch.testing.assert_close(scale[:, 0], scale[:, 1], atol=1e-6, rtol=0)  # no shear, no stretch
    assert 1 / 1.25 <= scale.min() < 0.81
    assert 1.24 < scale.max() <= 1 / 0.8 + 1e-6
    assert 0.45 < (torch.linalg.det(matrix[:, :, :2]) < 0).double().mean() < 0.55
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
    counts = torch.histc(angle, bins=8, min=-torch.pi, max=torch.pi)
    assert counts.min() > 400  # any angle: 500 expected in each of eight sectors
    assert 2.9 < matrix[:, :, 2].abs().max() <= 3.0


def test_resized_crop_stays_in_the_output_window_and_has_the_drawn_area():
    matrix = TwoViews(only(crop_area=(0.08, 1.0)), 1, SIZE, OUT).draw(2000, 0).matrix
    half = matrix[:, [0, 1], [0, 1]] * OUT / 2
    assert (matrix[:, :, 2].abs() + half).max() <= OUT / 2 + 1e-4
    area = (half * 2).prod(1) / OUT**2
    assert 0.06 < area.min() < 0.12
    assert 0.95 < area.max() <= 1.0
    ratio = half[:, 0] / half[:, 1]
    assert 0.65 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.5


@pytest.mark.parametrize(("output_size", "degrees"), [(96, 180.0), (32, 180.0), (96, 10.0), (33, 30.0)])
def test_with_the_rotation_margin_nothing_outside_the_crop_is_seen(output_size, degrees):
    margin = rotation_margin_px(output_size, degrees)
    margin += margin % 2  # the window lies in the middle
    low, high = torch.zeros(1), torch.ones(1)
    config = only(rotation_deg=degrees, padding="zeros")

    def darkest(size: int) -> float:
        ones = torch.ones(200, 1, size, size, dtype=torch.uint8)
        return float(TwoViews(config, 1, size, output_size)(ones, low, high, seed=0).min())

    assert darkest(output_size + margin) > 0.9999
    assert darkest(output_size + margin - 6) < 0.9  # the margin is needed, not generous


def test_without_the_margin_corners_are_filled_as_configured():
    ones = torch.ones(50, 1, 112, 112, dtype=torch.uint8)
    low, high = torch.zeros(1), torch.ones(1)
    for padding, least in (("reflection", 1.0), ("border", 1.0), ("zeros", 0.0)):
        views = TwoViews(only(rotation_deg=180.0, padding=padding), 1, 112, 96)(ones, low, high, seed=0)
        assert float(views.min()) == pytest.approx(least, abs=1e-5)


def test_elastic_displacement_has_the_stated_size_and_length():
    two_views = TwoViews(only(elastic_p=1.0, elastic_rms_px=2.0, elastic_sigma_px=6.0), 1, 112, 96)
    draws = two_views.draw(150, 0)
    basis = two_views._draws.elastic_basis
    field = basis @ draws.elastic @ basis.T
    assert float(field.pow(2).mean().sqrt()) == pytest.approx(2.0, rel=0.05)
    assert float(field[..., 0, 0].pow(2).mean().sqrt()) == pytest.approx(2.0, rel=0.1)  # corners move as much as the middle
    # Two points d apart in noise smoothed by sigma correlate as exp(-d^2 / 4 sigma^2).
    correlation = float((field[..., :-12] * field[..., 12:]).mean() / field.pow(2).mean())
    assert correlation == pytest.approx(np.exp(-(12**2) / (4 * 6**2)), abs=0.05)


def test_noise_is_new_for_every_view_and_channel_and_has_the_stated_spread():
    grey = torch.full((200, 2, SIZE, SIZE), 100, dtype=torch.uint8)
    views = TwoViews(only(noise_p=1.0, noise_std=0.1), 2, SIZE, OUT)(grey, torch.zeros(2), torch.full((2,), 200.0), seed=0)
    noise = views - 0.5
    # A standard deviation uniform in [0, a] has mean square a^2 / 3.
    assert float(noise.pow(2).mean().sqrt()) == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    flat = noise.flatten(2)
    unit = flat / flat.norm(dim=2, keepdim=True)
    between = (unit[:, 0] @ unit[:, 1].T).abs()
    assert float((between > 0.5).double().mean()) < 0.01


def test_per_channel_jitter_moves_channels_apart_and_brightness_moves_them_together():
    grey = torch.full((300, 3, SIZE, SIZE), 100, dtype=torch.uint8)
    low, high = torch.zeros(3), torch.full((3,), 200.0)
    together = TwoViews(only(jitter_p=1.0, brightness=0.2), 3, SIZE, OUT)(grey, low, high, seed=0).mean((2, 3))
    torch.testing.assert_close(together[:, 0], together[:, 2], atol=1e-5, rtol=0)
    assert 0.4 <= together.min() < 0.42
    assert 0.58 < together.max() <= 0.6
    apart = TwoViews(only(channel_p=1.0, channel_gain=0.2, channel_shift=0.0), 3, SIZE, OUT)(grey, low, high, seed=0).mean((2, 3))
    assert abs(float(torch.corrcoef(apart.T)[0, 1])) < 0.15


@pytest.mark.parametrize(("size", "out"), [(112, 96), (41, 32), (40, 33), (41, 33), (32, 32)])
def test_center_crop_keeps_the_centroid_pixel(size, out):
    crops = torch.zeros(1, 1, size, size, dtype=torch.uint16)
    crops[0, 0, size // 2, size // 2] = 1000
    window = center_crop(crops, torch.zeros(1), torch.full((1,), 1000.0), out)
    assert window.shape == (1, 1, out, out)
    assert float(window[0, 0, out // 2, out // 2]) == 1.0
    assert float(window.sum()) == 1.0


def test_scaling_per_channel_per_cell_and_of_a_flat_channel():
    crops = cells(3, 2)
    low, high = (
        torch.tensor([[100.0, 0.0], [5000.0, 20.0], [0.0, 0.0]]),
        torch.tensor([[900.0, 60000.0], [9000.0, 30.0], [0.0, 10.0]]),
    )
    got = center_crop(crops, low, high, SIZE).numpy()
    pixel = crops.numpy().astype(np.float64)
    width = np.maximum((high - low).numpy(), 1)[:, :, None, None]  # a range below one count is taken as one count
    np.testing.assert_allclose(got, np.clip((pixel - low.numpy()[:, :, None, None]) / width, 0, 1), atol=1e-5)
    views = TwoViews("none", 2, SIZE, SIZE)(crops, low, high, seed=0)
    np.testing.assert_allclose(views[:3], got, atol=1e-4)
    assert center_crop(crops[:0], low[:0], high[:0], OUT).shape == (0, 2, OUT, OUT)
    assert TwoViews("default", 2, SIZE, OUT)(crops[:0], low[:0], high[:0], seed=0).shape == (0, 2, OUT, OUT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoViews("default", 3, 64, 96), "output_size 96 px is larger than the stored crops .64 px.*crop_size=96"),
        (lambda: TwoViews("default", 0, 64, 32), "num_channels"),
        (lambda: TwoViews("strong", 3, 64, 32), "unknown augmentation preset 'strong': choose one of default"),
        (lambda: AugmentConfig.preset("default", rotation=3), "unknown augmentation value rotation: the values are crop_area"),
        (lambda: AugmentConfig(blur_p=1.5), "augment.blur_p must be a number of at least 0 and at most 1, got 1.5"),
        (lambda: AugmentConfig(zoom=(1.2, 0.8)), "augment.zoom must be two numbers with 0 < low <= high"),
        (lambda: AugmentConfig(crop_area=(0.5, 1.5)), "low <= high <= 1"),
        (lambda: AugmentConfig(noise_std=float("nan")), "augment.noise_std is NaN"),
        (lambda: AugmentConfig(brightness="much"), "augment.brightness must be made of numbers, got"),
        (lambda: AugmentConfig(blur_kernel_px=4), "odd number of pixels, got 4"),
        (lambda: AugmentConfig(padding="wrap"), "reflection, border, zeros, got 'wrap'"),
        (lambda: TwoViews(AugmentConfig(translation_px=30), 3, 40, 32), "more than half of the stored crop"),
        (lambda: TwoViews(AugmentConfig(blur_p=0.5, blur_kernel_px=99), 3, 40, 32), "too wide for views of 32 px"),
    ],
)
def test_bad_configurations_say_what_to_do(make, message):
    with pytest.raises(CellfastError, match=message):
        make()


@pytest.mark.parametrize(
    ("crops", "low", "high", "message"),
    [
        (torch.zeros(2, 3, 30, 30, dtype=torch.uint16), torch.zeros(3), torch.ones(3), r"\[B, 3, 40, 40\], got \[2, 3, 30, 30\]"),
        (
            torch.zeros(2, 3, 40, 40, dtype=torch.int16),
            torch.zeros(3),
            torch.ones(3),
            "uint8, uint16 or float32, got torch.int16",
        ),
        (torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.zeros(2), torch.ones(2), r"shape \[C\] = \[3\]"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.ones(3), torch.zeros(3), "finite low <= high"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.zeros(3), torch.full((3,), torch.nan), "finite low <= high"),
    ],
)
def test_bad_input_says_what_was_expected(crops, low, high, message):
    with pytest.raises(CellfastError, match=message):
        TwoViews("default", 3, SIZE, OUT)(crops, low, high, seed=0)


def test_a_list_from_yaml_is_a_range():
    assert AugmentConfig(zoom=[0.5, 2]).zoom == (0.5, 2.0)


@pytest.mark.cuda
def test_a_gpu_gives_the_views_a_cpu_gives_and_keeps_its_generator():
    crops, (low, high) = cells(6, 4), bounds(4)
    config = AugmentConfig(crop_area=(0.5, 1.0), elastic_p=0.5, blur_p=0.5, noise_p=1.0)
    two_views = TwoViews(config, 4, SIZE, OUT)
    expected = two_views(crops, low, high, seed=5)
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    got = two_views(crops.cuda(), low, high, seed=5)
    assert torch.equal(state, torch.cuda.get_rng_state())
    torch.testing.assert_close(got.cpu(), expected, atol=2e-3, rtol=0)


def test_anchors_move_by_at_most_what_was_asked_for():
    torch.manual_seed(3)
    size, most = 40, 12.0
    linear, shift = anchor_affine(4000, size, 0.5, most)
    identity = (linear == torch.eye(2, dtype=torch.float64)).all(2).all(1) & (shift == 0).all(1)
    assert 0.45 < identity.double().mean() < 0.55
    # The map goes from the view back: where the anchors went to is found with its inverse, in pixels from the view's centre.
    anchors = torch.tensor([[33.0, 33.0], [33.0, 7.0], [7.0, 7.0]], dtype=torch.float64) - 19.5
    went = torch.linalg.solve(linear[~identity][:, None], (anchors - shift[~identity][:, None])[..., None])[..., 0] - anchors
    assert went.abs().max() <= most + 1e-6
    assert went.abs().max() > 0.99 * most
    torch.testing.assert_close(went.std(0), torch.full((3, 2), most / 3**0.5, dtype=torch.float64), rtol=0.05, atol=0)


def test_an_affine_by_anchors_moves_the_picture():
    crops, (low, high) = cells(4, 2), bounds(2)
    still = AugmentConfig.preset("none")
    moved = TwoViews(dataclasses.replace(still, anchors_p=1.0, anchors_px=6.0), 2, SIZE, OUT)(crops, low, high, seed=1)
    unmoved = TwoViews(still, 2, SIZE, OUT)(crops, low, high, seed=1)
    tiny = TwoViews(dataclasses.replace(still, anchors_p=1.0, anchors_px=1e-5), 2, SIZE, OUT)(crops, low, high, seed=1)
    assert (moved - unmoved).abs().mean() > 0.01
    torch.testing.assert_close(tiny, unmoved, atol=1e-3, rtol=0)
