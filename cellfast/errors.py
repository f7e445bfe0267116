"""The one exception that means "the user can fix this"."""

from __future__ import annotations

from cellfast.printable import printable


class CellfastError(ValueError):
    """A mistake in input, options or files, told as: what is wrong, what was expected, what was found, what to do.

    The command line prints its message without a traceback and exits with status 1; the library raises it as a ``ValueError``.
    Names and URLs come from files and other programs: secrets in the message are masked, control characters are escaped.
    """

    def __init__(self, message: object = "", *, keep: str = "") -> None:
        super().__init__(printable(message, keep))
