"""Reads crop stores: one plate (`PlateStore`) and all plates of a screen (`Screen`)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from h5py import h5d, h5g, h5l, h5o, h5s

from cellfast.errors import CellfastError
from cellfast.metadata.names import check_batch, check_text, file_name
from cellfast.screens import schema
from cellfast.screens.wells import normalise_well

AGAIN = "delete the file and ingest the plate again"


# What a link that is not to an object of the same file is called.
_LINKS = {h5l.TYPE_SOFT: "SoftLink", h5l.TYPE_EXTERNAL: "ExternalLink"}


def _datasets(group: h5g.GroupID, path: Path, prefix: str = "") -> dict[str, h5d.DatasetID]:
    """The datasets of a file and of its groups by name ("cells/field"); what would make HDF5 open another file or follow a path is refused.

    A screen has hundreds of plates with twenty datasets each, so they are opened once and in h5py's low-level interface.
    """
    links: list[tuple[str, int]] = []
    group.links.iterate(lambda name, info: links.append((name.decode(), info.type)), info=True)
    found = {}
    for name, kind in links:
        if kind != h5l.TYPE_HARD:
            raise CellfastError(
                f"{path}: '{prefix}{name}' is a {_LINKS.get(kind, 'link of another kind')}; links are refused in a crop store, as they "
                "can lead to other files"
            )
        item = h5o.open(group, name.encode())
        if isinstance(item, h5d.DatasetID):
            layout = item.get_create_plist()
            if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count() > 0:
                raise CellfastError(f"{path}: '{prefix}{name}' keeps its data in other files; that is refused in a crop store")
            found[prefix + name] = item
        elif isinstance(item, h5g.GroupID) and not prefix:
            found |= _datasets(item, path, f"{name}/")
    return found


def _values(dataset: h5d.DatasetID) -> np.ndarray:
    """All values of a dataset; text as an array of ``str`` objects."""
    values = np.empty(dataset.shape, dtype=dataset.dtype)
    dataset.read(h5s.ALL, h5s.ALL, values)
    if h5py.check_string_dtype(dataset.dtype) is None:
        return values
    text = np.empty(values.shape, dtype=object)
    for place, value in np.ndenumerate(values):
        text[place] = value.decode()
    return text


class PlateStore:
    """One plate's crop store, opened read-only; all checks are done when it is made, the pixels are mapped when asked for.

    Attributes:
        path, plate, batch, border, options, ledger: as written.
        num_cells, num_channels, crop_size: N, C, S of the pixels [N, C, S, S].
        dtype: ``np.uint8`` or ``np.uint16``.
        channel_names: list of C names.
        pixel_size_um: µm, or None when unknown.
        scale_low, scale_high: float64 [C], the 0.1 and 99.9 percentiles of the plate's crop pixels.

    Raises:
        CellfastError: not a crop store, not finished, truncated, written by a newer schema, or with links to other files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CellfastError(f"{self.path}: no such crop store; make one with `cellfast ingest`")
        try:
            with h5py.File(self.path, "r", locking=False) as handle:
                self._read(handle)
        except CellfastError:
            raise
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CellfastError(f"{self.path}: damaged or not a crop store ({error}); {AGAIN}") from error

    def _read(self, handle: h5py.File) -> None:
        attributes = handle.attrs
        found = attributes.get("format")
        if found != schema.FORMAT:
            what = "the file was never finished or is not a crop store" if found is None else f"its format is {found!r}"
            raise CellfastError(f"{self.path}: expected format {schema.FORMAT!r}, but {what}; {AGAIN}")
        version = int(attributes["schema_version"])
        if version > schema.SCHEMA_VERSION:
            raise CellfastError(
                f"{self.path}: written with crop store schema {version}, this cellfast reads up to {schema.SCHEMA_VERSION}; update cellfast"
            )
        if version < 1:
            raise CellfastError(f"{self.path}: crop store schema must be 1 or more, got {version}; {AGAIN}")
        datasets = _datasets(handle.id, self.path)
        crops = h5py.Dataset(datasets[schema.CROPS])
        if (
            crops.ndim != 4
            or crops.dtype not in schema.PIXEL_DTYPES
            or crops.chunks is not None
            or crops.shape[2] != crops.shape[3]
        ):
            raise CellfastError(
                f"{self.path}: crops must be contiguous uint8 or uint16 [N, C, S, S], got {crops.dtype} {crops.shape}"
                f"{' in chunks' if crops.chunks else ''}; {AGAIN}"
            )
        self.plate, self.batch, self.border = (_text(attributes[name]) for name in ("plate", "batch", "border"))
        self.options: dict[str, Any] = json.loads(attributes["options"])
        self.cellfast_version, self.created = str(attributes["cellfast_version"]), str(attributes["created"])
        self.num_cells, self.num_channels, self.crop_size = (int(v) for v in crops.shape[:3])
        self.dtype = np.dtype(crops.dtype).type
        size = float(attributes["pixel_size_um"])
        self.pixel_size_um = None if np.isnan(size) else size
        self._offset = crops.id.get_offset()
        self._shape = crops.shape
        length = crops.size * crops.dtype.itemsize
        if length:
            if self._offset is None:
                raise CellfastError(f"{self.path}: the pixels were never allocated; {AGAIN}")
            if self._offset + length > self.path.stat().st_size:
                raise CellfastError(
                    f"{self.path}: truncated: the pixels end at byte {self._offset + length:,}, the file at {self.path.stat().st_size:,}; {AGAIN}"
                )

        def table(group: str, columns: Iterable[str]) -> dict[str, np.ndarray]:
            return {name: _values(datasets[f"{group}/{name}"]) for name in columns}

        channels = table(schema.CHANNELS, ("name", "scale_low", "scale_high"))
        self.channel_names = [str(v) for v in channels["name"]]
        self.scale_low, self.scale_high = (channels[name].astype(np.float64) for name in ("scale_low", "scale_high"))
        self._cells = table(schema.CELLS, schema.CELL_COLUMNS)
        self._fields = table(schema.FIELDS, schema.FIELD_COLUMNS)
        self._wells = table(schema.WELLS, (*schema.WELL_TEXT, "concentration_um"))
        self.source_files = _values(datasets[f"{schema.FIELDS}/source_files"])
        self.ledger: dict[str, Any] | None = json.loads(_values(datasets["ledger"])[()])
        self._check_names()
        self._check_tables()

    def _check_names(self) -> None:
        """The names of another program's file meet what the ingest asks of a table's: outputs are named after them."""
        try:
            file_name("plate", self.plate)
            check_batch(self.batch)
            for well in self._wells["name"]:
                if normalise_well(well) != well:
                    raise CellfastError(f"well {well!r}: expected {normalise_well(well)!r}")
            for kind, names in (
                ("channel", self.channel_names),
                ("compound", self._wells["compound"]),
                ("MoA", self._wells["moa"]),
            ):
                for name in names:
                    check_text(kind, name)
        except CellfastError as error:
            raise CellfastError(f"{self.path}: {error}; {AGAIN}") from None

    def _check_tables(self) -> None:
        if int(self.num_channels) != len(self.channel_names):
            raise CellfastError(
                f"{self.path}: {self.num_channels} channels of pixels but names for {len(self.channel_names)}; {AGAIN}"
            )
        for name, column in self._cells.items():
            if len(column) != self.num_cells:
                raise CellfastError(f"{self.path}: {self.num_cells} crops but {len(column)} values of cells/{name}; {AGAIN}")
        num_fields, num_wells = len(self._fields["well"]), len(self._wells["name"])
        for rows, bound, what in (
            (self._cells["field"], num_fields, "cells/field"),
            (self._fields["well"], num_wells, "fields/well"),
        ):
            if len(rows) and (rows.min() < 0 or rows.max() >= bound):
                raise CellfastError(f"{self.path}: {what} must lie in 0..{bound - 1}, got {rows.min()}..{rows.max()}; {AGAIN}")

    @property
    def num_fields(self) -> int:
        """Number of fields of view written, those without cells included."""
        return len(self._fields["well"])

    @property
    def padded(self) -> np.ndarray:
        """bool [N]: True where part of the crop lies outside the field."""
        return self._cells["padded"]

    @property
    def crc32(self) -> int:
        """CRC-32 over the crops' CRC-32s: changes when any pixel does."""
        return zlib.crc32(self._cells["crc32"].tobytes())

    @property
    def offset(self) -> int:
        """Byte at which the pixels begin in the file, where they lie as one block (0 when there are no cells)."""
        return int(self._offset or 0) if self.num_cells else 0

    def crops(self) -> np.ndarray:
        """The pixels [N, C, S, S] as a read-only memory map (an empty array when there are no cells)."""
        if self.num_cells == 0:
            return np.zeros(self._shape, dtype=self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self._offset, shape=self._shape)

    def wells(self) -> pd.DataFrame:
        """One row per well: name, compound, concentration_um, moa, num_cells."""
        table = pd.DataFrame(self._wells)
        well_of_cell = self._fields["well"][self._cells["field"]] if self.num_cells else np.zeros(0, np.int64)
        table["num_cells"] = np.bincount(well_of_cell, minlength=len(table))
        return table

    @property
    def well_of_cell(self) -> np.ndarray:
        """int [N]: each cell's row in `wells`."""
        return self._fields["well"][self._cells["field"]] if self.num_cells else np.zeros(0, np.int64)

    def metadata_columns(self, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """The columns `schema.METADATA_COLUMNS` of rows start … stop − 1, as arrays; nothing is kept in memory."""
        rows = slice(start, self.num_cells if stop is None else stop)
        field = self._cells["field"][rows]
        n = len(field)
        well = self._fields["well"][field] if n else np.zeros(0, dtype=np.int64)
        columns = {
            "Metadata_Plate": np.full(n, self.plate, dtype=object),
            "Metadata_Well": self._wells["name"][well],
            "Metadata_Site": self._fields["site"][field],
            "Metadata_ImageNumber": self._fields["image_number"][field],
            "Metadata_ObjectNumber": self._cells["object_number"][rows],
            "Metadata_Center_X": self._cells["center_x_px"][rows],
            "Metadata_Center_Y": self._cells["center_y_px"][rows],
            "Metadata_Batch": np.full(n, self.batch, dtype=object),
            "Metadata_Compound": self._wells["compound"][well],
            "Metadata_Concentration": self._wells["concentration_um"][well],
            "Metadata_MoA": self._wells["moa"][well],
        }
        return {name: columns[name] for name in schema.METADATA_COLUMNS}

    @cached_property
    def _metadata(self) -> pd.DataFrame:
        columns = self.metadata_columns()
        text = [name for name, values in columns.items() if values.dtype == object]
        return pd.DataFrame(columns).astype(dict.fromkeys(text, "str"))

    def metadata(self) -> pd.DataFrame:
        """One row per cell in store order, with the columns `schema.METADATA_COLUMNS`."""
        return self._metadata.copy()

    def verify(self) -> None:
        """Read all pixels and compare each crop's CRC-32 with the one stored when it was written.

        Raises:
            CellfastError: naming how many cells differ and the first of them.
        """
        crops = self.crops()
        bad = [i for i in range(self.num_cells) if zlib.crc32(np.ascontiguousarray(crops[i])) != int(self._cells["crc32"][i])]
        if bad:
            raise CellfastError(
                f"{self.path}: the pixels of {len(bad)} of {self.num_cells} cells are damaged (first: row {bad[0]}); {AGAIN}"
            )


class Screen:
    """All plates of a screen, as one sequence of cells: global row = ``offsets[plate] + row in the plate``.

    Attributes:
        path: the screen folder.
        plates: `PlateStore` per plate, sorted by plate name.
        channel_names, crop_size, dtype: the same for all plates.
        offsets: int64 [num_plates + 1].
        num_cells: ``offsets[-1]``.
    """

    def __init__(self, path: str | os.PathLike[str], plates: list[PlateStore]) -> None:
        self.path = Path(path)
        self.plates = sorted(plates, key=lambda store: store.plate)
        first = self.plates[0]
        for one, other in zip(self.plates, self.plates[1:]):
            if one.plate == other.plate:
                raise CellfastError(f"{one.path} and {other.path} are both of plate {one.plate}; remove one of them")
        for store in self.plates[1:]:
            for name in ("channel_names", "crop_size", "dtype"):
                if getattr(store, name) != getattr(first, name):
                    raise CellfastError(
                        f"{self.path}: plates disagree in {name}: {first.plate} has {_show(getattr(first, name))}, "
                        f"{store.plate} has {_show(getattr(store, name))}; ingest them alike or into two screens"
                    )
        self.channel_names, self.crop_size, self.dtype = list(first.channel_names), first.crop_size, first.dtype
        self.offsets = np.concatenate([[0], np.cumsum([store.num_cells for store in self.plates])]).astype(np.int64)
        self.num_cells = int(self.offsets[-1])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Screen:
        """Open the screen folder ``path``.

        Raises:
            CellfastError: no such folder, no plates in it, a damaged plate, or plates that do not fit together.
        """
        path = Path(path)
        if not path.is_dir():
            raise CellfastError(f"{path}: no such screen folder; expected the -o of `cellfast ingest`")
        files = sorted(p for p in (path / "plates").glob("*.h5") if not p.name.startswith("."))
        if not files:
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise CellfastError(
                f"{path}: no crop stores in {path / 'plates'} (found in the folder: {inside}); make them with `cellfast ingest`"
            )
        return cls(path, [PlateStore(file) for file in files])

    def metadata(self) -> pd.DataFrame:
        """One row per cell in global row order, with the columns `schema.METADATA_COLUMNS`."""
        return pd.concat([store.metadata() for store in self.plates], ignore_index=True)

    def channel_scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), float64 [C]: the medians over the plates with cells of their ``scale_low`` and ``scale_high``."""
        stores = [store for store in self.plates if store.num_cells] or self.plates
        return np.median([s.scale_low for s in stores], axis=0), np.median([s.scale_high for s in stores], axis=0)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _show(value: Any) -> str:
    return np.dtype(value).name if isinstance(value, type) else str(value)
