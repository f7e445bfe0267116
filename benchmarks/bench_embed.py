"""Embedding: ``python benchmarks/bench_embed.py [--out benchmarks/results/embed.json]``."""

from __future__ import annotations

import json

import click

from cellfast.atomic import write_json
from cellfast.benchmark import environment
from cellfast.benchmark.embed import measure_embed


@click.command()
@click.option("--encoder", default="resnet18", show_default=True)
@click.option("--stem", default="imagenet", show_default=True)
@click.option("--fields", default=24, show_default=True)
@click.option("--cells-per-field", default=64, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--amp/--no-amp", default=False)
@click.option("--device", default="cpu", show_default=True)
@click.option("--processes/--no-processes", default=True, show_default=True, help="Measure 1 and 2 processes too.")
@click.option("--out", type=click.Path(), help="Write the result as JSON.")
def main(
    encoder: str,
    stem: str,
    fields: int,
    cells_per_field: int,
    batch_size: int,
    repeats: int,
    amp: bool,
    device: str,
    processes: bool,
    out: str | None,
) -> None:
    """Cells per second from fields and from the crop store beside the bare encoder."""
    result = measure_embed(
        encoder=encoder,
        stem=stem,
        fields=fields,
        cells_per_field=cells_per_field,
        batch_size=batch_size,
        repeats=repeats,
        amp=amp,
        device=device,
        processes=processes,
    )
    click.echo(json.dumps(result, indent=2))
    if out:
        write_json(out, {"subject": "embed", "quick": False, "environment": environment(), "result": result})


if __name__ == "__main__":
    main()
