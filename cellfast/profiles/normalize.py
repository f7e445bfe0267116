"""Normalisation of profiles on control wells: scaling, centring, ranks, PCA, sphering, CORAL, TVN, Harmony."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.treatments import find_controls
from cellfast.profiles import whitening
from cellfast.profiles.centering import shrunk_offsets
from cellfast.profiles.steps import Step
from cellfast.profiles.table import ProfileTable


def normalize_profiles(table: ProfileTable, steps: Sequence[Step]) -> tuple[ProfileTable, list[dict[str, Any]]]:
    """Apply the steps in order; returns the normalised table (float64) and what each step decided.

    Raises:
        CellfastError: a plate or batch without controls, too few controls, features that are not finite.
    """
    report: list[dict[str, Any]] = []
    for step in steps:
        if step.method == "none":
            continue
        if not np.isfinite(table.features).all():
            raise CellfastError("The features hold NaN or infinite values: remove them before normalising (select.drop_missing).")
        if step.method == "tvn":
            table, first = _sphering(table, replace(step, by="all"))
            coral_lam = step.lam if step.lam is not None and whitening.parse_lambda(step.lam)[0] == "absolute" else None
            table, second = _coral(table, replace(step, lam=coral_lam))
            report += [first, second]
        else:
            table, entry = _DO[step.method](table, step)
            report.append(entry)
    return table, report


def _groups(table: ProfileTable, by: str, controls: np.ndarray, step: Step, least: int) -> list[tuple[str, np.ndarray]]:
    """(name, row numbers) of each fitting group; each has at least ``least`` controls."""
    if by == "all":
        groups = [("all", np.arange(len(table)))]
    else:
        column = names.PLATE if by == "plate" else names.BATCH
        if column not in table.metadata:
            raise CellfastError(f"--by {by}: the input has no {by} column; name it with --column {by}=COLUMN, or use --by all.")
        values = table.metadata[column].to_numpy()
        groups = [(str(v), np.flatnonzero(values == v)) for v in sorted(set(values), key=natural_key)]
    short = [(name, int(controls[rows].sum())) for name, rows in groups if controls[rows].sum() < least]
    if short:
        kind = "fit" if by == "all" else by
        listed = ", ".join(f"{name} ({count})" for name, count in short[:12]) + (" …" if len(short) > 12 else "")
        have = (
            "no control wells" if all(c == 0 for _, c in short) else f"fewer than the {least} control wells {step.method} needs"
        )
        wider = {"plate": "--by batch, --by all", "batch": "--by all", "all": "--normalize none"}[by]
        if step.method in ("tvn", "coral") and by == "batch":
            wider = "--by all (one alignment for all, which leaves batches as they are), --normalize sphering"
        raise CellfastError(
            f"--normalize {step.method} --by {by}: {len(short)} of {len(groups)} {kind}{'es' if kind == 'batch' else 's'} "
            f"have {have}: {listed}. "
            f"Choose {wider}{_other_controls(step)}."
        )
    return groups


def _other_controls(step: Step) -> str:
    """The way out by other controls, where not every well is one already."""
    if (step.controls or "").strip().lower() == "all":
        return ""
    return ", or other controls (--controls QUERY; --controls all takes every well)"


@lru_cache(maxsize=1 << 16)
def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts Week2 before Week10."""
    return tuple(
        (0, int(part)) if part.isdecimal() and len(part) < 19 else (1, part) for part in re.split(r"(\d+)", text) if part
    )


