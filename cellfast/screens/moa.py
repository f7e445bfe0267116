"""Joins what treatments are and do to an image table; what does not join is listed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cellfast.errors import CellfastError
from cellfast.screens.image_table import (
    COLUMN,
    COMPOUND,
    CONCENTRATION,
    MOA,
    PLATE,
    ROW,
    WELL,
    Field,
    ImageTable,
    _join_row_column,
    find_column,
    read_table,
)
from cellfast.screens.schema import CONTROL_COMPOUND, is_control
from cellfast.screens.wells import normalise_well

# Tables print concentrations with few digits: 0.003 and 0.00300001 are one dose.
RELATIVE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class JoinReport:
    """What did not join: treatments (or wells) without a row in the table, and rows that no field uses."""

    unmatched: tuple[str, ...]
    unused: tuple[str, ...]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


def join_moa(table: ImageTable, path: str | Path) -> tuple[ImageTable, JoinReport]:
    """Give each field the MoA of its compound and concentration (tolerance 10⁻³, letter case aside).

    A DMSO field that no row names gets the MoA ``DMSO``. A table without concentrations joins by the compound alone.

    Raises:
        CellfastError: unreadable, columns missing, or fields without compounds.
    """
    moa = read_table(path, "a table of compound, concentration, moa")
    compound, dose, name = (find_column(moa, names) for names in (COMPOUND, CONCENTRATION, MOA))
    if compound is None or name is None:
        raise CellfastError(f"{path}: expected the columns compound,concentration,moa; found {', '.join(moa.columns)}")
    if not any(f.compound for f in table.fields):
        raise CellfastError(f"{path}: the image table has no compounds to join a MoA to; join them first with --metadata")
    rows: dict[str, list[tuple[int, float, str]]] = {}
    doses = pd.to_numeric(moa[dose], errors="coerce") if dose else pd.Series(math.nan, index=moa.index)
    for number, (c, d, m) in enumerate(zip(moa[compound], doses, moa[name])):
        rows.setdefault(str(c).strip().casefold(), []).append((number, float(d), str(m).strip()))
    used: set[int] = set()
    missing: Counter[str] = Counter()
    fields = []
    for one in table.fields:
        match = next((r for r in rows.get(one.compound.casefold(), []) if dose is None or _close(r[1], one.concentration)), None)
        if match:
            used.add(match[0])
            one = replace(one, moa=match[2])
        elif is_control(one.compound):
            one = replace(one, moa=CONTROL_COMPOUND)
        elif not one.moa:
            missing[f"{one.compound or 'no compound'} @ {one.concentration:g} µM"] += 1
        fields.append(one)
    unused = [f"{c} @ {d:g} µM" for n, (c, d) in enumerate(zip(moa[compound], doses)) if n not in used]
    unmatched = [f"{treatment} ({count} fields)" for treatment, count in sorted(missing.items())]
    return replace(table, fields=tuple(fields)), JoinReport(tuple(unmatched), tuple(unused))


def join_metadata(table: ImageTable, path: str | Path) -> tuple[ImageTable, JoinReport]:
    """Give each field compound, concentration and MoA from a table by plate and well, by well, or by image number, whichever it has.

    Raises:
        CellfastError: unreadable, no key columns, or none of compound, concentration and MoA.
    """
    meta = read_table(path, "a table of wells")
    plate, well = find_column(meta, PLATE), find_column(meta, WELL)
    row, column = find_column(meta, ROW), find_column(meta, COLUMN)
    image = find_column(meta, ("ImageNumber", "Metadata_ImageNumber"))
    values = {
        "compound": find_column(meta, COMPOUND),
        "concentration": find_column(meta, CONCENTRATION),
        "moa": find_column(meta, MOA),
    }
    if not any(values.values()) or not (well or (row and column) or image):
        raise CellfastError(
            f"{path}: expected a well (or row and column, or ImageNumber) and at least one of compound, concentration, moa; found {', '.join(meta.columns)}"
        )
    by_key: dict[tuple, int] = {}
    for number, record in enumerate(meta.to_dict("records")):
        if well or (row and column):
            name = str(record[well]) if well else _join_row_column(str(record[row]).strip(), str(record[column]).strip())
            key: tuple = (str(record[plate]).strip() if plate else None, normalise_well(name))
        else:
            key = (int(float(record[image])),)
        by_key[key] = number
    used: set[int] = set()
    missing: Counter[str] = Counter()
    fields = []
    for one in table.fields:
        keys: list[tuple] = [(one.plate, one.well), (None, one.well), (one.image_number,)]
        number = next((by_key[key] for key in keys if key in by_key), None)
        if number is None:
            missing[f"plate {one.plate}, well {one.well}"] += 1
            fields.append(one)
            continue
        used.add(number)
        fields.append(_filled(one, meta.iloc[number], values))
    unmatched = tuple(f"{where} ({count} fields)" for where, count in sorted(missing.items()))
    unused = tuple(f"row {n + 2} of {Path(path).name}" for n in range(len(meta)) if n not in used)
    return replace(table, fields=tuple(fields)), JoinReport(unmatched, unused)


def _filled(one: Field, record: pd.Series, values: dict[str, str | None]) -> Field:
    changes: dict[str, object] = {}
    for name in ("compound", "moa"):
        if values[name]:
            changes[name] = str(record[values[name]]).strip()
    if values["concentration"]:
        changes["concentration"] = float(pd.to_numeric(record[values["concentration"]], errors="coerce"))
    return replace(one, **changes)
