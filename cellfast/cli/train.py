"""``cellfast train``: every value of the configuration is an option of its own name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from cellfast.cli.declared_options import declared_options
from cellfast.training.config import RECIPES, TrainConfig


@click.command()
@click.argument("screen", type=click.Path(path_type=Path))
@click.option("-o", "--out", "run", type=click.Path(path_type=Path), required=True, help="Run folder to write.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of values; options on the command line win."
)
@click.option("--recipe", type=click.Choice(list(RECIPES)), help="Set of defaults to start from: perakis2021 is the reference's.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any value, also augment.NAME; repeatable.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint; from the beginning where there is none yet.")
@click.option("--force", is_flag=True, help="Discard a run that is in the folder.")
@click.option(
    "--allow-unfinished", is_flag=True, help="Train on the plates that are there of a SCREEN whose ingest has not ended."
)
@declared_options(TrainConfig, leave=("recipe",))
def train(
    screen: Path,
    run: Path,
    config_file: Path | None,
    recipe: str | None,
    assignments: tuple[str, ...],
    resume: bool,
    force: bool,
    allow_unfinished: bool,
    **options: Any,
) -> None:
    """Train an encoder on SCREEN's cells by contrastive learning (SimCLR) and write RUN.

    Several processes: torchrun --standalone --nproc-per-node N -m cellfast train SCREEN -o RUN …; the loss is then over the
    global minibatch.
    """
    from cellfast.api import train as run_training
    from cellfast.errors import option
    from cellfast.training.config import check_keys, parse_assignment

    options = {name: value for name, value in options.items() if value is not None}
    assigned = dict(parse_assignment(text) for text in assignments)
    check_keys((name.partition(".")[0] for name in assigned), option("set"))
    options.update(assigned)
    result = run_training(
        screen,
        run,
        config=config_file,
        recipe=options.pop("recipe", recipe),
        resume=resume,
        force=force,
        allow_unfinished=allow_unfinished,
        say=click.echo,
        **options,
    )
    # Of torchrun's processes one speaks.
    first = int(os.environ.get("RANK", "0")) == 0
    if result.interrupted:
        if first:
            click.echo(f"stopped at step {result.steps}; go on with: cellfast train {screen} -o {run} --resume")
        sys.exit(130)
    if first and result.steps and result.cells_per_second:
        click.echo(f"{result.steps} steps, {result.cells_per_second:,.0f} cells/s; model {result.model}")
