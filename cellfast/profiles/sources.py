"""Where features come from: embedding folders, parquet, CSV(.gz) and DeepProfiler npz files, read in bounded memory."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from cellfast.embeddings_folder import EmbeddingsFolder, open_folder
from cellfast.errors import CellfastError
from cellfast.parquet_footer import check_footer
from cellfast.profiles import columns as names
from cellfast.profiles.table import _PROVENANCE_KEY, canonical_metadata

#: Files compared with their checksums at the same time.
CHECKERS = 4
#: Rows decoded at a time: small enough that a block of columns stays in the second-level cache while it is transposed.
ROWS_PER_BATCH = 16384


class FeatureFile(Protocol):
    """One file of rows: its metadata, and its features in blocks of columns.

    Attributes:
        path: the file.
        num_rows: rows in it.
        all_columns: its column names.
        numeric_columns: those of them that hold numbers.
    """

    path: Path
    num_rows: int
    all_columns: list[str]
    numeric_columns: list[str]
    provenance: dict[str, Any]

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        """The named columns as a DataFrame [num_rows, …]."""
        ...

    def dtype(self, columns: Sequence[str]) -> type:
        """float32 if all the named columns are stored so, else float64."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        """The named columns as float arrays [≤ ROWS_PER_BATCH, len(columns)], in row order; a batch is valid until the next is
        asked for.
        """
        ...


class ParquetFile:
    """A parquet file; only the asked columns of one row group are decoded at a time; its footer and pages are compared with the CRC-32 they carry, if any.

    Raises:
        CellfastError: (from every method) the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        with self._told():
            check_footer(path)
            self._parquet = pq.ParquetFile(
                path, memory_map=False, pre_buffer=False, buffer_size=1 << 18, page_checksum_verification=True
            )
            schema, self.num_rows = self._parquet.schema_arrow, self._parquet.metadata.num_rows
            groups = [self._parquet.metadata.row_group(i) for i in range(self._parquet.metadata.num_row_groups)]
            if self.num_rows < 0 or [group.num_rows for group in groups if group.num_rows < 0]:
                raise ValueError("a negative number of rows")
            if sum(group.num_rows for group in groups) != self.num_rows:
                raise ValueError(f"{self.num_rows} rows, but its parts have another number")
            self.all_columns = schema.names
            self.numeric_columns = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
            self._double = {f.name for f in schema if not (pa.types.is_float32(f.type) or pa.types.is_float16(f.type))}
            note = (schema.metadata or {}).get(_PROVENANCE_KEY)
            self.provenance: dict[str, Any] = json.loads(note) if note else {}

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except CellfastError:
            raise
        # Arrow's exceptions are of all these kinds.
        except (ValueError, TypeError, KeyError, NotImplementedError, OSError, MemoryError, RuntimeError, OverflowError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CellfastError(
                f"{self.path}: not a readable parquet file ({reason[:300]}). Write it again, or remove it."
            ) from None

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        with self._told():
            frame = self._parquet.read(columns=list(columns)).to_pandas()
            self._check_rows(len(frame) if columns else self.num_rows)
        return frame

    def _check_rows(self, found: int) -> None:
        if found != self.num_rows:
            raise ValueError(f"{self.num_rows} rows are listed, {found} are there")

    def dtype(self, columns: Sequence[str]) -> type:
        return np.float64 if any(c in self._double for c in columns) else np.float32

    def batches(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        buffer, rows = np.empty((ROWS_PER_BATCH, len(columns)), self.dtype(columns)), 0
        with self._told():
            batches = self._parquet.iter_batches(batch_size=ROWS_PER_BATCH, columns=list(columns), use_threads=False)
        while True:
            with self._told():
                if (batch := next(batches, None)) is None:
                    self._check_rows(rows if columns else self.num_rows)
                    return
                block = buffer[: batch.num_rows]
                for j, name in enumerate(columns):
                    # By name: the reader returns columns in file order, whatever the order asked for. Missing values become NaN.
                    block[:, j] = batch.column(name).to_numpy(zero_copy_only=False)
                rows += batch.num_rows
            yield block


class CsvFile:
    """A CSV or CSV.gz file; numbers are read as float64."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.provenance: dict[str, Any] = {}
        try:
            head = pd.read_csv(path, nrows=2000)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, EOFError) as error:
            raise CellfastError(f"{path}: not a readable CSV file ({str(error).strip().splitlines()[0]}).") from None
        self.all_columns = [str(c) for c in head.columns]
        self.numeric_columns = [str(c) for c in head.columns if pd.api.types.is_numeric_dtype(head[c].dtype)]
        self._frame: pd.DataFrame | None = None
        self.num_rows = len(head) if len(head) < 2000 else len(self._whole())

    def _whole(self) -> pd.DataFrame:
        if self._frame is None:
            self._frame = pd.read_csv(self.path, low_memory=False)
        return self._frame

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        return self._whole()[list(columns)]

    def dtype(self, columns: Sequence[str]) -> type:
        return np.float64

    def batches(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        frame = self._whole()
        for column in columns:
            if not pd.api.types.is_numeric_dtype(frame[column].dtype):
                bad = next(v for v in frame[column] if pd.to_numeric(v, errors="coerce") != pd.to_numeric(v, errors="coerce"))
                raise CellfastError(f"{self.path}: column '{column}' is a feature but holds '{bad}', which is not a number.")
        for start in range(0, len(frame), ROWS_PER_BATCH):
            yield frame[list(columns)].iloc[start : start + ROWS_PER_BATCH].to_numpy(dtype=np.float64, na_value=np.nan)


class NpzFile:
    """A DeepProfiler npz: ``features`` [N, D], ``metadata`` (a dictionary that needs pickle is refused), ``locations`` [N, 2].

    DeepProfiler writes ``<plate>/<well>/<site>.npz`` or ``<plate>_<well>_<site>.npz``: plate, well and site are taken from the
    path, as the pickled metadata in the file cannot be read without executing code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.provenance: dict[str, Any] = {}
        try:
            with np.load(path, allow_pickle=False) as archive:
                if "features" not in archive.files:
                    raise CellfastError(
                        f"{path}: a DeepProfiler npz has an array 'features'; this one has {', '.join(archive.files) or 'none'}."
                    )
                self._features = archive["features"]
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            if isinstance(error, CellfastError):
                raise
            raise CellfastError(f"{path}: not a readable npz file ({error}).") from None
        if self._features.ndim != 2:
            raise CellfastError(f"{path}: 'features' must have shape [cells, features], got {list(self._features.shape)}.")
        self.num_rows, num_features = self._features.shape
        width = max(3, len(str(max(num_features - 1, 0))))
        self._names = [f"h{i:0{width}d}" for i in range(num_features)]
        parts = path.stem.split("_") if len(path.stem.split("_")) >= 3 else None
        if parts:
            plate, well, site = "_".join(parts[:-2]), parts[-2], parts[-1]
        elif "-" in path.stem:
            well, site = path.stem.split("-", 1)
            plate = path.parent.name
        else:
            plate, well, site = path.parent.parent.name, path.parent.name, path.stem
        self._place = {names.PLATE: plate, names.WELL: well, names.SITE: site}
        self.all_columns = [*self._place, *self._names]
        self.numeric_columns = list(self._names)

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame({c: [self._place[c]] * self.num_rows for c in columns})

    def dtype(self, columns: Sequence[str]) -> type:
        return np.float64 if self._features.dtype == np.float64 else np.float32

    def batches(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        index = {n: i for i, n in enumerate(self._names)}
        chosen = [index[c] for c in columns]
        for start in range(0, self.num_rows, ROWS_PER_BATCH):
            yield self._features[start : start + ROWS_PER_BATCH][:, chosen].astype(self.dtype(columns))


def _open_file(path: Path) -> FeatureFile:
    name = path.name.lower()
    if name.endswith((".parquet", ".pq")):
        return ParquetFile(path)
    if name.endswith((".csv", ".csv.gz")):
        return CsvFile(path)
    if name.endswith(".npz"):
        return NpzFile(path)
    raise CellfastError(f"{path}: expected .parquet, .csv, .csv.gz or .npz, or a folder of them.")


def _list_files(
    inputs: Sequence[str | os.PathLike[str]], *, allow_unfinished: bool = False
) -> tuple[list[Path], dict[Path, EmbeddingsFolder], list[str]]:
    """(files, the embeddings folder that a file is of, what is missing of unfinished embeddings)."""
    files: list[Path] = []
    folder_of: dict[Path, EmbeddingsFolder] = {}
    unfinished: list[str] = []
    for item in inputs:
        path = Path(item)
        before = len(files)
        if path.is_dir():
            folder = open_folder(path)
            if folder is not None and (trouble := folder.check_finished(allow_unfinished=allow_unfinished)):
                unfinished.append(trouble)
            inside = sorted(p for p in path.glob("*.parquet") if not p.name.startswith("."))
            if not inside:
                inside = sorted(
                    p for p in path.rglob("*") if p.name.lower().endswith((".parquet", ".npz")) and not p.name.startswith(".")
                )
            if not inside:
                inside = sorted(p for p in path.iterdir() if p.name.lower().endswith((".csv", ".csv.gz")))
            if not inside:
                raise CellfastError(
                    f"{path}: no .parquet, .npz or .csv file in this folder. `cellfast embed` writes one parquet file per plate."
                )
            files.extend(inside)
        elif path.is_file():
            # A file by itself is whole, whatever became of the rest of its folder.
            folder = open_folder(path.parent)
            files.append(path)
        else:
            raise CellfastError(f"{path}: no such file or folder.")
        if folder is not None:
            folder_of.update(dict.fromkeys(files[before:], folder))
    doubled = {p for p in files if files.count(p) > 1} if len(files) != len(set(files)) else set()
    if doubled:
        raise CellfastError(f"{sorted(doubled)[0]} is given twice: each input may be given once.")
    return files, folder_of, unfinished


class FeatureSource:
    """A set of files that hold the same features.

    Attributes:
        files: the files in reading order.
        feature_names: the features, in the order of the first file.
        dtype: float32 if every file stores float32, else float64.
        provenance: the note of a single profile file, else empty.
        unfinished: what is missing of unfinished embeddings, a sentence each.
    """

    def __init__(
        self, paths: Sequence[Path], patterns: Sequence[str], overrides: Mapping[str, str] | None, unfinished: Sequence[str] = ()
    ) -> None:
        self.unfinished = list(unfinished)
        self.files = [_open_file(path) for path in paths]
        self.provenance: dict[str, Any] = self.files[0].provenance if len(self.files) == 1 else {}
        self._found: list[dict[str, str]] = []
        first = next((f for f in self.files if f.num_rows > 0), self.files[0])
        self.num_rows = sum(f.num_rows for f in self.files)
        if self.num_rows == 0:
            raise CellfastError(
                f"{self.files[0].path}: no rows{' in any of the files' if len(self.files) > 1 else ''}. There is nothing "
                f"to profile."
            )
        for file in self.files:
            if len(set(file.all_columns)) != len(file.all_columns):
                doubled = sorted({c for c in file.all_columns if file.all_columns.count(c) > 1})
                raise CellfastError(
                    f"{file.path}: duplicate column names: {', '.join(doubled[:5])}. Each column must have a name of its own."
                )
            self._found.append(names.find_metadata_columns(file.all_columns, overrides, str(file.path)))
        self.feature_names = names.infer_features(
            first.numeric_columns, self._found[self.files.index(first)].values(), patterns, str(first.path)
        )
        for file in self.files:
            missing = [c for c in self.feature_names if c not in set(file.all_columns)]
            if missing and file.num_rows:
                raise CellfastError(
                    f"{file.path} lacks {len(missing)} of the {len(self.feature_names)} features of {first.path}, among "
                    f"them '{missing[0]}': "
                    "all inputs must hold the same features."
                )
        self.files = [f for f in self.files if f.num_rows]
        self._found = [names.find_metadata_columns(f.all_columns, overrides, str(f.path)) for f in self.files]
        self.dtype = np.result_type(*[f.dtype(self.feature_names) for f in self.files])

    def metadata(self, index: int) -> pd.DataFrame:
        """Canonical metadata of file ``index``: everything that is neither a feature nor another measurement."""
        file, found = self.files[index], self._found[index]
        numeric = set(file.numeric_columns)
        features = set(self.feature_names)
        recognised = set(found.values())
        # Numeric columns that were not chosen as features are measurements left out, not metadata, unless they say Metadata_.
        keep = [
            c
            for c in file.all_columns
            if c not in features
            and (c in recognised or c.lower().startswith("metadata_") or "_metadata_" in c.lower() or c not in numeric)
        ]
        return canonical_metadata(file.frame(keep), found)

    def batches(self, index: int, columns: Sequence[str] | None = None) -> Iterator[np.ndarray]:
        """Features of file ``index`` as float arrays [≤ ROWS_PER_BATCH, columns], in row order."""
        yield from self.files[index].batches(self.feature_names if columns is None else columns)

    def read_all(self) -> tuple[pd.DataFrame, np.ndarray]:
        """All rows in memory: metadata [N, …] and features [N, D]."""
        values = np.empty((self.num_rows, len(self.feature_names)), self.dtype)
        start = 0
        for index in range(len(self.files)):
            for block in self.batches(index):
                values[start : start + len(block)] = block
                start += len(block)
        frames = [self.metadata(index) for index in range(len(self.files))]
        return (frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)), values


def open_source(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    features: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    allow_unfinished: bool = False,
) -> FeatureSource:
    """Open files and folders as one source of features; files of ``cellfast embed`` are compared with their checksums first.

    Args:
        inputs: embedding folders, or .parquet, .csv, .csv.gz, .npz files.
        features: prefixes or regular expressions; empty infers the features (``columns.infer_features``).
        overrides: canonical metadata name → column.
        allow_unfinished: take what is there of an embedding that is not finished.

    Raises:
        CellfastError: missing or unreadable files, no rows, no features, files with different features, an unfinished embedding.
    """
    files, folder_of, unfinished = _list_files(inputs, allow_unfinished=allow_unfinished)
    with ThreadPoolExecutor(CHECKERS) as pool:
        for checked in [pool.submit(folder.check, path) for path, folder in folder_of.items()]:
            checked.result()
    return FeatureSource(files, features, overrides, unfinished)
