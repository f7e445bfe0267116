"""The cells of one field: planes read once, centroids located, crops cut out of them. Ingest and embedding both read fields with
it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cellfast.errors import CellfastError, option
from cellfast.screens.centroids import LocationError, Locations
from cellfast.screens.cutting import crop_origins, cut_crops, inside
from cellfast.screens.illumination import Illumination
from cellfast.screens.image_table import Field, ImageTable
from cellfast.screens.images import ImageError, read_plane
from cellfast.screens.ledger import PlateLedger
from cellfast.screens.locations import LocationSource


@dataclass
class FieldCells:
    """A field's planes and the cells that are cut out of it.

    Attributes:
        field: where the field was taken.
        planes: one [H, W] array per channel, corrected for illumination.
        crop_size: side S of a crop, px.
        border: what is done with crops that reach over the edge.
        object_number: int64 [n]; center_y, center_x: float32 [n], px; padded: bool [n], the crop reaches over the edge.
        located: cells that the locations list, those dropped included; dropped: cells dropped by reason.
        highest: highest pixel value as read.
        warnings: what is odd about the locations, for the ledger.
    """

    field: Field
    planes: list[np.ndarray]
    crop_size: int
    border: str
    object_number: np.ndarray
    center_y: np.ndarray
    center_x: np.ndarray
    padded: np.ndarray
    located: int
    dropped: dict[str, int]
    highest: int
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.object_number)

    def origins(self, size: int | None = None) -> np.ndarray:
        """First row and column, int64 [n, 2], of the crops, or of the window of ``size`` px at their centres."""
        return crop_origins(self.center_y, self.center_x, self.crop_size if size is None else size)

    def crops(self) -> np.ndarray:
        """The crops [n, C, S, S]."""
        return cut_crops(self.planes, self.origins(), self.crop_size, border=self.border)

    def count_in(self, ledger: PlateLedger) -> None:
        """Add the field and its cells to a ledger."""
        ledger.fields_written += 1
        ledger.cells_found += self.located
        for reason, count in self.dropped.items():
            ledger.drop_cells(reason, count)
        ledger.cells_written += len(self)
        ledger.cells_padded += int(self.padded.sum())
        ledger.warnings += [f"{self.field.well} site {self.field.site}: {text}" for text in self.warnings]


@dataclass(frozen=True)
class PlaneFacts:
    """What is checked of a field's planes, found where they lie.

    Attributes:
        constant: for each channel the one value of all its pixels, or None.
        same: pairs of channels that hold the same image.
        highest: highest pixel value.
    """

    constant: tuple[int | None, ...]
    same: tuple[tuple[int, int], ...]
    highest: int


@dataclass
class FieldPlanes:
    """The planes of one field, each file read and decoded once at most.

    ``planes`` by channel that are decoded already are taken as they are; ``facts`` are given where they lie on a device.
    """

    reader: FieldReader
    field: Field
    # Its attribute above would be meant by `field`.
    _planes: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    facts: PlaneFacts | None = None

    def __call__(self, channel: int) -> np.ndarray:
        """The plane [H, W] of a channel as it is in its file."""
        if channel not in self._planes:
            file = self.field.files[channel]
            if not file:
                raise ImageError(f"channel {self.reader.channel_names[channel]}: the image table names no file", "file missing")
            self._planes[channel] = read_plane(file, expect_shape=self.reader.shape, expect_dtype=np.dtype(self.reader.dtype))
        return self._planes[channel]


@dataclass(frozen=True)
class FieldReader:
    """Reads the fields of a screen; can be sent to other processes.

    Attributes:
        channel_names: channels in the order of the crops.
        locations: where the cells are.
        illumination: functions to divide the planes by; None: as read.
        crop_size: side of a crop, px.
        border: ``pad``, ``reflect`` or ``drop``.
        shape, dtype: size (H, W) and pixel type that all planes must have.
    """

    channel_names: tuple[str, ...]
    locations: LocationSource
    illumination: Illumination | None
    crop_size: int
    border: str
    shape: tuple[int, int]
    dtype: str

    def locate(self, field: Field, planes: FieldPlanes | None = None) -> Locations:
        """The cells of the field.

        Raises:
            LocationError: none can be had for this field (a broken table of one field does not stop the others).
            ImageError: a plane the cells are looked for in cannot be used.
        """
        try:
            return self.locations.locate(field, planes or FieldPlanes(self, field))
        except (ImageError, LocationError):
            raise
        except (CellfastError, OSError) as error:
            raise LocationError(str(error), "locations not usable") from error

    def read(self, field: Field, found: Locations, planes: FieldPlanes | None = None) -> FieldCells:
        """The field's planes and those of the cells ``found`` that are cut.

        Raises:
            ImageError: a plane is missing, unreadable, unlike the rest, constant, or the same as another channel's.
            LocationError: more than half of the centroids lie outside the field; the rest are then no better.
        """
        read = planes or FieldPlanes(self, field)
        images = [read(channel) for channel in range(len(self.channel_names))]
        facts = read.facts or _facts(images)
        self._check(facts)
        highest = facts.highest
        if self.illumination is not None:
            images = [self.illumination.correct(p, field.plate, name) for p, name in zip(images, self.channel_names)]
        height, width = self.shape
        y, x = found.y.astype(np.float64), found.x.astype(np.float64)
        # A centroid beyond the field is a mistake in the locations (another field's file, swapped axes), not a border cell.
        in_field = (np.rint(y) >= 0) & (np.rint(y) < height) & (np.rint(x) >= 0) & (np.rint(x) < width)
        if 2 * int((~in_field).sum()) > len(y):
            raise LocationError(
                f"{int((~in_field).sum())} of {len(y)} centroids lie outside the {height} × {width} px field: y from "
                f"{_reach(y)}, x from {_reach(x)} px. Centroids must be pixels of these very images: were they measured before "
                "binning or stitching, in µm, or with x and y exchanged?",
                "centroids outside the field",
            )
        whole = inside(crop_origins(y, x, self.crop_size), self.crop_size, height, width)
        keep = in_field & whole if self.border == "drop" else in_field
        dropped = dict(found.dropped)
        for reason, count in (
            ("centroid outside the field", int((~in_field).sum())),
            ("crop reaches over the field's edge", int((in_field & ~whole).sum()) if self.border == "drop" else 0),
        ):
            if count:
                dropped[reason] = dropped.get(reason, 0) + count
        return FieldCells(
            field=field,
            planes=images,
            crop_size=self.crop_size,
            border=self.border,
            object_number=found.object_number[keep],
            center_y=found.y[keep],
            center_x=found.x[keep],
            padded=~whole[keep],
            located=len(found.object_number) + sum(found.dropped.values()),
            dropped=dropped,
            highest=highest,
            warnings=found.warnings,
        )

    def _check(self, facts: PlaneFacts) -> None:
        for name, value in zip(self.channel_names, facts.constant):
            if value is not None:
                raise ImageError(f"channel {name} is constant: every pixel is {value}", "constant image")
        for i, j in facts.same:
            names = f"{self.channel_names[i]} and {self.channel_names[j]}"
            raise ImageError(
                f"channels {names} hold the same image; is one file listed or saved twice?", "same image in two channels"
            )


def _reach(centroids: np.ndarray) -> str:
    return f"{centroids.min():.1f} to {centroids.max():.1f}"


def _facts(planes: list[np.ndarray]) -> PlaneFacts:
    # One row that varies proves the plane is not constant; only a suspicious one is looked at wholly.
    constant = tuple(
        int(plane[0, 0]) if (plane[len(plane) // 2] == plane[0, 0]).all() and (plane == plane[0, 0]).all() else None
        for plane in planes
    )
    pairs = combinations(range(len(planes)), 2)
    same = tuple((i, j) for i, j in pairs if (planes[i][0] == planes[j][0]).all() and np.array_equal(planes[i], planes[j]))
    return PlaneFacts(constant, same, max(int(plane.max()) for plane in planes))


def count_refused(
    ledger: PlateLedger, field: Field, error: ImageError | LocationError, found: Locations | None, *, strict: bool
) -> None:
    """Add a field that cannot be used to a ledger: the field refused, the cells located in it dropped.

    Raises:
        CellfastError: ``strict``.
    """
    where = f"{field.well} site {field.site}"
    if strict:
        raise CellfastError(f"plate {field.plate}, {where}: {error} ({option('strict', True)} stops here)")
    ledger.refuse_field(error.reason, where, str(error))
    if found is not None:
        ledger.cells_found += len(found.object_number) + sum(found.dropped.values())
        for reason, count in found.dropped.items():
            ledger.drop_cells(reason, count)
        ledger.drop_cells(f"field refused: {error.reason}", len(found.object_number))


def fields_by_plate(table: ImageTable) -> dict[str, list[Field]]:
    """The fields of each plate, plates by name, fields by well (A01, A02, … B01, … AA01), site and image number.

    The order of the rows in the table plays no part: the same fields make the same rows, in ingest and in embedding.
    """
    plates: dict[str, list[Field]] = {}
    for one in table.fields:
        plates.setdefault(one.plate, []).append(one)
    return {plate: sorted(plates[plate], key=_place) for plate in sorted(plates)}


def _place(one: Field) -> tuple[int, str, int, int]:
    # Wells have two digits, so that only the length of the row's name keeps Z before AA.
    return len(one.well), one.well, one.site, one.image_number
