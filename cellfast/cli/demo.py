"""``cellfast demo``: the whole path on a small simulated screen, each step shown as the command a user would type."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path), default="demo")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the simulation and of the training.")
@click.option("--fresh", is_flag=True, help="Do every step again, even those already done.")
def demo(out: Path, seed: int, fresh: bool) -> None:
    """Run the whole path on a small simulated screen in OUT.

    Simulate, ingest, train, embed, profile, evaluate; the same with a randomly initialised encoder for comparison. Steps already
    done in OUT with the same command are not done again.
    """
    from cellfast.demo import run_demo

    run_demo(out, seed=seed, fresh=fresh, echo=click.echo)
