"""Where cells come from: crop stores (here), or fields with their locations (`field_source`). Both hand out the same cells in the
same order, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cellfast.errors import CellfastError
from cellfast.metadata.names import file_name
from cellfast.screens import Screen
from cellfast.screens.cutting import _cut
from cellfast.screens.image_table import Field
from cellfast.screens.ledger import PlateLedger

# A block is what is computed, written and, after a crash, repeated as a whole.
MOST_ROWS_PER_BLOCK = 4096
ROWS_PER_UNIT = 512


@dataclass(frozen=True)
class Block:
    """Units start … stop − 1 of a plate; a unit is a field, or a run of rows of a crop store."""

    plate: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """A file name that sorts in the order of the blocks."""
        return f"{self.start:08d}-{self.stop:08d}.arrow"


@dataclass(frozen=True)
class PlatePlan:
    """One plate: its blocks in order, and what its cells are made from; ``inputs``: its files, as `cellfast.screens.inputs`
    records them."""

    plate: str
    batch: str
    units: int
    wells: tuple[str, ...]
    blocks: tuple[Block, ...]
    origin: dict[str, Any]
    num_cells: int | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def file_stem(self) -> str:
        """The plate's name as a file name without suffix."""
        return file_name("plate", self.plate)


@dataclass
class Cells:
    """The cells of one unit: pixels still in their planes (``planes``, ``origins``) or ready (``crops``), and one value per
    metadata column."""

    plate: str
    count: int
    size: int
    columns: dict[str, Any] = field(default_factory=dict)
    ledger: PlateLedger | None = None
    # Arrays, or tensors of the device that they were decoded on.
    planes: list[Any] | None = None
    origins: np.ndarray | None = None
    crops: np.ndarray | None = None
    border: str = "pad"
    quarantined: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    fields: int = 0

    def fill(self, out: np.ndarray, start: int, stop: int) -> None:
        """Put cells start … stop − 1 into ``out`` [stop − start, C, s, s]."""
        if self.crops is not None:
            out[:] = self.crops[start:stop]
            return
        assert self.planes is not None
        assert self.origins is not None
        origins = np.ascontiguousarray(self.origins[start:stop])
        for channel, plane in enumerate(self.planes):
            _cut(plane, origins, out, channel, self.border == "reflect")

    def cut(self) -> Cells:
        """The cells with their crops cut and without their planes: the smaller of the two to send."""
        if self.planes is not None:
            out = np.empty((self.count, len(self.planes), self.size, self.size), dtype=self.planes[0].dtype)
            self.fill(out, 0, self.count)
            self.crops, self.planes, self.origins = out, None, None
        return self


@dataclass
class EncodedField:
    """A field whose files are read and not yet decoded: the bytes of each channel's file, uint8 [n]."""

    field: Field
    contents: list[np.ndarray]
    seconds: float


class CellSource(Protocol):
    """What an embedding run needs to know of its input; can be sent to other processes."""

    kind: str
    name: str
    channel_names: list[str]
    dtype: str
    plans: list[PlatePlan]
    num_fields: int
    # For the ledger: remarks, wells and treatments that a joined table lacks, rows of it that no field uses.
    notes: Sequence[str]
    unmatched: Sequence[str]
    unused: Sequence[str]

    def units(self, block: Block) -> list[Any]:
        """What `read` is called with, in order, for a block."""
        ...

    def read(self, unit: Any) -> Cells:
        """The cells of one unit."""
        ...

    def plate_scaling(self, plate: str) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) float64 [C]: the 0.1 and 99.9 percentiles of the plate's crop pixels."""
        ...

    def finish(self, plan: PlatePlan, ledger: PlateLedger) -> PlateLedger:
        """The plate's ledger from the sum of its blocks'."""
        ...


