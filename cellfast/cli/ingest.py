"""``cellfast ingest``: fields + locations, or ready-made crops, into a crop store."""

from __future__ import annotations

from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.group()
def ingest() -> None:
    """Fill a crop store: cut cells out of fields, or collect ready-made crops."""


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


@ingest.command("fields")
@click.argument("image_csv", type=_FILE, required=False)
@click.option("--image-root", type=_FILE, required=True, help="Folder the image table's paths are relative to.")
@click.option(
    "--locations",
    required=True,
    metavar="CSV|FOLDER|detect",
    help="Where the cells are: a CellProfiler table with Location_Center_X/Y, a folder of DeepProfiler centroid CSVs or of label masks "
    "(Cellpose, CellProfiler), or 'detect' to find nuclei.",
)
@click.option("-o", "--out", "screen", type=_FILE, required=True, help="Screen folder to write.")
@click.option(
    "--pattern",
    help="Instead of IMAGE_CSV: a regular expression with groups channel, well (or row and column), site, plate for file names.",
)
@click.option("--plate", help="Plate name, where the table or the pattern has none.")
@click.option("--channels", help="Channels to take, in this order, e.g. DNA,Actin.  [default: all, as in the table]")
@click.option("--moa", type=_FILE, help="CSV compound,concentration,moa to join.")
@click.option("--metadata", type=_FILE, help="CSV with plate/well (or image number) → compound, concentration, moa to join.")
@click.option(
    "--crop-size", type=int, default=112, show_default=True, help="Side of a crop, px: the view's and a margin for rotation."
)
@click.option(
    "--border",
    type=click.Choice(["pad", "reflect", "drop"]),
    default="pad",
    show_default=True,
    help="Crops that reach over the field's edge.",
)
@click.option(
    "--illumination", type=_FILE, help="Folder of illumination functions, <plate>_<channel>.npy or <channel>.npy, to divide by."
)
@click.option("--detect-channel", help="Channel the nuclei are detected in.  [default: the first]")
@click.option("--diameter", "diameter_px", type=float, help="Typical diameter of a nucleus for 'detect', px.")
@click.option("--pixel-size-um", type=float, help="Size of a pixel, µm, to be kept with the crops.")
@click.option(
    "--batch-regex",
    help="Group 1 of this in the plate's name is its experimental batch.  [default: ^(Week\\d+)_, else the plate]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Plates done at the same time.  [default: one per core]")
@click.option("--strict", is_flag=True, help="Stop at the first field that cannot be used.")
@click.option("--force", is_flag=True, help="Make plates again that are there already.")
def ingest_fields_command(
    image_csv: Path | None,
    image_root: Path,
    locations: str,
    screen: Path,
    pattern: str | None,
    plate: str | None,
    channels: str | None,
    moa: Path | None,
    metadata: Path | None,
    crop_size: int,
    border: str,
    illumination: Path | None,
    detect_channel: str | None,
    diameter_px: float | None,
    pixel_size_um: float | None,
    batch_regex: str | None,
    workers: int | None,
    strict: bool,
    force: bool,
) -> None:
    """Cut the cells of the fields listed in IMAGE_CSV (BBBC021's image CSV or CellProfiler's load_data) into crops.

    Cells come out one row each, by plate, well and site whatever the order of the table; what was dropped, and why, stands in the ledger (-o/ledger.json).
    """
    from cellfast.screens.illumination import Illumination
    from cellfast.screens.image_table import image_table_from_pattern, read_image_table
    from cellfast.screens.ingest import default_workers
    from cellfast.screens.ingest_fields import FieldIngestOptions, ingest_fields
    from cellfast.screens.locations import open_locations
    from cellfast.screens.moa import join_metadata, join_moa

    if (image_csv is None) == (pattern is None):
        raise click.UsageError("give either IMAGE_CSV or --pattern")
    if locations != "detect" and (detect_channel or diameter_px):
        raise click.UsageError(f"--detect-channel and --diameter belong to --locations detect, got --locations {locations}")
    options = FieldIngestOptions(crop_size, border, pixel_size_um, batch_regex, strict)
    _check_regex(batch_regex)
    if image_csv is not None:
        table = read_image_table(image_csv, image_root, channels=_names(channels), plate=plate)
    else:
        table = image_table_from_pattern(pattern or "", image_root, plate=plate, channels=_names(channels))
    unmatched: list[str] = []
    unused: list[str] = []
    for file, join in ((metadata, join_metadata), (moa, join_moa)):
        if file is not None:
            table, report = join(table, file)
            unmatched += report.unmatched
            unused += report.unused
    detect_options = {"diameter_px": diameter_px} if diameter_px else None
    source = open_locations(locations, table, detect_channel=detect_channel, detect_options=detect_options)
    ledger = ingest_fields(
        table,
        source,
        screen,
        options,
        illumination=Illumination(illumination) if illumination else None,
        source=str(image_csv or pattern),
        unmatched=unmatched,
        unused=unused,
        workers=workers or default_workers(),
        force=force,
    )
    click.echo(ledger.table())
    click.echo(f"screen {screen}, ledger {screen / 'ledger.json'}")


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
@click.option("--moa", type=_FILE, help="CSV compound,concentration,moa for an index without MoA.")
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
    index_csv: Path,
    screen: Path,
    root: Path | None,
    layout: str,
    channels: str | None,
    moa: Path | None,
    pixel_size_um: float | None,
    batch_regex: str | None,
    workers: int | None,
    strict: bool,
    force: bool,
) -> None:
    """Collect ready-made crops, one .npy, TIFF or PNG per cell, listed in INDEX_CSV.

    Its columns are file,plate,well,site,cell,compound,concentration,moa, or the reference implementation's Image_Name,Class_Name,Target with
    strips of channels side by side.
    """
    from cellfast.screens.crop_index import read_crop_index
    from cellfast.screens.ingest import default_workers
    from cellfast.screens.ingest_crops import ingest_crops

    _check_regex(batch_regex)
    index = read_crop_index(index_csv, root=root, layout=layout, moa=moa)
    # Starting a worker process takes about as long as reading some thousand crops.
    workers = workers or (default_workers() if len(index.table) > 20_000 else 1)
    ledger = ingest_crops(
        index,
        screen,
        channel_names=_names(channels),
        pixel_size_um=pixel_size_um,
        batch_regex=batch_regex,
        source=str(index_csv),
        strict=strict,
        workers=workers,
        force=force,
    )
    click.echo(ledger.table())
    click.echo(f"screen {screen}, ledger {screen / 'ledger.json'}")


def _check_regex(pattern: str | None) -> None:
    import re

    try:
        re.compile(pattern or "")
    except re.error as error:
        raise click.UsageError(f"--batch-regex {pattern!r} is not a regular expression: {error}") from error
