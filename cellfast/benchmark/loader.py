"""Cells per second of the loaders on a warm store, compared with a plain copy of the same bytes."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cellfast.benchmark.timing import cell_rate


def measure_loader(
    screen: str | None = None, *, num_cells: int = 20_000, num_plates: int = 4, num_channels: int = 3, crop_size: int = 112,
    batch_size: int = 256, repeats: int = 5, threads: int = 1, dali: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Measure one epoch of each way to read shuffled minibatches; agreement of the pixels is checked first.

    Args:
        screen: a screen's folder; None makes random plates of the given size in a temporary folder.
        repeats: epochs timed of each; the best and the median are given.
        threads: copying threads of the row marked with them.

    Returns:
        ``{"subject", "cells", "bytes_per_cell", "rates": {name: {"best", "median", "repeats"}}, "fraction_of_memcpy"}``, rates in
        cells/s.
    """
    if screen is not None:
        from cellfast.screens import Screen

        return _measure(Screen.open(screen), batch_size, repeats, threads, dali)
    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as folder:
        made = random_screen(Path(folder), num_cells // num_plates, num_plates, num_channels, crop_size)
        return _measure(made, batch_size, repeats, threads, dali)


def random_screen(folder: Path, cells_per_plate: int, num_plates: int, num_channels: int, crop_size: int) -> SimpleNamespace:
    """Plates of random pixels in plain files, with what the loader uses of a Screen."""
    rng = np.random.default_rng(0)
    plates = []
    shape = (cells_per_plate, num_channels, crop_size, crop_size)
    for number in range(num_plates):
        path = folder / f"plate{number}.bin"
        rng.integers(0, 65535, shape, dtype=np.uint16).tofile(path)
        crops = np.memmap(path, np.uint16, "r", 0, shape)
        sums = np.array([zlib.crc32(crop) for crop in crops], np.uint32)
        check = partial(_check, sums)
        plates.append(
            SimpleNamespace(path=path, offset=0, crops=lambda crops=crops: crops, check=check, num_cells=cells_per_plate)
        )
    return SimpleNamespace(
        plates=plates, channel_names=[f"channel{i}" for i in range(num_channels)], crop_size=crop_size, dtype=np.dtype(np.uint16),
        num_cells=cells_per_plate * num_plates, offsets=np.arange(num_plates + 1, dtype=np.int64) * cells_per_plate,
    )  # fmt: skip


def _check(sums: np.ndarray, rows: np.ndarray, crops: np.ndarray) -> None:
    if any(zlib.crc32(crop) != sums[row] for row, crop in zip(rows, crops)):
        raise AssertionError("the loader read other pixels than were written")


def _measure(screen: Any, batch_size: int, repeats: int, threads: int, dali: bool) -> dict[str, Any]:
    from cellfast.data import Loader
    from cellfast.data.gather import RowGather

    batch_size = min(batch_size, *(plate.num_cells for plate in screen.plates))
    gather, many = RowGather(screen), RowGather(screen, threads=max(2, threads))
    buffer = np.empty((batch_size, *gather.row_shape), dtype=gather.dtype)
    sources = [np.asarray(plate.crops()) for plate in screen.plates]
    order = np.random.default_rng(1).permutation(screen.num_cells)
    batches = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]

    def plain_copy() -> int:
        copied = 0
        for source in sources:
            for start in range(0, len(source) - batch_size + 1, batch_size):
                np.copyto(buffer, source[start : start + batch_size])
                copied += batch_size
        return copied

    def gathered(by: RowGather) -> Callable[[], int]:
        def epoch() -> int:
            for rows in batches:
                by.copy(rows, buffer)
            return len(batches) * batch_size

        return epoch

    def loaded(loader: Loader) -> Callable[[], int]:
        return lambda: sum(len(batch.rows) for batch in loader)

    ways: dict[str, Callable[[], int]] = {
        "memcpy of the same bytes, in order": plain_copy,
        "gather, 1 thread": gathered(gather),
        f"gather, {many.threads} threads": gathered(many),
        "Loader mmap": loaded(Loader(screen, batch_size, warm=True)),
        "Loader, 8 threads": loaded(Loader(screen, batch_size, threads=8, warm=False)),
    }
    if dali:
        ways["Loader dali"] = loaded(Loader(screen, batch_size, backend="dali", warm=False))
        agree = zip(Loader(screen, batch_size, seed=2), Loader(screen, batch_size, seed=2, backend="dali"))
        if not all(np.array_equal(a.crops.numpy(), b.crops.numpy()) for a, b in agree):
            raise AssertionError("the loaders disagree on pixels")
    rates = {name: cell_rate(way, repeats, warm_up=True) for name, way in ways.items()}
    memcpy = rates["memcpy of the same bytes, in order"]["best"]
    return {
        "subject": "loader", "cells": screen.num_cells, "bytes_per_cell": gather.row_bytes, "batch_size": batch_size,
        "rates": rates,
        "fraction_of_memcpy": {name: rate["best"] / memcpy for name, rate in rates.items()},
    }  # fmt: skip
