"""Join plate and well to compound and concentration, and those to the mechanism of action; find the controls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.bounded import open_table, read_parquet, told
from cellfast.errors import CellfastError
from cellfast.metadata.controls import select_rows
from cellfast.profiles import columns as names
from cellfast.profiles.table import canonical_metadata

#: Relative difference up to which two concentrations are the same: tables print 0.3 as 0.299999.
CONCENTRATION_TOLERANCE = 1e-3

_LISTED = 20


def _read_csv(path: str | os.PathLike[str], option: str) -> tuple[pd.DataFrame, dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise CellfastError(f"{option}: no such file: {path}.")
    with told(f"{option} {path}", "table"):
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = read_parquet(path)
        else:
            with open_table(path) as handle:
                frame = pd.read_csv(handle, low_memory=False)
    return frame, names.find_metadata_columns([str(c) for c in frame.columns], where=str(path))


def join_plate_map(metadata: pd.DataFrame, path: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add compound, concentration (and batch, MoA where the file has them) by plate and well from a CSV such as
    BBBC021_v1_image.csv.

    The file may have many rows per well (one per field) if they agree; plates are left out of the key when the file has no
    plate column. Values of the file replace those of the table.

    Returns:
        (metadata, report: rows joined, wells not joined, and wells of these plates in the file that have no rows, with the
        first names).

    Raises:
        CellfastError: no well or compound column, wells with two compounds, nothing joins.
    """
    frame, found = _read_csv(path, "--metadata")
    if names.WELL not in found or names.COMPOUND not in found:
        raise CellfastError(
            f"--metadata {path}: expected columns for the well and the compound (and plate, concentration); found "
            f"{', '.join(map(str, frame.columns[:20]))}."
        )
    if names.WELL not in metadata:
        raise CellfastError(
            "--metadata joins by plate and well, and the input has no well column: name it with --column well=COLUMN."
        )
    table = canonical_metadata(frame[list(found.values())], found)
    table = table.loc[:, [c for c in table.columns if c != names.SITE]].drop_duplicates()
    key = [names.PLATE, names.WELL] if names.PLATE in table and names.PLATE in metadata else [names.WELL]
    doubled = table[table.duplicated(key, keep=False)]
    if len(doubled):
        first = doubled.sort_values(key).iloc[:2]
        raise CellfastError(
            f"--metadata {path}: {doubled.drop_duplicates(key).shape[0]} wells have more than one compound, "
            f"concentration, batch or MoA; "
            f"first: {' '.join(first.iloc[0][key])}: {_row(first.iloc[0], key)} and {_row(first.iloc[1], key)}."
        )
    added = [c for c in table.columns if c not in key]
    joined = metadata.drop(columns=[c for c in added if c in metadata]).merge(
        table.assign(_joined=True), on=key, how="left", validate="m:1"
    )
    have = joined.pop("_joined").notna().to_numpy()
    if not have.any():
        mine = " ".join(map(str, metadata.iloc[0][key]))
        theirs = " ".join(map(str, table.iloc[0][key]))
        raise CellfastError(
            f"--metadata {path}: no well of the input is in it. The input has for example '{mine}', the file '{theirs}'."
        )
    for column in added:
        if column != names.CONCENTRATION:
            joined[column] = joined[column].fillna("").astype("str")
    missing = joined.loc[~have, key].drop_duplicates()
    expected = table if key == [names.WELL] else table[table[names.PLATE].isin(set(metadata[names.PLATE]))]
    empty = expected[key].merge(metadata[key].drop_duplicates(), on=key, how="left", indicator=True)
    empty = empty.loc[empty["_merge"] == "left_only", key]
    return _ordered(joined), {
        "file": Path(path).name,
        "rows": len(joined),
        "rows_joined": int(have.sum()),
        "wells_not_joined": len(missing),
        "not_joined": [" ".join(map(str, row)) for row in missing.head(_LISTED).to_numpy()],
        "empty_wells": len(empty),
        "empty": [" ".join(map(str, row)) for row in empty.head(_LISTED).to_numpy()],
    }


