"""Where the cells of a field are: centroid tables, label masks, or a detector. Sources are sent to worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.screens.detect import DEFAULT_DIAMETER_PX, centroids_of_labels, detect_nuclei
from cellfast.screens.image_table import COLUMN, PLATE, ROW, SITE, WELL, Field, ImageTable, find_column, read_table
from cellfast.screens.remote import exists, is_url, read_bytes
from cellfast.screens.wells import normalise_well

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


class LocationError(CellfastError):
    """A field without usable locations; ``reason`` is what the ledger counts it under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.reason)


@dataclass(frozen=True)
class Locations:
    """The cells of one field: object_number int64 [n], centroid y and x float32 [n] (px, 0-based pixel centres); dropped rows by reason."""

    object_number: np.ndarray
    y: np.ndarray
    x: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)


class LocationSource(Protocol):
    """Anything that knows where the cells of a field are; ``description`` identifies it in the ledger."""

    description: str

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The cells of ``field``; ``planes(channel)`` reads a plane. Raises `LocationError` when the source has nothing for the field."""
        ...


def open_locations(
    spec: str, table: ImageTable, *, detect_channel: str | None = None, detect_options: dict[str, Any] | None = None
) -> LocationSource:
    """The source that ``spec`` names: ``detect``, a table, a folder of centroid CSVs, or a folder of label masks.

    Raises:
        CellfastError: no such file or folder, columns missing (lists those found), nothing usable in the folder.
    """
    if spec == "detect":
        channel = detect_channel or table.channel_names[0]
        if channel not in table.channel_names:
            raise CellfastError(f"--detect-channel {channel}: the channels are {', '.join(table.channel_names)}")
        return DetectedLocations(
            table.channel_names.index(channel), channel, (detect_options or {}).get("diameter_px", DEFAULT_DIAMETER_PX)
        )
    if is_url(spec):
        # Listing a bucket for masks would take longer than it is worth: a URL is a table, or a folder of centroid CSVs.
        return TableLocations.read(spec) if exists(spec) else FolderLocations(spec.rstrip("/"))
    path = Path(spec)
    if path.is_file():
        return TableLocations.read(path)
    if not path.is_dir():
        raise CellfastError(
            f"--locations {spec}: no such file or folder; expected a table, a folder of centroid CSVs or label masks, or 'detect'"
        )
    masks = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".tif", ".tiff", ".png"))
    if masks:
        return MaskLocations.index(path, masks)
    if any(path.rglob("*.csv")) or any(path.rglob("*.csv.gz")):
        return FolderLocations(path)
    if any(path.rglob("*_seg.npy")):
        raise CellfastError(
            f"--locations {spec}: Cellpose's _seg.npy files need pickle, which can execute code, and are refused; "
            "save masks as TIFF or PNG instead (cellpose --save_tif or --save_png gives _cp_masks files)"
        )
    raise CellfastError(f"--locations {spec}: neither centroid CSVs nor label masks (.tif, .png) in this folder")


def _locations_of(table: pd.DataFrame, what: str) -> Locations:
    """Centroids of a table's rows; those that are not numbers are dropped and counted."""
    x_column, y_column = find_column(table, CENTER_X), find_column(table, CENTER_Y)
    if x_column is None or y_column is None:
        columns = ", ".join(list(table.columns)[:10])
        raise CellfastError(f"{what}: no centroid columns (looked for {', '.join(CENTER_X[:3])} and their Y; found {columns})")
    x = pd.to_numeric(table[x_column], errors="coerce").to_numpy(np.float64)
    y = pd.to_numeric(table[y_column], errors="coerce").to_numpy(np.float64)
    object_column = find_column(table, OBJECT)
    if object_column is None:
        number = np.arange(1, len(table) + 1)
    else:
        number = pd.to_numeric(table[object_column], errors="coerce").fillna(-1).to_numpy(np.int64)
    finite = np.isfinite(x) & np.isfinite(y)
    dropped = {"centroid is not a number": int((~finite).sum())} if not finite.all() else {}
    number, y, x = number[finite], y[finite], x[finite]
    repeated = pd.Series(number).duplicated().to_numpy() & (number >= 0)
    if repeated.any():
        dropped["object number listed twice"] = int(repeated.sum())
    return Locations(
        number[~repeated].astype(np.int64), y[~repeated].astype(np.float32), x[~repeated].astype(np.float32), dropped
    )


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
    by_image: dict[int, Locations]
    by_place: dict[tuple[str, str, int], Locations]

    @classmethod
    def read(cls, path: Path | str) -> TableLocations:
        """Read the table and group it by field.

        Raises:
            CellfastError: no centroid columns, or neither an image number nor plate, well and site.
        """
        table = read_table(path, "a table of locations")
        plate, well, site, image = (find_column(table, names) for names in (PLATE, WELL, SITE, IMAGE))
        row, column = find_column(table, ROW), find_column(table, COLUMN)
        description = f"table {str(path).rsplit('/', 1)[-1]}, sha256 {_file_digest(path)}"
        if well is None and row and column:
            table["Metadata_Well"] = table[row].astype(str) + table[column].astype(str)
            well = "Metadata_Well"
        if plate and well:
            by_place: dict[tuple[str, str, int], Locations] = {}
            keys = [table[plate].astype(str).str.strip(), table[well].astype(str)]
            sites = (
                pd.to_numeric(table[site].astype(str).str.extract(r"(\d+)")[0], errors="coerce").fillna(1)
                if site
                else pd.Series(1, index=table.index)
            )
            for (p, w, s), rows in table.groupby([*keys, sites.astype(int)], sort=False):
                by_place[str(p), normalise_well(str(w)), int(s)] = _locations_of(rows, str(path))
            return cls(description, {}, by_place)
        if image is None:
            found = ", ".join(list(table.columns)[:10])
            raise CellfastError(f"{path}: needs ImageNumber, or plate and well columns, to tell the fields apart; found {found}")
        numbers = pd.to_numeric(table[image], errors="coerce")
        return cls(description, {int(n): _locations_of(rows, str(path)) for n, rows in table.groupby(numbers, sort=False)}, {})

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The field's rows, by plate, well and site, or by image number."""
        found = self.by_place.get((field.plate, field.well, field.site)) or self.by_image.get(field.image_number)
        if found is None:
            key = (
                f"plate {field.plate}, well {field.well}, site {field.site}"
                if self.by_place
                else f"ImageNumber {field.image_number}"
            )
            raise LocationError(f"the table of locations has no rows for {key}", "no locations")
        return found


