"""Where the cells of a field are: centroid tables, label masks, or a detector. Sources are sent to worker processes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.canonical import canonical_metadata
from cellfast.metadata.columns import IMAGE_NUMBER, PLATE, SITE, WELL, find_column, find_columns
from cellfast.metadata.paths import Place, centroid_place
from cellfast.metadata.tables import read_table
from cellfast.printable import masked
from cellfast.screens.centroids import LocationError, Locations
from cellfast.screens.detect import DEFAULT_DIAMETER_PX, detect_nuclei
from cellfast.screens.image_files import files_under
from cellfast.screens.image_table import MOST_NUMBER, Field, ImageTable
from cellfast.screens.label_masks import MaskLocations
from cellfast.storage.urls import exists, is_url, read_bytes

# CellProfiler's and DeepProfiler's names; CellProfiler counts pixel centres from 0.
CENTER_X = (
    "Location_Center_X",
    "Nuclei_Location_Center_X",
    "Cells_Location_Center_X",
    "AreaShape_Center_X",
    "Center_X",
    "Metadata_Center_X",
    "x",
)
CENTER_Y = (
    "Location_Center_Y",
    "Nuclei_Location_Center_Y",
    "Cells_Location_Center_Y",
    "AreaShape_Center_Y",
    "Center_Y",
    "Metadata_Center_Y",
    "y",
)
OBJECT = (
    "ObjectNumber",
    "Nuclei_ObjectNumber",
    "Metadata_ObjectNumber",
    "Nuclei_Number_Object_Number",
    "Number_Object_Number",
    "ObjectID",
)
IMAGE = ("ImageNumber", "Metadata_ImageNumber", "Image_ImageNumber")
FAR_PX = 1e9


class LocationSource(Protocol):
    """Anything that knows where the cells of a field are."""

    reads_images: bool

    @property
    def description(self) -> str:
        """What the source is; the ledger names it."""
        ...

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The cells of ``field``; ``planes(channel)`` reads a plane. Raises `LocationError` when the source has nothing for the
        field."""
        ...

    def file(self, field: Field) -> str | None:
        """The file of this one field's cells, whose change means that they are located anew; None: there is none, or one for all
        fields."""
        ...

    def unused(self, fields: Sequence[Field]) -> str | None:
        """What the source has for fields that are not among ``fields``, in words; None: nothing."""
        ...


def open_locations(
    spec: str,
    table: ImageTable,
    *,
    detect_channel: str | None = None,
    detect_options: dict[str, Any] | None = None,
    split_components: bool = False,
) -> LocationSource:
    """The source that ``spec`` names: ``detect``, a table, a folder of centroid CSVs, or a folder of label masks.

    ``split_components``: every connected component of a mask is a cell, whatever its label.

    Raises:
        CellfastError: no such file or folder, columns missing (lists those found), nothing usable in the folder.
    """
    source = _open(spec, table, detect_channel, detect_options or {}, split_components)
    if split_components and not isinstance(source, MaskLocations):
        raise CellfastError(
            f"{option('split_components')} is for label masks; {option('locations', spec)} are {source.description}"
        )
    return source


def _open(
    spec: str, table: ImageTable, detect_channel: str | None, detect_options: dict[str, Any], split_components: bool
) -> LocationSource:
    if spec == "detect":
        channel = detect_channel or table.channel_names[0]
        if channel not in table.channel_names:
            raise CellfastError(f"{option('detect_channel', channel)}: the channels are {', '.join(table.channel_names)}")
        return DetectedLocations(
            table.channel_names.index(channel), channel, detect_options.get("diameter_px", DEFAULT_DIAMETER_PX)
        )
    if is_url(spec):
        # Listing a bucket for masks would take longer than it is worth: a URL is a table, or a folder of centroid CSVs.
        return TableLocations.read(spec, table.fields) if exists(spec) else FolderLocations.index(spec.rstrip("/"), table.fields)
    path = Path(spec)
    if path.is_file():
        return TableLocations.read(path, table.fields)
    if not path.is_dir():
        raise CellfastError(
            f"{option('locations', spec)}: no such file or folder; expected a table, a folder of centroid CSVs or label masks, "
            "or 'detect'"
        )
    masks = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".tif", ".tiff", ".png"))
    if masks:
        return MaskLocations.index(path, masks, table.fields, split=split_components)
    if any(path.rglob("*.csv")) or any(path.rglob("*.csv.gz")):
        return FolderLocations.index(path, table.fields)
    if any(path.rglob("*_seg.npy")):
        raise CellfastError(
            f"{option('locations', spec)}: Cellpose's _seg.npy files need pickle, which can execute code, and are refused; "
            "save masks as TIFF or PNG instead (cellpose --save_tif or --save_png gives _cp_masks files)"
        )
    raise CellfastError(f"{option('locations', spec)}: neither centroid CSVs nor label masks (.tif, .png) in this folder")


