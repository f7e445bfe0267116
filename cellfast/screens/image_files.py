"""Which columns of a table are channels, and where the files that it names lie."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from pandas import DataFrame

from cellfast.errors import CellfastError, option
from cellfast.screens.field_store_files import PROTOCOL, store_url
from cellfast.storage.urls import file_system, is_url

IMAGE_SUFFIXES = (".tif", ".tiff", ".flex", ".lsm", ".stk", ".png")
_FUNCTION_SUFFIXES = (".npy", ".mat")
_ORIG = re.compile(r"[Oo]rig(?=[A-Z0-9_])_?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?://[^/\\]*)?")


@dataclass(frozen=True)
class FileColumns:
    """The columns that name a channel's file: its folder and its name, or both in one, or a URL."""

    folder: str | None = None
    file: str | None = None
    url: str | None = None

    def of(self, row: Mapping[Any, Any]) -> tuple[str, str]:
        """(folder, name) in a row of the table; ``("", "")`` where it names none. Either may be of a URL, or have ``\\`` for
        ``/``."""
        name = str(row[self.file]).strip() if self.file is not None else ""
        if self.url is not None and (self.folder is None or not name):
            name = str(row[self.url]).strip() or name
        folder = str(row[self.folder]).strip() if self.folder is not None else ""
        inner, separator, last = name.rpartition("/" if "/" in name else "\\")
        if not separator:
            return (folder, name) if name else ("", "")
        # A FileName column may hold a whole path, or the end of one.
        whole = _SCHEME.match(name) or inner[:1] in ("", "/", "\\") or PureWindowsPath(inner).drive
        return (inner if whole or not folder else f"{folder}/{inner}"), last


def channel_columns(table: DataFrame, channels: Sequence[str] | None, path: object, notes: list[str]) -> dict[str, FileColumns]:
    """The channels of a table and the columns that name their files.

    Channels are ``[Image_]FileName_<channel>`` or ``URL_[Orig]<channel>``; in a table without any (DeepProfiler's index.csv) each
    column in which every value is the path of an image. Of those, where ``channels`` names none: not illumination functions, not
    outlines, not what CellProfiler wrote (it has no ``Channel_`` or ``Frame_`` column where others do); and where several are
    called ``Orig<channel>``, those alone.

    Args:
        channels: to take, in this order; None: all, in the table's order.
        path: the table, for messages.
        notes: what was left out is added here.

    Raises:
        CellfastError: no channels (lists the columns found), or not those asked for.
    """
    listed = _listed(table) or _paths(table)
    if not listed:
        raise CellfastError(
            f"{path}: no columns FileName_<channel> or URL_<channel>, nor columns of image paths; found {found_columns(table)}"
        )
    if channels is not None:
        return {name: listed[name] for name in chosen(channels, list(listed), "table's channels")}
    left: dict[str, list[str]] = {}
    rest = list(listed)

    def leave(why: str, names: list[str]) -> None:
        if names:
            left[why] = names
            rest[:] = [name for name in rest if name not in names]

    leave(
        f"illumination functions: {option('illumination')} divides by them",
        [n for n in rest if re.match(r"(?i)illum(?!ina)", n) or _function(table, listed[n])],
    )
    leave("outlines", [n for n in rest if "outline" in n.lower()])
    inputs = [n for n in rest if any(f"{p}_{n}" in table.columns for p in ("Channel", "Frame", "Image_Channel", "Image_Frame"))]
    leave("written by CellProfiler", [n for n in rest if inputs and n not in inputs])
    orig = [n for n in rest if _ORIG.match(n)]
    bases = [base_channel(n) for n in orig]
    leave("made from the Orig channels", [n for n in rest if n not in orig and (len(orig) > 1 or n in bases)])
    if not rest:
        found = "; ".join(f"{', '.join(names)} ({why})" for why, names in left.items())
        raise CellfastError(
            f"{path}: no channels among its columns of files: {found}; name those that are with {option('channels')}"
        )
    if left:
        out = "; ".join(f"{', '.join(names)} ({why})" for why, names in left.items())
        notes.append(f"taken as channels: {', '.join(rest)}; not: {out}")
    return {name: listed[name] for name in rest}


def illumination_columns(table: DataFrame, channels: Sequence[str]) -> dict[str, FileColumns]:
    """The columns that name each channel's illumination function: ``FileName_Illum<channel>``, for OrigDNA also
    ``FileName_IllumDNA``."""
    listed = {name.lower(): columns for name, columns in _listed(table).items()}
    found = {}
    for channel in channels:
        names = [f"illum{sign}{name}".lower() for name in (channel, base_channel(channel)) for sign in ("", "_")]
        match = next((listed[name] for name in names if name in listed), None)
        if match is not None:
            found[channel] = match
    return found


