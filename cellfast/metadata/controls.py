"""The language of queries for controls: conditions on metadata columns, read by a parser of its own; nothing in a query is ever
executed.

::

    condition  = condition or condition | condition and condition | not condition | (condition) | comparison | test
    comparison = value (== != < <= > >=) value …       chains as in mathematics: 0.1 < concentration <= 3
               | column [not] in [constant, …]         ``column == [constant, …]`` is the same
    test       = column.str.match('regex') .contains('regex') .startswith('text') .endswith('text') | column.isna() .notna()
               | column of True and False
    value      = column | `column with blanks` | 'text' | number | True | False | None

``&``, ``|`` and ``~`` are ``and``, ``or`` and (before a bracket, a test or a column) ``not``, as in pandas. A comparison with a
missing value is false. Regular expressions are RE2's, whose cost grows with the text and not with the pattern.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option

MOST_CHARACTERS, MOST_DEPTH, MOST_PATTERN = 4000, 50, 300

LANGUAGE = (
    "The language has columns (`in back quotes` where they have blanks), 'text', numbers, True, False, None, == != < <= > >=, "
    "in [...], and, or, not, .str.match, .str.contains, .str.startswith, .str.endswith, .isna() and .notna(); example: "
    "\"Metadata_Compound == 'DMSO'\""
)

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w))
    | (?P<text>[rR]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))
    | `(?P<quoted>[^`]+)`
    | (?P<word>[^\W\d]\w*)
    | (?P<sign>\*\*|//|==|!=|<=|>=|<<|>>|:=|->|\S))""",
    re.VERBOSE | re.DOTALL,
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_TURNED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_CONSTANTS = {"True": True, "False": False, "None": None}
_TESTS = ("match", "contains", "startswith", "endswith")
_KIND = {"text": "text", "number": "numbers", "bool": "True and False"}


@dataclass(frozen=True)
class _Column:
    """A column as its different values: ``codes`` int [N] into ``values``, −1 for a missing one."""

    name: str
    codes: np.ndarray
    values: list[Any]

    def where(self, test: Callable[[Any], bool]) -> np.ndarray:
        """bool [N]: the rows whose value passes the test; missing ones do not."""
        passed = np.array([*(bool(test(value)) for value in self.values), False])
        return passed[self.codes]

    def kinds(self) -> set[str]:
        return {_kind(value) for value in self.values}


@dataclass(frozen=True)
class _List:
    values: list[Any]


def select_rows(query: str, frame: pd.DataFrame, short_names: Mapping[str, str] | None = None) -> np.ndarray:
    """bool [N]: the rows of ``frame`` for which ``query`` holds.

    Args:
        query: a condition in the language of this module.
        frame: the metadata [N, …].
        short_names: other names for columns: ``compound`` for ``Metadata_Compound``.

    Raises:
        CellfastError: anything that is not of the language (named), a column that is not there, a number compared with text.
    """
    aliases = {short: name for short, name in (short_names or {}).items() if name in frame and short not in frame}
    return _Parser(query, frame, aliases).parse()


