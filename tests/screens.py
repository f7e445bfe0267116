"""Small screens of known content and the ways the tests use the package: fields, crop stores, models, commands.

torch is imported where it is used: processes that a test starts import this file too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import tifffile
from click.testing import CliRunner

from cellfast.cli import cellfast
from cellfast.errors import CellfastError
from cellfast.metadata.batches import batch_of_plate
from cellfast.screens import PlateWriter
from cellfast.screens.crop_writer import plate_file_name
from cellfast.screens.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent
# Fields: their size, and the crops and views that are cut from them, in px.
HEIGHT, WIDTH, CROP, VIEW = 60, 80, 24, 16
CHANNELS = ("DNA", "Actin")
# Crop stores for training have three channels and crops of the same size.
STORE_CHANNELS = ("DNA", "Tubulin", "Actin")
SMALL = {
    "encoder": "cnn4",
    "batch_size": 16,
    "output_size": VIEW,
    "projection_dim": 8,
    "device": "cpu",
    "validation_cells": 16,
    "threads": 1,
}
# Pixels of a raw plate begin here, in bytes.
HEADER = 4096


# Commands


def run(*arguments):
    """The result of a ``cellfast`` command in this process."""
    return CliRunner().invoke(cellfast, [str(a) for a in arguments])


def torchrun(*arguments, processes=2):
    """What came of ``torchrun`` with the arguments: ``-m cellfast ...`` or a script, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, timeout=300)


# Fields and what is embedded of them


def make_fields(
    folder, *, plates=("P1", "P2"), wells=("B03", "A02", "A10"), sites=2, cells=7, seed=0, channels=CHANNELS, dtype=np.uint16
):
    """Fields, load_data.csv and centroid CSVs; wells out of order, cells at the border, one field without cells."""
    rng = np.random.default_rng(seed)
    rows = []
    for plate in plates:
        for number, well in enumerate(wells):
            for site in range(1, sites + 1):
                row = {"Metadata_Plate": plate, "Metadata_Well": well, "Metadata_Site": site}
                row |= {"Metadata_Compound": "DMSO" if number == 0 else f"c{number}", "Metadata_Concentration": 0.5 * number}
                for channel in channels:
                    path = folder / "images" / plate / f"{well}_s{site}_{channel}.tif"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    top = 250 if dtype == np.uint8 else 60000
                    tifffile.imwrite(path, rng.integers(0, top, (HEIGHT, WIDTH)).astype(dtype))
                    row |= {f"FileName_{channel}": path.name, f"PathName_{channel}": plate}
                rows.append(row)
                count = 0 if (number, site) == (1, 2) else cells + number
                centers = pd.DataFrame(
                    {
                        "ObjectNumber": np.arange(1, count + 1),
                        "Nuclei_Location_Center_X": rng.uniform(-0.4, WIDTH - 0.6, count),
                        "Nuclei_Location_Center_Y": rng.uniform(-0.4, HEIGHT - 0.6, count),
                    }
                )
                place = folder / "locations" / plate / f"{well}-{site}-Nuclei.csv"
                place.parent.mkdir(parents=True, exist_ok=True)
                centers.to_csv(place, index=False)
    pd.DataFrame(rows).to_csv(folder / "load_data.csv", index=False)
    return folder


