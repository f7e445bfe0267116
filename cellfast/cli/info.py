"""``cellfast info``: a screen, a model, or the system."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("screen", metavar="[SCREEN|MODEL]", type=click.Path(path_type=Path), required=False)
@click.option("--system", is_flag=True, help="Versions, devices, and which backends are built and loadable.")
@click.option("--verify", is_flag=True, help="Read all pixels and compare them with their checksums.")
@click.option("--montage", type=click.Path(path_type=Path, dir_okay=False), help="Write a PNG of cells drawn at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which cells the montage shows.")
@click.option(
    "--allow-unfinished",
    is_flag=True,
    help="Describe what is there of an ingest or an embedding that has not ended.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(
    screen: Path | None, system: bool, verify: bool, montage: Path | None, seed: int, allow_unfinished: bool, as_json: bool
) -> None:
    """Describe SCREEN: plates, wells, fields, cells, treatments, MoAs, controls, channels, size, integrity.

    Or MODEL, a run folder, a model file or an exported file: what it takes, and where it comes from. Or a folder of embeddings:
    its ledger, and with --verify whether its files are as they were written. --json also tells where each plate's pixels lie in
    its file.
    """
    import json

    if (screen is None) != system:
        raise click.UsageError("give either SCREEN, MODEL or --system")
    if screen is None:
        from cellfast.system import format_report, system_report

        report = system_report()
        click.echo(json.dumps(report, indent=2) if as_json else format_report(report))
        return
    if (screen / "model.pt").exists() or screen.suffix in (".pt", ".ts", ".torchscript", ".pt2", ".onnx"):
        if verify or montage:
            raise click.UsageError(f"--verify and --montage are for screens; {screen} is a model")
        click.echo(_describe_model(screen, as_json))
        return
    from cellfast.embeddings_folder import open_folder

    if (folder := open_folder(screen)) is not None:
        if montage:
            raise click.UsageError(f"--montage is for screens; {screen} is an embedding")
        if trouble := folder.check_finished(allow_unfinished=allow_unfinished):
            click.echo(trouble, err=True)
        if verify:
            folder.check_all()
        description = {**folder.describe(), **({"verified": True} if verify else {})}
        text = json.dumps(description, indent=2, ensure_ascii=False)
        click.echo(text if as_json else "\n".join(f"{key:<13}{value}" for key, value in description.items()))
        return
    from cellfast.progress import Progress
    from cellfast.screens import Screen
    from cellfast.screens.summary import format_summary, summarize, write_montage
    from cellfast.screens.summary import verify as verify_screen

    opened = Screen.open(screen, allow_unfinished=allow_unfinished)
    if opened.unfinished:
        click.echo(f"{screen}: {opened.unfinished}", err=True)
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
            + (
                "every crop equals its checksum"
                if verify
                else "files and tables are whole; --verify compares every crop with its checksum"
            )
        )
    if montage:
        write_montage(opened, montage, seed=seed)
        click.echo(f"montage      {montage}", err=as_json)


def _describe_model(path: Path, as_json: bool) -> str:
    import json

    from cellfast.export import is_exported, read_export_metadata
    from cellfast.model_file import format_description, load_model

    if path.suffix in (".ts", ".torchscript", ".pt2", ".onnx") or is_exported(path):
        return json.dumps(read_export_metadata(path), indent=2, ensure_ascii=False)
    description = load_model(path).describe()
    return json.dumps(description, indent=2, ensure_ascii=False) if as_json else format_description(description)
