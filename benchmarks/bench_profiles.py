"""Profiles and evaluation: ``python benchmarks/bench_profiles.py [--subject aggregate] [--out benchmarks/results/evaluate.json]``."""

from __future__ import annotations

import json

import click

from cellfast.atomic import write_json
from cellfast.benchmark import environment
from cellfast.benchmark.evaluate import SUBJECTS, measure_evaluate


@click.command()
@click.option("--subject", "subjects", multiple=True, type=click.Choice(SUBJECTS), help="Measure only these; repeat for several.")
@click.option("--cells", default=1_000_000, show_default=True, help="Cells aggregated.")
@click.option("--wells", default=2_000, show_default=True)
@click.option("--features", default=512, show_default=True)
@click.option("--treatments", default=30_000, show_default=True, help="Profiles whose neighbours are searched.")
@click.option("--large", default=116_000, show_default=True, help="Profiles of the memory measurement.")
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--reference-dir", type=click.Path(exists=True, file_okay=False), help="A checkout of the reference implementation."
)
@click.option("--out", type=click.Path(), help="Write the result as JSON.")
def main(
    subjects: tuple[str, ...],
    cells: int,
    wells: int,
    features: int,
    treatments: int,
    large: int,
    repeats: int,
    reference_dir: str | None,
    out: str | None,
) -> None:
    """Times of aggregation, neighbours and evaluation beside their floors and the tools in use."""
    result = measure_evaluate(
        subjects or SUBJECTS,
        num_cells=cells,
        num_wells=wells,
        num_features=features,
        num_treatments=treatments,
        num_large=large,
        repeats=repeats,
        reference_dir=reference_dir,
    )
    click.echo(json.dumps(result, indent=2))
    if out:
        write_json(out, {"subject": "evaluate", "quick": False, "environment": environment(), "result": result})


if __name__ == "__main__":
    main()
