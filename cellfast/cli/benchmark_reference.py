"""``cellfast benchmark reference``: cellfast compared with the reference implementation or a plain baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from cellfast.benchmark.reference.table import LEAST_SEEDS, PARTS, QUICK, SECTIONS, Settings

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option(
    "--reference-dir",
    type=_FOLDER,
    help="A checkout of SamriddhiJain/SimCLR-for-cell-profiling, used as it is.  [default: a plain PyTorch baseline stands in]",
)
@click.option("--reference-python", help="Python of an environment the checkout runs in.  [default: this one]")
@click.option("--screen", type=_FOLDER, help="Cells to use: a screen of three channels.  [default: a simulated one]")
@click.option("--section", "sections", multiple=True, type=click.Choice(SECTIONS), help="Measure only these; repeatable.")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Of the parts only these; repeatable.")
@click.option("--cells", type=click.IntRange(min=16), help="Cells taken from the screen.  [default: up to 1,000]")
@click.option("--encoder", type=click.Choice(["resnet18", "resnet50", "resnet101"]), help="[default: resnet18]")
@click.option("--batch-size", type=click.IntRange(min=2), help="Cells per minibatch.  [default: 256; quality 128]")
@click.option("--size", type=click.IntRange(min=16), help="Side of what the encoder sees, px.  [default: 96; quality 56]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each side.  [default: 2]")
@click.option("--repeats", type=click.IntRange(min=1), help="Timings of each part.  [default: 5, slow ones 3]")
@click.option("--quality-steps", type=click.IntRange(min=1), help="Minibatches of each training of 'quality'.  [default: 40]")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help=f"Trainings of each kind in 'quality'; with fewer than {LEAST_SEEDS} nothing is said about which is better.  [default: {LEAST_SEEDS}; with --quick 1]",
)
@click.option("--quick", is_flag=True, help="Small sizes: under three minutes. The figures say little.")
@click.option("--update", is_flag=True, help="Keep the sections of an earlier --out that are not measured now.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write OUT.json, and the report OUT.md beside it."
)
def reference(
    reference_dir: Path | None, reference_python: str | None, screen: Path | None, sections: tuple[str, ...], parts: tuple[str, ...],
    cells: int | None, quality_steps: int | None, seeds: int | None, quick: bool, update: bool, out: Path | None, repeats: int | None,
    **sizes: str | int | None,
) -> None:  # fmt: skip
    """The whole path, compared with the reference implementation (your checkout of it) or a plain PyTorch baseline.

    Same cells, machine, threads, encoder, minibatch and input size; random weights on both sides; every measurement in a process
    of its own.
    """
    if out is not None and out.suffix != ".json":
        raise click.UsageError(f"--out must end in .json, got {out}")
    if update and out is None:
        raise click.UsageError("--update needs --out: the file whose other sections are kept")
    from cellfast.atomic import write_json, write_text
    from cellfast.benchmark.reference.measure import measure_reference
    from cellfast.benchmark.reference.report import document, markdown

    chosen = {key: value for key, value in sizes.items() if value is not None}
    if repeats is not None:
        chosen |= {"repeats": repeats, "slow_repeats": min(repeats, 3)}
    click.echo(
        "compared with "
        f"{f'the reference in {reference_dir}' if reference_dir else 'a plain PyTorch baseline (no --reference-dir)'}"
    )
    result = measure_reference(
        reference_dir=str(reference_dir) if reference_dir else None,
        reference_python=reference_python,
        screen=str(screen) if screen else None,
        sections=sections or SECTIONS,
        parts=parts or None,
        quick=quick,
        num_cells=cells,
        settings=replace(QUICK if quick else Settings(), **chosen),
        quality_settings=replace(QUICK if quick else Settings(batch_size=128, size=56), **chosen),
        quality_steps=quality_steps,
        seeds=seeds,
        say=click.echo,
    )
    written = document(result, quick=quick, earlier=out if update else None)
    if out is None:
        click.echo("\n" + markdown(written))
        return
    write_json(out, written)
    write_text(out.with_suffix(".md"), markdown(written))
    click.echo(f"written {out} and {out.with_suffix('.md')}", err=True)
