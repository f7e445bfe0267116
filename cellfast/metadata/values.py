"""Names as values: text as written, one missing value, and one spelling for what differs in case or blanks only."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

_INNER_BLANKS = re.compile(r"\s+")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def text_column(column: pd.Series) -> pd.Series:
    """A column as text, missing (null, NaN, an empty cell) as ``""``, blanks around a name stripped.

    Text stays as written (``000123``, ``22E1``, ``NA``); whole numbers have no decimal point, also where a missing value made them
    floats.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = text_column(pd.Series(column.cat.categories)).to_numpy(dtype=object)
        codes = column.cat.codes.to_numpy()
        return pd.Series(np.append(categories, "")[codes], index=column.index, dtype="str")
    if column.dtype == object:
        # Lists cannot be counted as values.
        column = column.map(lambda v: _text(v, False) if isinstance(v, list | tuple | np.ndarray) else v)
    # Equal values are turned into text once: a column of a million cells has a few hundred names.
    codes, unique = pd.factorize(column)
    whole = pd.api.types.is_float_dtype(column.dtype) and all(float(v).is_integer() for v in unique if np.isfinite(v))
    texts = np.array([*(_text(v, whole) for v in unique), ""], dtype=object)
    return pd.Series(texts[codes], index=column.index, dtype="str")


def _text(value: Any, whole: bool) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, float | np.floating):
        return str(int(value)) if whole and np.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return str(int(value)) if value == value.to_integral_value() else str(value.normalize())
    if isinstance(value, list | tuple | np.ndarray):
        return "|".join(_text(v, False) for v in value if v is not None)
    return str(value).strip()


def numbers_if_all(column: pd.Series) -> pd.Series:
    """A text column as numbers where every value that is not missing is written as a plain number (no leading zeros), else as it is."""
    texts = [t for t in column.unique() if t != ""]
    if not texts or not all(_PLAIN_NUMBER.fullmatch(t) for t in texts):
        return column
    values = pd.to_numeric(column.replace("", None))
    return values


def folded(name: str) -> str:
    """What two spellings of one name share: case and inner blanks aside (a blank between two digits counts, ``1 1`` is not ``11``)."""
    text = _BETWEEN_DIGITS.sub("\0", unicodedata.normalize("NFC", name).casefold())
    return _INNER_BLANKS.sub("", text)


class Spellings:
    """The spellings of the names in one kind of column, counted over all tables; the commonest of those that are one name is shown."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, column: pd.Series) -> None:
        """Count the names of a text column."""
        for name, count in column.value_counts(sort=False).items():
            if name:
                self._counts.setdefault(folded(str(name)), Counter())[str(name)] += int(count)

    def shown(self, name: str) -> str:
        """The commonest spelling of a name (of equally common ones the first in the alphabet)."""
        counts = self._counts.get(folded(name))
        return min(counts, key=lambda n: (-counts[n], n)) if counts else name

    def apply(self, column: pd.Series) -> pd.Series:
        """The text column with one spelling for each name."""
        codes, unique = pd.factorize(column)
        shown = np.array([self.shown(str(n)) if n else "" for n in unique] or [""], dtype=object)
        return pd.Series(shown[codes], index=column.index, dtype="str")

    def merged(self) -> dict[str, list[str]]:
        """Shown name → the other spellings that were taken for it, for the report."""
        return {
            self.shown(next(iter(c))): sorted(n for n in c if n != self.shown(n)) for c in self._counts.values() if len(c) > 1
        }


def unify_spellings(frame: pd.DataFrame, columns: tuple[str, ...]) -> tuple[pd.DataFrame, dict[str, dict[str, list[str]]]]:
    """One spelling for each name in the named columns of ``frame``; the report lists what was merged, by column."""
    merged: dict[str, dict[str, list[str]]] = {}
    changed = frame
    for name in columns:
        if name not in frame:
            continue
        spellings = Spellings()
        spellings.add(frame[name])
        if found := spellings.merged():
            changed = frame.copy() if changed is frame else changed
            changed[name] = spellings.apply(frame[name])
            merged[name] = found
    return changed, merged


def spelling_notes(merged: dict[str, dict[str, list[str]]]) -> list[str]:
    """What `unify_spellings` merged, a sentence for each column."""
    return [
        f"{column.removeprefix('Metadata_')}: spellings taken as one: "
        + "; ".join(f"{shown} (also {', '.join(repr(o) for o in others)})" for shown, others in list(names.items())[:10])
        + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
        for column, names in merged.items()
    ]
