"""Training: cells per second of the whole step, and of the bare encoder's forward and backward at the same minibatch."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cellfast.augment import TwoViews
from cellfast.benchmark.loader import random_screen
from cellfast.data import Loader
from cellfast.data.malloc import tune_malloc
from cellfast.errors import CellfastError
from cellfast.losses import NTXentLoss
from cellfast.models import ModelConfig, SimCLR, build_model
from cellfast.ops.small_maps import use_small_maps
from cellfast.training.optimizers import build_optimizer
from cellfast.training.step import TrainingStep, TwoViewModel


def measure_train(
    *,
    encoder: str = "resnet18",
    batch_size: int = 128,
    crop_size: int = 112,
    output_size: int = 96,
    repeats: int = 5,
    amp: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time training steps from the loader to the optimiser, and steps of the encoder alone on a constant tensor of views.

    ``fraction`` = bare time / full time: what loader, augmentation, loss and optimiser leave of the encoder's own rate. On a CPU the bare
    encoder is timed with torch's general convolution for the last maps too (`cellfast.ops.small_maps`), after comparing their results.
    """
    tune_malloc()
    where = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        screen = random_screen(Path(folder), batch_size * 4, 1, 3, crop_size)
        loader = Loader(screen, batch_size, drop_last=True, device=where)
        two_views = TwoViews("default", 3, crop_size, output_size, memory_format=torch.channels_last)
        model = build_model(ModelConfig(encoder=encoder), seed=0).to(where).train()
        optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=1e-4)
        step = TrainingStep(TwoViewModel(model, per_view=False), NTXentLoss(0.1).to(where), optimizer, device=where, amp=amp)
        low, high = torch.zeros(3, device=where), torch.full((3,), 65535.0, device=where)
        constant = two_views(next(iter(loader)).crops, low, high, seed=0)
        state = {"batches": iter(loader), "seed": 0}

        def bare() -> None:
            with torch.autocast(where.type, dtype=torch.bfloat16, enabled=amp):
                z = step.module(constant)
            z.float().square().mean().backward()
            optimizer.zero_grad(set_to_none=True)

        def full() -> None:
            batch = next(state["batches"], None)
            if batch is None:
                state["batches"] = iter(loader)
                batch = next(state["batches"])
            state["seed"] += 1
            step.update(step.compute_loss(two_views(batch.crops, low, high, seed=state["seed"])))

        def bare_without_small_maps() -> None:
            use_small_maps(model, False)
            bare()
            use_small_maps(model)

        runs = {"bare": bare, "full": full}
        if where.type == "cpu":
            difference = _small_maps_difference(model, constant)
            runs["bare_without_small_maps"] = bare_without_small_maps
        # Turn by turn, so that a disturbance of the machine meets all.
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                elapsed = _seconds(run, where)
                if turn:
                    times[name].append(elapsed)
        loader.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "encoder": encoder,
        "batch_size": batch_size,
        "crop_size": crop_size,
        "output_size": output_size,
        "amp": amp,
        "device": device,
        "threads": torch.get_num_threads(),
        "cells_per_second": {name: batch_size / value for name, value in medians.items()},
        "seconds": times,
        "fraction": medians["bare"] / medians["full"],
        **({"small_maps_difference": difference} if where.type == "cpu" else {}),
    }


def _small_maps_difference(model: SimCLR, views: torch.Tensor) -> float:
    """Largest difference of features with and without `use_small_maps`, as a share of the largest feature.

    Raises:
        CellfastError: it is more than rounding.
    """
    features = []
    with torch.no_grad():
        for enabled in (False, True):
            use_small_maps(model, enabled)
            features.append(model.encode(views))
    difference = float((features[0] - features[1]).abs().max() / features[0].abs().max())
    if difference > 1e-4:
        raise CellfastError(f"small maps: features differ by {difference:.1e} of the largest from the general convolution's")
    return difference


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
