"""``cellfast simulate``: write a simulated screen."""

from __future__ import annotations

from pathlib import Path

import click


def _parse_moas(text: str | None) -> tuple[str, ...] | None:
    """MoA names from a count (``6``: the first six) or from names separated by commas, in any case."""
    if text is None:
        return None
    from cellfast.screens.simulate import MOA_NAMES

    if text.strip().isdigit():
        count = int(text)
        if not 1 <= count <= len(MOA_NAMES):
            raise click.UsageError(f"--moas must be between 1 and {len(MOA_NAMES)}, got {count}.")
        return MOA_NAMES[:count]
    by_lower = {name.lower(): name for name in MOA_NAMES}
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name.lower() not in by_lower]
    if unknown or not names:
        raise click.UsageError(f"--moas: unknown {', '.join(map(repr, unknown)) or repr(text)}; known: {', '.join(MOA_NAMES)}.")
    return tuple(by_lower[name.lower()] for name in names)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=True))
@click.option(
    "--preset",
    type=click.Choice(["demo", "small", "bbbc021"]),
    default="demo",
    show_default=True,
    help="Where the defaults come from.",
)
@click.option("--plates", type=int, help="Plates in all.")
@click.option("--weeks", type=int, help="Experimental batches the plates are spread over.")
@click.option("--replicates", type=int, help="Wells of each treatment, each on another plate of its week (2 or more).")
@click.option("--sites", type=int, help="Fields per well.")
@click.option("--wells", type=int, help="Most wells used on a plate, controls included (up to 60).")
@click.option("--controls", type=int, help="DMSO wells per plate (1 to 12).")
@click.option("--moas", metavar="COUNT|NAME,NAME", help="Mechanisms of action: how many, or which.")
@click.option("--compounds-per-moa", type=int, help="Compounds of each MoA (2 or more).")
@click.option("--doses", type=int, help="Concentrations of each compound.")
@click.option("--cells-per-field", type=float, help="Mean number of cells in an untreated field.")
@click.option("--field-size", type=int, nargs=2, metavar="HEIGHT WIDTH", help="Size of a field, px.")
@click.option("--scale", type=float, help="Size of a cell; 1 is BBBC021's (nuclei 34 px across), 0.6 fits 48 px crops.")
@click.option("--strength", type=float, help="Factor on all treatment effects; 0 is a screen of inactive compounds.")
@click.option("--position", type=float, help="Factor on the effects of a well's place on its plate (edge, row, column); 0: none.")
@click.option("--compression", type=click.Choice(["none", "lzw"]), help="Compression of the TIFFs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed and options: the same bytes.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option("--force", is_flag=True, help="Replace an earlier simulated screen in OUT.")
def simulate(
    out: Path,
    preset: str,
    moas: str | None,
    field_size: tuple[int, int] | None,
    workers: int | None,
    force: bool,
    **options: object,
) -> None:
    """Simulate a screen in BBBC021's layout: TIFF fields, image table, MoA table, nucleus centres and the truth.

    \b
    demo     6 plates over 3 weeks, 6 MoAs × 3 compounds × 2 doses, about 10,000 cells
    small    4 plates over 2 weeks, 4 MoAs × 2 compounds × 1 dose, about 500 cells
    bbbc021  55 plates over 10 weeks, 12 MoAs × 3 compounds × 3 doses, 1024 × 1280 px: about 20 GB
    """
    from cellfast.screens.simulate import PRESETS, simulate_screen, with_options

    config = with_options(
        PRESETS[preset], moas=_parse_moas(moas), field_size=tuple(field_size) if field_size else None, **options
    )
    summary = simulate_screen(out, config, workers=workers, force=force, progress=True)
    share = summary.num_responding_cells / max(summary.num_treated_cells, 1)
    click.echo(
        f"{summary.num_cells:,} cells in {summary.num_fields:,} fields, {summary.num_wells:,} wells, {summary.num_plates} plates, "
        f"{summary.num_weeks} weeks ({summary.num_bytes / 1e6:,.0f} MB of images)"
    )
    click.echo(
        f"{summary.num_treatments} treatments: {summary.num_compounds} compounds, {summary.num_moas} MoAs; DMSO as control"
    )
    click.echo(f"{100 * share:.0f} % of the {summary.num_treated_cells:,} cells in treated wells respond")
    click.echo(
        f"images     {out / 'images'}\ntables     {out / 'image.csv'}, {out / 'moa.csv'}\nlocations  {out / 'locations'}\ntruth      {out / 'simulation.json'}"
    )