def join_moa(metadata: pd.DataFrame, path: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add the MoA by compound and concentration (by compound alone where the file has no concentration) from
    BBBC021_v1_moa.csv or its like.

    Compound names are compared without case and outer spaces, concentrations with a relative tolerance of 0.001.

    Returns:
        (metadata, report: treatments joined, ``not_joined`` with the first names, ``unused`` rows of the file).

    Raises:
        CellfastError: missing columns, one treatment with two MoAs, nothing joins.
    """
    frame, found = _read_csv(path, "--moa")
    if names.COMPOUND not in found or names.MOA not in found:
        raise CellfastError(
            f"--moa {path}: expected columns compound, moa (and concentration); found {', '.join(map(str, frame.columns[:20]))}."
        )
    if names.COMPOUND not in metadata:
        raise CellfastError(
            "--moa joins by compound, and the input has none: give --metadata CSV, or name the column with --column "
            "compound=COLUMN."
        )
    table = canonical_metadata(frame[list(found.values())], found)
    by_concentration = names.CONCENTRATION in table and names.CONCENTRATION in metadata
    known: dict[str, list[tuple[float, str]]] = {}
    for row in table.itertuples(index=False):
        compound = getattr(row, names.COMPOUND).strip().lower()
        concentration = getattr(row, names.CONCENTRATION) if by_concentration else np.nan
        moa = getattr(row, names.MOA)
        for other, other_moa in known.setdefault(compound, []):
            if same_concentration(concentration, other) and moa != other_moa:
                raise CellfastError(
                    f"--moa {path}: {getattr(row, names.COMPOUND)} {concentration:g} has two MoAs: '{other_moa}' and '{moa}'."
                )
        known[compound].append((concentration, moa))
    compounds = metadata[names.COMPOUND].to_numpy()
    concentrations = metadata[names.CONCENTRATION].to_numpy() if by_concentration else np.full(len(metadata), np.nan)
    answers: dict[tuple[str, float], str | None] = {}
    used: set[tuple[str, float]] = set()
    moas = []
    for compound, concentration in zip(compounds, concentrations):
        # NaN is not equal to itself and would never be found again: −1 stands for it.
        key = (compound, -1.0 if np.isnan(concentration) else float(concentration))
        if key not in answers:
            match = None
            for other, moa in known.get(str(compound).strip().lower(), []):
                if not by_concentration or same_concentration(concentration, other):
                    match = moa
                    used.add((str(compound).strip().lower(), other if by_concentration else -1.0))
                    break
            answers[key] = match
        moas.append(answers[key])
    missing = sorted(k for k, v in answers.items() if v is None and k[0] != "")
    if not any(v is not None for v in answers.values()):
        raise CellfastError(
            f"--moa {path}: no treatment of the input is in it. The input has for example '{compounds[0]}' at "
            f"{concentrations[0]:g}, "
            f"the file '{table[names.COMPOUND].iloc[0]}'."
        )
    result = metadata.copy()
    before = result[names.MOA].to_numpy() if names.MOA in result else np.full(len(result), "")
    result[names.MOA] = pd.Series([m if m is not None else b for m, b in zip(moas, before)], index=result.index, dtype="str")
    listed = [f"{c} {k:g}" if k >= 0 else str(c) for c, k in missing]
    return _ordered(result), {
        "file": Path(path).name,
        "treatments": len([k for k in answers if k[0] != ""]),
        "treatments_joined": sum(v is not None for v in answers.values()),
        "treatments_not_joined": len(missing),
        "not_joined": listed[:_LISTED],
        "unused_rows_of_file": sum(len(v) for v in known.values()) - len(used) if by_concentration else None,
    }


def same_concentration(a: float, b: float) -> bool:
    """Whether two concentrations are equal within the tolerance; two unknown ones are."""
    if np.isnan(a) or np.isnan(b):
        return bool(np.isnan(a) and np.isnan(b))
    return abs(a - b) <= CONCENTRATION_TOLERANCE * max(abs(a), abs(b))


def find_controls(metadata: pd.DataFrame, query: str | None = None) -> tuple[np.ndarray, str]:
    """Which rows are controls, and by which rule.

    Args:
        metadata: canonical metadata [N, …].
        query: a condition on the metadata in the language of `cellfast.metadata.controls` (short names such as ``compound`` work
            too); ``all``: every row; None: the compound is DMSO, else a control type column (``Metadata_pert_type``, ``Metadata_control_type``) says negcon, else
            the MoA is DMSO.

    Returns:
        (bool [N], the rule as text).

    Raises:
        CellfastError: the query is not of the language, or matches no row; no controls are found without one.
    """
    if query is not None and query.strip().lower() == "all":
        return np.ones(len(metadata), bool), "all rows"
    if query is not None:
        mask = select_rows(query, metadata, names.SHORT_NAMES)
        if not mask.any():
            raise CellfastError(
                f'--controls "{query}" matches none of the {len(metadata)} rows. Compounds: {_some(metadata, names.COMPOUND)}.'
            )
        return mask, query
    if names.COMPOUND in metadata:
        mask = metadata[names.COMPOUND].str.strip().str.upper().eq("DMSO").to_numpy(dtype=bool)
        if mask.any():
            return mask, "Metadata_Compound is DMSO"
    for column in metadata.columns:
        if names.plain_name(column) in ("pert_type", "control_type"):
            mask = metadata[column].astype("str").str.lower().eq("negcon").to_numpy(dtype=bool)
            if mask.any():
                return mask, f"{column} is negcon"
    if names.MOA in metadata:
        mask = metadata[names.MOA].str.strip().str.upper().eq("DMSO").to_numpy(dtype=bool)
        if mask.any():
            return mask, "Metadata_MoA is DMSO"
    raise CellfastError(
        f"No control wells found: no compound is DMSO and no control type is negcon. Compounds: "
        f"{_some(metadata, names.COMPOUND)}. "
        "Say which they are with --controls \"Metadata_Compound == 'NAME'\", take every well with --controls all, "
        "or use --normalize none."
    )


def _some(metadata: pd.DataFrame, column: str) -> str:
    if column not in metadata:
        return f"(no column {column})"
    values = sorted(set(metadata[column]) - {""})
    return ", ".join(values[:12]) + (f" … ({len(values)} in all)" if len(values) > 12 else "") or "(none)"


def _row(row: pd.Series, key: list[str]) -> str:
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for c, v in row.items() if c not in key)


def _ordered(metadata: pd.DataFrame) -> pd.DataFrame:
    first = [c for c in names.CANONICAL if c in metadata]
    return metadata[[*first, *[c for c in metadata.columns if c not in first]]]
