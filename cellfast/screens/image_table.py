"""Image tables: which file is which channel of which field. BBBC021's image CSV, CellProfiler's load_data and Image.csv, file-name patterns."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, urlparse

from pandas import DataFrame

from cellfast.errors import CellfastError
from cellfast.screens.field_store import PROTOCOL, store_url
from cellfast.screens.remote import file_system, is_url
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
    """The fields of a screen; ``notes`` are decisions made while reading, for the ledger."""

    channel_names: tuple[str, ...]
    fields: tuple[Field, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)


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
        path: CSV or CSV.gz with ``[Image_]FileName_<channel>`` and ``[Image_]PathName_<channel>``, or ``URL_[Orig]<channel>``.
        image_root: folder (fsspec URL, or field store) that relative paths start from; absolute paths that do not exist here are looked up under it.
        channels: channels to take, in this order; None: all, in the table's order.
        plate: plate name for tables without one.

    Raises:
        CellfastError: unreadable, needed columns missing (lists those found), unknown channels, wells that are none, one field listed twice.
    """
    root = _root(image_root)
    table = read_table(path, "an image table")
    notes: list[str] = []
    names = _channels(table, channels, path, notes)
    plate_column, well_column, site_column = (find_column(table, c) for c in (PLATE, WELL, SITE))
    # BBBC021 names these columns after its first channel.
    plate_column = plate_column or next((c for c in table.columns if re.match(r"(?i)(image_)?metadata_plate_", c)), None)
    well_column = well_column or next((c for c in table.columns if re.match(r"(?i)(image_)?metadata_well_", c)), None)
    if plate_column is None and plate is None:
        raise CellfastError(
            f"{path}: no column with the plate (looked for {', '.join(PLATE)}; found {_found(table)}); name the plate with --plate"
        )
    if well_column is None and not (find_column(table, ROW) and find_column(table, COLUMN)):
        notes.append("the table has no wells: all fields are taken to be of well A01")
    number_column = find_column(table, ("ImageNumber", "Metadata_ImageNumber", "Image_ImageNumber"))
    treatment = [find_column(table, c) for c in (COMPOUND, CONCENTRATION, MOA)]
    columns = [_file_columns(table, name) for name in names]
    finder = _RemoteFinder(root) if isinstance(root, str) else _FileFinder(root)
    fields = []
    for position, row in enumerate(table.to_dict("records")):
        files = tuple(finder.find(*_file_of(row, *file_columns)) for file_columns in columns)
        fields.append(
            Field(
                plate=str(row[plate_column]).strip() if plate_column else str(plate),
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
    return ImageTable(tuple(names), tuple(_with_sites(fields, notes, str(path))), tuple(notes))


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
    root = _root(image_root)
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
    for name, file in _files_under(root):
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
    names = _chosen(channels, known, "file names")
    notes = [f"{len(unmatched)} files under --image-root do not match the pattern, such as {unmatched[0]}"] if unmatched else []
    fields = [
        Field(plate=p, well=w, site=s, image_number=i + 1, files=tuple(files.get(name, "") for name in names))
        for i, ((p, w, s), files) in enumerate(sorted(found.items()))
    ]
    return ImageTable(tuple(names), tuple(fields), tuple(notes))


def _files_under(root: Path | str) -> list[tuple[str, str]]:
    """(path relative to the root with ``/``, path or URL) of all files, sorted."""
    if isinstance(root, Path):
        return [(p.relative_to(root).as_posix(), str(p)) for p in sorted(root.rglob("*")) if p.is_file()]
    fs, key = file_system(root)
    names = [str(found)[len(key) :].lstrip("/") for found in fs.find(key)]
    return [(name, f"{root}/{name}") for name in sorted(names)]


def _root(image_root: str | os.PathLike[str]) -> Path | str:
    if is_url(image_root):
        fs, key = file_system(str(image_root).rstrip("/"))
        if not fs.isdir(key):
            raise CellfastError(f"--image-root {image_root}: no such folder")
        return str(image_root).rstrip("/")
    root = Path(image_root)
    if root.is_file() and root.suffix.lower() in (".h5", ".hdf5"):
        url = store_url(root)
        file_system(url)
        return url
    if not root.is_dir():
        raise CellfastError(f"--image-root {root}: no such folder, nor a field store (.h5)")
    return root


def _found(table: DataFrame) -> str:
    columns = list(table.columns)
    return ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")


def _chosen(channels: Sequence[str] | None, known: list[str], where: str) -> list[str]:
    if channels is None:
        return known
    unknown = [name for name in channels if name not in known]
    if unknown or len(set(channels)) != len(channels):
        what = f"unknown channels {', '.join(unknown)}" if unknown else "a channel is named twice"
        raise CellfastError(f"--channels: {what}; the {where} have {', '.join(known)}")
    return list(channels)


def _channels(table: DataFrame, channels: Sequence[str] | None, path: object, notes: list[str]) -> list[str]:
    listed: list[str] = []
    for column in table.columns:
        match = re.match(r"(?i)(?:image_)?filename_(.+)$|^url_(?:orig)?(.+)$", column)
        if match and (name := match.group(1) or match.group(2)) not in listed:
            listed.append(name)
    if not listed:
        raise CellfastError(f"{path}: no columns FileName_<channel> or URL_<channel>; found {_found(table)}")
    if channels is not None:
        return _chosen(channels, listed, "table's channels")
    # CellProfiler's Image.csv also lists files it wrote; its inputs have a Channel_, URL_ or Frame_ column, the others do not.
    inputs = [n for n in listed if any(f"{p}_{n}" in table.columns for p in ("Channel", "Frame"))]
    if inputs and len(inputs) < len(listed):
        notes.append(
            f"taken as channels: {', '.join(inputs)}; not: {', '.join(n for n in listed if n not in inputs)} (written by CellProfiler)"
        )
        return inputs
    return listed


def _file_columns(table: DataFrame, channel: str) -> tuple[str | None, str | None, str | None]:
    """(folder, file, URL) columns of a channel."""
    file_column = find_column(table, (f"FileName_{channel}", f"Image_FileName_{channel}"))
    if file_column is not None:
        return find_column(table, (f"PathName_{channel}", f"Image_PathName_{channel}")), file_column, None
    return None, None, find_column(table, (f"URL_{channel}", f"URL_Orig{channel}"))


def _file_of(row: dict, path_column: str | None, file_column: str | None, url_column: str | None) -> tuple[str, str]:
    """(folder, file) as the table gives them."""
    if file_column is not None:
        return (str(row[path_column]).strip() if path_column else ""), str(row[file_column]).strip()
    url = str(row[url_column]).strip()
    if not url:
        return "", ""
    if url.startswith("file:"):
        url = unquote(urlparse(url).path)
    folder, _, name = url.rpartition("/")
    return folder, name


class _FileFinder:
    """Where a table's file lies: as given, or under the image root with more or less of the table's folders."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._folders: dict[str, Path] = {}

    def find(self, folder: str, name: str) -> str:
        """Absolute path; the most likely one where the file is nowhere."""
        if not name:
            return ""
        if is_url(folder):
            folder, name = unquote(urlparse(folder).path), unquote(name)
        if folder not in self._folders:
            self._folders[folder] = self._place(folder, name)
        path = self._folders[folder] / name
        if not path.is_file():
            # Another file of that folder may have been the one that is missing. One that is nowhere is expected beside the others.
            elsewhere = self._place(folder, name) / name
            path = elsewhere if elsewhere.is_file() else path
        return str(path)

    def _place(self, folder: str, name: str) -> Path:
        parts = [p for p in PureWindowsPath(folder).parts if p not in ("\\", "/")] if folder else []
        candidates = [Path(folder)] if folder and os.path.isabs(folder) else []
        candidates += [self.root.joinpath(*parts[k:]) for k in range(len(parts) + 1)]
        return next(
            (c for c in candidates if (c / name).is_file()),
            candidates[1]
            if len(candidates) > 1 and candidates[0].is_absolute() and candidates[0] == Path(folder)
            else candidates[0],
        )


class _RemoteFinder:
    """As `_FileFinder`, under a URL: the table's own URL first, then more or less of its folders under the root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._listed: dict[str, set[str]] = {}

    def find(self, folder: str, name: str) -> str:
        """URL; the most likely one where the file is nowhere."""
        if not name:
            return ""
        path = urlparse(folder).path if is_url(folder) else folder
        parts = [p for p in PureWindowsPath(path).parts if p not in ("\\", "/")]
        candidates = ["/".join([self.root, *parts[k:]]) for k in range(len(parts) + 1)]
        if is_url(folder) and not self.root.startswith(f"{PROTOCOL}://"):
            candidates.insert(0, folder)
        found = next((c for c in candidates if name in self._names(c)), candidates[0])
        return f"{found}/{name}"

    def _names(self, folder: str) -> set[str]:
        if folder not in self._listed:
            try:
                fs, key = file_system(folder)
                self._listed[folder] = {str(one).rsplit("/", 1)[-1] for one in fs.ls(key, detail=False)}
            except (OSError, CellfastError):  # not there, not ours to read, or a protocol that is not installed
                self._listed[folder] = set()
        return self._listed[folder]


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
