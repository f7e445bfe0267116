"""The formats of a plate's files: parquet, AnnData, and the Cell Painting Gallery's folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellfast.embedding.blocks import BlockFiles
from cellfast.embedding.cells import PlatePlan
from cellfast.embedding.plate_files import PlateFiles
from cellfast.embedding.wells import CELL_SCHEMA, WELL_SCHEMA, WellSums, as_stored, runs, texts
from cellfast.embeddings_folder import GALLERY, LEDGER_KEY, Checksum, checksum
from cellfast.errors import CellfastError, option
from cellfast.metadata.columns import SITE, WELL
from cellfast.metadata.names import check_batch
from cellfast.parquet_footer import leave_room, seal_footer
from cellfast.storage.folder import Folder

# In each parquet file's schema metadata: what the rows were made from; beside it (LEDGER_KEY) what became of the plate's cells.
ORIGIN_KEY = b"cellfast"
# A row group holds whole wells and at least so many rows where there are so many; longer wells are cut for the sake of memory.
ROWS_PER_GROUP, MOST_ROWS_PER_GROUP = 1024, 131_072

Rows = Iterator[tuple[pa.Table, np.ndarray]]


class ParquetFiles(PlateFiles):
    """``<plate>.parquet``: the metadata columns, then one column per feature; a row group holds whole wells."""

    kind = "parquet"

    def last_file(self, plan: PlatePlan) -> str:
        return f"{plan.file_stem}.parquet"

    def read_seal(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        return _read_parquet_seal(self.out, name)

    def write(self, plan: PlatePlan, content: dict[str, Any]) -> None:
        origin, ledger = self.seal(plan, content, [self.last_file(plan)])
        with self.sealing(plan) as path:
            _write_parquet(
                path,
                _by_well(self.blocks.rows(plan)),
                WELL_SCHEMA if self.of_wells else CELL_SCHEMA,
                self.names,
                self.dtype,
                origin,
                ledger,
            )


class AnnDataFiles(PlateFiles):
    """``<plate>.h5ad``: X [cells, F], obs the metadata columns, var the features, uns["cellfast"] origin and ledger as JSON.

    obs_names are ``<plate>:<row>``. X is written piece by piece in the layout AnnData documents for dense arrays, so that a plate
    need not fit in memory; obs, var and uns are written by anndata itself.

    Raises:
        CellfastError: anndata is not installed.
    """

    kind = "anndata"

    def __init__(self, blocks: BlockFiles, model: str) -> None:
        super().__init__(blocks, model)
        try:
            import anndata  # noqa: F401
        except ImportError as error:
            raise CellfastError(
                f"{option('formats', 'anndata')} needs the package anndata: pip install 'cellfast[anndata]'"
            ) from error

    def last_file(self, plan: PlatePlan) -> str:
        return f"{plan.file_stem}.h5ad"

    def read_seal(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        with self.out.reading(name) as handle, h5py.File(handle, "r") as file:
            if "cellfast" not in file.get("uns", {}):
                return None, None, 0
            origin, ledger = (json.loads(file["uns/cellfast"][key].asstr()[()]) for key in ("origin", "ledger"))
            return origin, ledger, int(file["X"].shape[0])

    def write(self, plan: PlatePlan, content: dict[str, Any]) -> None:
        import anndata
        import pandas as pd

        origin, ledger = self.seal(plan, content, [self.last_file(plan)])
        width = len(self.names)
        with self.sealing(plan) as path:
            frames, rows = [], 0
            with h5py.File(path, "w") as file:
                # AnnData's reader looks at these two attributes to tell a dense array.
                x = file.create_dataset(
                    "X", shape=(0, width), maxshape=(None, width), dtype=np.dtype(self.dtype), chunks=(1024, width)
                )
                x.attrs["encoding-type"], x.attrs["encoding-version"] = "array", "0.2.0"
                for metadata, values in self.blocks.rows(plan):
                    frames.append(metadata.to_pandas())
                    x.resize(rows + len(metadata), axis=0)
                    if len(metadata):
                        x[rows:] = values
                    rows += len(metadata)
                obs = pd.concat(frames, ignore_index=True)
                # Few different texts in many rows: categories are what AnnData's users expect, and small.
                for column in obs.columns:
                    if not pd.api.types.is_numeric_dtype(obs[column]):
                        obs[column] = obs[column].astype(object).astype("category")
                obs.index = pd.Index([f"{plan.plate}:{row}" for row in range(rows)], dtype=object)
                var = pd.DataFrame(index=pd.Index(self.names, dtype=object))
                uns = {"cellfast": {"origin": origin, "ledger": ledger}}
                file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
                write = getattr(anndata, "io", None) or anndata.experimental
                empty = {key: {} for key in ("obsm", "varm", "obsp", "varp", "layers")}
                for key, value in {"obs": obs, "var": var, "uns": uns, **empty}.items():
                    write.write_elem(file, key, value)


class GalleryFiles(PlateFiles):
    """The Cell Painting Gallery's layout.

    ``workspace_dl/embeddings/<model>/<batch>/<plate>/<well>-<site>/embedding.parquet`` with a row per cell, then
    ``workspace_dl/profiles/<model>/<batch>/<plate>/<plate>.parquet`` with a row per well.

    Source: the Gallery's documentation of its folder structure, section workspace_dl.
    """

    kind = "cpg"

    def folder(self, kind: str, plan: PlatePlan) -> str:
        """The plate's folder of embeddings or profiles."""
        return f"{GALLERY}/{kind}/{self.model}/{check_batch(plan.batch) or 'batch'}/{plan.file_stem}"

    def last_file(self, plan: PlatePlan) -> str:
        return f"{self.folder('profiles', plan)}/{plan.file_stem}.parquet"

    def clear(self, plan: PlatePlan) -> None:
        # Sites of an earlier attempt would stay where this one finds no cells.
        for kind in ("profiles", "embeddings"):
            self.out.remove(self.folder(kind, plan))

    def read_seal(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        origin, content, _ = _read_parquet_seal(self.out, name)
        # The last file has a row per well; of the cells the files of the sites were counted when they were written.
        return origin, content, content["ledger"]["cells_written"] if content else 0

    def write(self, plan: PlatePlan, content: dict[str, Any]) -> None:
        sites: dict[str, Checksum] = {}
        if self.of_wells:
            ((table, means),) = self.blocks.rows(plan)
        else:
            wells = WellSums()
            for metadata, values in self.blocks.rows(plan):
                wells.add(metadata, values)
                for start, stop in runs(texts(metadata, WELL), metadata.column(SITE).to_numpy()):
                    self._write_site(plan, metadata.slice(start, stop - start), values[start:stop], sites)
            table, means = wells.metadata(), as_stored(wells.means(), self.dtype, plan.plate)
        origin, ledger = self.seal(plan, content, [*sites, self.last_file(plan)], sites)
        with self.sealing(plan) as path:
            _write_parquet(path, iter([(table, means)]), WELL_SCHEMA, self.names, self.dtype, origin, ledger)

    def _write_site(self, plan: PlatePlan, metadata: pa.Table, values: np.ndarray, sites: dict[str, Checksum]) -> None:
        """Write a site's cells, behind those that are there of it."""
        well, site = (metadata.column(key)[0].as_py() for key in (WELL, SITE))
        if "/" in well:
            raise CellfastError(f"plate {plan.plate}: well {well!r} cannot name a folder; rename it in the metadata")
        name = f"{self.folder('embeddings', plan)}/{well}-{site}" if site >= 0 else f"{self.folder('embeddings', plan)}/{well}"
        name += "/embedding.parquet"
        if name in sites:
            # Another block began its rows: blocks end between sites where they are of fields, not where they are of stores.
            with self.out.reading(name) as handle:
                before = pq.read_table(handle)
            values = np.concatenate([np.stack([before.column(n).to_numpy() for n in self.names], axis=1), values])
            metadata = pa.concat_tables([before.select(CELL_SCHEMA.names), metadata])
        with self.out.writing(name) as path:
            _write_parquet(path, iter([(metadata, values)]), CELL_SCHEMA, self.names, self.dtype)
            with open(path, "rb") as handle:
                sites[name] = checksum(handle)

    def collate(self, plans: list[PlatePlan]) -> dict[str, Checksum]:
        """``workspace_dl/collated/<model>/collated.parquet``: the well profiles of all plates."""
        name = f"{GALLERY}/collated/{self.model}/collated.parquet"
        with self.out.writing(name) as path:
            writer = None
            for plan in plans:
                with self.out.reading(self.last_file(plan)) as handle:
                    table = pq.read_table(handle).replace_schema_metadata(None)
                writer = writer or pq.ParquetWriter(path, table.schema, write_page_checksum=True)
                writer.write_table(table)
            assert writer is not None
            leave_room(writer)
            writer.close()
            seal_footer(path)
            with open(path, "rb") as handle:
                return {name: checksum(handle)}


PLATE_FORMATS: dict[str, type[PlateFiles]] = {one.kind: one for one in (ParquetFiles, AnnDataFiles, GalleryFiles)}


def _read_parquet_seal(out: Folder, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
    """(origin, content, rows) from a parquet file's schema."""
    with out.reading(name) as handle:
        file = pq.ParquetFile(handle)
        found, rows = file.schema_arrow.metadata or {}, file.metadata.num_rows
    origin, content = (json.loads(found[key]) if key in found else None for key in (ORIGIN_KEY, LEDGER_KEY))
    return origin, content, rows


def _write_parquet(path: Path, groups: Rows, schema: pa.Schema, names: list[str], dtype: str, *seal: str) -> None:
    """Write (metadata, values) pairs, a row group each; statistics and dictionaries for the metadata only: features do not
    profit."""
    value_type = pa.float32() if dtype == "float32" else pa.float16()
    notes = dict(zip((ORIGIN_KEY, LEDGER_KEY), (text.encode() for text in seal)))
    full = pa.schema([*schema, *((name, value_type) for name in names)], metadata=notes or None)
    compression = {**dict.fromkeys(schema.names, "snappy"), **dict.fromkeys(names, "none")}
    with pq.ParquetWriter(
        path,
        full,
        compression=compression,
        use_dictionary=schema.names,
        write_statistics=schema.names,
        write_page_checksum=True,
    ) as writer:
        for metadata, values in groups:
            if len(metadata) == 0:
                continue
            columns = np.ascontiguousarray(values.T)
            arrays = [metadata.column(name).combine_chunks() for name in schema.names] + [pa.array(c) for c in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=full), row_group_size=len(metadata))
        leave_room(writer)
    seal_footer(path)


def _by_well(rows: Rows) -> Rows:
    """Regroup rows so that a group holds whole wells: at least 1,024 rows where there are so many, at most 131,072."""
    held: list[tuple[pa.Table, np.ndarray]] = []
    count, last = 0, None

    def flush() -> tuple[pa.Table, np.ndarray]:
        nonlocal held, count
        out = pa.concat_tables([t for t, _ in held]).combine_chunks(), np.concatenate([v for _, v in held])
        held, count = [], 0
        return out

    for metadata, values in rows:
        wells = texts(metadata, WELL)
        for start, stop in runs(wells):
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
