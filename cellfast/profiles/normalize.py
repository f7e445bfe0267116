"""Normalisation of profiles on control wells: z-score, robust z-score, sphering, CORAL, TVN."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.treatments import find_controls
from cellfast.profiles import whitening
from cellfast.profiles.table import ProfileTable

METHODS = ("none", "standardize", "mad_robustize", "sphering", "coral", "tvn")
GROUPINGS = ("plate", "batch", "all")
ROTATIONS = ("pca", "zca", "pca-cor", "zca-cor")

#: What ``cellfast profile`` does when no ``--normalize`` is given.
DEFAULT_STEPS = ("standardize:by=all,controls=all", "tvn")


@dataclass(frozen=True)
class Step:
    """One normalisation step.

    Attributes:
        method: one of ``METHODS``.
        by: fit once per ``plate``, per ``batch``, or over ``all`` rows; None takes the method's own: standardize and
        mad_robustize ``plate``,
            sphering ``all``, coral ``batch``, tvn sphering over all and CORAL per ``batch``.
        controls: query for the rows it is fitted on (``annotate.find_controls``); None finds DMSO.
        lam: regularisation of sphering: ``auto`` (Ledoit-Wolf), ``0.1`` (added to the eigenvalues), ``0.1x`` (times the mean
        eigenvalue).
        rotation: ``pca``, ``zca``, or either with ``-cor`` (on variables scaled to unit variance); None: pca, and zca when
        fitted per group.
        epsilon: pycytominer's regularisation instead of lam: added to the singular values of the controls.
    """

    method: str
    by: str | None = None
    controls: str | None = None
    lam: str | None = None
    rotation: str | None = None
    epsilon: float | None = None


def parse_steps(texts: Sequence[str], defaults: Step | None = None) -> list[Step]:
    """``["standardize:by=all,controls=all", "sphering:lambda=1"]`` → steps; what a step leaves open is taken from ``defaults``.

    Raises:
        CellfastError: unknown method, key or value.
    """
    defaults = defaults or Step("none")
    steps = []
    for text in texts:
        method, _, rest = text.partition(":")
        method = method.strip().lower()
        if method not in METHODS:
            raise CellfastError(
                f"--normalize must be one of {', '.join(METHODS)} (with options as sphering:by=all,lambda=0.1x); got '{text}'."
            )
        step = replace(defaults, method=method)
        # A comma inside a query is not a separator: only one that is followed by another option is.
        for option in re.split(r",\s*(?=(?:by|controls|lambda|rotation|epsilon)=)", rest) if rest else []:
            key, _, value = option.partition("=")
            if key.strip() not in ("by", "controls", "lambda", "rotation", "epsilon") or not value:
                raise CellfastError(
                    f"--normalize {text}: options are by=, controls=, lambda=, rotation=, epsilon=; got '{option}'."
                )
            field = {"lambda": "lam"}.get(key.strip(), key.strip())
            step = replace(step, **{field: value.strip()})
        if step.epsilon is not None:
            try:
                step = replace(step, epsilon=float(step.epsilon))
            except ValueError:
                raise CellfastError(f"--normalize {text}: epsilon must be a number, got '{step.epsilon}'.") from None
        if step.by is not None and step.by not in GROUPINGS:
            raise CellfastError(f"--normalize {text}: by must be one of {', '.join(GROUPINGS)}; got '{step.by}'.")
        if step.rotation is not None and step.rotation not in ROTATIONS:
            raise CellfastError(f"--normalize {text}: rotation must be one of {', '.join(ROTATIONS)}; got '{step.rotation}'.")
        if step.lam is not None:
            whitening.parse_lambda(step.lam)
        steps.append(step)
    return steps


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
            table, entry = {"standardize": _scale, "mad_robustize": _scale, "sphering": _sphering, "coral": _coral}[step.method](
                table, step
            )
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
        wider = {"plate": "--by batch, --by all", "batch": "--by all (CORAL then changes nothing)", "all": "--normalize none"}[by]
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
    """z-score, (x − mean) / sd with divisor n, or (x − median) / (1.4826 · MAD), on the controls of each group.

    Features whose controls do not vary in some group are dropped everywhere, counted and named. Source: pycytominer's
    standardize and mad_robustize; deviation: those keep such a feature (unscaled, or divided by 1e-18).
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
    entry = {
        "step": step.method,
        "by": by,
        "groups": len(groups),
        "controls": rule,
        "num_controls": int(controls.sum()),
        "num_features": len(keep),
        "dropped_features": {
            table.feature_names[j]: f"controls do not vary{'' if where == 'all' else ' (' + where + ')'}"
            for j, where in sorted(flat.items())
        },
    }
    return table.with_features(result[:, keep], [table.feature_names[j] for j in keep]), entry


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
    entry: dict[str, Any] = {
        "step": "sphering",
        "by": by,
        "groups": len(groups),
        "controls": rule,
        "num_controls": int(controls.sum()),
        "num_features": x.shape[1],
        "rotation": rotation,
        "rank": [min(ranks), max(ranks)],
        "regularization": f"epsilon {step.epsilon:g} on singular values" if step.epsilon is not None else (step.lam or "auto"),
        "lambda": [fit.lam for _, fit in fits] if len(fits) <= 20 else None,
        "lambda_over_mean_eigenvalue": [fit.relative_lam for _, fit in fits] if len(fits) <= 20 else None,
        "shrinkage": [fit.shrinkage for _, fit in fits] if len(fits) <= 20 else None,
    }
    if rotation.startswith("pca"):
        width = max(3, len(str(x.shape[1])))
        return table.with_features(result, [f"PC{i + 1:0{width}d}" for i in range(x.shape[1])]), entry
    return table.with_features(result), entry


def _coral(table: ProfileTable, step: Step) -> tuple[ProfileTable, dict[str, Any]]:
    """Align each group's control covariance with that of all controls: x · (C_group + I)^(−1/2) · (C_all + λI)^(1/2).

    C = XᵀX / n of the controls, not centred again (sphering has put the controls' mean at zero). Source: CORAL (Sun et al.
    2016) as in TVN (Ando et al. 2017) and the reference implementation, λ = 1 by default.
    """
    by = step.by or "batch"
    kind, lam = whitening.parse_lambda(step.lam) if step.lam is not None else ("absolute", 1.0)
    if kind != "absolute":
        kind, lam = "absolute", 1.0
    controls, rule = find_controls(table.metadata, step.controls)
    groups = _groups(table, by, controls, step, 1)
    x = table.features.astype(np.float64)
    aligned = np.empty_like(x)
    for _, rows in groups:
        aligned[rows] = whitening.times_power(x[rows], x[rows[controls[rows]]], -0.5, 1.0)
    result = whitening.times_power(aligned, x[controls], 0.5, lam)
    fewest = min(int(controls[rows].sum()) for _, rows in groups)
    entry = {"step": "coral", "by": by, "groups": len(groups), "controls": rule, "num_controls": int(controls.sum()),
             "fewest_controls": fewest, "num_features": x.shape[1], "lambda": lam}  # fmt: skip
    return table.with_features(result), entry
