"""The reports of ``profile`` and ``evaluate`` as lines of text."""

from __future__ import annotations

from typing import Any

from cellfast.metadata.values import spelling_notes
from cellfast.printable import printable
from cellfast.profiles.batch_metrics import batch_lines


def profile_lines(report: dict[str, Any]) -> list[str]:
    """What was read, joined, left out and fitted, for people."""
    rows, inputs = report["rows"], report["inputs"]
    cells = f" of {rows['cells']:,} cells" if "cells" in rows and rows["cells"] != inputs["rows"] else ""
    lines = [
        f"read      {inputs['rows']:,} rows{cells}, {inputs['features']} features, from {inputs['files']} "
        f"file{'s' if inputs['files'] != 1 else ''}"
    ]
    lines += [f"missing   {one}" for one in inputs.get("unfinished", [])]
    for unit in ("well", "site"):
        if f"{unit}s" in rows:
            what = "cells" if f"cells_per_{unit}" in rows else "rows"
            low, middle, high = rows[f"{what}_per_{unit}"]
            one = f"; {rows[f'one_cell_{unit}s']:,} {unit}s have one" if rows.get(f"one_cell_{unit}s") and high > 1 else ""
            total = f" of {rows['cells']:,} cells" if what == "cells" else ""
            per = f"{what} per {unit}: {low:,} to {high:,}, median {middle:g}{one}" if high > 1 else f"one row per {unit}"
            lines.append(f"{unit}s     {rows[f'{unit}s']:,}{total}; {per}")
    if rows.get("count_column"):
        lines.append(f"note      {rows['count_column']}")
    if rows.get("note"):
        lines.append(f"note      {rows['note']}")
    if rows.get("nan_values_left_out") or rows.get("infinite_values_left_out"):
        lines.append(
            f"left out  {rows['nan_values_left_out']:,} NaN and {rows['infinite_values_left_out']:,} infinite values, "
            f"feature by feature"
        )
    if rows.get("metadata_not_constant"):
        lines.append(f"metadata  not carried over, as it varies within wells: {', '.join(rows['metadata_not_constant'])}")
    lines += [f"note      {note}" for note in report.get("notes", [])]
    lines += [f"spelling  {note}" for note in spelling_notes(report.get("spellings", {}))]
    if "metadata_join" in report:
        join = report["metadata_join"]
        by = " and ".join(c.removeprefix("Metadata_").lower() for c in join["key"])
        lines.append(
            f"plate map {join['rows_joined']:,} of {join['rows']:,} rows joined by {by}"
            + _listed(join["wells_not_joined"], "not", join["not_joined"])
        )
        if join["values_replaced"]:
            replaced = ", ".join(f"{n:,} of {c.removeprefix('Metadata_')}" for c, n in join["values_replaced"].items())
            lines.append(f"replaced  values of the input by other ones of the plate map: {replaced}")
        if join["columns_left_out"]:
            lines.append(
                f"left out  columns of the plate map that vary within its key: {', '.join(join['columns_left_out'][:10])}"
            )
        lines += [f"note      {note}" for note in join["notes"]]
        if join["empty_wells"]:
            lines.append(f"empty     {_listed(join['empty_wells'], 'wells of these plates have no rows', join['empty'])[2:]}")
    if "moa_join" in report:
        join = report["moa_join"]
        lines.append(
            f"MoA       {join['treatments_joined']} of {join['treatments']} treatments joined"
            + _listed(join["treatments_not_joined"], "not", join["not_joined"])
            + _listed(join["unused_rows_of_file"], "rows of the file unused", join["unused"])
        )
        lines += [f"note      {note}" for note in join["notes"]]
    lines.append(f"batch     from {report['batch_source']}")
    missing = report["missing"]
    if missing["dropped_features"]:
        lines.append("dropped   " + _features(missing["dropped_features"]))
    if missing["dropped_rows"]:
        lines.append(
            f"dropped   {len(missing['dropped_rows'])} rows with missing "
            f"values{_listed(len(missing['dropped_rows']), 'rows', missing['dropped_rows'])}"
        )
    lines.append(f"controls  {report['controls']['num']:,} {report['controls']['level']}s ({report['controls']['rule']})")
    if not report["normalization"]:
        lines.append("normalise none")
    for step in report["normalization"]:
        lines.append("normalise " + _step(step))
        if step.get("dropped_features"):
            lines.append("dropped   " + _features(step["dropped_features"]))
    if report.get("selection"):
        lines.append("selected  " + _features(report["selection"]))
    lines += batch_lines(report.get("batch_metrics"))
    if report.get("treatments_vary_in"):
        lines.append(f"metadata  not carried over, as it varies within treatments: {', '.join(report['treatments_vary_in'])}")
    if report.get("wells_without_compound"):
        lines.append(f"left out  {report['wells_without_compound']:,} wells without a compound")
    lines.append(
        f"written   {report['profiles']['rows']:,} {report['level']} profiles of {report['profiles']['features']} features"
    )
    return [printable(line) for line in lines]


