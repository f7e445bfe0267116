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

    Several processes: torchrun --standalone --nproc-per-node N -m cellfast train SCREEN -o RUN …; the loss is then over the global minibatch.
    """
    from cellfast.errors import CellfastError
    from cellfast.training.config import parse_assignment, resolve_config

    if screen.is_file():
        raise CellfastError(
            f"{screen} is a file; training takes a SCREEN folder of crops. From kept fields: cellfast ingest fields IMAGE_CSV --image-root "
            f"{screen} --locations … -o SCREEN (docs/device.md tells why minibatches are not fed from fields)"
        )
    overrides = {key: value for key, value in options.items() if value is not None}
    overrides.update(parse_assignment(text) for text in assignments)
    if resume and config_file is None and (run / "config.yaml").exists():
        config_file = run / "config.yaml"
    config = resolve_config(recipe, config_file, overrides)
    from cellfast.training.loop import train as run_training

    # Of torchrun's processes one speaks.
    first = int(os.environ.get("RANK", "0")) == 0
    result = run_training(screen, run, config, resume=resume, force=force, allow_unfinished=allow_unfinished, say=click.echo)
    if result.interrupted:
        if first:
            click.echo(f"stopped at step {result.steps}; go on with: cellfast train {screen} -o {run} --resume")
        sys.exit(130)
    if first and result.steps and result.cells_per_second:
        click.echo(f"{result.steps} steps, {result.cells_per_second:,.0f} cells/s; model {result.model}")
