"""Which treatments do something: each against the controls of its plates, by retrieval, by distance and by cell count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.batches import fill_batches
from cellfast.metadata.counts import CELL_COUNT
from cellfast.metadata.treatments import find_controls, treatment_key
from cellfast.profiles.build import CONTROL
from cellfast.profiles.deviations import Deviations, deviations
from cellfast.profiles.dose_response import dose_responses
from cellfast.profiles.exchange import STATISTICS, Exchanged, exchange
from cellfast.profiles.identical import identical_groups
from cellfast.profiles.intervals import ratio_interval
from cellfast.profiles.moas import moa_parts
from cellfast.profiles.nearest_treatments import nearest_treatments
from cellfast.profiles.neighbours import METRICS
from cellfast.profiles.precision_null import (
    expected_average_precision,
    false_discovery_rates,
    normalized_precision,
    precision_p_values,
)
from cellfast.profiles.ranking import NEGATIVE, POSITIVE, AveragePrecision, rank_positives
from cellfast.profiles.table import ProfileTable

ACROSS = ("none", "plate", "batch")

#: Sets of controls called a treatment, to see whether p-values are uniform.
CALIBRATIONS = 200


@dataclass
class ActivityOptions:
    """What ``cellfast activity`` can be told; the defaults are its defaults.

    Attributes:
        metric: cosine, correlation or euclidean.
        across: positives (and negatives) of a well are only those of another ``plate`` or ``batch``; ``none``: all.
        hit_by: the p-value a hit is called by: ``map``, ``mahalanobis`` or ``e_distance``.
        false_discovery_rate: a treatment is active where its q is at most this.
        null_size: draws of random ranks for the p-values of mean average precision as copairs has them.
        num_permutations: exchanges of labels with controls.
        controls: query for the control rows.
        group_by, pool, batch_regex: as of ``cellfast profile``.
        neighbours: nearest treatments listed.
        seed: of all random draws.
    """

    metric: str = "cosine"
    across: str = "none"
    hit_by: str = "map"
    false_discovery_rate: float = 0.05
    null_size: int = 10_000
    num_permutations: int = 10_000
    controls: str | None = None
    group_by: Sequence[str] = ()
    pool: Sequence[str] = ()
    batch_regex: str | None = None
    neighbours: int = 3
    seed: int = 0


@dataclass
class Activity:
    """Result of ``score_activity``.

    Attributes:
        treatments: one row per treatment; compounds: one row per compound (all doses together); doses: one row per compound
        with three doses or more.
        result: counts, calibration, options; JSON-serialisable.
    """

    treatments: pd.DataFrame
    compounds: pd.DataFrame
    doses: pd.DataFrame
    result: dict[str, Any]


@dataclass
class _Wells:
    """The wells and how they are compared: rows of controls, codes of plates, batches and what is exchanged."""

    table: ProfileTable
    controls: np.ndarray
    stratum: np.ndarray
    apart: np.ndarray | None
    counts: np.ndarray | None
    deviations: Deviations


def score_activity(wells: ProfileTable, options: ActivityOptions | None = None) -> Activity:
    """Compare every treatment and compound with the controls.

    mAP against the controls (positives: the treatment's wells, negatives: controls) and against all other wells, normalised and with the
    p-value of the random ranks of that pool size, equal to copairs; the p-value of exchanged labels within plates (``exchange``) of
    mAP, of the distances and of the cell count; Benjamini-Hochberg q of each; induction; the nearest treatments and MoAs; dose response.

    Raises:
        CellfastError: no compound, no controls, no treatment, fewer than two controls; profiles without a direction; one row per
            treatment only.
    """
    options = options or ActivityOptions()
    _check(options)
    data, treated, counts = _wells(wells, options)
    metadata = data.table.metadata
    key = treatment_key(metadata.iloc[treated].reset_index(drop=True), options.group_by, options.pool)
    codes, labels = _groups(metadata, treated, key)
    if len(labels) == len(treated):
        raise CellfastError(
            f"Each of the {len(labels)} treatments has one well, so none has a replicate: activity needs wells, as "
            "`cellfast profile --level well` or `--wells-output` writes them."
        )
    whole, compounds = _groups(metadata, treated, [names.COMPOUND])
    by_treatment, statistics = _scores(data, codes, labels, options)
    by_compound = by_treatment if np.array_equal(codes, whole) else _scores(data, whole, compounds, options)[0]
    by_treatment = nearest_treatments(data.table, codes, by_treatment, options.metric, options.neighbours)
    calibration = _calibration(data, codes, options)
    doses = dose_responses(by_treatment, codes, metadata, data.deviations.magnitude, options)
    result = {
        "counts": {**counts, "treatments": len(by_treatment), "compounds": len(by_compound)},
        "active": _active(by_treatment, options),
        "calibration": calibration,
        "smallest_p_value": 1 / (1 + options.num_permutations),
        "statistics": statistics,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()},
        "notes": list(_notes(data, options)),
    }
    return Activity(by_treatment, by_compound, doses, result)


def _check(options: ActivityOptions) -> None:
    for name, allowed in (("metric", METRICS), ("across", ACROSS), ("hit_by", STATISTICS[:3])):
        if getattr(options, name) not in allowed:
            raise CellfastError(f"{name} must be one of {', '.join(allowed)}; got '{getattr(options, name)}'.")
    if not 0 < options.false_discovery_rate < 1:
        raise CellfastError(f"false_discovery_rate must be between 0 and 1, got {options.false_discovery_rate}.")


def _wells(table: ProfileTable, options: ActivityOptions) -> tuple[_Wells, np.ndarray, dict[str, Any]]:
    """The wells with their controls, the rows treated, and counts of what was left out."""
    metadata, source = fill_batches(table.metadata, options.batch_regex)
    if options.controls is None and CONTROL in metadata and metadata[CONTROL].any():
        control, rule = metadata[CONTROL].to_numpy(dtype=bool), CONTROL
    else:
        control, rule = find_controls(metadata, options.controls)
    if names.COMPOUND not in metadata:
        raise CellfastError(f"The profiles have no {names.COMPOUND}; their metadata: {', '.join(metadata.columns)}.")
    known = control | (metadata[names.COMPOUND] != "").to_numpy()
    table = ProfileTable(metadata, table.features, table.feature_names, table.provenance).rows(known)
    metadata, control = table.metadata, control[known]
    if control.sum() < 2 or control.all():
        raise CellfastError(
            f"Activity compares treatments with controls; {int(control.sum())} of {len(control)} rows with a compound are controls "
            f"({rule})."
        )
    finite = np.isfinite(table.features).all(axis=0)
    missing = [name for name, keep in zip(table.feature_names, finite.tolist()) if not keep]
    if not finite.all():
        table = table.with_features(table.features[:, finite], [name for name in table.feature_names if name not in set(missing)])
    if not finite.any():
        raise CellfastError(f"Each of the {len(finite)} features is missing in some well: drop these wells, or repair them.")
    plate = pd.factorize(metadata[names.PLATE])[0] if names.PLATE in metadata else np.zeros(len(metadata), np.int64)
    batch = pd.factorize(metadata[names.BATCH])[0] if names.BATCH in metadata else np.zeros(len(metadata), np.int64)
    rows, treated = np.flatnonzero(control), np.flatnonzero(~control)
    # The finest units of which nearly all have controls; a well of one without is not exchanged, and counted.
    units = {"plate": plate, "batch": batch, "screen": np.zeros(len(plate), np.int64)}
    level = next(name for name, unit in units.items() if np.isin(unit[treated], unit[rows]).mean() >= 0.9)
    unit = units[level]
    matched = np.isin(unit[treated], unit[rows])
    apart = {"none": None, "plate": plate, "batch": batch}[options.across]
    if apart is not None and len(np.unique(apart)) < 2:
        raise CellfastError(f"across {options.across} needs wells of several; all {len(apart)} are of one.")
    cells = metadata[CELL_COUNT].to_numpy(np.float64) if CELL_COUNT in metadata else None
    if cells is not None and not np.isfinite(cells).all():
        cells = None
    counts = {
        "wells": len(treated), "controls": len(rows), "controls_rule": rule, "without_compound": int((~known).sum()),
        "features": len(table.feature_names), "plates": int(plate.max()) + 1, "batches": int(batch.max()) + 1,
        "batch_source": source, "exchanged_within": level, "wells_not_exchanged": int((~matched).sum()),
        "features_left_out": missing, "identical_wells": sum(map(len, identical_groups(table.features))),
    }  # fmt: skip
    return _Wells(table, rows, unit, apart, cells, deviations(table.features, rows, unit, cells)), treated, counts


def _groups(metadata: pd.DataFrame, treated: np.ndarray, key: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """int64 [n], the group of each row, −1 for controls; and the key of each group."""
    chosen = metadata.iloc[treated].reset_index(drop=True)
    of = chosen.groupby(key, dropna=False, sort=True).ngroup().to_numpy()
    codes = np.full(len(metadata), -1, np.int64)
    codes[treated] = of
    first = np.unique(of, return_index=True)[1]
    shown = [*key, *(c for c in (names.MOA,) if c in chosen and c not in key)]
    return codes, chosen[shown].iloc[first].reset_index(drop=True)


def _members(codes: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(int(codes.max()) + 1)))[1:]


def _scores(
    data: _Wells, codes: np.ndarray, labels: pd.DataFrame, options: ActivityOptions
) -> tuple[pd.DataFrame, dict[str, Any]]:
    members = _members(codes)
    frame = labels.copy()
    frame["num_wells"] = [len(rows) for rows in members]
    for name, everyone in (("control", False), ("all", True)):
        ap = precision_against(data.table.features, codes, data.controls, everyone, options.metric, data.apart)
        frame = frame.assign(**_precision_columns(ap, codes, len(members), f"map_{name}", options))
    exchanged = exchange(
        data.table.features, data.counts, members, data.controls, data.stratum, options.metric, data.apart,
        options.num_permutations, options.seed,
    )  # fmt: skip
    frame = frame.assign(**_exchange_columns(exchanged))
    frame = frame.assign(**data.deviations.of_groups(data.table.features, members))
    frame.insert(len(labels.columns), "active", frame[f"{options.hit_by}_q"] <= options.false_discovery_rate)
    return frame, {"num_compared_with_fewer_wells": int((exchanged.num_wells < frame["num_wells"]).sum())}


def precision_against(
    features: np.ndarray, codes: np.ndarray, controls: np.ndarray, everyone: bool, metric: str, apart: np.ndarray | None
) -> AveragePrecision:
    """Average precision of the other wells of its treatment among the controls (or, with ``everyone``, all wells of no or another one).

    Args:
        codes: int64 [n], treatment of each row, −1 for controls; apart: int [n], pairs that agree in it are not ranked.
    """
    n = len(codes)
    is_control = np.zeros(n, bool)
    is_control[controls] = True

    def kinds(rows: np.ndarray) -> np.ndarray:
        kind = np.zeros((len(rows), n), np.uint8)
        kind[:, slice(None) if everyone else is_control] = NEGATIVE
        # Rows come sorted by treatment: each is looked up once.
        for code in np.unique(codes[rows]):
            kind[np.ix_(np.flatnonzero(codes[rows] == code), members[code])] = POSITIVE
        if apart is not None:
            kind[apart[rows][:, None] == apart[None, :]] = 0
        kind[np.arange(len(rows)), rows] = 0
        return kind

    members = _members(codes)
    return rank_positives(features, kinds, np.concatenate(members), metric)


def _precision_columns(
    ap: AveragePrecision, codes: np.ndarray, num: int, name: str, options: ActivityOptions
) -> dict[str, np.ndarray]:
    """mAP, normalised mAP, chance level, p and q of each group."""
    queries = np.flatnonzero(np.isfinite(ap.values) & (codes >= 0))
    group, sizes = codes[queries], np.bincount(codes[queries], minlength=num)
    positives, total = ap.num_positive[queries], ap.num_total[queries]

    def mean(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.bincount(group, weights=values, minlength=num) / sizes

    p = np.full(num, np.nan)
    found = precision_p_values(ap.values[queries], positives, total, group, options.null_size, options.seed)
    p[: len(found)] = found
    return {
        name: mean(ap.values[queries]),
        f"{name}_normalized": mean(normalized_precision(ap.values[queries], positives, total)),
        f"{name}_chance": mean(expected_average_precision(positives, total)),
        f"{name}_p": p,
        f"{name}_q": false_discovery_rates(p),
    }


def _exchange_columns(exchanged: Exchanged) -> dict[str, np.ndarray]:
    columns = {"num_wells_exchanged": exchanged.num_wells, "num_controls_exchanged": exchanged.num_controls,
               "map_matched": exchanged.precision, "e_distance": exchanged.e_distance}  # fmt: skip
    for i, name in enumerate(STATISTICS):
        columns[f"{name}_p"] = exchanged.p_values[:, i]
        columns[f"{name}_q"] = false_discovery_rates(exchanged.p_values[:, i])
    return columns


def _active(frame: pd.DataFrame, options: ActivityOptions) -> dict[str, Any]:
    """How many are active by each p-value, and by the count of cells alone."""
    column = names.COMPOUND if names.MOA not in frame else names.MOA
    label = ["|".join(moa_parts(v)) or f"\0{c}" for v, c in zip(frame[column], frame[names.COMPOUND])]
    cluster = pd.factorize(np.array(label, dtype=object))[0]
    result = {}
    for name in ("map_control", "map_all", *STATISTICS):
        q = frame[f"{name}_q"].to_numpy()
        tested = np.isfinite(q)
        active = (tested & (q <= options.false_discovery_rate)).astype(np.float64)
        result[name] = {
            "num_active": int(active.sum()), "num_tested": int(tested.sum()),
            "interval_95": ratio_interval(active, tested.astype(np.float64), cluster),
        }  # fmt: skip
    return result


def _calibration(data: _Wells, codes: np.ndarray, options: ActivityOptions) -> dict[str, Any]:
    """Controls called treatments, in the layout of real ones, against the other controls: the shares of p-values at or below 0.05 and 0.5,
    which are 0.05 and 0.5 where p-values are right.
    """
    rng = np.random.default_rng(options.seed)
    members = [rows for rows in _members(codes) if len(rows) > 1]
    by_stratum = {int(s): data.controls[data.stratum[data.controls] == s] for s in np.unique(data.stratum[data.controls])}
    drawn = []
    for _ in range(10 * CALIBRATIONS):
        wanted = np.bincount(data.stratum[members[rng.integers(len(members))]])
        strata = np.flatnonzero(wanted)
        # At least as many controls stay as are called treated.
        if wanted.sum() <= 48 and all(len(by_stratum.get(int(s), ())) >= 2 * wanted[s] for s in strata):
            drawn.append(np.concatenate([rng.choice(by_stratum[int(s)], wanted[s], replace=False) for s in strata]))
        if len(drawn) == CALIBRATIONS:
            break
    if not drawn:
        return {"num_sets": 0}
    permutations = min(options.num_permutations, 999)
    found = exchange(
        data.table.features, data.counts, drawn, data.controls, data.stratum, options.metric, data.apart, permutations,
        options.seed + 1, keep_out=drawn,
    )  # fmt: skip
    result: dict[str, Any] = {"num_sets": len(drawn)}
    for i, name in enumerate(STATISTICS):
        p = found.p_values[:, i]
        p = p[np.isfinite(p)]
        if len(p):
            result[name] = {"share_below_0.05": float((p <= 0.05).mean()), "share_below_0.5": float((p <= 0.5).mean())}
    return result


def _notes(data: _Wells, options: ActivityOptions) -> list[str]:
    notes = []
    steps = [step.get("step") for step in data.table.provenance.get("steps", []) if isinstance(step, dict)]
    if "sphering" in steps or "tvn" in steps:
        notes.append(
            "The profiles were sphered on controls: those vary less than new controls would, and treatments look active for that alone. "
            "Compare profiles that were only standardised."
        )
    if data.counts is None:
        notes.append("No cell counts: what count alone gets is not known.")
    return notes
