"""Augmentation throughput: ``python benchmarks/bench_augment.py [--device cuda] [--out benchmarks/results/augment.json]``."""

from __future__ import annotations

import click
import torch

from cellfast.atomic import write_json
from cellfast.benchmark.augment import measure_augment


@click.command()
@click.option("--batch-size", default=256, show_default=True)
@click.option("--channels", default=3, show_default=True)
@click.option("--crop-size", default=112, show_default=True)
@click.option("--output-size", default=96, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", type=int, help="Threads of torch on the CPU.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(), help="Write the result as JSON.")
def main(
    batch_size: int,
    channels: int,
    crop_size: int,
    output_size: int,
    repeats: int,
    threads: int | None,
    device: str,
    out: str | None,
) -> None:
    """Cells per second (two views each) of the augmentation beside Kornia's own modules."""
    if threads is not None:
        torch.set_num_threads(threads)
    result = measure_augment(
        batch_size=batch_size, num_channels=channels, crop_size=crop_size, output_size=output_size, repeats=repeats, device=device
    )  # fmt: skip
    for name, rate in result["rates"].items():
        click.echo(f"{name:40s} best {rate['best']:10,.0f}  median {rate['median']:10,.0f} cells/s")
    if out:
        write_json(out, result)


if __name__ == "__main__":
    main()
