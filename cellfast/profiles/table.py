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
from cellfast.parquet_footer import leave_room, seal_footer
from cellfast.printable import masked_values

PROVENANCE_KEY = b"cellfast.profile"


@dataclass
class ProfileTable:
    """Profiles: row i of ``metadata`` describes row i of ``features``.

    Attributes:
        metadata: DataFrame [N, …], every column ``Metadata_…``, with a plain 0…N−1 index.
        features: float32 or float64 [N, D].
        feature_names: D names.
        provenance: what was done to reach these profiles, as written by ``cellfast profile``; empty for a foreign table.
        notes: what was noticed while they were read.
        later: ``--column`` choices meant for a table that is joined.
    """

    metadata: pd.DataFrame
    features: np.ndarray
    feature_names: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    later: dict[str, str] = field(default_factory=dict)

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
    arrow = arrow.replace_schema_metadata({PROVENANCE_KEY: json.dumps(masked_values(table.provenance)).encode()})
    with atomic_path(path) as temporary:
        with pq.ParquetWriter(temporary, arrow.schema, write_page_checksum=True) as writer:
            writer.write_table(arrow)
            leave_room(writer, pages=True)
        seal_footer(temporary)


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise ``CellfastError`` unless profiles can be written under this name: called before the work, not after it."""
    if not Path(path).name.lower().endswith((".parquet", ".csv", ".csv.gz")):
        raise CellfastError(f"Profiles are written as .parquet, .csv or .csv.gz; got '{Path(path).name}'.")