def _locations_of(table: pd.DataFrame, what: str) -> Locations:
    """Centroids of a table's rows; those that are not numbers are dropped and counted."""
    x_column, y_column = find_column(table, CENTER_X), find_column(table, CENTER_Y)
    if x_column is None or y_column is None:
        columns = ", ".join(list(table.columns)[:10])
        raise CellfastError(f"{what}: no centroid columns (looked for {', '.join(CENTER_X[:3])} and their Y; found {columns})")
    x, y = (pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64) for column in (x_column, y_column))
    object_column = find_column(table, OBJECT)
    if object_column is None:
        number = np.arange(1, len(table) + 1)
    else:
        found = pd.to_numeric(table[object_column], errors="coerce").to_numpy(np.float64)
        number = np.where(np.abs(found) <= MOST_NUMBER, found, -1).astype(np.int64)  # NaN compares as False
    finite = np.isfinite(x) & np.isfinite(y)
    dropped = {"centroid is not a number": int((~finite).sum())} if not finite.all() else {}
    number, y, x = number[finite], y[finite], x[finite]
    repeated = pd.Series(number).duplicated().to_numpy() & (number >= 0)
    if repeated.any():
        dropped["object number listed twice"] = int(repeated.sum())
    # As far outside any field as a float32 tells.
    y, x = (np.clip(values[~repeated], -FAR_PX, FAR_PX).astype(np.float32) for values in (y, x))
    return Locations(number[~repeated].astype(np.int64), y, x, dropped)


def _check_numbers(numbers: pd.Series, table: pd.DataFrame, column: str | None, path: Path | str) -> None:
    values = numbers.to_numpy(np.float64)
    wrong = ~(np.abs(values) <= MOST_NUMBER) | (values != np.floor(values))
    if column is not None and wrong.any():
        row = int(np.argmax(wrong))
        found = str(table[column].iloc[row])[:80]
        raise CellfastError(f"{path}, row {row + 2}: expected a number in column {column}, got {found!r}")


def _file_digest(path: Path | str) -> str:
    content = hashlib.sha256()
    if is_url(path):
        content.update(read_bytes(str(path)))
        return content.hexdigest()[:16]
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            content.update(block)
    return content.hexdigest()[:16]