def base_channel(channel: str) -> str:
    """``DNA`` of ``OrigDNA``."""
    return _ORIG.sub("", channel, count=1) if _ORIG.match(channel) else channel


def _listed(table: DataFrame) -> dict[str, FileColumns]:
    """Everything the table names files of, in its order."""
    by_lower = {column.lower(): column for column in table.columns}

    def column(kind: str, name: str) -> str | None:
        return next((by_lower[c] for p in ("", "image_") if (c := f"{p}{kind}_{name}".lower()) in by_lower), None)

    listed: dict[str, FileColumns] = {}
    for one in table.columns:
        match = re.match(r"(?i)(?:image_)?filename_(.+)$", one)
        if match and match.group(1) not in listed:
            name = match.group(1)
            listed[name] = FileColumns(column("pathname", name), one, column("url", name))
    known = {name.lower() for name in listed} | {base_channel(name).lower() for name in listed}
    for one in table.columns:
        match = re.match(r"(?i)(?:image_)?url_(.+)$", one)
        if match and match.group(1).lower() not in known and (name := base_channel(match.group(1))).lower() not in known:
            listed.setdefault(name, FileColumns(url=one))
    return listed


def _paths(table: DataFrame) -> dict[str, FileColumns]:
    """Columns of image paths by their own names, as in DeepProfiler's index.csv."""
    found = {}
    for column in table.columns:
        values = table[column]
        first = next((str(value) for value in values if str(value).strip()), "")
        if first.strip().lower().endswith(IMAGE_SUFFIXES):
            texts = values.astype(str).str.strip().str.lower()
            if texts[texts != ""].str.endswith(IMAGE_SUFFIXES).all():
                found[column] = FileColumns(file=column)
    return found


def _function(table: DataFrame, columns: FileColumns) -> bool:
    first = next((str(value) for value in table[columns.file or columns.url] if str(value).strip()), "")
    return first.strip().lower().endswith(_FUNCTION_SUFFIXES)


def chosen(channels: Sequence[str] | None, known: list[str], where: str) -> list[str]:
    """The channels asked for, or all that are known; raises `CellfastError` for one that is not, or is named twice."""
    if channels is None:
        return known
    unknown = [name for name in channels if name not in known]
    if unknown or len(set(channels)) != len(channels):
        what = f"unknown channels {', '.join(unknown)}" if unknown else "a channel is named twice"
        raise CellfastError(f"{option('channels')}: {what}; the {where} have {', '.join(known)}")
    return list(channels)


def found_columns(table: DataFrame) -> str:
    """The first columns of a table, for a message."""
    columns = list(table.columns)
    return ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")


def image_root_of(image_root: str | os.PathLike[str]) -> Path | str:
    """The folder, or the URL of a remote folder or of a field store, that ``image_root`` names; raises `CellfastError` for
    none."""
    if is_url(image_root):
        fs, key = file_system(str(image_root).rstrip("/"))
        if not fs.isdir(key):
            raise CellfastError(f"{option('image_root', image_root)}: no such folder")
        return str(image_root).rstrip("/")
    root = Path(image_root)
    if root.is_file() and root.suffix.lower() in (".h5", ".hdf5"):
        url = store_url(root)
        file_system(url)
        return url
    if not root.is_dir():
        raise CellfastError(f"{option('image_root', root)}: no such folder, nor a field store (.h5)")
    return root


def files_under(root: Path | str) -> list[tuple[str, str]]:
    """(path relative to the root with ``/``, path or URL) of all files, sorted."""
    if isinstance(root, Path):
        return [(p.relative_to(root).as_posix(), str(p)) for p in sorted(root.rglob("*")) if p.is_file()]
    fs, key = file_system(root)
    names = [str(found)[len(key) :].lstrip("/") for found in fs.find(key)]
    return [(name, f"{root}/{name}") for name in sorted(names)]


def file_finder(root: Path | str) -> FileFinder | RemoteFinder:
    """Finds a table's files under a root of `image_root_of`."""
    return RemoteFinder(root) if isinstance(root, str) else FileFinder(root)


def _spellings(folder: str, name: str) -> list[tuple[list[str], str]]:
    """(names of the folders, name of the file) as they may be on a disk: as written, and with ``%20`` and its kin read as a
    URL's."""
    scheme = _SCHEME.match(folder) if is_url(folder) or folder.lower().startswith("file:") else None
    plain = folder[scheme.end() :] if scheme else folder
    both = [(plain, name), (unquote(plain), unquote(name))]
    if scheme and folder.lower().startswith("file:"):
        both.reverse()
    found = []
    for one, last in dict.fromkeys(both):
        # A posix path's double slash at the front would be a Windows share.
        parts = PureWindowsPath(re.sub(r"^/+", "/", one)).parts
        found.append(([p for part in parts for p in re.split(r"[\\/]+", part) if p], last))
    return found


