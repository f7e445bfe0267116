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
)
from cellfast.screens.schema import CONTROL_COMPOUND, is_control
from cellfast.screens.tables import concentration_um, find_column, read_table
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


class MoaTable:
    """Compound (letter case aside) and concentration (tolerance 10⁻³; any, in a table without concentrations) → MoA; knows which rows were used."""

    def __init__(self, path: Path, rows: list[tuple[str, float, str]], *, any_concentration: bool) -> None:
        self._any, self._rows = any_concentration, rows
        self._used: set[int] = set()
        self._of_compound: dict[str, list[int]] = {}
        for number, (compound, concentration, moa) in enumerate(rows):
            same = [n for n in self._of_compound.get(compound.casefold(), []) if self._any or _close(rows[n][1], concentration)]
            if same and rows[same[0]][2] != moa:
                raise CellfastError(
                    f"{path}: two MoAs for {treatment_name(compound, concentration)}, {rows[same[0]][2]!r} and {moa!r}; keep one of the rows"
                )
            self._of_compound.setdefault(compound.casefold(), []).append(number)

    @classmethod
    def read(cls, path: str | Path) -> MoaTable:
        """Read a table compound, concentration, moa.

        Raises:
            CellfastError: unreadable, columns missing, a concentration that is no number, two MoAs for one treatment.
        """
        path = Path(path)
        moa = read_table(path, "a table of compound, concentration, moa")
        compound, dose, name = (find_column(moa, names) for names in (COMPOUND, CONCENTRATION, MOA))
        if compound is None or name is None:
            raise CellfastError(f"{path}: expected the columns compound,concentration,moa; found {', '.join(moa.columns)}")
        rows = []
        for number, record in enumerate(moa.to_dict("records")):
            where = f"{path}, row {number + 2}, column {dose}"
            value = concentration_um(record[dose], where) if dose else math.nan
            rows.append((str(record[compound]).strip(), value, str(record[name]).strip()))
        return cls(path, rows, any_concentration=dose is None)

    def find(self, compound: str, concentration: float) -> str | None:
        """The MoA of a treatment; None where no row has it."""
        found = [
            n
            for n in self._of_compound.get(compound.strip().casefold(), [])
            if self._any or _close(self._rows[n][1], concentration)
        ]
        self._used.update(found)
        return self._rows[found[0]][2] if found else None

    def unused(self) -> list[str]:
        """The treatments of the rows that `find` never gave."""
        return [treatment_name(c, d) for n, (c, d, _) in enumerate(self._rows) if n not in self._used]


def treatment_name(compound: str, concentration: float) -> str:
    """``compound @ 0.3 µM``, as messages name a treatment."""
    return compound if math.isnan(concentration) else f"{compound} @ {concentration:g} µM"


def join_moa(table: ImageTable, path: str | Path) -> tuple[ImageTable, JoinReport]:
    """Give each field the MoA of its compound and concentration (tolerance 10⁻³, letter case aside).

    A DMSO field that no row names gets the MoA ``DMSO``. A table without concentrations joins by the compound alone.

    Raises:
        CellfastError: as `MoaTable.read`, or fields without compounds.
    """
    moa = MoaTable.read(path)
    if not any(f.compound for f in table.fields):
        raise CellfastError(f"{path}: the image table has no compounds to join a MoA to; join them first with --metadata")
    missing: Counter[str] = Counter()
    fields = []
    for one in table.fields:
        found = moa.find(one.compound, one.concentration)
        if found is not None:
            one = replace(one, moa=found)
        elif is_control(one.compound):
            one = replace(one, moa=CONTROL_COMPOUND)
        elif not one.moa:
            missing[f"{one.compound or 'no compound'} @ {one.concentration:g} µM"] += 1
        fields.append(one)
    unused = moa.unused()
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
            try:
                key: tuple = (str(record[plate]).strip() if plate else None, normalise_well(name))
            except CellfastError as error:
                raise CellfastError(f"{path}, row {number + 2}: {error}") from error
        else:
            try:
                key = (int(float(record[image])),)
            except (ValueError, OverflowError):
                raise CellfastError(
                    f"{path}, row {number + 2}: expected a number in column {image}, got {record[image]!r}"
                ) from None
        other = by_key.setdefault(key, number)
        if other != number and any(meta[c].iloc[other] != meta[c].iloc[number] for c in values.values() if c):
            raise CellfastError(
                f"{path}: rows {other + 2} and {number + 2} give different treatments for {' '.join(str(k) for k in key if k)}; "
                "keep one of them" + ("" if plate else ", or add a column with the plate")
            )
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
        fields.append(_filled(one, meta.iloc[number], values, f"{path}, row {number + 2}"))
    unmatched = tuple(f"{where} ({count} fields)" for where, count in sorted(missing.items()))
    unused = tuple(f"row {n + 2} of {Path(path).name}" for n in range(len(meta)) if n not in used)
    return replace(table, fields=tuple(fields)), JoinReport(unmatched, unused)


def _filled(one: Field, record: pd.Series, values: dict[str, str | None], where: str) -> Field:
    changes: dict[str, object] = {}
    for name in ("compound", "moa"):
        if values[name]:
            changes[name] = str(record[values[name]]).strip()
    if values["concentration"]:
        changes["concentration"] = concentration_um(record[values["concentration"]], f"{where}, column {values['concentration']}")
    return replace(one, **changes)
