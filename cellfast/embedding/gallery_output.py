"""The Cell Painting Gallery's layout: a file per site, one of well profiles per plate, and one of all plates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellfast.embedding.outputs import PlateOutput, parquet_note, sealed, write_parquet
from cellfast.embedding.parts import PartFiles, metadata_schema
from cellfast.embedding.sources import PlatePlan
from cellfast.embeddings_folder import GALLERY, Checksum, checksum
from cellfast.errors import CellfastError
from cellfast.metadata.names import check_batch
from cellfast.parquet_footer import leave_room, seal_footer
from cellfast.storage.folder import Folder


class GalleryOutput(PlateOutput):
    """The Cell Painting Gallery's layout.

    ``workspace_dl/embeddings/<model>/<batch>/<plate>/<well>-<site>/embedding.parquet`` with a row per cell, then
    ``workspace_dl/profiles/<model>/<batch>/<plate>/<plate>.parquet`` with a row per well.

    Source: the Gallery's documentation of its folder structure, section workspace_dl.
    """

    kind = "cpg"

    def __init__(self, place: Folder, parts: PartFiles, names: list[str], model: str) -> None:
        super().__init__(place, parts, names)
        self.model = model

    def folder(self, kind: str, plan: PlatePlan) -> str:
        """The plate's folder of embeddings or profiles."""
        return f"{GALLERY}/{kind}/{self.model}/{check_batch(plan.batch) or 'batch'}/{plan.file_stem}"

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
        files: dict[str, Checksum] = {}
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
                    if "/" in well[start]:
                        raise CellfastError(
                            f"plate {plan.plate}: well {well[start]!r} cannot name a folder; rename it in the metadata"
                        )
                    place = f"{well[start]}-{site[start]}" if site[start] >= 0 else str(well[start])
                    name = f"{self.folder('embeddings', plan)}/{place}/embedding.parquet"
                    if name in files:
                        # A site whose rows another part began: sites are units of parts of fields, not of stores.
                        files[name] = self._append(name, metadata.slice(start, stop - start), values[start:stop])
                        continue
                    files[name] = self._write_site(name, metadata.slice(start, stop - start), values[start:stop])
        table, means = wells.result(dtype)
        name = self.sealing_file(plan)
        notes = sealed(self.parts.origin(plan), note, [*files, name], files)
        with self.sealing(plan) as path:
            write_parquet(path, iter([(table, means)]), table.schema, self.names, dtype, notes)
        return [*files, name]

    def collate(self, plans: list[PlatePlan]) -> dict[str, Checksum]:
        """``workspace_dl/collated/<model>/collated.parquet``: the well profiles of all plates."""
        name = f"{GALLERY}/collated/{self.model}/collated.parquet"
        with self.place.writing(name) as path:
            writer = None
            for plan in plans:
                with self.place.reading(self.sealing_file(plan)) as handle:
                    table = pq.read_table(handle).replace_schema_metadata(None)
                writer = writer or pq.ParquetWriter(path, table.schema, write_page_checksum=True)
                writer.write_table(table)
            assert writer is not None
            leave_room(writer)
            writer.close()
            seal_footer(path)
            with open(path, "rb") as handle:
                return {name: checksum(handle)}

    def _changed_pieces(self, plan: PlatePlan, note: dict[str, Any]) -> list[str]:
        known = note.get("checksums", {})
        return [name for name, one in known.items() if not self.place.exists(name) or self.place.checksum(name) != one]

    def _write_site(self, name: str, metadata: pa.Table, values: np.ndarray) -> Checksum:
        with self.place.writing(name) as path:
            write_parquet(path, iter([(metadata, values)]), self.schema, self.names, self.parts.options.dtype, {})
            with open(path, "rb") as handle:
                return checksum(handle)

    def _append(self, name: str, metadata: pa.Table, values: np.ndarray) -> Checksum:
        with self.place.reading(name) as handle:
            before = pq.read_table(handle)
        old = np.stack([before.column(n).to_numpy() for n in self.names], axis=1)
        return self._write_site(
            name, pa.concat_tables([before.select(self.schema.names), metadata]), np.concatenate([old, values])
        )


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