def draw_nuclei(folder):
    """Bright discs of 8 px on a dark background in place of the DNA planes: cells that detection finds."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for number, path in enumerate(sorted((folder / "images").rglob("*_DNA.tif"))):
        noise = np.random.default_rng(number).integers(0, 100, (HEIGHT, WIDTH))
        discs = sum((((y - cy) ** 2 + (x - cx) ** 2) < 16) for cy, cx in ((20, 20), (40, 30 + number), (25, 60)))
        tifffile.imwrite(path, (noise + 20_000 * discs).astype(np.uint16))


def field_arguments(folder, table="load_data.csv"):
    return [folder / table, "--image-root", folder / "images", "--locations", folder / "locations"]


def make_model(path, *, channels=CHANNELS, crop=CROP, view=VIEW, scaling="screen", bits=16, seed=0, encoder="cnn4"):
    from cellfast.model_file import ModelMetadata, save_model
    from cellfast.models import ModelConfig, build_model

    model = build_model(ModelConfig(encoder=encoder, num_channels=len(channels), projection_dim=8), seed=seed)
    top = 255.0 if bits == 8 else 60000.0
    save_model(
        path,
        model,
        ModelMetadata(
            list(channels), crop, view, bits, scaling, [100.0 / (65 if bits == 8 else 1)] * len(channels), [top] * len(channels)
        ),
    )
    return path


def embed(source, folder, out, *more, model="model.pt", exit_code=0):
    arguments = field_arguments(folder) if source == "fields" else [source]
    result = run("embed", *arguments, "--model", folder / model, "-o", out, *more)
    if exit_code is not None:
        assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return result


def tables(folder):
    return {p.stem: pq.read_table(p).to_pandas() for p in sorted(Path(folder).glob("*.parquet"))}


def assert_same(one, two, rtol=1e-4, atol=1e-5):
    assert one.keys() == two.keys()
    assert one
    for plate in one:
        pd.testing.assert_frame_equal(one[plate], two[plate], rtol=rtol, atol=atol)


# Crop stores and training


def write_crops(folder, plate, fields, *, capacity=None, channels=STORE_CHANNELS, **options):
    """A plate of a crop store: ``fields`` are crops [n, C, s, s] and what `PlateWriter.append_field` is told of them, if not the usual."""
    path = folder / "plates" / plate_file_name(plate)
    first = fields[0][0]
    capacity = sum(len(crops) for crops, _ in fields) if capacity is None else capacity
    options = {"batch": batch_of_plate(plate), "border": "pad", **options}
    with PlateWriter(
        path, plate=plate, channel_names=channels, crop_size=first.shape[-1], dtype=first.dtype, capacity=capacity, **options
    ) as writer:
        for crops, told in fields:
            n = len(crops)
            usual = {"well": "A01", "site": 1, "compound": "DMSO", "concentration": 0.0, "moa": "", "object_number": np.arange(n)}
            usual |= {"center_y": np.zeros(n), "center_x": np.zeros(n), "padded": np.zeros(n, bool)}
            writer.append_field(crops, **{**usual, **told})
    Ledger("test", "", {}, []).write(folder)
    return path


def write_plate(
    folder,
    plate="Week1_22123",
    *,
    capacity=None,
    dtype=np.uint16,
    channels=CHANNELS,
    seed=0,
    fields=(("B02", 1, 5), ("C03", 2, 3)),
):
    """A plate of random pixels with fields of (well, site, cells), and its pixels; B02 is the control, the others are taxol."""
    rng = np.random.default_rng(seed)
    written = []
    for well, site, n in fields:
        crops = rng.integers(0, np.iinfo(dtype).max, (n, len(channels), 16, 16)).astype(dtype)
        told = {"well": well, "site": site, "image_number": 10 + site, "source_files": [f"{c}.tif" for c in channels]}
        if well == "B02":
            told |= {"moa": "DMSO"}
        else:
            told |= {"compound": "taxol", "concentration": 0.3, "moa": "Microtubule stabilizers"}
        told |= {"object_number": np.arange(1, n + 1), "center_y": np.arange(n) + 0.5, "center_x": np.arange(n) + 100.25}
        written.append((crops, {**told, "padded": np.arange(n) == 0}))
    path = write_crops(folder, plate, written, capacity=capacity, channels=channels, pixel_size_um=0.65)
    return path, np.concatenate([crops for crops, _ in written])


def make_screen(folder, channels=STORE_CHANNELS):
    """Two plates of 48 cells, a plate a batch: DMSO, a and b in two wells each, brighter from one to the next."""
    rng = np.random.default_rng(0)
    for plate in ("Week1_1", "Week2_1"):
        fields = []
        for number in range(6):
            compound = ("DMSO", "a", "b")[number // 2]
            crops = rng.normal(1000 + 200 * (number // 2), 100, (8, len(channels), CROP, CROP)).clip(0).astype(np.uint16)
            told = {
                "well": f"B{number + 1:02d}",
                "compound": compound,
                "concentration": float(number // 2),
                "moa": compound.upper(),
            }
            fields.append((crops, told))
        write_crops(folder, plate, fields, channels=channels)
    return folder


def go(screen, run, *, resume=False, force=False, **values):
    from cellfast.training.config import TrainConfig
    from cellfast.training.loop import train

    return train(screen, run, TrainConfig(**{**SMALL, **values}), resume=resume, force=force, say=lambda text: None)


def weights(run):
    from cellfast.model_file import load_model

    return load_model(run).model.state_dict()


# What the loaders use of a screen


def raw_plate(path: Path, crops: np.ndarray, offset: int) -> SimpleNamespace:
    sums = [zlib.crc32(crop) for crop in crops]

    def check(rows, read):
        if bad := [int(row) for row, crop in zip(rows, read, strict=True) if zlib.crc32(crop) != sums[row]]:
            raise CellfastError(f"{path.stem}: damaged rows {bad}")

    return SimpleNamespace(
        path=path, crops=lambda: crops, num_cells=len(crops), plate=path.stem, offset=offset, check=check,
        cut_short=lambda: CellfastError(f"{path.stem} was cut short"),
    )  # fmt: skip


def raw_screen(folder: Path, counts=(7, 0, 12, 4), channels: int = 2, size: int = 9, dtype=np.uint16) -> SimpleNamespace:
    """What the loader uses of a Screen, over raw files: pixels are random, so that a wrong row cannot pass for a right one."""
    rng = np.random.default_rng(0)
    plates = []
    for number, count in enumerate(counts):
        path = folder / f"plate{number}.bin"
        pixels = rng.integers(0, np.iinfo(dtype).max, (count, channels, size, size), dtype=dtype)
        path.write_bytes(b"\0" * HEADER + pixels.tobytes())
        crops = np.memmap(path, dtype, "r", HEADER, pixels.shape) if count else np.empty(pixels.shape, dtype)
        plates.append(raw_plate(path, crops, HEADER))
    return SimpleNamespace(
        plates=plates, channel_names=[f"c{i}" for i in range(channels)], crop_size=size, dtype=np.dtype(dtype),
        num_cells=sum(counts), offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
    )  # fmt: skip


def all_crops(screen) -> np.ndarray:
    return np.concatenate([np.asarray(plate.crops()) for plate in screen.plates])


def collect(loader) -> tuple[np.ndarray, np.ndarray]:
    crops, rows = [], []
    for batch in loader:
        crops.append(batch.crops.numpy().copy())
        rows.append(batch.rows.numpy())
    return np.concatenate(crops), np.concatenate(rows)
