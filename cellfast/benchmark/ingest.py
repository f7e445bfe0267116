"""Cells per second from fields of view to crop stores, compared with only reading the same images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cellfast.benchmark.timing import cell_rate


def measure_ingest(
    *, num_plates: int = 4, sites: int = 4, crop_size: int = 112, workers: tuple[int, ...] = (1, 2), repeats: int = 3,
    detect_fields: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """Measure `cellfast.screens.ingest_fields` on simulated plates of 3-channel 16-bit fields of 1024 × 1280 px; agreement is checked first.

    The agreement: every crop equals the one cut by ``np.pad`` out of ``tifffile.imread``'s plane. The images are warm in memory; the start of
    the worker processes is part of the time.

    Args:
        num_plates: plates, 8 wells each. sites: fields per well.
        workers: numbers of processes to measure.
        repeats: ingests timed of each; the best and the median are given.
        detect_fields: fields whose nuclei are detected instead of read from tables; 0 leaves that out.

    Returns:
        ``{"fields", "cells", "bytes_read", "bytes_written", "rates": {name: {"best", "median", "repeats"}}, "fields_per_second",
        "fraction_of_reading"}``; rates in cells/s.

    Raises:
        AssertionError: a crop differs.
    """
    from cellfast.screens.simulate import SimulationConfig, simulate_screen

    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as name:
        folder = Path(name)
        config = SimulationConfig(
            plates=num_plates, weeks=1, sites=sites, controls=4, compounds_per_moa=2, doses=1, replicates=num_plates,
            moas=("Actin disruptors", "DNA damage"),
        )  # fmt: skip
        simulate_screen(folder / "screen", config)
        return _measure(folder, crop_size, workers, repeats, detect_fields)


def _measure(folder: Path, crop_size: int, workers: tuple[int, ...], repeats: int, detect_fields: int) -> dict[str, Any]:
    from dataclasses import replace

    import tifffile

    from cellfast.screens import Screen
    from cellfast.screens.image_table import read_image_table
    from cellfast.screens.ingest_fields import FieldIngestOptions, ingest_fields
    from cellfast.screens.locations import open_locations

    source = folder / "screen"
    table = read_image_table(source / "image.csv", source / "images")
    located = open_locations(str(source / "locations"), table)
    options = FieldIngestOptions(crop_size)
    few = replace(table, fields=table.fields[:detect_fields])

    def ingest(processes: int, some=table, where=located) -> Callable[[], int]:
        def run() -> int:
            ledger = ingest_fields(
                some,
                where,
                folder / f"out{processes}{len(some.fields)}",
                options,
                workers=processes,
                force=True,
                show_progress=False,
            )
            return ledger.totals()["cells_written"]

        return run

    cells = ingest(1)()
    screen = Screen.open(folder / f"out1{len(table.fields)}")
    _check_crops(screen, crop_size)

    def read() -> int:
        for field in table.fields:
            for file in field.files:
                tifffile.imread(file)
        return cells

    ways: dict[str, Callable[[], int]] = {"tifffile.imread of the same images alone, 1 process": read}
    ways |= {f"ingest fields, {n} worker{'s' if n > 1 else ''}": ingest(n) for n in workers}
    if detect_fields:
        ways[f"ingest fields --locations detect, 1 worker, {len(few.fields)} fields"] = ingest(
            1, few, open_locations("detect", few)
        )
    rates = {name: cell_rate(way, repeats, warm_up=False) for name, way in ways.items()}
    reading = rates["tifffile.imread of the same images alone, 1 process"]["median"]
    return {
        "subject": "ingest",
        "fields": len(table.fields),
        "cells": cells,
        "crop_size": crop_size,
        "bytes_read": sum(Path(file).stat().st_size for field in table.fields for file in field.files),
        "bytes_written": sum(plate.path.stat().st_size for plate in screen.plates),
        "rates": rates,
        "fields_per_second": {
            name: rate["median"] * len(table.fields) / cells for name, rate in rates.items() if "detect" not in name
        },
        "fraction_of_reading": {
            name: rate["median"] / reading for name, rate in rates.items() if "detect" not in name and "imread" not in name
        },
    }


def _check_crops(screen: Any, size: int) -> None:
    import tifffile

    for plate in screen.plates:
        crops, meta, planes = plate.crops(), plate.metadata(), {}
        field = plate._cells["field"]
        for row, (x, y) in enumerate(zip(meta["Metadata_Center_X"], meta["Metadata_Center_Y"])):
            if field[row] not in planes:
                planes = {field[row]: [np.pad(tifffile.imread(f), size) for f in plate.source_files[field[row]]]}
            top, left = int(np.rint(y)) - size // 2 + size, int(np.rint(x)) - size // 2 + size
            for channel, plane in enumerate(planes[field[row]]):
                if not np.array_equal(crops[row, channel], plane[top : top + size, left : left + size]):
                    raise AssertionError(f"plate {plate.plate}, row {row}, channel {channel}: the crop is not the field's pixels")
