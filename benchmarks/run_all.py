"""Run ``cellfast benchmark`` for every subject, a JSON file each: ``python benchmarks/run_all.py --out benchmarks/results [--quick]``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from cellfast.benchmark import SUBJECTS


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="benchmarks/results", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(SUBJECTS)), help="Measure only this; repeatable.")
@click.option("--quick", is_flag=True, help="Small sizes: shows that everything runs; the figures say little.")
def main(out: Path, only: tuple[str, ...], quick: bool) -> None:
    """One after the other, each in a process of its own. With anything else at work on the machine the figures mean nothing."""
    for name in only or SUBJECTS:
        click.echo(f"{name} ...")
        command = [sys.executable, "-m", "cellfast", "benchmark", name, "-o", str(out / f"{name}.json")]
        done = subprocess.run(command + (["--quick"] if quick else []), stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