def _step(step: dict[str, Any]) -> str:
    fitted = f"on {step['num_controls']:,} rows ({step['controls']})" + (
        f", once per {step['by']} ({step['groups']})" if step["by"] != "all" else ""
    )
    if step["step"] == "sphering":
        low, high = step["rank"]
        rank = f"rank {low}" if low == high else f"rank {low} to {high}"
        text = f"sphering ({step['rotation']}) {fitted}; {rank} of {step['num_features']} features"
        if step["shrinkage"] is not None and step["shrinkage"][0] is not None:
            text += f"; Ledoit-Wolf shrinkage {_range(step['shrinkage'])}"
        if step["lambda"] is not None and step["lambda"][0] is not None:
            text += f", lambda {_range(step['lambda'])} = {_range(step['lambda_over_mean_eigenvalue'])} of the mean eigenvalue"
        if high < step["num_features"]:
            text += (
                "; fewer independent controls than features: the directions they do not vary in are scaled by the "
                "regularisation alone"
            )
        return text
    if step["step"] == "coral":
        return f"CORAL {fitted}, lambda {step['lambda']:g}; fewest controls: {step['fewest_controls']}"
    if step["step"] == "pca":
        return f"pca {fitted}; {step['num_components']} components with {100 * step['variance']:.1f} % of the variance"
    if step["step"] == "center":
        shrunk = (
            f"; means shrunk towards the {step['towards']}'s, own weight {step['median_weight']:.2f}, and that towards the mean of all, "
            f"own weight {step['median_outer_weight']:.2f} (medians)"
            if "towards" in step
            else ""
        )
        return f"center {fitted}; fewest controls: {step['fewest_controls']}{shrunk}"
    return f"{step['step']} {fitted}"


def _range(values: list[float | None]) -> str:
    present = [v for v in values if v is not None]
    if not present:
        return "n/a"
    return f"{present[0]:.4g}" if len(set(present)) == 1 else f"{min(present):.4g} to {max(present):.4g}"


def _features(dropped: dict[str, str]) -> str:
    shown = list(dropped)[:8]
    return (
        f"{len(dropped)} features: "
        + ", ".join(f"{name} ({dropped[name]})" for name in shown)
        + (" …" if len(dropped) > len(shown) else "")
    )


