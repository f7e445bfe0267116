"""Cells per second (two views each) of the augmentation, compared with the same transforms as a chain of Kornia's own modules."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def measure_augment(
    *, batch_size: int = 256, num_channels: int = 3, crop_size: int = 112, output_size: int = 96, repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Measure the presets and the explicit chain on one minibatch of random uint16 crops; agreement is checked first.

    Returns:
        ``{"subject", "batch_size", …, "threads", "rates": {name: {"best", "median", "repeats"}}}``, rates in cells/s: a cell is
        two views.
    """
    from cellfast.augment import TwoViews, center_crop
    from cellfast.data import tune_malloc

    malloc = tune_malloc()
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 4096, (batch_size, num_channels, crop_size, crop_size), generator=generator, dtype=torch.int32)
    crops = crops.to(torch.uint16).to(device)
    low, high = torch.zeros(num_channels), torch.full((num_channels,), 4095.0)
    still = TwoViews("none", num_channels, crop_size, output_size)(crops, low, high, seed=0)
    torch.testing.assert_close(still[:batch_size], center_crop(crops, low, high, output_size), atol=1e-4, rtol=0)

    ways: dict[str, Callable[[int], Any]] = {}
    for preset in ("none", "default", "perakis2021"):
        for name, memory_format in (("", torch.contiguous_format), (", channels_last", torch.channels_last)):
            two_views = TwoViews(preset, num_channels, crop_size, output_size, memory_format=memory_format)
            ways[preset + name] = lambda seed, two_views=two_views: two_views(crops, low, high, seed=seed)
        plain = TwoViews(preset, num_channels, crop_size, output_size, method="torch")
        ways[f"{preset}, plain PyTorch"] = lambda seed, plain=plain: plain(crops, low, high, seed=seed)
    for name, chain in (("default", _kornia_default), ("perakis2021", _kornia_perakis2021)):
        modules = chain(output_size)

        def views(seed: int, modules: torch.nn.Module = modules) -> torch.Tensor:
            x = crops.float().sub_(low.to(device)[:, None, None]).div_((high - low).to(device)[:, None, None]).clamp_(0, 1)
            with torch.no_grad():
                return torch.cat((modules(x), modules(x)))

        assert views(0).shape == (2 * batch_size, num_channels, output_size, output_size)
        ways[f"Kornia modules, as {name}"] = views
    return {
        "subject": "augment", "batch_size": batch_size, "num_channels": num_channels, "crop_size": crop_size,
        "output_size": output_size, "device": device, "threads": torch.get_num_threads(), "malloc": malloc,
        "rates": {name: _rate(way, batch_size, repeats, device) for name, way in ways.items()},
    }  # fmt: skip


def _kornia_default(size: int) -> torch.nn.Module:
    """The default preset's transforms, one Kornia module each (gain and shift per channel have none and are left out)."""
    import kornia.augmentation as K

    return torch.nn.Sequential(
        K.RandomAffine(180.0, translate=(4 / 112, 4 / 112), scale=(0.9, 1.15), padding_mode="reflection", p=1.0),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.5),
        K.CenterCrop((size, size)),
        K.RandomGaussianBlur((5, 5), (0.1, 1.0), p=0.2),
        K.RandomBrightness((0.8, 1.2), p=0.8),
        K.RandomContrast((0.8, 1.2), p=0.8),
        K.RandomGaussianNoise(std=0.015, p=0.5),
    )


def _kornia_perakis2021(size: int) -> torch.nn.Module:
    """The perakis2021 preset's transforms, one Kornia module each."""
    import kornia.augmentation as K

    return torch.nn.Sequential(
        K.CenterCrop((size, size)),
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0), cropping_mode="resample", p=1.0),
        K.RandomHorizontalFlip(p=0.5),
        # Kornia has no affine by anchors: one of its own in its place.
        K.RandomAffine(180.0, translate=(0.3, 0.3), scale=(0.5, 2.0), shear=(-30.0, 30.0), padding_mode="reflection", p=0.5),
        K.RandomBrightness((0.8, 1.2), p=0.8),
        K.RandomContrast((0.8, 1.2), p=0.8),
        K.RandomGaussianBlur((9, 9), (0.1, 2.0), p=0.5),
    )


def _rate(way: Callable[[int], Any], cells: int, repeats: int, device: str) -> dict[str, Any]:
    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    way(0)
    wait()
    rates = []
    for seed in range(repeats):
        start = time.perf_counter()
        way(seed)
        wait()
        rates.append(cells / (time.perf_counter() - start))
    return {"best": max(rates), "median": statistics.median(rates), "repeats": rates}
