"""Embedding: cells per second from fields and from the crop store compared with the bare encoder, peak memory, two processes, resuming."""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellfast.data.malloc import tune_malloc
from cellfast.errors import CellfastError
from cellfast.model_file import ModelMetadata, load_model, save_model
from cellfast.models import ModelConfig, build_model

CHANNELS = ("DNA", "Actin", "Tubulin")


def measure_embed(
    *,
    encoder: str = "resnet18",
    stem: str = "imagenet",
    fields: int = 24,
    cells_per_field: int = 64,
    field_size: tuple[int, int] = (1024, 1280),
    crop_size: int = 112,
    output_size: int = 96,
    batch_size: int = 256,
    repeats: int = 3,
    amp: bool = False,
    device: str = "cpu",
    processes: bool = True,
) -> dict[str, Any]:
    """Embed the same cells from uncompressed 16-bit TIFFs of BBBC021's size and from their crop store, turn by turn with the encoder
    alone on a constant minibatch.

    ``fraction`` = rate of the whole job / rate of the bare encoder. The whole job includes the parquet files and the ledger, not
    starting Python and loading the model. Before anything is timed both ways must give the same rows.
    """
    tune_malloc()
    where = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_screen(root, fields, cells_per_field, field_size, crop_size)
        model_path = root / "model.pt"
        _save(model_path, encoder, stem, crop_size, output_size)
        model = load_model(model_path, where)
        job = _Job(root, model, batch_size, amp, where)
        job.fields("check-fields")
        job.store("check-store")
        difference = _largest_difference(root / "check-fields", root / "check-store")
        x = torch.rand(batch_size, len(CHANNELS), output_size, output_size).to(where, memory_format=torch.channels_last)

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(4):
                with torch.autocast(where.type, dtype=torch.bfloat16, enabled=amp):
                    model.model.encode(x).float().cpu()

        count = fields * cells_per_field
        ways: dict[str, tuple[Callable[[], Any], int]] = {
            "bare encoder": (bare, 4 * batch_size),
            "crop store": (lambda: job.store("store"), count),
            "fields": (lambda: job.fields("fields"), count),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            model.model.encode(x)  # the other ways were run once for the comparison
        # Turn by turn, so that a disturbance of the machine meets all of them.
        for _ in range(repeats):
            for name, (run, _) in ways.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
        rates = {name: ways[name][1] / statistics.median(values) for name, values in times.items()}
        best = {name: ways[name][1] / min(values) for name, values in times.items()}
        stages = job.fields("stages").stages
        result = {
            "encoder": encoder,
            "stem": stem,
            "batch_size": batch_size,
            "crop_size": crop_size,
            "output_size": output_size,
            "fields": fields,
            "cells": count,
            "amp": amp,
            "device": device,
            "threads": torch.get_num_threads(),
            "largest_difference_fields_store": difference,
            "cells_per_second": rates,
            "fraction_of_bare": {name: rates[name] / rates["bare encoder"] for name in ("crop store", "fields")},
            "fraction_of_bare_best_times": {name: best[name] / best["bare encoder"] for name in ("crop store", "fields")},
            "fields_per_second": rates["fields"] / cells_per_field,
            "busy_seconds_by_stage_from_fields": stages,
            "seconds": times,
            "resume": _measure_resume(job),
        }
        if processes:
            result["processes"] = _measure_processes(root, model_path, batch_size, count)
    return result


class _Job:
    """Embeds the benchmark's screen into fresh folders."""

    def __init__(self, root: Path, model: Any, batch_size: int, amp: bool, device: torch.device) -> None:
        from cellfast.screens import Screen
        from cellfast.screens.ingest_fields import FieldIngestOptions, ingest_fields

        self.root, self.model, self.device = root, model, device
        self.options: dict[str, Any] = {"batch_size": batch_size, "amp": amp, "force": True}
        self.opened = open_screen(root)
        ingest_fields(
            self.opened.table,
            self.opened.locations,
            root / "screen",
            FieldIngestOptions(crop_size=model.crop_size),
            show_progress=False,
        )
        self.screen = Screen.open(root / "screen")

    def fields(self, out: str, **options: Any) -> Any:
        from cellfast.embedding.embed import embed_fields

        asked = {**self.options, **options}
        return embed_fields(self.opened, self.model, self.root / out, device=self.device, show_progress=False, **asked)

    def store(self, out: str) -> Any:
        from cellfast.embedding.embed import embed_screen

        return embed_screen(self.screen, self.model, self.root / out, device=self.device, show_progress=False, **self.options)


def make_screen(root: Path, fields: int, cells: int, size: tuple[int, int], crop_size: int) -> None:
    """Two plates of fields of noise as TIFFs, a load_data table and centroid CSVs; no crop reaches over the edge."""
    import pandas as pd
    import tifffile

    rng = np.random.default_rng(0)
    rows = []
    for number in range(fields):
        plate, well, site = (
            f"P{number % 2 + 1}",
            f"{'ABCDEFGH'[number // 2 // 4 % 8]}{number // 2 // 32 + 1:02d}",
            number // 2 % 4 + 1,
        )
        row: dict[str, Any] = {"Metadata_Plate": plate, "Metadata_Well": well, "Metadata_Site": site}
        (root / "images" / plate).mkdir(parents=True, exist_ok=True)
        (root / "locations" / plate).mkdir(parents=True, exist_ok=True)
        for channel in CHANNELS:
            name = f"{well}_s{site}_{channel}.tif"
            tifffile.imwrite(root / "images" / plate / name, rng.integers(0, 4096, size, dtype=np.uint16))
            row |= {f"FileName_{channel}": name, f"PathName_{channel}": plate}
        rows.append(row)
        half = crop_size // 2 + 1
        centers = {
            "ObjectNumber": np.arange(1, cells + 1),
            "Location_Center_X": rng.uniform(half, size[1] - half, cells),
            "Location_Center_Y": rng.uniform(half, size[0] - half, cells),
        }
        pd.DataFrame(centers).to_csv(root / "locations" / plate / f"{well}-{site}-Nuclei.csv", index=False)
    pd.DataFrame(rows).to_csv(root / "load_data.csv", index=False)


def open_screen(root: Path) -> Any:
    """The fields of `make_screen`."""
    from cellfast.screens.fields import open_fields

    return open_fields(root / "load_data.csv", image_root=root / "images", locations=root / "locations")


def _save(path: Path, encoder: str, stem: str, crop_size: int, output_size: int) -> None:
    model = build_model(ModelConfig(encoder=encoder, stem=stem, num_channels=len(CHANNELS)), seed=0)
    bounds = [0.0] * len(CHANNELS), [4096.0] * len(CHANNELS)
    save_model(path, model, ModelMetadata(list(CHANNELS), crop_size, output_size, 16, "screen", *bounds))


def _largest_difference(one: Path, two: Path) -> float:
    import pyarrow.parquet as pq

    largest = 0.0
    for path in sorted(one.glob("*.parquet")):
        a, b = pq.read_table(path).to_pandas(), pq.read_table(two / path.name).to_pandas()
        names = [name for name in a if name.startswith("h")]
        metadata = [name for name in a if name not in names]
        if not a[metadata].equals(b[metadata]):
            raise CellfastError(f"{path.name}: fields and crop store give different rows; nothing is timed")
        largest = max(largest, float(np.abs(a[names].to_numpy() - b[names].to_numpy()).max()))
    if largest > 1e-3:
        raise CellfastError(f"fields and crop store give features that differ by {largest:g}; nothing is timed")
    return largest


def _measure_resume(job: _Job) -> dict[str, float]:
    """Stop a run after half of its minibatches; then the time until the next run encodes again, and a run with nothing left to do."""
    from cellfast.embedding.encoder import CropEncoder

    real, state = CropEncoder._encode, {"left": 10**9, "first": 0.0}

    def stopping(self: CropEncoder, *arguments: Any) -> torch.Tensor:
        state["first"] = state["first"] or time.perf_counter()
        if state["left"] == 0:
            raise KeyboardInterrupt
        state["left"] -= 1
        return real(self, *arguments)

    CropEncoder._encode = stopping  # type: ignore[method-assign]
    try:
        batches = -(-job.screen.num_cells // job.options["batch_size"])
        state["left"] = batches // 2
        try:
            job.fields("resumed")
        except KeyboardInterrupt:
            pass
        state.update(left=10**9, first=0.0)
        began = time.perf_counter()
        cells = job.fields("resumed", force=False)
        until_encoding, whole = state["first"] - began, time.perf_counter() - began
    finally:
        CropEncoder._encode = real  # type: ignore[method-assign]
    began = time.perf_counter()
    job.fields("resumed", force=False)
    return {
        "stopped_after_share": batches // 2 / batches,
        "seconds_until_encoding_again": until_encoding,
        "seconds_for_the_rest": whole,
        "seconds_with_nothing_left": time.perf_counter() - began,
        "cells": float(cells.cells),
    }


def _measure_processes(root: Path, model_path: Path, batch_size: int, cells: int) -> dict[str, Any]:
    """Rates of 1 and 2 processes of one thread each over the same fields, and the peak memory of each process."""
    context = multiprocessing.get_context("spawn")
    out: dict[str, Any] = {}
    for world in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        barrier, told = context.Barrier(world), context.Queue()
        workers = [
            context.Process(target=_embed_rank, args=(rank, world, port, str(root), str(model_path), batch_size, barrier, told))
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        found = [told.get(timeout=300) for _ in workers]
        for worker in workers:
            worker.join()
        out[f"{world}"] = {
            "cells_per_second": cells / max(seconds for seconds, _, _ in found),
            "peak_memory_mib": max(peak for _, peak, _ in found) / 1024,
            "memory_before_mib": max(before for _, _, before in found) / 1024,
        }
    out["speedup"] = out["2"]["cells_per_second"] / out["1"]["cells_per_second"]
    return out


def _peak_kib() -> int:
    """This process's peak of resident memory; ``ru_maxrss`` would begin with the peak of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _embed_rank(rank: int, world: int, port: int, root: str, model_path: str, batch_size: int, barrier: Any, told: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from cellfast.embedding.embed import embed_fields

    opened = open_screen(Path(root))
    model = load_model(model_path)
    with torch.inference_mode():
        model.model.encode(torch.zeros(2, len(CHANNELS), model.output_size, model.output_size))
    before = _peak_kib()
    barrier.wait()
    began = time.perf_counter()
    embed_fields(opened, model, Path(root) / f"world-{world}", batch_size=batch_size, workers=1, show_progress=False, force=True)
    told.put((time.perf_counter() - began, _peak_kib(), before))
