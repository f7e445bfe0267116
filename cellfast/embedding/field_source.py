"""Fields with their locations as a source of cells: read, tried again, refused by name, cut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellfast.embedding.cells import Block, Cells, EncodedField, PlatePlan, cut_into_blocks
from cellfast.errors import CellfastError
from cellfast.metadata.batches import batches_as_said
from cellfast.metadata.names import file_name
from cellfast.printable import masked
from cellfast.screens import schema
from cellfast.screens.centroids import LocationError, Locations
from cellfast.screens.crop_writer import _add_histogram, scale_from_histogram
from cellfast.screens.field_cells import FieldPlanes, FieldReader, PlaneFacts, count_refused, fields_by_plate
from cellfast.screens.image_table import Field, ImageTable
from cellfast.screens.images import ImageError, encoded_plane
from cellfast.screens.ingest_fields import field_table_digest
from cellfast.screens.inputs import FileTimes, field_inputs
from cellfast.screens.ledger import PlateLedger

MOST_FIELDS_PER_BLOCK = 16
# Reasons that another try can cure: a file server that stumbled, a file still being copied.
PASSING = ("file missing", "not a readable image", "mask not readable", "no locations", "locations not usable")
FIRST_PAUSE_S = 0.2
# After so many fields in a row that no further try cured, tries follow without a pause: a thousand missing files are no stumble.
HOPELESS_AFTER = 8


class FieldSource:
    """Fields with their locations.

    Args:
        table: fields and channels, treatments joined.
        reader: reads a field and finds its cells.
        window: side of the central window that the model sees, px; no more is cut.
        name: the image table's name.
        batch_regex: tells the experimental batch from the plate's name.
        retries: how often a field that cannot be read is tried again.
        strict: stop at the first field that cannot be used.

    Raises:
        CellfastError: no fields, a plate name that cannot name a file, two treatments in one well.
    """

    kind = "fields"
    notes: Sequence[str] = ()
    unmatched: Sequence[str] = ()
    unused: Sequence[str] = ()

    def __init__(
        self,
        table: ImageTable,
        reader: FieldReader,
        window: int,
        *,
        name: str = "",
        batch_regex: str | None = None,
        retries: int = 2,
        strict: bool = False,
    ) -> None:
        if not table.fields:
            raise CellfastError(f"{name or 'the image table'} lists no fields")
        self.name, self.channel_names, self.reader, self.window = name, list(table.channel_names), reader, window
        self.dtype, self.retries, self.strict = reader.dtype, retries, strict
        self.crop_size = reader.crop_size
        self._fields = fields_by_plate(table)
        self.num_fields = len(table.fields)
        self._batch = batches_as_said(((field.plate, field.batch) for field in table.fields), batch_regex)
        self._hopeless = 0
        most = int(np.clip(self.num_fields // 64, 1, MOST_FIELDS_PER_BLOCK))
        self.plans, times = [], FileTimes()
        for plate, fields in self._fields.items():
            file_name("plate", plate)
            _check_treatments(plate, fields)
            wells = [f.well for f in fields]
            origin = {
                "fields": field_table_digest(fields),
                "channels": list(table.channel_names),
                "border": reader.border,
                "batch": self._batch[plate],
                "locations": reader.locations.description,
                "illumination": reader.illumination.description if reader.illumination else None,
            }
            self.plans.append(
                PlatePlan(
                    plate,
                    self._batch[plate],
                    len(fields),
                    tuple(dict.fromkeys(wells)),
                    cut_into_blocks(plate, wells, most),
                    origin,
                    inputs=field_inputs(fields, reader.locations, times),
                )
            )

    def units(self, block: Block) -> list[Field]:
        return self._fields[block.plate][block.start : block.stop]

    def encoded(self, unit: Field) -> EncodedField | Cells:
        """The bytes of the field's files, or its cells where one of them is not for every decoder."""
        began = time.perf_counter()
        contents = self.contents(unit)
        return self.read(unit) if contents is None else EncodedField(unit, contents, time.perf_counter() - began)

    def contents(self, unit: Field) -> list[np.ndarray] | None:
        """The bytes of the field's files; None where one of them is not for every decoder."""
        shape, dtype = self.reader.shape, np.dtype(self.dtype)
        contents = []
        for file in unit.files:
            content = encoded_plane(file, expect_shape=shape, expect_dtype=dtype)
            if content is None:
                return None
            contents.append(content)
        return contents

    @property
    def looks_at_pixels(self) -> bool:
        """True where the host works on the planes: illumination is corrected, or cells are detected."""
        return self.reader.illumination is not None or self.reader.locations.reads_images

    def read(self, unit: Field, decoded: dict[int, Any] | None = None, facts: PlaneFacts | None = None) -> Cells:
        """The cells of a field; ``decoded``: its planes by channel, where they are there already."""
        began = time.perf_counter()
        for attempt in range(self.retries + 1):
            ledger = PlateLedger(unit.plate, fields_listed=1)
            found: Locations | None = None
            planes = FieldPlanes(self.reader, unit, dict(decoded or {}), facts)
            try:
                found = self.reader.locate(unit, planes)
                cells = self.reader.read(unit, found, planes)
                break
            except (ImageError, LocationError) as error:
                if attempt < self.retries and error.reason in PASSING:
                    self._pause(attempt)
                    continue
                self._hopeless += error.reason in PASSING
                count_refused(ledger, unit, error, found, strict=self.strict)
                return Cells(
                    unit.plate,
                    0,
                    self.window,
                    ledger=ledger,
                    quarantined=[_quarantined(unit, error, attempt + 1)],
                    seconds=time.perf_counter() - began,
                    fields=1,
                )
        self._hopeless = self._hopeless if attempt == 0 else 0
        cells.count_in(ledger)
        n = len(cells)
        columns = {
            "Metadata_Plate": unit.plate,
            "Metadata_Well": unit.well,
            "Metadata_Site": np.full(n, unit.site, np.int64),
            "Metadata_ImageNumber": np.full(n, unit.image_number, np.int64),
            "Metadata_ObjectNumber": cells.object_number.astype(np.int64),
            "Metadata_Center_X": cells.center_x.astype(np.float32),
            "Metadata_Center_Y": cells.center_y.astype(np.float32),
            "Metadata_Batch": self._batch[unit.plate],
            "Metadata_Compound": unit.compound,
            "Metadata_Concentration": np.full(n, unit.concentration, np.float64),
            "Metadata_MoA": unit.moa,
        }
        return Cells(
            unit.plate,
            n,
            self.window,
            columns,
            ledger,
            planes=([np.ascontiguousarray(p) for p in cells.planes] if facts is None else cells.planes) if n else None,
            origins=cells.origins(self.window),
            border=cells.border,
            seconds=time.perf_counter() - began,
            fields=1,
        )

    def _pause(self, attempt: int) -> None:
        if self._hopeless < HOPELESS_AFTER:
            time.sleep(FIRST_PAUSE_S * 2**attempt)

    def plate_scaling(self, plate: str) -> tuple[np.ndarray, np.ndarray]:
        """As `PlateWriter` finds them; costs one more reading of the plate's fields."""
        shape = (len(self.channel_names), int(np.iinfo(np.dtype(self.dtype)).max) + 1)
        whole, filled = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for unit in self._fields[plate]:
            for attempt in range(self.retries + 1):
                planes = FieldPlanes(self.reader, unit)
                try:
                    cells = self.reader.read(unit, self.reader.locate(unit, planes), planes)
                except (ImageError, LocationError) as error:
                    if attempt < self.retries and error.reason in PASSING:
                        self._pause(attempt)
                        continue
                    break  # it is refused, and counted, when its cells are embedded
                crops, zeros = cells.crops(), cells.padded & (cells.border == "pad")
                _add_histogram(crops[~zeros], whole, schema.HISTOGRAM_STRIDE)
                _add_histogram(crops[zeros], filled, schema.HISTOGRAM_STRIDE)
                break
        return scale_from_histogram(whole if whole.any() else filled)

    def finish(self, plan: PlatePlan, ledger: PlateLedger) -> PlateLedger:
        ledger.wells_listed = len(plan.wells)
        ledger.check()
        if ledger.fields_listed != plan.units:
            raise CellfastError(
                f"plate {plan.plate}: {plan.units} fields listed, {ledger.fields_listed} seen; a field was lost, please report this"
            )
        return ledger


def _check_treatments(plate: str, fields: Sequence[Field]) -> None:
    seen: dict[str, tuple[str, float, str]] = {}
    for one in fields:
        treatment = (one.compound, float(one.concentration), one.moa)
        before = seen.setdefault(one.well, treatment)
        if repr(before) != repr(treatment):
            raise CellfastError(
                f"plate {plate}, well {one.well}: two treatments in one well, {before} and {treatment}; correct the metadata"
            )


def _quarantined(unit: Field, error: ImageError | LocationError, tries: int) -> dict[str, str]:
    return {
        "plate": unit.plate,
        "well": unit.well,
        "site": str(unit.site),
        "image_number": str(unit.image_number),
        "reason": error.reason,
        "tries": str(tries),
        "message": str(error),
        "files": " ".join(masked(file) or "(none)" for file in unit.files),
    }