@dataclass
class TableLocations:
    """One table for many fields: CellProfiler's by ImageNumber, or any with plate, well and site columns."""

    description: str
    by_image: dict[tuple[Any, ...], Locations]
    by_place: dict[tuple[Any, ...], Locations]
    reads_images = False

    @classmethod
    def read(cls, path: Path | str, fields: Sequence[Field]) -> TableLocations:
        """Read the table and group it by field: by plate, well and site where it has all three, else by ImageNumber (with its
        plate where it has one), else by plate and well where a well has one field.

        Raises:
            CellfastError: no centroid columns, no key, a key that fits several fields, an image number that contradicts the well.
        """
        table = read_table(path, "a table of locations")
        found = find_columns(list(table.columns), where=str(path))
        known = canonical_metadata(table[list(dict.fromkeys(found.values()))], found, str(path))
        description = f"table {masked(str(path)).rsplit('/', 1)[-1]}, sha256 {_file_digest(path)}"
        by_place = {PLATE, WELL, SITE} <= set(known)
        images = None
        if IMAGE_NUMBER in known and (known[IMAGE_NUMBER] != "").any():
            numbers = pd.to_numeric(known[IMAGE_NUMBER].astype(object), errors="coerce")
            # By place an image number is only compared, and may be missing.
            if not by_place:
                _check_numbers(numbers, table, found[IMAGE_NUMBER], path)
            images = numbers.fillna(-1).astype(np.int64)
        if by_place:
            sites = pd.to_numeric(known[SITE].str.extract(r"(\d+)")[0].astype(object), errors="coerce")
            _check_numbers(sites, table, found[SITE], path)
            keys: list[tuple[Any, ...]] = list(zip(known[PLATE], known[WELL], sites.astype(np.int64)))
            _check_images(keys, images, fields, path)
            return cls(description, {}, _grouped(table, keys, path))
        if images is not None and (any(f.image_number >= 0 for f in fields) or not {PLATE, WELL} <= set(known)):
            plates = known[PLATE].to_list() if PLATE in known else [""] * len(table)
            if PLATE not in known:
                _check_one_plate(fields, path)
            return cls(description, _grouped(table, list(zip(plates, images)), path), {})
        if {PLATE, WELL} <= set(known):
            several = [w for w, n in Counter((f.plate, f.well) for f in fields).items() if n > 1]
            if several:
                raise CellfastError(
                    f"{path}: it has no column with the site, and plate {several[0][0]}, well {several[0][1]} has several "
                    "fields: add that column, or ImageNumber to both tables"
                )
            site_of = {(f.plate, f.well): f.site for f in fields}
            keys = [(p, w, site_of.get((p, w), 1)) for p, w in zip(known[PLATE], known[WELL])]
            return cls(description, {}, _grouped(table, keys, path))
        shown = ", ".join(list(table.columns)[:10])
        raise CellfastError(f"{path}: needs ImageNumber, or plate and well columns, to tell the fields apart; found {shown}")
        raise CellfastError(
            f"{path}: it goes by ImageNumber, and the image table has none; add that column, or plate, well and site here"
        )

    def _find(self, field: Field) -> Locations | None:
        if self.by_place:
            return self.by_place.get((field.plate, field.well, field.site))
        return self.by_image.get((field.plate, field.image_number)) or self.by_image.get(("", field.image_number))

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The field's rows, by plate, well and site, or by image number."""
        found = self._find(field)
        if found is None:
            key = (
                f"plate {field.plate}, well {field.well}, site {field.site}"
                if self.by_place
                else f"ImageNumber {field.image_number}"
            )
            if not self.by_place and field.image_number < 0:
                key = "this field: it goes by ImageNumber, and the image table has none; add that column"
            raise LocationError(f"the table of locations has no rows for {key}", "no locations")
        return found

    def file(self, field: Field) -> str | None:
        """None: the description has the table's digest."""
        return None

    def unused(self, fields: Sequence[Field]) -> str | None:
        """Rows of fields the image table does not list."""
        left: dict[tuple[Any, ...], Locations] = {**self.by_place, **self.by_image}
        for field in fields:
            for key in ((field.plate, field.well, field.site), (field.plate, field.image_number), ("", field.image_number)):
                left.pop(key, None)
        rows = sum(len(found.y) + sum(found.dropped.values()) for found in left.values())
        if not rows:
            return None
        first = next(iter(left))
        where = f"plate {first[0]}, well {first[1]}, site {first[2]}" if len(first) == 3 else f"ImageNumber {first[1]}"
        return (
            f"{rows:,} rows of the table of locations are of {len(left):,} fields the image table does not list, such as {where}"
        )


def _grouped(table: pd.DataFrame, keys: list[Any], path: Path | str) -> dict[tuple[Any, ...], Locations]:
    codes, unique = pd.factorize(pd.Series(keys, dtype=object))
    groups = {key: _locations_of(table.iloc[rows], str(path)) for key, rows in zip(unique, _rows_of(codes, len(unique)))}
    return {tuple(key[:-1]) + (int(key[-1]),): found for key, found in groups.items()}


def _rows_of(codes: np.ndarray, groups: int) -> list[np.ndarray]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(1, groups)))


def _check_images(keys: Sequence[tuple[Any, ...]], images: pd.Series | None, fields: Sequence[Field], path: Path | str) -> None:
    """Refuse rows whose image number is that of another field than their plate, well and site.

    Raises:
        CellfastError: names the first such row.
    """
    if images is None:
        return
    of_field = {(f.plate, f.well, f.site): f.image_number for f in fields}
    for (key, image), row in {(k, int(i)): n for n, (k, i) in reversed(list(enumerate(zip(keys, images))))}.items():
        expected = of_field.get(key, -1)
        if expected >= 0 and image >= 0 and image != expected:
            raise CellfastError(
                f"{path}, row {row + 2}: ImageNumber {image} contradicts plate {key[0]}, well {key[1]}, site {key[2]}, which is "
                f"image {expected} of the image table; correct one, or remove the column ImageNumber from one of the tables"
            )


