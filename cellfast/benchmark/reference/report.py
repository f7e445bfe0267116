"""A comparison's JSON as a Markdown report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cellfast.benchmark.reference.quality import MEASURES, TRAINED, UNTRAINED, paired_differences
from cellfast.benchmark.reference.table import LEAST_SEEDS, SECTIONS
from cellfast.errors import CellfastError

OTHERS = {
    "reference": "the reference implementation (a user's checkout, used as it is)",
    "baseline": "a plain PyTorch implementation written from the paper (no checkout of the reference was given)",
}


def document(result: dict[str, Any], *, quick: bool, earlier: Path | None = None) -> dict[str, Any]:
    """``result`` with its environment, every section and part with the commit it was measured at.

    ``earlier``: a file whose sections and parts are kept where they were not measured now.

    Raises:
        CellfastError: ``earlier`` is no such file, or was measured with other settings or against another implementation.
    """
    from cellfast.benchmark import environment

    where = environment()
    _stamp(result, where["commit"])
    if earlier is not None and earlier.exists():
        try:
            written = json.loads(earlier.read_text(encoding="utf-8"))
            before, commit = written["result"], written["environment"]["commit"]
            then = {"settings": before["settings"], **{key: before["other"][key] for key in ("name", "commit")}}
        except (ValueError, KeyError, TypeError) as error:
            raise CellfastError(
                f"{earlier}: not a result of this benchmark ({error!r}); leave out --update to replace it"
            ) from error
        now = {"settings": result["settings"], **{key: result["other"][key] for key in ("name", "commit")}}
        for key, value in now.items():
            if value != then[key]:
                raise CellfastError(f"--update: the earlier file has {key} {then[key]}, this run {value}: measure all of it anew")
        _stamp(before, commit)
        parts = {**before.get("parts", {}), **result.get("parts", {})}
        other = {**before["other"], **{key: value for key, value in result["other"].items() if value}}
        result = {**before, **result, "other": other, **({"parts": parts} if parts else {})}
    return {"subject": "reference", "quick": quick, "environment": where, "result": result}


def _stamp(result: dict[str, Any], commit: str) -> None:
    for entry in (*result.get("parts", {}).values(), *(result[key] for key in SECTIONS if key != "parts" and key in result)):
        entry.setdefault("commit", commit)


def side_names(entry: dict[str, Any]) -> list[str]:
    """The sides measured in a part, cellfast first."""
    return [key for key, value in entry.items() if isinstance(value, dict)]


def markdown(document: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    return "\n".join(_lines(document)) + "\n"


def rows_of(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A Markdown table, with an empty line before it."""
    yield ""
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    result, system = document["result"], document["environment"]["system"]
    other, s = result["other"], result["settings"]
    yield f"# cellfast compared with {OTHERS[other['name']]}"
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
            f"From the same crops and weights the first loss differs by {a['float32']['first_loss_difference']:.1e} in float32. Over "
            f"{a['steps']} training steps in float64 the losses differ by at most {a['float64']['largest_loss_difference']:.1e} and the features by "
            f"{a['float64']['largest_feature_difference']:.1e} (`--recipe perakis2021`)."
        )
    if "quality" in result:
        yield from _quality(result["quality"], other["name"])
    if "scaling" in result:
        yield from _scaling(result["scaling"])


def _parts(result: dict[str, Any]) -> Iterator[str]:
    cells = result["cells"]
    yield from ("", "## Parts", "", f"{cells['number']} cells of {cells['size']} px, {cells['origin']}. Medians, half the spread in brackets; "
                "peak memory of the whole process, and above what its imports take.")  # fmt: skip
    sides = [(part, name, entry[name]) for part, entry in result["parts"].items() for name in side_names(entry)]
    yield from rows_of(
        ("part", "side", "seconds", "cells/s", "peak GiB", "above imports GiB"),
        (
            (part, name, f"{e['median_seconds']:.4g} (± {50 * e['spread']:.0f} %)", f"{e['cells_per_second']:,.4g}",
             f"{e['peak_bytes'] / 2**30:.2f}", f"{e['growth_bytes'] / 2**30:.2f}")
            if "median_seconds" in e else (part, name, "out of memory", "", "", "")
            for part, name, e in sides
        ),
    )  # fmt: skip
    yield from rows_of(
        ("part", "side", "times as fast", "share of its memory", "of its memory above imports"),
        (
            (part, name, f"{e['times_faster']:.1f}", f"{e['memory_ratio']:.2f}", f"{e['growth_ratio']:.2f}")
            for part, name, e in sides
            if "times_faster" in e
        ),
    )


