"""``cellfast profile``: cells to wells to treatments, normalised on controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellfast.cli.profile_inputs import input_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Profiles to write: .parquet, .csv or .csv.gz."
)
@click.option(
    "--level",
    type=click.Choice(["cell", "site", "well", "treatment"]),
    default="treatment",
    show_default=True,
    help="What is written.",
)
@click.option(
    "--normalize",
    multiple=True,
    metavar="STEP",
    help="none, standardize, robustize, mad_robustize, center, rank, pca, sphering, coral, tvn (sphering, then CORAL per batch) or harmony; "
    "repeat for several steps, done in the order given. A step may carry options of its own: standardize:by=all,controls=all, pca:n=64. "
    "Default: those of --recipe.",
)
@click.option(
    "--recipe",
    type=click.Choice(["default", "perakis2021"]),
    help="Steps under a name. default: standardize:by=all,controls=all, center:towards=batch, tvn; perakis2021, the reference "
    "implementation's: tvn:lambda=1.",
)
@click.option(
    "--by",
    type=click.Choice(["plate", "batch", "all"]),
    help="Fit per plate, per batch, or once. Default: scaling and centring per plate, sphering once, CORAL per batch.",
)
@click.option(
    "--lambda",
    "lam",
    metavar="VALUE",
    help="Regularisation of sphering: auto (Ledoit-Wolf; default), a number, or a multiple of the mean eigenvalue as 0.1x.",
)
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0),
    help="Sphering with pycytominer's regularisation instead of --lambda: added to the singular values.",
)
@click.option(
    "--rotation",
    type=click.Choice(["pca", "zca", "pca-cor", "zca-cor"]),
    help="Axes of sphered profiles. Default: pca; zca where fitted per plate or batch.",
)
@click.option(
    "--cell-aggregate", type=click.Choice(["mean", "median"]), default="mean", show_default=True, help="Cells to sites and wells."
)
@click.option(
    "--aggregate",
    type=click.Choice(["mean", "median", "modz"]),
    default="median",
    show_default=True,
    help="Wells to treatments; modz: mean weighted by the wells' correlation with each other.",
)
@click.option(
    "--normalize-at",
    type=click.Choice(["cell", "site", "well"]),
    default="well",
    show_default=True,
    help="The level that is normalised.",
)
@input_options("Rows to fit on, e.g. \"Metadata_Compound == 'DMSO'\"; 'all' takes every row. Default: DMSO.")
@click.option(
    "--select",
    multiple=True,
    type=click.Choice(["variance", "frequency", "correlation", "nan"]),
    help="Feature selection before pca, sphering, coral, tvn or harmony, whichever comes first; repeat for several.",
)
@click.option(
    "--missing-cutoff",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Features missing in more than this share of wells are dropped.",
)
@click.option(
    "--allow-unfinished", is_flag=True, help="Use what is there of an embedding that is not finished, and say what is missing."
)
@click.option(
    "--wells-output",
    type=click.Path(path_type=Path),
    help="Write the normalised wells too (for replicate reproducibility in evaluate --wells).",
)
def profile(inputs: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Aggregate cells to wells and treatments, normalised on control wells.

    INPUT is a folder of embeddings (cellfast embed), or .parquet, .csv, .csv.gz or DeepProfiler .npz files of cells or wells.
    What was read, joined, left out and fitted is printed, and written as JSON beside the profiles.
    """
    from cellfast.api import profile as build
    from cellfast.profiles.report import profile_lines

    wells = options["wells_output"]
    built = build(inputs, output, **options)
    for line in profile_lines(built.built.report):
        click.echo(line)
    report = output.with_name(output.name.split(".")[0] + ".report.json")
    click.echo(f"profiles {output}  report {report}" + (f"  wells {wells}" if wells else ""))
