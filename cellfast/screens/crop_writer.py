"""Writes one plate's crop store: pixels first, tables at the end, the whole file or none."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from cellfast import __version__
from cellfast.atomic import partial_path
from cellfast.compiled import njit
from cellfast.errors import CellfastError
from cellfast.metadata.names import check_batch, check_text, file_name
from cellfast.printable import masked, masked_values
from cellfast.screens import schema, sealed


@njit()
def _add_histogram(crops: np.ndarray, histogram: np.ndarray, stride: int) -> None:  # pragma: no cover - compiled
    n, channels, height, width = crops.shape
    for i in range(n):
        for c in range(channels):
            for y in range(0, height, stride):
                for x in range(0, width, stride):
                    histogram[c, crops[i, c, y, x]] += 1


def plate_file_name(plate: str) -> str:
    """The file name of a plate's store: the plate's name + ``.h5``; raises `CellfastError` as `file_name` does."""
    return f"{file_name('plate', plate)}.h5"


class PlateWriter:
    """Write the crop store of one plate, field by field; the file appears under its name only when all is written.

    Use as a context manager: an exception inside the block removes the partial file.

    Args:
        path: the store, ``SCREEN/plates/<plate>.h5``.
        plate: name of the plate.
        batch: experimental batch, e.g. ``Week1``.
        channel_names: one name per channel, in the order of the pixels.
        crop_size: side S of a crop, px.
        dtype: ``uint16`` or ``uint8``.
        capacity: the most cells that may come. Fewer are fine (the file is then written once more, without the rest).
        border: what was done with crops that reach over the field's edge: ``pad``, ``reflect``, ``drop`` or ``ready`` (crops came
            ready-made).
        pixel_size_um: size of a pixel, µm; None when unknown.
        options: what the ingest was asked for, kept so that a restarted run can tell whether a finished plate matches it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        plate: str,
        batch: str,
        channel_names: Sequence[str],
        crop_size: int,
        dtype: Any,
        capacity: int,
        border: str,
        pixel_size_um: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.plate, self.batch = file_name("plate", plate), check_batch(batch)
        self.channel_names = tuple(check_text("channel", name) for name in channel_names)
        self.crop_size, self.dtype = int(crop_size), np.dtype(dtype)
        if self.dtype not in schema.PIXEL_DTYPES:
            raise CellfastError(f"{self.path.name}: pixels must be uint8 or uint16, got {self.dtype}")
        if not self.channel_names or len(set(self.channel_names)) != len(self.channel_names):
            raise CellfastError(
                f"{self.path.name}: channel names must be one or more different names, got {list(self.channel_names)}"
            )
        self.capacity, self.border, self.pixel_size_um, self.options = int(capacity), border, pixel_size_um, dict(options or {})
        # The plate's ledger (JSON-able), stored in the file so that both appear together.
        self.ledger: dict[str, Any] | None = None
        self.num_cells = 0
        self._cells: dict[str, list[np.ndarray]] = {name: [] for name in schema.CELL_COLUMNS}
        self._fields: dict[str, list[int]] = {name: [] for name in schema.FIELD_COLUMNS}
        self._sources: list[tuple[str, ...]] = []
        self._wells: dict[str, int] = {}
        self._treatments: list[tuple[str, float, str]] = []
        self._histogram = np.zeros((len(self.channel_names), np.iinfo(self.dtype).max + 1), dtype=np.int64)
        self._filled_histogram = np.zeros_like(self._histogram)
        self._partial = partial_path(self.path)
        self._file: h5py.File | None = None

    def __enter__(self) -> PlateWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file, self._crops = self._create(self._partial, self.capacity)
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._partial.unlink(missing_ok=True)
            if self._file is not None:
                file, self._file = self._file, None
                try:
                    file.close()
                except (OSError, RuntimeError):
                    pass  # what could not be written was told already, and the file has no name any more

    def append_field(
        self,
        crops: np.ndarray,
        *,
        well: str,
        site: int,
        image_number: int = -1,
        source_files: Sequence[str] = (),
        compound: str = "",
        concentration: float = float("nan"),
        moa: str = "",
        object_number: np.ndarray,
        center_y: np.ndarray,
        center_x: np.ndarray,
        padded: np.ndarray,
    ) -> None:
        """Append the cells of one field: ``crops`` [n, C, S, S] and one value per cell of the four arrays; n may be 0.

        Raises:
            CellfastError: shape or dtype differ from the store's, more cells than ``capacity``, or the well was given another
                treatment before.
        """
        n = len(crops)
        expected = (n, len(self.channel_names), self.crop_size, self.crop_size)
        if crops.shape != expected or crops.dtype != self.dtype:
            raise CellfastError(
                f"plate {self.plate}, well {well}: crops must be {self.dtype} of shape {expected}, got {crops.dtype} of shape "
                f"{crops.shape}"
            )
        if self.num_cells + n > self.capacity:
            raise CellfastError(
                f"plate {self.plate}: more cells than the {self.capacity} announced; this is a defect of the ingest, please "
                "report it"
            )
        well_row = self._well(well, compound, concentration, moa)
        if n:
            crops = np.ascontiguousarray(crops)
            self._crops[self.num_cells : self.num_cells + n] = crops
            # Zeros outside the field are no intensities: they would pull the low percentile to 0.
            padded = np.asarray(padded, dtype=bool)
            filled = padded & (self.border == "pad")
            _add_histogram(crops[~filled], self._histogram, schema.HISTOGRAM_STRIDE)
            _add_histogram(crops[filled], self._filled_histogram, schema.HISTOGRAM_STRIDE)
        field = len(self._sources)
        columns = {
            "field": np.full(n, field),
            "object_number": object_number,
            "center_y_px": center_y,
            "center_x_px": center_x,
            "padded": padded,
            "crc32": np.array([zlib.crc32(crop) for crop in crops], dtype=np.uint32),
        }
        for name, dtype in schema.CELL_COLUMNS.items():
            column = np.asarray(columns[name]).astype(dtype)
            assert column.shape == (n,), name
            self._cells[name].append(column)
        self._fields["well"].append(well_row)
        self._fields["site"].append(int(site))
        self._fields["image_number"].append(int(image_number))
        self._sources.append(tuple(map(masked, source_files)) or ("",) * len(self.channel_names))
        self.num_cells += n

    @property
    def well_names(self) -> list[str]:
        """Wells seen so far, in order of appearance."""
        return list(self._wells)

    def cells_per_well(self) -> np.ndarray:
        """int64 [number of wells]: cells written so far, in the order of `well_names`."""
        counts = np.zeros(len(self._wells), dtype=np.int64)
        for field, cells in enumerate(self._cells["field"]):
            counts[self._fields["well"][field]] += len(cells)
        return counts

    def _well(self, well: str, compound: str, concentration: float, moa: str) -> int:
        treatment = (compound, float(concentration), moa)
        row = self._wells.get(well)
        if row is None:
            row = self._wells[well] = len(self._treatments)
            self._treatments.append(treatment)
        elif repr(self._treatments[row]) != repr(treatment):
            raise CellfastError(
                f"plate {self.plate}, well {well}: two treatments in one well, {self._treatments[row]} and {treatment}; correct "
                "the metadata"
            )
        return row

    def _create(self, path: Path, num_cells: int) -> tuple[h5py.File, h5py.Dataset]:
        # Contiguous data get a file offset only when allocated: ALLOC_TIME_EARLY. The alignment puts that offset on a page.
        # locking=False: file locks fail on some network file systems, and no other process knows the temporary name.
        shape = (num_cells, len(self.channel_names), self.crop_size, self.crop_size)
        threshold = max(1, min(1 << 16, self.dtype.itemsize * num_cells * len(self.channel_names) * self.crop_size**2))
        handle = h5py.File(
            path,
            "w",
            libver=("earliest", "v110"),
            alignment_threshold=threshold,
            alignment_interval=schema.PAGE_BYTES,
            userblock_size=sealed.USER_BLOCK,
            locking=False,
        )
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple(shape)
        identifier = h5py.h5d.create(handle.id, schema.CROPS.encode(), h5py.h5t.py_create(self.dtype), space, plist)
        return handle, h5py.Dataset(identifier)

    def _finish(self) -> None:
        assert self._file is not None
        if self.num_cells < self.capacity:
            self._shrink()
        handle = self._file
        text = h5py.string_dtype("utf-8")
        cells = handle.create_group(schema.CELLS)
        for name, dtype in schema.CELL_COLUMNS.items():
            parts = self._cells[name]
            cells.create_dataset(name, data=np.concatenate(parts) if parts else np.zeros(0, dtype), dtype=dtype)
        fields = handle.create_group(schema.FIELDS)
        for name, dtype in schema.FIELD_COLUMNS.items():
            fields.create_dataset(name, data=np.asarray(self._fields[name], dtype=dtype))
        sources = np.array(self._sources, dtype=object).reshape(len(self._sources), len(self.channel_names))
        fields.create_dataset("source_files", data=sources, dtype=text, shape=sources.shape)
        wells = handle.create_group(schema.WELLS)
        wells.create_dataset("name", data=np.array(list(self._wells), dtype=object), dtype=text)
        wells.create_dataset("compound", data=np.array([t[0] for t in self._treatments], dtype=object), dtype=text)
        wells.create_dataset("concentration_um", data=np.array([t[1] for t in self._treatments], dtype=np.float64))
        wells.create_dataset("moa", data=np.array([t[2] for t in self._treatments], dtype=object), dtype=text)
        channels = handle.create_group(schema.CHANNELS)
        channels.create_dataset("name", data=np.array(self.channel_names, dtype=object), dtype=text)
        # A plate of nothing but padded crops has only their pixels to go by.
        low, high = scale_from_histogram(self._histogram if self._histogram.any() else self._filled_histogram)
        channels.create_dataset("scale_low", data=low)
        channels.create_dataset("scale_high", data=high)
        handle.create_dataset("ledger", data=json.dumps(masked_values(self.ledger), ensure_ascii=False), dtype=text)
        attributes = handle.attrs
        attributes["plate"], attributes["batch"], attributes["border"] = self.plate, self.batch, self.border
        attributes["crop_size"] = self.crop_size
        attributes["num_cells"] = self.num_cells
        attributes["pixel_size_um"] = float("nan") if self.pixel_size_um is None else float(self.pixel_size_um)
        attributes["cellfast_version"] = __version__
        attributes["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attributes["options"] = json.dumps(masked_values(self.options), sort_keys=True)
        attributes["schema_version"] = schema.SCHEMA_VERSION
        # Last: a file without it was never finished.
        attributes["format"] = schema.FORMAT
        handle.flush()
        handle.close()
        self._file = None
        sealed.seal(self._partial, schema.CROPS)
        os.replace(self._partial, self.path)

    def _shrink(self) -> None:
        """Copy the cells that came into a file of just their number: a contiguous dataset cannot be cut short in place."""
        assert self._file is not None
        exact_path = self._partial.with_name(self._partial.name.replace(".partial", ".exact.partial"))
        try:
            exact, crops = self._create(exact_path, self.num_cells)
            step = max(1, (64 << 20) // max(1, self.dtype.itemsize * len(self.channel_names) * self.crop_size**2))
            for start in range(0, self.num_cells, step):
                stop = min(start + step, self.num_cells)
                crops[start:stop] = self._crops[start:stop]
            self._file.close()
            os.replace(exact_path, self._partial)
            self._file, self._crops = exact, crops
        finally:
            exact_path.unlink(missing_ok=True)


def scale_from_histogram(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.percentile(pixels, (0.1, 99.9), method="inverted_cdf")`` per channel from counts [C, levels]; high is at least low +
    1."""
    cumulative = histogram.cumsum(axis=1)
    total = cumulative[:, -1:]
    bounds = []
    for percentile in schema.SCALE_PERCENTILES:
        target = np.maximum(np.ceil(total * percentile / 100.0), 1)
        bounds.append((cumulative >= target).argmax(axis=1).astype(np.float64))
    low, high = bounds
    low, high = np.where(total[:, 0] > 0, low, 0.0), np.where(total[:, 0] > 0, high, histogram.shape[1] - 1.0)
    return low, np.maximum(high, low + 1.0)
