"""Cells from label masks, as Cellpose and CellProfiler write them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellfast.errors import CellfastError, option
from cellfast.metadata.paths import Place, like_a_plate, plate_of_path
from cellfast.screens.centroids import LocationError, Locations
from cellfast.screens.detect import centroids_of_labels
from cellfast.screens.image_table import Field
from cellfast.screens.images import ImageError, read_stack

SUFFIXES = ("_cp_masks", "_masks", "_mask", "_labels", "_label", "_nuclei", "_Nuclei", "_cells", "_Cells", "")


@dataclass
class MaskLocations:
    """Label masks, 0 the background: Cellpose's ``<image>_cp_masks``, or files named as or after one of the field's images.

    A mask in a folder of a plate's name is of that plate; a mask is of one field.
    """

    folder: Path
    split: bool = False
    masks: dict[Place, str] = field(default_factory=dict)
    problems: dict[Place, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    reads_images = False

    @property
    def description(self) -> str:
        return f"label masks in {self.folder.name}" + (", each connected component a cell" if self.split else "")

    @classmethod
    def index(cls, folder: Path, files: Sequence[Path], fields: Sequence[Field], *, split: bool = False) -> MaskLocations:
        """Find each field's mask.

        Args:
            split: every connected component is a cell of its own, whatever its label.

        Raises:
            CellfastError: one mask for several fields.
        """
        source = cls(folder.absolute(), split)
        search = _Search(source.folder, files, fields)
        taken: dict[str, list[Field]] = {}
        for one in fields:
            found = search.masks_of(one)
            if len(found) == 1:
                taken.setdefault(found[0], []).append(one)
            elif found:
                source.problems[_place(one)] = (
                    f"two masks of one name, {found[0]} and {found[1]}: put each plate's masks into a folder of the plate's name "
                    f"({one.plate})"
                )
        for mask, sharing in taken.items():
            # masks/A01/s1.png is of the image A01/s1.tif and not of B01/s1.tif.
            owners = [one for one in sharing if search.agrees(mask, one)] if len(sharing) > 1 else sharing
            if len(owners) != 1:
                names = " and ".join(f"plate {f.plate}, well {f.well}, site {f.site}" for f in sharing[:2])
                raise CellfastError(
                    f"{mask}: one mask for {len(sharing)} fields, {names}, whose images have one name; put each plate's masks "
                    f"into a folder of the plate's name, such as {source.folder.name}/{sharing[0].plate}/{Path(mask).name}"
                )
            source.masks[_place(owners[0])] = mask
        source.left = sorted(search.files - {os.path.realpath(mask) for mask in source.masks.values()})
        return source

    def file(self, field: Field) -> str | None:
        """The field's mask, if there is one."""
        return self.masks.get(_place(field))

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """Mean pixel of each label; the label is the object number."""
        if (problem := self.problems.get(_place(field))) is not None:
            raise LocationError(problem, "several masks")
        path = self.file(field)
        if path is None:
            stem = Path(next((f for f in field.files if f), "")).stem
            raise LocationError(f"no mask named {stem}_cp_masks or after another channel of the field", "no locations")
        return self._read(path, planes)

    def unused(self, fields: Sequence[Field]) -> str | None:
        """Masks that belong to no field of the image table; images of the table's that lie in the same folder are none."""
        if not self.left:
            return None
        first = Path(self.left[0]).name
        return f"{len(self.left):,} images in the folder of masks are of no field of the image table, such as {first}"

    def _read(self, path: str, planes: Callable[[int], np.ndarray]) -> Locations:
        shape = planes(0).shape
        try:
            labels = read_stack(path, expect_shape=shape)
        except ImageError as error:
            reasons = {"wrong size": "mask of another size", "colour image": "mask is not a label image"}
            raise LocationError(f"label mask {error}", reasons.get(error.reason, "mask not readable")) from error
        if (
            labels.ndim != 2
            or labels.dtype.kind not in "uifb"
            or (labels.dtype.kind == "f" and (labels != np.floor(labels)).any())
        ):
            raise LocationError(
                f"{path}: expected a label image [H, W] of whole numbers, got {labels.dtype} {list(labels.shape)}",
                "mask is not a label image",
            )
        if labels.dtype.kind in "if" and (labels < 0).any():
            raise LocationError(
                f"{path}: labels are numbers from 1, 0 the background; this mask has {labels.min():g}",
                "mask is not a label image",
            )
        return _cells_of(labels.astype(np.int64), path, split=self.split)


