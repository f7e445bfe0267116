"""Tables of ready-made crops: one file per cell, in cellfast's columns or in the reference implementation's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.screens.wells import normalise_well

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
        raise CellfastError(f"--layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise CellfastError(f"{path}: no such index; expected a CSV with the columns {','.join(COLUMNS)}") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise CellfastError(f"{path}: not a readable CSV ({error})") from error
    raw.columns = [str(c).strip() for c in raw.columns]
    folder = Path(root) if root is not None else path.parent
    if not folder.is_dir():
        raise CellfastError(f"--root {folder}: no such folder; expected the one the index's file names are relative to")
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
    table = table.assign(file=[str(folder / name) for name in table["file"]])
    return CropIndex(table.reset_index(drop=True), layout, dropped, num_rows, tuple(notes))


def _typed(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.DataFrame:
    out = pd.DataFrame({"file": table["file"].str.strip(), "plate": table["plate"].str.strip()})
    wells = {name: normalise_well(name) for name in table["well"].unique()}
    out["well"] = table["well"].map(wells)
    for name, label in (("site", "site"), ("cell", "cell number")):
        if name not in table.columns:
            out[name] = -1
            notes.append(f"no column {name}: the {label} is unknown (-1)")
            continue
        digits = table[name].str.strip().str.replace(r"^s(?=\d)", "", regex=True).replace("", "-1")
        numbers = pd.to_numeric(digits, errors="coerce")
        if numbers.isna().any():
            raise CellfastError(f"{path}: column {name} must hold integers, got {table[name][numbers.isna()].iloc[0]!r}")
        out[name] = numbers.astype(np.int64)
    for name in ("compound", "moa"):
        out[name] = table[name].str.strip() if name in table.columns else ""
    if "concentration" in table.columns:
        text = table["concentration"].str.strip()
        out["concentration"] = pd.to_numeric(text, errors="coerce").astype(np.float64)
        unread = out["concentration"].isna() & (text != "")
        if unread.any():
            raise CellfastError(f"{path}: column concentration must hold numbers (µM), got {text[unread].iloc[0]!r}")
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
    try:
        moa = pd.read_csv(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CellfastError(f"{path}: not a readable CSV of compound,concentration,moa ({error})") from error
    if not {"compound", "concentration", "moa"} <= set(moa.columns):
        raise CellfastError(f"{path}: expected the columns compound,concentration,moa, found {','.join(map(str, moa.columns))}")
    known = {}
    for compound, concentration, name in zip(moa["compound"], moa["concentration"], moa["moa"]):
        known.setdefault(str(compound).strip().casefold(), []).append((float(concentration), str(name)))

    def find(compound: str, concentration: float, present: str) -> str:
        if present:
            return present
        for dose, name in known.get(compound.casefold(), []):
            if np.isclose(dose, concentration, rtol=1e-3, atol=0):
                return name
        return ""

    joined = [find(c, d, m) for c, d, m in zip(table["compound"], table["concentration"], table["moa"])]
    missing = table[[not m and c.upper() != "DMSO" for m, c in zip(joined, table["compound"])]]
    treatments: Sequence[str] = sorted({f"{c} @ {d:g} µM" for c, d in zip(missing["compound"], missing["concentration"])})
    notes.extend(f"no MoA for {treatment}" for treatment in treatments)
    return table.assign(moa=["DMSO" if not m and c.upper() == "DMSO" else m for m, c in zip(joined, table["compound"])])
