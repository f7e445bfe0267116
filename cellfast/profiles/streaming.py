"""Cells from files to one row per site or well, in memory bounded by the profiles and a block of columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.counts import CELL_COUNT, rows_are_cells, take_counts
from cellfast.metadata.values import Spellings, folded
from cellfast.profiles.aggregate import GroupSums, group_medians
from cellfast.profiles.feature_files import FeatureSource
from cellfast.profiles.table import ProfileTable
from cellfast.progress import Progress

#: Bytes of cell features held at a time for exact medians; at least one column of all files that share a well is held.
MEDIAN_BLOCK_BYTES = 64 << 20

# What belongs to one cell or one image: not carried over to wells.
_PER_CELL = {
    "imagenumber",
    "objectnumber",
    "center_x",
    "center_y",
    "object_number",
    "cell",
    "cell_id",
    "file",
    "filename",
    "index",
}


def read_cells(source: FeatureSource) -> tuple[ProfileTable, dict[str, Any]]:
    """All rows as they are, in memory; the cells that a row stands for are in its count, where it has one.

    Raises:
        CellfastError: they would not fit in the memory that is free.
    """
    # Normalisation works in float64 beside the input and the result.
    needed = source.num_rows * len(source.feature_names) * (2 * 8 + np.dtype(source.dtype).itemsize)
    free = _available_bytes()
    if free is not None and needed > free:
        raise CellfastError(
            f"Cell profiles are made in memory: {source.num_rows:,} cells of {len(source.feature_names)} features need "
            f"about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free. Use --level well or treatment with --normalize-at well (streamed), or give fewer plates at a time."
        )
    metadata, values = source.read_all()
    metadata, report = _counted_rows(metadata)
    return ProfileTable(metadata, values, source.feature_names), report


def _counted_rows(metadata: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows' metadata with their counts under the one name, and what is known of the number of cells."""
    rest, counts, wrong = take_counts(metadata)
    report: dict[str, Any] = {"rows": len(metadata)} | ({"count_column": wrong} if wrong else {})
    if counts is not None:
        return rest.assign(**{CELL_COUNT: counts}), {**report, "cells": int(counts.sum())}
    return metadata, {**report, **({"cells": len(metadata)} if rows_are_cells(metadata) else {})}


def _available_bytes() -> int | None:
    try:
        with open("/proc/meminfo") as handle:
            return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def read_units(source: FeatureSource, unit: str, method: str) -> tuple[ProfileTable, dict[str, Any]]:
    """Aggregate the rows of all files to sites or wells.

    A row is a cell, or stands for as many as its count says: counts are summed, and weigh in means (medians are of rows).
    A table without wells (treatment profiles, or features of anything else) is taken row by row.

    Args:
        source: the files.
        unit: ``site`` or ``well``.
        method: ``mean`` or ``median``; medians are exact (columns of all rows of a well are held at once, a block of columns
        at a time).

    Returns:
        (table sorted by plate, well and site, counts of what was read and left out).

    Raises:
        CellfastError: no site column for sites; a well with two compounds, concentrations or MoAs.
    """
    key = [names.PLATE, names.WELL] + ([names.SITE] if unit == "site" else [])
    groups = _Groups(key)
    codes: list[np.ndarray] = []
    counted: list[np.ndarray | None] = []
    cells, wrong = False, ""
    rowwise = False
    wells_without_plate: set[str] = set()
    for index in range(len(source.files)):
        metadata = source.metadata(index)
        if names.WELL in metadata and not (metadata[names.WELL] != "").any():
            metadata = metadata.drop(columns=names.WELL)
        if names.WELL not in metadata:
            if len(source.files) > 1 or unit == "site":
                raise CellfastError(
                    f"{source.files[index].path}: no well column; found {', '.join(metadata.columns) or 'no metadata'}. "
                    f"Name it with --column well=COLUMN."
                )
            rowwise = True
            break
        _check_wells(metadata, source.files[index].path, wells_without_plate)
        if names.PLATE not in metadata:
            metadata.insert(0, names.PLATE, pd.Series("", index=metadata.index, dtype="str"))
            source.notes.append(f"{source.files[index].path}: no plate column, so its rows are taken to be of one plate")
        if unit == "site" and names.SITE not in metadata:
            raise CellfastError(
                f"{source.files[index].path}: no site column, needed for site profiles. Name it with --column site=COLUMN."
            )
        metadata, of_rows, why = take_counts(metadata)
        cells |= of_rows is None and rows_are_cells(metadata)
        wrong = wrong or why
        counted.append(of_rows)
        codes.append(groups.add(metadata, index))
    if rowwise:
        metadata, values = source.read_all()
        metadata, report = _counted_rows(metadata)
        return ProfileTable(metadata, values, source.feature_names), {
            **report,
            "note": "no well column: each row is taken as a well",
        }
    num_groups = len(groups.frames_rows)
    rows = sum((np.bincount(c, minlength=num_groups) for c in codes), np.zeros(num_groups, np.int64))
    # Of one row each nothing is to be weighed: its values stay as they are, to the last bit.
    weights = counted if rows.max(initial=0) > 1 else [None] * len(codes)
    with Progress(
        f"{method} of cells", source.num_rows * len(source.feature_names), "values", enabled=source.num_rows > 100_000
    ) as progress:
        if method == "mean":
            sums = GroupSums(num_groups, len(source.feature_names))
            for index, file_codes in enumerate(codes):
                _add_means(source, index, file_codes, weights[index], sums, progress)
            values, num_nan, num_inf = sums.result().values, sums.num_nan, sums.num_inf
        else:
            values = np.empty((num_groups, len(source.feature_names)))
            num_nan = num_inf = 0
            for members in groups.file_sets(len(codes)):
                found = _set_medians(source, members, [codes[m] for m in members], values, progress)
                num_nan, num_inf = num_nan + found[0], num_inf + found[1]
    metadata = groups.metadata()
    order = groups.order(metadata)
    metadata = metadata.iloc[order].reset_index(drop=True)
    report: dict[str, Any] = {"rows": int(rows.sum()), unit + "s": num_groups}
    if cells or any(one is not None for one in counted):
        counts = np.zeros(num_groups, np.int64)
        for file_codes, of_rows in zip(codes, counted):
            np.add.at(counts, file_codes, 1 if of_rows is None else of_rows)
        metadata[CELL_COUNT] = counts[order]
        report |= {
            "cells": int(counts.sum()),
            f"cells_per_{unit}": [int(counts.min()), float(np.median(counts)), int(counts.max())],
            f"one_cell_{unit}s": int((counts == 1).sum()),
        }
    report |= {
        f"rows_per_{unit}": [int(rows.min()), float(np.median(rows)), int(rows.max())],
        **({"count_column": wrong} if wrong else {}),
        "nan_values_left_out": num_nan,
        "infinite_values_left_out": num_inf,
        "metadata_not_constant": sorted(groups.varying),
        "spellings": groups.merged(),
    }
    return ProfileTable(metadata, values[order], source.feature_names), report


