"""Options that say what the fields of a screen are and where their cells are; `ingest fields` and `embed` share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cellfast.screens.illumination import Illumination
    from cellfast.screens.image_table import ImageTable
    from cellfast.screens.locations import LocationSource

_FILE = click.Path(path_type=Path)


def field_options(*, required: bool, crop_size: int | None) -> Callable[[Any], Any]:
    """Add the options to a command.

    Args:
        required: whether --image-root and --locations must be given.
        crop_size: default of --crop-size; None: the model's.
    """
    size_help = "Side of a crop, px: the view's and a margin for rotation."
    options = [
        click.option(
            "--image-root",
            required=required,
            help="Folder (s3://, gs:// URL, or a FIELDS.h5 of --keep-fields) the image table's paths are relative to.",
        ),
        click.option(
            "--locations",
            required=required,
            metavar="CSV|FOLDER|detect",
            help="Where the cells are: a CellProfiler table with Location_Center_X/Y, a folder of DeepProfiler centroid CSVs or of label "
            "masks (Cellpose, CellProfiler), or 'detect' to find nuclei.",
        ),
        click.option(
            "--pattern",
            help="Instead of IMAGE_CSV: a regular expression with groups channel, well (or row and column), site, plate for file names.",
        ),
        click.option("--plate", help="Plate name, where the table or the pattern has none."),
        click.option("--channels", help="Channels to take, in this order, e.g. DNA,Actin.  [default: all, as in the table]"),
        click.option("--moa", type=_FILE, help="CSV compound,concentration,moa to join."),
        click.option(
            "--metadata", type=_FILE, help="CSV with plate/well (or image number) → compound, concentration, moa to join."
        ),
        click.option(
            "--crop-size",
            type=int,
            default=crop_size,
            show_default=crop_size is not None,
            help=size_help if crop_size else "Side of a crop, px.  [default: the model's]",
        ),
        click.option(
            "--border",
            type=click.Choice(["pad", "reflect", "drop"]),
            default="pad",
            show_default=True,
            help="Crops that reach over the field's edge.",
        ),
        click.option(
            "--illumination",
            type=_FILE,
            help="Folder of illumination functions, <plate>_<channel>.npy or <channel>.npy, to divide by.",
        ),
        click.option(
            "--split-components", is_flag=True, help="Every connected component of a mask is a cell: for masks of one value."
        ),
        click.option("--detect-channel", help="Channel the nuclei are detected in.  [default: the first]"),
        click.option("--diameter", "diameter_px", type=float, help="Typical diameter of a nucleus for 'detect', px."),
        click.option(
            "--batch-regex",
            help="Group 1 of this in the plate's name is its experimental batch.  [default: ^(Week\\d+)_, else the plate]",
        ),
        click.option("--strict", is_flag=True, help="Stop at the first field that cannot be used."),
    ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@dataclass
class OpenedFields:
    """Image table with treatments joined, locations and illumination, as the options name them."""

    table: ImageTable
    locations: LocationSource
    illumination: Illumination | None
    source: str
    unmatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def open_fields(
    image_csv: Path | str | None,
    *,
    image_root: str,
    locations: str,
    pattern: str | None,
    plate: str | None,
    channels: str | None,
    moa: Path | None,
    metadata: Path | None,
    illumination: Path | None,
    split_components: bool,
    detect_channel: str | None,
    diameter_px: float | None,
    batch_regex: str | None,
) -> OpenedFields:
    """Read what the options name.

    Raises:
        click.UsageError: options that do not go together.
        CellfastError: files that are not what they should be.
    """
    from cellfast.screens.illumination import Illumination
    from cellfast.screens.image_table import image_table_from_pattern, read_image_table
    from cellfast.screens.locations import open_locations
    from cellfast.screens.moa import join_metadata, join_moa

    if (image_csv is None) == (pattern is None):
        raise click.UsageError("give either IMAGE_CSV or --pattern")
    if locations != "detect" and (detect_channel or diameter_px):
        raise click.UsageError(f"--detect-channel and --diameter belong to --locations detect, got --locations {locations}")
    check_regex(batch_regex)
    if image_csv is not None:
        table = read_image_table(image_csv, image_root, channels=split_names(channels), plate=plate)
    else:
        table = image_table_from_pattern(pattern or "", image_root, plate=plate, channels=split_names(channels))
    unmatched: list[str] = []
    unused: list[str] = []
    for file, join in ((metadata, join_metadata), (moa, join_moa)):
        if file is not None:
            table, report = join(table, file)
            unmatched += report.unmatched
            unused += report.unused
    detect_options = {"diameter_px": diameter_px} if diameter_px else None
    return OpenedFields(
        table,
        open_locations(
            locations,
            table,
            detect_channel=detect_channel,
            detect_options=detect_options,
            split_components=split_components,
        ),
        Illumination(illumination, table.illumination) if illumination else None,
        str(image_csv or pattern),
        unmatched,
        unused,
    )


def split_names(text: str | None) -> list[str] | None:
    """``"DNA, Actin"`` → ``["DNA", "Actin"]``; None for nothing."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def check_regex(pattern: str | None) -> None:
    """Raise `click.UsageError` for a --batch-regex that is none."""
    import re

    try:
        re.compile(pattern or "")
    except re.error as error:
        raise click.UsageError(f"--batch-regex {pattern!r} is not a regular expression: {error}") from error