def _scale(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """(x − mean) / sd with divisor n, (x − median) / interquartile range, or (x − median) / (1.4826 · MAD), on the controls of each
    group.

    Features whose controls do not vary in some group are dropped everywhere, counted and named. Source: pycytominer's
    standardize, robustize and mad_robustize; deviation: those keep such a feature (unscaled, or divided by 1e-18).
    """
    by = step.by or "plate"
    controls, rule = find_controls(table.metadata, step.controls)
    groups = _groups(table, by, controls, step, 2)
    x = table.features.astype(np.float64)
    flat: dict[int, str] = {}
    result = np.empty_like(x)
    for name, rows in groups:
        fit = x[rows[controls[rows]]]
        if step.method == "standardize":
            center, spread = fit.mean(axis=0), fit.std(axis=0)
            # Rounding of the mean alone gives a constant column a spread of about this much.
            constant = spread <= np.abs(center) * len(fit) * np.finfo(np.float64).eps
        else:
            center = np.median(fit, axis=0)
            if step.method == "robustize":
                spread = np.subtract(*np.percentile(fit, [75, 25], axis=0))
            else:
                spread = 1.4826 * np.median(np.abs(fit - center), axis=0)
            constant = spread == 0
        for j in np.flatnonzero(constant):
            flat.setdefault(int(j), name)
        with np.errstate(divide="ignore", invalid="ignore"):
            result[rows] = (x[rows] - center) / spread
    keep = np.setdiff1d(np.arange(x.shape[1]), list(flat))
    if len(keep) == 0:
        wider = {"plate": "--by batch, --by all", "batch": "--by all", "all": "--normalize none"}[by]
        raise CellfastError(
            f"--normalize {step.method} --by {by}: of no feature do the controls vary"
            + (f" in each of the {len(groups)} groups" if by != "all" else "")
            + f" ({int(controls.sum())} control wells). Choose {wider}{_other_controls(step)}."
        )
    entry = _entry(table, step, by, groups, controls, rule) | {
        "num_features": len(keep),
        "dropped_features": {
            table.feature_names[j]: f"controls do not vary{'' if where == 'all' else ' (' + where + ')'}"
            for j, where in sorted(flat.items())
        },
    }
    return table.with_features(result[:, keep], [table.feature_names[j] for j in keep]), entry


def _center(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """x − mean(controls of its group): what a plate (or batch) adds to all its wells alike is taken off.

    With ``towards`` the mean is shrunk (`centering.shrunk_offsets`), and a group needs no controls of its own.
    """
    by = step.by or "plate"
    controls, rule = find_controls(table.metadata, step.controls)
    groups = _groups(table, by, controls, step, 0 if step.towards else 1)
    x = table.features.astype(np.float64)
    fewest = {"fewest_controls": min(int(controls[rows].sum()) for _, rows in groups)}
    entry = _entry(table, step, by, groups, controls, rule) | fewest
    if step.towards is None:
        for _, rows in groups:
            x[rows] -= x[rows[controls[rows]]].mean(axis=0)
        return table.with_features(x), entry
    wider = _groups(table, step.towards, controls, step, 1)
    outer = np.empty(len(table), np.int64)
    for number, (_, rows) in enumerate(wider):
        outer[rows] = number
    if by == "plate" and step.towards == "batch":
        # A plate of two batches, as a table may have it, is two plates here.
        groups = [(name, rows[outer[rows] == o]) for name, rows in groups for o in np.unique(outer[rows])]
    code = np.empty(len(table), np.int64)
    for number, (_, rows) in enumerate(groups):
        code[rows] = number
    found = shrunk_offsets(x[controls], code[controls], np.array([outer[rows[0]] for _, rows in groups]))
    x -= found.values[code]
    return table.with_features(x), entry | {
        "towards": step.towards, "median_weight": found.weight, "median_outer_weight": found.outer_weight,
    }  # fmt: skip


def _rank(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """Each feature's ranks over the rows of a group as normal quantiles, Φ⁻¹((rank − 3/8) / (n + 1/4)), ties at their mean rank.

    Source: Blom 1958; the inverse normal transformation of JUMP's production profiles.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    by = step.by or "all"
    every = np.ones(len(table), bool)
    groups = _groups(table, by, every, step, 2)
    x = np.empty(table.features.shape)
    for _, rows in groups:
        x[rows] = ndtri((rankdata(table.features[rows], axis=0) - 0.375) / (len(rows) + 0.25))
    return table.with_features(x), _entry(table, step, by, groups, every, "all rows")


def _pca(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """The first n principal components of the rows fitted on, unscaled; or as many as hold a share of their variance."""
    fitted, rule = find_controls(table.metadata, step.controls or "all")
    x = table.features.astype(np.float64)
    mean = x[fitted].mean(axis=0)
    x -= mean
    s, v = np.linalg.eigh(whitening.second_moment(x[fitted]))
    s, v = np.maximum(s[::-1], 0.0), v[:, ::-1]
    rank = int((s > s[0] * max(x.shape) * np.finfo(np.float64).eps).sum())
    if rank == 0:
        raise CellfastError(f"--normalize pca: the {int(fitted.sum())} rows it is fitted on are all the same.")
    if step.n is not None and step.n > rank:
        raise CellfastError(
            f"--normalize pca:n={step.n}: the {int(fitted.sum())} rows it is fitted on ({rule}) have {rank} components; give n of at "
            "most that, or pca:variance=0.95."
        )
    held = np.cumsum(s) / s.sum()
    n = step.n if step.n is not None else min(rank, int(np.searchsorted(held, step.variance - 1e-12)) + 1)
    v = v[:, :n]
    v = v * np.sign(v[np.abs(v).argmax(axis=0), np.arange(n)])  # the sign of a component is arbitrary
    entry = _entry(table, step, "all", [("all", np.arange(len(table)))], fitted, rule)
    return table.with_features(x @ v, component_names(n)), entry | {"num_components": n, "variance": float(held[n - 1])}


def _harmony(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """Harmony over all rows (Korsunsky et al. 2019) as harmonypy has it: clusters that mix the batches, a linear correction in each.

    It uses every row, treated ones too, and so assumes that batches hold much the same phenotypes.
    """
    try:
        import harmonypy
    except ImportError:
        raise CellfastError("--normalize harmony needs the package harmonypy: pip install 'cellfast[harmony]'.") from None
    by = step.by or "batch"
    every = np.ones(len(table), bool)
    groups = _groups(table, by, every, step, 1)
    if len(groups) < 2:
        raise CellfastError(f"--normalize harmony --by {by}: there is one {by} only, and nothing to align. Leave the step out.")
    labels = np.empty(len(table), np.int64)
    for number, (_, rows) in enumerate(groups):
        labels[rows] = number
    # One core: the result does not depend on the machine.
    found = harmonypy.run_harmony(
        table.features, pd.DataFrame({"group": labels.astype(str)}), ["group"], verbose=False, random_state=0, ncores=1
    )
    corrected = np.asarray(found.Z_corr, np.float64)
    corrected = corrected if corrected.shape == table.features.shape else corrected.T
    return table.with_features(corrected), _entry(table, step, by, groups, every, "all rows")


def _entry(
    table: ProfileTable, step: Step, by: str, groups: Sequence[tuple[str, np.ndarray]], controls: np.ndarray, rule: str
) -> dict[str, Any]:
    """What the report says of every step."""
    return {
        "step": step.method,
        "by": by,
        "groups": len(groups),
        "controls": rule,
        "num_controls": int(controls.sum()),
        "num_features": len(table.feature_names),
    }


def component_names(n: int) -> list[str]:
    """``PC001`` … for n components."""
    width = max(3, len(str(n)))
    return [f"PC{i + 1:0{width}d}" for i in range(n)]


def _sphering(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    by = step.by or "all"
    rotation = step.rotation or ("pca" if by == "all" else "zca")
    if by != "all" and rotation.startswith("pca"):
        raise CellfastError(
            f"--normalize sphering --by {by} --rotation {rotation}: PCA gives each {by} axes of its own that cannot be "
            f"compared; use zca."
        )
    controls, rule = find_controls(table.metadata, step.controls)
    groups = _groups(table, by, controls, step, 2)
    x = table.features.astype(np.float64)
    result = np.empty_like(x)
    fits = []
    for name, rows in groups:
        fit = whitening.fit_whitening(x[rows[controls[rows]]], step.lam or "auto", rotation, step.epsilon)
        result[rows] = (x[rows] - fit.mean) @ fit.matrix
        fits.append((name, fit))
    ranks = [fit.rank for _, fit in fits]
    entry = _entry(table, step, by, groups, controls, rule) | {
        "step": "sphering",
        "rotation": rotation,
        "rank": [min(ranks), max(ranks)],
        "regularization": f"epsilon {step.epsilon:g} on singular values" if step.epsilon is not None else (step.lam or "auto"),
        "lambda": [fit.lam for _, fit in fits] if len(fits) <= 20 else None,
        "lambda_over_mean_eigenvalue": [fit.relative_lam for _, fit in fits] if len(fits) <= 20 else None,
        "shrinkage": [fit.shrinkage for _, fit in fits] if len(fits) <= 20 else None,
    }
    if rotation.startswith("pca"):
        return table.with_features(result, component_names(x.shape[1])), entry
    return table.with_features(result), entry


def _coral(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """Align each group's control covariance with that of all controls: x · (C_group + I)^(−1/2) · (C_all + λI)^(1/2).

    C = XᵀX / n of the controls, not centred again (sphering has put the controls' mean at zero). Source: CORAL (Sun et al.
    2016) as in TVN (Ando et al. 2017) and the reference implementation, λ = 1 by default.
    """
    by = step.by or "batch"
    kind, lam = whitening.parse_lambda(step.lam) if step.lam is not None else ("absolute", 1.0)
    if kind != "absolute":
        # As a part of tvn it takes the lambda of the sphering where that is a number; auto and multiples are of the sphering alone.
        lam = 1.0
    controls, rule = find_controls(table.metadata, step.controls)
    groups = _groups(table, by, controls, step, 1)
    x = table.features.astype(np.float64)
    result = np.empty_like(x)
    target = whitening.times_power(np.eye(x.shape[1]), x[controls], 0.5, lam)
    for _, rows in groups:
        fit = x[rows[controls[rows]]]
        # Many rows are multiplied once, by the product of both matrices; few are multiplied by each.
        if len(rows) > x.shape[1]:
            result[rows] = x[rows] @ whitening.times_power(target, fit, -0.5, 1.0).T
        else:
            result[rows] = whitening.times_power(x[rows], fit, -0.5, 1.0) @ target
    fewest = min(int(controls[rows].sum()) for _, rows in groups)
    entry = _entry(table, step, by, groups, controls, rule) | {"step": "coral", "fewest_controls": fewest, "lambda": lam}
    return table.with_features(result), entry


_DO = {
    "standardize": _scale,
    "robustize": _scale,
    "mad_robustize": _scale,
    "center": _center,
    "rank": _rank,
    "pca": _pca,
    "sphering": _sphering,
    "coral": _coral,
    "harmony": _harmony,
}
