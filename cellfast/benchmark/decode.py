"""Reading of fields as an embedding run does it: out of a field store, decoded by tifffile or DALI, checked, and cut into cells."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellfast.benchmark.timing import device_name, median_seconds, or_reason
from cellfast.data import tune_malloc
from cellfast.data.device_cutting import cut_on_device
from cellfast.embedding.cells import Cells
from cellfast.embedding.dali_reading import DaliReader
from cellfast.embedding.decoding import Decoding
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.reading import ReaderPool
from cellfast.screens.field_cells import FieldReader
from cellfast.screens.field_store import write_field_store
from cellfast.screens.image_table import read_image_table
from cellfast.screens.locations import open_locations


def measure_decode(
    *, fields: int = 48, channels: int = 3, height: int = 1024, width: int = 1280, cells_per_field: int = 100, crop_size: int = 112,
    compressions: Sequence[str] = ("none", "lzw", "zlib"), decodes: Sequence[str] | None = None, threads: Sequence[int] = (1, 2),
    repeats: int = 3, device: str = "auto", report: Callable[[Any], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Fields per second (``channels`` 16-bit TIFFs each) of ``cellfast embed --image-root FIELDS.h5 --decode host|dali`` up to the encoder.

    Per compression, way of decoding and number of host threads: files read from the store, decoded, checked, cells located
    (``decode_fields_per_second``), and the cells cut where the planes lie (``decode_and_cut_fields_per_second``). ``per_thread`` = fields/s /
    threads, ``per_core`` = fields per second of processor time of all threads together. Where embedding gives DALI no file of a kind
    (Deflate) the row says so (``failed``). Pixels are checked against the written ones first. ``decodes``: ``host``, ``cpu`` (DALI on the host), ``mixed`` (DALI with the GPU's decoders); None: all that the device has.
    ``device`` auto: a GPU where there is one.
    """
    tune_malloc()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    decodes = decodes or (("host", "cpu", "mixed") if device == "cuda" else ("host", "cpu"))
    where, rows = torch.device(device), []
    planes = _planes(height, width)
    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as folder:
        for compression in compressions:
            place = Path(folder) / compression
            source = _write_fields(place, planes, compression, fields, channels, cells_per_field, crop_size)
            for decode in decodes:
                for number in threads:
                    row = {"compression": compression, "decode": decode, "threads": number}
                    row |= or_reason(lambda d=decode, n=number, s=source: _measure(s, d, n, where, repeats, planes[:channels]))
                    if "decode_fields_per_second" in row:
                        row["per_thread"] = row["decode_fields_per_second"] / number
                    rows.append(row)
                    report({"rows": rows})
    return {"device": device_name(where), "fields": fields, "channels": channels, "height": height, "width": width, "rows": rows}


def _planes(height: int, width: int) -> list[np.ndarray]:
    # Smooth with noise and, as from many cameras, 12 significant bits: compressible like a field, not like random bytes.
    rng = np.random.default_rng(0)
    small = rng.integers(0, 3000, (8, height // 16 + 1, width // 16 + 1))
    return [
        (np.kron(s, np.ones((16, 16), int))[:height, :width] + rng.integers(0, 64, (height, width))).astype(np.uint16) * 16
        for s in small
    ]


def _write_fields(
    folder: Path, planes: Sequence[np.ndarray], compression: str, fields: int, channels: int, cells: int, crop_size: int
) -> FieldSource:
    """A field store of ``fields`` fields made of the planes in turn, as `cellfast embed` opens it; the first field has planes 0, 1, …"""
    import tifffile

    folder.mkdir()
    paths = [folder / f"{number}.tif" for number in range(len(planes))]
    for path, plane in zip(paths, planes):
        tifffile.imwrite(path, plane, compression=None if compression == "none" else compression)
    files = [[paths[(f * channels + c) % len(paths)] for c in range(channels)] for f in range(fields)]
    names = [[f"{f}_{c}.tif" for c in range(channels)] for f in range(fields)]
    write_field_store(folder / "FIELDS.h5", files, names=names)
    site = {"Metadata_Plate": "P", "Metadata_Well": "A01", "Metadata_Site": np.arange(fields) + 1}
    images = {f"FileName_C{c}": [field[c] for field in names] for c in range(channels)}
    pd.DataFrame({**site, **images}).to_csv(folder / "images.csv", index=False)
    rng, count = np.random.default_rng(0), fields * cells
    height, width = planes[0].shape
    centers = {
        "Metadata_Plate": "P",
        "Metadata_Well": "A01",
        "Metadata_Site": np.repeat(np.arange(fields) + 1, cells),
        "Nuclei_Location_Center_X": rng.uniform(0, width - 1, count),
        "Nuclei_Location_Center_Y": rng.uniform(0, height - 1, count),
    }
    pd.DataFrame(centers).to_csv(folder / "cells.csv", index=False)
    table = read_image_table(folder / "images.csv", folder / "FIELDS.h5")
    locations = open_locations(str(folder / "cells.csv"), table)
    reader = FieldReader(table.channel_names, locations, None, crop_size, "reflect", (height, width), "uint16")
    return FieldSource(table, reader, crop_size)


def _measure(
    source: FieldSource, decode: str, threads: int, device: torch.device, repeats: int, first: Sequence[np.ndarray]
) -> dict[str, Any]:
    decoding = Decoding(decode, "host" if decode == "host" else "dali", "" if decode == "host" else decode, "", threads)
    reader: Any
    if decode == "host":
        reader = ReaderPool(source, threads, "threads")
    else:
        reader = DaliReader(source, threads, decoding, device)
    units = [unit for plan in source.plans for block in plan.blocks for unit in source.units(block)]

    def fields() -> Iterator[Cells]:
        return (cells for _, cells in reader.cells(enumerate(units)))

    try:
        (_, cells), *_ = reader.cells([(0, units[0])])
        found = [torch.as_tensor(plane).cpu().numpy() for plane in cells.planes]
        if len(found) != len(first) or not all(map(np.array_equal, found, first)):
            raise RuntimeError("decoded pixels differ from the written ones; nothing was timed")
        if decode != "host" and not decoding.fields_dali:
            raise RuntimeError(
                f"DALI is given no file of this kind: the host decodes it ({decoding.failure or 'its damage would not show'})"
            )
        before = time.process_time()
        seconds = median_seconds(lambda: [None for _ in fields()], repeats, device)
        per_core = len(units) * (repeats + 1) / (time.process_time() - before)
        return {
            "decode_fields_per_second": len(units) / seconds,
            "per_core": per_core,
            "decode_and_cut_fields_per_second": len(units)
            / median_seconds(lambda: [_cut(cells, device) for cells in fields()], repeats, device),
        }
    finally:
        reader.close()


def _cut(cells: Cells, device: torch.device) -> None:
    """The crops of a field, where an embedding run cuts them: on the host for the CPU, on the GPU for a GPU."""
    assert cells.planes is not None
    assert cells.origins is not None
    if device.type == "cpu":
        cells.fill(np.empty((cells.count, len(cells.planes), cells.size, cells.size), np.uint16), 0, cells.count)
        return
    # Few operations know uint16.
    planes = torch.stack([torch.as_tensor(plane).view(torch.int16).to(device) for plane in cells.planes]).view(torch.uint16)
    cut_on_device(planes, torch.from_numpy(np.ascontiguousarray(cells.origins)).to(device), cells.size, cells.border)
