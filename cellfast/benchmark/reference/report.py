"""A comparison's JSON as a Markdown report and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Part, which of cellfast's sides (None: the first), quantity, sign, value, what it is.
TARGETS = (
    ("step", None, "times_faster", ">=", 2.0, "training step, float32"),
    ("epoch", None, "times_faster", ">=", 2.0, "training, a whole epoch, float32"),
    ("epoch", "cellfast, bf16", "times_faster", ">=", 3.5, "training, a whole epoch, --amp"),
    ("loss", None, "times_faster", ">=", 200.0, "NT-Xent"),
    ("load and augment", None, "times_faster", ">=", 20.0, "loading + augmentation"),
    ("evaluate", None, "times_faster", ">=", 100.0, "NSC and NSCB of treatments"),
    ("score", None, "times_faster", ">=", 100.0, "the same with the profiles before it, from cells, without pictures"),
    ("step", None, "memory_ratio", "<=", 1 / 3, "peak memory of a training step"),
    ("step", "in pieces", "memory_ratio", "<=", 1 / 3, "peak memory of a training step, --chunk-size"),
)


def side_names(entry: dict[str, Any]) -> list[str]:
    """The sides measured in a part, cellfast first."""
    return [key for key, value in entry.items() if isinstance(value, dict)]


def load_and_augment(parts: dict[str, Any]) -> dict[str, float]:
    """Loading once and making two views, per cell: how many times as fast."""
    if not {"load", "augment"} <= set(parts):
        return {}
    rates = {}
    for part in ("load", "augment"):
        names = side_names(parts[part])
        for key, name in (("ours", names[0]), ("other", names[-1])):
            rates[part, key] = parts[part][name]["cells_per_second"]
    per_cell = {key: 1 / rates["load", key] + 1 / rates["augment", key] for key in ("ours", "other")}
    return {"times_faster": per_cell["other"] / per_cell["ours"]}


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The aims of the comparison, each with what was measured and whether it is met."""
    parts = {**result.get("parts", {}), "load and augment": load_and_augment(result.get("parts", {}))}
    rows = []
    for part, side, key, sign, value, what in TARGETS:
        entry = parts.get(part, {})
        if side is not None:
            entry = next((entry[name] for name in side_names(entry) if side in name), {})
        found = entry.get(key)
        if found is not None:
            met = found >= value if sign == ">=" else found <= value
            rows.append({"what": what, "target": f"{sign} {value:.3g}", "measured": found, "met": met})
    return rows


