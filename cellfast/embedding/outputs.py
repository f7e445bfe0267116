"""The files of a plate: one parquet, AnnData, or the Cell Painting Gallery's folders. The last file of a plate carries its origin and ledger."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellfast.embedding.parts import PartFiles, feature_matrix, means_of_wells, metadata_schema
from cellfast.embedding.place import Place
from cellfast.embedding.sources import PlatePlan
from cellfast.errors import CellfastError
from cellfast.metadata.names import check_batch
from cellfast.printable import masked_values
from cellfast.screens.ledger import PlateLedger

# Stored in each file's schema metadata: what the rows were made from, and what became of the plate's cells.
ORIGIN_KEY, LEDGER_KEY = b"cellfast", b"cellfast_ledger"
# A row group holds whole wells and at least so many rows where there are so many; longer wells are cut for the sake of memory.
ROWS_PER_GROUP, MOST_ROWS_PER_GROUP = 1024, 131_072


@dataclass(frozen=True)
class Finished:
    """A plate that is done: its ledger, its quarantined fields, and its files relative to the output folder."""

    ledger: PlateLedger
    quarantined: list[dict[str, str]]
    files: list[str]


def open_output(name: str, place: Place, parts: PartFiles, names: list[str], model: str) -> PlateOutput:
    """The writer of a format: ``parquet``, ``anndata`` or ``cpg``; raises `CellfastError` where a package is missing."""
    if name == "anndata":
        from cellfast.embedding.anndata_output import AnnDataOutput

        return AnnDataOutput(place, parts, names)
    return ParquetOutput(place, parts, names) if name == "parquet" else GalleryOutput(place, parts, names, model)


class PlateOutput(ABC):
    """Writes a plate's files from its parts, and recognises those that are there.

    Args:
        place: the output folder.
        parts: the plate's parts.
        names: of the feature columns.
    """

    def __init__(self, place: Place, parts: PartFiles, names: list[str]) -> None:
        self.place, self.parts, self.names = place, parts, names
        self.wells = parts.options.aggregate_wells
        self.schema = metadata_schema(wells=self.wells)

    @abstractmethod
    def sealing_file(self, plan: PlatePlan) -> str:
        """The file that is written last."""

    @abstractmethod
    def write(self, plan: PlatePlan, note: bytes) -> list[str]:
        """Write the plate's files and return their names."""

    @abstractmethod
    def note(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        """(origin, {ledger, quarantined, files}, rows) of a sealing file; None where it has none."""

    def finished(self, plan: PlatePlan) -> Finished | None:
        """What an earlier run finished of this plate, or None.

        Raises:
            CellfastError: the file is damaged, not ours, or made from something else.
        """
        name = self.sealing_file(plan)
        if not self.place.exists(name):
            return None
        path = self.place.path(name)
        try:
            before, note, rows = self.note(name)
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise CellfastError(
                f"{path}: damaged or of another format ({error}); delete it, or use --force to make it again"
            ) from error
        if before is None:
            raise CellfastError(f"{path}: not written by cellfast embed; choose another folder, or use --force to replace it")
        origin = json.loads(json.dumps(self.parts.origin(plan)))
        defaults = {"tta": 1, "dtype": "float32", "aggregate": "none"}
        changed = [
            key
            for key in sorted(set(before) | set(origin), key=lambda k: (k != "model", k))
            if before.get(key, defaults.get(key)) != origin.get(key)
        ]
        # A file that was missing may have changed the table itself: mending it must not look like another screen.
        mended = self.parts.options.retry_quarantined and note is not None and note["quarantined"]
        if mended and set(changed) <= {"fields", "locations"}:
            return None if changed else self._finished(note, rows)
        if changed and note is not None and not note["ledger"].get("cells_written"):
            return None  # nothing is lost: there is no cell in it
        if changed:
            different = "; ".join(
                f"{k} was {_short(before.get(k, defaults.get(k)))}, is {_short(origin.get(k))}" for k in changed
            )
            hint = (
                " (fields were quarantined then: --retry-quarantined if they are mended)" if note and note["quarantined"] else ""
            )
            raise CellfastError(
                f"{path}: embedded before from something else ({different}); choose another folder, or use --force to replace it{hint}"
            )
        return None if note is None else self._finished(note, rows)

    def _finished(self, note: dict[str, Any], rows: int) -> Finished | None:
        known = PlateLedger.__dataclass_fields__
        ledger = PlateLedger(**{key: value for key, value in note["ledger"].items() if key in known})
        if not self.wells and rows != ledger.cells_written:
            return None
        return Finished(ledger, note["quarantined"], note["files"])

    def clear(self, plan: PlatePlan) -> None:
        """Remove what a killed run left of a plate that is about to be made."""
        return  # most formats have nothing of the kind

    def collate(self, plans: list[PlatePlan]) -> None:
        """Write what is made of all plates together."""
        return  # most formats have nothing of the kind

    def tables(self, plan: PlatePlan) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(metadata, values) of the plate, part by part; of well profiles all at once."""
        if self.wells:
            yield means_of_wells(self.parts.tables(plan), self.parts.options.dtype)
            return
        for table in self.parts.tables(plan):
            yield table.select(self.schema.names), feature_matrix(table)


class ParquetOutput(PlateOutput):
    """``<plate>.parquet``: the metadata columns, then one column per feature; a row group holds whole wells."""

    def sealing_file(self, plan: PlatePlan) -> str:
        return f"{plan.file_stem}.parquet"

    def note(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        return parquet_note(self.place, name)

    def write(self, plan: PlatePlan, note: bytes) -> list[str]:
        name = self.sealing_file(plan)
        notes = sealed(self.parts.origin(plan), note, [name])
        with self.place.writing(name) as path:
            write_parquet(path, grouped_by_well(self.tables(plan)), self.schema, self.names, self.parts.options.dtype, notes)
        return [name]


class GalleryOutput(PlateOutput):
    """The Cell Painting Gallery's layout.

    ``workspace_dl/embeddings/<model>/<batch>/<plate>/<well>-<site>/embedding.parquet`` with a row per cell, then
    ``workspace_dl/profiles/<model>/<batch>/<plate>/<plate>.parquet`` with a row per well.

    Source: the Gallery's documentation of its folder structure, section workspace_dl.
    """

    def __init__(self, place: Place, parts: PartFiles, names: list[str], model: str) -> None:
        super().__init__(place, parts, names)
        self.model = model

    def folder(self, kind: str, plan: PlatePlan) -> str:
        """The plate's folder of embeddings or profiles."""
        return f"workspace_dl/{kind}/{self.model}/{check_batch(plan.batch) or 'batch'}/{plan.file_stem}"

    def sealing_file(self, plan: PlatePlan) -> str:
        return f"{self.folder('profiles', plan)}/{plan.file_stem}.parquet"

    def clear(self, plan: PlatePlan) -> None:
        # Sites of an earlier attempt would stay where this one finds no cells.
        for kind in ("profiles", "embeddings"):
            self.place.remove(self.folder(kind, plan))

    def note(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        origin, note, _ = parquet_note(self.place, name)
        # The sealing file has a row per well; of the cells the files of the sites were counted when they were written.
        return origin, note, note["ledger"]["cells_written"] if note else 0

    def write(self, plan: PlatePlan, note: bytes) -> list[str]:
        files: dict[str, None] = {}
        wells = WellMeans()
        dtype = self.parts.options.dtype
        for metadata, values in self.tables(plan):
            if self.wells:
                wells.table, wells.values = metadata, values
                continue
            wells.add(metadata, values)
            site = metadata.column("Metadata_Site").to_numpy()
            well = np.asarray(metadata.column("Metadata_Well").to_pylist(), dtype=object)
            edges = np.flatnonzero((site[1:] != site[:-1]) | (well[1:] != well[:-1])) + 1 if len(site) else np.zeros(0, int)
            for start, stop in zip([0, *edges], [*edges, len(site)]):
                if stop > start:
                    place = f"{well[start]}-{site[start]}" if site[start] >= 0 else str(well[start])
                    name = f"{self.folder('embeddings', plan)}/{place}/embedding.parquet"
                    if name in files:
                        # A site whose rows another part began: sites are units of parts of fields, not of stores.
                        self._append(name, metadata.slice(start, stop - start), values[start:stop])
                        continue
                    with self.place.writing(name) as path:
                        pieces = iter([(metadata.slice(start, stop - start), values[start:stop])])
                        write_parquet(path, pieces, self.schema, self.names, dtype, {})
                    files[name] = None
        table, means = wells.result(dtype)
        name = self.sealing_file(plan)
        notes = sealed(self.parts.origin(plan), note, [*files, name])
        with self.place.writing(name) as path:
            write_parquet(path, iter([(table, means)]), table.schema, self.names, dtype, notes)
        return [*files, name]

    def collate(self, plans: list[PlatePlan]) -> None:
        """``workspace_dl/collated/<model>/collated.parquet``: the well profiles of all plates."""
        with self.place.writing(f"workspace_dl/collated/{self.model}/collated.parquet") as path:
            writer = None
            for plan in plans:
                with self.place.reading(self.sealing_file(plan)) as handle:
                    table = pq.read_table(handle).replace_schema_metadata(None)
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
            assert writer is not None
            writer.close()

    def _append(self, name: str, metadata: pa.Table, values: np.ndarray) -> None:
        with self.place.reading(name) as handle:
            before = pq.read_table(handle)
        old = np.stack([before.column(n).to_numpy() for n in self.names], axis=1)
        pieces = iter([(pa.concat_tables([before.select(self.schema.names), metadata]), np.concatenate([old, values]))])
        with self.place.writing(name) as path:
            write_parquet(path, pieces, self.schema, self.names, self.parts.options.dtype, {})


class WellMeans:
    """Means per well of rows that come in pieces."""

    def __init__(self) -> None:
        self.table: pa.Table | None = None
        self.values: np.ndarray | None = None
        self._rows: dict[str, list[Any]] = {}

    def add(self, metadata: pa.Table, values: np.ndarray) -> None:
        """Add the cells of a piece."""
        well = np.asarray(metadata.column("Metadata_Well").to_pylist(), dtype=object)
        edges = np.flatnonzero(well[1:] != well[:-1]) + 1 if len(well) else np.zeros(0, int)
        for start, stop in zip([0, *edges], [*edges, len(well)]):
            if stop == start:
                continue
            total = values[start:stop].sum(axis=0, dtype=np.float64)
            if well[start] in self._rows:
                self._rows[well[start]][1] += total
                self._rows[well[start]][2] += stop - start
            else:
                self._rows[well[start]] = [metadata.slice(start, 1), total, stop - start]

    def result(self, dtype: str) -> tuple[pa.Table, np.ndarray]:
        """(metadata with the number of cells, means) in order of appearance."""
        if self.table is not None and self.values is not None:
            return self.table, self.values
        schema = metadata_schema(wells=True)
        names = schema.names[:-1]
        if not self._rows:
            return schema.empty_table(), np.zeros((0, 0), dtype)
        table = pa.concat_tables([row[0].select(names) for row in self._rows.values()]).combine_chunks()
        table = table.append_column(schema.names[-1], pa.array([row[2] for row in self._rows.values()], pa.int64()))
        return table, np.array([row[1] / row[2] for row in self._rows.values()]).astype(np.float32).astype(dtype)


def sealed(origin: dict[str, Any], note: bytes, files: list[str]) -> dict[bytes, bytes]:
    """Schema metadata of a plate's last file."""
    content = {**json.loads(note), "files": files if len(files) < 50 else files[-1:]}
    return {ORIGIN_KEY: json.dumps(origin, sort_keys=True).encode(), LEDGER_KEY: json.dumps(content).encode()}


def plate_note(ledger: PlateLedger, quarantined: list[dict[str, str]]) -> bytes:
    """A plate's ledger as it is kept in its last file."""
    return json.dumps(masked_values({"ledger": asdict(ledger), "quarantined": quarantined})).encode()


def parquet_note(place: Place, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
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
        path, full, compression=compression, use_dictionary=list(schema.names), write_statistics=list(schema.names)
    ) as writer:
        for metadata, values in groups:
            if len(metadata) == 0:
                continue
            columns = np.ascontiguousarray(values.reshape(len(metadata), len(names)).T)
            arrays = [metadata.column(name).combine_chunks() for name in schema.names] + [pa.array(c) for c in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=full), row_group_size=len(metadata))


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
