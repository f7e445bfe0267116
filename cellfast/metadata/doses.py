"""Concentrations in µM, from numbers, numbers with units, and decimal commas."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from cellfast.errors import CellfastError

#: Relative difference up to which two concentrations are one dose: tables print 0.3 as 0.299999.
RELATIVE_TOLERANCE = 1e-3

_UM = {
    "m": 1e6,
    "mm": 1e3,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "fm": 1e-9,
    "micromolar": 1.0,
    "nanomolar": 1e-3,
}
_UM |= {"millimolar": 1e3, "picomolar": 1e-6, "umol/l": 1.0, "µmol/l": 1.0, "μmol/l": 1.0, "nmol/l": 1e-3, "mmol/l": 1e3}
_MISSING = {"", "na", "n/a", "nan", "none", "null", "-"}
_DOSE = re.compile(r"([+-]?(?:\d+(?:[.,]\d*)*|[.,]\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s.,].*)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")


def same_dose(a: float, b: float) -> bool:
    """Whether two concentrations are equal within `RELATIVE_TOLERANCE`; two unknown (NaN) ones are."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


def unify_doses(values: np.ndarray) -> np.ndarray:
    """float64 [N]: the same concentrations with one value for those within `RELATIVE_TOLERANCE` (0.3, 0.30000001, 0.2999); NaN
    stays.

    Of the values that are one dose the commonest is taken, of equally common ones the shortest.
    """
    found, codes, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    shown = found.copy()
    start = 0
    for stop in range(1, len(found) + 1):
        if stop == len(found) or not same_dose(found[start], found[stop]):
            group = range(start, stop)
            shown[start:stop] = found[min(group, key=lambda i: (-counts[i], len(repr(float(found[i]))), found[i]))]
            start = stop
    return shown[codes.reshape(-1)]


def concentrations_um(values: Iterable[object], where: str, unit: str | None = None) -> np.ndarray:
    """float64 [N] µM of a column of concentrations; NaN for an empty cell, ``NA`` or ``nan``.

    A value may carry its unit (``100 nM``, ``0.1 uM``); then every value but 0 must. ``unit`` is that of values without one
    (default µM), as the column's name gives it. A comma is the decimal sign where the whole column has commas and no point.

    Raises:
        CellfastError: no number, a negative or infinite one, an unknown unit, values with and without units, a comma that may be
            either a decimal sign or one of thousands; ``where`` names the table and the column, the first three values are named.
    """
    texts = [str(v).strip() for v in values]
    unique = dict.fromkeys(texts)
    known: dict[str, float] = {}
    parts: dict[str, tuple[str, str]] = {}
    bad: list[str] = []
    for text in unique:
        if text.lower() in _MISSING:
            known[text] = math.nan
            continue
        found = _DOSE.fullmatch(text)
        if found is None or found[1].count(".") > 1:
            bad.append(text)
        else:
            parts[text] = found[1], (found[2] or "").strip().lower()
    if bad:
        raise _error(where, "is not a number of µM, such as 0.3, 1e-3 or '100 nM'", bad)
    unknown = [text for text, (_, its) in parts.items() if its and its not in _UM]
    if unknown:
        raise _error(where, f"has a unit that is not one of M, mM, µM (uM), nM, pM ({len(unknown)} such)", unknown)
    commas = [text for text, (number, _) in parts.items() if "," in number]
    points = [text for text, (number, _) in parts.items() if "." in number]
    if commas:
        mixed = [t for t in commas if parts[t][0].count(",") > 1]
        if points or mixed:
            raise _error(where, "mixes decimal points and commas", [*commas[:2], *points])
        if all(_THOUSANDS.fullmatch(parts[text][0]) for text in commas):
            raise _error(where, "may be thousands or decimal fractions; write it with a point, or without separators", commas)
    bare = [text for text, (number, its) in parts.items() if not its and _number(number) != 0]
    if any(its for _, its in parts.values()) and bare:
        withs = [text for text, (_, its) in parts.items() if its]
        raise _error(where, "stands beside values with a unit, and has none", [*bare[:2], *withs[:1]])
    scale = _UM[(unit or "um").lower()]
    for text, (number, its) in parts.items():
        value = _number(number) * (_UM[its] if its else scale)
        if not 0 <= value < math.inf:
            bad.append(text)
        # One rounding: 100 nM is 0.1 µM and not 0.10000000000000001.
        known[text] = float(f"{value:.12g}") if its or unit else value
    if bad:
        raise _error(where, "is not a concentration: expected 0 or more, and finite", bad)
    return np.array([known[text] for text in texts], np.float64)


def concentration_um(text: object, where: str) -> float:
    """`concentrations_um` of one value."""
    return float(concentrations_um([text], where)[0])


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def _error(where: str, what: str, values: list[str]) -> CellfastError:
    return CellfastError(f"{where}: {', '.join(repr(v) for v in values[:3])} {what}. Correct the column")
