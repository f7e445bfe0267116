"""The device path: the fed training step compared with the same step on a constant tensor, and embedding from resident cells.

Runs of many steps are timed with one wait at the end, as training runs; nothing is read back in between.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellfast.benchmark.loader import random_screen
from cellfast.benchmark.timing import device_name, median_seconds, or_reason
from cellfast.data import Batch, Loader, tune_malloc


def measure_step(
    *,
    encoder: str = "resnet18",
    batch_size: int = 1024,
    crop_size: int = 112,
    output_size: int = 96,
    store_cells: int = 16384,
    steps: int = 20,
    repeats: int = 3,
    device: str = "cuda",
    amp: bool = True,
    compile: bool = False,
    cuda_graphs: bool = False,
    chunk_size: int | None = None,
    feeds: Sequence[str] = ("resident", "stream"),
    preset: str = "default",
    report: Callable[[Any], None] = lambda result: None,
) -> dict[str, Any]:
    """Cells per second of the whole step per feed (cells → views → encoder → NT-Xent → gradients → optimiser), and of the step on a constant
    tensor.

    ``fraction`` = fed / constant; ``augment_share`` = time of the views alone / time of the constant step. A part that cannot run is
    reported as ``{"failed": reason}`` and the others go on. ``report`` gets the result whenever there is more of it.
    """
    from cellfast.augment import TwoViews
    from cellfast.losses import NTXentLoss
    from cellfast.models import ModelConfig, build_model
    from cellfast.training.cuda_graph import GraphedStep
    from cellfast.training.losses_seen import LossReader
    from cellfast.training.optimizers import build_optimizer
    from cellfast.training.step import TrainingStep, TwoViewModel

    tune_malloc()
    where = torch.device(device)
    torch.backends.cudnn.benchmark = True
    model = build_model(ModelConfig(encoder=encoder), seed=0).to(where).train()
    module: torch.nn.Module = TwoViewModel(model, per_view=False)
    if compile:
        module = torch.compile(module)
    optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=1e-4)
    kind = GraphedStep if cuda_graphs else TrainingStep
    step = kind(module, NTXentLoss(0.1).to(where), optimizer, device=where, amp=amp, chunk_size=chunk_size)
    constant = _constant_views(batch_size, output_size, where, chunk_size)
    losses, number = LossReader(where), count()

    def train_on(views: Any) -> None:
        loss = step.compute_loss(views)
        losses.put(next(number), loss)
        step.update(loss)

    result: dict[str, Any] = {
        "encoder": encoder, "batch_size": batch_size, "crop_size": crop_size, "output_size": output_size, "amp": amp,
        "compile": compile, "cuda_graphs": cuda_graphs, "chunk_size": chunk_size, "device": device_name(where), "steps": steps,
        "constant": _rate(lambda: train_on(constant), batch_size, steps, repeats, where),
    }  # fmt: skip
    report(result)
    two_views = or_reason(lambda: TwoViews(preset, 3, crop_size, output_size, memory_format=torch.channels_last))
    low, high = torch.zeros(3, device=where), torch.full((3,), 65535.0, device=where)
    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as folder:
        screen = random_screen(Path(folder), max(store_cells, batch_size), 1, 3, crop_size)
        for feed in feeds:
            if isinstance(two_views, dict):
                result[feed] = two_views
                continue

            def fed(feed: str = feed) -> dict[str, Any]:
                loader = Loader(screen, batch_size, drop_last=True, device=where, feed=feed)
                batches, seeds = _endless(loader), count()

                def one() -> None:
                    train_on(step.views(two_views, next(batches).crops, low, high, seed=next(seeds)))

                rate = _rate(one, batch_size, steps, repeats, where)
                rate["notes"] = list(loader.notes)
                rate["fraction"] = rate["cells_per_second"] / result["constant"]["cells_per_second"]
                batches.close()
                loader.close()
                return rate

            result[feed] = or_reason(fed)
            report(result)
        if not isinstance(two_views, dict):
            crops = torch.from_numpy(np.array(screen.plates[0].crops()[:batch_size])).to(where)
            seeds = count()
            views = or_reason(
                lambda: _rate(lambda: two_views(crops, low, high, seed=next(seeds)), batch_size, steps, repeats, where)
            )
            result["augment"] = views
            if "cells_per_second" in views:
                result["augment_share"] = result["constant"]["cells_per_second"] / views["cells_per_second"]
    if where.type == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated(where)
    return result


def measure_embedding(
    *, encoder: str = "resnet50", batch_size: int = 2048, crop_size: int = 112, output_size: int = 96, store_cells: int = 32768,
    repeats: int = 3, device: str = "cuda", amp: bool = True, compile: bool = False,
    report: Callable[[Any], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Cells per second from resident uint16 cells to features h in host memory, and of the encoder on a constant tensor.

    Both as `cellfast embed` runs it (`cellfast.embedding.encoder.CropEncoder`): BatchNorm folded into the convolutions.
    """
    from cellfast.embedding.encoder import CropEncoder
    from cellfast.model_file import LoadedModel, ModelMetadata
    from cellfast.models import ModelConfig, build_model

    tune_malloc()
    where = torch.device(device)
    torch.backends.cudnn.benchmark = True
    names = ["a", "b", "c"]
    metadata = ModelMetadata(
        channel_names=names, crop_size=crop_size, output_size=output_size, bits=16, scaling="screen", low=[0.0] * 3, high=[65535.0] * 3,
        training_data="", step=0, git_commit="",
    )  # fmt: skip
    loaded = LoadedModel(build_model(ModelConfig(encoder=encoder), seed=0), metadata, Path("random"), "")
    crop_encoder = CropEncoder(loaded, device=where, amp=amp, compile=compile)
    low, high = loaded.low.to(where), loaded.high.to(where)
    features = torch.empty((batch_size, crop_encoder.num_features), pin_memory=where.type == "cuda")

    def keep(h: torch.Tensor) -> None:
        features[: len(h)].copy_(h, non_blocking=True)

    @torch.inference_mode()
    def bare() -> None:
        keep(crop_encoder._run(constant).float())

    steps = max(1, store_cells // batch_size)
    constant = torch.rand(batch_size, 3, output_size, output_size, device=where).to(memory_format=torch.channels_last)
    result: dict[str, Any] = {
        "encoder": encoder, "batch_size": batch_size, "output_size": output_size, "amp": amp, "compile": compile,
        "device": device_name(where), "constant": _rate(bare, batch_size, steps, repeats, where),
    }  # fmt: skip
    report(result)
    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as folder:
        screen = random_screen(Path(folder), max(store_cells, batch_size), 1, 3, crop_size)
        loader = Loader(screen, batch_size, shuffle=False, drop_last=True, device=where, feed="resident")
        batches = _endless(loader)
        result["resident"] = _rate(
            lambda: keep(crop_encoder.launch(next(batches).crops, low, high)), batch_size, steps, repeats, where
        )
        result["fraction"] = result["resident"]["cells_per_second"] / result["constant"]["cells_per_second"]
        batches.close()
        loader.close()
    return result


def _constant_views(batch_size: int, size: int, device: torch.device, chunk_size: int | None) -> Any:
    views = torch.rand(2 * batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    if chunk_size is None:
        return views
    from cellfast.training.gradient_cache import ViewPieces

    class Constant(ViewPieces):
        def __init__(self) -> None:
            edges = np.linspace(0, batch_size, -(-batch_size // chunk_size) + 1).round().astype(int).tolist()
            self.num_cells, self.cells = batch_size, [slice(a, b) for a, b in pairwise(edges)]

        def __getitem__(self, piece: int) -> torch.Tensor:
            cells = self.cells[piece]
            return views[2 * cells.start : 2 * cells.stop]

    return Constant()


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _rate(run: Callable[[], Any], cells: int, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    def many() -> None:
        for _ in range(steps):
            run()

    seconds = median_seconds(many, repeats, device)
    return {"cells_per_second": cells * steps / seconds, "ms_per_step": 1e3 * seconds / steps}