def _under_plate(parts: list[str], plate: str) -> bool:
    """Whether files may lie in a folder of the plate's name that the table does not tell."""
    return bool(plate) and plate not in parts and plate not in (".", "..") and not re.search(r"[\\/\0]", plate)


class FileFinder:
    """Where a table's file lies: as given, or under the image root with more or less of the table's folders, a folder of the
    plate's name first."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._folders: dict[tuple[str, str], Path] = {}
        self._plates: dict[str, bool] = {}

    def find(self, folder: str, name: str, plate: str = "") -> str:
        """Absolute path; the most likely one where the file is nowhere."""
        if not name:
            return ""
        known = self._folders.get((folder, plate))
        for last in dict.fromkeys((name, unquote(name))):
            if known is not None and (known / last).is_file():
                return str(known / last)
        spellings = _spellings(folder, name)
        for parts, last in spellings:
            for place in self._places(folder, parts, plate):
                if (place / last).is_file():
                    self._folders[folder, plate] = place
                    return str(place / last)
        # Nowhere: it is expected beside the others.
        parts, last = spellings[0]
        return str((known or self.root.joinpath(*parts)) / last)

    def _places(self, folder: str, parts: list[str], plate: str) -> list[Path]:
        as_given = Path("/", *parts) if folder.lower().startswith("file:") else Path(folder)
        places = [as_given] if folder and as_given.is_absolute() else []
        if _under_plate(parts, plate):
            if plate not in self._plates:
                self._plates[plate] = (self.root / plate).is_dir()
            if self._plates[plate]:
                places += [self.root.joinpath(plate, *parts[k:]) for k in range(len(parts) + 1)]
        return places + [self.root.joinpath(*parts[k:]) for k in range(len(parts) + 1)]


class RemoteFinder:
    """As `FileFinder`, under a URL: the table's own URL first, then more or less of its folders under the root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._listed: dict[str, set[str]] = {}

    def find(self, folder: str, name: str, plate: str = "") -> str:
        """URL; the most likely one where the file is nowhere."""
        if not name:
            return ""
        spellings = _spellings(folder, name)
        own = is_url(folder) and not folder.lower().startswith("file:") and not self.root.startswith(f"{PROTOCOL}://")
        if own and name in self._names(folder):
            return f"{folder}/{name}"
        for parts, last in spellings:
            roots = [f"{self.root}/{plate}"] if _under_plate(parts, plate) and plate in self._names(self.root) else []
            for place in ("/".join([root, *parts[k:]]) for root in (*roots, self.root) for k in range(len(parts) + 1)):
                if last in self._names(place):
                    return f"{place}/{last}"
        parts, last = spellings[0]
        return f"{folder}/{name}" if own else "/".join([self.root, *parts, last])

    def _names(self, folder: str) -> set[str]:
        if folder not in self._listed:
            try:
                fs, key = file_system(folder)
                self._listed[folder] = {str(one).rstrip("/").rsplit("/", 1)[-1] for one in fs.ls(key, detail=False)}
            except (OSError, CellfastError):  # not there, not ours to read, or a protocol that is not installed
                self._listed[folder] = set()
        return self._listed[folder]


def check_files(fields: Sequence[Any], channel_names: Sequence[str]) -> None:
    """Raise `CellfastError` when one file is named for two channels of a field, or found for two fields.

    Two fields that name a file which is nowhere are left to whoever reads it.
    """
    folders: dict[str, str] = {}

    def real(file: str) -> str:
        folder, _, name = file.rpartition("/")
        if is_url(file):
            return file
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return f"{folders[folder]}/{name}"

    owner: dict[str, Any] = {}
    for field in fields:
        files = [real(file) if file else "" for file in field.files]
        named = [file for file in files if file]
        where = f"plate {field.plate}, well {field.well}, site {field.site}"
        if len(set(named)) < len(named):
            twice = next(file for file, count in Counter(named).items() if count > 1)
            names = [name for name, file in zip(channel_names, files) if file == twice]
            raise CellfastError(
                f"{where}: channels {' and '.join(names)} name the same file, {twice}; correct the image table, or choose other "
                f"channels with {option('channels')}"
            )
        for file in named:
            other = owner.setdefault(file, field)
            if other is not field and (is_url(file) or os.path.isfile(file)):
                raise CellfastError(
                    f"{where} and plate {other.plate}, well {other.well}, site {other.site} have one file, {file}; correct the "
                    f"image table, or give {option('image_root')} a folder in which each plate's files lie in a folder of their "
                    "own, as the table names it"
                )
