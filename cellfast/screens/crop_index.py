"""Tables of ready-made crops: one file per cell, in cellfast's columns or in the reference implementation's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.canonical import canonical_metadata
from cellfast.metadata.columns import (
    BATCH,
    COLUMN,
    COMPOUND,
    CONCENTRATION,
    MOA,
    OBJECT_NUMBER,
    PLATE,
    ROW,
    SITE,
    WELL,
    find_columns,
    plain_name,
)
from cellfast.metadata.joins import join_moa, join_plate_map, split_overrides, unplaced_overrides
from cellfast.metadata.tables import read_table
from cellfast.metadata.treatments import treatment_name
from cellfast.metadata.values import spelling_notes, text_column, unify_spellings

COLUMNS = ("file", "plate", "well", "site", "cell", "compound", "concentration", "moa")
REFERENCE_COLUMNS = ("Image_Name", "Class_Name", "Target")
_CANONICAL = {
    "plate": PLATE, "well": WELL, "site": SITE, "cell": OBJECT_NUMBER, "batch": BATCH, "compound": COMPOUND,
    "concentration": CONCENTRATION, "moa": MOA,
}  # fmt: skip
# Names in use for the crop's file and the cell's number, as `plain_name` gives them.
_FILE = ("file", "filename", "file_name", "path", "file_path", "image", "image_path", "crop")
_CELL = ("cell", "cell_id", "cellid", "object", "objectnumber", "object_number", "object_id", "label")
LAYOUTS = ("auto", "HWC", "CHW", "strip")


@dataclass(frozen=True)
class CropIndex:
    """A table of crops, one row each, with `COLUMNS` (``file`` absolute), and how their pixels are laid out.

    ``dropped`` counts rows that were set aside, by reason; ``num_rows`` is the number of rows in the file.
    """

    table: pd.DataFrame
    layout: str
    dropped: dict[str, int]
    num_rows: int
    notes: tuple[str, ...]


def read_crop_index(
    path: str | Path,
    *,
    root: str | Path | None = None,
    layout: str = "auto",
    metadata: str | Path | None = None,
    moa: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> CropIndex:
    """Read a table of ready-made crops.

    Args:
        path: a CSV (or .csv.gz) with columns ``file, plate, well, site, cell, compound, concentration, moa`` (``site``, ``cell``,
            ``compound``, ``concentration`` and ``moa`` may be absent; the names of `cellfast.metadata.columns` and a batch are
            known too), or with the reference implementation's
            ``Image_Name, Class_Name, Target``: the image's name is ``<plate>-<well>-s<site>…``, its class
                ``<compound>_<concentration>``,
            and its channels stand side by side in one strip.
        root: folder the files' names are relative to; the table's own by default.
        layout: ``HWC`` or ``CHW`` for arrays of three axes, ``strip`` for channels side by side, ``auto`` tells by the shape.
        metadata, moa: tables to join, as `cellfast.metadata.joins`.
        columns: canonical name → column of the index or of a joined table, where it is not recognised.

    Raises:
        CellfastError: unreadable table, missing columns, no rows, or the same plate, well, site and cell twice.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise CellfastError(f"{option('layout')} must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    raw = read_table(path, f"an index of crops with the columns {','.join(COLUMNS)}").astype(str)
    reference = {name.lower(): name for name in REFERENCE_COLUMNS}
    raw.columns = [reference.get(name.lower(), name) for name in raw.columns]
    folder = Path(root) if root is not None else path.parent
    if not folder.is_dir():
        raise CellfastError(f"{option('root', folder)}: no such folder; expected the one the index's file names are relative to")
    if raw.empty:
        raise CellfastError(f"{path}: the index has no rows")
    notes: list[str] = []
    if set(REFERENCE_COLUMNS[:2]) <= set(raw.columns):
        raw = _from_reference(raw, path)
        layout = "strip" if layout == "auto" else layout
        notes.append(
            "reference implementation's index: plate, well and site are read from Image_Name, the treatment from Class_Name"
        )
    table, placed = _canonical(raw, path, columns or {}, notes)
    dropped: dict[str, int] = {}
    num_rows = len(table)
    later = {name: column for name, column in (columns or {}).items() if name not in placed}
    table = _joined(table, metadata, moa, later, notes)
    incomplete = (table["file"] == "") | (table["plate"] == "")
    if incomplete.any():
        dropped["row without file or plate"] = int(incomplete.sum())
        table = table[~incomplete]
    twice = table.duplicated("file")
    if twice.any():
        dropped["file listed twice"] = int(twice.sum())
        table = table[~twice]
    # The same name in two folders would be two cells of one number: no table could be joined back to them.
    key = ["plate", "well", "site", "cell"]
    same = table[(table["cell"] >= 0) & table.duplicated(key, keep=False)]
    if not same.empty:
        # Field identity may be in the file's name only (BBBC021 sites re-imaged); keep the cells, number them anew, and say so.
        notes.append(
            f"{len(same)} cells share plate, well, site and cell number with another; they are told apart by their files"
        )
    _check_treatments(table, path)
    table = table.assign(file=[str(folder / name) for name in table["file"]])
    return CropIndex(table.reset_index(drop=True), layout, dropped, num_rows, tuple(notes))


def _canonical(raw: pd.DataFrame, path: Path, columns: Mapping[str, str], notes: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """(the index's `COLUMNS` with their types, which of ``columns`` it has)."""
    here, _ = split_overrides(columns, list(raw.columns))
    found = find_columns(list(raw.columns), here, str(path))
    plain = {plain_name(column): column for column in reversed(raw.columns) if column not in found.values()}
    file, cell = (next((plain[name] for name in names if name in plain), None) for names in (_FILE, _CELL))
    if file is None or not {PLATE, WELL} <= {*found, *([WELL] if {ROW, COLUMN} <= set(found) else [])}:
        raise CellfastError(
            f"{path}: expected the columns {','.join(COLUMNS)} (file, plate and well at least) or {','.join(REFERENCE_COLUMNS)}, "
            f"found {','.join(map(str, raw.columns))}"
        )
    known = canonical_metadata(raw[list(dict.fromkeys(found.values()))], found, str(path), notes)
    known, spellings = unify_spellings(known, (PLATE,))
    notes.extend(spelling_notes(spellings))
    out = pd.DataFrame({"file": text_column(raw[file])}).assign(plate=known[PLATE], well=known[WELL])
    for name, label, column in (
        ("site", "site", known.get(SITE)),
        ("cell", "cell number", raw[cell] if cell is not None else None),
    ):
        if column is None:
            out[name] = -1
            notes.append(f"no column {name}: the {label} is unknown (-1)")
            continue
        text = text_column(column)
        numbers = pd.to_numeric(text.replace("", "-1"), errors="coerce")
        wrong = ~np.isfinite(numbers) | (numbers != np.floor(numbers)) | (numbers.abs() > 2**53)
        if wrong.any():
            raise CellfastError(f"{path}: column {name} must hold integers, got {text[wrong].iloc[0]!r}")
        out[name] = numbers.astype(np.int64)
    for name, canonical in (("compound", COMPOUND), ("moa", MOA), ("batch", BATCH)):
        out[name] = known.get(canonical, "")
    out["concentration"] = known.get(CONCENTRATION, np.nan)
    return out, list(here)


def _from_reference(raw: pd.DataFrame, path: Path) -> pd.DataFrame:
    rows: list[tuple[str, ...]] = []
    for name, label in zip(raw["Image_Name"], raw["Class_Name"]):
        parts = re.split(r"[\\/]", name)[-1].split("-")
        site = re.match(r"s?(\d+)", parts[2]) if len(parts) > 2 else None
        compound, _, concentration = label.rpartition("_")
        if site is None or not compound:
            raise CellfastError(
                f"{path}: expected Image_Name as <plate>-<well>-s<site>… and Class_Name as <compound>_<concentration>, got "
                f"{name!r} and {label!r}"
            )
        number = re.findall(r"\d+", Path(name).stem)[-1]
        rows.append((name, parts[0], parts[1], site.group(1), number, compound, concentration, ""))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _joined(
    table: pd.DataFrame, metadata: str | Path | None, moa: str | Path | None, later: Mapping[str, str], notes: list[str]
) -> pd.DataFrame:
    """Treatments from a plate map and MoAs from a table of treatments, as `cellfast.metadata.joins` joins them to any table."""
    frame = table.rename(columns=_CANONICAL)
    placed: set[str] = set()
    if metadata is not None:
        frame, report = join_plate_map(frame, metadata, later)
        placed |= set(report["placed"])
        notes.extend(report["notes"])
        notes.extend(f"no row of {report['file']} for well {name}" for name in report["all_not_joined"])
        notes.extend(f"no crop of {name}, which {report['file']} lists" for name in report["all_unused"])
    if moa is not None:
        frame, report = join_moa(frame, moa, later)
        placed |= set(report["placed"])
        notes.extend(report["notes"])
        notes.extend(f"no crop of {treatment}, which the MoA table lists" for treatment in report["all_unused"])
        without = frame[frame[MOA] == ""].drop_duplicates([COMPOUND, CONCENTRATION])
        missing = sorted(treatment_name(c, d) for c, d in zip(without[COMPOUND], without[CONCENTRATION]))
        notes.extend(f"no MoA for {treatment}" for treatment in missing)
    unplaced_overrides(later, placed, "neither the index nor a joined table")
    frame, spellings = unify_spellings(frame, (BATCH, COMPOUND, MOA))
    notes.extend(spelling_notes(spellings))
    return frame.rename(columns={canonical: name for name, canonical in _CANONICAL.items()})[list(table.columns)]


def _check_treatments(table: pd.DataFrame, path: Path) -> None:
    """One treatment per well: profiles are made of wells."""
    treatments = table[["plate", "well", "compound", "concentration", "moa"]].drop_duplicates()
    mixed = treatments[treatments.duplicated(["plate", "well"], keep=False)]
    if not mixed.empty:
        first = mixed[(mixed["plate"] == mixed["plate"].iloc[0]) & (mixed["well"] == mixed["well"].iloc[0])]
        shown = " and ".join(f"{c} @ {d:g} µM ({m or 'no MoA'})" for c, d, m in first.iloc[:3, 2:].itertuples(index=False))
        raise CellfastError(
            f"{path}: plate {first['plate'].iloc[0]}, well {first['well'].iloc[0]} has {len(first)} treatments, {shown}; correct "
            "the index"
        )
