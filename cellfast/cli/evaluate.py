"""``cellfast evaluate``: NSC, NSCB and drop of profiles, with intervals and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellfast.cli.profile_inputs import MARKED, input_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("profiles", nargs=-1, type=click.Path(path_type=Path), metavar="PROFILES")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Result to write, .json; pictures and the per-treatment table go beside it.",
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A.json B.json",
    help="Compare two results instead: paired difference B - A.",
)
@click.option(
    "--level",
    type=click.Choice(["treatment", "well"]),
    default="treatment",
    show_default=True,
    help="treatment: rows of a treatment become one; well: rows as they are.",
)
@click.option(
    "--aggregate",
    type=click.Choice(["mean", "median"]),
    default="median",
    show_default=True,
    help="Wells to treatments, where PROFILES holds wells.",
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "correlation", "euclidean"]),
    default="cosine",
    show_default=True,
    help="Distance between profiles.",
)
@click.option(
    "-k", type=click.IntRange(min=1), default=1, show_default=True, help="Nearest neighbours that vote; the nearer wins a draw."
)
@click.option(
    "--batch-rule",
    type=click.Choice(["overlap", "joined", "plates"]),
    default="overlap",
    show_default=True,
    help="Same batch: overlap, a common batch; joined, equal sets of batches (the published convention, as "
    "DeepProfilerExperiments); plates, equal sets of plates.",
)
@click.option(
    "--one-batch-moas",
    type=click.Choice(["exclude", "queries", "keep"]),
    default="exclude",
    show_default=True,
    help="MoAs of a single batch under NSCB: exclude as queries and candidates, as queries only, or keep.",
)
@click.option(
    "--unanswerable",
    type=click.Choice(["exclude", "count"]),
    default="exclude",
    show_default=True,
    help="Profiles without any candidate of their MoA: exclude as queries, or count as wrong (the published convention).",
)
@input_options(MARKED)
@click.option(
    "--wells", type=click.Path(path_type=Path), help="Wells of these treatments, for replicate reproducibility and precision."
)
@click.option(
    "--permutations",
    "num_permutations",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="Random exchanges of MoAs among compounds of the same batches.",
)
@click.option(
    "--precision/--no-precision",
    "average_precision",
    default=True,
    show_default=True,
    help="Mean average precision and replicate reproducibility.",
)
@click.option(
    "--map",
    type=click.Choice(["tsne", "umap", "pca", "none"]),
    default="tsne",
    show_default=True,
    help="Map of the profiles in the pictures.",
)
@click.option("--pictures/--no-pictures", default=True, show_default=True, help="Write PNG pictures.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the permutations, the replicates' null and the map.")
def evaluate(profiles: tuple[Path, ...], output: Path | None, compare: tuple[Path, Path] | None, **options: Any) -> None:
    """Score profiles by mechanism of action: NSC, NSCB and drop.

    NSC asks whether the nearest profile of another compound has the same MoA; NSCB leaves out the same batch as well. Every
    score comes with its counts, a 95 % interval over MoAs, what chance gives in the same batches, and what was left out and why. A compound
    of several MoAs (a|b) is right with either. Equally near neighbours count by the expectation over a random choice among them;
    identical profiles of different treatments are refused.
    """
    if compare:
        if profiles:
            raise click.UsageError("--compare takes two results and no PROFILES.")
        _compare(compare, output)
        return
    if len(profiles) != 1 or output is None:
        raise click.UsageError("Give one PROFILES file and -o RESULT.json, or --compare A.json B.json.")
    from cellfast.api import evaluate as score
    from cellfast.profiles.report import evaluation_lines

    scored = score(profiles[0], output, **options)
    for line in evaluation_lines(scored.evaluation.result):
        click.echo(line)
    for path in scored.files:
        click.echo(f"written   {path}")


def _compare(paths: tuple[Path, Path], output: Path | None) -> None:
    from cellfast.atomic import write_json
    from cellfast.profiles.compare import compare_results, load_result
    from cellfast.profiles.report import comparison_lines

    report = compare_results(load_result(paths[0]), load_result(paths[1]))
    for line in comparison_lines(report):
        click.echo(line)
    if output is not None:
        write_json(output, {"a": paths[0].name, "b": paths[1].name, **report})
        click.echo(f"written   {output}")
