"""Ready-made crops, one file per cell → crop stores, one per plate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.bounded import load_npy
from cellfast.errors import CellfastError, option
from cellfast.metadata.batches import batches_as_said
from cellfast.screens import schema
from cellfast.screens.crop_index import CropIndex, read_crop_index
from cellfast.screens.crop_writer import PlateWriter
from cellfast.screens.images import ImageError, read_stack
from cellfast.screens.ingest import (
    PlateTask,
    count_unit,
    default_workers,
    ingesting,
    other_plates,
    plate_path,
    run_plates,
    stored_ledger,
)
from cellfast.screens.inputs import FileTimes, crop_inputs, digest
from cellfast.screens.ledger import Ledger, PlateLedger

# Arrays with at most this many values along an axis are taken to have their channels there.
MOST_CHANNELS = 16
PROBED_FILES = 25


class CropError(CellfastError):
    """A crop file that cannot be used; ``reason`` is what the ledger counts it under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_crop(path: str | Path, *, layout: str = "auto", num_channels: int | None = None) -> np.ndarray:
    """Read one crop as uint8 or uint16 [C, H, W] from ``.npy``, TIFF or PNG.

    Args:
        layout: ``HWC``, ``CHW``, ``strip`` (C square channels side by side) or ``auto``: an axis of at most 16 is the channels',
            the last one first (images are HWC more often); two axes are one channel.
        num_channels: channels of a ``strip``; None: as many squares as fit.

    Raises:
        CropError: missing, unreadable, of another type or shape.
    """
    path = Path(path)
    if not path.is_file():
        raise CropError(f"{path}: no such file", "file missing")
    try:
        if path.suffix.lower() == ".npy":
            pixels = load_npy(path)
        else:
            pixels = read_stack(path, colour=True)
    except ImageError as error:
        raise CropError(str(error), "wrong bit depth" if error.reason == "wrong bit depth" else "not readable") from error
    except CellfastError as error:
        raise CropError(str(error), "not readable") from error
    if pixels.dtype.newbyteorder("=") not in schema.PIXEL_DTYPES:
        raise CropError(f"{path}: expected uint8 or uint16 pixels, got {pixels.dtype}", "wrong bit depth")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(_channels_first(pixels, path, layout, num_channels))


def _channels_first(pixels: np.ndarray, path: Path, layout: str, num_channels: int | None) -> np.ndarray:
    if layout == "strip":
        if pixels.ndim == 3 and pixels.shape[2] in (3, 4) and (pixels[..., 0] == pixels[..., 1]).all():
            pixels = pixels[..., 0]
        if pixels.ndim != 2:
            raise CropError(f"{path}: a strip must have two axes, got shape {pixels.shape}", "wrong shape")
        height, width = pixels.shape
        count = num_channels or width // height
        if count < 1 or width != count * height:
            raise CropError(f"{path}: a strip must be C squares side by side, got {height} × {width} px", "wrong shape")
        return pixels.reshape(height, count, height).transpose(1, 0, 2)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise CropError(f"{path}: expected two or three axes, got shape {pixels.shape}", "wrong shape")
    if layout == "CHW":
        return pixels
    if layout == "HWC":
        return pixels.transpose(2, 0, 1)
    # Crops are square: where just one reading makes them so, that is the one.
    if pixels.shape[0] <= MOST_CHANNELS and pixels.shape[1] == pixels.shape[2] != pixels.shape[0]:
        return pixels
    if pixels.shape[2] <= MOST_CHANNELS:
        return pixels.transpose(2, 0, 1)
    if pixels.shape[0] <= MOST_CHANNELS:
        return pixels
    raise CropError(
        f"{path}: cannot tell the channels of shape {pixels.shape}; say {option('layout', 'HWC')} or CHW", "wrong shape"
    )


