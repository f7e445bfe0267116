"""``cellfast embed``: every cell of a screen to one row of features."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("screen", type=click.Path(path_type=Path))
@click.option(
    "--model", "model_path", type=click.Path(path_type=Path), required=True, help="Run folder of cellfast train, or its model.pt."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for one parquet file per plate.")
@click.option(
    "--features", type=click.Choice(["h", "z"]), default="h", show_default=True, help="Encoder output h, or projection z."
)
@click.option("--batch-size", type=int, default=256, show_default=True, help="Cells per minibatch.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
@click.option("--amp/--no-amp", default=False, help="bfloat16 autocast.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@click.option("--force", is_flag=True, help="Replace files of another model or other crops.")
def embed(
    screen: Path,
    model_path: Path,
    out: Path,
    features: str,
    batch_size: int,
    device: str,
    amp: bool,
    threads: int | None,
    force: bool,
) -> None:
    """Embed every cell of SCREEN: one parquet file per plate, metadata columns and one column per feature.

    Plates that were embedded before by the same model from the same crops are kept.
    """
    import torch

    from cellfast.embedding.embed_store import embed_screen
    from cellfast.model_file import load_model
    from cellfast.screens import Screen
    from cellfast.training.devices import amp_warning, choose_device

    where = choose_device(device)
    if threads:
        torch.set_num_threads(threads)
    if amp and (warning := amp_warning(where)):
        click.echo(warning, err=True)
    summary = embed_screen(
        Screen.open(screen),
        load_model(model_path, where),
        out,
        features=features,
        batch_size=batch_size,
        device=where,
        amp=amp,
        force=force,
    )
    click.echo(
        f"{summary.cells:,} cells = {summary.cells:,} rows of {summary.num_features} features in {summary.plates} files, {out}"
    )
