"""Measure every subject and write one JSON file each: ``python benchmarks/run_all.py --out benchmarks/results [--quick]``."""

from __future__ import annotations

from pathlib import Path

import click

from cellfast.benchmark import SUBJECTS
from cellfast.cli.benchmark import run_subject


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="benchmarks/results", show_default=True)
@click.option("--quick", is_flag=True)
def main(out: Path, quick: bool) -> None:
    """Run them one after the other; they share the machine with nothing else, or the figures mean nothing."""
    for name in SUBJECTS:
        click.echo(f"{name} ...")
        run_subject(name, quick=quick, out=out / f"{name}.json")
        click.echo(f"written {out / name}.json")


if __name__ == "__main__":
    main()
