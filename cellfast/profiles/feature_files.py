"""Where features come from: embedding folders, tables of every kind and DeepProfiler npz files, read in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.bounded import load_npz
from cellfast.embeddings_folder import GALLERY, EmbeddingsFolder, open_folder
from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.canonical import canonical_metadata, metadata_columns
from cellfast.metadata.joins import split_overrides
from cellfast.metadata.paths import deep_profiler_place
from cellfast.metadata.tables import PARQUET, Table, is_table, open_table, partition_values
from cellfast.metadata.text_tables import ROWS_PER_BLOCK
from cellfast.profiles.table import PROVENANCE_KEY, ProfileTable

#: Files compared with their checksums at the same time.
CHECKERS = 4

_KINDS = "a table (.parquet, .csv, .tsv, .txt, .arrow, .feather; .gz too) or .npz"


class NpzFile:
    """A DeepProfiler npz: ``features`` [N, D], ``metadata`` (a dictionary that needs pickle is not read), ``locations`` [N, 2].

    Plate, well and site are taken from the path, as the pickled metadata in the file cannot be read without executing code.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self.schema_note: dict[bytes, bytes] = {}
        self.notes: list[str] = []
        self._features = load_npz(path, "features")
        if self._features.ndim != 2 or self._features.dtype.kind not in "fiu":
            raise CellfastError(
                f"{path}: 'features' must hold numbers of shape [cells, features], got {self._features.dtype} {list(self._features.shape)}."
            )
        self.num_rows, num_features = self._features.shape
        width = max(3, len(str(max(num_features - 1, 0))))
        self._names = [f"h{i:0{width}d}" for i in range(num_features)]
        plate, well, site = deep_profiler_place(path, root)
        self._place = {names.PLATE: plate, names.WELL: well, names.SITE: str(site)}
        self.all_columns = [*self._place, *self._names]
        self.numeric_columns = list(self._names)

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame({c: [self._place[c]] * self.num_rows for c in columns})

    def dtype(self, columns: Sequence[str]) -> type:
        return np.float32 if self._features.dtype in (np.float16, np.float32) else np.float64

    def blocks(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        index = {n: i for i, n in enumerate(self._names)}
        chosen = [index[c] for c in columns]
        for start in range(0, self.num_rows, ROWS_PER_BLOCK):
            yield self._features[start : start + ROWS_PER_BLOCK][:, chosen].astype(self.dtype(columns))


def _open_file(path: Path, folder: Path | None) -> Table:
    if path.name.lower().endswith(".npz"):
        return NpzFile(path, folder)
    if not is_table(path):
        raise CellfastError(f"{path}: expected {_KINDS}, or a folder of them.")
    return open_table(path, constants=partition_values(path, folder) if folder is not None else None)


def _files_in(folder: Path, embeddings: EmbeddingsFolder | None) -> tuple[list[Path], list[str]]:
    """(the files of features in a folder, what was left): those its ``embeddings.json`` names, else by kind."""
    if embeddings is not None and embeddings.path == folder and embeddings.ledger is not None:
        listed = [str(name) for plate in embeddings.ledger["plates"] for name in plate["files"]]
        files = sorted(folder / name for name in listed if name.endswith(PARQUET) and not name.startswith(f"{GALLERY}/"))
        files = [path for path in files if path.is_file()]
        if files:
            others = sorted(p.name for p in folder.glob("*.parquet") if p not in set(files) and not p.name.startswith("."))
            left = f"{folder}: left out, as its embeddings.json does not name them: {', '.join(others[:5])}"
            return files, [left + (f" and {len(others) - 5} more" if len(others) > 5 else "")] if others else []
    visible = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p, folder)]
    for inside in (
        [p for p in visible if p.parent == folder and p.name.lower().endswith(PARQUET)],
        [p for p in visible if p.name.lower().endswith((*PARQUET, ".npz"))],
        [p for p in visible if p.parent == folder and is_table(p)],
    ):
        if inside:
            return _without_profiles(folder, inside)
    raise CellfastError(f"{folder}: no table or .npz file in this folder. `cellfast embed` writes one parquet file per plate.")


