"""Reads crop stores: one plate (`PlateStore`) and all plates of a screen (`Screen`)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.names import check_batch, check_text, file_name
from cellfast.metadata.wells import well_name
from cellfast.printable import Shown
from cellfast.screens import schema, sealed
from cellfast.screens.hdf5_tables import datasets_of, values_of
from cellfast.screens.unfinished import what_is_missing

AGAIN = "delete the file and ingest the plate again"


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
            with sealed.open_hdf5(self.path, PlateStore) as handle:
                self._read(handle)
        except sealed.DamagedFile as error:
            raise CellfastError(f"{error}; {AGAIN}") from error
        except CellfastError:
            raise
        except Exception as error:  # what a damaged file makes of HDF5, numpy, json and of memory
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
                f"{self.path}: written with crop store schema {version}, this cellfast reads up to {schema.SCHEMA_VERSION}; "
                "update cellfast"
            )
        if version < 1:
            raise CellfastError(f"{self.path}: crop store schema must be 1 or more, got {version}; {AGAIN}")
        datasets = datasets_of(handle.id, self.path)
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
                    f"{self.path}: truncated: the pixels end at byte {self._offset + length:,}, the file at "
                    f"{self.path.stat().st_size:,}; {AGAIN}"
                )

        def table(group: str, columns: Mapping[str, np.dtype | None]) -> dict[str, np.ndarray]:
            return {name: values_of(datasets[f"{group}/{name}"], self.path, dtype) for name, dtype in columns.items()}

        number = np.dtype(np.float64)
        channels = table(schema.CHANNELS, {"name": None, "scale_low": number, "scale_high": number})
        self.channel_names = [str(v) for v in channels["name"]]
        self.scale_low, self.scale_high = (channels[name].astype(np.float64) for name in ("scale_low", "scale_high"))
        self._cells = table(schema.CELLS, schema.CELL_COLUMNS)
        self._fields = table(schema.FIELDS, schema.FIELD_COLUMNS)
        self._wells = table(schema.WELLS, {**dict.fromkeys(schema.WELL_TEXT), "concentration_um": number})
        self.source_files = values_of(datasets[f"{schema.FIELDS}/source_files"], self.path, None)
        self.ledger: dict[str, Any] | None = json.loads(str(values_of(datasets["ledger"], self.path, None)[()]))
        if not isinstance(self.options, dict) or not isinstance(self.ledger, (dict, type(None))):
            raise CellfastError(f"{self.path}: its options and its ledger must be JSON objects; {AGAIN}")
        self._check_names()
        self._check_tables()

    def _check_names(self) -> None:
        """The names of another program's file meet what the ingest asks of a table's: outputs are named after them."""
        try:
            file_name("plate", self.plate)
            check_batch(self.batch)
            for well in self._wells["name"]:
                if well_name(well) != well:
                    raise CellfastError(f"well {well!r}: expected {well_name(well)!r}")
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
        for name, values in {**self._cells, **self._fields, **self._wells}.items():
            if values.ndim != 1:
                raise CellfastError(f"{self.path}: table column {name} must have one axis, got shape {values.shape}; {AGAIN}")
        channels: list[Any] = [self.channel_names, self.scale_low, self.scale_high]
        for columns in (self._fields.values(), self._wells.values(), channels):
            if len({len(values) for values in columns}) > 1:
                raise CellfastError(f"{self.path}: the columns of a table are not of one length; {AGAIN}")
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
        """The pixels [N, C, S, S] as a read-only memory map (an empty array when there are no cells); nothing is checked.

        A file that is cut short while it is mapped ends the process (SIGBUS): `read` says it instead.
        """
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

    def check(self, rows: Sequence[int] | np.ndarray, crops: np.ndarray) -> None:
        """Compare ``crops``, C-contiguous [n, C, S, S], with the CRC-32 that the cells ``rows`` had when they were written.

        Raises:
            CellfastError: naming the plate and the cells that differ.
        """
        self._refuse(self._damaged(rows, crops))

    def _damaged(self, rows: Sequence[int] | np.ndarray, crops: np.ndarray) -> list[int]:
        expected = self._cells["crc32"]
        return [int(row) for row, crop in zip(rows, crops) if zlib.crc32(crop) != expected[row]]

    def _refuse(self, rows: list[int]) -> None:
        if not rows:
            return
        names = []
        for row in rows[:5]:
            one = {name.removeprefix("Metadata_"): values[0] for name, values in self.metadata_columns(row, row + 1).items()}
            names.append(f"row {row} (well {one['Well']}, site {one['Site']}, object {one['ObjectNumber']})")
        more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
        raise CellfastError(
            f"{self.path}: plate {self.plate}: the pixels of {len(rows):,} of {self.num_cells:,} cells are damaged: "
            f"{', '.join(names)}{more}; {AGAIN}"
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        """The pixels of rows start … stop − 1, read from the file and compared with their checksums.

        Raises:
            CellfastError: damaged (`check`), or the file was cut short after it was opened.
            OSError: it cannot be read.
        """
        crops = self._read_pixels(start, stop)
        self.check(range(start, stop), crops)
        return crops

    def _read_pixels(self, start: int, stop: int) -> np.ndarray:
        crops = np.empty((stop - start, *self._shape[1:]), dtype=self.dtype)
        if not crops.size:
            return crops
        memory, done = crops.reshape(-1).view(np.uint8).data, 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * crops[0].nbytes)
            while done < len(memory):
                got = file.readinto(memory[done:])
                if not got:
                    raise self.cut_short()
                done += got
        return crops

    def cut_short(self) -> CellfastError:
        """What to raise where the file ends before its pixels do."""
        return CellfastError(f"{self.path}: the file was cut short after it was opened; {AGAIN}")

    def verify(self) -> None:
        """Read all pixels and compare each crop's CRC-32 with the one stored when it was written.

        Raises:
            CellfastError: naming how many cells differ and the first of them.
        """
        bad: list[int] = []
        step = max(1, (16 << 20) // max(1, int(np.prod(self._shape[1:])) * np.dtype(self.dtype).itemsize))
        for start in range(0, self.num_cells, step):
            stop = min(start + step, self.num_cells)
            bad += self._damaged(range(start, stop), self._read_pixels(start, stop))
        self._refuse(bad)


class Screen(Shown):
    """All plates of a screen, as one sequence of cells: global row = ``offsets[plate] + row in the plate``.

    Attributes:
        path: the screen folder.
        plates: `PlateStore` per plate, sorted by plate name.
        channel_names, crop_size, dtype: the same for all plates.
        offsets: int64 [num_plates + 1].
        num_cells: ``offsets[-1]``.
        unfinished: what is missing of its ingest, in words; empty where it ended.
    """

    unfinished = ""

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

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        batches = len({store.batch for store in self.plates})
        return (
            f"screen {self.path}: {self.num_cells:,} cells of {self.crop_size} px, {np.dtype(self.dtype).name}, on "
            f"{len(self.plates)} plates of {batches} batches; channels {', '.join(self.channel_names)}"
            + (f"; {self.unfinished}" if self.unfinished else "")
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_unfinished: bool = False) -> Screen:
        """Open the screen folder ``path``.

        Args:
            allow_unfinished: take the plates that are there where the ingest has not ended; `Screen.unfinished` says what is
                missing.

        Raises:
            CellfastError: no such folder, no plates in it, a damaged plate, plates that do not fit together, or an unfinished
                ingest.
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
        sealed.try_unsealed(files, PlateStore)
        screen = cls(path, [PlateStore(file) for file in files])
        screen.unfinished = what_is_missing(path, {store.plate for store in screen.plates})
        if screen.unfinished and not allow_unfinished:
            raise CellfastError(
                f"{path}: {screen.unfinished}; or take the plates that are there with {option('allow_unfinished', True)}"
            )
        return screen

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