def _cells_of(labels: np.ndarray, path: str, *, split: bool) -> Locations:
    from skimage.measure import label

    pieces, count = label(labels, connectivity=2, return_num=True)
    of_piece = np.zeros(count + 1, np.int64)
    of_piece[pieces.ravel()] = labels.ravel()
    number, first, found = np.unique(of_piece[1:], return_index=True, return_counts=True)
    _, y, x, area = centroids_of_labels(pieces)
    if split:
        return Locations(np.arange(1, count + 1, dtype=np.int64), y, x)
    if len(number) == count:
        y, x, area = y[first], x[first], area[first]
    else:
        piece_area = area
        number, y, x, area = centroids_of_labels(labels)
        _check_objects(labels, path, number, of_piece[1:], piece_area)
    # An image's grey values taken for labels are thousands of specks strewn over the field.
    if len(area) > 100 and np.median(area) < 4 and len(area) > labels.size / 200:
        raise LocationError(
            f"{path}: {len(area):,} labels of {np.median(area):g} px: an image, not a label mask", "mask is not a label image"
        )
    torn = number[found > 1]
    if not len(torn):
        return Locations(number, y, x)
    named = ", ".join(map(str, torn[:5])) + (f" and {len(torn) - 5} more" if len(torn) > 5 else "")
    return Locations(
        number, y, x, warnings=(f"{len(torn)} of {len(number)} labels lie in several pieces: {named} ({Path(path).name})",)
    )


def _check_objects(labels: np.ndarray, path: str, number: np.ndarray, of_piece: np.ndarray, area: np.ndarray) -> None:
    """Refuse masks whose labels are no objects: binary ones, and those of classes such as nucleus, border and background."""
    hint = f"{option('split_components', True)} makes each connected piece a cell; or save the mask with a label for each cell"
    if len(number) == 1:
        raise LocationError(
            f"{path}: a binary mask: all its labelled pixels are {number[0]}, in {len(of_piece)} pieces; {hint}", "binary mask"
        )
    largest, second = np.zeros(len(number)), np.zeros(len(number))
    for position, size in zip(np.searchsorted(number, of_piece), area):
        second[position] = max(second[position], min(largest[position], size))
        largest[position] = max(largest[position], size)
    in_pieces = int((second >= largest / 10).sum())  # specks beside a cell are no second cell
    if in_pieces * 2 > len(number) or (len(number) <= 3 and (labels != 0).all()):
        raise LocationError(
            f"{path}: {in_pieces} of its {len(number)} labels lie in several pieces of like size: classes of pixels, not cells; "
            f"{hint}",
            "mask is not a label image",
        )


def _place(field: Field) -> Place:
    return field.plate, field.well, field.site


class _Search:
    """Masks by the stems of their names, each with the plate that its folders tell."""

    def __init__(self, folder: Path, files: Sequence[Path], fields: Sequence[Field]) -> None:
        self.folder = folder
        self._real: dict[str, str] = {}
        plates = {one.plate for one in fields}
        images = {self._realpath(image) for one in fields for image in one.files if image}
        # The folder that was given, or one above it, may be a plate's.
        above = next((name for name in reversed(folder.parts) if name in plates and not name.isdigit()), None)
        self.files: set[str] = set()
        self._by_stem: dict[str, list[tuple[str, str | None]]] = {}
        for file in files:
            path = str(file.absolute())
            if (real := self._realpath(path)) in images:
                continue  # masks may lie beside the images: an image is no mask
            self.files.add(real)
            folders = self._folders(path)
            plate = plate_of_path(folders, plates) or above
            if plate is None:
                plate = next((name for name in (folder.name, *folders) if like_a_plate(name, plates)), None)
            self._by_stem.setdefault(file.stem, []).append((path, plate))

    def _realpath(self, path: str) -> str:
        # Of the folder alone: asking for each file of a screen takes minutes on a network disk.
        folder, _, name = path.rpartition("/")
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return f"{self._real[folder]}/{name}"

    def _folders(self, mask: str) -> tuple[str, ...]:
        return Path(mask).relative_to(self.folder).parts[:-1]

    def masks_of(self, field: Field) -> list[str]:
        """The field's mask; several where none of them is more its own than another."""
        for suffix in SUFFIXES:
            for image in filter(None, field.files):
                listed = self._by_stem.get(Path(image).stem + suffix, ())
                found = [mask for mask, plate in listed if plate == field.plate] or [
                    mask for mask, plate in listed if plate is None
                ]
                if len(found) > 1:
                    beside = [mask for mask in found if Path(mask).parent == Path(image).absolute().parent]
                    found = beside or [mask for mask in found if self.agrees(mask, field)] or found
                if found:
                    return found
        return []

    def agrees(self, mask: str, field: Field) -> bool:
        """Whether the mask lies in the folders that one of the field's images lies in."""
        folders = self._folders(mask)
        return bool(folders) and any(
            tuple(image.replace("\\", "/").split("/")[:-1])[-len(folders) :] == folders for image in field.files if image
        )
