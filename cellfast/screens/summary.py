"""What `cellfast info` tells of a screen: counts, sizes, channels, integrity; and a montage of its cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cellfast.atomic import atomic_path
from cellfast.errors import CellfastError
from cellfast.metadata.treatments import is_control
from cellfast.printable import printable
from cellfast.screens.crop_store import PlateStore, Screen


def summarize(screen: Screen) -> dict[str, Any]:
    """Counts of a screen as a JSON-able dict: plates, wells, sites, cells, treatments, MoAs, controls, size, channels."""
    cells = screen.metadata()
    control = cells["Metadata_Compound"].map(is_control).to_numpy(dtype=bool)
    treated = cells[~control & (cells["Metadata_Compound"] != "")]
    place = ["Metadata_Plate", "Metadata_Well"]
    low, high = screen.channel_scaling()
    sizes = sorted({store.pixel_size_um for store in screen.plates if store.pixel_size_um is not None})
    return {
        "path": str(screen.path),
        "plates": len(screen.plates),
        "batches": int(cells["Metadata_Batch"].nunique()),
        "wells": int(sum(len(store.wells()) for store in screen.plates)),
        "wells_with_cells": len(cells[place].drop_duplicates()),
        "fields": int(sum(store.num_fields for store in screen.plates)),
        "cells": screen.num_cells,
        "cells_padded": int(sum(store.padded.sum() for store in screen.plates)),
        "treatments": len(treated[["Metadata_Compound", "Metadata_Concentration"]].drop_duplicates()),
        "compounds": int(treated["Metadata_Compound"].nunique()),
        "moas": int(treated.loc[treated["Metadata_MoA"] != "", "Metadata_MoA"].nunique()),
        "control_wells": len(cells.loc[control, place].drop_duplicates()),
        "control_cells": int(control.sum()),
        "cells_without_compound": int((cells["Metadata_Compound"] == "").sum()),
        "bytes": int(sum(store.path.stat().st_size for store in screen.plates)),
        "dtype": np.dtype(screen.dtype).name,
        "crop_size_px": screen.crop_size,
        "pixel_size_um": sizes[0] if len(sizes) == 1 else None,
        "channels": [
            {"name": n, "scale_low": float(a), "scale_high": float(b)} for n, a, b in zip(screen.channel_names, low, high)
        ],
        "files": [_describe_file(store) for store in screen.plates],
    }


def _describe_file(store: PlateStore) -> dict[str, Any]:
    """Where a plate's pixels lie: ``np.memmap(file, dtype, "r", offset, shape)`` reads them without HDF5."""
    return {
        "plate": store.plate,
        "file": str(store.path),
        "dtype": np.dtype(store.dtype).name,
        "offset": store.offset,
        "shape": [store.num_cells, store.num_channels, store.crop_size, store.crop_size],
        "scale_low": store.scale_low.tolist(),
        "scale_high": store.scale_high.tolist(),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    s = summary
    size = "unknown" if s["pixel_size_um"] is None else f"{s['pixel_size_um']:g} µm"
    lines = [
        f"screen       {s['path']}",
        f"plates       {s['plates']:,} in {s['batches']:,} batches",
        f"wells        {s['wells']:,}"
        + (f" ({s['wells'] - s['wells_with_cells']:,} without cells)" if s["wells"] != s["wells_with_cells"] else ""),
        f"fields       {s['fields']:,}",
        f"cells        {s['cells']:,}" + (f" ({s['cells_padded']:,} padded at the border)" if s["cells_padded"] else ""),
        f"treatments   {s['treatments']:,} of {s['compounds']:,} compounds, {s['moas']:,} MoAs",
        f"controls     {s['control_cells']:,} cells in {s['control_wells']:,} DMSO wells",
    ]
    if s["cells_without_compound"]:
        lines.append(f"             {s['cells_without_compound']:,} cells without a compound")
    lines.append(
        f"crops        {s['crop_size_px']} × {s['crop_size_px']} px, {s['dtype']}, pixel size {size}; {s['bytes'] / 1e6:,.1f} MB"
    )
    lines += [
        f"channel      {c['name']:<16} 0.1–99.9 % of the pixels: {c['scale_low']:g} – {c['scale_high']:g}" for c in s["channels"]
    ]
    return "\n".join(map(printable, lines))


def verify(screen: Screen, progress: Callable[[int], None] | None = None) -> None:
    """Compare every crop of every plate with its checksum; raises `CellfastError` naming all damaged plates."""
    damaged = []
    for store in screen.plates:
        try:
            store.verify()
        except CellfastError as error:
            damaged.append(str(error))
        if progress:
            progress(store.num_cells)
    if damaged:
        raise CellfastError("; ".join(damaged))


def write_montage(screen: Screen, path: str | Path, *, rows: int = 6, columns: int = 8, seed: int = 0) -> None:
    """Write a PNG of ``rows × columns`` cells drawn at random: per cell its channels side by side, each scaled by the screen's
    0.1–99.9 % range."""
    from PIL import Image

    if screen.num_cells == 0:
        raise CellfastError(f"{screen.path}: no cells to show")
    count = min(rows * columns, screen.num_cells)
    chosen = np.sort(np.random.default_rng(seed).choice(screen.num_cells, size=count, replace=False))
    low, high = screen.channel_scaling()
    size, channels = screen.crop_size, len(screen.channel_names)
    cell_height, cell_width = size + 2, channels * (size + 1) + 3
    canvas = np.full((-(-count // columns) * cell_height, columns * cell_width), 64, dtype=np.uint8)
    for position, row in enumerate(chosen):
        plate = int(np.searchsorted(screen.offsets, row, side="right")) - 1
        local = int(row - screen.offsets[plate])
        crop = screen.plates[plate].read(local, local + 1)[0].astype(np.float64)
        scaled = np.clip((crop - low[:, None, None]) / (high - low)[:, None, None], 0, 1) * 255
        top, left = (position // columns) * cell_height, (position % columns) * cell_width
        for channel in range(channels):
            start = left + channel * (size + 1)
            canvas[top : top + size, start : start + size] = scaled[channel].astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(canvas).save(temporary, format="PNG")
