"""The fields of a screen as a user names them: an image table or file names, what joins to it, locations and illumination."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cellfast.errors import CellfastError, option
from cellfast.metadata.joins import unplaced_overrides
from cellfast.screens.illumination import Illumination
from cellfast.screens.image_table import ImageTable, image_table_from_pattern, read_image_table
from cellfast.screens.locations import LocationSource, open_locations
from cellfast.screens.moa import join_metadata, join_moa, one_spelling

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class OpenedFields:
    """Image table with treatments joined, locations and illumination; ``source`` names the table.

    ``unmatched``: wells and treatments that a joined table does not have; ``unused``: rows of it that no field uses.
    """

    table: ImageTable
    locations: LocationSource
    illumination: Illumination | None
    source: str
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]


def open_fields(
    image_table: _Path | None,
    *,
    image_root: _Path,
    locations: _Path,
    pattern: str | None = None,
    plate: str | None = None,
    channels: Sequence[str] | None = None,
    metadata: _Path | None = None,
    moa: _Path | None = None,
    columns: Mapping[str, str] | None = None,
    illumination: _Path | None = None,
    split_components: bool = False,
    detect_channel: str | None = None,
    diameter_px: float | None = None,
) -> OpenedFields:
    """Read the tables that say what a screen's fields are, and open where their cells are.

    Args:
        image_table: as `read_image_table`; None with ``pattern``, as `image_table_from_pattern`.
        metadata, moa: tables to join, as `cellfast.metadata.joins`.
        columns: canonical name → column of the image table or of a joined one, where it is not recognised.
        illumination: folder of illumination functions.
        locations, split_components, detect_channel, diameter_px: as `open_locations`.

    Raises:
        CellfastError: files that are not what they should be, options that do not go together.
    """
    if (image_table is None) == (pattern is None):
        raise CellfastError(f"give either an image table or {option('pattern')}")
    if locations != "detect" and (detect_channel or diameter_px):
        raise CellfastError(
            f"{option('detect_channel')} and {option('diameter_px')} belong to {option('locations', 'detect')}, got "
            f"{option('locations', locations)}"
        )
    columns = columns or {}
    if image_table is not None:
        table = read_image_table(image_table, image_root, channels=channels, plate=plate, columns=columns)
    else:
        table = image_table_from_pattern(pattern or "", image_root, plate=plate, channels=channels)
    later = {name: column for name, column in columns.items() if name not in table.placed}
    unmatched: list[str] = []
    unused: list[str] = []
    placed: set[str] = set()
    for file, join in ((metadata, join_metadata), (moa, join_moa)):
        if file is not None:
            table, report = join(table, os.fspath(file), later)
            table = replace(table, notes=(*table.notes, *report.notes))
            unmatched += report.unmatched
            unused += report.unused
            placed |= set(report.placed)
    unplaced_overrides(later, placed, "neither the image table nor a joined table")
    return OpenedFields(
        one_spelling(table),
        open_locations(
            str(locations),
            table,
            detect_channel=detect_channel,
            detect_options={"diameter_px": diameter_px} if diameter_px else None,
            split_components=split_components,
        ),
        Illumination(Path(illumination), table.illumination) if illumination else None,
        str(image_table or pattern),
        tuple(unmatched),
        tuple(unused),
    )
