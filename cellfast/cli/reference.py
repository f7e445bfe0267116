"""Writes docs/cli.md from the commands' own help: ``python -m cellfast.cli.reference > docs/cli.md``."""

from __future__ import annotations

import click

from cellfast.cli import cellfast


def reference() -> str:
    """The whole command line's help as Markdown, one section per command."""
    parts = ["# The command line\n", "Generated from the program's own help: `python -m cellfast.cli.reference > docs/cli.md`.\n"]

    def visit(command: click.Command, path: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=path.split()[-1], parent=parent, terminal_width=120, max_content_width=120)
        parts.append(f"## `{path}`\n\n```\n{command.get_help(context).rstrip()}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                if child is not None:
                    visit(child, f"{path} {name}", context)

    visit(cellfast, "cellfast", None)
    return "\n".join(parts)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
