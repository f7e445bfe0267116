"""Tables of ready-made crops: one file per cell, in cellfast's columns or in the reference implementation's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.doses import concentrations_um
from cellfast.metadata.joins import MoaTable
from cellfast.metadata.tables import read_table
from cellfast.metadata.treatments import CONTROL_COMPOUND, is_control, treatment_name
from cellfast.metadata.wells import well_name

COLUMNS = ("file", "plate", "well", "site", "cell", "compound", "concentration", "moa")
REFERENCE_COLUMNS = ("Image_Name", "Class_Name", "Target")
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
    path: str | Path, *, root: str | Path | None = None, layout: str = "auto", moa: str | Path | None = None
) -> CropIndex:
    """Read a table of ready-made crops.

    Args:
        path: a CSV (or .csv.gz) with columns ``file, plate, well, site, cell, compound, concentration, moa`` (``site``, ``cell``,
            ``compound``, ``concentration`` and ``moa`` may be absent), or with the reference implementation's
            ``Image_Name, Class_Name, Target``: the image's name is ``<plate>-<well>-s<site>…``, its class ``<compound>_<concentration>``,
            and its channels stand side by side in one strip.
        root: folder the files' names are relative to; the table's own by default.
        layout: ``HWC`` or ``CHW`` for arrays of three axes, ``strip`` for channels side by side, ``auto`` tells by the shape.
        moa: CSV ``compound,concentration,moa`` for tables without a moa column.

    Raises:
        CellfastError: unreadable table, missing columns, no rows, or the same plate, well, site and cell twice.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise CellfastError(f"{option('layout')} must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    raw = read_table(path, f"an index of crops with the columns {','.join(COLUMNS)}").astype(str)
    known = {name.lower(): name for name in (*COLUMNS, *REFERENCE_COLUMNS)}
    raw.columns = [known.get(name.lower(), name) for name in raw.columns]
    folder = Path(root) if root is not None else path.parent
    if not folder.is_dir():
        raise CellfastError(f"{option('root', folder)}: no such folder; expected the one the index's file names are relative to")
    notes: list[str] = []
    if set(REFERENCE_COLUMNS[:2]) <= set(raw.columns):
        table = _from_reference(raw, path)
        layout = "strip" if layout == "auto" else layout
        notes.append(
            "reference implementation's index: plate, well and site are read from Image_Name, the treatment from Class_Name"
        )
    elif {"file", "plate", "well"} <= set(raw.columns):
        table = raw
    else:
        raise CellfastError(
            f"{path}: expected the columns {','.join(COLUMNS)} (file, plate and well at least) or {','.join(REFERENCE_COLUMNS)}, "
            f"found {','.join(raw.columns)}"
        )
    if table.empty:
        raise CellfastError(f"{path}: the index has no rows")
    dropped: dict[str, int] = {}
    num_rows = len(table)
    table = _typed(table, path, notes)
    if moa is not None:
        table = _join_moa(table, Path(moa), notes)
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


def _typed(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.DataFrame:
    out = pd.DataFrame({"file": table["file"].str.strip(), "plate": table["plate"].str.strip()})
    wells = {}
    for name in table["well"].unique():
        try:
            wells[name] = well_name(name)
        except CellfastError as error:
            row = int(np.argmax((table["well"] == name).to_numpy())) + 2
            raise CellfastError(f"{path}, row {row}: {error}") from error
    out["well"] = table["well"].map(wells)
    for name, label in (("site", "site"), ("cell", "cell number")):
        if name not in table.columns:
            out[name] = -1
            notes.append(f"no column {name}: the {label} is unknown (-1)")
            continue
        digits = table[name].str.strip().str.replace(r"^s(?=\d)", "", regex=True).replace("", "-1")
        numbers = pd.to_numeric(digits, errors="coerce")
        wrong = ~np.isfinite(numbers) | (numbers != np.floor(numbers)) | (numbers.abs() > 2**53)
        if wrong.any():
            raise CellfastError(f"{path}: column {name} must hold integers, got {table[name][wrong].iloc[0]!r}")
        out[name] = numbers.astype(np.int64)
    for name in ("compound", "moa"):
        out[name] = table[name].str.strip() if name in table.columns else ""
    if "concentration" in table.columns:
        out["concentration"] = concentrations_um(table["concentration"], f"{path}, column concentration")
    else:
        out["concentration"] = np.nan
    return out


def _from_reference(raw: pd.DataFrame, path: Path) -> pd.DataFrame:
    rows: list[tuple[str, ...]] = []
    for name, label in zip(raw["Image_Name"], raw["Class_Name"]):
        parts = re.split(r"[\\/]", name)[-1].split("-")
        site = re.match(r"s?(\d+)", parts[2]) if len(parts) > 2 else None
        compound, _, concentration = label.rpartition("_")
        if site is None or not compound:
            raise CellfastError(
                f"{path}: expected Image_Name as <plate>-<well>-s<site>… and Class_Name as <compound>_<concentration>, got {name!r} and {label!r}"
            )
        number = re.findall(r"\d+", Path(name).stem)[-1]
        rows.append((name, parts[0], parts[1], site.group(1), number, compound, concentration, ""))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _join_moa(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.DataFrame:
    """A row's own MoA stays; the others get the table's, DMSO without one ``DMSO``; treatments without any are noted."""
    moas = MoaTable.read(
        path, compounds=set(table["compound"]), with_doses=bool(table["concentration"].notna().any()), notes=notes
    )
    joined, missing = [], set()
    for compound, concentration, present in zip(table["compound"], table["concentration"], table["moa"]):
        moa = moas.find(compound, concentration) or present
        if not moa and is_control(compound):
            moa = CONTROL_COMPOUND
        elif not moa:
            missing.add(treatment_name(compound, concentration))
        joined.append(present or moa)
    notes.extend(f"no MoA for {treatment}" for treatment in sorted(missing))
    notes.extend(f"no crop of {treatment}, which the MoA table lists" for treatment in moas.unused())
    return table.assign(moa=joined)


def _check_treatments(table: pd.DataFrame, path: Path) -> None:
    """One treatment per well: profiles are made of wells."""
    treatments = table[["plate", "well", "compound", "concentration", "moa"]].drop_duplicates()
    mixed = treatments[treatments.duplicated(["plate", "well"], keep=False)]
    if not mixed.empty:
        first = mixed[(mixed["plate"] == mixed["plate"].iloc[0]) & (mixed["well"] == mixed["well"].iloc[0])]
        shown = " and ".join(f"{c} @ {d:g} µM ({m or 'no MoA'})" for c, d, m in first.iloc[:3, 2:].itertuples(index=False))
        raise CellfastError(
            f"{path}: plate {first['plate'].iloc[0]}, well {first['well'].iloc[0]} has {len(first)} treatments, {shown}; correct the index"
        )