def _check_one_plate(fields: Sequence[Field], path: Path | str) -> None:
    plates: dict[int, str] = {}
    for field in fields:
        if field.image_number >= 0 and plates.setdefault(field.image_number, field.plate) != field.plate:
            raise CellfastError(
                f"{path}: it goes by ImageNumber, and image {field.image_number} is on plates {plates[field.image_number]} and "
                f"{field.plate}: add a column with the plate, or plate, well and site"
            )


@dataclass
class FolderLocations:
    """A CSV per field: DeepProfiler's ``<plate>/<well>-<site>-Nuclei.csv``, CellProfiler's ``<plate>-<well>-<site>/Nuclei.csv``
    and their kin, as `cellfast.metadata.paths.centroid_place` tells them.
    """

    folder: Path | str
    files: dict[Place, str] = dataclasses.field(default_factory=dict)
    problems: dict[Place, str] = dataclasses.field(default_factory=dict)
    left: list[str] = dataclasses.field(default_factory=list)
    reads_images = False

    @property
    def description(self) -> str:
        return f"centroid CSVs in {masked(str(self.folder)).rsplit('/', 1)[-1]}"

    @classmethod
    def index(cls, folder: Path | str, fields: Sequence[Field]) -> FolderLocations:
        """Find each field's file in a folder or under a URL."""
        source = cls(folder)
        wanted = {(f.plate, f.well, f.site) for f in fields}
        plates = {f.plate for f in fields}
        name = folder.absolute().name if isinstance(folder, Path) else folder.rsplit("/", 1)[-1]
        ranks: dict[Place, int] = {}
        for relative, file in files_under(folder):
            if not relative.lower().endswith((".csv", ".csv.gz")):
                continue
            found = centroid_place(f"{name}/{relative}", plates)
            if found is None or found[0] not in wanted:
                # Tables of other things lie beside CellProfiler's Nuclei.csv.
                if found is not None or centroid_place(f"{name}/{relative.rpartition('/')[0]}/Nuclei.csv", plates) is None:
                    source.left.append(relative)
                continue
            place, rank = found
            if place in source.files and rank == ranks[place]:
                source.problems[place] = (
                    f"two centroid files of plate {place[0]}, well {place[1]}, site {place[2]}: {source.files[place]} and {file}"
                )
            if rank < ranks.get(place, 99):
                source.files[place], ranks[place] = file, rank
                source.problems.pop(place, None)
        return source

    def file(self, field: Field) -> str | None:
        """The field's file, if there is one."""
        return self.files.get((field.plate, field.well, field.site))

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The rows of the field's file."""
        if (problem := self.problems.get((field.plate, field.well, field.site))) is not None:
            raise LocationError(problem, "several centroid files")
        # A file may have come since the folder was listed.
        path = self.file(field) or f"{self.folder}/{field.plate}/{field.well}-{field.site}-Nuclei.csv"
        if not exists(path):
            raise LocationError(f"{path}: no such file", "no locations")
        table = read_table(path, "a centroid CSV")
        image = find_column(table, IMAGE)
        if image is not None and (images := table[image].nunique()) > 1:
            raise LocationError(
                f"{path}: expected the cells of one field, got those of {images} ({image})", "locations not usable"
            )
        return _locations_of(table, str(path))

    def unused(self, fields: Sequence[Field]) -> str | None:
        """Files of fields the image table does not list."""
        if not self.left:
            return None
        return f"{len(self.left):,} centroid CSVs are of no field of the image table, such as {self.left[0]}"


@dataclass
class DetectedLocations:
    """Nuclei found by `cellfast.screens.detect`."""

    channel: int
    channel_name: str
    diameter_px: float
    reads_images = True

    @property
    def description(self) -> str:
        return f"nuclei detected in {self.channel_name}, diameter {self.diameter_px:g} px"

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The nuclei of the field, numbered from 1 in the order of their rows."""
        y, x, dropped = detect_nuclei(planes(self.channel), diameter_px=self.diameter_px)
        return Locations(
            np.arange(1, len(y) + 1, dtype=np.int64), y, x, {f"detected object {name}": n for name, n in dropped.items()}
        )

    def file(self, field: Field) -> str | None:
        """None: the description says all."""
        return None

    def unused(self, fields: Sequence[Field]) -> str | None:
        """Nothing."""
        return None
