"""Text tables as laboratories write them: commas, tabs or semicolons, gzip, several encodings, and numbers in blocks of rows."""

from __future__ import annotations

import codecs
import csv
import io
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from cellfast import bounded
from cellfast.errors import CellfastError, option
from cellfast.metadata.columns import check_doubled, find_columns, is_measured, is_metadata

ROWS_PER_BLOCK = 16384
#: Characters of a header that are looked at: 100,000 names of 80.
MOST_HEADER = 8 << 20
#: Rows from which the kind of a column is told.
HEAD_ROWS = 2000
#: Numbers beyond this are kept in a temporary file.
MOST_BYTES_HELD = 1 << 30

_MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "-nan", "-NaN", "null", "NULL", "None"]


@dataclass(frozen=True)
class TextFormat:
    """How a text table is written: ``encoding``, ``separator``, the names of its ``columns``; ``notes`` for the report."""

    encoding: str
    separator: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: Path, shown: str) -> TextFormat:
        """Look at a file.

        Raises:
            CellfastError: no header, doubled columns, damaged gzip, or bytes that are no text.
        """
        encoding, notes = _encoding(file, shown)
        with bounded.told(shown, "table"), open_text(file, encoding) as handle:
            line = "\n"
            while line and not line.strip():
                line = handle.readline(MOST_HEADER)
            # A quoted name may hold a line end.
            while line.count('"') % 2 and len(line) < MOST_HEADER and (more := handle.readline(MOST_HEADER)):
                line += more
        if not line.strip():
            raise CellfastError(f"{shown}: the file is empty; expected a header with the names of the columns")
        if "\0" in line:
            raise CellfastError(f"{shown}: not a text table: its first line holds NUL bytes")
        try:
            rows = {sign: next(csv.reader([line], delimiter=sign, skipinitialspace=True), []) for sign in (",", "\t", ";")}
        except csv.Error as error:
            raise CellfastError(f"{shown}: not a readable table: its first line is no header ({error}); write it again") from None
        separator = max(rows, key=lambda sign: len(rows[sign]))
        columns = [name.strip().strip('"') for name in rows[separator]]
        while len(columns) > 1 and not columns[-1]:
            columns.pop()
        check_doubled([c for c in columns if c], shown)
        return cls(encoding, separator, tuple(columns), tuple(notes))


def open_text(file: Path, encoding: str) -> TextIO:
    """The text of a file, decompressed where its name ends in ``.gz``."""
    return io.TextIOWrapper(bounded.open_table(file), encoding=encoding, newline=None)


def _encoding(file: Path, shown: str) -> tuple[str, list[str]]:
    with bounded.told(shown, "table"), bounded.open_table(file) as handle:
        block = handle.read(1 << 20)
        if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16", [f"{Path(shown).name} is UTF-16 text"]
        decoder = codecs.getincrementaldecoder("utf-8")()
        unicode, undefined = True, False
        while block:
            if unicode:
                try:
                    decoder.decode(block)
                except UnicodeDecodeError:
                    unicode = False
            undefined |= any(byte in block for byte in b"\x81\x8d\x8f\x90\x9d")
            block = handle.read(1 << 20)
        if unicode:
            try:
                decoder.decode(b"", final=True)
                return "utf-8-sig", []
            except UnicodeDecodeError:
                pass
    encoding = "latin-1" if undefined else "cp1252"
    return encoding, [f"{Path(shown).name} is not UTF-8 text and was read as {encoding}"]


