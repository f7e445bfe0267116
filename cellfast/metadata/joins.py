"""Joins plate maps and mechanisms of action to metadata: by all the columns both sides have, counted on both sides."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.canonical import canonical_metadata, ordered
from cellfast.metadata.columns import (
    ALIASES,
    COMPOUND,
    CONCENTRATION,
    IMAGE_NUMBER,
    MOA,
    PLATE,
    SHORT_NAMES,
    SITE,
    TREATMENT,
    WELL,
    find_columns,
    is_bookkeeping,
    plain_name,
)
from cellfast.metadata.doses import same_dose
from cellfast.metadata.tables import read_table
from cellfast.metadata.treatments import CONTROL_COMPOUND, is_control, treatment_name
from cellfast.metadata.values import folded

LISTED = 20
# Keys of a plate map, the most specific first: the first of which both sides have all columns is used.
_KEYS = ((PLATE, WELL), (PLATE, IMAGE_NUMBER), (WELL,), (IMAGE_NUMBER,), (COMPOUND, CONCENTRATION), (COMPOUND,), (PLATE,))


def split_overrides(overrides: Mapping[str, str], columns: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The columns chosen by the user that name a column of this table, and those meant for a table that is joined to it."""
    plain = {plain_name(c) for c in columns}
    here = {name: column for name, column in overrides.items() if column in columns or plain_name(column) in plain}
    return here, {name: column for name, column in overrides.items() if name not in here}


def _read(
    path: str | os.PathLike[str], option: str, overrides: Mapping[str, str], notes: list[str]
) -> tuple[pd.DataFrame, set[str]]:
    """(canonical metadata of a file, which of the overrides it has)."""
    frame = read_table(path, f"a table for {option}", notes)
    here, _ = split_overrides(overrides, list(frame.columns))
    where = f"{option} {path}"
    found = find_columns(list(frame.columns), here, where)
    return canonical_metadata(frame, found, where, notes), set(here)


def _key_values(frame: pd.DataFrame, key: tuple[str, ...]) -> list[tuple[str, ...]]:
    columns = []
    for name in key:
        if name == CONCENTRATION:
            columns.append([f"{v:.4g}" for v in frame[name]])
        else:
            columns.append([folded(str(v)) for v in frame[name]])
    return list(zip(*columns))


