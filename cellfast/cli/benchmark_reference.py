"""``cellfast benchmark reference``: cellfast beside the reference implementation or a plain baseline."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path, file_okay=False)
_SECTIONS = ("parts", "agreement", "quality", "scaling")
_PARTS = ("load", "augment", "loss", "step", "epoch", "embed", "score", "score with pictures", "evaluate", "end to end")


@click.command()
@click.option(
    "--reference-dir",
    type=_FOLDER,
    help="A checkout of SamriddhiJain/SimCLR-for-cell-profiling, driven as it is.  [default: a plain PyTorch baseline stands in]",
)
@click.option("--reference-python", help="Python of an environment the checkout runs in.  [default: this one]")
@click.option("--screen", type=_FOLDER, help="Cells to use: a screen of three channels.  [default: a simulated one]")
@click.option("--section", "sections", multiple=True, type=click.Choice(_SECTIONS), help="Measure only these; repeatable.")
@click.option("--part", "parts", multiple=True, type=click.Choice(_PARTS), help="Of the parts only these; repeatable.")
@click.option("--cells", "num_cells", type=click.IntRange(min=16), help="Cells taken from the screen.  [default: up to 1,000]")
@click.option("--encoder", type=click.Choice(["resnet18", "resnet50", "resnet101"]), help="[default: resnet18]")
@click.option("--batch-size", type=click.IntRange(min=2), help="Cells per minibatch.  [default: 256]")
@click.option("--size", type=click.IntRange(min=16), help="Side of what the encoder sees, px.  [default: 96]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each side.  [default: 2]")
@click.option("--repeats", type=click.IntRange(min=1), help="Timings of each part.  [default: 5, slow ones 3]")
@click.option("--quality-steps", type=click.IntRange(min=1), help="Minibatches of each training of 'quality'.  [default: 40]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Trainings of each kind in 'quality'.")
@click.option("--quick", is_flag=True, help="Small sizes: under three minutes. The figures say little.")
@click.option("--update", is_flag=True, help="Keep the sections of an earlier --out that are not measured now.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write OUT.json, and OUT.md and OUT.png beside it."
)
def reference(
    reference_dir: Path | None,
    reference_python: str | None,
    screen: Path | None,
    sections: tuple[str, ...],
    parts: tuple[str, ...],
    num_cells: int | None,
    encoder: str | None,
    batch_size: int | None,
    size: int | None,
    threads: int | None,
    repeats: int | None,
    quality_steps: int | None,
    seeds: int,
    quick: bool,
    update: bool,
    out: Path | None,
) -> None:
    """The whole way beside the reference implementation (a checkout of yours) or a plain PyTorch baseline.

    Same cells, machine, threads, encoder, minibatch and input size; random weights on both sides; every measurement in a process of its own.
    """
    from dataclasses import replace

    from cellfast.benchmark.reference import PARTS, QUICK, SECTIONS, Settings, measure_reference
    from cellfast.benchmark.reference.report import markdown

    if out is not None and out.suffix != ".json":
        raise click.UsageError(f"--out must end in .json, got {out}")
    given = {"encoder": encoder, "batch_size": batch_size, "size": size, "threads": threads, "repeats": repeats}
    if repeats is not None:
        given["slow_repeats"] = min(repeats, 3)
    chosen = {key: value for key, value in given.items() if value is not None}
    settings = replace(QUICK if quick else Settings(), **chosen) if chosen else None
    earlier = _earlier(out) if update else None
    click.echo(
        "beside: " + (f"the reference in {reference_dir}" if reference_dir else "a plain PyTorch baseline (no --reference-dir)")
    )
    result = measure_reference(
        reference_dir=str(reference_dir) if reference_dir else None,
        reference_python=reference_python,
        screen=str(screen) if screen else None,
        sections=sections or SECTIONS,
        parts=parts or tuple(PARTS),
        quick=quick,
        num_cells=num_cells,
        settings=settings,
        quality_steps=quality_steps,
        seeds=tuple(range(seeds)),
        say=click.echo,
    )
    document = _document(result, quick=quick, earlier=earlier)
    if out is None:
        click.echo("\n" + markdown(document))
        return
    for path in write_report(document, out):
        click.echo(f"written {path}", err=True)


def _earlier(out: Path | None) -> dict | None:
    import json

    from cellfast.errors import CellfastError

    if out is None:
        raise click.UsageError("--update needs --out: the file whose other sections are kept")
    if not out.exists():
        return None
    try:
        return json.loads(out.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CellfastError(f"{out}: not a benchmark's JSON ({error}); leave out --update to replace it") from error


def _document(result: dict, *, quick: bool, earlier: dict | None) -> dict:
    """The result with its environment; sections and parts of ``earlier`` that were not measured now are kept, each with its commit."""
    from cellfast.benchmark import environment
    from cellfast.errors import CellfastError

    where = environment()
    _stamp(result, where["commit"])
    if earlier is not None:
        before = earlier["result"]
        for key in ("settings", "other"):
            now, then = result[key], before.get(key)
            if key == "other":
                now, then = (now["name"], now["commit"]), (then["name"], then["commit"])
            if now != then:
                raise CellfastError(f"--update: the earlier file's {key} differ ({then} then, {now} now): measure all of it anew")
        _stamp(before, earlier["environment"]["commit"])
        merged = {**before, **result}
        if "parts" in before and "parts" in result:
            merged["parts"] = {**before["parts"], **result["parts"]}
        merged["other"] = {**before["other"], **{k: v for k, v in result["other"].items() if v}}
        result = merged
    return {"subject": "reference", "quick": quick, "environment": where, "result": result}


def _stamp(result: dict, commit: str) -> None:
    """Give every section and part the commit it was measured at, where it has none yet."""
    for entry in (*result.get("parts", {}).values(), *(result[key] for key in _SECTIONS if key != "parts" and key in result)):
        entry.setdefault("commit", commit)


def write_report(document: dict, out: Path) -> list[Path]:
    """Write the JSON, and the Markdown table and picture made of it beside it; returns the files."""
    from cellfast.atomic import write_json, write_text
    from cellfast.benchmark.reference.report import markdown, plot

    write_json(out, document)
    write_text(out.with_suffix(".md"), markdown(document))
    drawn = plot(document, out.with_suffix(".png"))
    return [out, out.with_suffix(".md"), *([out.with_suffix(".png")] if drawn else [])]
