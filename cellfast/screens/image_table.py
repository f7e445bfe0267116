"""Image tables: which file is which channel of which field. BBBC021's image CSV, CellProfiler's load_data and Image.csv, file-name patterns."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pandas import DataFrame

from cellfast.errors import CellfastError
from cellfast.screens.image_files import (
    channel_columns,
    chosen,
    file_finder,
    files_under,
    found_columns,
    illumination_columns,
    image_root_of,
)
from cellfast.screens.tables import concentration_um, find_column, read_table
from cellfast.screens.wells import normalise_well


@dataclass(frozen=True)
class Field:
    """One field of view: where it was taken, its files (one per channel, "" where the table names none) and its treatment."""

    plate: str
    well: str
    site: int
    image_number: int
    files: tuple[str, ...]
    compound: str = ""
    concentration: float = math.nan
    moa: str = ""


@dataclass(frozen=True)
class ImageTable:
    """The fields of a screen.

    Attributes:
        notes: decisions made while reading, for the ledger.
        illumination: (folder, name) of the illumination function that the table names for a (plate, channel).
    """

    channel_names: tuple[str, ...]
    fields: tuple[Field, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)
    illumination: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


# Of image, site and object: what a float64 tells apart.
MOST_NUMBER = 2**53

PLATE = ("Metadata_Plate", "Image_Metadata_Plate", "Image_Metadata_Plate_DAPI", "Plate", "Metadata_PlateID", "Metadata_Barcode")
WELL = ("Metadata_Well", "Image_Metadata_Well", "Image_Metadata_Well_DAPI", "Well", "Metadata_WellID")
SITE = ("Metadata_Site", "Image_Metadata_Site", "Site", "Metadata_Field", "Metadata_FieldID", "Field")
ROW = ("Metadata_Row", "Row", "Metadata_WellRow", "WellRow")
COLUMN = ("Metadata_Column", "Metadata_Col", "Column", "Col", "Metadata_WellColumn", "WellColumn")
COMPOUND = (
    "Image_Metadata_Compound",
    "Metadata_Compound",
    "Metadata_compound",
    "Compound",
    "Metadata_pert_iname",
    "Metadata_broad_sample",
)
CONCENTRATION = (
    "Image_Metadata_Concentration",
    "Metadata_Concentration",
    "Concentration",
    "Metadata_Dose",
    "Dose",
    "Doses",
    "SBS_Doses",
    "Metadata_mmoles_per_liter",
)
MOA = ("Metadata_MoA", "Image_Metadata_MoA", "MoA", "Metadata_Mechanism")


def read_image_table(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    plate: str | None = None,
) -> ImageTable:
    """Read BBBC021's image CSV, a CellProfiler load_data CSV or CellProfiler's Image.csv.

    Args:
        path: CSV or CSV.gz with ``[Image_]FileName_<channel>`` and ``[Image_]PathName_<channel>``, or ``URL_[Orig]<channel>``,
            or a column of paths per channel (DeepProfiler's index.csv); see `cellfast.screens.image_files.channel_columns`.
        image_root: folder (fsspec URL, or field store) that relative paths start from; absolute paths that do not exist here are looked up under it.
        channels: channels to take, in this order; None: all, in the table's order.
        plate: plate name for tables without one.

    Raises:
        CellfastError: unreadable, needed columns missing (lists those found), unknown channels, wells that are none, one field listed twice.
    """
    root = image_root_of(image_root)
    table = read_table(path, "an image table")
    notes: list[str] = []
    columns = channel_columns(table, channels, path, notes)
    names = list(columns)
    functions = illumination_columns(table, names)
    illumination: dict[tuple[str, str], tuple[str, str]] = {}
    plate_column, well_column, site_column = (find_column(table, c) for c in (PLATE, WELL, SITE))
    # BBBC021 names these columns after its first channel.
    plate_column = plate_column or next((c for c in table.columns if re.match(r"(?i)(image_)?metadata_plate_", c)), None)
    well_column = well_column or next((c for c in table.columns if re.match(r"(?i)(image_)?metadata_well_", c)), None)
    if plate_column is None and plate is None:
        raise CellfastError(
            f"{path}: no column with the plate (looked for {', '.join(PLATE)}; found {found_columns(table)}); name the plate with --plate"
        )
    if well_column is None and not (find_column(table, ROW) and find_column(table, COLUMN)):
        notes.append("the table has no wells: all fields are taken to be of well A01")
    number_column = find_column(table, ("ImageNumber", "Metadata_ImageNumber", "Image_ImageNumber"))
    treatment = [find_column(table, c) for c in (COMPOUND, CONCENTRATION, MOA)]
    finder = file_finder(root)
    fields = []
    for position, row in enumerate(table.to_dict("records")):
        plate_name = str(row[plate_column]).strip() if plate_column else str(plate)
        files = tuple(finder.find(*named.of(row), plate_name) for named in columns.values())
        for channel, named in functions.items():
            function = named.of(row)
            if function[1] and illumination.setdefault((plate_name, channel), function) != function:
                raise CellfastError(
                    f"{path}, row {position + 2}: plate {plate_name}, channel {channel} has two illumination functions, "
                    f"{illumination[plate_name, channel][1]} and {function[1]}; correct the table"
                )
        fields.append(
            Field(
                plate=plate_name,
                well=_well_of(row, table, well_column, f"{path}, row {position + 2}"),
                site=_site_of(row.get(site_column, "") if site_column else "", files),
                image_number=_number_of(row[number_column], f"{path}, row {position + 2}, column {number_column}")
                if number_column
                else -1,
                files=files,
                compound=str(row[treatment[0]]).strip() if treatment[0] else "",
                concentration=concentration_um(row[treatment[1]], f"{path}, row {position + 2}, column {treatment[1]}")
                if treatment[1]
                else math.nan,
                moa=str(row[treatment[2]]).strip() if treatment[2] else "",
            )
        )
    if not fields:
        raise CellfastError(f"{path}: the image table has no rows")
    return ImageTable(tuple(names), tuple(_with_sites(fields, notes, str(path))), tuple(notes), illumination)


def image_table_from_pattern(
    pattern: str, image_root: str | os.PathLike[str], *, plate: str | None = None, channels: Sequence[str] | None = None
) -> ImageTable:
    """Make an image table from file names under ``image_root``.

    Args:
        pattern: regular expression with the named groups ``channel`` and ``well`` (or ``row`` and ``column``), and perhaps ``site`` and
            ``plate``, searched in each file's path relative to ``image_root`` (with ``/``).

    Raises:
        CellfastError: not a regular expression, groups missing, nothing matches, one field and channel matched twice.
    """
    root = image_root_of(image_root)
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise CellfastError(f"--pattern {pattern!r} is not a regular expression: {error}") from error
    groups = set(regex.groupindex)
    if "channel" not in groups or not ("well" in groups or {"row", "column"} <= groups):
        raise CellfastError(
            f"--pattern must have the groups (?P<channel>…) and (?P<well>…), or row and column; it has {sorted(groups) or 'none'}"
        )
    if "plate" not in groups and plate is None:
        raise CellfastError("--pattern has no group (?P<plate>…): name the plate with --plate")
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    unmatched = []
    for name, file in files_under(root):
        match = regex.search(name)
        if match is None:
            unmatched.append(name)
            continue
        part = match.groupdict()
        well = part.get("well") or _join_row_column(part["row"], part["column"])
        site = _site_of(part.get("site") or "1", ())
        key = (part.get("plate") or str(plate), normalise_well(well), site)
        files = found.setdefault(key, {})
        if part["channel"] in files:
            raise CellfastError(
                f"--pattern matches two files for plate {key[0]}, well {key[1]}, site {site}, channel {part['channel']}: {files[part['channel']]} and {file}"
            )
        files[part["channel"]] = str(file)
    if not found:
        raise CellfastError(
            f"--pattern matches none of {len(unmatched)} files under {root}" + (f", such as {unmatched[0]}" if unmatched else "")
        )
    known = sorted({channel for files in found.values() for channel in files})
    names = chosen(channels, known, "file names")
    notes = [f"{len(unmatched)} files under --image-root do not match the pattern, such as {unmatched[0]}"] if unmatched else []
    fields = [
        Field(plate=p, well=w, site=s, image_number=i + 1, files=tuple(files.get(name, "") for name in names))
        for i, ((p, w, s), files) in enumerate(sorted(found.items()))
    ]
    return ImageTable(tuple(names), tuple(fields), tuple(notes))


def _join_row_column(row: str, column: str) -> str:
    if re.fullmatch("[0-9]{1,2}", row):
        number = int(row) - 1
        row = chr(65 + number) if number < 26 else "A" + chr(65 + number - 26)
    return f"{row}{int(column):02d}" if re.fullmatch("[0-9]{1,3}", column) else f"{row}{column}"


def _well_of(row: dict, table: DataFrame, well_column: str | None, where: str) -> str:
    try:
        if well_column is not None:
            return normalise_well(str(row[well_column]))
        row_column, column_column = find_column(table, ROW), find_column(table, COLUMN)
        if row_column and column_column:
            return normalise_well(_join_row_column(str(row[row_column]).strip(), str(row[column_column]).strip()))
    except CellfastError as error:
        raise CellfastError(f"{where}: {error}") from error
    return "A01"


def _site_of(text: object, files: tuple[str, ...]) -> int:
    """The site, or −1 where neither the column nor the file's name (``_s3_``) tells."""
    digits = re.search(r"[0-9]+", str(text))
    if digits:
        if len(digits.group()) > 15:
            raise CellfastError(f"site {str(text)[:80]!r}: expected a number of at most 15 digits")
        return int(digits.group())
    for file in files:
        match = re.search(r"_[sf](\d+)[_.]", Path(file).name)
        if match:
            return int(match.group(1))
    return -1


def _with_sites(fields: list[Field], notes: list[str], path: str) -> list[Field]:
    """Number the sites of wells where none is known; refuse one (plate, well, site) twice."""
    running: Counter[tuple[str, str]] = Counter()
    out = []
    for one in fields:
        if one.site < 0:
            running[one.plate, one.well] += 1
            one = replace(one, site=running[one.plate, one.well])
        out.append(one)
    if running:
        notes.append(f"sites of {sum(running.values())} fields are unknown and numbered in the order of the table")
    twice = [key for key, count in Counter((f.plate, f.well, f.site) for f in out).items() if count > 1]
    if twice:
        shown = "; ".join(f"plate {p}, well {w}, site {s}" for p, w, s in twice[:3])
        raise CellfastError(f"{path}: {len(twice)} fields are listed more than once ({shown}); correct the table")
    return out


def _number_of(text: object, where: str) -> int:
    """A whole number; −1 where there is none."""
    word = str(text).strip()
    if word.lower() in ("", "na", "n/a", "nan", "none", "null"):
        return -1
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST_NUMBER or value != math.floor(value):
        raise CellfastError(f"{where}: expected a whole number, got {word[:80]!r}")
    return int(value)
