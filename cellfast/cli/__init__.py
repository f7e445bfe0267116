"""The command line: parse, call the library, show. Each command lives in its own file and is imported when it is used."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from typing import Any

import click

from cellfast.errors import told_at_command_line

# name → (module, attribute, one-line help). The help stands here so that `cellfast --help` imports nothing heavy.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "simulate": ("cellfast.cli.simulate", "simulate", "Simulate a screen in BBBC021's layout."),
    "ingest": ("cellfast.cli.ingest", "ingest", "Cut cells from fields, or collect ready-made crops, into a crop store."),
    "info": ("cellfast.cli.info", "info", "Describe a screen, or the system with --system."),
    "train": ("cellfast.cli.train", "train", "Train an encoder by contrastive learning on a screen's cells."),
    "embed": ("cellfast.cli.embed", "embed", "Embed every cell of a screen: one parquet file per plate."),
    "export": ("cellfast.cli.export", "export", "Write a model as TorchScript, pt2 or ONNX for other programs."),
    "profile": ("cellfast.cli.profile", "profile", "Aggregate and normalise embeddings or feature tables to profiles."),
    "evaluate": ("cellfast.cli.evaluate", "evaluate", "Score profiles by mechanism of action: NSC, NSCB, drop."),
    "activity": ("cellfast.cli.activity", "activity", "Find active treatments: each against the controls of its plates."),
    "benchmark": ("cellfast.cli.benchmark", "benchmark", "Measure cellfast's parts on this machine."),
    "demo": ("cellfast.cli.demo", "demo", "Run the whole path on a small simulated screen."),
}


class LazyGroup(click.Group):
    """A click group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'. The commands are: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with told_at_command_line():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="cellfast", prog_name="cellfast")
def cellfast() -> None:
    """From high-content screens to treatment profiles and mechanisms of action.

    The usual order: simulate (or bring your own images), ingest, train, embed, profile, evaluate; activity finds hits.
    """


def main() -> None:
    """Entry point of the ``cellfast`` program: a user's mistake ends in one clear message and exit status 1, never a traceback.

    ``CELLFAST_DEBUG=1`` lets the exception through with its traceback.
    """
    from cellfast.printable import printable_output

    with printable_output():
        _run()


def _run() -> None:
    if os.environ.get("CELLFAST_DEBUG", "") not in ("", "0"):
        try:
            cellfast(prog_name="cellfast")
        except Exception:
            traceback.print_exc()  # here, where secrets are masked
            sys.exit(1)
        return
    from cellfast.errors import CellfastError
    from cellfast.printable import printable

    try:
        cellfast(prog_name="cellfast")
    except CellfastError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # `cellfast … | head`: the reader left. Point stdout elsewhere so that the interpreter's last flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        text = printable(f"{error.strerror or error}{where}")
        click.echo(f"Error: {text}. Check the path, the permissions and the free space.", err=True)
        sys.exit(1)
    except Exception as error:
        # torch has no kind of its own for memory of the host.
        if not isinstance(error, MemoryError) and not re.search("(allocate|out of) memory", str(error)):
            traceback.print_exc()
            sys.exit(1)
        said = printable(" ".join(str(error).split())[:200])
        click.echo(
            f"Error: this takes more memory than there is{f' ({said})' if said else ''}. Give fewer or smaller inputs, a smaller "
            "minibatch or fewer workers, or a machine with more memory.",
            err=True,
        )
        sys.exit(1)
