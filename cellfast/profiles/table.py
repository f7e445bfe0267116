"""A table of profiles: metadata and features side by side, read from and written to parquet or CSV."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.atomic import atomic_path
from cellfast.errors import CellfastError
from cellfast.printable import masked_values
from cellfast.profiles import columns as names

_PROVENANCE_KEY = b"cellfast.profile"


@dataclass
class ProfileTable:
    """Profiles: row i of ``metadata`` describes row i of ``features``.

    Attributes:
        metadata: DataFrame [N, …], every column ``Metadata_…``, with a plain 0…N−1 index.
        features: float32 or float64 [N, D].
        feature_names: D names.
        provenance: what was done to reach these profiles, as written by ``cellfast profile``; empty for a foreign table.
    """

    metadata: pd.DataFrame
    features: np.ndarray
    feature_names: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features.shape != (len(self.metadata), len(self.feature_names)):
            raise ValueError(
                f"features must have shape [{len(self.metadata)}, {len(self.feature_names)}] (rows of metadata, feature "
                f"names), got {list(self.features.shape)}"
            )

    def __len__(self) -> int:
        return len(self.metadata)

    def rows(self, index: np.ndarray) -> ProfileTable:
        """The rows of an index or boolean array [N], as a new table."""
        return ProfileTable(self.metadata[index].reset_index(drop=True) if index.dtype == bool else
        self.metadata.iloc[index].reset_index(drop=True),
                            self.features[index], self.feature_names, self.provenance)  # fmt: skip

    def with_features(self, features: np.ndarray, feature_names: list[str] | None = None) -> ProfileTable:
        """The same rows with other features [N, D']."""
        return ProfileTable(
            self.metadata, features, self.feature_names if feature_names is None else feature_names, self.provenance
        )

    def column(self, name: str) -> np.ndarray:
        """One metadata column as an array [N].

        Raises:
            CellfastError: the table has no such column.
        """
        if name not in self.metadata:
            raise CellfastError(f"The profiles have no column '{name}'; their metadata: {', '.join(self.metadata.columns)}.")
        return self.metadata[name].to_numpy()


def write_profiles(table: ProfileTable, path: str | os.PathLike[str]) -> None:
    """Write profiles as parquet (or CSV, CSV.gz by the name): metadata columns, then features; provenance goes into the
    parquet schema. Atomic.

    Raises:
        CellfastError: the extension is none of .parquet, .csv, .csv.gz.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_output(path)
    path = Path(path)
    frame = table.metadata
    if path.name.lower().endswith((".csv", ".csv.gz")):
        whole = pd.concat([frame, pd.DataFrame(table.features, columns=table.feature_names)], axis=1)
        with atomic_path(path) as temporary:
            whole.to_csv(temporary, index=False, compression="gzip" if path.name.lower().endswith(".gz") else None)
        return
    metadata = pa.Table.from_pandas(frame, preserve_index=False)
    arrays = list(metadata.columns) + [pa.array(np.ascontiguousarray(column)) for column in table.features.T]
    arrow = pa.table(dict(zip([*metadata.column_names, *table.feature_names], arrays)))
    # pandas reads the frame's own schema note; ours travels beside it.
    arrow = arrow.replace_schema_metadata({_PROVENANCE_KEY: json.dumps(masked_values(table.provenance)).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(arrow, temporary)


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise ``CellfastError`` unless profiles can be written under this name: called before the work, not after it."""
    if not Path(path).name.lower().endswith((".parquet", ".csv", ".csv.gz")):
        raise CellfastError(f"Profiles are written as .parquet, .csv or .csv.gz; got '{Path(path).name}'.")


def canonical_metadata(frame: pd.DataFrame, found: dict[str, str]) -> pd.DataFrame:
    """Metadata under canonical names and types: strings with missing as ``""``, wells as ``A01``, concentration float64 with
    missing as NaN.

    ``found`` maps canonical names to columns of ``frame``; the other columns are kept, prefixed with ``Metadata_`` where they
    are not.
    """
    result: dict[str, pd.Series] = {}
    for canonical in names.CANONICAL:
        if canonical not in found:
            continue
        column = frame[found[canonical]]
        if canonical == names.CONCENTRATION:
            result[canonical] = pd.to_numeric(column, errors="coerce").astype("float64")
        else:
            result[canonical] = text_column(column)
    if names.WELL in result:
        codes, wells = pd.factorize(result[names.WELL])
        result[names.WELL] = pd.Series(
            np.array([names.normalize_well(w) for w in wells], dtype=object)[codes], index=frame.index, dtype="str"
        )
    taken = set(found.values())
    for column in frame.columns:
        if column in taken:
            continue
        name = column if column.startswith("Metadata_") else f"Metadata_{column}"
        if name not in result:
            result[name] = frame[column]
    return pd.DataFrame(result, index=frame.index).reset_index(drop=True)


def text_column(column: pd.Series) -> pd.Series:
    """A column as strings: integers without a decimal point (also when a missing value made them floats), missing as ``""``."""
    if pd.api.types.is_float_dtype(column.dtype):
        values = column.to_numpy(dtype="float64", na_value=np.nan)
        present = values[np.isfinite(values)]
        if np.all(present == np.floor(present)):
            return pd.Series(["" if not np.isfinite(v) else str(int(v)) for v in values], index=column.index, dtype="str")
    missing = column.isna()
    return column.astype("str").mask(missing, "").astype("str")


def add_batch(metadata: pd.DataFrame, pattern: str | None = None) -> tuple[pd.DataFrame, str]:
    """Fill ``Metadata_Batch`` from the plate names where it is missing; returns the metadata and where the batch came from.

    With ``pattern`` (a regular expression, its first group is the batch) the column is made anew. Without one, an existing
    column with content is kept; else ``^(Week\\d+)_`` is tried on the plate names, and where it matches none, the plate name is
    the batch.

    Raises:
        CellfastError: the pattern given matches none of some plate's name, or is not a regular expression.
    """
    import re

    if names.PLATE not in metadata:
        return metadata, "column" if names.BATCH in metadata else "none"
    plates = metadata[names.PLATE]
    if pattern is None and names.BATCH in metadata and (metadata[names.BATCH] != "").any():
        return metadata, "column Metadata_Batch"
    codes, unique = pd.factorize(plates)
    try:
        matched = [names.batch_of_plate(str(p), pattern) if pattern else names.batch_of_plate(str(p)) for p in unique]
    except re.error as error:
        raise CellfastError(f"--batch-pattern '{pattern}' is not a regular expression: {error}.") from None
    if pattern and any(b is None for b in matched):
        plate = next(str(p) for p, b in zip(unique, matched) if b is None)
        raise CellfastError(
            f"--batch-pattern '{pattern}' does not match plate '{plate}': give a pattern that matches every plate name."
        )
    if any(b is not None for b in matched):
        source = f"plate name, pattern {pattern or '^(Week[0-9]+)_'}"
        matched = [b if b is not None else str(p) for p, b in zip(unique, matched)]
    else:
        source = "plate name (no batch column, and no Week prefix in the plate names)"
        matched = [str(p) for p in unique]
    metadata = metadata.copy()
    values = pd.Series(np.array(matched, dtype=object)[codes], index=metadata.index, dtype="str")
    if names.BATCH in metadata:
        metadata[names.BATCH] = values
    else:
        at = max((i + 1 for i, c in enumerate(metadata.columns) if c in (names.PLATE, names.WELL, names.SITE)), default=0)
        metadata.insert(at, names.BATCH, values)
    return metadata, source


def read_profiles(
    path: str | os.PathLike[str], features: tuple[str, ...] = (), overrides: dict[str, str] | None = None
) -> ProfileTable:
    """Read a table of profiles or wells (parquet, CSV, CSV.gz) into memory with canonical metadata.

    Raises:
        CellfastError: no such file, unknown format, no feature columns.
    """
    from cellfast.profiles.sources import open_source

    source = open_source([path], features=features, overrides=overrides)
    metadata, values = source.read_all()
    return ProfileTable(metadata, values, source.feature_names, source.provenance)
