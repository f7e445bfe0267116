"""``cellfast benchmark``: lists what can be measured; each subject is a command of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cellfast.benchmark import SUBJECTS, environment


def run_subject(name: str, *, quick: bool, out: Path | None) -> dict[str, Any]:
    """Measure one subject and return the result with its environment; write it as JSON where ``out`` is given."""
    import importlib

    subject = SUBJECTS[name]
    module, function = subject.function.split(":")
    result = getattr(importlib.import_module(module), function)(**(subject.quick if quick else subject.full))
    document = {"subject": name, "quick": quick, "environment": environment(), "result": result}
    if out is not None:
        from cellfast.atomic import write_json

        write_json(out, document)
    return document


@click.group(invoke_without_command=True)
@click.pass_context
def benchmark(context: click.Context) -> None:
    """Measure cellfast's parts on this machine; without a subject, list them."""
    if context.invoked_subcommand is None:
        click.echo("What can be measured (cellfast benchmark SUBJECT [--quick] [--out FILE.json]):")
        for name, subject in SUBJECTS.items():
            click.echo(f"  {name:<10} {subject.help}")


def _command(name: str) -> click.Command:
    @click.command(name, help=SUBJECTS[name].help)
    @click.option("--quick", is_flag=True, help="Smaller sizes and fewer repeats; under three minutes.")
    @click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON.")
    def run(quick: bool, out: Path | None) -> None:
        document = run_subject(name, quick=quick, out=out)
        click.echo(json.dumps(document["result"], indent=2, default=str))
        if out is not None:
            click.echo(f"written {out}", err=True)

    return run


def _own_command(path: str) -> click.Command:
    import importlib

    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


for _name, _subject in SUBJECTS.items():
    benchmark.add_command(_own_command(_subject.command) if _subject.command else _command(_name))
