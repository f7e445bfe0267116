"""Cells from label masks, as Cellpose and CellProfiler write them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellfast.screens.centroids import LocationError, Locations, files_version
from cellfast.screens.detect import centroids_of_labels
from cellfast.screens.image_table import Field
from cellfast.screens.images import ImageError, read_stack


@dataclass
class MaskLocations:
    """Label masks, 0 the background: Cellpose's ``<image>_cp_masks``, or files named as or after one of the field's images."""

    description: str
    folder: Path
    by_stem: dict[str, list[str]]
    reads_images = False

    _SUFFIXES = ("_cp_masks", "_masks", "_mask", "_labels", "_label", "_nuclei", "_Nuclei", "_cells", "_Cells", "")

    @classmethod
    def index(cls, folder: Path, files: list[Path]) -> MaskLocations:
        """Remember each mask under its file's stem."""
        by_stem: dict[str, list[str]] = {}
        for file in files:
            by_stem.setdefault(file.stem, []).append(str(file.absolute()))
        return cls(f"label masks in {folder.name}", folder.absolute(), by_stem)

    def _file(self, field: Field) -> Path | None:
        own = {os.path.realpath(image) for image in field.files if image}
        for suffix in self._SUFFIXES:
            for image in field.files:
                # Masks may lie beside the images: an image of the field is no mask of it.
                found = [f for f in self.by_stem.get(Path(image).stem + suffix, ()) if image and os.path.realpath(f) not in own]
                if len(found) > 1:
                    # Plates name their files alike: the mask's folder tells the plate, or is the image's.
                    of_plate = [f for f in found if field.plate in Path(f).relative_to(self.folder).parts[:-1]]
                    beside = [f for f in found if Path(f).parent == Path(image).absolute().parent]
                    found = of_plate if len(of_plate) == 1 else beside
                    if len(found) != 1:
                        names = " and ".join(self.by_stem[Path(image).stem + suffix][:2])
                        raise LocationError(
                            f"two masks of one name, {names}: put each plate's masks into a folder of the plate's name ({field.plate})",
                            "several masks",
                        )
                if found:
                    return Path(found[0])
        return None

    def locate(self, field: Field, planes: Callable[[int], np.ndarray]) -> Locations:
        """Mean pixel of each label; the label is the object number."""
        path = self._file(field)
        if path is None:
            stem = Path(next((f for f in field.files if f), "")).stem
            raise LocationError(f"no mask named {stem}_cp_masks or after another channel of the field", "no locations")
        return self._read(path, planes)

    def _known_files(self, fields: Sequence[Field]) -> list[Path]:
        files = []
        for field in fields:
            try:
                path = self._file(field)
            except LocationError:
                continue  # told by `locate`
            if path is not None:
                files.append(path)
        return files

    def version(self, fields: Sequence[Field]) -> str:
        """The names and sizes of the fields' masks."""
        return files_version(self._known_files(fields), self.folder)

    def unused(self, fields: Sequence[Field]) -> str | None:
        """Masks that belong to no field of the image table; images of the table's that lie in the same folder are none."""
        images = {os.path.realpath(image) for field in fields for image in field.files if image}
        files = {os.path.realpath(f) for found in self.by_stem.values() for f in found}
        left = sorted(files - images - {os.path.realpath(p) for p in self._known_files(fields)})
        if not left:
            return None
        return f"{len(left):,} images in the folder of masks are of no field of the image table, such as {Path(left[0]).name}"

    def _read(self, path: Path, planes: Callable[[int], np.ndarray]) -> Locations:
        shape = planes(0).shape
        try:
            labels = read_stack(path, expect_shape=shape)
        except ImageError as error:
            reasons = {"wrong size": "mask of another size", "colour image": "mask is not a label image"}
            raise LocationError(f"label mask {error}", reasons.get(error.reason, "mask not readable")) from error
        if (
            labels.ndim != 2
            or (labels.dtype.kind == "f" and not (labels == np.floor(labels)).all())
            or labels.dtype.kind not in "uifb"
        ):
            raise LocationError(
                f"{path}: expected a label image [H, W] of whole numbers, got {labels.dtype} {labels.shape}",
                "mask is not a label image",
            )
        number, y, x, area = centroids_of_labels(labels.astype(np.int64))
        # An image's grey values taken for labels are thousands of specks strewn over the field.
        if len(area) > 100 and np.median(area) < 4 and len(area) > labels.size / 200:
            raise LocationError(
                f"{path}: {len(area):,} labels of {np.median(area):g} px: an image, not a label mask", "mask is not a label image"
            )
        return Locations(number, y, x)
