"""Parts: what is computed and written as a whole, and read back to make a plate's files."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.sources import Chunk, Part, PlatePlan
from cellfast.embeddings_folder import PARTS
from cellfast.errors import CellfastError
from cellfast.metadata.counts import CELL_COUNT
from cellfast.printable import masked_values
from cellfast.screens.inputs import digest
from cellfast.screens.ledger import PlateLedger
from cellfast.storage.folder import Folder

# A part file begins with a line that tells the length and the CRC-32 of what follows, padded to Arrow's alignment.
_HEADER = b"cellfast part 1 %016x %08x\n"
_HEADER_BYTES = 64
FEATURE_COLUMN = "features"
WELL_COLUMNS = (
    "Metadata_Plate",
    "Metadata_Well",
    "Metadata_Batch",
    "Metadata_Compound",
    "Metadata_Concentration",
    "Metadata_MoA",
)
_TYPES = {
    "Metadata_Plate": pa.string(),
    "Metadata_Well": pa.string(),
    "Metadata_Site": pa.int64(),
    "Metadata_ImageNumber": pa.int64(),
    "Metadata_ObjectNumber": pa.int64(),
    "Metadata_Center_X": pa.float32(),
    "Metadata_Center_Y": pa.float32(),
    "Metadata_Batch": pa.string(),
    "Metadata_Compound": pa.string(),
    "Metadata_Concentration": pa.float64(),
    "Metadata_MoA": pa.string(),
    CELL_COUNT: pa.int64(),
}


def metadata_schema(*, wells: bool) -> pa.Schema:
    """Names and types of the metadata columns, of cells or of wells."""
    from cellfast.screens.schema import METADATA_COLUMNS

    names = (*WELL_COLUMNS, CELL_COUNT) if wells else METADATA_COLUMNS
    return pa.schema([(name, _TYPES[name]) for name in names])


@dataclass
class PartWork:
    """A part under way: what its chunks brought, and the features of its cells as they come from the encoder."""

    part: Part
    chunks: list[Chunk] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    cells: int = 0

    def add(self, chunk: Chunk) -> None:
        """Note a chunk; its pixels are not kept."""
        self.cells += chunk.count
        self.chunks.append(
            Chunk(chunk.plate, chunk.count, chunk.size, chunk.columns, chunk.ledger, quarantined=chunk.quarantined)
        )

    def features(self) -> np.ndarray:
        """float32 [cells, F]."""
        values = np.concatenate(self.values) if self.values else np.zeros((0, 0), np.float32)
        if len(values) != self.cells:
            raise CellfastError(
                f"plate {self.part.plate}: {self.cells} cells read but {len(values)} embedded; a cell was lost, please report this"
            )
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        if wrong:
            raise CellfastError(
                f"plate {self.part.plate}: {wrong} of {self.cells} cells have features that are not finite; the model is unusable"
            )
        return values


class PartFiles:
    """The part files of a run in an output folder.

    Args:
        place: the output folder.
        options: what of them decides the values is part of the parts' folder name.
        model_digest: of the model.
        num_features: F.
    """

    def __init__(self, place: Folder, options: EmbedOptions, model_digest: str, num_features: int) -> None:
        self.place, self.options, self.num_features = place, options, num_features
        self.model_digest = model_digest
        self.damaged = 0  # part files that were damaged, and are removed

    def origin(self, plan: PlatePlan) -> dict[str, Any]:
        """What a plate's rows are made from; kept in every file, and compared before a file is kept or replaced."""
        return masked_values({"model": self.model_digest, **plan.origin, **self.options.origin()})

    def folder(self, plan: PlatePlan) -> str:
        """The folder of a plate's parts: other parts, or parts of another origin or of other files, lie elsewhere."""
        return f"{PARTS}/{plan.file_stem}/{digest([self.origin(plan), plan.inputs, [p.name for p in plan.parts]])[:16]}"

    def others(self, plan: PlatePlan) -> bool:
        """Whether an earlier run left parts of the plate that are of no use now."""
        own = self.folder(plan).rsplit("/", 1)[-1]
        return any(name != own for name in self.place.names(f"{PARTS}/{plan.file_stem}"))

    def finished(self, plan: PlatePlan) -> set[str]:
        """Names of the parts that are there and whole; damaged ones are counted in ``damaged`` and removed."""
        there = set()
        for name in sorted({part.name for part in plan.parts} & set(self.place.names(self.folder(plan)))):
            file = f"{self.folder(plan)}/{name}"
            if _parsed(self.place.read_bytes(file), file) is not None:
                there.add(name)
            else:
                self.damaged += 1
                self.place.remove(file)
        return there

    def write(self, plan: PlatePlan, work: PartWork) -> None:
        """Write a part's rows (or the sums of its wells) with its ledger."""
        values = work.features().reshape(-1, self.num_features)
        wells = self.options.aggregate_wells
        schema = metadata_schema(wells=wells)
        columns = _concatenated(work.chunks, schema.names if not wells else list(WELL_COLUMNS))
        if wells:
            columns, values = _sums_of_wells(columns, values)
        else:
            values = _as_stored(values, self.options.dtype, work.part.plate)
        arrays = [pa.array(columns[name], type=schema.field(name).type, from_pandas=True) for name in schema.names]
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, self.num_features))
        ledger, quarantined = PlateLedger(work.part.plate), []
        for chunk in work.chunks:
            if chunk.ledger is not None:
                add_ledger(ledger, chunk.ledger)
            quarantined += chunk.quarantined
        name = f"{self.folder(plan)}/{work.part.name}"
        note = {
            "part": name,
            "ledger": asdict(ledger),
            "quarantined": quarantined,
            "wells": sorted({str(w) for w in columns["Metadata_Well"]}),
        }
        table = pa.Table.from_arrays(arrays, names=[*schema.names, FEATURE_COLUMN])
        table = table.replace_schema_metadata({b"part": json.dumps(masked_values(note)).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = memoryview(sink.getvalue())
        with self.place.writing(name) as path, open(path, "wb") as file:
            file.write((_HEADER % (len(content), zlib.crc32(content))).ljust(_HEADER_BYTES))
            file.write(content)

    def read(self, plan: PlatePlan, part: Part, *, wait_s: float = 0.0) -> tuple[pa.Table, dict[str, Any]]:
        """A part's table and its note; ``wait_s`` bridges the time until a network disk shows what another host wrote."""
        name, deadline = f"{self.folder(plan)}/{part.name}", time.monotonic() + wait_s
        while True:
            try:
                parsed = _parsed(self.place.read_bytes(name), name)
                break
            except FileNotFoundError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                raise CellfastError(
                    f"{self.place.path(name)} disappeared while the run was under way; run the same command again"
                ) from error
        if parsed is not None:
            return parsed
        self.place.remove(name)
        raise CellfastError(f"{self.place.path(name)} was damaged and is removed; run the same command again")

    def tables(self, plan: PlatePlan, *, wait_s: float = 0.0) -> Iterator[pa.Table]:
        """The plate's rows in order, a table per part."""
        for part in plan.parts:
            yield self.read(plan, part, wait_s=wait_s)[0].replace_schema_metadata(None)

    def notes(self, plan: PlatePlan, *, wait_s: float = 0.0) -> tuple[PlateLedger, list[dict[str, str]]]:
        """The sum of the parts' ledgers, and the fields that were quarantined."""
        ledger, quarantined, wells = PlateLedger(plan.plate), [], set()
        for part in plan.parts:
            _, note = self.read(plan, part, wait_s=wait_s)
            add_ledger(ledger, PlateLedger(**note["ledger"]))
            quarantined += note["quarantined"]
            wells |= set(note["wells"])
        ledger.wells_without_cells = [well for well in plan.wells if well not in wells]
        return ledger, quarantined

    def discard(self, plan: PlatePlan) -> None:
        """Remove the plate's parts, those of other origins too."""
        self.place.remove(f"{PARTS}/{plan.file_stem}")


def add_ledger(total: PlateLedger, other: PlateLedger) -> None:
    """Add counts and refusals of ``other`` to ``total``."""
    for name in ("fields_listed", "fields_written", "cells_found", "cells_written", "cells_padded"):
        setattr(total, name, getattr(total, name) + getattr(other, name))
    for reason, count in other.cells_dropped.items():
        total.drop_cells(reason, count)
    for reason, count in other.fields_refused.items():
        total.fields_refused[reason] = total.fields_refused.get(reason, 0) + count
    total.refusals += other.refusals
    total.warnings += other.warnings


def _parsed(file: bytes, name: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """(table, note) of a part file; None where it is damaged or another part's. Nothing is parsed before the checksum is right."""
    content = memoryview(file)[_HEADER_BYTES:]
    if file[:_HEADER_BYTES] != (_HEADER % (len(content), zlib.crc32(content))).ljust(_HEADER_BYTES):
        return None
    table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content))).read_all()
    note = json.loads(table.schema.metadata[b"part"])
    return (table, note) if note["part"] == name else None