def _kind(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "bool"
    if isinstance(value, str):
        return "text"
    # Decimal is a Number too; complex numbers have no order.
    return "number" if isinstance(value, Number) and not isinstance(value, complex) else "other"


class _Parser:
    """Recursive descent; each rule returns a mask (bool [N]), a `_Column`, a `_List` or a constant."""

    def __init__(self, query: str, frame: pd.DataFrame, aliases: Mapping[str, str]) -> None:
        self.query, self.frame, self.aliases = query, frame, aliases
        self.depth = self.at = 0
        if len(query) > MOST_CHARACTERS:
            raise CellfastError(
                f"{option('controls')} is not a query over the metadata: {len(query)} characters, at most {MOST_CHARACTERS}"
            )
        self.tokens: list[tuple[str, str]] = []
        place = 0
        while query[place:].strip():
            found = _TOKEN.match(query, place)
            assert found is not None
            assert found.lastgroup is not None
            self.tokens.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()
        self.tokens.append(("end", ""))

    def refuse(self, why: str) -> NoReturn:
        raise CellfastError(f"{option('controls', self.query)} is not a query over the metadata: {why}. {LANGUAGE}")

    def next_is(self, *texts: str) -> bool:
        kind, text = self.tokens[self.at]
        return kind in ("word", "sign") and text in texts

    def take(self, *texts: str) -> str | None:
        """The next token where it is one of ``texts``."""
        if not self.next_is(*texts):
            return None
        self.at += 1
        return self.tokens[self.at - 1][1]

    def expect(self, text: str, after: str) -> None:
        if not self.take(text):
            self.refuse(f"expected '{text}' after {after}, found {self.found()}")

    def found(self) -> str:
        kind, text = self.tokens[self.at]
        return "the end" if kind == "end" else f"'{text}'"

    def parse(self) -> np.ndarray:
        mask = self.either()
        if self.tokens[self.at][0] != "end":
            self.refuse(f"{self.found()} is not understood where it stands{self.hint()}")
        return self.condition(mask)

    def hint(self) -> str:
        return {"=": " (two values are compared by ==)", "@": " (there are no variables)"}.get(self.tokens[self.at][1], "")

    def condition(self, value: Any) -> np.ndarray:
        """A mask, or a column of True and False, as a mask."""
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, _Column):
            if value.kinds() <= {"bool"}:
                return value.where(bool)
            self.refuse(f"the column {value.name} alone is no condition; compare it with something")
        self.refuse(f"{_shown(value)} alone is no condition")

    def either(self) -> Any:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            self.refuse(f"brackets more than {MOST_DEPTH} deep")
        value = self.both()
        while self.take("or", "|"):
            value = self.condition(value) | self.condition(self.both())
        self.depth -= 1
        return value

    def both(self) -> Any:
        value = self.negated()
        while self.take("and", "&"):
            value = self.condition(value) & self.condition(self.negated())
        return value

    def negated(self) -> Any:
        count = 0
        while self.take("not"):
            count += 1
        value = self.comparison()
        if not count:
            return value
        return ~self.condition(value) if count % 2 else self.condition(value)

    def comparison(self) -> Any:
        left = self.operand()
        mask = None
        while True:
            sign = self.take(*_COMPARE, "in") or ("not in" if self.take("not") else None)
            if sign is None:
                return left if mask is None else mask
            if sign == "not in":
                self.expect("in", "'not'")
            right = self.operand()
            one = self.compare(left, sign, right)
            mask = one if mask is None else mask & one
            left = right

    def compare(self, left: Any, sign: str, right: Any) -> np.ndarray:
        if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
            self.refuse(f"a condition is compared by {sign}; join conditions with and, or, not")
        if isinstance(left, _List) and sign in ("==", "!="):
            left, right = right, left
        if isinstance(right, _List) or sign in ("in", "not in"):
            inside = {"==": True, "in": True, "!=": False, "not in": False}.get(sign)
            if not isinstance(left, _Column) or not isinstance(right, _List) or inside is None:
                self.refuse(f"'{sign}' asks for a column on its left and a list of constants on its right: column in ['a', 'b']")
            # With the kind: True is 1 to Python.
            wanted = {(_kind(value), value) for value in right.values if value is not None}
            for _, value in wanted:
                self.check_kind(left, value)
            return left.where(lambda value: ((_kind(value), value) in wanted) == inside)
        if isinstance(left, _Column) and isinstance(right, _Column):
            return self.compare_columns(left, sign, right)
        if not isinstance(left, _Column):
            if not isinstance(right, _Column):
                self.refuse(f"{_shown(left)} {sign} {_shown(right)} compares no column")
            left, sign, right = right, _TURNED[sign], left
        if right is None:
            return np.zeros(len(self.frame), bool)
        self.check_kind(left, right)
        compare, kind = _COMPARE[sign], _kind(right)
        return left.where(lambda value: compare(value, right) if _kind(value) == kind else sign == "!=")

    def compare_columns(self, left: _Column, sign: str, right: _Column) -> np.ndarray:
        if left.values and right.values and not left.kinds() & right.kinds():
            self.refuse(f"{left.name} {sign} {right.name} compares {_kinds(left)} with {_kinds(right)}")
        compare = _COMPARE[sign]

        def one(a: int, b: int) -> bool:
            if a < 0 or b < 0:
                return False
            x, y = left.values[a], right.values[b]
            return bool(compare(x, y)) if _kind(x) == _kind(y) != "other" else sign == "!="

        pairs, back = np.unique(np.stack([left.codes, right.codes]), axis=1, return_inverse=True)
        return np.array([one(a, b) for a, b in pairs.T], dtype=bool)[np.ravel(back)]

    def check_kind(self, column: _Column, value: Any) -> None:
        if column.values and _kind(value) not in column.kinds():
            hint = ""
            if _kind(value) == "number" and "text" in column.kinds():
                hint = f"; in quotes it is text: '{value}'"
            elif "number" in column.kinds():
                hint = "; numbers have no quotes"
            self.refuse(f"the column {column.name} holds {_kinds(column)}, {_shown(value)} is {_KIND[_kind(value)]}{hint}")

    def operand(self) -> Any:
        if self.take("~"):
            self.depth += 1
            if self.depth > MOST_DEPTH:
                self.refuse(f"more than {MOST_DEPTH} times '~'")
            value = self.condition(self.operand())
            self.depth -= 1
            return ~value
        kind, text = self.tokens[self.at]
        if kind == "sign" and text in ("-", "+") and self.tokens[self.at + 1][0] == "number":
            self.at += 1
            return -self.number() if text == "-" else self.number()
        if kind == "number":
            return self.number()
        if kind == "text":
            self.at += 1
            return _unquoted(text)
        if self.take("("):
            value = self.either()
            if self.next_is(",") and not isinstance(value, (np.ndarray, _Column)):
                return self.listed(")", [value])
            self.expect(")", "a bracket's content")
            return self.tested(value) if isinstance(value, _Column) else value
        if self.take("["):
            return self.listed("]", [])
        if kind == "quoted" or (kind == "word" and text not in ("and", "or", "in", "not", "is", "if", "else", "lambda", "for")):
            self.at += 1
            if kind == "word" and text in _CONSTANTS:
                return _CONSTANTS[text]
            if self.next_is("("):
                self.refuse(f"there are no functions: '{text}(' is refused")
            return self.tested(self.column(text))
        self.refuse(f"expected a column or a constant, found {self.found()}{self.hint()}")

    def number(self) -> int | float:
        text = self.tokens[self.at][1]
        self.at += 1
        return int(text) if text.isdigit() and len(text) < 19 else float(text)

    def listed(self, end: str, values: list[Any]) -> _List:
        while not self.take(end):
            if values:
                self.expect(",", "a value of a list")
                if self.take(end):
                    break
            if self.next_is("(", "[", "~"):
                self.refuse("a list holds constants only")
            value = self.operand()
            if isinstance(value, (np.ndarray, _Column)):
                self.refuse("a list holds constants only")
            values.append(value)
        return _List(values)

    def column(self, name: str) -> _Column:
        known = self.aliases.get(name, name)
        if known not in self.frame:
            columns = [str(column) for column in self.frame.columns]
            near = difflib.get_close_matches(name, [*columns, *self.aliases], n=3)
            order = [*near, *(column for column in columns if column not in near)]
            more = f" and {len(order) - 20} more" if len(order) > 20 else ""
            self.refuse(f"there is no column '{name}'; there are {', '.join(order[:20])}{more}")
        series = self.frame[known]
        if isinstance(series, pd.DataFrame):
            self.refuse(f"there are several columns '{known}'")
        try:
            codes, values = pd.factorize(series)
        except TypeError:
            self.refuse(f"the column {known} holds neither text nor numbers nor True and False")
        return _Column(known, codes, list(values))

    def tested(self, column: Any) -> Any:
        """A column, or what a test with a dot behind it says of its rows."""
        if not self.take("."):
            return column
        kind, name = self.tokens[self.at]
        self.at += 1
        if name in ("isna", "notna"):
            self.expect("(", f".{name}")
            self.expect(")", f".{name}(")
            return (column.codes < 0) == (name == "isna")
        if name == "str" and self.take("."):
            kind, name = self.tokens[self.at]
            self.at += 1
            name = f"str.{name}"
        if kind != "word" or name.removeprefix("str.") not in _TESTS or not name.startswith("str."):
            self.refuse(f"'.{name}' is refused")
        self.expect("(", f".{name}")
        argument = self.operand()
        if not isinstance(argument, str):
            self.refuse(f".{name} asks for a text in quotes, found {_shown(argument)}")
        self.expect(")", f"the text of .{name} (its other arguments are not in the language)")
        if column.values and "text" not in column.kinds():
            self.refuse(f"the column {column.name} holds {_kinds(column)}; .{name} is for text")
        if name in ("str.startswith", "str.endswith"):
            return column.where(lambda v: isinstance(v, str) and getattr(v, name[4:])(argument))
        return self.matched(column, f"^(?:{argument})" if name == "str.match" else argument, argument)

    def matched(self, column: _Column, pattern: str, given: str) -> np.ndarray:
        # Imported here: only these two tests need it. Its engine is RE2; Python's own may take for ever.
        import pyarrow as pa
        import pyarrow.compute as pc

        if len(given) > MOST_PATTERN:
            self.refuse(f"a regular expression of {len(given)} characters, at most {MOST_PATTERN}")
        texts = pa.array([value if isinstance(value, str) else "" for value in column.values], pa.large_string())
        try:
            found = pc.match_substring_regex(texts, pattern).to_pylist()
        except pa.ArrowInvalid as error:
            self.refuse(
                f"'{given}' is not a regular expression of bounded cost ({error}); (?=…), (?!…) and \\1 are none, (?i) ignores "
                "case"
            )
        passed = np.array([*(hit and isinstance(v, str) for hit, v in zip(found, column.values)), False], dtype=bool)
        return passed[column.codes]


def _unquoted(text: str) -> str:
    raw = text[0] in "rR"
    body = text[2:-1] if raw else text[1:-1]
    # Only quotes and backslashes need one: of other letters it is kept, for regular expressions.
    return body if raw else re.sub(r"\\(['\"\\])", r"\1", body)


def _shown(value: Any) -> str:
    return f"the column {value.name}" if isinstance(value, _Column) else "a list" if isinstance(value, _List) else repr(value)


def _kinds(column: _Column) -> str:
    return " and ".join(sorted(_KIND.get(kind, "values of another kind") for kind in column.kinds()))