def _check_wells(metadata: pd.DataFrame, path: object, without_plate: set[str]) -> None:
    """Refuse rows without a well or a plate among others that have one, and one well of two files that name no plate.

    Raises:
        CellfastError: says how many and where.
    """
    for column in (names.WELL, names.PLATE):
        missing = (metadata[column] == "").to_numpy() if column in metadata else np.zeros(len(metadata), bool)
        if missing.any() and not missing.all():
            raise CellfastError(
                f"{path}: {int(missing.sum()):,} of {len(metadata):,} rows have no {column.removeprefix('Metadata_').lower()}, the first is row "
                f"{int(missing.argmax()) + 2}: fill it in, or remove those rows."
            )
    if names.PLATE not in metadata or not (metadata[names.PLATE] != "").any():
        wells = set(metadata[names.WELL])
        if both := wells & without_plate:
            raise CellfastError(
                f"{path}: well {min(both)} is in another input too, and neither names its plate: they would be taken for one well. Add a "
                "column with the plate, or name it with --column plate=COLUMN."
            )
        without_plate |= wells


def _add_means(
    source: FeatureSource, index: int, codes: np.ndarray, weights: np.ndarray | None, sums: GroupSums, progress: Progress
) -> None:
    # A block of columns at a time: a row group of a wide file then never has to be decoded whole.
    d = len(source.feature_names)
    width = max(16, min(d, (64 << 20) // (8 * max(1, min(source.files[index].num_rows, 1 << 17)))))
    for first in range(0, d, width):
        start = 0
        for block in source.blocks(index, source.feature_names[first : first + width]):
            part = slice(start, start + len(block))
            sums.add(block, codes[part], first, None if weights is None else weights[part])
            start += len(block)
            progress.advance(block.size)


def _set_medians(
    source: FeatureSource, members: list[int], codes: list[np.ndarray], values: np.ndarray, progress: Progress
) -> tuple[int, int]:
    """Medians of the groups of files that share groups; fills their rows of ``values``."""
    joined = np.concatenate(codes)
    present, local = np.unique(joined, return_inverse=True)
    rows, d = len(joined), len(source.feature_names)
    width = int(max(1, min(d, MEDIAN_BLOCK_BYTES // (np.dtype(source.dtype).itemsize * rows))))
    num_nan = num_inf = 0
    held = np.empty((rows, width), source.dtype)
    for first in range(0, d, width):
        chosen = source.feature_names[first : first + width]
        start = 0
        block_of_columns = held[:, : len(chosen)]
        for index in members:
            for block in source.blocks(index, chosen):
                block_of_columns[start : start + len(block)] = block
                start += len(block)
                progress.advance(block.size)
        result = group_medians(block_of_columns, local, len(present))
        values[present, first : first + len(chosen)] = result.values
        num_nan, num_inf = num_nan + result.num_nan, num_inf + result.num_inf
    return num_nan, num_inf


class _Groups:
    """The distinct wells (or sites) of all files, with the metadata that is constant within each."""

    def __init__(self, key: list[str]) -> None:
        self.key = key
        self.numbers: dict[tuple[str, ...], int] = {}
        self.frames_rows: list[dict[str, Any]] = []
        self.files: list[set[int]] = []
        self.varying: set[str] = set()
        self.spellings = {name: Spellings() for name in names.NAMES if name not in (names.WELL, names.SITE)}

    def add(self, metadata: pd.DataFrame, file: int) -> np.ndarray:
        """Number the groups of one file's rows; int32 [rows]. Names are compared with case and blanks aside."""
        metadata = metadata.copy()
        for name, spellings in self.spellings.items():
            if name in metadata:
                spellings.add(metadata[name])
                codes, unique = pd.factorize(metadata[name])
                metadata[name] = pd.Series(
                    np.array([folded(str(n)) for n in unique] or [""], dtype=object)[codes], index=metadata.index, dtype="str"
                )
        combined = np.zeros(len(metadata), np.int64)
        for column in self.key:
            codes, values = pd.factorize(metadata[column])
            combined = combined * max(len(values), 1) + codes
        _, first, local = np.unique(combined, return_index=True, return_inverse=True)
        local = local.reshape(-1)
        carried = [
            c for c in metadata.columns if c not in self.key and names.plain_name(c) not in _PER_CELL and not (c == names.SITE)
        ]
        for column in carried:
            codes, _ = pd.factorize(metadata[column], use_na_sentinel=False)
            different = codes != codes[first][local]
            if different.any():
                if column in (names.COMPOUND, names.CONCENTRATION, names.MOA, names.BATCH):
                    self._conflict(metadata, column, first[local[different.argmax()]], int(different.argmax()))
                self.varying.add(column)
        rows = metadata.iloc[first][[*self.key, *carried]].to_dict("records")
        numbers = np.empty(len(first), np.int32)
        for i, row in enumerate(rows):
            key = tuple(str(row[c]) for c in self.key)
            known = self.numbers.get(key)
            if known is None:
                known = self.numbers[key] = len(self.frames_rows)
                self.frames_rows.append(row)
                self.files.append({file})
            else:
                self.files[known].add(file)
                for column in carried:
                    a, b = self.frames_rows[known].get(column), row[column]
                    if a != b and not (pd.isna(a) and pd.isna(b)):
                        if column in (names.COMPOUND, names.CONCENTRATION, names.MOA, names.BATCH):
                            raise CellfastError(
                                f"{' '.join(self._shown(c, row[c]) for c in self.key)} has two values of {column} in different files: "
                                f"'{self._shown(column, a)}' and '{self._shown(column, b)}'. A well holds one treatment."
                            )
                        self.varying.add(column)
            numbers[i] = known
        return numbers[local]

    def _conflict(self, metadata: pd.DataFrame, column: str, a: int, b: int) -> None:
        place = " ".join(self._shown(c, metadata[c].iloc[a]) for c in self.key)
        first, second = (self._shown(column, metadata[column].iloc[i]) for i in (a, b))
        raise CellfastError(f"{place} has two values of {column}: '{first}' and '{second}'. A well holds one treatment.")

    def _shown(self, column: str, value: Any) -> str:
        return self.spellings[column].shown(str(value)) if column in self.spellings else str(value)

    def metadata(self) -> pd.DataFrame:
        """One row per group; columns that vary within a group are left out."""
        frame = pd.DataFrame(self.frames_rows).drop(columns=list(self.varying), errors="ignore")
        for column in frame.columns:
            if column in names.CANONICAL and column != names.CONCENTRATION:
                frame[column] = frame[column].fillna("").astype("str")
            if column in self.spellings:
                frame[column] = self.spellings[column].apply(frame[column])
        return frame

    def merged(self) -> dict[str, dict[str, list[str]]]:
        """Column → shown name → its other spellings."""
        return {name: merged for name, spellings in self.spellings.items() if (merged := spellings.merged())}

    def order(self, metadata: pd.DataFrame) -> np.ndarray:
        """Group numbers in natural order of plate, well and site."""
        from cellfast.profiles.normalize import natural_key

        keys = list(zip(*[metadata[c] for c in self.key]))
        return np.array(sorted(range(len(keys)), key=lambda i: [natural_key(str(v)) for v in keys[i]]), np.int64)

    def file_sets(self, num_files: int) -> list[list[int]]:
        """Files partitioned so that no group spans two parts."""
        parent = list(range(num_files))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for files in self.files:
            first, *rest = sorted(files)
            for other in rest:
                parent[root(other)] = root(first)
        sets: dict[int, list[int]] = {}
        for i in range(num_files):
            sets.setdefault(root(i), []).append(i)
        return list(sets.values())
