"""The files of a plate: one parquet (here), AnnData, or the Cell Painting Gallery's folders. The last file of a plate carries its origin and ledger."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellfast.embedding.parts import PartFiles, feature_matrix, means_of_wells, metadata_schema
from cellfast.embedding.sources import PlatePlan
from cellfast.embeddings_folder import LEDGER_KEY, RECORDS, Checksum, checksum
from cellfast.errors import CellfastError
from cellfast.parquet_footer import leave_room, seal_footer
from cellfast.printable import masked_values
from cellfast.screens.inputs import changed_files, changed_options
from cellfast.screens.ledger import PlateLedger
from cellfast.storage.folder import Folder

# Stored in each file's schema metadata: what the rows were made from; beside it (LEDGER_KEY) what became of the plate's cells.
ORIGIN_KEY = b"cellfast"
# A row group holds whole wells and at least so many rows where there are so many; longer wells are cut for the sake of memory.
ROWS_PER_GROUP, MOST_ROWS_PER_GROUP = 1024, 131_072


@dataclass(frozen=True)
class Finished:
    """A plate that is done: its ledger, its quarantined fields, its files relative to the output folder, and the last one's seal."""

    ledger: PlateLedger
    quarantined: list[dict[str, str]]
    files: list[str]
    seal: Seal | None = None


@dataclass(frozen=True)
class Seal:
    """What is known of a plate's last file beside it: its checksum, and what its rows were made from."""

    checksum: Checksum
    origin: dict[str, Any]


def open_output(name: str, place: Folder, parts: PartFiles, names: list[str], model: str) -> PlateOutput:
    """The writer of a format: ``parquet``, ``anndata`` or ``cpg``; raises `CellfastError` where a package is missing."""
    if name == "anndata":
        from cellfast.embedding.anndata_output import AnnDataOutput

        return AnnDataOutput(place, parts, names)
    if name == "cpg":
        from cellfast.embedding.gallery_output import GalleryOutput

        return GalleryOutput(place, parts, names, model)
    return ParquetOutput(place, parts, names)