def _listed(count: int, what: str, shown: list[str]) -> str:
    return f"; {count} {what}: {', '.join(shown[:8])}{' …' if count > 8 else ''}" if count else ""


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """Scores with counts, intervals and what was left out, for people."""
    counts = result["counts"]
    lines = [
        f"profiles  {counts['profiles']:,} {result['options']['level']}s of {counts['compounds']} compounds, "
        f"{counts['moas']} MoAs, {counts['batches']} batches"
        + (f", {counts['cells']:,} cells" if counts["cells"] is not None else "")
        + "; "
        f"{counts['controls']:,} control rows left out ({counts['controls_rule']})"
    ]
    if counts["without_moa"] or counts["without_compound"]:
        lines.append(
            f"left out  {counts['without_moa']:,} rows without a MoA "
            f"({', '.join(counts['without_moa_compounds'][:8])}{' …' if len(counts['without_moa_compounds']) > 8 else ''}), "
            f"{counts['without_compound']:,} without a compound"
        )
    for rule in ("nsc", "nscb"):
        score = result[rule]
        if score["accuracy"] is None:
            lines.append(
                f"{rule.upper():<9} not defined: no profile has a candidate"
                + (" (no batch is known)" if counts["batch_source"] == "none" else "")
            )
        else:
            interval = score["interval_95"]
            lines.append(
                f"{rule.upper():<9} {100 * score['accuracy']:.1f} %  ({score['num_correct']:.6g}/{score['num_evaluated']})  "
                f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} % over {counts['moa_clusters']} MoAs; "
                f"{_chance(score)}; over compounds {100 * score['compound_macro_accuracy']:.1f} %; "
                f"always '{score['majority_baseline']['moa']}': {100 * score['majority_baseline']['accuracy']:.1f} %"
            )
        ties = score["ties"]
        if ties["num_profiles"]:
            lines.append(
                f"          ties: {ties['num_profiles']:,} profiles have equally near neighbours (up to "
                f"{ties['most_equally_near']:,}); {ties['num_undecided']:,} of them count by the share of random choices that is right"
            )
        for reason, named in score["excluded"].items():
            if named:
                lines.append(
                    f"          {len(named)} not evaluated ({reason.replace('_', ' ')}): "
                    f"{', '.join(named[:8])}{' …' if len(named) > 8 else ''}"
                )
    if result["nscb"]["num_pairs_sharing_a_batch"]:
        lines.append(
            f"          {result['nscb']['num_pairs_sharing_a_batch']:,} pairs of a profile and a candidate share a batch all the same "
            f"(batch rule {result['options']['batch_rule']})"
        )
    for what, drop, interval in (
        ("", result["drop"], result["drop_interval_95"]),
        (
            " on the {num_evaluated} profiles that both evaluate",
            *((result["drop_common"] or {}).get(k) for k in ("drop", "interval_95")),
        ),
    ):
        if drop is not None:
            what = what.format(**result["drop_common"])
            lines.append(
                f"drop      {100 * drop:.1f} points{what}  95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
            )
    if baseline := result["cell_count_baseline"]:
        alone = [f"{rule.upper()} {100 * baseline[rule]:.1f} %" for rule in ("nsc", "nscb") if baseline[rule] is not None]
        alone += (
            [f"mAP per moa {baseline['mean_average_precision']:.4f}"] if baseline["mean_average_precision"] is not None else []
        )
        lines.append(f"baseline  the number of cells alone gets {', '.join(alone)}")
    if result["one_batch_moas"]:
        how = {"exclude": "left out of NSCB as queries and candidates", "queries": "left out of NSCB as queries", "keep": "kept"}
        lines.append(f"one batch {', '.join(result['one_batch_moas'])}: {how[result['options']['one_batch_moas']]}")
    if result["one_compound_moas"]:
        how = "left out" if result["options"]["unanswerable"] == "exclude" else "counted as wrong"
        lines.append(f"note      MoAs of a single compound can never be right, {how}: {', '.join(result['one_compound_moas'])}")
    r = result["replicate_reproducibility"]
    for what, share in (
        ("all pairs", r),
        ("across plates", r and r["across_plates"]),
        ("across batches", r and r["across_batches"]),
    ):
        if share and share["percent_replicating"] is not None:
            low, high = share["interval_95"]
            lines.append(
                f"replicate {what}: {share['percent_replicating']:.1f} % of {share['num_treatments']} treatments reproducible, "
                f"95 % interval {low:.1f} to {high:.1f} %, chance 5 %; median similarity {share['median_replicate_similarity']:.3f}"
            )
    if r and (r["num_single_well_treatments"] or r["num_without_null"]):
        lines.append(
            f"          left out: {r['num_single_well_treatments']} treatments with one well, {r['num_without_null']} with too few other "
            "treatments on their plates"
        )
    for what, precision in (result["mean_average_precision"] or {}).items():
        if precision:
            ties, (low, high) = precision["num_queries_with_ties"], precision["interval_95"]
            lines.append(
                f"mAP       per {what}: {precision['mean']:.4f} over {precision['num_groups']} groups, 95 % interval "
                f"{low:.4f} to {high:.4f}, chance {precision['chance']:.4f}"
                + (f"; {ties:,} queries with ties, expected over random orders" if ties else "")
            )
    lines += batch_lines(result.get("batch_metrics"))
    return [printable(line) for line in lines]


def _chance(score: dict[str, Any]) -> str:
    if score["p_value"] is None:
        return "chance not computed"
    text = f"chance {100 * score['chance']:.1f} %, p = {score['p_value']:.2g}"
    if not score["num_exchangeable"]:
        return f"{text}: no two MoAs share a batch, so chance cannot be told from the score"
    return text


def comparison_lines(report: dict[str, Any]) -> list[str]:
    """A paired comparison, for people."""
    lines = [f"common    {report['num_common']} profiles; only in A {report['num_only_a']}, only in B {report['num_only_b']}"]
    for name, (one, other) in report["differing_options"].items():
        lines.append(f"options   {name} differs: A {one}, B {other}; the difference may be due to that")
    if report["num_other_moa"]:
        lines.append(f"options   {report['num_other_moa']} profiles have another MoA in B than in A")
    for rule in ("nsc", "nscb"):
        r = report[rule]
        if r["difference"] is None:
            lines.append(f"{rule.upper():<9} no profile is evaluated in both")
        else:
            low, high = r["interval_95"]
            lines.append(
                f"{rule.upper():<9} A {100 * r['accuracy_a']:.1f} %, B {100 * r['accuracy_b']:.1f} % of "
                f"{r['num_evaluated_in_both']}; B - A {100 * r['difference']:+.1f} points, "
                f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}; only A right {r['only_a_right']}, only B right "
                f"{r['only_b_right']} (McNemar p = {r['mcnemar_p_value']:.2g})"
            )
    return [printable(line) for line in lines]
