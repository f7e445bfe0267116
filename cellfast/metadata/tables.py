"""The one reader of tables: text, parquet files and folders, Arrow and feather; for ingest, embed, profile and evaluate alike."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np
import pandas as pd

from cellfast.bounded import check_parquet, told
from cellfast.errors import CellfastError
from cellfast.metadata.columns import check_doubled, is_measured
from cellfast.metadata.text_tables import ROWS_PER_BLOCK, TextTable, not_a_number, read_text
from cellfast.metadata.values import text_column
from cellfast.parquet_footer import check_footer
from cellfast.storage.urls import exists, is_url, read_bytes

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
TEXT = (".csv", ".tsv", ".tab", ".txt", ".csv.gz", ".tsv.gz", ".tab.gz", ".txt.gz")

# What partitioned folders call a missing value.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class Table(Protocol):
    """One table: its metadata as text, and its features in blocks of rows.

    Attributes:
        path: the file, for messages.
        num_rows: rows in it.
        all_columns: its column names.
        numeric_columns: those of them that hold numbers, or would if their cells were right.
        schema_note: what the file's schema carries beside the columns.
        notes: what was noticed while reading, for the report.
    """

    path: Path
    num_rows: int
    all_columns: list[str]
    numeric_columns: list[str]
    schema_note: dict[bytes, bytes]
    notes: list[str]

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        """The named columns as a DataFrame [num_rows, …]."""
        ...

    def dtype(self, columns: Sequence[str]) -> type:
        """float32 if all the named columns are stored so (or as float16), else float64."""
        ...

    def blocks(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        """The named columns as floats [≤ ROWS_PER_BLOCK, len(columns)], in row order, missing as NaN; a block is valid until the
        next is asked for.

        Raises:
            CellfastError: a value is no number (names column, row and value).
        """
        ...


class ArrowTable:
    """A parquet, Arrow or feather file; of parquet only the asked columns of one row group are decoded at a time.

    ``constants``: columns that the file's folders name (``plate=P1/``).
    """

    def __init__(self, file: Path, shown: str, constants: Mapping[str, str] | None = None) -> None:
        import pyarrow as pa

        self.path = Path(shown)
        self.notes: list[str] = []
        self._constants = dict(constants or {})
        self._parquet: Any = None
        self._table: Any = None
        with told(shown, "table"):
            if file.name.lower().endswith(PARQUET):
                import pyarrow.parquet as pq

                check_footer(file)
                check_parquet(file)
                self._parquet = pq.ParquetFile(
                    file, memory_map=False, pre_buffer=False, buffer_size=1 << 18, page_checksum_verification=True
                )
                schema, self.num_rows = self._parquet.schema_arrow, self._parquet.metadata.num_rows
            else:
                self._table = _read_arrow(file)
                schema, self.num_rows = self._table.schema, self._table.num_rows
        check_doubled(schema.names, shown)
        # A column named in the folder and in the file: the file's own is kept.
        self._constants = {k: v for k, v in self._constants.items() if k not in schema.names}
        self._types = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema}
        self.all_columns = [*self._constants, *schema.names]
        self.numeric_columns = [n for n, kind in self._types.items() if _is_number(kind) or (is_measured(n) and _is_text(kind))]
        self.schema_note: dict[bytes, bytes] = dict(schema.metadata or {})

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        own = [c for c in columns if c in self._types]
        with told(self.path, "table"):
            if not own:
                frame = pd.DataFrame(index=pd.RangeIndex(self.num_rows))
            else:
                table = (
                    self._parquet.read(columns=own, use_threads=False) if self._parquet is not None else self._table.select(own)
                )
                table.validate(full=True)  # text that is no UTF-8 would be found out where no file is named any more
                self._check_text(table)
                # Without pandas' own note in the schema an index that pandas stored is a column like any other.
                frame = table.replace_schema_metadata().to_pandas(integer_object_nulls=True)
        for name, value in self._constants.items():
            if name in columns:
                frame[name] = value
        return frame[list(columns)]

    def _check_text(self, table: Any) -> None:
        """Refuse names with a zero byte: no file and no table can hold them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for name in table.schema.names:
            if _is_text(self._types[name]):
                column = table.column(name)
                column = column.cast(pa.large_string()) if pa.types.is_dictionary(column.type) else column
                if pc.any(pc.match_substring(column, "\0")).as_py():
                    raise CellfastError(f"{self.path}: column '{name}' holds a zero byte, which is no text; write it again")

    def dtype(self, columns: Sequence[str]) -> type:
        import pyarrow as pa

        single = all(pa.types.is_float32(self._types[c]) or pa.types.is_float16(self._types[c]) for c in columns)
        return np.float32 if single else np.float64

    def blocks(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        buffer: np.ndarray = np.empty((ROWS_PER_BLOCK, len(columns)), self.dtype(columns))
        start = 0
        with told(self.path, "table"):
            if self._parquet is not None:
                batches = self._parquet.iter_batches(batch_size=ROWS_PER_BLOCK, columns=list(columns), use_threads=False)
            else:
                batches = iter(self._table.select(list(columns)).to_batches(max_chunksize=ROWS_PER_BLOCK))
        while True:
            with told(self.path, "table"):
                if (batch := next(batches, None)) is None:
                    break
                block = buffer[: batch.num_rows]
                for j, name in enumerate(columns):
                    # By name: the reader returns columns in file order, whatever the order asked for. Missing values become NaN.
                    block[:, j] = self._floats(batch.column(name), name, start)
            yield block
            start += len(block)
        if columns and start != self.num_rows:
            raise CellfastError(f"{self.path}: damaged: {self.num_rows:,} rows expected, {start:,} found; write it again")

    def _floats(self, array: Any, name: str, start: int) -> np.ndarray:
        import pyarrow as pa

        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if _is_text(array.type):
            for row, value in enumerate(array.to_pylist()):
                try:
                    float(value or "nan")
                except ValueError:
                    raise not_a_number(self.path, name, start + row + 1, value) from None
            return np.array([float(v or "nan") for v in array.to_pylist()])
        if pa.types.is_decimal(array.type):
            array = array.cast(pa.float64())
        return array.to_numpy(zero_copy_only=False)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_arrow(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.feather as feather

    with open(file, "rb") as handle:
        start = handle.read(6)
    if start in (b"ARROW1",) or start[:4] == b"FEA1":
        table = feather.read_table(file, memory_map=False)
    else:
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
            table = reader.read_all()
    table.validate(full=True)
    return table


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a table."""
    return str(path).lower().endswith((*PARQUET, *ARROW, *TEXT))


def open_table(file: str | os.PathLike[str], *, shown: str | None = None, constants: Mapping[str, str] | None = None) -> Table:
    """Open a local file as a table whose features are read in blocks.

    Raises:
        CellfastError: missing, damaged, doubled columns.
    """
    file = Path(file)
    if not file.is_file():
        raise CellfastError(f"{shown or file}: no such file.")
    if file.name.lower().endswith((*PARQUET, *ARROW)):
        return ArrowTable(file, shown or str(file), constants)
    return TextTable(file, shown or str(file))


def partition_values(file: Path, folder: Path) -> dict[str, str]:
    """The columns that the folders between ``folder`` and ``file`` name: ``{"plate": "000123"}`` of
    ``plate=000123/part-0.parquet``."""
    parts = [part.split("=", 1) for part in file.relative_to(folder).parts[:-1] if "=" in part]
    return {key: "" if value == _NULL_PARTITION else unquote(value) for key, value in parts}


def read_table(path: str | os.PathLike[str], what: str, notes: list[str] | None = None) -> pd.DataFrame:
    """A whole table as text, from a file, a partitioned parquet folder or an fsspec URL: names as written, missing cells ``""``.

    Args:
        path: ``.csv .tsv .txt`` (``.gz`` too; commas, tabs or semicolons; UTF-8, UTF-16 or Windows' encoding), ``.parquet``,
            ``.arrow``, ``.feather``.
        what: what is expected, for the message: ``a table of wells``.
        notes: where what was noticed (an unusual encoding) is added.

    Raises:
        CellfastError: missing, damaged, doubled columns, a row with more values than the header has names.
    """
    local = Path(path)
    if not is_url(path) and local.is_dir():
        files = sorted(p for p in local.rglob("*.parquet") if not p.name.startswith((".", "_")))
        if not files:
            raise CellfastError(f"{path}: no .parquet file in this folder; expected {what}")
        return pd.concat([_as_text(ArrowTable(f, str(f), partition_values(f, local))) for f in files], ignore_index=True).fillna(
            ""
        )
    if not exists(path):
        raise CellfastError(f"{path}: no such file; expected {what}")
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="cellfast-") as folder:
            copy = Path(folder) / str(path).rsplit("/", 1)[-1]
            copy.write_bytes(read_bytes(str(path)))
            return _read(copy, str(path), notes)
    return _read(local, str(path), notes)


def _read(file: Path, shown: str, notes: list[str] | None) -> pd.DataFrame:
    if file.name.lower().endswith((*PARQUET, *ARROW)):
        return _as_text(ArrowTable(file, shown))
    from cellfast.metadata.text_tables import TextFormat

    form = TextFormat.of(file, shown)
    if notes is not None:
        notes.extend(form.notes)
    return read_text(file, shown, form).reset_index(drop=True)


def _as_text(table: ArrowTable) -> pd.DataFrame:
    frame = table.frame(table.all_columns)
    return pd.DataFrame({name: text_column(frame[name]) for name in frame.columns}, index=frame.index)
