"""Text tables as laboratories write them: commas, tabs or semicolons, any line ends, and columns under many names."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cellfast.bounded import open_table, read_parquet
from cellfast.errors import CellfastError
from cellfast.screens.remote import exists, is_url, read_bytes

# Characters of a header that are looked at: 100,000 names of 80.
MOST_HEADER = 8 << 20


def read_table(path: str | os.PathLike[str], what: str) -> pd.DataFrame:
    """Read a text table (.gz too) as strings, or parquet, from a file or an fsspec URL; commas, tabs or semicolons, whichever its header has; headers without blanks.

    A cell that a short row lacks is ``""``. Raises `CellfastError` naming the file, also for rows with more values than the header has.
    """
    if not exists(path):
        raise CellfastError(f"{path}: no such file; expected {what}")
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="cellfast-") as folder:
            copy = Path(folder) / str(path).rsplit("/", 1)[-1]
            copy.write_bytes(read_bytes(str(path)))
            return _read(copy, str(path), what)
    return _read(Path(path), str(path), what)


def _read(file: Path, path: str, what: str) -> pd.DataFrame:
    try:
        if file.suffix.lower() == ".parquet":
            table = read_parquet(file)
        else:
            with warnings.catch_warnings(), open_table(file) as handle:
                # A row with more values than the header: pandas would cut it short, or shift every column by one.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                table = pd.read_csv(
                    handle,
                    dtype=str,
                    keep_default_na=False,
                    encoding="utf-8-sig",
                    skipinitialspace=True,
                    sep=_separator(file),
                    index_col=False,
                ).fillna("")
    except (pd.errors.ParserWarning, pd.errors.ParserError) as error:
        raise CellfastError(
            f"{path}: cannot be read as {what}: a row has more values than the header has names ({str(error)[:200]})"
        ) from error
    except UnicodeDecodeError as error:
        raise CellfastError(f"{path}: cannot be read as {what}: it is not UTF-8 text ({error}); save it as UTF-8") from error
    except CellfastError:
        raise
    except Exception as error:
        said = str(error)[:200] or type(error).__name__
        raise CellfastError(f"{path}: cannot be read as {what} ({said})") from error
    table.columns = [str(name).strip().strip('"') for name in table.columns]
    return table


def _separator(path: Path) -> str:
    """What separates the names in the header: the most frequent of comma, tab and semicolon outside quotes."""
    with open_table(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None) as handle:
        header = handle.readline(MOST_HEADER)
    fields = {sign: len(next(csv.reader([header], delimiter=sign), [])) for sign in (",", "\t", ";")}
    return max(fields, key=lambda sign: fields[sign])


def find_column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column, letter case aside."""
    lower = {column.lower(): column for column in table.columns}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def concentration_um(text: object, where: str) -> float:
    """A concentration in µM; NaN for an empty cell, ``NA`` or ``nan``.

    Raises:
        CellfastError: not a number (``10 nM``, ``0,3``), or a negative one; ``where`` names the table, row and column.
    """
    word = str(text).strip()
    if word.lower() in ("", "na", "n/a", "nan", "none", "null"):
        return math.nan
    try:
        value = float(word)
    except ValueError:
        value = math.inf
    if not 0 <= value < math.inf:
        raise CellfastError(f"{where}: expected a concentration as a plain number of µM, got {word!r}")
    return value
