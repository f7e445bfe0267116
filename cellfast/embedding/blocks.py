"""A block is what is computed, written and, after a crash, repeated as a whole; the plate's files are made from its blocks."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cellfast.embedding.cells import Block, Cells, PlatePlan
from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.wells import CELL_SCHEMA, WellSums, as_stored, texts
from cellfast.embeddings_folder import BLOCKS
from cellfast.errors import CellfastError
from cellfast.metadata.columns import WELL
from cellfast.printable import masked_values
from cellfast.screens.inputs import digest
from cellfast.screens.ledger import PlateLedger
from cellfast.storage.folder import Folder

# A block's file begins with a line that tells the length and the CRC-32 of what follows, padded to Arrow's alignment.
_HEADER = b"cellfast block 1 %016x %08x\n"
_HEADER_BYTES = 64
_FEATURES = "features"


@dataclass
class BlockWork:
    """A block under way: what its units brought, and the features of its cells as they come from the encoder."""

    block: Block
    read: list[Cells] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    count: int = 0

    def add(self, cells: Cells) -> None:
        """Note the cells of a unit; their pixels are not kept."""
        self.count += cells.count
        self.read.append(replace(cells, planes=None, origins=None, crops=None))

    def metadata(self) -> pa.Table:
        """The metadata columns of the cells."""
        tables = [
            pa.table(
                [
                    # A text may be one for all cells.
                    pa.array(
                        np.full(cells.count, cells.columns[c.name], object if c.type == pa.string() else None),
                        c.type,
                        from_pandas=True,
                    )
                    for c in CELL_SCHEMA
                ],
                schema=CELL_SCHEMA,
            )
            for cells in self.read
            if cells.count
        ]
        return pa.concat_tables([CELL_SCHEMA.empty_table(), *tables]).combine_chunks()

    def features(self) -> np.ndarray:
        """float32 [cells, F]."""
        values = np.concatenate(self.values) if self.values else np.zeros((0, 0), np.float32)
        if len(values) != self.count:
            raise CellfastError(
                f"plate {self.block.plate}: {self.count} cells read but {len(values)} embedded; a cell was lost, please report "
                "this"
            )
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        if wrong:
            raise CellfastError(
                f"plate {self.block.plate}: {wrong} of {self.count} cells have features that are not finite; the model is "
                "unusable"
            )
        return values


class BlockFiles:
    """The files of a run's blocks in an output folder.

    Args:
        out: the output folder.
        options: what of them decides the values is block of the blocks' folder name.
        model_digest: of the model.
        names: of the features.
    """

    def __init__(self, out: Folder, options: EmbedOptions, model_digest: str, names: list[str]) -> None:
        self.out, self.options, self.model_digest, self.names = out, options, model_digest, names
        self.damaged = 0  # files that were damaged, and are removed

    def origin(self, plan: PlatePlan) -> dict[str, Any]:
        """What a plate's rows are made from; kept in every file, and compared before a file is kept or replaced."""
        return masked_values({"model": self.model_digest, **plan.origin, **self.options.origin()})

    def folder(self, plan: PlatePlan) -> str:
        """The folder of a plate's blocks: other blocks, or blocks of another origin or of other files, lie elsewhere."""
        return f"{BLOCKS}/{plan.file_stem}/{digest([self.origin(plan), plan.inputs, [p.name for p in plan.blocks]])[:16]}"

    def others(self, plan: PlatePlan) -> bool:
        """Whether an earlier run left blocks of the plate that are of no use now."""
        own = self.folder(plan).rsplit("/", 1)[-1]
        return any(name != own for name in self.out.names(f"{BLOCKS}/{plan.file_stem}"))

    def finished(self, plan: PlatePlan) -> set[str]:
        """Names of the blocks that are there and whole; damaged ones are counted in ``damaged`` and removed."""
        there = set()
        for name in sorted({block.name for block in plan.blocks} & set(self.out.names(self.folder(plan)))):
            file = f"{self.folder(plan)}/{name}"
            if _parsed(self.out.read_bytes(file), file) is not None:
                there.add(name)
            else:
                self.damaged += 1
                self.out.remove(file)
        return there

    def write(self, plan: PlatePlan, work: BlockWork) -> None:
        """Write a block's rows (or the sums of its wells) with its ledger."""
        metadata, values = work.metadata(), work.features().reshape(-1, len(self.names))
        if self.options.aggregate == "well":
            sums = WellSums()
            sums.add(metadata, values)
            metadata, values = sums.metadata(), sums.sums()
        else:
            values = as_stored(values, self.options.dtype, plan.plate)
        ledger = PlateLedger(plan.plate)
        for cells in work.read:
            if cells.ledger is not None:
                ledger.add(cells.ledger)
        name = f"{self.folder(plan)}/{work.block.name}"
        note = {
            "block": name,
            "ledger": asdict(ledger),
            "quarantined": [one for cells in work.read for one in cells.quarantined],
            "wells": sorted(set(texts(metadata, WELL))),
        }
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        table = metadata.append_column(_FEATURES, pa.FixedSizeListArray.from_arrays(flat, len(self.names)))
        table = table.replace_schema_metadata({b"block": json.dumps(masked_values(note)).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = memoryview(sink.getvalue())
        with self.out.writing(name) as path, open(path, "wb") as file:
            file.write(_header(content))
            file.write(content)

    def read(self, plan: PlatePlan, block: Block, *, wait_s: float = 0.0) -> tuple[pa.Table, dict[str, Any]]:
        """A block's table and its note; ``wait_s`` bridges the time until a network disk shows what another host wrote."""
        name, deadline = f"{self.folder(plan)}/{block.name}", time.monotonic() + wait_s
        while True:
            try:
                parsed = _parsed(self.out.read_bytes(name), name)
                break
            except FileNotFoundError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                raise CellfastError(
                    f"{self.out.path(name)} disappeared while the run was under way; run the same command again"
                ) from error
        if parsed is not None:
            return parsed
        self.out.remove(name)
        raise CellfastError(f"{self.out.path(name)} was damaged and is removed; run the same command again")

    def rows(self, plan: PlatePlan) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(metadata, features [n, F] as stored) of the plate, block by block; the means of wells all at once."""
        wells, sums = self.options.aggregate == "well", WellSums()
        for block in plan.blocks:
            table = self.read(plan, block)[0].replace_schema_metadata(None)
            features = table.column(_FEATURES).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            piece = table.drop_columns([_FEATURES]), features.reshape(len(table), len(self.names))
            if wells:
                sums.add(*piece)
            else:
                yield piece
        if wells:
            yield sums.metadata(), as_stored(sums.means(), self.options.dtype, plan.plate)

    def notes(self, plan: PlatePlan, *, wait_s: float = 0.0) -> tuple[PlateLedger, list[dict[str, str]]]:
        """The sum of the blocks' ledgers, and the fields that were quarantined."""
        ledger, quarantined, wells = PlateLedger(plan.plate), [], set()
        for block in plan.blocks:
            _, note = self.read(plan, block, wait_s=wait_s)
            ledger.add(PlateLedger.from_json(note["ledger"]))
            quarantined += note["quarantined"]
            wells |= set(note["wells"])
        ledger.wells_without_cells = [well for well in plan.wells if well not in wells]
        return ledger, quarantined

    def discard(self, plan: PlatePlan) -> None:
        """Remove the plate's blocks, those of other origins too."""
        self.out.remove(f"{BLOCKS}/{plan.file_stem}")


def _header(content: memoryview) -> bytes:
    return (_HEADER % (len(content), zlib.crc32(content))).ljust(_HEADER_BYTES)


def _parsed(file: bytes, name: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """(table, note) of a block's file; None where it is damaged or another block's. Nothing is parsed before the checksum is
    right."""
    content = memoryview(file)[_HEADER_BYTES:]
    if file[:_HEADER_BYTES] != _header(content):
        return None
    table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content))).read_all()
    note = json.loads(table.schema.metadata[b"block"])
    return (table, note) if note["block"] == name else None
