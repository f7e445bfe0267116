"""Well names: ``A1 a01 A-01 A_01 AA1 r01c02``, or row and column apart; all become ``A01``. Plates of 6 to 1536 wells."""

from __future__ import annotations

import re

from cellfast.errors import CellfastError

MOST_COLUMNS = 48
_WELL = re.compile(r"\s*([A-Za-z]{1,2})\s*[-_ ]?\s*0*(\d{1,2})(?:\.0+)?\s*$")
_ROW_COLUMN = re.compile(r"\s*[rR]0*(\d{1,2})\s*[-_]?\s*[cC]0*(\d{1,2})\s*$")


def well_name(text: object, column: object = None) -> str:
    """The well's name as ``A01`` (``AF48`` at most), from its name or from its row and column.

    ``well_name("a-1")``, ``well_name("A", 1)``, ``well_name(1, 1)`` and ``well_name("1.0", "1.0")`` are ``A01``; row 27 is
    ``AA``.

    Raises:
        CellfastError: not a row A–Z or AA–AF (1–32) followed by a column 1–48.
    """
    if column is None:
        as_numbers = _ROW_COLUMN.match(str(text))
        found = None if as_numbers else _WELL.match(str(text))
        row, number = as_numbers.groups() if as_numbers else found.groups() if found else ("", "")
    else:
        row, number = str(text).strip(), str(column).strip()
    row = _row_letters(row)
    whole = re.fullmatch(r"0*(\d{1,2})(?:\.0*)?", number)
    if not row or not whole or not 1 <= int(whole[1]) <= MOST_COLUMNS:
        shown = f"{text!r}" if column is None else f"row {str(text)!r}, column {str(column)!r}"
        raise CellfastError(f"well {shown}: expected a row A–Z or AA–AF and a column 1–{MOST_COLUMNS}, such as A01")
    return f"{row}{int(whole[1]):02d}"


def _row_letters(row: str) -> str:
    """``A`` of ``a``, ``1`` and ``1.0``; empty for what is no row."""
    number = re.fullmatch(r"0*(\d{1,2})(?:\.0*)?", row)
    if number:
        n = int(number[1])
        return "" if not 1 <= n <= 32 else chr(64 + n) if n <= 26 else "A" + chr(64 + n - 26)
    letters = row.upper()
    return letters if re.fullmatch(r"[A-Z]|A[A-F]", letters) else ""
