"""Values that are declared once as fields of a dataclass, with default, limits and help, and checked alike wherever they come
from."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from cellfast.errors import CellfastError

# Whole numbers are an int64's.
MOST_WHOLE = 2**63 - 1


def value(
    default: Any,
    help_text: str,
    *,
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    group: str = "",
) -> Any:
    """A field with its help and limits: one of ``choices``, at least ``minimum``, more than ``above``, at most ``maximum``."""
    metadata = {"help": help_text, "choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "group": group}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(entry: Field[Any]) -> Any:
    """The default of a field."""
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def check(declared: Any) -> None:
    """Bring every value of a dataclass to its type.

    Raises:
        CellfastError: a value of the wrong type or outside its limits, naming key, limits and what was given.
    """
    hints = typing.get_type_hints(type(declared))
    for entry in fields(declared):
        object.__setattr__(declared, entry.name, _checked(entry, getattr(declared, entry.name), hints[entry.name]))


def _checked(entry: Field[Any], value: Any, hint: Any) -> Any:
    """``value`` as its type, within its limits; YAML's habit of reading 3e-4 as text is undone."""
    key, limits = entry.name, entry.metadata
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    if optional:
        if value is None:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    kind = typing.get_origin(hint) or hint

    def wrong(expected: str) -> CellfastError:
        found = repr(value)
        return CellfastError(f"{key}: expected {expected}, got {found if len(found) <= 200 else found[:200] + '…'}")

    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
    elif kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        words = {"minimum": "at least", "above": "more than", "maximum": "at most"}
        bounds = [f"{word} {limits[name]:g}" for name, word in words.items() if limits[name] is not None]
        expected += f", {' and '.join(bounds)}" if bounds else ""
        if limits["choices"]:
            expected = f"one of {', '.join(map(str, limits['choices']))}"
        if isinstance(value, str):
            try:
                value = float(value) if kind is float else int(value)
            except ValueError:
                raise wrong(expected) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong(expected)
        if kind is int:
            if not abs(value) <= MOST_WHOLE or value != int(value):
                raise wrong(expected)
            value = int(value)
        else:
            if not abs(value) <= sys.float_info.max:  # NaN neither
                raise wrong(expected)
            value = float(value)
        low, above, high = limits["minimum"], limits["above"], limits["maximum"]
        if (low is not None and value < low) or (above is not None and value <= above) or (high is not None and value > high):
            raise wrong(expected)
        if limits["choices"] and value not in limits["choices"]:
            raise wrong(expected)
    elif kind is str:
        if limits["choices"]:
            # YAML reads a bare `none`-like word as text but `no` as false; only text can be a choice.
            if value not in limits["choices"]:
                raise wrong(f"one of {', '.join(limits['choices'])}")
        elif not isinstance(value, str):
            raise wrong("text")
    elif kind in (list, tuple):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, int)) for part in value):
            raise wrong("a list of names")
        value = kind(str(part) for part in value)
        if limits["choices"] and not (value and set(value) <= set(limits["choices"])):
            raise wrong(f"some of {', '.join(limits['choices'])}")
    elif kind is dict:
        if not isinstance(value, Mapping):
            raise wrong("a mapping of names to values")
        value = dict(value)
    return value
