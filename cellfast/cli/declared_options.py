"""Command-line options of the values that a dataclass declares."""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Any

import click

from cellfast.declared import default_of


def declared_options(
    declared: type, *, leave: Collection[str] = (), flags: Mapping[str, str] | None = None
) -> Callable[[Any], Any]:
    """Add an option of its own name for each value of ``declared``: ``batch_size`` → ``--batch-size``.

    An option that is not given is None, so that whoever else decides (a file, the default) does.

    Args:
        leave: values that have no option.
        flags: options that are not called after their value.
    """
    hints = typing.get_type_hints(declared)
    flags = flags or {}
    options = [_option(e, hints[e.name], flags.get(e.name)) for e in fields(declared) if e.name not in leave]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _option(entry: Field[Any], hint: Any, flag: str | None) -> Callable[[Any], Any]:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    flag = flag or "--" + entry.name.replace("_", "-")
    default, choices = default_of(entry), entry.metadata["choices"]
    several = isinstance(default, tuple)
    hidden = default is None or default is False or default in ("", [], {}) or isinstance(default, dict)
    text = entry.metadata["help"] + ("" if hidden else f"  [default: {', '.join(default) if several else default}]")
    if kinds[0] is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", entry.name, default=None, help=text)
    kind: Any = click.Choice([str(choice) for choice in choices]) if choices else {int: int, float: float}.get(kinds[0], str)
    return click.option(flag, entry.name, type=kind, default=None, multiple=several, help=text)
