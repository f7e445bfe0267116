"""A table's metadata under canonical names and types, whatever its columns were called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.columns import (
    BATCH,
    CANONICAL,
    COLUMN,
    COMPOUND,
    CONCENTRATION,
    IMAGE_NUMBER,
    MOA,
    PLATE,
    ROW,
    SITE,
    WELL,
    is_metadata,
    plain_name,
    unit_of,
)
from cellfast.metadata.doses import concentrations_um
from cellfast.metadata.values import numbers_if_all, text_column
from cellfast.metadata.wells import well_name

_UNIT_COLUMNS = (
    "concentration_unit",
    "concentration_units",
    "conc_unit",
    "dose_unit",
    "dose_units",
    "pert_dose_unit",
    "unit_dose",
)
_SITE = re.compile(r"(?:site|field|fov|s|f)?[_\s]*0*(\d{1,15})(?:\.0+)?", re.IGNORECASE)


def canonical_metadata(
    frame: pd.DataFrame, found: Mapping[str, str], where: str = "the table", notes: list[str] | None = None
) -> pd.DataFrame:
    """Metadata under canonical names and types, with a plain index.

    Names are text as written, missing ``""``; wells ``A01``; sites whole numbers as text where they are some; concentrations
    float64 µM, missing NaN. The other columns of ``frame`` are kept under ``Metadata_…``; text whose every value is a number
    becomes numbers.

    Args:
        frame: columns of a table.
        found: canonical name → column of ``frame`` (`columns.find_columns`).
        where: the table, for messages.
        notes: where what was noticed is added.

    Raises:
        CellfastError: a well that is none, a concentration that is none (names the row or the column).
    """
    result: dict[str, pd.Series] = {}
    for canonical in (*CANONICAL, IMAGE_NUMBER):
        if canonical == WELL and WELL not in found and {ROW, COLUMN} <= set(found):
            result[WELL] = _wells(text_column(frame[found[ROW]]), text_column(frame[found[COLUMN]]), where)
        if canonical not in found:
            continue
        text = text_column(frame[found[canonical]])
        if canonical == CONCENTRATION:
            result[canonical] = _doses(text, frame, found, where)
        elif canonical == WELL:
            result[canonical] = _wells(text, None, where)
        elif canonical == SITE:
            result[canonical] = _sites(text)
        else:
            result[canonical] = text
    if notes is not None:
        notes.extend(_words_for_missing(result, where))
    taken = set(found.values())
    for column in frame.columns:
        if column in taken:
            continue
        name = column if column.startswith("Metadata_") else f"Metadata_{re.sub(r'^(?:Image_)?Metadata_', '', column)}"
        if name not in result:
            values = frame[column]
            result[name] = numbers_if_all(text_column(values)) if _is_text(values) else values
    return pd.DataFrame(result, index=frame.index).reset_index(drop=True)


def _is_text(values: pd.Series) -> bool:
    kind = values.dtype
    return isinstance(kind, pd.CategoricalDtype) or pd.api.types.is_string_dtype(kind) or pd.api.types.is_object_dtype(kind)


def _wells(text: pd.Series, columns: pd.Series | None, where: str) -> pd.Series:
    pairs = text if columns is None else text + "\t" + columns
    codes, unique = pd.factorize(pairs)
    names = []
    for code, pair in enumerate(unique):
        row, _, column = str(pair).partition("\t")
        if not row and not column:
            names.append("")
            continue
        try:
            names.append(well_name(row, column if columns is not None else None))
        except CellfastError as error:
            first = int((codes == code).argmax())
            raise CellfastError(
                f"{where}, row {first + 2}: {error}. Name another column with {option('columns', {'well': 'COLUMN'})}."
            ) from None
    return pd.Series(np.array([*names, ""], dtype=object)[codes], index=text.index, dtype="str")


def _sites(text: pd.Series) -> pd.Series:
    codes, unique = pd.factorize(text)
    numbers = [_SITE.fullmatch(str(t)) for t in unique]
    if any(found is None and t != "" for found, t in zip(numbers, unique)):
        return text
    return pd.Series(
        np.array([*("" if f is None else str(int(f[1])) for f in numbers), ""], dtype=object)[codes],
        index=text.index,
        dtype="str",
    )


def _doses(text: pd.Series, frame: pd.DataFrame, found: Mapping[str, str], where: str) -> pd.Series:
    column = found[CONCENTRATION]
    units = next((c for c in frame.columns if plain_name(c) in _UNIT_COLUMNS), None)
    if units is not None:
        unit = text_column(frame[units])
        bare = text.str.fullmatch(r"[-+0-9.,eE]+").to_numpy(dtype=bool)
        text = (text + " " + unit).where(bare & (unit != "").to_numpy(dtype=bool), text).astype("str")
    codes, unique = pd.factorize(text)
    values = np.append(concentrations_um(unique, f"{where}, column {column}", unit_of(column)), np.nan)
    return pd.Series(values[codes], index=text.index, dtype="float64")


def _words_for_missing(result: Mapping[str, pd.Series], where: str) -> list[str]:
    """Names that look like a missing value and are taken as written: they may be what a program wrote for an empty cell."""
    notes = []
    for name in (PLATE, COMPOUND, MOA, BATCH):
        if name in result:
            count = int((result[name].str.lower() == "nan").sum())
            if count:
                notes.append(
                    f"{where}: {count:,} cells of {name} hold the word 'nan', which is taken as a name; leave missing cells empty"
                )
    return notes


def ordered(metadata: pd.DataFrame) -> pd.DataFrame:
    """The same columns, canonical ones first."""
    first = [c for c in CANONICAL if c in metadata]
    return metadata[[*first, *[c for c in metadata.columns if c not in first]]]


def metadata_columns(
    all_columns: Sequence[str], numeric: Sequence[str], features: Sequence[str], found: Mapping[str, str]
) -> list[str]:
    """The columns of a table of features that are metadata: recognised, named so, or holding no numbers."""
    left_out, recognised, measured = set(features), set(found.values()), set(numeric)
    return [c for c in all_columns if c in recognised or (c not in left_out and (is_metadata(c) or c not in measured))]