class PlateOutput(ABC):
    """Writes a plate's files from its parts, and recognises those that are there.

    Args:
        place: the output folder.
        parts: the plate's parts.
        names: of the feature columns.
    """

    kind: str

    def __init__(self, place: Folder, parts: PartFiles, names: list[str]) -> None:
        self.place, self.parts, self.names = place, parts, names
        # Of an account that an earlier run wrote, by the last file of a plate.
        self.seals: dict[str, Seal] = {}
        self.damaged: list[str] = []  # files that an earlier run finished and that changed since
        self.wells = parts.options.aggregate_wells
        self.schema = metadata_schema(wells=self.wells)
        # Plates whose inputs changed, and how; plates made before files were recorded.
        self.remade: dict[str, str] = {}
        self.unrecorded: set[str] = set()

    @abstractmethod
    def sealing_file(self, plan: PlatePlan) -> str:
        """The file that is written last."""

    @abstractmethod
    def write(self, plan: PlatePlan, note: bytes) -> list[str]:
        """Write the plate's files and return their names."""

    @abstractmethod
    def note(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        """(origin, {ledger, quarantined, files}, rows) of a sealing file; None where it has none."""

    @contextmanager
    def sealing(self, plan: PlatePlan) -> Iterator[Path]:
        """Yield a local path that becomes the plate's last file; its seal is there before it is."""
        name = self.sealing_file(plan)
        with self.place.writing(name) as path:
            yield path
            with open(path, "rb") as handle:
                seal = {"checksums": {name: checksum(handle)}, "origin": self.parts.origin(plan)}
            self.place.write_bytes(self._record(plan), json.dumps(seal).encode())

    def _record(self, plan: PlatePlan) -> str:
        return f"{RECORDS}/{plan.file_stem}.{self.kind}.json"

    def _seal(self, plan: PlatePlan) -> Seal | None:
        name = self.sealing_file(plan)
        try:
            record = json.loads(self.place.read_bytes(self._record(plan)))
            return Seal(dict(record["checksums"][name]), dict(record["origin"]))
        except FileNotFoundError:
            return self.seals.get(name)
        except (ValueError, KeyError, TypeError):
            return Seal({}, self.parts.origin(plan))  # a damaged record: no file fits it

    def finished(self, plan: PlatePlan, *, just_made: bool = False) -> Finished | None:
        """What an earlier run finished of this plate, or None; files that are not as they were written are noted in ``damaged``.

        Args:
            just_made: this run wrote the files: they are not read again.

        Raises:
            CellfastError: the file is damaged and nothing is known of it, is not ours, or was made from something else.
        """
        name = self.sealing_file(plan)
        if not self.place.exists(name):
            return None
        seal = self._seal(plan)
        if seal is not None and not just_made and self.place.checksum(name) != seal.checksum:
            self._check_origin(plan, seal.origin, None)  # a damaged file is not parsed
            self.damaged.append(name)
            return None
        try:
            before, note, rows = self.note(name)
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            raise CellfastError(
                f"{self.place.path(name)}: damaged or of another format ({error}); delete it, or use --force to make it again"
            ) from error
        if before is None:
            raise CellfastError(
                f"{self.place.path(name)}: not written by cellfast embed; choose another folder, or use --force to replace it"
            )
        if not self._check_origin(plan, before, note) or note is None:
            return None
        if not just_made and (changed := self._changed_pieces(plan, note)):
            self.damaged += changed
            return None
        known = PlateLedger.__dataclass_fields__
        ledger = PlateLedger(**{key: value for key, value in note["ledger"].items() if key in known})
        if not self.wells and rows != ledger.cells_written:
            return None
        if seal is None:  # by an earlier version
            seal = Seal(self.place.checksum(name), self.parts.origin(plan))
        return Finished(ledger, note["quarantined"], note["files"], seal)

    def _changed_pieces(self, plan: PlatePlan, note: dict[str, Any]) -> list[str]:
        """Files of the plate beside the last one that are not as they were written."""
        return []

    def _check_origin(self, plan: PlatePlan, before: dict[str, Any], note: dict[str, Any] | None) -> bool:
        """True: made from the same. False: its fields were mended since, and it is to be made again.

        Raises:
            CellfastError: made from something else.
        """
        origin = json.loads(json.dumps(self.parts.origin(plan)))
        before = {"tta": 1, "dtype": "float32", "aggregate": "none", **before}
        inputs, changed = changed_options(before, origin)
        if changed and note is not None and not note["ledger"].get("cells_written"):
            return False  # nothing is lost: there is no cell in it
        if changed:
            changed.sort(key=lambda k: (k != "model", k))
            different = "; ".join(f"{k} was {_short(before.get(k))}, is {_short(origin.get(k))}" for k in changed)
            raise CellfastError(
                f"{self.place.path(self.sealing_file(plan))}: embedded before from something else ({different}); choose another folder, "
                "or use --force to replace it"
            )
        recorded = note.get("inputs") if note is not None else None
        files = changed_files(recorded, plan.inputs) if recorded is not None and not inputs else None
        if inputs or files:
            self.remade[plan.plate] = "; ".join([*inputs, *([files] if files else [])])
            return False
        if note is not None and recorded is None and plan.inputs:
            self.unrecorded.add(plan.plate)
        return True

    def clear(self, plan: PlatePlan) -> None:
        """Remove what a killed run left of a plate that is about to be made."""
        return  # most formats have nothing of the kind

    def collate(self, plans: list[PlatePlan]) -> dict[str, Checksum]:
        """Write what is made of all plates together; returns the checksums of those files."""
        return {}

    def tables(self, plan: PlatePlan) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(metadata, values) of the plate, part by part; of well profiles all at once."""
        if self.wells:
            yield means_of_wells(self.parts.tables(plan), self.parts.options.dtype)
            return
        for table in self.parts.tables(plan):
            yield table.select(self.schema.names), feature_matrix(table)


class ParquetOutput(PlateOutput):
    """``<plate>.parquet``: the metadata columns, then one column per feature; a row group holds whole wells."""

    kind = "parquet"

    def sealing_file(self, plan: PlatePlan) -> str:
        return f"{plan.file_stem}.parquet"

    def note(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        return parquet_note(self.place, name)

    def write(self, plan: PlatePlan, note: bytes) -> list[str]:
        name = self.sealing_file(plan)
        notes = sealed(self.parts.origin(plan), note, [name])
        with self.sealing(plan) as path:
            write_parquet(path, grouped_by_well(self.tables(plan)), self.schema, self.names, self.parts.options.dtype, notes)
        return [name]


def sealed(
    origin: dict[str, Any], note: bytes, files: list[str], checksums: dict[str, Checksum] | None = None
) -> dict[bytes, bytes]:
    """Schema metadata of a plate's last file; ``checksums`` are those of the files before it."""
    content = {**json.loads(note), "files": files if len(files) < 50 else files[-1:]}
    if checksums:
        content["checksums"] = checksums
    return {ORIGIN_KEY: json.dumps(origin, sort_keys=True).encode(), LEDGER_KEY: json.dumps(content).encode()}


def plate_note(ledger: PlateLedger, quarantined: list[dict[str, str]], inputs: dict[str, str]) -> bytes:
    """A plate's ledger, and the files it is made from, as they are kept in its last file."""
    return json.dumps(masked_values({"ledger": asdict(ledger), "quarantined": quarantined, "inputs": inputs})).encode()


def parquet_note(place: Folder, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
    """(origin, ledger note, rows) from a parquet file's schema."""
    with place.reading(name) as handle:
        file = pq.ParquetFile(handle)
        found, rows = file.schema_arrow.metadata or {}, file.metadata.num_rows
    origin = json.loads(found[ORIGIN_KEY]) if ORIGIN_KEY in found else None
    return origin, json.loads(found[LEDGER_KEY]) if LEDGER_KEY in found else None, rows


def write_parquet(
    path: Path,
    groups: Iterator[tuple[pa.Table, np.ndarray]],
    schema: pa.Schema,
    names: list[str],
    dtype: str,
    notes: dict[bytes, bytes],
) -> None:
    """Write (metadata, values) pairs, a row group each; statistics and dictionaries for the metadata only: features do not profit."""
    value_type = pa.float32() if dtype == "float32" else pa.float16()
    full = pa.schema([*schema, *((name, value_type) for name in names)], metadata=notes or None)
    compression = {**dict.fromkeys(schema.names, "snappy"), **dict.fromkeys(names, "none")}
    with pq.ParquetWriter(
        path,
        full,
        compression=compression,
        use_dictionary=list(schema.names),
        write_statistics=list(schema.names),
        write_page_checksum=True,
    ) as writer:
        for metadata, values in groups:
            if len(metadata) == 0:
                continue
            columns = np.ascontiguousarray(values.reshape(len(metadata), len(names)).T)
            arrays = [metadata.column(name).combine_chunks() for name in schema.names] + [pa.array(c) for c in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=full), row_group_size=len(metadata))
        leave_room(writer)
    seal_footer(path)


def grouped_by_well(pieces: Iterator[tuple[pa.Table, np.ndarray]]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Regroup rows so that a group holds whole wells: at least 1,024 rows where there are so many, at most 131,072."""
    held: list[tuple[pa.Table, np.ndarray]] = []
    count, last = 0, None

    def flush() -> tuple[pa.Table, np.ndarray]:
        nonlocal held, count
        out = pa.concat_tables([t for t, _ in held]).combine_chunks(), np.concatenate([v for _, v in held])
        held, count = [], 0
        return out

    for metadata, values in pieces:
        wells = np.asarray(metadata.column("Metadata_Well").to_pylist(), dtype=object)
        if not len(wells):
            continue
        edges = np.flatnonzero(wells[1:] != wells[:-1]) + 1
        for start, stop in zip([0, *edges], [*edges, len(wells)]):
            if wells[start] != last and count >= ROWS_PER_GROUP:
                yield flush()
            last = wells[start]
            while start < stop:
                end = min(stop, start + MOST_ROWS_PER_GROUP - count)
                held.append((metadata.slice(start, end - start), values[start:end]))
                count += end - start
                start = end
                if count >= MOST_ROWS_PER_GROUP:
                    yield flush()
    if held:
        yield flush()


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 24 else text
