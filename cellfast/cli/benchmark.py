"""``cellfast benchmark``: lists what can be measured; each subject is a command of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from cellfast.benchmark import SUBJECTS, environment


def _sizes(context: click.Context, option: click.Parameter, text: str | None) -> tuple[tuple[int, int], ...] | None:
    if text is None:
        return None
    try:
        return tuple((int(m), int(d)) for m, d in (size.lower().split("x") for size in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"expected MxD,MxD,…, for example 512x128,8192x128; got {text!r}") from None


_COUNT = click.IntRange(min=1)
# Argument of a measure function → its option. One that is not given leaves the subject's own value.
OPTIONS: dict[str, Any] = {
    "screen": click.option(
        "--screen", type=click.Path(exists=True, file_okay=False), help="Cells of this screen instead of random ones."
    ),
    "only": click.option(
        "--only",
        multiple=True,
        type=click.Choice(["start", "aggregate", "neighbours", "large"]),
        help="Measure only this; repeatable.",
    ),
    "sizes": click.option("--sizes", callback=_sizes, help="Rows × columns of the projections: MxD,MxD,…"),
    "dtype": click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Type of the projections."),
    "encoder": click.option(
        "--encoder", type=click.Choice(["resnet18", "resnet34", "resnet50", "resnet101", "cnn4"]), help="Encoder."
    ),
    "stem": click.option(
        "--stem", type=click.Choice(["imagenet", "small", "dense", "full"]), help="First layers of the encoder."
    ),
    "fields": click.option("--fields", type=_COUNT, help="Fields of view."),
    "cells_per_field": click.option("--cells-per-field", type=_COUNT, help="Cells in each field."),
    "num_cells": click.option("--cells", "num_cells", type=_COUNT, help="Cells in all."),
    "num_treatments": click.option("--treatments", "num_treatments", type=_COUNT, help="Profiles whose neighbours are searched."),
    "crop_size": click.option("--crop-size", type=_COUNT, help="Side of a crop, px."),
    "output_size": click.option("--output-size", type=_COUNT, help="Side of what the encoder sees, px."),
    "batch_size": click.option("--batch-size", type=click.IntRange(min=2), help="Cells per minibatch."),
    "amp": click.option("--amp/--no-amp", default=None, help="bfloat16 autocast."),
    "processes": click.option("--processes/--no-processes", default=None, help="Also with one and with two processes."),
    "dali": click.option("--dali/--no-dali", default=None, help="Also through DALI."),
    "threads": click.option("--threads", type=_COUNT, help="Threads that gather."),
    "repeats": click.option("--repeats", type=_COUNT, help="Timings of each."),
    "device": click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute."),
    "picture": click.option(
        "--plot", "picture", type=click.Path(dir_okay=False), help="Draw time and memory against the number of rows."
    ),
}


@click.group(invoke_without_command=True)
@click.pass_context
def benchmark(context: click.Context) -> None:
    """Measure cellfast's parts on this machine; without a subject, list them."""
    if context.invoked_subcommand is None:
        click.echo("What can be measured (cellfast benchmark SUBJECT [--quick] [--out FILE.json]):")
        for name, subject in SUBJECTS.items():
            click.echo(f"  {name:<10} {subject.help}")


def _command(name: str) -> click.Command:
    subject = SUBJECTS[name]

    @click.option("--quick", is_flag=True, help="Smaller sizes and fewer repeats; under three minutes.")
    @click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON.")
    def run(quick: bool, out: Path | None, **options: Any) -> None:
        from cellfast.atomic import write_json

        given = {key: value for key, value in options.items() if value not in (None, ())}
        if "device" in given:
            from cellfast.training.devices import choose_device

            choose_device(given["device"])  # says so where there is none
        module, function = subject.function.split(":")
        measure = getattr(importlib.import_module(module), function)
        result = measure(**{**(subject.quick if quick else subject.full), **given})
        click.echo(json.dumps(result, indent=2, default=str))
        if out is not None:
            write_json(out, {"subject": name, "quick": quick, "environment": environment(), "result": result})
            click.echo(f"written {out}", err=True)

    for option in reversed(subject.options):
        run = OPTIONS[option](run)
    return click.command(name, help=subject.help)(run)


def _own_command(path: str) -> click.Command:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


for _name, _subject in SUBJECTS.items():
    benchmark.add_command(_own_command(_subject.command) if _subject.command else _command(_name))
