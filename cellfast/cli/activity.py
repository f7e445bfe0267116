"""``cellfast activity``: which treatments do something, against the controls of their plates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellfast.cli.profile_inputs import MARKED, input_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("wells", type=click.Path(path_type=Path), metavar="WELLS")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Hit table to write: .parquet, .csv or .csv.gz; tables of compounds and doses, and a .json, go beside it.",
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "correlation", "euclidean"]),
    default="cosine",
    show_default=True,
    help="Similarity of average precision and of the nearest treatments.",
)
@click.option(
    "--across",
    type=click.Choice(["none", "plate", "batch"]),
    default="none",
    show_default=True,
    help="Rank only wells of another plate, or batch, than the query's, replicates and controls alike.",
)
@click.option(
    "--hit-by",
    type=click.Choice(["map", "mahalanobis", "e_distance"]),
    default="map",
    show_default=True,
    help="Whose p-value, of labels exchanged with controls of the same plates, calls a hit.",
)
@click.option(
    "--fdr",
    "false_discovery_rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Largest false discovery rate of a hit.",
)
@click.option(
    "--null-size",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Random ranks drawn for the p-values that copairs gives.",
)
@click.option(
    "--permutations",
    "num_permutations",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Exchanges of labels with controls; the smallest p-value is one over one more.",
)
@click.option("--neighbours", type=click.IntRange(min=1), default=3, show_default=True, help="Nearest treatments listed.")
@input_options(MARKED)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all random draws.")
def activity(wells: Path, output: Path, **options: Any) -> None:
    """Find active treatments: each against the controls of its plates.

    WELLS are well profiles with their controls, standardised but not sphered: cellfast profile EMBEDDINGS --level well --normalize
    standardize -o wells.parquet. For every treatment and compound:
    mean average precision against controls and against all wells, with p-values and q-values equal to copairs'; p-values of labels
    exchanged with controls of the same plates, which plate effects do not make small; distances, induction, ratio of cell counts,
    nearest treatments and MoAs; per compound the dose response; beside it what cell count alone gets.
    """
    from cellfast.metadata.columns import parse_column_overrides
    from cellfast.profiles.activity import ActivityOptions, score_activity
    from cellfast.profiles.hits import activity_lines, write_hits
    from cellfast.profiles.results import read_annotated
    from cellfast.profiles.table import check_output

    check_output(output)
    join = {name: options.pop(name) for name in ("metadata", "moa", "features")}
    join["columns"] = parse_column_overrides(options.pop("columns"))
    found = score_activity(read_annotated(wells, **join), ActivityOptions(**options))
    for line in activity_lines(found):
        click.echo(line)
    for path in write_hits(found, output):
        click.echo(f"written   {path}")