@dataclass
class FolderLocations:
    """DeepProfiler's layout: ``<plate>/<well>-<site>-Nuclei.csv``."""

    folder: Path | str

    @property
    def description(self) -> str:
        return f"centroid CSVs in {str(self.folder).rsplit('/', 1)[-1]}"

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The rows of the field's file."""
        wells = dict.fromkeys(
            [
                field.well,
                f"{field.well.rstrip('0123456789')}{int(field.well.lstrip('ABCDEFGHIJKLMNOPQRSTUVWXYZ'))}",
                field.well.lower(),
            ]
        )
        names = [f"{well}-{field.site}-Nuclei.csv" for well in wells] + [f"{well}-{field.site}.csv" for well in wells]
        for name in names:
            path = f"{self.folder}/{field.plate}/{name}"
            if exists(path):
                return _locations_of(read_table(path, "a centroid CSV"), path)
        raise LocationError(f"{self.folder}/{field.plate}/{names[0]}: no such file", "no locations")


@dataclass
class MaskLocations:
    """Label masks, 0 the background: Cellpose's ``<image>_cp_masks``, or files named as or after one of the field's images."""

    description: str
    by_stem: dict[str, str]

    _SUFFIXES = ("_cp_masks", "_masks", "_mask", "_labels", "_label", "_nuclei", "_Nuclei", "_cells", "_Cells", "")

    @classmethod
    def index(cls, folder: Path, files: list[Path]) -> MaskLocations:
        """Remember each mask under its file's stem."""
        by_stem: dict[str, str] = {}
        for file in files:
            if file.stem in by_stem:
                raise CellfastError(
                    f"two masks of one name: {by_stem[file.stem]} and {file}; give a folder with one mask per field"
                )
            by_stem[file.stem] = str(file)
        return cls(f"label masks in {folder.name}", by_stem)

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """Mean pixel of each label; the label is the object number."""
        for suffix in self._SUFFIXES:
            for image in field.files:
                stem = Path(image).stem + suffix
                if image and stem in self.by_stem and self.by_stem[stem] != image:
                    return self._read(Path(self.by_stem[stem]), planes)
        stem = Path(next((f for f in field.files if f), "")).stem
        raise LocationError(f"no mask named {stem}_cp_masks or after another channel of the field", "no locations")

    def _read(self, path: Path, planes: Callable[[int], np.ndarray]) -> Locations:
        try:
            if path.suffix.lower() == ".png":
                from PIL import Image

                with Image.open(path) as image:
                    labels = np.asarray(image)
            else:
                import tifffile

                labels = tifffile.imread(path)
        except Exception as error:
            raise LocationError(
                f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]})", "mask not readable"
            ) from error
        if (
            labels.ndim != 2
            or (labels.dtype.kind == "f" and not (labels == np.floor(labels)).all())
            or labels.dtype.kind not in "uif"
        ):
            raise LocationError(
                f"{path}: expected a label image [H, W] of whole numbers, got {labels.dtype} {labels.shape}",
                "mask is not a label image",
            )
        shape = planes(0).shape
        if labels.shape != shape:
            raise LocationError(
                f"{path}: the mask is {labels.shape[0]} × {labels.shape[1]} px, the image {shape[0]} × {shape[1]}",
                "mask of another size",
            )
        number, y, x, _ = centroids_of_labels(labels.astype(np.int64))
        return Locations(number, y, x)


@dataclass
class DetectedLocations:
    """Nuclei found by `cellfast.screens.detect`."""

    channel: int
    channel_name: str
    diameter_px: float

    @property
    def description(self) -> str:
        return f"nuclei detected in {self.channel_name}, diameter {self.diameter_px:g} px"

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """The nuclei of the field, numbered from 1 in the order of their rows."""
        y, x, dropped = detect_nuclei(planes(self.channel), diameter_px=self.diameter_px)
        return Locations(
            np.arange(1, len(y) + 1, dtype=np.int64), y, x, {f"detected object {name}": n for name, n in dropped.items()}
        )
