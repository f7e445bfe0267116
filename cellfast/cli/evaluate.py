"""``cellfast evaluate``: NSC, NSCB and drop of profiles, with intervals and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


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
    type=click.Choice(["joined", "overlap", "plates"]),
    default="joined",
    show_default=True,
    help="Same batch: joined, equal sets of batches (as DeepProfilerExperiments); overlap, a common batch; plates, "
    "equal sets of plates.",
)
@click.option(
    "--group-by",
    multiple=True,
    metavar="COLUMN",
    help="Tell treatments apart by this column too, such as the cell line; repeat for several.",
)
@click.option(
    "--pool",
    multiple=True,
    metavar="COLUMN",
    help="Take wells that differ in this column (cell line, time, …) as one treatment; repeat for several.",
)
@click.option(
    "--batch-regex",
    metavar="REGEX",
    help="Take the batch from the plate name: the first group of this regular expression.",
)
@click.option(
    "--one-batch-moas",
    type=click.Choice(["exclude", "queries", "keep"]),
    default="exclude",
    show_default=True,
    help="MoAs of a single batch under NSCB: exclude as queries and candidates, as queries only, or keep.",
)
@click.option(
    "--controls", metavar="QUERY", help="Rows that are controls and left out. Default: as marked by cellfast profile, else DMSO."
)
@click.option("--metadata", type=click.Path(path_type=Path), help="Table of plate, well, compound, concentration to join.")
@click.option("--moa", type=click.Path(path_type=Path), help="Table of compound, concentration, MoA to join.")
@click.option(
    "--features", multiple=True, metavar="PATTERN", help="Prefix or regular expression of feature names. Default: inferred."
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN",
    help="Where plate, well, batch, compound, concentration or moa is, if not found.",
)
@click.option(
    "--wells", type=click.Path(path_type=Path), help="Wells of these treatments, for replicate reproducibility and precision."
)
@click.option(
    "--resamples",
    "num_resamples",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Bootstrap resamples of compounds.",
)
@click.option(
    "--permutations",
    "num_permutations",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="Random assignments of MoAs.",
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
    "map_method",
    type=click.Choice(["tsne", "umap", "pca", "none"]),
    default="tsne",
    show_default=True,
    help="Map of the profiles in the pictures.",
)
@click.option("--pictures/--no-pictures", default=True, show_default=True, help="Write PNG pictures.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap, the permutations and the map.")
def evaluate(profiles: tuple[Path, ...], output: Path | None, compare: tuple[Path, Path] | None, **options: Any) -> None:
    """Score profiles by mechanism of action: NSC, NSCB and drop.

    NSC asks whether the nearest profile of another compound has the same MoA; NSCB leaves out the same batch as well. Every
    score comes with its counts, a 95 % bootstrap interval over compounds, and what was left out and why. Equally near neighbours
    count by the expectation over a random choice among them; identical profiles of different treatments are refused.
    """
    if compare:
        if profiles:
            raise click.UsageError("--compare takes two results and no PROFILES.")
        _compare(compare, output, options["num_resamples"], options["seed"])
        return
    if len(profiles) != 1 or output is None:
        raise click.UsageError("Give one PROFILES file and -o RESULT.json, or --compare A.json B.json.")
    if output.suffix.lower() != ".json":
        raise click.UsageError(f"-o must name a .json file, got '{output.name}'.")
    from cellfast.metadata.columns import parse_column_overrides
    from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
    from cellfast.profiles.report import evaluation_lines
    from cellfast.profiles.results import read_annotated, write_result

    join = {name: options.pop(name) for name in ("metadata", "moa", "features")}
    join["columns"] = parse_column_overrides(options.pop("columns"))
    wells, map_method, pictures = options.pop("wells"), options.pop("map_method"), options.pop("pictures")
    table = read_annotated(profiles[0], **join)
    evaluation = evaluate_profiles(table, EvaluationOptions(**options), read_annotated(wells, **join) if wells else None)
    for line in evaluation_lines(evaluation.result):
        click.echo(line)
    for path in write_result(evaluation, output, map_method if pictures else None):
        click.echo(f"written   {path}")


def _compare(paths: tuple[Path, Path], output: Path | None, num_resamples: int, seed: int) -> None:
    from cellfast.atomic import write_json
    from cellfast.profiles.compare import compare_results, load_result
    from cellfast.profiles.report import comparison_lines

    report = compare_results(load_result(paths[0]), load_result(paths[1]), num_resamples, seed)
    for line in comparison_lines(report):
        click.echo(line)
    if output is not None:
        write_json(output, {"a": paths[0].name, "b": paths[1].name, **report})
        click.echo(f"written   {output}")
