"""Names that become names of files and folders: what a plate, a batch or a channel may be called."""

from __future__ import annotations

import re

from cellfast.errors import CellfastError
from cellfast.printable import has_unprintable

MOST_BYTES = 200

# Separators, and what file systems and object stores give a meaning of their own (patterns, streams, redirection).
_RESERVED_CHARACTERS = re.compile(r'[/\\<>:"|?*]')
_RESERVED_NAMES = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)")


def file_name(kind: str, name: str) -> str:
    """``name`` itself, once it is known to be a name that any file system keeps as it is.

    Args:
        kind: what the name is of, for the message: ``plate``, ``batch``, ``channel``.

    Raises:
        CellfastError: empty, over 200 bytes of UTF-8, a separator or one of ``< > : " | ? *`` in it, control or direction
            characters, a blank or ``-`` or ``.`` at its beginning, a blank or ``.`` at its end, or a device's name (``NUL``).
    """
    wrong = _what_is_wrong(name)
    if wrong:
        raise CellfastError(
            f'{kind} name {name!r} cannot name a file: {wrong}; expected 1 to {MOST_BYTES} bytes without / \\ < > : " | ? * or '
            "control characters, no '-', '.' or blank first, no '.' or blank last. Rename it in the table it comes from"
        )
    return name


def _what_is_wrong(name: str) -> str:
    if not name:
        return "it is empty"
    if has_unprintable(name):
        return "it has control or direction characters"
    found = _RESERVED_CHARACTERS.search(name)
    if found:
        return f"it has a '{found[0]}'"
    if name[0] in "-." or name[0].isspace():
        return f"it begins with '{name[0]}'"
    if name[-1] == "." or name[-1].isspace():
        return f"it ends with '{name[-1]}'"
    if _RESERVED_NAMES.match(name):
        return "some systems keep that name for a device"
    if len(name.encode()) > MOST_BYTES:
        return f"it has {len(name.encode())} bytes"
    return ""


def check_batch(name: str | None) -> str:
    """The name of an experimental batch, which may be unknown (empty); else as `file_name`."""
    return file_name("batch", name) if name else ""


def check_text(kind: str, name: object) -> str:
    """``name`` as text that can be written to every format of table.

    Raises:
        CellfastError: no text, or with NUL or half a surrogate pair in it.
    """
    if not isinstance(name, str) or re.search("[\0\ud800-\udfff]", name):
        raise CellfastError(f"{kind} {name!r} is not text: expected characters other than NUL and lone surrogates")
    return name