def _without_profiles(folder: Path, files: list[Path]) -> tuple[list[Path], list[str]]:
    """Profiles that `cellfast profile` wrote among files of cells are not cells: they are left, and named."""
    made = [p for p in files if p.name.lower().endswith(PARQUET) and _is_profile(p)]
    if not made or len(made) == len(files):
        return files, []
    shown = ", ".join(p.name for p in made[:5])
    return [p for p in files if p not in made], [f"{folder}: left out, as `cellfast profile` wrote them: {shown}"]


def _is_profile(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return PROVENANCE_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False  # opening it says what is wrong


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


@dataclass
class _Listed:
    """Files with the folder each was found in, the embeddings folder each is of, what is missing of those, and notes."""

    files: list[tuple[Path, Path | None]] = field(default_factory=list)
    embeddings_of: dict[Path, EmbeddingsFolder] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _list_files(
    inputs: Sequence[str | os.PathLike[str]], outputs: Sequence[str | os.PathLike[str]], *, allow_unfinished: bool
) -> _Listed:
    """Files of ``outputs`` are never among them."""
    found = _Listed()
    own = {Path(output).absolute() for output in outputs}
    for item in inputs:
        path = Path(item)
        before = len(found.files)
        if path.is_dir():
            embeddings = open_folder(path)
            if embeddings is not None and (trouble := embeddings.check_finished(allow_unfinished=allow_unfinished)):
                found.unfinished.append(trouble)
            inside, left = _files_in(path, embeddings)
            mine = [p for p in inside if p.absolute() in own]
            if mine:
                found.notes.append(f"{mine[0]} is what this command writes, and is not read")
            if len(mine) == len(inside):
                raise CellfastError(f"{path}: holds nothing but {mine[0].name}, which is what this command writes")
            found.files.extend((p, path) for p in inside if p not in mine)
            found.notes.extend(left)
        elif path.is_file():
            if path.absolute() in own:
                raise CellfastError(f"{path} is given as input and as output: write the profiles under another name.")
            # A file by itself is whole, whatever became of the rest of its folder.
            embeddings = open_folder(path.parent)
            found.files.append((path, None))
        else:
            raise CellfastError(f"{path}: no such file or folder.")
        if embeddings is not None:
            found.embeddings_of.update(dict.fromkeys((p for p, _ in found.files[before:]), embeddings))
    seen: set[Path] = set()
    for path, _ in found.files:
        if path.absolute() in seen:
            raise CellfastError(f"{path} is given twice: each input may be given once.")
        seen.add(path.absolute())
    return found


class FeatureSource:
    """A set of files that hold the same features.

    Attributes:
        files: the files in reading order.
        feature_names: the features, in the order of the first file.
        dtype: float32 if every file stores float32, else float64.
        provenance: the note of a single profile file, else empty.
        notes: what was noticed while reading.
        later: ``--column`` choices that no file has, meant for a table that is joined.
        unfinished: what is missing of unfinished embeddings, a sentence each.
    """

    unfinished: Sequence[str] = ()

    def __init__(
        self, files: Sequence[tuple[Path, Path | None]], patterns: Sequence[str], overrides: Mapping[str, str] | None
    ) -> None:
        opened = [_open_file(path, folder) for path, folder in files]
        self.provenance: dict[str, Any] = _provenance(opened[0]) if len(opened) == 1 else {}
        self.files = [file for file in opened if file.num_rows]
        self.num_rows = sum(f.num_rows for f in self.files)
        if self.num_rows == 0:
            raise CellfastError(
                f"{opened[0].path}: no rows{' in any of the files' if len(opened) > 1 else ''}. There is nothing to profile."
            )
        self.notes = [note for file in opened for note in file.notes]
        overrides = overrides or {}
        self._found: list[dict[str, str]] = []
        later: set[str] = set(overrides)
        for file in self.files:
            here, missing = split_overrides(overrides, file.all_columns)
            later &= set(missing)
            self._found.append(names.find_columns(file.all_columns, here, str(file.path)))
        self.later = {name: column for name, column in overrides.items() if name in later}
        first = self.files[0]
        if PROVENANCE_KEY in first.schema_note and not patterns:
            # Profiles of `cellfast profile` hold the features that were chosen then, whatever their names say.
            self.feature_names = [c for c in first.numeric_columns if not names.is_metadata(c)]
        else:
            self.feature_names = names.infer_features(first.numeric_columns, self._found[0].values(), patterns, str(first.path))
        for file in self.files:
            missing = [c for c in self.feature_names if c not in set(file.all_columns)]
            if missing:
                raise CellfastError(
                    f"{file.path} lacks {len(missing)} of the {len(self.feature_names)} features of {first.path}, among them "
                    f"'{missing[0]}': all inputs must hold the same features."
                )
        self.dtype = np.result_type(*[f.dtype(self.feature_names) for f in self.files])

    def metadata(self, index: int) -> pd.DataFrame:
        """Canonical metadata of file ``index``: everything that is neither a feature nor another measurement."""
        file, found = self.files[index], self._found[index]
        keep = metadata_columns(file.all_columns, file.numeric_columns, self.feature_names, found)
        return canonical_metadata(file.frame(keep), found, str(file.path), self.notes)

    def blocks(self, index: int, columns: Sequence[str] | None = None) -> Iterator[np.ndarray]:
        """Features of file ``index`` as float arrays [≤ ROWS_PER_BLOCK, columns], in row order."""
        yield from self.files[index].blocks(self.feature_names if columns is None else columns)

    def read_all(self) -> tuple[pd.DataFrame, np.ndarray]:
        """All rows in memory: metadata [N, …] and features [N, D]."""
        values = np.empty((self.num_rows, len(self.feature_names)), self.dtype)
        start = 0
        for index in range(len(self.files)):
            for block in self.blocks(index):
                values[start : start + len(block)] = block
                start += len(block)
        frames = [self.metadata(index) for index in range(len(self.files))]
        return (frames[0] if len(frames) == 1 else _stacked(frames)), values


def _stacked(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Metadata of several files; names that one of them lacks are missing (empty), not null."""
    frame = pd.concat(frames, ignore_index=True)
    for name in frame.columns:
        if name in names.NAMES:
            frame[name] = frame[name].fillna("").astype("str")
    return frame


def _provenance(file: Table) -> dict[str, Any]:
    note = file.schema_note.get(PROVENANCE_KEY)
    try:
        value = json.loads(note) if note else {}
    except (ValueError, RecursionError):
        raise CellfastError(f"{file.path}: its note of how the profiles were made is damaged. Make or copy it again.") from None
    return value if isinstance(value, dict) else {}


def open_source(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    features: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    outputs: Sequence[str | os.PathLike[str]] = (),
    allow_unfinished: bool = False,
) -> FeatureSource:
    """Open files and folders as one source of features; files of ``cellfast embed`` are compared with their checksums first.

    Args:
        inputs: embedding folders, partitioned parquet folders, tables, .npz files.
        features: prefixes or regular expressions; empty infers the features (``columns.infer_features``).
        overrides: canonical metadata name → column.
        outputs: files the caller will write: they are not read.
        allow_unfinished: take what is there of an embedding that is not finished.

    Raises:
        CellfastError: missing or unreadable files, no rows, no features, files with different features, an unfinished embedding.
    """
    found = _list_files(inputs, outputs, allow_unfinished=allow_unfinished)
    with ThreadPoolExecutor(CHECKERS) as pool:
        for checked in [pool.submit(folder.check, path) for path, folder in found.embeddings_of.items()]:
            checked.result()
    source = FeatureSource(found.files, features, overrides)
    source.notes[:0] = found.notes
    source.unfinished = found.unfinished
    return source


def read_profiles(
    path: str | os.PathLike[str], features: tuple[str, ...] = (), overrides: Mapping[str, str] | None = None
) -> ProfileTable:
    """Read a table of profiles or wells into memory with canonical metadata.

    Raises:
        CellfastError: no such file, unknown format, no feature columns.
    """
    source = open_source([path], features=features, overrides=overrides)
    metadata, values = source.read_all()
    return ProfileTable(metadata, values, source.feature_names, source.provenance, source.notes, source.later)
