"""Options of the commands that read a table of profiles: what is joined, and what its columns are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--group-by",
        multiple=True,
        metavar="COLUMN",
        help="Tell treatments apart by this column too, such as the cell line; repeat for several.",
    ),
    click.option(
        "--pool",
        multiple=True,
        metavar="COLUMN",
        help="Take wells that differ in this column (cell line, time, …) as one treatment; repeat for several.",
    ),
    click.option(
        "--batch-regex",
        "batch_regex",
        metavar="REGEX",
        help="Take the batch from the plate name: the first group of this regular expression.",
    ),
    click.option(
        "--metadata",
        type=click.Path(path_type=Path),
        help="Table of plate, well, compound, concentration to join, such as BBBC021_v1_image.csv.",
    ),
    click.option(
        "--moa",
        type=click.Path(path_type=Path),
        help="Table of compound, concentration, MoA to join, such as BBBC021_v1_moa.csv.",
    ),
    click.option(
        "--features",
        multiple=True,
        metavar="PATTERN",
        help="Prefix or regular expression of feature names; repeat for several. Default: inferred.",
    ),
    click.option(
        "--column",
        "columns",
        multiple=True,
        metavar="NAME=COLUMN",
        help="Where plate, well, site, batch, compound, concentration or moa is, if not found.",
    ),
)


def input_options(controls: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add these options to a command, in this order; ``controls``: what the command takes controls for."""
    query = click.option("--controls", metavar="QUERY", help=controls)

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed((query, *_OPTIONS)):
            command = option(command)
        return command

    return add


MARKED = "Rows that are controls. Default: as marked by cellfast profile, else DMSO."