def _quality(q: dict[str, Any], other: str) -> Iterator[str]:
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in q["runs"]:
        if run["limit"] in (UNTRAINED, TRAINED):
            runs.setdefault((run["side"], run["limit"]), []).append(run)
    yield from ("", "## Quality", "")
    yield (
        f"{q['cells']} cells of {q['size']} px ({q['origin']}), {q['encoder']}. Every training: {q['steps']} step{'s' * (q['steps'] > 1)} of {q['batch_size']} cells, "
        f"{q['steps'] * q['batch_size']:,} images in two views each, from {len(q['seeds'])} seed{'s' * (len(q['seeds']) > 1)}. All features are scored by the same "
        "code. Retrieval: a treated cell's nearest cell of another well has its treatment. One value for each seed."
    )

    def scores(of: list[dict[str, Any]], key: str) -> str:
        return ", ".join(f"{run[key]['num_correct']:.6g}/{run[key]['num_evaluated']}" for run in of)

    yield from rows_of(
        ("side", "weights", "NSC", "NSCB", "retrieval, % (chance)", "seconds"),
        (
            (side, "random" if limit == UNTRAINED else "trained", scores(of, "nsc"), scores(of, "nscb"),
             ", ".join(f"{100 * r['retrieval']:.1f} ({100 * r['retrieval_chance']:.1f})" for r in of if r["retrieval"] is not None),
             ", ".join(f"{run['seconds']:.0f}" for run in of))
            for (side, limit), of in runs.items()
        ),
    )  # fmt: skip
    differences = paired_differences(q, other)
    if not differences:
        yield from ("", f"Fewer than {LEAST_SEEDS} seeds: nothing is said about which side's features are better.")
        return
    yield from ("", f"Difference to the {other}'s features from the same seed, in percentage points: mean over {differences[0]['seeds']} seeds and "
                "95 % t interval. It tells how much seeds vary; cells and treatments are the same in all.")  # fmt: skip
    names = [*dict.fromkeys(row["side"] for row in differences)]
    texts = {
        (r["side"], r["measure"]): "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in (r["mean"], *r["interval_95"])))
        for r in differences
    }
    yield from rows_of(
        ("side", "NSC", "NSCB", "retrieval"), ((side, *(texts.get((side, m), "") for m in MEASURES)) for side in names)
    )


def _scaling(s: dict[str, Any]) -> Iterator[str]:
    yield from ("", "## Scaling", "", "~: extrapolated by a straight line through the two largest sizes measured. Memory is above imports; while loading, "
                "cellfast's is pages of the mapped crop store, which the system may drop.")  # fmt: skip
    for part, sides in s["cells"].items():
        yield from _by_size(f"{part}: cells", "cells", sides)
    for part, sides in s["minibatch"].items():
        yield from _by_size(f"{part}: cells per minibatch", "minibatch", sides)
    rows = [(part, name, of) for part, sides in s["cores"].items() for name, of in sides.items() if of]
    if rows:
        header = ("cells/s by threads", "side", *(str(row["threads"]) for row in rows[0][2]))
        yield from rows_of(
            header,
            (
                (part, name, *(f"{row['cells_per_second']:,.4g}" if "cells_per_second" in row else "did not end" for row in of))
                for part, name, of in rows
            ),
        )


def _by_size(title: str, key: str, sides: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    texts: dict[int, dict[str, str]] = {}
    for name, rows in sides.items():
        for row in rows:
            seconds, mark = row.get("seconds", row.get("median_seconds")), "~" if row.get("extrapolated") else ""
            if seconds is not None:
                text = f"{mark}{seconds:,.3g} s ({mark}{_size(row['growth_bytes'])})"
            else:
                text = (
                    "too long"
                    if "timed_out" in row
                    else "out of memory" + (f" at {_size(row['allowed_bytes'])}" if "allowed_bytes" in row else "")
                )
            texts.setdefault(row[key], {})[name] = text
    if texts:
        yield from rows_of(
            (title, *sides), ((f"{n:,}", *(found.get(name, "") for name in sides)) for n, found in sorted(texts.items()))
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
