"""The hit table: what ``cellfast activity`` writes and says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cellfast.atomic import atomic_path, write_json
from cellfast.metadata import columns as names
from cellfast.printable import printable
from cellfast.profiles.activity import Activity
from cellfast.profiles.table import check_output

_NAMES = {
    "map": "mAP, exchanged", "mahalanobis": "Mahalanobis, exchanged", "e_distance": "E-distance, exchanged",
    "count": "cell count alone, exchanged", "map_control": "mAP against controls, random ranks",
    "map_all": "mAP against all wells, random ranks",
}  # fmt: skip


def write_hits(activity: Activity, output: str | os.PathLike[str]) -> list[Path]:
    """Write the treatments to ``output`` (.parquet, .csv, .csv.gz), beside it ``<stem>_compounds`` and, where there are some,
    ``<stem>_doses``, and ``<stem>.json`` with counts and calibration, last; returns the paths.

    Raises:
        CellfastError: another extension.
    """
    check_output(output)
    output = Path(output)
    stem, suffix = next(
        (output.name[: -len(s)], output.name[-len(s) :])
        for s in (".parquet", ".csv.gz", ".csv")
        if output.name.lower().endswith(s)
    )
    written = []
    for name, frame in (("", activity.treatments), ("_compounds", activity.compounds), ("_doses", activity.doses)):
        if name == "_doses" and not len(frame):
            continue
        path = output.with_name(f"{stem}{name}{suffix}")
        with atomic_path(path) as temporary:
            if suffix.lower() == ".parquet":
                frame.to_parquet(temporary, index=False)
            else:
                frame.to_csv(temporary, index=False, compression="gzip" if suffix.lower().endswith(".gz") else None)
        written.append(path)
    path = output.with_name(f"{stem}.json")
    write_json(path, activity.result)
    return [*written, path]


def activity_lines(activity: Activity, most: int = 10) -> list[str]:
    """What was compared, how many are active by which p-value, whether p-values hold on controls, and the strongest hits."""
    result, table = activity.result, activity.treatments
    counts, options = result["counts"], result["options"]
    lines = [
        f"wells     {counts['wells']:,} of {counts['treatments']:,} treatments, {counts['compounds']:,} compounds; {counts['controls']:,} "
        f"controls ({counts['controls_rule']}); {counts['plates']:,} plates, {counts['batches']:,} batches"
        + (f"; {counts['without_compound']:,} wells without a compound left out" if counts["without_compound"] else ""),
        f"exchange  with controls of the same {counts['exchanged_within']}"
        + (f"; {counts['wells_not_exchanged']:,} wells have none there" if counts["wells_not_exchanged"] else ""),
    ]
    if counts["features_left_out"]:
        missing = counts["features_left_out"]
        lines.append(
            f"left out  {len(missing):,} of {len(missing) + counts['features']:,} features that are missing in some well: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
        )
    if counts["identical_wells"]:
        lines.append(f"note      {counts['identical_wells']:,} wells are identical to another in every feature")
    for name, found in result["active"].items():
        if found["num_tested"]:
            low, high = found["interval_95"]
            lines.append(
                f"{'active   ' if name == options['hit_by'] else '         '} {found['num_active']:,} of {found['num_tested']:,} "
                f"({100 * found['num_active'] / found['num_tested']:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %) at a false "
                f"discovery rate of {options['false_discovery_rate']:g}: {_NAMES[name]}"
            )
    calibration = result["calibration"]
    if calibration["num_sets"]:
        shares = ", ".join(
            f"{_NAMES[name].removesuffix(', exchanged')} {100 * calibration[name]['share_below_0.05']:.1f} %"
            for name in _NAMES
            if name in calibration
        )
        lines.append(
            f"controls  {calibration['num_sets']} sets of controls taken for treatments: p is at most 0.05 in (5 % is right): {shares}"
        )
    else:
        lines.append("controls  too few on a plate to take some for treatments: the p-values were not checked on controls")
    q = table[f"{options['hit_by']}_q"].to_numpy(np.float64)
    if np.isfinite(q).any() and not table["active"].any() and np.nanmin(q) > options["false_discovery_rate"]:
        lines.append(f"note      the smallest q is {np.nanmin(q):.3g}; with few controls or wells no exchange can be rarer")
    hits = table[table["active"]].sort_values("mahalanobis", ascending=False)
    for row in hits.head(most).to_dict("records"):
        dose = row.get(names.CONCENTRATION, np.nan)
        lines.append(
            f"hit       {row[names.COMPOUND]}{'' if dose != dose else f' {dose:g}'}: mAP {row['map_control']:.3f} (chance "
            f"{row['map_control_chance']:.3f}), q {row[options['hit_by'] + '_q']:.2g}, Mahalanobis {row['mahalanobis']:.2f}, induction "
            f"{100 * row['induction']:.1f} %"
            + (f", {row['count_ratio']:.2f} of the controls' cells" if "count_ratio" in row else "")
            + (f"; nearest {row['nearest_1']}" if row.get("nearest_1") else "")
        )
    if len(hits) > most:
        lines.append(f"          … and {len(hits) - most:,} more")
    if len(activity.doses):
        doses = activity.doses
        lines.append(
            f"doses     {len(doses):,} compounds of three doses or more; {int((doses['trend_q'] <= options['false_discovery_rate']).sum()):,} "
            f"have an effect that grows with the dose, {int(doses['lowest_active_dose'].notna().sum()):,} an active dose"
        )
    return [printable(line) for line in [*lines, *(f"note      {note}" for note in result["notes"])]]
