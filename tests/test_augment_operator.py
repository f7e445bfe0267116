"""The compiled views: equal to the plain PyTorch form for any shape, and on any number of threads the same bits."""

from __future__ import annotations

import pytest
import torch
from test_augment import bounds, cells

from cellfast.augment import PRESETS, AugmentConfig, TwoViews
from cellfast.augment.parameters import ViewParameters
from cellfast.errors import CellfastError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
EVERYTHING = dict(
    crop_area=(0.3, 1.0), elastic_p=0.6, elastic_rms_px=3.0, elastic_sigma_px=4.0, blur_p=0.6, blur_sigma_px=(0.3, 1.5), noise_p=0.6,
    translation_px=9.0, zoom=(0.6, 1.5),
)  # fmt: skip


def both(config, crops, low, high, out, *, memory_format=torch.contiguous_format, device="cpu", seed=3):
    """Views of the operator on ``device`` and of the plain form on the CPU."""
    size, channels = crops.shape[2], crops.shape[1]
    fused, plain = (TwoViews(config, channels, size, out, memory_format=memory_format, method=m) for m in ("fused", "torch"))
    got = fused(crops.to(device), low, high, seed=seed)
    assert got.is_contiguous(memory_format=memory_format)
    return got.cpu(), plain(crops, low, high, seed=seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8])
def test_any_channel_count_in_either_layout(device, memory_format, channels):
    crops, (low, high) = cells(5, channels), bounds(channels)
    config = AugmentConfig(**EVERYTHING, blur_kernel_px=7)
    got, expected = both(config, crops, low, high, 32, memory_format=memory_format, device=device)
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "out"), [(40, 32), (41, 33), (33, 33), (40, 31), (9, 8), (5, 1), (70, 64)])
@pytest.mark.parametrize("padding", ["reflection", "border", "zeros"])
def test_any_size_and_padding(device, size, out, padding):
    crops, (low, high) = cells(4, 3, size=size), bounds(3)
    config = AugmentConfig(**{**EVERYTHING, "translation_px": size / 3}, blur_kernel_px=1 if out < 4 else 5, padding=padding)
    got, expected = both(config, crops, low, high, out, device=device)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_presets_and_depths(device, preset, dtype):
    crops = cells(6, 3, dtype=torch.uint8 if dtype == torch.uint8 else torch.uint16)
    low, high = torch.full((6, 3), 20.0), torch.full((6, 3), 200.0 if dtype == torch.uint8 else 30000.0)
    high[2, 1] = 20.0  # a flat channel of one cell
    if dtype == torch.float32:
        crops = crops.to(torch.int32).float()
        high[2, 1] = 25000.0
    got, expected = both(preset, crops, low, high, 32, device=device)
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [2, 3, 6])
@pytest.mark.parametrize("padding", ["reflection", "zeros"])
def test_views_of_the_inverted_image(device, memory_format, channels, padding):
    crops, (low, high) = cells(5, channels), bounds(channels)
    crops[:, :, ::3] = 0  # pixels that the inversion leaves at 0
    config = AugmentConfig(**EVERYTHING, blur_kernel_px=5, inverted=True, padding=padding)
    got, expected = both(config, crops, low, high, 32, memory_format=memory_format, device=device)
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=0)
    assert got.max() > 1.0  # 256/255: what was 0 before it was inverted twice


@pytest.mark.parametrize("device", DEVICES)
def test_windows_far_outside_the_crop(device):
    """A tiny zoom shows hundreds of reflections of the crop."""
    crops, (low, high) = cells(3, 2), bounds(2)
    config = AugmentConfig.preset("none", zoom=(0.02, 0.03), rotation_deg=45.0)
    got, expected = both(config, crops, low, high, 32, device=device)
    # Positions of some thousand pixels carry a float32's rounding of 1e-4 px, on steep edges.
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    got, _ = both(AugmentConfig.preset("none", zoom=(1e-12, 1e-12)), crops, low, high, 32, device=device)
    assert got.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_pixel_that_is_not_a_number_stays_one(device):
    crops = torch.full((2, 1, 20, 20), 5.0)
    crops[1, 0, 10, 10] = torch.nan
    got = TwoViews("none", 1, 20, 16)(crops.to(device), torch.zeros(1), torch.full((1,), 10.0), seed=0).cpu()
    assert got[[0, 2]].isfinite().all()
    assert got[[1, 3]].isnan().any(3).any(2).all()


@pytest.mark.parametrize("preset", ["default", "perakis2021"])
def test_threads_and_neighbours_change_no_bit(preset):
    crops, (low, high) = cells(9, 3), bounds(3)
    two_views = TwoViews(preset, 3, 40, 32, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = two_views(crops, low, high, seed=2)
        torch.set_num_threads(3)
        three = two_views(crops, low, high, seed=2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)
    draws = two_views.draw(9, 2)
    alone = two_views.apply(crops[4:5], low, high, draws.of_cells(slice(4, 5)))
    assert torch.equal(alone, one[[4, 13]])


def test_crops_need_not_be_contiguous():
    wide, (low, high) = cells(4, 6), bounds(3)
    two_views = TwoViews("default", 3, 40, 32)
    strided = wide.view(torch.int16)[:, ::2].view(torch.uint16)
    assert not strided.is_contiguous()
    assert torch.equal(two_views(strided, low, high, seed=1), two_views(strided.clone(), low, high, seed=1))


def test_wrong_use_of_the_operator_is_refused():
    crops, (low, high) = cells(3, 2), bounds(2)
    two_views = TwoViews(AugmentConfig(elastic_p=1.0, noise_p=1.0), 2, 40, 32)
    with pytest.raises(CellfastError, match="the parameters are those of 2 cells, got 3 crops"):
        two_views.apply(crops, low, high, two_views.draw(2, 0))
    with pytest.raises(CellfastError, match="method must be one of fused, torch, got 'fast'"):
        TwoViews("default", 2, 40, 32, method="fast")
    for name, value in (("elastic_row", 99), ("noise_start", 10**9), ("elastic_row", -2)):
        draws = two_views.draw(3, 0)
        getattr(draws, name)[1] = value
        with pytest.raises(RuntimeError, match=f"{name} {value}"):
            two_views.apply(crops, low, high, draws)
    draws = two_views.draw(3, 0)
    broken = ViewParameters(**{**vars(draws), "gain": draws.gain[:, :1]})
    with pytest.raises(RuntimeError, match=r"gain must be contiguous Float \[6, 2\] on the crops' device, got Float \[6, 1\]"):
        two_views.apply(crops, low, high, broken)
