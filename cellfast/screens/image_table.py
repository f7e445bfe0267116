"""Image tables: which file is which channel of which field. BBBC021's image CSV, CellProfiler's load_data and Image.csv,
file-name patterns."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cellfast.errors import CellfastError, option
from cellfast.metadata.canonical import canonical_metadata
from cellfast.metadata.columns import BATCH, COMPOUND, CONCENTRATION, IMAGE_NUMBER, MOA, PLATE, SITE, WELL, find_columns
from cellfast.metadata.joins import split_overrides
from cellfast.metadata.tables import read_table
from cellfast.metadata.values import spelling_notes, unify_spellings
from cellfast.metadata.wells import well_name
from cellfast.screens.image_files import (
    channel_columns,
    chosen,
    file_finder,
    files_under,
    found_columns,
    illumination_columns,
    image_root_of,
)


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
    batch: str = ""


@dataclass(frozen=True)
class ImageTable:
    """The fields of a screen.

    Attributes:
        notes: decisions made while reading, for the ledger.
        illumination: (folder, name) of the illumination function that the table names for a (plate, channel).
        placed: which of the columns that were named for it (`read_image_table`) it has.
    """

    channel_names: tuple[str, ...]
    fields: tuple[Field, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)
    illumination: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    placed: tuple[str, ...] = ()


# Of image, site and object: what a float64 tells apart.
MOST_NUMBER = 2**53


def read_image_table(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    plate: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> ImageTable:
    """Read BBBC021's image CSV, a CellProfiler load_data CSV or CellProfiler's Image.csv.

    Args:
        path: CSV or CSV.gz with ``[Image_]FileName_<channel>`` and ``[Image_]PathName_<channel>``, or ``URL_[Orig]<channel>``,
            or a column of paths per channel (DeepProfiler's index.csv); see `cellfast.screens.image_files.channel_columns`.
        image_root: folder (fsspec URL, or field store) that relative paths start from; absolute paths that do not exist here are
            looked up under it.
        channels: channels to take, in this order; None: all, in the table's order.
        plate: plate name for tables without one.
        columns: canonical name → the column that holds it, where it is not recognised; the table's ``placed`` names those it has.

    Raises:
        CellfastError: unreadable, needed columns missing (lists those found), unknown channels, wells that are none, one field
            listed twice.
    """
    root = image_root_of(image_root)
    table = read_table(path, "an image table")
    notes: list[str] = []
    files_of = channel_columns(table, channels, path, notes)
    names = list(files_of)
    functions = illumination_columns(table, names)
    illumination: dict[tuple[str, str], tuple[str, str]] = {}
    here, _ = split_overrides(columns or {}, list(table.columns))
    found = find_columns(list(table.columns), here, str(path))
    if PLATE not in found and plate is None:
        raise CellfastError(
            f"{path}: no column with the plate (found {found_columns(table)}); name the plate with {option('plate')}"
        )
    known = canonical_metadata(table[list(dict.fromkeys(found.values()))], found, str(path), notes)
    known, spellings = unify_spellings(known, (PLATE,))
    notes.extend(spelling_notes(spellings))
    if WELL not in known:
        notes.append("the table has no wells: all fields are taken to be of well A01")
    texts = {
        name: known[name].to_list() if name in known else [""] * len(table) for name in (PLATE, WELL, SITE, BATCH, COMPOUND, MOA)
    }
    doses = known[CONCENTRATION].to_list() if CONCENTRATION in known else [math.nan] * len(table)
    numbers = known[IMAGE_NUMBER].to_list() if IMAGE_NUMBER in known else [""] * len(table)
    finder = file_finder(root)
    fields = []
    for position, row in enumerate(table.to_dict("records")):
        plate_name = texts[PLATE][position] if PLATE in known else str(plate)
        if not plate_name or (WELL in known and not texts[WELL][position]):
            raise CellfastError(
                f"{path}, row {position + 2}: no {'well' if plate_name else 'plate'}; fill it in, or remove the row"
            )
        files = tuple(finder.find(*named.of(row), plate_name) for named in files_of.values())
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
                well=texts[WELL][position] or "A01",
                site=_site_of(texts[SITE][position], files),
                image_number=_number_of(numbers[position], f"{path}, row {position + 2}, column {found.get(IMAGE_NUMBER)}"),
                files=files,
                compound=texts[COMPOUND][position],
                concentration=doses[position],
                moa=texts[MOA][position],
                batch=texts[BATCH][position],
            )
        )
    if not fields:
        raise CellfastError(f"{path}: the image table has no rows")
    return ImageTable(tuple(names), tuple(_with_sites(fields, notes, str(path))), tuple(notes), illumination, tuple(here))


def image_table_from_pattern(
    pattern: str, image_root: str | os.PathLike[str], *, plate: str | None = None, channels: Sequence[str] | None = None
) -> ImageTable:
    """Make an image table from file names under ``image_root``.

    Args:
        pattern: regular expression with the named groups ``channel`` and ``well`` (or ``row`` and ``column``), and perhaps
            ``site`` and ``plate``, searched in each file's path relative to ``image_root`` (with ``/``).

    Raises:
        CellfastError: not a regular expression, groups missing, nothing matches, one field and channel matched twice.
    """
    root = image_root_of(image_root)
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise CellfastError(f"{option('pattern', pattern)} is not a regular expression: {error}") from error
    groups = set(regex.groupindex)
    if "channel" not in groups or not ("well" in groups or {"row", "column"} <= groups):
        raise CellfastError(
            f"{option('pattern')} must have the groups (?P<channel>…) and (?P<well>…), or row and column; it has "
            f"{sorted(groups) or 'none'}"
        )
    if "plate" not in groups and plate is None:
        raise CellfastError(f"{option('pattern')} has no group (?P<plate>…): name the plate with {option('plate')}")
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    unmatched = []
    for name, file in files_under(root):
        match = regex.search(name)
        if match is None:
            unmatched.append(name)
            continue
        part = match.groupdict()
        site = _site_of(part.get("site") or "1", ())
        key = (
            part.get("plate") or str(plate),
            well_name(part["well"]) if part.get("well") else well_name(part["row"], part["column"]),
            site,
        )
        files = found.setdefault(key, {})
        if part["channel"] in files:
            raise CellfastError(
                f"{option('pattern')} matches two files for plate {key[0]}, well {key[1]}, site {site}, channel "
                f"{part['channel']}: {files[part['channel']]} and {file}"
            )
        files[part["channel"]] = str(file)
    if not found:
        raise CellfastError(
            f"{option('pattern')} matches none of {len(unmatched)} files under {root}"
            + (f", such as {unmatched[0]}" if unmatched else "")
        )
    known = sorted({channel for files in found.values() for channel in files})
    names = chosen(channels, known, "file names")
    notes = [f"{len(unmatched)} files under {root} do not match the pattern, such as {unmatched[0]}"] if unmatched else []
    fields = [
        Field(plate=p, well=w, site=s, image_number=i + 1, files=tuple(files.get(name, "") for name in names))
        for i, ((p, w, s), files) in enumerate(sorted(found.items()))
    ]
    return ImageTable(tuple(names), tuple(fields), tuple(notes))


def _site_of(text: object, files: tuple[str, ...]) -> int:
    """The site, or −1 where neither the column nor the file's name (``_s3_``) tells."""
    digits = re.search(r"[0-9]+", str(text))
    if digits:
        if len(digits.group()) > 15:
            raise CellfastError(f"site {str(text)[:80]!r}: expected a number of at most 15 digits")
        return int(digits.group())
    for file in files:
        match = re.search(r"_[sf](\d{1,15})[_.]", Path(file).name)
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