def cut_into_blocks(plate: str, wells: Sequence[Any] | np.ndarray, most: int) -> tuple[Block, ...]:
    """Parts of about ``most`` units that end where a well ends; a well longer than twice that is cut. ``wells``: of each unit."""
    wells = np.asarray(wells)
    blocks: list[Block] = []
    start = 0
    ends = [*(np.flatnonzero(wells[1:] != wells[:-1]) + 1).tolist(), len(wells)] if len(wells) else []
    for end in ends:
        while end - start > 2 * most:
            blocks.append(Block(plate, start, start + 2 * most))
            start += 2 * most
        if end - start >= most or (end == len(wells) and end > start):
            blocks.append(Block(plate, start, end))
            start = end
    return tuple(blocks)


class StoreSource:
    """The crop stores of a screen.

    Args:
        screen: the opened screen.
        window: side of the central window that the model sees, px; no more is read.
    """

    kind = "store"
    notes = unmatched = unused = ()

    def __init__(self, screen: Screen, window: int) -> None:
        self.name, self.channel_names, self.crop_size = str(screen.path), list(screen.channel_names), screen.crop_size
        self.dtype, self.window = np.dtype(screen.dtype).name, window
        self._screen = screen
        self._stores = {store.plate: store for store in screen.plates}
        self.num_fields = sum(store.num_fields for store in screen.plates)
        most = int(np.clip(screen.num_cells // 64, 256, MOST_ROWS_PER_BLOCK))
        self.plans = []
        for store in screen.plates:
            names = store.wells()["name"].tolist()
            codes = store.well_of_cell
            self.plans.append(
                PlatePlan(
                    store.plate,
                    store.batch,
                    store.num_cells,
                    tuple(names),
                    cut_into_blocks(store.plate, codes, most),
                    {"crops": store.crc32, "cells": store.num_cells},
                    store.num_cells,
                )
            )

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps and open files stay behind: the other process opens the screen again.
        return {"path": self._screen.path, "window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Screen.open(state["path"], allow_unfinished=True), state["window"])

    def units(self, block: Block) -> list[tuple[str, int, int]]:
        starts = range(block.start, block.stop, ROWS_PER_UNIT)
        return [(block.plate, start, min(start + ROWS_PER_UNIT, block.stop)) for start in starts]

    def read(self, unit: tuple[str, int, int]) -> Cells:
        began = time.perf_counter()
        plate, start, stop = unit
        store = self._stores[plate]
        first = self.crop_size // 2 - self.window // 2
        window = slice(first, first + self.window)
        pixels = np.ascontiguousarray(store.read(start, stop)[:, :, window, window])
        # One row before the unit tells whether its first row begins a field.
        before = max(start - 1, 0)
        columns = store.metadata_columns(before, stop)
        site, well = columns["Metadata_Site"], columns["Metadata_Well"]
        new = int(((site[1:] != site[:-1]) | (well[1:] != well[:-1])).sum()) + (start == 0)
        columns = {name: values[start - before :] for name, values in columns.items()}
        ledger = PlateLedger(plate, cells_found=stop - start, cells_written=stop - start)
        return Cells(
            plate,
            stop - start,
            self.window,
            columns,
            ledger,
            crops=pixels,
            seconds=time.perf_counter() - began,
            fields=new,
        )

    def plate_scaling(self, plate: str) -> tuple[np.ndarray, np.ndarray]:
        store = self._stores[plate]
        return store.scale_low, store.scale_high

    def finish(self, plan: PlatePlan, ledger: PlateLedger) -> PlateLedger:
        store = self._stores[plan.plate]
        if ledger.cells_written != store.num_cells:
            raise CellfastError(
                f"plate {plan.plate}: {ledger.cells_written} rows for {store.num_cells} cells; a cell was lost, please report "
                "this"
            )
        if store.ledger is None:
            return PlateLedger(
                plan.plate,
                fields_listed=store.num_fields,
                fields_written=store.num_fields,
                cells_found=store.num_cells,
                cells_written=store.num_cells,
                wells_listed=len(plan.wells),
            )
        return PlateLedger.from_json(store.ledger)
