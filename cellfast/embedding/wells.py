"""The one mean per well, and the metadata columns of cells and of wells."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from cellfast.errors import CellfastError, option
from cellfast.metadata import columns
from cellfast.metadata.counts import CELL_COUNT

_TYPES = {
    **dict.fromkeys((columns.SITE, columns.IMAGE_NUMBER, columns.OBJECT_NUMBER, CELL_COUNT), pa.int64()),
    **dict.fromkeys((columns.CENTER_X, columns.CENTER_Y), pa.float32()),
    columns.CONCENTRATION: pa.float64(),
}
CELL_SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in columns.CELL_COLUMNS])
WELL_SCHEMA = pa.schema(
    [CELL_SCHEMA.field(name) for name in columns.CANONICAL if name != columns.SITE] + [(CELL_COUNT, _TYPES[CELL_COUNT])]
)


class WellSums:
    """Sums over the cells of each well, added up piece by piece; wells in order of appearance, each with its first row's
    metadata."""

    def __init__(self) -> None:
        self._wells: dict[str, list[Any]] = {}  # [a table of one row, number of cells, float64 [F]]

    def add(self, metadata: pa.Table, values: np.ndarray) -> None:
        """Add cells, or sums with their `CELL_COUNT`; values [n, F]."""
        counts = (
            metadata.column(CELL_COUNT).to_numpy() if CELL_COUNT in metadata.column_names else np.ones(len(metadata), np.int64)
        )
        names = texts(metadata, columns.WELL)
        for start, stop in runs(names):
            well = self._wells.setdefault(names[start], [metadata.slice(start, 1).select(WELL_SCHEMA.names[:-1]), 0, 0.0])
            well[1] += int(counts[start:stop].sum())
            well[2] = well[2] + values[start:stop].sum(axis=0, dtype=np.float64)

    def metadata(self) -> pa.Table:
        """A row per well, with the columns `WELL_SCHEMA`."""
        if not self._wells:
            return WELL_SCHEMA.empty_table()
        rows = pa.concat_tables([row for row, _, _ in self._wells.values()]).combine_chunks()
        return rows.append_column(
            WELL_SCHEMA.field(CELL_COUNT), pa.array([count for _, count, _ in self._wells.values()], pa.int64())
        )

    def sums(self) -> np.ndarray:
        """float64 [wells, F]."""
        return np.array([total for _, _, total in self._wells.values()]).reshape(len(self._wells), -1 if self._wells else 0)

    def means(self) -> np.ndarray:
        """float32 [wells, F]."""
        counts = np.array([count for _, count, _ in self._wells.values()])
        return (self.sums() / counts[:, None]).astype(np.float32)


def as_stored(values: np.ndarray, dtype: str, plate: str) -> np.ndarray:
    """float32 features as ``dtype``.

    Raises:
        CellfastError: a value does not fit.
    """
    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CellfastError(
            f"plate {plate}: features up to {np.abs(values).max():g} do not fit float16 (65,504 at most); use "
            f"{option('dtype', 'float32')}"
        )
    return halves


def runs(*keys: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the runs of rows that are alike in all ``keys``, each [n]."""
    changes = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        changes |= key[1:] != key[:-1]
    return list(pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(keys[0])])) if len(keys[0]) else []


def texts(metadata: pa.Table, name: str) -> np.ndarray:
    """A column of names as objects [n]."""
    return np.asarray(metadata.column(name).to_pylist(), dtype=object)
