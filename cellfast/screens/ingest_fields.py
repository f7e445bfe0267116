"""Fields of view + locations → crop stores, one per plate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cellfast.errors import CellfastError, option
from cellfast.metadata.batches import batches_as_said
from cellfast.printable import masked
from cellfast.screens.centroids import LocationError, Locations
from cellfast.screens.crop_writer import PlateWriter
from cellfast.screens.cutting import BORDERS, crop_origins, inside
from cellfast.screens.field_cells import FieldReader, count_refused, fields_by_plate
from cellfast.screens.illumination import Illumination
from cellfast.screens.image_files import check_files
from cellfast.screens.image_table import Field, ImageTable
from cellfast.screens.images import ImageError, image_info
from cellfast.screens.ingest import PlateTask, count_unit, ingesting, other_plates, plate_path, run_plates, stored_ledger
from cellfast.screens.inputs import FileTimes, digest, field_inputs
from cellfast.screens.ledger import Ledger, PlateLedger
from cellfast.screens.locations import LocationSource
from cellfast.storage.urls import is_url

PROBED_FIELDS = 15


@dataclass(frozen=True)
class FieldIngestOptions:
    """How fields become crops.

    Attributes:
        crop_size: side of a crop, px; leave a margin for rotation, e.g. 112 for views of 96.
        border: ``pad`` (zeros), ``reflect``, or ``drop`` the cells whose crop reaches over the field's edge; counted each way.
        pixel_size_um: size of a pixel, µm; None when unknown.
        batch_regex: group 1 of it in the plate's name is the experimental batch; None: ``^(Week\\d+)_``, else the plate.
        strict: stop at the first field that cannot be used.
    """

    crop_size: int = 112
    border: str = "pad"
    pixel_size_um: float | None = None
    batch_regex: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.crop_size < 8 or self.crop_size > 1024:
            raise CellfastError(f"{option('crop_size')} must lie in 8..1024 px, got {self.crop_size}")
        if self.border not in BORDERS:
            raise CellfastError(f"{option('border')} must be one of {', '.join(BORDERS)}, got {self.border!r}")
        if self.pixel_size_um is not None and not 0 < self.pixel_size_um < 1000:
            raise CellfastError(f"{option('pixel_size_um')} must be a positive number of µm, got {self.pixel_size_um}")


@dataclass(frozen=True)
class _PlateWork:
    """What a worker process needs for one plate."""

    fields: tuple[Field, ...]
    reader: FieldReader
    options: FieldIngestOptions


def probe_images(table: ImageTable) -> tuple[tuple[int, int], np.dtype]:
    """The size and the pixel type most of up to 15 fields, spread over the table, have in all channels.

    Raises:
        CellfastError: none of them can be read (says why for the first three), or the channels have two pixel types.
    """
    positions = np.unique(np.linspace(0, len(table.fields) - 1, min(PROBED_FIELDS, len(table.fields))).astype(int))
    seen: Counter[tuple[tuple[int, int], np.dtype]] = Counter()
    types: dict[str, Counter[np.dtype]] = {}
    errors = []
    for position in positions:
        for name, file in zip(table.channel_names, table.fields[position].files):
            try:
                if not file:
                    raise ImageError("no file named for a channel", "file missing")
                found = image_info(file)
                seen[found] += 1
                types.setdefault(name, Counter())[found[1]] += 1
            except ImageError as error:
                errors.append(str(error))
    if not seen:
        raise CellfastError(
            f"none of {len(positions)} fields tried can be read; check {option('image_root')}. "
            + "; ".join(dict.fromkeys(errors[:3]))
        )
    bits: dict[int, list[str]] = {}
    for name, counted in types.items():
        bits.setdefault(8 * counted.most_common(1)[0][0].itemsize, []).append(name)
    if len(bits) > 1:
        told = ", ".join(f"{' and '.join(names)} {count}-bit" for count, names in sorted(bits.items()))
        raise CellfastError(
            f"the channels have two pixel types: {told}; save all of them with one, or choose those of one with "
            f"{option('channels')}"
        )
    (shape, dtype), _ = seen.most_common(1)[0]
    return shape, np.dtype(dtype)


def ingest_fields(
    table: ImageTable,
    locations: LocationSource,
    screen: str | Path,
    options: FieldIngestOptions | None = None,
    *,
    illumination: Illumination | None = None,
    source: str = "",
    unmatched: Sequence[str] = (),
    unused: Sequence[str] = (),
    workers: int = 1,
    force: bool = False,
    show_progress: bool = True,
) -> Ledger:
    """Cut every located cell out of its field and write one crop store per plate and the ledger.

    A field that cannot be used (missing, unreadable, planar, multi-page, colour, another size or type than the rest, constant,
    the same image in two channels) is refused with its reason and the rest goes on, unless ``options.strict``. A plate that an
    earlier run finished with the same options is kept where its tables, images and locations are unchanged, and else made again,
    which a note says.

    Args:
        table: fields and channels, treatments joined.
        locations: where the cells are.
        screen: folder to write; ``plates/*.h5`` and ``ledger.json`` appear in it.
        illumination: functions to divide the planes by; None: pixels are stored as read.
        source: the image table's name, for the ledger.
        unmatched, unused: what did not join, for the ledger.
        workers: plates done at the same time.
        force: make plates again that are there already.

    Raises:
        CellfastError: no cell written, one file for two channels or fields, a plate made otherwise before, or (strict) an
            unusable field.
    """
    options = options or FieldIngestOptions()
    screen = Path(screen)
    if not table.fields:
        raise CellfastError(f"{source or 'the image table'} lists no fields")
    check_files(table.fields, table.channel_names)
    shape, dtype = probe_images(table)
    reader = FieldReader(table.channel_names, locations, illumination, options.crop_size, options.border, shape, dtype.name)
    tasks, times = [], FileTimes()
    batches = batches_as_said(((field.plate, field.batch) for field in table.fields), options.batch_regex)
    for plate, fields in fields_by_plate(table).items():
        described = {
            "kind": "fields",
            "channels": list(table.channel_names),
            "crop_size": options.crop_size,
            "border": options.border,
            "pixel_size_um": options.pixel_size_um,
            "batch": batches[plate],
            "locations": locations.description,
            "illumination": illumination.description if illumination else None,
            "field_table": field_table_digest(fields),
        }
        work = _PlateWork(tuple(fields), reader, options)
        inputs = field_inputs(fields, locations, times)
        tasks.append(
            PlateTask(plate, plate_path(screen, plate), len(fields), described, work, 1 + locations.reads_images, inputs)
        )
    with ingesting(screen):
        plates, remade = run_plates(tasks, ingest_plate, workers=workers, force=force, unit="fields", show_progress=show_progress)
        elsewhere = locations.unused(table.fields)
        ledger = Ledger(
            source=source,
            locations=locations.description,
            options=asdict(options),
            plates=plates,
            notes=[*table.notes, *remade, *([elsewhere] if elsewhere else []), *other_plates(screen, tasks)],
            unmatched_metadata=list(unmatched),
            unused_metadata=list(unused),
        )
        ledger.write(screen)
    ledger.check_written(screen)
    return ledger


def field_table_digest(fields: Sequence[Field]) -> str:
    """SHA-256 of where the fields were taken, their files (of URLs without secrets: a new signature is no new file) and
    treatments."""

    def files(field: Field) -> list[str]:
        return [masked(file, opaque=False) if is_url(file) else file for file in field.files]

    return digest([[f.well, f.site, f.image_number, files(f), f.compound, repr(f.concentration), f.moa] for f in fields])


def ingest_plate(task: PlateTask) -> PlateLedger:
    """Write one plate's crop store and return its ledger; runs in a worker process."""
    work: _PlateWork = task.payload
    options, reader = work.options, work.reader
    ledger = PlateLedger(task.plate, fields_listed=len(work.fields), wells_listed=len({f.well for f in work.fields}))
    located: list[tuple[Field, Locations]] = []
    for field in work.fields:
        try:
            found = reader.locate(field)
        except (ImageError, LocationError) as error:
            count_refused(ledger, field, error, None, strict=options.strict)
            count_unit()
            continue
        finally:
            if reader.locations.reads_images:
                count_unit(searched=True)
        located.append((field, found))
    capacity = 0
    for _, found in located:
        n = len(found.object_number)
        if options.border == "drop":
            n = int(inside(crop_origins(found.y, found.x, options.crop_size), options.crop_size, *reader.shape).sum())
        capacity += n
    with PlateWriter(
        task.path,
        plate=task.plate,
        batch=task.options["batch"],
        channel_names=reader.channel_names,
        crop_size=options.crop_size,
        dtype=reader.dtype,
        capacity=capacity,
        border=options.border,
        pixel_size_um=options.pixel_size_um,
        options=task.options,
    ) as writer:
        highest = 0
        for field, found in located:
            highest = max(highest, _ingest_field(work, field, found, writer, ledger))
        if reader.dtype == "uint16" and 0 < highest < 256:
            ledger.warnings.append(f"16-bit files whose values end at {highest}: were 8-bit images saved as 16-bit?")
        written = {well for well, count in zip(writer.well_names, writer.cells_per_well()) if count}
        ledger.wells_without_cells = sorted({f.well for f in work.fields} - written)
        ledger.check()
        writer.ledger = stored_ledger(ledger, task)
    return ledger


def _ingest_field(work: _PlateWork, field: Field, found: Locations, writer: PlateWriter, ledger: PlateLedger) -> int:
    """Cut one field's cells; returns the highest pixel value seen (0 when the field was refused)."""
    try:
        cells = work.reader.read(field, found)
    except (ImageError, LocationError) as error:
        count_refused(ledger, field, error, found, strict=work.options.strict)
        count_unit()
        return 0
    writer.append_field(
        cells.crops(),
        well=field.well,
        site=field.site,
        image_number=field.image_number,
        source_files=field.files,
        compound=field.compound,
        concentration=field.concentration,
        moa=field.moa,
        object_number=cells.object_number,
        center_y=cells.center_y,
        center_x=cells.center_x,
        padded=cells.padded,
    )
    cells.count_in(ledger)
    count_unit()
    return cells.highest
