"""The device path: the fed training step compared with the same step on a constant tensor, embedding from resident cells, decoding of fields.

Runs of many steps are timed with one wait at the end, as training runs; nothing is read back in between.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellfast.benchmark.loader import random_screen
from cellfast.data import Batch, Loader, tune_malloc
from cellfast.screens.cutting import crop_origins, cut_crops
from cellfast.screens.images import read_plane


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
        "compile": compile, "cuda_graphs": cuda_graphs, "chunk_size": chunk_size, "device": _device_name(where), "steps": steps,
        "constant": _rate(lambda: train_on(constant), batch_size, steps, repeats, where),
    }  # fmt: skip
    report(result)
    two_views = _or_reason(lambda: TwoViews(preset, 3, crop_size, output_size, memory_format=torch.channels_last))
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

            result[feed] = _or_reason(fed)
            report(result)
        if not isinstance(two_views, dict):
            crops = torch.from_numpy(np.array(screen.plates[0].crops()[:batch_size])).to(where)
            seeds = count()
            views = _or_reason(
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
        "device": _device_name(where), "constant": _rate(bare, batch_size, steps, repeats, where),
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


def measure_decode(
    *, fields: int = 48, channels: int = 3, height: int = 1024, width: int = 1280, cells_per_field: int = 100, crop_size: int = 112,
    compressions: Sequence[str] = ("none", "lzw", "zlib"), decodes: Sequence[str] | None = None, threads: Sequence[int] = (1, 2),
    repeats: int = 3, device: str = "auto", report: Callable[[Any], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Fields per second (``channels`` 16-bit TIFFs each) from encoded bytes in HDF5 to the device, decoded and with their cells cut.

    Per compression, way of decoding and number of host threads; ``per_thread`` = fields/s / threads, ``per_core`` = fields per second of
    processor time of all threads together. Pixels are checked against the written ones first. ``decodes``: ``host`` (tifffile on as many
    threads, as `cellfast embed --decode host` reads), ``cpu`` (DALI on the host), ``mixed`` (DALI with the GPU's decoders); None: all
    that the device has. ``device`` auto: a GPU where there is one.
    """
    import tifffile

    from cellfast.data.device_fields import DeviceFieldCells, FieldDecoder
    from cellfast.screens.field_store import EncodedFields, store_url, write_field_store

    tune_malloc()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    decodes = decodes or (("host", "cpu", "mixed") if device == "cuda" else ("host", "cpu"))
    where, rng, rows = torch.device(device), np.random.default_rng(0), []
    # Smooth with noise and, as from many cameras, 12 significant bits: compressible like a field, not like random bytes.
    small = rng.integers(0, 3000, (8, height // 16 + 1, width // 16 + 1))
    planes = [
        (np.kron(s, np.ones((16, 16), int))[:height, :width] + rng.integers(0, 64, (height, width))).astype(np.uint16) * 16
        for s in small
    ]
    centers = np.stack(
        (rng.uniform(0, width - 1, fields * cells_per_field), rng.uniform(0, height - 1, fields * cells_per_field)), 1
    )
    field_index = np.repeat(np.arange(fields), cells_per_field)
    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as folder:
        for compression in compressions:
            paths = []
            for number, plane in enumerate(planes):
                paths.append(Path(folder) / f"{compression}{number}.tif")
                tifffile.imwrite(paths[-1], plane, compression=None if compression == "none" else compression)
            files = [[paths[(f * channels + c) % len(paths)] for c in range(channels)] for f in range(fields)]
            store = Path(folder) / f"{compression}.h5"
            names = [[f"{f}_{c}.tif" for c in range(channels)] for f in range(fields)]
            write_field_store(store, files, names=names)
            source = EncodedFields(store)
            urls = [[f"{store_url(store)}/{name}" for name in field] for field in names]
            for decode in decodes:
                for number in threads:

                    def one(decode: str = decode, number: int = number, source: Any = source, urls: Any = urls) -> dict[str, Any]:
                        groups = [np.arange(a, min(a + 8, fields)) for a in range(0, fields, 8)]
                        if decode == "host":
                            decoder: Any = _HostDecoder(urls, number, where)
                            cut = partial(decoder.cut, field_index, centers, crop_size)
                        else:
                            decoder = FieldDecoder(source, device=where, decode=decode, num_threads=number)
                            cut = DeviceFieldCells(decoder, field_index, centers, crop_size, border="reflect").run
                        (first,) = decoder.run([np.array([0])])
                        for channel in range(channels):
                            if not np.array_equal(first[0][channel].cpu().numpy(), planes[channel % len(planes)]):
                                raise RuntimeError("decoded pixels differ from the written ones; nothing was timed")
                        before = time.process_time()
                        seconds = _seconds(lambda: _use(decoder.run(groups)), repeats, where)
                        per_core = fields * (repeats + 1) / (time.process_time() - before)
                        return {
                            "decode_fields_per_second": fields / seconds,
                            "per_core": per_core,
                            "decode_and_cut_fields_per_second": fields / _seconds(lambda: _use(cut()), repeats, where),
                        }

                    row = {"compression": compression, "decode": decode, "threads": number, **_or_reason(one)}
                    if "decode_fields_per_second" in row:
                        row["per_thread"] = row["decode_fields_per_second"] / number
                    rows.append(row)
                    report({"rows": rows})
            source.close()
    return {"device": _device_name(where), "fields": fields, "channels": channels, "height": height, "width": width, "rows": rows}


class _HostDecoder:
    """Fields decoded by tifffile on ``threads`` threads, as the readers of an embedding run do it."""

    def __init__(self, files: Sequence[Sequence[str]], threads: int, device: torch.device) -> None:
        self._files, self._pool, self._device = files, ThreadPoolExecutor(threads), device

    def _fields(self, group: np.ndarray) -> Iterator[list[np.ndarray]]:
        yield from self._pool.map(lambda index: [read_plane(file) for file in self._files[index]], group.tolist())

    def run(self, groups: Sequence[np.ndarray]) -> Iterator[Any]:
        """Each group as a tensor [n, C, H, W] on the GPU; on a CPU as its planes [n][C], which nothing needs side by side."""
        for group in groups:
            fields = list(self._fields(group))
            if self._device.type == "cuda":
                planes = torch.from_numpy(np.stack([np.stack(field) for field in fields]))
                yield planes.pin_memory().to(self._device, non_blocking=True)
            else:
                yield [[torch.from_numpy(plane) for plane in field] for field in fields]

    def cut(self, field_index: np.ndarray, centers: np.ndarray, crop_size: int) -> Iterator[torch.Tensor]:
        """The crops of each field, cut on the host."""
        origins = crop_origins(centers[:, 1], centers[:, 0], crop_size)
        for index, planes in enumerate(self._fields(np.arange(len(self._files)))):
            crops = torch.from_numpy(cut_crops(planes, origins[field_index == index], crop_size, border="reflect"))
            yield crops.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else crops


def _use(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


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


def _or_reason(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def _seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 1):  # the first is the warm-up
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _rate(run: Callable[[], Any], cells: int, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    def many() -> None:
        for _ in range(steps):
            run()

    seconds = _seconds(many, repeats, device)
    return {"cells_per_second": cells * steps / seconds, "ms_per_step": 1e3 * seconds / steps}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
