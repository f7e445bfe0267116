"""``cellfast embed``: every cell of a screen to one row of features, from a crop store or straight from the fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellfast.cli.declared_options import declared_options
from cellfast.cli.field_options import check_regex, field_options
from cellfast.embedding.options import EmbedOptions

# Fields were quarantined: everything else is there.
EXIT_QUARANTINED = 3


@click.command()
@click.argument("screen", metavar="[SCREEN|IMAGE_CSV]", required=False)
@click.option(
    "--model", "model_path", type=click.Path(path_type=Path), required=True, help="Run folder of cellfast train, or its model.pt."
)
@click.option("-o", "--out", required=True, help="Folder (or s3://, gs:// URL) for one file per plate.")
@declared_options(EmbedOptions, leave=("strict",), flags={"formats": "--to"})
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the encoder.  [default: torch's choice]")
@click.option("--allow-unfinished", is_flag=True, help="Embed the plates that are there of a SCREEN whose ingest has not ended.")
@field_options(required=False, crop_size=None)
def embed(
    screen: str | None,
    model_path: Path,
    out: str,
    device: str,
    threads: int | None,
    allow_unfinished: bool,
    image_root: str | None,
    locations: str | None,
    crop_size: int | None,
    border: str,
    batch_regex: str | None,
    pattern: str | None,
    strict: bool,
    **others: Any,
) -> None:
    """Embed every cell of a crop store SCREEN, or of the fields listed in IMAGE_CSV: one file per plate, a row per cell.

    Fields take the options of `cellfast ingest fields` and need no crop store: each field is read once. Both ways give the same
    rows in the same order. A run that was stopped goes on where it stopped; finished plates are kept.

    Exit status: 0 all cells embedded; 3 finished, but fields were quarantined (listed in quarantine.csv); 1 stopped by an error,
    or no cell to embed; 2 wrong options.
    """
    given = {name: others.pop(name) for name in EmbedOptions.__dataclass_fields__ if name in others}
    options = {"strict": strict, **{name: value for name, value in given.items() if value not in (None, ())}}
    asked = EmbedOptions(**options)
    from_fields = pattern is not None or (screen is not None and not Path(screen).is_dir())
    if screen is None and pattern is None:
        raise click.UsageError("give a SCREEN folder, an IMAGE_CSV, or --pattern")
    if screen is not None and pattern is not None:
        raise click.UsageError("give either IMAGE_CSV or --pattern")
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
        of_fields = {"--image-root": image_root, "--locations": locations, "--crop-size": crop_size, "--batch-regex": batch_regex}
        of_fields |= {
            f"--{name.removesuffix('_px').replace('_', '-')}": value for name, value in others.items() if name != "columns"
        }
        of_fields["--column"] = others["columns"] or None
        of_fields["--decode"] = None if asked.decode == "auto" else asked.decode
        wrong = [name for name, value in of_fields.items() if value is not None and value is not False]
        if wrong:
            raise click.UsageError(f"{', '.join(wrong)}: only for fields; {screen} is a folder of crop stores")
    from cellfast.api import embed as run_embedding

    if from_fields:
        check_regex(batch_regex)
        others |= {"pattern": pattern, "border": border, "batch_regex": batch_regex}
    made = run_embedding(
        screen,
        out,
        model=model_path,
        device=device,
        crop_size=crop_size,
        image_root=image_root,
        locations=locations,
        threads=threads,
        allow_unfinished=allow_unfinished,
        say=lambda text: click.echo(text, err=True),
        **options,
        **(others if from_fields else {}),
    )
    summary = made.summary
    if summary.ledger is None:
        return  # the first of several processes tells
    click.echo(summary.ledger.table())
    what = f"{summary.rows:,} {'wells' if asked.aggregate else 'rows'}"
    if summary.plates_kept:
        click.echo(f"{summary.plates_kept} of {summary.plates} plates were embedded before and are kept")
    click.echo(f"{summary.cells:,} cells = {what} of {summary.num_features} features in {summary.plates} plates, {out}")
    if summary.fields_quarantined:
        click.echo(
            f"{summary.fields_quarantined} fields were quarantined (quarantine.csv); when they are mended, --retry-quarantined "
            "makes their plates again",
            err=True,
        )
        raise click.exceptions.Exit(EXIT_QUARANTINED)
