"""``cellfast ingest``: fields + locations, or ready-made crops, into a crop store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellfast.cli.field_options import check_regex, column_option, field_options, open_named_fields, split_names

_FILE = click.Path(path_type=Path)


@click.group()
def ingest() -> None:
    """Fill a crop store: cut cells out of fields, or collect ready-made crops."""


@ingest.command("fields")
@click.argument("image_csv", type=_FILE, required=False)
@click.option("-o", "--out", "screen", type=_FILE, required=True, help="Screen folder to write.")
@field_options(required=True, crop_size=112)
@click.option("--pixel-size-um", type=float, help="Size of a pixel, µm, to be kept with the crops.")
@click.option(
    "--keep-fields",
    type=_FILE,
    metavar="FIELDS.h5",
    help="Also keep the images in this one file, encoded as they are; it serves as --image-root from then on.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Plates done at the same time.  [default: one per core]")
@click.option("--force", is_flag=True, help="Make plates again that are there already.")
def ingest_fields_command(
    image_csv: Path | None,
    screen: Path,
    crop_size: int,
    border: str,
    pixel_size_um: float | None,
    batch_regex: str | None,
    keep_fields: Path | None,
    workers: int | None,
    strict: bool,
    force: bool,
    **fields: Any,
) -> None:
    """Cut the cells of the fields listed in IMAGE_CSV (BBBC021's image CSV or CellProfiler's load_data) into crops.

    Cells come out one row each, by plate, well and site whatever the order of the table; what was dropped, and why, stands in the
    ledger (-o/ledger.json).
    """
    from cellfast.screens.ingest import default_workers
    from cellfast.screens.ingest_fields import FieldIngestOptions, ingest_fields
    from cellfast.screens.keep_fields import check_not_there, keep_fields_told

    if keep_fields is not None:
        check_not_there(keep_fields, force=force)
    options = FieldIngestOptions(crop_size, border, pixel_size_um, batch_regex, strict)
    opened = open_named_fields(image_csv, batch_regex=batch_regex, **fields)
    ledger = ingest_fields(screen=screen, options=options, workers=workers or default_workers(), force=force, **vars(opened))
    click.echo(ledger.table())
    click.echo(f"screen {screen}, ledger {screen / 'ledger.json'}")
    if keep_fields is not None:
        for line in keep_fields_told(opened.table, str(fields["image_root"]), keep_fields):
            click.echo(line)


@ingest.command("crops")
@click.argument("index_csv", type=_FILE)
@click.option("-o", "--out", "screen", type=_FILE, required=True, help="Screen folder to write.")
@click.option("--root", type=_FILE, help="Folder the file names are relative to.  [default: the index's]")
@click.option(
    "--layout",
    type=click.Choice(["auto", "HWC", "CHW", "strip"]),
    default="auto",
    show_default=True,
    help="Axes of a crop's pixels.",
)
@click.option("--channels", help="Names of the channels, e.g. DNA,Actin,Tubulin.  [default: channel1,channel2,…]")
@click.option("--moa", type=_FILE, help="CSV compound,concentration,moa to join.")
@click.option("--metadata", type=_FILE, help="CSV with plate/well → compound, concentration, moa to join.")
@column_option
@click.option("--pixel-size-um", type=float, help="Size of a pixel, µm, to be kept with the crops.")
@click.option(
    "--batch-regex",
    help="Group 1 of this in the plate's name is its experimental batch.  [default: ^(Week\\d+)_, else the plate]",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Plates done at the same time.  [default: one per core, few crops: 1]"
)
@click.option("--strict", is_flag=True, help="Stop at the first file that cannot be used.")
@click.option("--force", is_flag=True, help="Make plates again that are there already.")
def ingest_crops_command(
    index_csv: Path, screen: Path, channels: str | None, columns: tuple[str, ...], batch_regex: str | None, **options: Any
) -> None:
    """Collect ready-made crops, one .npy, TIFF or PNG per cell, listed in INDEX_CSV.

    Its columns are file,plate,well,site,cell,compound,concentration,moa, or the reference implementation's
    Image_Name,Class_Name,Target with strips of channels side by side.
    """
    from cellfast.metadata.columns import parse_column_overrides
    from cellfast.screens.ingest_crops import ingest_index

    check_regex(batch_regex)
    ledger = ingest_index(
        index_csv,
        screen,
        channel_names=split_names(channels),
        columns=parse_column_overrides(columns),
        batch_regex=batch_regex,
        **options,
    )
    click.echo(ledger.table())
    click.echo(f"screen {screen}, ledger {screen / 'ledger.json'}")
