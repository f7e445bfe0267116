"""Two evaluations of the same treatments: the paired difference of their scores, with its interval."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cellfast.errors import CellfastError
from cellfast.profiles.intervals import paired_interval
from cellfast.profiles.moas import moa_labels


def load_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a RESULT.json of ``cellfast evaluate``.

    Raises:
        CellfastError: no such file, not JSON, or not such a result.
    """
    path = Path(path)
    if not path.is_file():
        raise CellfastError(f"{path}: no such file.")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["treatments"]:
            _ = row["id"], row["moa"], row["nsc_evaluated"], row["nsc_correct"], row["nscb_evaluated"], row["nscb_correct"]
    except (ValueError, KeyError, TypeError) as error:
        raise CellfastError(f"{path}: not a result of cellfast evaluate ({type(error).__name__}: {error}).") from None
    return result


def compare_results(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """B − A on the treatments evaluated in both: difference of accuracy, its 95 % interval over MoAs, exact McNemar p-value; and
    the options in which the two evaluations differ, which the difference may be due to.

    Args:
        a, b: from ``load_result``.

    Raises:
        CellfastError: no treatment is evaluated in both.
    """
    rows_a, rows_b = ({row["id"]: row for row in result["treatments"]} for result in (a, b))
    common = [i for i in rows_a if i in rows_b]
    if not common:
        raise CellfastError(
            "The two results have no treatment in common: compare evaluations of the same screen at the same level."
        )
    cluster = moa_labels([rows_a[i]["moa"] for i in common]).clusters()
    report: dict[str, Any] = {
        "num_common": len(common),
        "num_only_a": len(rows_a) - len(common),
        "num_only_b": len(rows_b) - len(common),
        "differing_options": _differing(a.get("options", {}), b.get("options", {})),
        "num_other_moa": sum(rows_a[i]["moa"] != rows_b[i]["moa"] for i in common),
    }
    for rule in ("nsc", "nscb"):
        both = np.array([rows_a[i][f"{rule}_evaluated"] and rows_b[i][f"{rule}_evaluated"] for i in common], np.float64)
        right = [np.array([rows[i][f"{rule}_correct"] for i in common], np.float64) * both for rows in (rows_a, rows_b)]
        total = int(both.sum())
        # With ties: right more often than in the other.
        only_a, only_b = int((right[0] > right[1]).sum()), int((right[1] > right[0]).sum())
        report[rule] = {
            "num_evaluated_in_both": total,
            "accuracy_a": float(right[0].sum()) / total if total else None,
            "accuracy_b": float(right[1].sum()) / total if total else None,
            "difference": float(right[1].sum() - right[0].sum()) / total if total else None,
            "interval_95": paired_interval((right[0], both), (right[1], both), cluster),
            "only_a_right": only_a,
            "only_b_right": only_b,
            "mcnemar_p_value": mcnemar(only_a, only_b) if total else None,
        }
    return report


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Option → its value in A and in B, where they differ; the seed, random draws and what is scored besides change no score."""
    drawn = {"seed", "num_permutations", "average_precision"}
    return {
        name: [a.get(name), b.get(name)]
        for name in dict.fromkeys([*a, *b])
        if name not in drawn and _listed(a.get(name)) != _listed(b.get(name))
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: how likely so uneven a split of the discordant pairs is if both are equally good.

    Doses of one compound, and compounds of one MoA, are not independent: the interval over MoAs is the sounder statement.
    """
    from math import comb

    n, low = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2.0 * sum(comb(n, i) for i in range(low + 1)) / 2**n)
