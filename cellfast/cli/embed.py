"""``cellfast embed``: every cell of a screen to one row of features, from a crop store or straight from the fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellfast.cli.field_options import field_options, open_named_fields

# Fields were quarantined: everything else is there.
EXIT_QUARANTINED = 3


@click.command()
@click.argument("screen", metavar="[SCREEN|IMAGE_CSV]", required=False)
@click.option(
    "--model", "model_path", type=click.Path(path_type=Path), required=True, help="Run folder of cellfast train, or its model.pt."
)
@click.option("-o", "--out", required=True, help="Folder (or s3://, gs:// URL) for one file per plate.")
@click.option(
    "--features", type=click.Choice(["h", "z"]), default="h", show_default=True, help="Encoder output h, or projection z."
)
@click.option(
    "--to",
    "formats",
    type=click.Choice(["parquet", "anndata", "cpg"]),
    multiple=True,
    help="What is written; repeat for several. cpg: the Cell Painting Gallery's workspace_dl folders.  [default: parquet]",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Type of the features."
)
@click.option("--aggregate", type=click.Choice(["well"]), help="Write the mean of each well's cells, and no cells.")
@click.option(
    "--tta",
    type=click.Choice(["1", "4", "8"]),
    default="1",
    show_default=True,
    help="Mean over this many views of a cell: 4 rotations, or 8 with mirror images.",
)
@click.option("--batch-size", type=int, default=256, show_default=True, help="Cells per minibatch.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
@click.option("--amp/--no-amp", default=False, help="bfloat16 autocast.")
@click.option("--compile/--no-compile", "compile_", default=False, help="torch.compile the encoder.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the encoder.  [default: torch's choice]")
@click.option("--workers", type=click.IntRange(min=1), help="Readers at the same time.  [default: by device and cores]")
@click.option(
    "--readers",
    type=click.Choice(["threads", "processes"]),
    default="threads",
    show_default=True,
    help="What the readers are; processes help where one interpreter cannot feed a GPU.",
)
@click.option(
    "--decode",
    type=click.Choice(["auto", "host", "dali"]),
    default="auto",
    show_default=True,
    help="Who decodes fields: host (tifffile), dali (NVIDIA DALI, on a GPU with its decoders), auto: what is faster on the first fields "
    "of 256 or more. The pixels are the same.",
)
@click.option(
    "--retries", type=click.IntRange(min=0), default=2, show_default=True, help="More tries for a field that cannot be read."
)
@click.option("--retry-quarantined", is_flag=True, help="Make plates again that were finished with quarantined fields.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: Ray Data over a cluster (needs cellfast[ray]); several processes on one or more machines: torchrun -m cellfast embed …",
)
@click.option("--force", is_flag=True, help="Replace files of another model or other cells.")
@click.option("--allow-unfinished", is_flag=True, help="Embed the plates that are there of a SCREEN whose ingest has not ended.")
@field_options(required=False, crop_size=None)
def embed(
    screen: str | None,
    model_path: Path,
    out: str,
    formats: tuple[str, ...],
    aggregate: str | None,
    tta: str,
    device: str,
    compile_: bool,
    threads: int | None,
    image_root: str | None,
    locations: str | None,
    crop_size: int | None,
    border: str,
    batch_regex: str | None,
    pattern: str | None,
    features: str,
    dtype: str,
    batch_size: int,
    amp: bool,
    workers: int | None,
    readers: str,
    decode: str,
    retries: int,
    retry_quarantined: bool,
    engine: str,
    force: bool,
    allow_unfinished: bool,
    strict: bool,
    **fields: Any,
) -> None:
    """Embed every cell of a crop store SCREEN, or of the fields listed in IMAGE_CSV: one file per plate, a row per cell.

    Fields take the options of `cellfast ingest fields` and need no crop store: each field is read once. Both ways give the same rows in
    the same order. A run that was stopped goes on where it stopped; finished plates are kept.

    Exit status: 0 all cells embedded; 3 finished, but fields were quarantined (listed in quarantine.csv); 1 stopped by an error, or no cell to embed; 2 wrong
    options.
    """
    from_fields = pattern is not None or (screen is not None and not Path(screen).is_dir())
    if screen is None and pattern is None:
        raise click.UsageError("give a SCREEN folder, an IMAGE_CSV, or --pattern")
    if from_fields:
        if allow_unfinished:
            raise click.UsageError("--allow-unfinished: only for a SCREEN folder of crop stores")
        if screen is not None and not Path(screen).exists() and image_root is None:
            from cellfast.errors import CellfastError

            raise CellfastError(f"{screen}: no such screen folder or image table")
        if locations is None:
            raise click.UsageError("fields need --locations (a table, a folder, or detect)")
        if image_root is None:
            raise click.UsageError("fields need --image-root")
    else:
        given = {"--image-root": image_root, "--locations": locations, "--crop-size": crop_size, "--batch-regex": batch_regex}
        given |= {f"--{name.removesuffix('_px').replace('_', '-')}": value for name, value in fields.items() if name != "columns"}
        given["--column"] = fields["columns"] or None
        given["--decode"] = None if decode == "auto" else decode
        wrong = [name for name, value in given.items() if value is not None and value is not False]
        if wrong:
            raise click.UsageError(f"{', '.join(wrong)}: only for fields; {screen} is a folder of crop stores")
    import torch

    from cellfast.embedding.embed_fields import embed_fields
    from cellfast.embedding.embed_store import embed_screen
    from cellfast.errors import CellfastError
    from cellfast.model_file import load_model
    from cellfast.screens import Screen
    from cellfast.training.devices import amp_warning, choose_device

    where = choose_device(device)
    if threads:
        torch.set_num_threads(threads)
    if amp and (warning := amp_warning(where)):
        click.echo(warning, err=True)
    model = load_model(model_path, where)
    options: dict[str, Any] = {
        "features": features,
        "batch_size": batch_size,
        "amp": amp,
        "tta": int(tta),
        "dtype": dtype,
        "formats": formats or ("parquet",),
        "aggregate_wells": aggregate == "well",
        "compile": compile_,
        "workers": workers,
        "readers": readers,
        "decode": decode,
        "retries": retries,
        "strict": strict,
        "retry_quarantined": retry_quarantined,
        "force": force,
        "engine": engine,
    }
    if from_fields:
        if crop_size not in (None, model.crop_size):
            raise CellfastError(
                f"--crop-size {crop_size}: the model {model.path} was trained on crops of {model.crop_size} px; leave the option out"
            )
        opened = open_named_fields(
            screen, image_root=str(image_root), locations=str(locations), pattern=pattern, batch_regex=batch_regex, **fields
        )
        summary = embed_fields(
            opened.table,
            opened.locations,
            model,
            out,
            border=border,
            batch_regex=batch_regex,
            illumination=opened.illumination,
            source=opened.source,
            unmatched=opened.unmatched,
            unused=opened.unused,
            device=where,
            **options,
        )
    else:
        stores = Screen.open(str(screen), allow_unfinished=allow_unfinished)
        if stores.unfinished:
            click.echo(f"{screen}: {stores.unfinished}", err=True)
        summary = embed_screen(stores, model, out, device=where, **options)
    if summary.account is None:
        return  # the first of several processes tells
    click.echo(summary.account.table())
    what = f"{summary.rows:,} wells" if aggregate else f"{summary.rows:,} rows"
    if summary.plates_kept:
        click.echo(f"{summary.plates_kept} of {summary.plates} plates were embedded before and are kept")
    click.echo(f"{summary.cells:,} cells = {what} of {summary.num_features} features in {summary.plates} plates, {out}")
    if summary.fields_quarantined:
        click.echo(
            f"{summary.fields_quarantined} fields were quarantined (quarantine.csv); when they are mended, --retry-quarantined makes "
            "their plates again",
            err=True,
        )
        raise click.exceptions.Exit(EXIT_QUARANTINED)
