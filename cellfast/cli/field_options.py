"""Options that say what the fields of a screen are and where their cells are; `ingest fields` and `embed` share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cellfast.screens.fields import OpenedFields

_FILE = click.Path(path_type=Path)


column_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN",
    help="Which column is the plate, well, site, batch, compound, concentration or moa, where it is not recognised (also one of "
    "the --metadata or --moa table), e.g. compound=Metadata_JCP2022; repeat for several.",
)


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
            help="Where the cells are: a CellProfiler table with Location_Center_X/Y, a folder of DeepProfiler centroid CSVs or "
            "of label masks (Cellpose, CellProfiler), or 'detect' to find nuclei.",
        ),
        click.option(
            "--pattern",
            help="Instead of IMAGE_CSV: a regular expression with groups channel, well (or row and column), site, plate for file "
            "names.",
        ),
        click.option("--plate", help="Plate name, where the table or the pattern has none."),
        click.option("--channels", help="Channels to take, in this order, e.g. DNA,Actin.  [default: all, as in the table]"),
        click.option("--moa", type=_FILE, help="CSV compound,concentration,moa to join."),
        click.option(
            "--metadata", type=_FILE, help="CSV with plate/well (or image number) → compound, concentration, moa to join."
        ),
        column_option,
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
            help="Crops that reach over the field's edge: pad, zeros outside; reflect, mirrored; drop, the cell is dropped and "
            "counted.",
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


def open_named_fields(
    image_csv: Path | str | None, *, channels: str | None, columns: Sequence[str], batch_regex: str | None, **options: Any
) -> OpenedFields:
    """Read what the options name.

    Raises:
        click.UsageError: options that do not go together.
        CellfastError: files that are not what they should be.
    """
    from cellfast.metadata.columns import parse_column_overrides
    from cellfast.screens.fields import open_fields

    if (image_csv is None) == (options["pattern"] is None):
        raise click.UsageError("give either IMAGE_CSV or --pattern")
    check_regex(batch_regex)
    return open_fields(image_csv, channels=split_names(channels), columns=parse_column_overrides(columns), **options)


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
