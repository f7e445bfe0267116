"""``cellfast info``: a screen, or the system."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("screen", type=click.Path(path_type=Path), required=False)
@click.option("--system", is_flag=True, help="Versions, devices, and which backends are built and loadable.")
@click.option("--verify", is_flag=True, help="Read all pixels and compare them with their checksums.")
@click.option("--montage", type=click.Path(path_type=Path, dir_okay=False), help="Write a PNG of cells drawn at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which cells the montage shows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(screen: Path | None, system: bool, verify: bool, montage: Path | None, seed: int, as_json: bool) -> None:
    """Describe SCREEN: plates, wells, fields, cells, treatments, MoAs, controls, channels, size, integrity."""
    import json

    if (screen is None) == (not system):
        raise click.UsageError("give either SCREEN or --system")
    if system:
        from cellfast.system import format_report, system_report

        report = system_report()
        click.echo(json.dumps(report, indent=2) if as_json else format_report(report))
        return
    from cellfast.progress import Progress
    from cellfast.screens import Screen
    from cellfast.screens.summary import format_summary, summarize, write_montage
    from cellfast.screens.summary import verify as verify_screen

    opened = Screen.open(screen)
    summary = summarize(opened)
    if verify:
        with Progress("verify", opened.num_cells, "cells") as progress:
            verify_screen(opened, progress.advance)
        summary["verified"] = True
    if as_json:
        click.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        click.echo(format_summary(summary))
        click.echo(
            "integrity    "
            + ("every crop equals its checksum" if verify else "files are whole; --verify compares every crop with its checksum")
        )
    if montage:
        write_montage(opened, montage, seed=seed)
        click.echo(f"montage      {montage}", err=as_json)
