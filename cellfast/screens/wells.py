"""Well names: accept ``a1 A1 a01 A01``, emit ``A01``; plates of 6 to 1536 wells."""

from __future__ import annotations

import re

from cellfast.errors import CellfastError

MOST_COLUMNS = 48
_WELL = re.compile(r"\s*([A-Za-z]{1,2})\s*-?\s*0*(\d{1,2})\s*$")


def normalise_well(text: str) -> str:
    """The well's name as ``A01`` (``AF48`` at most).

    Raises:
        CellfastError: not a row A–Z or AA–AF followed by a column 1–48.
    """
    found = _WELL.match(str(text))
    row = found.group(1).upper() if found else ""
    column = int(found.group(2)) if found else 0
    if not found or not 1 <= column <= MOST_COLUMNS or (len(row) == 2 and not ("AA" <= row <= "AF")):
        raise CellfastError(f"well {text!r}: expected a row A–Z or AA–AF and a column 1–{MOST_COLUMNS}, such as A01")
    return f"{row}{column:02d}"