def markdown(document: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    result, system = document["result"], document["environment"]["system"]
    other = result["other"]
    s = result["settings"]
    names = {"reference": "the reference implementation (a user's checkout, driven as it is)",
             "baseline": "a plain PyTorch implementation written from the paper (no checkout of the reference was given)"}  # fmt: skip
    yield f"# cellfast beside {names[other['name']]}"
    yield ""
    yield (
        f"{system['cpu']['name']}, {s['threads']} threads, {system['memory_bytes'] / 2**30:.0f} GiB; cellfast {system['cellfast']} "
        f"(commit {document['environment']['commit'][:12] or 'unknown'}), torch {system['packages']['torch']}; "
        f"{other['name']} commit {other['commit'][:12] or 'unknown'}. {s['encoder']}, random weights, minibatch {s['batch_size']}, {s['size']} px."
    )
    if "parts" in result:
        yield from _parts(result)
    if "agreement" in result:
        a = result["agreement"]
        yield from ("", "## Number by number", "")
        yield (
            f"From the same crops and weights the first loss differs by {a['float32']['first_loss_difference']:.1e} in float32; over "
            f"{a['steps']} training steps in float64 losses differ by at most {a['float64']['largest_loss_difference']:.1e} and features by "
            f"{a['float64']['largest_feature_difference']:.1e} (`--recipe perakis2021`)."
        )
    if "quality" in result:
        yield from _quality(result["quality"])
    if "scaling" in result:
        yield from _scaling(result["scaling"])


def _parts(result: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## Parts", "", f"{result['cells']['number']} cells of {result['cells']['size']} px, {result['cells']['origin']}; "
                "medians, half the spread in brackets; peak memory of the whole process and above its imports.", "")  # fmt: skip
    yield "| part | side | seconds | cells/s | peak GiB | above imports GiB |"
    yield "|---|---|---|---|---|---|"
    for part, entry in result["parts"].items():
        for name in side_names(entry):
            e = entry[name]
            if "median_seconds" not in e:
                yield f"| {part} | {name} | out of memory | | | |"
                continue
            yield (
                f"| {part} | {name} | {e['median_seconds']:.4g} (± {50 * e['spread']:.0f} %) | {e['cells_per_second']:,.4g} "
                f"| {e['peak_bytes'] / 2**30:.2f} | {e['growth_bytes'] / 2**30:.2f} |"
            )
    yield from (
        "",
        "| part | side | times as fast | share of its memory | of its memory above imports |",
        "|---|---|---|---|---|",
    )
    for part, entry in result["parts"].items():
        for name in side_names(entry)[:-1]:
            e = entry[name]
            if "times_faster" in e:
                yield f"| {part} | {name} | {e['times_faster']:.1f} | {e['memory_ratio']:.2f} | {e['growth_ratio']:.2f} |"
    rows = targets(result)
    if rows:
        yield from ("", "| aim | target | measured | |", "|---|---|---|---|")
        for row in rows:
            yield f"| {row['what']} | {row['target']} | {row['measured']:.2f} | {'met' if row['met'] else 'missed'} |"


def _quality(q: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## Quality", "", f"{q['cells']} cells of {q['size']} px ({q['origin']}), {q['encoder']}, minibatch {q['batch_size']}; seconds "
                "are loading and training. Scored alike: cellfast's default profiles; retrieval: a treated cell's nearest cell of another well "
                "has its treatment.", "")  # fmt: skip
    yield "| limit | side | seed | steps | seconds | NSC | NSCB | retrieval (chance) |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in q["runs"]:
        retrieval = "" if run["retrieval"] is None else f"{100 * run['retrieval']:.1f} % ({100 * run['retrieval_chance']:.1f} %)"
        yield (
            f"| {run['limit']} | {run['side']} | {run['seed']} | {run['steps']} | {run['seconds']:.0f} "
            f"| {run['nsc']['num_correct']:.6g}/{run['nsc']['num_evaluated']} | {run['nscb']['num_correct']:.6g}/{run['nscb']['num_evaluated']} | {retrieval} |"
        )


def _scaling(s: dict[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## Scaling",
        "",
        "Extrapolated figures are marked ~: a straight line through the two largest sizes measured.",
    )
    for part, sides in s["cells"].items():
        if not any(sides.values()):
            continue
        yield from (
            "",
            f"{part}, seconds (memory above imports)",
            "",
            "| cells | " + " | ".join(sides) + " |",
            "|---|" + "---|" * len(sides),
        )
        by_size: dict[int, dict[str, str]] = {}
        for name, rows in sides.items():
            for row in rows:
                mark = "~" if row.get("extrapolated") else ""
                text = (
                    f"{mark}{row['seconds']:,.3g} s ({mark}{_size(row['growth_bytes'])})" if "seconds" in row else "out of memory"
                )
                by_size.setdefault(row["cells"], {})[name] = text
        for n, cells in sorted(by_size.items()):
            yield f"| {n:,} | " + " | ".join(cells.get(name, "") for name in sides) + " |"
        if part == "load":
            yield from (
                "",
                "cellfast's memory while loading is pages of the mapped crop store, which the system may drop; the other's is its own.",
            )
    for part, sides in s["minibatch"].items():
        yield from ("", f"{part} by minibatch", "", "| minibatch | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides))
        sizes = sorted({row["minibatch"] for rows in sides.values() for row in rows})
        for n in sizes:
            texts = []
            for rows in sides.values():
                row = next((r for r in rows if r["minibatch"] == n), None)
                if row is None:
                    texts.append("")
                elif "median_seconds" in row:
                    texts.append(f"{row['median_seconds']:.3g} s ({_size(row['growth_bytes'])})")
                else:
                    texts.append(f"out of memory at {_size(row['allowed_bytes'])}" if "out_of_memory" in row else "too long")
            yield f"| {n} | " + " | ".join(texts) + " |"
    threads = _threads(s)
    if not threads:
        return
    yield from (
        "",
        "cells/s by threads",
        "",
        "| part | side | " + " | ".join(threads) + " |",
        "|---|---|" + "---|" * len(threads),
    )
    for part, sides in s["cores"].items():
        for name, rows in sides.items():
            yield f"| {part} | {name} | " + " | ".join(f"{row['cells_per_second']:,.4g}" for row in rows) + " |"


def _threads(s: dict[str, Any]) -> list[str]:
    rows = next(iter(next(iter(s["cores"].values())).values()))
    return [str(row["threads"]) for row in rows]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"


def plot(document: dict[str, Any], path: str | Path) -> bool:
    """Bars of how many times as fast each part is, and the cost of minibatches; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cellfast.atomic import atomic_path

    result = document["result"]
    parts = {name: e["times_faster"] for name, e in result.get("parts", {}).items() if "times_faster" in e}
    losses = result.get("scaling", {}).get("minibatch", {}).get("loss")
    panels = [bool(parts), bool(losses)]
    if not any(panels):
        return False
    figure, axes = plt.subplots(1, sum(panels), figsize=(5 * sum(panels), 3.6), squeeze=False, layout="constrained")
    places = iter(axes[0])
    if parts:
        axis = next(places)
        bars = axis.barh(list(parts)[::-1], list(parts.values())[::-1], color="#30638e")
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *parts.values()), 3 * max(parts.values()))
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(f"times as fast as the {result['other']['name']}")
    if losses:
        axis = next(places)
        for name, rows in losses.items():
            done = [row for row in rows if "median_seconds" in row]
            # Less than 1 MiB is less than what is measured.
            axis.loglog([r["minibatch"] for r in done], [max(r["growth_bytes"], 2**20) / 2**30 for r in done], "o-", label=name)
            stopped = [row for row in rows if "out_of_memory" in row]
            if stopped:
                axis.plot([r["minibatch"] for r in stopped], [r["allowed_bytes"] / 2**30 for r in stopped], "x", color="black")
        axis.set_xlabel("cells per minibatch (x: out of memory)")
        axis.set_ylabel("memory of NT-Xent, GiB")
        axis.legend()
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    return True
