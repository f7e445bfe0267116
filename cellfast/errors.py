"""The one exception that means "the user can fix this", and how its message names a parameter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cellfast.printable import printable

# Set by the command line; an environment variable, because the processes it starts tell their errors too.
_COMMAND_LINE = "CELLFAST_COMMAND_LINE"
# Options that are not called after their parameter.
_FLAGS = {"columns": "--column", "diameter_px": "--diameter", "formats": "--to", "lam": "--lambda"}


class CellfastError(ValueError):
    """A mistake in input, options or files, told as: what is wrong, what was expected, what was found, what to do.

    The command line prints its message without a traceback and exits with status 1; the library raises it as a ``ValueError``.
    Names and URLs come from files and other programs: secrets in the message are masked, control characters are escaped.
    Parameters are named by `option`.
    """

    def __init__(self, message: object = "", *, keep: str = "") -> None:
        super().__init__(printable(message, keep))


def option(name: str, value: Any = None) -> str:
    """How a message names a parameter, alone or with a value, to whoever gave it.

    In Python ``crop_size``, ``border='pad'``, ``force=True``, ``columns={'well': 'Well'}``; at the command line ``--crop-size``,
    ``--border pad``, ``--force``, ``--column well=Well``.
    """
    if not os.environ.get(_COMMAND_LINE):
        return name if value is None else f"{name}={value if isinstance(value, (bool, int, float, dict)) else str(value)!r}"
    flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
    if value is None or value is True:
        return flag
    if isinstance(value, Mapping):
        value = " ".join(f"{key}={one}" for key, one in value.items())
    text = str(value)
    if re.search(r"[\s'\"$`\\|&;()<>*?]", text) or not text:
        text = f"'{text}'" if "'" not in text else f'"{text}"'
    return f"{flag} {text}"


@contextmanager
def told_at_command_line() -> Iterator[None]:
    """Within the block, and in processes started there, `option` names the options of the command line."""
    before = os.environ.get(_COMMAND_LINE)
    os.environ[_COMMAND_LINE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_COMMAND_LINE]
        else:
            os.environ[_COMMAND_LINE] = before