def _probe(index: CropIndex) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape [C, H, W] and type most of up to 25 files have."""
    positions = np.unique(np.linspace(0, len(index.table) - 1, min(PROBED_FILES, len(index.table))).astype(int))
    seen: dict[tuple[tuple[int, ...], str], int] = {}
    errors = []
    for file in index.table["file"].iloc[positions]:
        try:
            crop = read_crop(file, layout=index.layout)
        except CropError as error:
            errors.append(str(error))
            continue
        key = (crop.shape, crop.dtype.name)
        seen[key] = seen.get(key, 0) + 1
    if not seen:
        raise CellfastError(f"none of {len(positions)} crops tried can be read; check {option('root')}. {'; '.join(errors[:3])}")
    shape, dtype = max(seen, key=lambda key: seen[key])
    if shape[1] != shape[2]:
        raise CellfastError(
            f"{index.table['file'].iloc[0]}: crops must be square, got {shape[1]} × {shape[2]} px with {shape[0]} channels; "
            f"channels side by side need {option('layout', 'strip')}"
        )
    return (shape[0], shape[1], shape[2]), np.dtype(dtype)


def ingest_index(
    index_csv: str | Path,
    screen: str | Path,
    *,
    root: str | Path | None = None,
    layout: str = "auto",
    metadata: str | Path | None = None,
    moa: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    workers: int | None = None,
    **options: Any,
) -> Ledger:
    """`read_crop_index`, then `ingest_crops` with the other ``options``.

    ``workers``: plates done at the same time; None: one per core, for few crops 1.
    """
    index = read_crop_index(index_csv, root=root, layout=layout, metadata=metadata, moa=moa, columns=columns)
    # Starting a worker process takes about as long as reading some thousand crops.
    workers = workers or (default_workers() if len(index.table) > 20_000 else 1)
    return ingest_crops(index, screen, source=str(index_csv), workers=workers, **options)


def ingest_crops(
    index: CropIndex,
    screen: str | Path,
    *,
    channel_names: list[str] | None = None,
    pixel_size_um: float | None = None,
    batch_regex: str | None = None,
    source: str = "",
    strict: bool = False,
    workers: int = 1,
    force: bool = False,
    show_progress: bool = True,
) -> Ledger:
    """Write one crop store per plate from files of one crop each, and the ledger.

    A file that is missing, unreadable or unlike the rest in shape or type is dropped and counted with its reason, unless
    ``strict``.

    Raises:
        CellfastError: nothing readable, crops not square, the wrong number of channel names, a plate made otherwise before.
    """
    screen = Path(screen)
    shape, dtype = _probe(index)
    if channel_names is None:
        channel_names = [f"channel{i + 1}" for i in range(shape[0])]
    if len(channel_names) != shape[0]:
        raise CellfastError(
            f"{option('channels')} names {len(channel_names)} channels ({', '.join(channel_names)}), the crops have {shape[0]}"
        )
    tasks, times = [], FileTimes()
    batches = batches_as_said(zip(index.table["plate"], index.table["batch"]), batch_regex)
    for plate, rows in index.table.groupby("plate", sort=True):
        options = {
            "kind": "crops",
            "channels": channel_names,
            "crop_size": shape[1],
            "pixel_size_um": pixel_size_um,
            "batch": batches[str(plate)],
            "layout": index.layout,
            "crop_table": digest(rows.astype(str).to_numpy().tolist()),
        }
        rows = rows.sort_values(["well", "site", "cell", "file"], kind="stable")
        payload = {"rows": rows, "shape": shape, "dtype": dtype.name, "strict": strict, "layout": index.layout}
        inputs = crop_inputs(zip(rows["well"], rows["site"], rows["file"]), times)
        tasks.append(PlateTask(str(plate), plate_path(screen, str(plate)), len(rows), options, payload, inputs=inputs))
    with ingesting(screen):
        plates, remade = run_plates(
            tasks, ingest_crop_plate, workers=workers, force=force, unit="crops", show_progress=show_progress
        )
        notes = list(index.notes) + [f"{count} rows of the index left out: {reason}" for reason, count in index.dropped.items()]
        notes += [*remade, *other_plates(screen, tasks)]
        ledger = Ledger(
            source=source,
            locations=f"ready-made crops ({index.num_rows} rows)",
            options={"layout": index.layout, "strict": strict, "batch_regex": batch_regex, "pixel_size_um": pixel_size_um},
            plates=plates,
            notes=notes,
        )
        assert index.num_rows == sum(p.cells_found for p in plates) + sum(index.dropped.values())
        ledger.write(screen)
    ledger.check_written(screen)
    return ledger


def ingest_crop_plate(task: PlateTask) -> PlateLedger:
    """Write one plate's crop store from its files and return its ledger; runs in a worker process."""
    work: dict[str, Any] = task.payload
    rows: pd.DataFrame = work["rows"]
    shape, dtype = tuple(work["shape"]), np.dtype(work["dtype"])
    # One field of the ledger is one (well, site): ready-made crops know no images of whole fields.
    groups = list(rows.groupby(["well", "site"], sort=True))
    ledger = PlateLedger(task.plate, fields_listed=len(groups), wells_listed=rows["well"].nunique(), cells_found=len(rows))
    with PlateWriter(
        task.path,
        plate=task.plate,
        batch=task.options["batch"],
        channel_names=task.options["channels"],
        crop_size=shape[1],
        dtype=dtype,
        capacity=len(rows),
        border="ready",
        pixel_size_um=task.options["pixel_size_um"],
        options=task.options,
    ) as writer:
        for (well, site), group in groups:
            crops: list[np.ndarray] = []
            kept: list[Any] = []
            row: Any
            for row in group.itertuples():
                try:
                    crop = read_crop(row.file, layout=work["layout"], num_channels=shape[0])
                    if crop.shape != shape:
                        raise CropError(
                            f"{row.file}: expected [C, H, W] = {list(shape)} as most crops have, got {list(crop.shape)}",
                            "wrong shape",
                        )
                    if crop.dtype != dtype:
                        raise CropError(f"{row.file}: expected {dtype} as most crops have, got {crop.dtype}", "wrong bit depth")
                except CropError as error:
                    if work["strict"]:
                        raise CellfastError(f"{error} ({option('strict', True)} stops here)") from error
                    ledger.drop_cells(error.reason, 1)
                    ledger.refusals.append({"reason": error.reason, "where": f"{well} site {site}", "message": str(error)})
                else:
                    crops.append(crop)
                    kept.append(row)
                count_unit()
            if not kept:
                ledger.fields_refused["no usable crop"] = ledger.fields_refused.get("no usable crop", 0) + 1
                continue
            first = kept[0]
            n = len(kept)
            writer.append_field(
                np.stack(crops),
                well=str(well),
                site=int(str(site)),
                source_files=[str(Path(first.file).parent)] * shape[0],
                compound=first.compound,
                concentration=first.concentration,
                moa=first.moa,
                object_number=np.array([row.cell for row in kept]),
                center_y=np.full(n, np.nan),
                center_x=np.full(n, np.nan),
                padded=np.zeros(n, dtype=bool),
            )
            ledger.fields_written += 1
            ledger.cells_written += n
        written = {well for well, count in zip(writer.well_names, writer.cells_per_well()) if count}
        ledger.wells_without_cells = sorted(set(rows["well"]) - written)
        ledger.check()
        writer.ledger = stored_ledger(ledger, task)
    return ledger
