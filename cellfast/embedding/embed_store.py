"""Embeds a screen's crop store: each plate's cells through the encoder, in store order, into one parquet file."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cellfast import __version__
from cellfast.atomic import atomic_path, write_json
from cellfast.augment import center_crop
from cellfast.data.malloc import tune_malloc
from cellfast.errors import CellfastError
from cellfast.model_file import LoadedModel
from cellfast.models import SimCLR
from cellfast.progress import Progress
from cellfast.screens import PlateStore, Screen
from cellfast.screens.crop_writer import plate_file_name

LEDGER_FILE = "embeddings.json"
FEATURES = ("h", "z")
# Stored in each file's schema metadata: what the rows were made from.
ORIGIN_KEY = b"cellfast"


@dataclass(frozen=True)
class EmbedSummary:
    """What an embedding run wrote."""

    cells: int
    plates: int
    plates_kept: int
    num_features: int


class CropEncoder:
    """Crops of one plate → features, in the model's own scaling and window.

    Args:
        model: from `cellfast.load_model`.
        features: ``h`` (encoder output, what is profiled) or ``z`` (projection).
        amp: bfloat16 autocast.
    """

    def __init__(self, model: LoadedModel, *, features: str = "h", device: torch.device, amp: bool = False) -> None:
        if features not in FEATURES:
            raise CellfastError(f"features must be h or z, got {features!r}")
        self.loaded, self.features, self.device, self.amp = model, features, device, amp
        self.network: SimCLR = model.model.to(device).eval()
        self.num_features = self.network.num_features if features == "h" else self.network.config.projection_dim

    def scaling_of(self, store: PlateStore) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high), float32 [C], that the plate's pixels are scaled by."""
        if self.loaded.scaling == "plate":
            return torch.tensor(store.scale_low, dtype=torch.float32), torch.tensor(store.scale_high, dtype=torch.float32)
        return self.loaded.low, self.loaded.high

    @torch.inference_mode()
    def __call__(self, crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Features float32 [B, F] on the CPU of crops uint8 or uint16 [B, C, S, S]."""
        crops = crops.to(self.device, non_blocking=True)
        x = center_crop(
            crops, low.to(self.device), high.to(self.device), self.loaded.output_size, memory_format=torch.channels_last
        )
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            out = self.network.encode(x) if self.features == "h" else self.network(x)[1]
        return out.float().cpu()


def feature_names(features: str, count: int) -> list[str]:
    """``h000 … h511``: as many digits as the last needs, at least three."""
    digits = max(3, len(str(count - 1)))
    return [f"{features}{i:0{digits}d}" for i in range(count)]


def embed_screen(
    screen: Screen,
    model: LoadedModel,
    out: str | Path,
    *,
    features: str = "h",
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    amp: bool = False,
    force: bool = False,
    show_progress: bool = True,
) -> EmbedSummary:
    """Write one parquet file per plate, the metadata columns then one float32 column per feature, a row per cell in store order.

    A plate whose file is there and was made from the same crops by the same model in the same way is kept.

    Args:
        screen: must have the model's channels, crop size and pixel type.
        out: folder for ``<plate>.parquet`` and ``embeddings.json``.
        features: ``h`` or ``z``.
        batch_size: cells per minibatch; changes results by rounding only.

    Raises:
        CellfastError: screen and model do not fit; a file of another model or other crops is in the way (``force`` replaces it).
    """
    if batch_size < 1:
        raise CellfastError(f"--batch-size must be at least 1, got {batch_size}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise CellfastError(f"{out} is a file: expected a folder for the embeddings")
    bits = 8 * np.dtype(screen.dtype).itemsize
    model.check_screen(str(screen.path), screen.channel_names, screen.crop_size, bits)
    tune_malloc()
    encoder = CropEncoder(model, features=features, device=torch.device(device), amp=amp)
    names = feature_names(features, encoder.num_features)
    todo, kept = [], 0
    for store in screen.plates:
        path = out / plate_file_name(store.plate).replace(".h5", ".parquet")
        origin = {"model": model.digest, "crops": store.crc32, "cells": store.num_cells, "features": features, "amp": amp}
        if path.exists() and not force and _is_made_from(path, origin):
            kept += 1
        else:
            todo.append((store, path, origin))
    with Progress("embed", sum(s.num_cells for s, _, _ in todo), "cells", enabled=show_progress and bool(todo)) as progress:
        if kept:
            progress.message(f"embed: {kept} of {len(screen.plates)} plates were embedded before and are kept")
        for store, path, origin in todo:
            _embed_plate(store, encoder, path, origin, names, batch_size, progress)
    _write_ledger(screen, model, out, features, len(names))
    return EmbedSummary(screen.num_cells, len(screen.plates), kept, len(names))


def _embed_plate(
    store: PlateStore,
    encoder: CropEncoder,
    path: Path,
    origin: dict[str, Any],
    names: list[str],
    batch_size: int,
    progress: Progress,
) -> None:
    crops, (low, high) = store.crops(), encoder.scaling_of(store)
    values = np.empty((store.num_cells, len(names)), dtype=np.float32)
    for start in range(0, store.num_cells, batch_size):
        stop = min(start + batch_size, store.num_cells)
        # A copy: torch does not take read-only memory, and the map must not be read while the encoder runs.
        minibatch = torch.from_numpy(np.array(crops[start:stop]))
        values[start:stop] = encoder(minibatch, low, high).numpy()
        progress.advance(stop - start, store.plate)
    wrong = int((~np.isfinite(values)).any(axis=1).sum())
    if wrong:
        raise CellfastError(
            f"plate {store.plate}: {wrong} of {store.num_cells} cells have features that are not finite; the model is unusable"
        )
    metadata = store.metadata()
    assert len(metadata) == len(values)
    table = pa.Table.from_pandas(metadata, preserve_index=False)
    for column, name in enumerate(names):
        table = table.append_column(name, pa.array(np.ascontiguousarray(values[:, column])))
    table = table.replace_schema_metadata({ORIGIN_KEY: json.dumps(origin, sort_keys=True).encode()})
    with atomic_path(path) as temporary:
        _write_by_well(table, metadata, temporary)


def _write_by_well(table: pa.Table, metadata: pd.DataFrame, path: Path) -> None:
    """A row group per run of wells of about 16,384 rows or more, never splitting a run of one well: a well can be read alone."""
    wells = metadata["Metadata_Well"].to_numpy(dtype=object)
    ends = np.flatnonzero(wells[1:] != wells[:-1]) + 1 if len(wells) else np.zeros(0, int)
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for end in [*ends.tolist(), len(wells)]:
            if end == len(wells) or end - start >= 16_384:
                writer.write_table(table.slice(start, end - start), row_group_size=max(1, end - start))
                start = end


def _is_made_from(path: Path, origin: dict[str, Any]) -> bool:
    """True when the file was made from ``origin``; raises when it was made from something else."""
    try:
        found = pq.read_schema(path).metadata or {}
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise CellfastError(f"{path}: damaged or not parquet ({error}); delete it, or use --force to make it again") from error
    if ORIGIN_KEY not in found:
        raise CellfastError(f"{path}: not written by cellfast embed; choose another folder, or use --force to replace it")
    before = json.loads(found[ORIGIN_KEY])
    different = [
        f"{key} was {_short(before.get(key))}, is {_short(origin[key])}" for key in origin if before.get(key) != origin[key]
    ]
    if different:
        raise CellfastError(
            f"{path}: embedded before from something else ({'; '.join(different)}); choose another folder, or use --force to replace it"
        )
    return rows == origin["cells"]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) > 24 else text


def _write_ledger(screen: Screen, model: LoadedModel, out: Path, features: str, num_features: int) -> None:
    plates = []
    for store in screen.plates:
        path = out / plate_file_name(store.plate).replace(".h5", ".parquet")
        rows = pq.read_metadata(path).num_rows
        if rows != store.num_cells:
            raise CellfastError(f"{path}: {rows} rows for {store.num_cells} cells; a cell was lost, please report this")
        plates.append({"plate": store.plate, "cells": store.num_cells, "rows": rows, "file": path.name})
    write_json(
        out / LEDGER_FILE,
        {
            "cellfast_version": __version__,
            "screen": str(screen.path),
            "model": str(model.path),
            "model_digest": model.digest,
            "features": features,
            "num_features": num_features,
            "cells": screen.num_cells,
            "rows": sum(p["rows"] for p in plates),
            "plates": plates,
            "names_crc32": zlib.crc32(",".join(feature_names(features, num_features)).encode()),
        },
    )