def join_plate_map(
    metadata: pd.DataFrame, path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add what a table says of wells (compound, concentration, batch, MoA and its other columns) by the columns both sides have.

    The key is plate and well; without a plate column in the file the well alone (every plate has that layout); or the image
    number, the compound, or the plate, where the file has no wells. The file may have many rows per key (one per field) if they
    agree. What the file says replaces what the table said; rows it does not name, and its empty cells, change nothing. Columns of
    the file that differ within a key are left out.

    Returns:
        (metadata, report: rows joined, keys not joined, and keys of the file that no row has, with the first names).

    Raises:
        CellfastError: no common key, a key with two compounds, concentrations, batches or MoAs, an image number of several
            plates, nothing joins.
    """
    notes: list[str] = []
    table, placed = _read(path, option("metadata"), overrides or {}, notes)
    key = next((k for k in _KEYS if all(c in table and c in metadata and (table[c].astype(str) != "").any() for c in k)), None)
    if key is None or not set(table.columns) - set(key):
        raise CellfastError(
            f"{option('metadata', path)}: expected a column for the well (and plate), or the image number, compound or plate, "
            f"that the input has too, and what to add; found {', '.join(map(str, table.columns[:20]))}. Name columns with "
            f"{option('columns', {'NAME': 'COLUMN'})}."
        )
    if key == (WELL,) and PLATE in table:
        notes.append("the input has no plates: the file's rows are joined by well alone")
    theirs = _key_values(table, key)
    if key == (IMAGE_NUMBER,) and PLATE in metadata:
        _one_plate_per_image(metadata, path)
    first: dict[tuple[str, ...], int] = {}
    group = np.array([first.setdefault(k, i) for i, k in enumerate(theirs)], np.int64)
    said = [c for c in TREATMENT if c in table and c not in key]
    for column in said:
        differs = _different(table[column], group)
        if differs.any():
            a, b = int(group[differs.argmax()]), int(differs.argmax())
            keys = len({theirs[i] for i in np.flatnonzero(differs)})
            advice = "" if PLATE in key or key[0] == COMPOUND else " Add a column with the plate, or correct the file."
            raise CellfastError(
                f"{option('metadata', path)}: {keys} of its {_called(key)} have more than one "
                f"{column.removeprefix('Metadata_')}; first: {' '.join(str(table[c].iloc[a]) for c in key)}: "
                f"{_shown(table[column].iloc[a])!r} and {_shown(table[column].iloc[b])!r}." + advice
            )
    others = [c for c in table.columns if c not in (*key, *TREATMENT, PLATE, WELL, SITE, IMAGE_NUMBER) and not is_bookkeeping(c)]
    extra = [c for c in others if c not in metadata and not _different(table[c], group).any()]
    mine = _key_values(metadata, key)
    row = np.array([first.get(k, -1) for k in mine], np.int64)
    have = row >= 0
    if not have.any():
        raise CellfastError(
            f"{option('metadata', path)}: nothing of the input is in it. The input has for example "
            f"'{' '.join(_example(metadata, key))}', the file '{' '.join(_example(table, key))}' ({' and '.join(key)})."
        )
    result = metadata.copy()
    replaced = _take_over(result, table, row, have, said)
    for column in extra:
        values = table[column].take(np.maximum(row, 0)).reset_index(drop=True)
        result[column] = values.where(pd.Series(have), "" if _is_names(values) else None).to_numpy()
    used = {theirs[i] for i in row[have]}
    plates = {folded(str(p)) for p in metadata[PLATE]} if PLATE in key else set()
    # Other plates of a whole screen's table are not missed; wells of these plates are.
    unused = [i for k, i in first.items() if k not in used and (PLATE not in key or k[0] in plates)]
    missing = dict.fromkeys(k for k, joined in zip(zip(*[metadata[c].astype(str) for c in key]), have) if not joined)
    return ordered(result), {
        "file": Path(str(path)).name,
        "placed": sorted(placed),
        "key": list(key),
        "rows": len(result),
        "rows_joined": int(have.sum()),
        "values_replaced": replaced,
        "wells_not_joined": len(missing),
        "not_joined": [" ".join(k) for k in list(missing)[:LISTED]],
        "all_not_joined": [" ".join(k) for k in missing],
        "all_unused": [" ".join(_example(table, key, i)) for i in unused],
        "empty_wells": len(unused),
        "empty": [" ".join(_example(table, key, i)) for i in unused[:LISTED]],
        "columns_added": extra,
        "columns_left_out": [c for c in others if c not in metadata and c not in extra],
        "notes": notes,
    }


def _take_over(result: pd.DataFrame, table: pd.DataFrame, row: np.ndarray, have: np.ndarray, said: list[str]) -> dict[str, int]:
    """Put the file's values in place; returns how many differed from what was there, by column."""
    replaced: dict[str, int] = {}
    named = table[COMPOUND].take(np.maximum(row, 0)).to_numpy() != "" if COMPOUND in said else np.ones(len(row), bool)
    for column in said:
        new = table[column].take(np.maximum(row, 0)).to_numpy()
        if column == CONCENTRATION:
            # A dose belongs to its compound: with a new compound the old dose goes.
            present = (named & (COMPOUND in said)) | ~np.isnan(new.astype(float))
            old = result[column].to_numpy(float) if column in result else np.full(len(row), np.nan)
            changed = ~np.isnan(old) & (np.abs(old - new.astype(float)) > 1e-3 * np.abs(old))
        else:
            present = new != ""
            old = result[column].to_numpy(dtype=object) if column in result else np.full(len(row), "", dtype=object)
            changed = (old != "") & (old != new)
        take = have & present
        if column in result and (count := int((changed & take).sum())):
            replaced[column] = count
        values = np.where(take, new, old)
        result[column] = values.astype(float) if column == CONCENTRATION else pd.Series(values, index=result.index, dtype="str")
    return replaced


def _different(column: pd.Series, group: np.ndarray) -> np.ndarray:
    """bool [N]: rows whose value is not that of their group's first row; case and blanks aside for names, the tolerance for
    doses."""
    if pd.api.types.is_float_dtype(column.dtype):
        values = column.to_numpy(float)
        with np.errstate(invalid="ignore"):
            same = np.abs(values - values[group]) <= 1e-3 * np.abs(values)
        return ~(same | (np.isnan(values) & np.isnan(values[group])))
    codes, _ = pd.factorize(column.astype("str").map(folded), use_na_sentinel=False)
    return codes != codes[group]


def _one_plate_per_image(metadata: pd.DataFrame, path: object) -> None:
    pairs = metadata[[PLATE, IMAGE_NUMBER]].drop_duplicates()
    twice = pairs[pairs.duplicated(IMAGE_NUMBER, keep=False)]
    if len(twice):
        number = twice[IMAGE_NUMBER].iloc[0]
        plates = ", ".join(twice.loc[twice[IMAGE_NUMBER] == number, PLATE].iloc[:3])
        raise CellfastError(
            f"{option('metadata', path)}: it goes by ImageNumber, and image {number} is on plates {plates}: add a column with "
            "the plate, or the well"
        )


def _is_names(values: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(values.dtype)


def _called(key: tuple[str, ...]) -> str:
    return {WELL: "wells", IMAGE_NUMBER: "images", COMPOUND: "compounds", PLATE: "plates"}.get(key[-1], "treatments")


def _example(frame: pd.DataFrame, key: tuple[str, ...], at: int = 0) -> list[str]:
    return [_shown(frame[c].iloc[at]) for c in key]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class MoaTable:
    """Compound (case and blanks aside) and concentration (tolerance 10⁻³) → MoA; knows which rows were used.

    A row without a concentration holds for every concentration that no other row of its compound names.
    """

    def __init__(self, path: object, rows: list[tuple[str, float, str]], placed: tuple[str, ...] = ()) -> None:
        self.rows, self.placed = rows, placed
        self._used: set[int] = set()
        self._of_compound: dict[str, list[int]] = {}
        for number, (compound, concentration, moa) in enumerate(rows):
            before = self._of_compound.setdefault(folded(compound), [])
            same = next((n for n in before if same_dose(rows[n][1], concentration)), None)
            if same is not None and folded(rows[same][2]) != folded(moa):
                raise CellfastError(
                    f"{option('moa', path)}: {treatment_name(compound, concentration)} has two MoAs: '{rows[same][2]}' and "
                    f"'{moa}'. Keep one of the rows, or both names in one cell as 'a|b'."
                )
            before.append(number)

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        compounds: set[str] | frozenset[str] = frozenset(),
        with_doses: bool = True,
        overrides: Mapping[str, str] | None = None,
        notes: list[str] | None = None,
    ) -> MoaTable:
        """Read a table of compound, MoA (and concentration).

        Args:
            compounds: the input's compounds; where the file names compounds in several columns (``broad_sample`` and
                ``pert_iname``), the one that has most of them is taken.
            with_doses: whether the input has concentrations; without, rows of one compound must agree.

        Raises:
            CellfastError: unreadable, columns missing, a concentration that is no number, two MoAs for one treatment.
        """
        notes = [] if notes is None else notes
        frame = read_table(path, "a table of compound, concentration, moa", notes)
        here, _ = split_overrides(overrides or {}, list(frame.columns))
        found = find_columns(list(frame.columns), here, option("moa", path))
        if COMPOUND not in here:
            aliases = [c for c in frame.columns if plain_name(c) in ALIASES[COMPOUND]]
            wanted = {folded(c) for c in compounds}
            fitting = {c: len(wanted & {folded(v) for v in frame[c].unique()}) for c in aliases}
            best = max(aliases, key=lambda c: fitting[c], default=None)
            if best is not None and fitting[best] > fitting.get(found.get(COMPOUND, ""), 0):
                notes.append(f"{Path(str(path)).name} is joined by its column {best}, which has {fitting[best]} of the compounds")
                found[COMPOUND] = best
        if COMPOUND not in found or MOA not in found:
            raise CellfastError(
                f"{option('moa', path)}: expected columns compound, moa (and concentration); found "
                f"{', '.join(map(str, frame.columns[:20]))}."
            )
        table = canonical_metadata(frame[list(dict.fromkeys(found.values()))], found, option("moa", path), notes)
        doses = table[CONCENTRATION] if CONCENTRATION in table and with_doses else np.full(len(table), math.nan)
        rows = list(zip(table[COMPOUND], map(float, doses), table[MOA]))
        return cls(path, [row for row in rows if row[0]], tuple(here))

    def find(self, compound: str, concentration: float) -> str | None:
        """The MoA of a treatment; None where no row has it."""
        rows = self._of_compound.get(folded(compound), [])
        found = [n for n in rows if same_dose(self.rows[n][1], concentration)]
        found = found or [n for n in rows if math.isnan(self.rows[n][1])]
        self._used.update(found)
        return self.rows[found[0]][2] if found else None

    def unused(self) -> list[str]:
        """The treatments of the rows that `find` never gave."""
        return [treatment_name(c, d) for n, (c, d, _) in enumerate(self.rows) if n not in self._used]


def join_moa(
    metadata: pd.DataFrame, path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add the MoA by compound and concentration (by compound alone where one side has no concentrations).

    A treatment that no row names keeps the MoA it had; the control compound (DMSO) without one gets ``DMSO``.

    Returns:
        (metadata, report: treatments joined, ``not_joined`` with the first names, rows of the file that no treatment uses).

    Raises:
        CellfastError: as `MoaTable.read`, no compounds in the input, nothing joins.
    """
    if COMPOUND not in metadata or not (metadata[COMPOUND] != "").any():
        raise CellfastError(
            f"{option('moa')} joins by compound, and the input has none: give {option('metadata', 'TABLE')}, or name the column "
            f"with {option('columns', {'compound': 'COLUMN'})}."
        )
    notes: list[str] = []
    doses = metadata[CONCENTRATION].to_numpy(float) if CONCENTRATION in metadata else np.full(len(metadata), math.nan)
    known = MoaTable.read(
        path,
        compounds=set(metadata[COMPOUND]),
        with_doses=not np.isnan(doses).all(),
        overrides=overrides,
        notes=notes,
    )
    answers: dict[tuple[str, float], str | None] = {}
    moas: list[str] = []
    before = metadata[MOA] if MOA in metadata else [""] * len(metadata)
    for compound, dose, old in zip(metadata[COMPOUND], doses, before):
        # NaN is not equal to itself and would never be found again: −1 stands for it.
        key = (compound, -1.0 if math.isnan(dose) else float(dose))
        if key not in answers:
            answers[key] = known.find(compound, dose) if compound else None
        moas.append(answers[key] or old or (CONTROL_COMPOUND if is_control(compound) else ""))
    treatments = [k for k in answers if k[0]]
    missing = sorted(k for k in treatments if answers[k] is None)
    if len(missing) == len(treatments):
        example = treatment_name(treatments[0][0], math.nan if treatments[0][1] < 0 else treatments[0][1])
        listed = treatment_name(*known.rows[0][:2]) if known.rows else "nothing"
        raise CellfastError(
            f"{option('moa', path)}: no treatment of the input is in it. The input has for example '{example}', the file "
            f"'{listed}'."
        )
    result = metadata.copy()
    result[MOA] = pd.Series(moas, index=result.index, dtype="str")
    unused = known.unused()
    return ordered(result), {
        "file": Path(str(path)).name,
        "placed": sorted(known.placed),
        "treatments": len(treatments),
        "treatments_joined": len(treatments) - len(missing),
        "treatments_not_joined": len(missing),
        "not_joined": [treatment_name(c, math.nan if d < 0 else d) for c, d in missing[:LISTED]],
        "unused_rows_of_file": len(unused),
        "unused": unused[:LISTED],
        "all_unused": unused,
        "notes": notes,
    }


def unplaced_overrides(overrides: Mapping[str, str], placed: set[str], where: str) -> None:
    """Raise `CellfastError` where the user named a column that no table has; ``where`` says which were looked at."""
    short = {canonical: name for name, canonical in SHORT_NAMES.items()}
    for canonical, column in overrides.items():
        if canonical not in placed:
            raise CellfastError(f"{option('columns', {short[canonical]: column})}: {where} has a column '{column}'.")