def read_text(file: Path, shown: str, form: TextFormat | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The whole table as text, blanks around values stripped, a cell that a short row lacks ``""``, rows without any value left
    out.

    Raises:
        CellfastError: damaged, or a row with more values than the header has names (names the line).
    """
    form = form or TextFormat.of(file, shown)
    try:
        with warnings.catch_warnings(), open_text(file, form.encoding) as handle:
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(handle, **_pandas_options(form), dtype=str, keep_default_na=False, na_filter=False)
            frame.columns = list(form.columns)
    except CellfastError:
        raise
    except (pd.errors.ParserWarning, pd.errors.ParserError, ValueError):
        # Trailing separators, or rows that are too long: told apart line by line.
        frame = _read_by_line(file, shown, form)
    except pd.errors.EmptyDataError:
        frame = pd.DataFrame({name: [] for name in form.columns}, dtype=str)
    except (EOFError, OSError, zlib.error) as error:
        raise CellfastError(f"{shown}: cannot be read to its end ({error}); make or copy it again") from None
    frame = frame.loc[:, [bool(name) for name in frame.columns]].fillna("")
    for name in frame.columns:
        frame[name] = frame[name].str.strip()
    if len(frame.columns):
        empty = (frame.iloc[:, 0] == "").to_numpy(dtype=bool)
        for name in frame.columns[1:]:
            if not empty.any():
                break
            empty = empty & (frame[name] == "").to_numpy(dtype=bool)
        frame = frame[~empty] if empty.any() else frame
    return frame if columns is None else frame[list(columns)]


def _pandas_options(form: TextFormat) -> dict[str, Any]:
    return {"sep": form.separator, "header": 0, "skipinitialspace": True, "index_col": False}


def _read_by_line(file: Path, shown: str, form: TextFormat) -> pd.DataFrame:
    width = len(form.columns)
    rows: list[list[str]] = []
    try:
        with open_text(file, form.encoding) as handle:
            reader = csv.reader(handle, delimiter=form.separator, skipinitialspace=True)
            header = next((row for row in reader if any(value.strip() for value in row)), [])
            assert header
            for row in reader:
                if not any(value.strip() for value in row):
                    continue
                if any(value.strip() for value in row[width:]):
                    raise CellfastError(
                        f"{shown}, line {reader.line_num}: the row has {len(row)} values, the header {width} names. Quote values "
                        "that hold the separator, or name the columns"
                    )
                rows.append([*row[:width], *[""] * (width - len(row))])
    except CellfastError:
        raise
    except csv.Error as error:
        raise CellfastError(f"{shown}: not a readable text table ({error})") from None
    except (EOFError, OSError, UnicodeError, zlib.error) as error:
        raise CellfastError(f"{shown}: cannot be read to its end ({error}); make or copy it again") from None
    return pd.DataFrame(rows, columns=list(form.columns), dtype=str)


class TextTable:
    """A text table of features: parsed once, names as text, numbers as float64 in memory or, where they are many, in a temporary
    file."""

    def __init__(self, file: Path, shown: str) -> None:
        self.path = Path(shown)
        self._file = file
        self._form = TextFormat.of(file, shown)
        self.notes = list(self._form.notes)
        self.schema_note: dict[bytes, bytes] = {}
        self.all_columns = [c for c in self._form.columns if c]
        head = self._chunks(nrows=HEAD_ROWS)
        first = next(head, pd.DataFrame({c: [] for c in self.all_columns}, dtype=str))
        self._decimal = "," if self._form.separator != "," and _has_decimal_commas(first) else "."
        names = set(find_columns(self.all_columns, where=shown).values())
        self.numeric_columns = [c for c in self.all_columns if c not in names and _looks_numeric(c, first[c], self._decimal)]
        self._texts: pd.DataFrame | None = None
        self._numbers: np.ndarray | None = None
        self._number_of: dict[str, int] = {}
        self._broken: dict[str, tuple[int, str]] = {}
        self._parse()
        assert self._texts is not None
        self.num_rows: int = len(self._texts)

    def _chunks(self, nrows: int | None = None, **options: Any) -> Iterator[pd.DataFrame]:
        """Blocks of rows as pandas reads them; all text unless ``options`` say otherwise."""
        options = {"dtype": str, "keep_default_na": False, **options}
        try:
            with warnings.catch_warnings(), open_text(self._file, self._form.encoding) as handle:
                warnings.simplefilter("error", pd.errors.ParserWarning)
                reader = pd.read_csv(
                    handle, **_pandas_options(self._form), names=self._names(), chunksize=ROWS_PER_BLOCK, nrows=nrows, **options
                )
                for chunk in reader:
                    yield chunk[self.all_columns]
        except pd.errors.EmptyDataError:
            return
        except CellfastError:
            raise
        except (pd.errors.ParserWarning, pd.errors.ParserError, OverflowError):
            # What only the slow reader understands (trailing separators) or can name (the line of a row that is too long).
            frame = _read_by_line(self._file, str(self.path), self._form)[self.all_columns]
            yield _as_asked(frame, options)
        except (EOFError, OSError, UnicodeError, zlib.error) as error:
            raise CellfastError(f"{self.path}: cannot be read to its end ({error}); make or copy it again") from None

    def _names(self) -> list[str]:
        # Columns without a name are read and left out.
        return [name or f"\0{i}" for i, name in enumerate(self._form.columns)]

    def _parse(self) -> None:
        numeric = [c for c in self.numeric_columns if c not in self._broken]
        options: dict[str, Any] = {
            "dtype": {c: np.float64 if c in set(numeric) else str for c in self.all_columns},
            "na_values": {c: _MISSING for c in numeric},
            "decimal": self._decimal,
        }
        texts: list[pd.DataFrame] = []
        blocks: list[np.ndarray] = []
        spill: Any = None
        rows = held = 0
        try:
            for chunk in self._chunks(**options):
                text = chunk.drop(columns=numeric).fillna("")
                values = np.ascontiguousarray(chunk[numeric].to_numpy(np.float64))
                filled = np.isfinite(values).any(1) if numeric else np.zeros(len(chunk), bool)
                filled |= (text != "").to_numpy(dtype=bool).any(1)
                if not filled.all():  # rows of separators alone are nothing
                    text, values = text[filled], values[filled]
                texts.append(text)
                rows += len(values)
                held += values.nbytes
                if held > MOST_BYTES_HELD and spill is None:
                    spill = tempfile.TemporaryFile(prefix="cellfast-")
                    for block in blocks:
                        block.tofile(spill)
                    blocks = []
                if spill is None:
                    blocks.append(values)
                else:
                    values.tofile(spill)
        except CellfastError:
            raise
        except (ValueError, TypeError):
            self._find_broken(numeric)
            self._parse()
            return
        shape = (rows, len(numeric))
        if spill is not None:
            spill.flush()
            self._numbers = np.memmap(spill, np.float64, "r", shape=shape)
        else:
            self._numbers = np.concatenate(blocks) if blocks else np.empty(shape)
        self._number_of = {c: i for i, c in enumerate(numeric)}
        left = [c for c in self.all_columns if c not in self._number_of]
        self._texts = pd.concat(texts, ignore_index=True) if texts else pd.DataFrame({c: [] for c in left}, dtype=str)

    def _find_broken(self, numeric: Sequence[str]) -> None:
        """Note the first value that is no number in each of the columns taken for numbers."""
        before = len(self._broken)
        start = 0
        for chunk in self._chunks():
            for name in numeric:
                if name not in self._broken and (bad := _first_text(chunk[name], self._decimal)) is not None:
                    self._broken[name] = (start + bad + 2, str(chunk[name].iloc[bad]))
            start += len(chunk)
        if len(self._broken) == before:
            raise CellfastError(f"{self.path}: not a readable text table")

    def frame(self, columns: Sequence[str]) -> pd.DataFrame:
        """The named columns as text (numbers where every value is one)."""
        assert self._texts is not None
        assert self._numbers is not None
        plain = [c for c in columns if c not in self._number_of]
        if len(plain) == len(columns):
            return self._texts[plain]
        # Names must stay as written: 000123 was parsed as a number because it looks like one.
        written = pd.concat(list(self._chunks(usecols=None)), ignore_index=True)
        written = written[(written.fillna("") != "").any(axis=1)] if len(written) != self.num_rows else written
        return written[list(columns)].fillna("").reset_index(drop=True)

    def dtype(self, columns: Sequence[str]) -> type:
        """float64: what text is read as."""
        return np.float64

    def blocks(self, columns: Sequence[str]) -> Iterator[np.ndarray]:
        """The named columns as float64 [≤ ROWS_PER_BLOCK, len(columns)].

        Raises:
            CellfastError: a value is no number (names column, row and value).
        """
        assert self._numbers is not None
        for name in columns:
            if name in self._broken:
                row, value = self._broken[name]
                raise not_a_number(self.path, name, row, value)
        chosen = [self._number_of[c] for c in columns]
        contiguous = chosen == list(range(chosen[0], chosen[0] + len(chosen))) if chosen else False
        for start in range(0, self.num_rows, ROWS_PER_BLOCK):
            block = self._numbers[start : start + ROWS_PER_BLOCK]
            yield block[:, chosen[0] : chosen[-1] + 1] if contiguous else block[:, chosen]


def not_a_number(path: object, column: str, row: int, value: str) -> CellfastError:
    """The error for text in a feature column."""
    return CellfastError(
        f"{path}, row {row}: column '{column}' is a feature and holds '{value[:60]}', which is not a number. Correct it, "
        f"leave the cell empty where the value is missing, or choose the features with {option('features')}."
    )


def _as_asked(frame: pd.DataFrame, options: dict[str, Any]) -> pd.DataFrame:
    kinds = options["dtype"]
    if not isinstance(kinds, dict):
        return frame
    out = frame.copy()
    for name, kind in kinds.items():
        if kind is not str:
            column = frame[name].str.strip().mask(frame[name].str.strip().isin(_MISSING))
            if options.get("decimal") == ",":
                column = column.str.replace(",", ".", regex=False)
            out[name] = pd.to_numeric(column).astype(np.float64)
    return out


def _has_decimal_commas(head: pd.DataFrame) -> bool:
    comma = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
    found = False
    for name in head.columns:
        if is_metadata(name):
            continue
        texts = [t for t in head[name].fillna("").unique() if t not in _MISSING]
        if texts and all(comma.fullmatch(t) or re.fullmatch(r"[+-]?\d+", t) for t in texts):
            found |= any("," in t for t in texts)
    return found


def _first_text(column: pd.Series, decimal: str) -> int | None:
    text = column.fillna("").str.strip()
    if decimal == ",":
        text = text.str.replace(",", ".", regex=False)
    wrong = (pd.to_numeric(text, errors="coerce").isna() & ~text.isin(_MISSING)).to_numpy(dtype=bool)
    return int(wrong.argmax()) if wrong.any() else None


def _looks_numeric(name: str, column: pd.Series, decimal: str) -> bool:
    """Whether a column is taken for numbers: most of its values are, or its name is a measurement's."""
    text = column.fillna("").str.strip()
    text = text[~text.isin(_MISSING)]
    if decimal == ",":
        text = text.str.replace(",", ".", regex=False)
    if is_measured(name):
        return True
    if text.empty or is_metadata(name):
        return False
    return bool(pd.to_numeric(text, errors="coerce").notna().mean() > 0.5)
