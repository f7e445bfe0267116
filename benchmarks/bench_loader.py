"""Loader throughput: ``python benchmarks/bench_loader.py [--screen SCREEN] [--out benchmarks/results/loader.json]``."""

from __future__ import annotations

import click

from cellfast.atomic import write_json
from cellfast.benchmark.loader import measure_loader


@click.command()
@click.option("--screen", type=click.Path(exists=True), help="A screen folder; random plates without it.")
@click.option("--cells", default=20_000, show_default=True, help="Cells of the random plates.")
@click.option("--crop-size", default=112, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Threads of the multi-threaded gather.")
@click.option("--dali/--no-dali", default=True, show_default=True)
@click.option("--out", type=click.Path(), help="Write the result as JSON.")
def main(
    screen: str | None, cells: int, crop_size: int, batch_size: int, repeats: int, threads: int, dali: bool, out: str | None
) -> None:
    """Cells per second of the loaders beside a plain copy."""
    opened = None
    if screen is not None:
        from cellfast.screens import Screen

        opened = Screen.open(screen)
    result = measure_loader(
        opened, num_cells=cells, crop_size=crop_size, batch_size=batch_size, repeats=repeats, threads=threads, dali=dali
    )  # fmt: skip
    for name, rate in result["rates"].items():
        share = result["fraction_of_memcpy"][name]
        click.echo(
            f"{name:40s} best {rate['best']:10,.0f}  median {rate['median']:10,.0f} cells/s  {100 * share:5.0f} % of memcpy"
        )
    if out:
        write_json(out, result)


if __name__ == "__main__":
    main()