def _concatenated(chunks: list[Chunk], names: list[str]) -> dict[str, np.ndarray]:
    out = {}
    for name in names:
        pieces = []
        for chunk in chunks:
            if chunk.count:
                value = chunk.columns[name]
                text = isinstance(value, str)
                pieces.append(np.full(chunk.count, value, dtype=object) if text else np.asarray(value))
        if _TYPES[name] == pa.string():
            pieces = [piece.astype(object) for piece in pieces]
        out[name] = np.concatenate(pieces) if pieces else np.zeros(0, object if _TYPES[name] == pa.string() else np.float64)
    return out


def _sums_of_wells(columns: dict[str, np.ndarray], values: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One row per well in order of appearance: first metadata, number of cells, float64 sums."""
    wells = columns["Metadata_Well"].astype(str)
    _, first, code = np.unique(wells, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    code = rank[code] if len(order) else code
    sums = np.zeros((len(order), values.shape[1]))
    np.add.at(sums, code, values.astype(np.float64))
    out = {name: column[first[order]] for name, column in columns.items()}
    out[CELL_COUNT] = np.bincount(code, minlength=len(order)).astype(np.int64)
    return out, sums


def _as_stored(values: np.ndarray, dtype: str, plate: str) -> np.ndarray:
    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CellfastError(
            f"plate {plate}: features up to {np.abs(values).max():g} do not fit float16 (65,504 at most); use --dtype float32"
        )
    return halves


def means_of_wells(tables: Iterator[pa.Table], dtype: str) -> tuple[pa.Table, np.ndarray]:
    """The well profiles of a plate from its parts: (metadata and number of cells, means [wells, F] as ``dtype``)."""
    rows: dict[str, list[Any]] = {}
    schema = metadata_schema(wells=True)
    for table in tables:
        values = feature_matrix(table)
        for row, record in enumerate(table.select(schema.names).to_pylist()):
            known = rows.get(record["Metadata_Well"])
            if known is None:
                rows[record["Metadata_Well"]] = [record, values[row].copy()]
            else:
                known[0][CELL_COUNT] += record[CELL_COUNT]
                known[1] += values[row]
    records = [record for record, _ in rows.values()]
    means = [values / record[CELL_COUNT] for record, values in rows.values()]
    width = len(means[0]) if means else 0
    matrix = _as_stored(np.array(means, np.float32).reshape(len(records), width), dtype, "")
    arrays = [pa.array([r[name] for r in records], type=schema.field(name).type) for name in schema.names]
    return pa.Table.from_arrays(arrays, names=schema.names), matrix


def feature_matrix(table: pa.Table) -> np.ndarray:
    """The values [n, F] of a part's table."""
    column = table.column(FEATURE_COLUMN).combine_chunks()
    width = column.type.list_size
    flat = column.flatten() if len(column) else pa.array([], type=column.type.value_type)
    return flat.to_numpy(zero_copy_only=False).reshape(-1, width)
