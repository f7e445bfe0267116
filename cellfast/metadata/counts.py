"""How many cells a row of a table stands for: one name of the column, and when a column of that name is to be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

#: Cells in a well, site or treatment, as pycytominer names it; written by embeddings of wells and by profiles.
CELL_COUNT = "Metadata_Cell_Count"

#: Names of the same, in the order in which they are looked for, in lower case and without ``Metadata_`` and ``Image_``.
ALIASES = ("cell_count", "numcells", "num_cells", "count_cells", "object_count")

_PLACE = ("plate", "well", "site", "imagenumber")
_OBJECT = ("objectnumber", "object_number", "number_object_number", "cell_id", "cellid")


def _plain(column: str) -> str:
    name = column.lower()
    for prefix in ("metadata_", "image_"):
        name = name.removeprefix(prefix)
    return name


def take_counts(metadata: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray | None, str]:
    """Take the number of cells of each row out of a table's metadata.

    A column of that name can also be the count of a whole image or well, repeated in the rows of its cells; adding that up would
    count every cell many times. It is not believed where rows have object numbers, or where most rows share place and count with
    others.

    Args:
        metadata: columns ``Metadata_*`` [rows].

    Returns:
        (the other columns; int64 [rows], or None where the rows are cells or nothing is known; what is wrong with a column that
        is not believed, or empty).
    """
    plain = {_plain(c): c for c in reversed(list(metadata.columns))}
    column = CELL_COUNT if CELL_COUNT in metadata else next((plain[a] for a in ALIASES if a in plain), None)
    if column is None:
        return metadata, None, ""
    import pandas as pd

    counts = pd.to_numeric(metadata[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = ~(np.isfinite(counts) & (counts >= 0) & (counts % 1 == 0))
    if wrong.any():
        return (
            metadata,
            None,
            f"{column} is not taken as the number of cells: '{metadata[column].iloc[wrong.argmax()]}' is not a whole number",
        )
    if any(name in plain for name in _OBJECT):
        return metadata, None, f"{column} is not taken as the number of cells: the rows have object numbers, each is one cell"
    place = metadata[[plain[name] for name in _PLACE if name in plain]].assign(**{column: counts})
    if (place.duplicated(keep=False).to_numpy() & (counts > 1)).mean() > 0.5:
        return metadata, None, f"{column} is not taken as the number of cells of each row: the rows of an image or well repeat it"
    return metadata.drop(columns=column), counts.astype(np.int64), ""


def rows_are_cells(metadata: pd.DataFrame) -> bool:
    """Whether rows without counts are cells: they have object numbers, or several have one plate, well, site and image."""
    plain = {_plain(c): c for c in metadata.columns}
    place = [plain[name] for name in _PLACE if name in plain]
    return any(name in plain for name in _OBJECT) or (bool(place) and bool(metadata.duplicated(place).any()))


def with_counts(metadata: pd.DataFrame) -> pd.DataFrame:
    """The metadata with the counts under their one name, where there are any."""
    rest, counts, _ = take_counts(metadata)
    return metadata if counts is None else rest.assign(**{CELL_COUNT: counts})
